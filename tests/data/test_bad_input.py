"""Files of no bytes for every format, pictures that are too big, and annotations by the gigabyte.

What else is bad has its test beside each format; conventions of boxes: test_box_conventions, kinds of pictures:
test_import_images and test_transforms.
"""
import io
import json
import os
import subprocess
import sys

import cv2
import PIL.Image
import PIL.ImageFile
import pytest
from test_import_webdataset import records

from cloc_jax.data import transforms
from cloc_jax.data.importers import coco
from cloc_jax.data.importers import counts as counts_lib
from cloc_jax.data.importers import engine
from cloc_jax.data.importers import grit_parquet
from cloc_jax.data.importers import images
from cloc_jax.data.importers import open_images
from cloc_jax.data.importers import refcoco
from cloc_jax.data.importers import refcoco_repacks
from cloc_jax.data.importers import rows
from cloc_jax.data.importers import visual_genome
from cloc_jax.data.importers import webdataset


@pytest.mark.parametrize('name, importer, message', [
    ('a.json', lambda path: coco.Coco(coco.CocoSource('train', path.parent, path)),
     'a.json is not a JSON file: it is empty'),
    ('a.json', lambda path: visual_genome.VisualGenome(path.parent, path, regions=path), 'a.json is not a JSON file'),
    ('a.csv', lambda path: open_images.OpenImages(
        open_images.OpenImagesSource('train', path.parent, path), path), 'a.csv: expected a first line of columns'),
    ('a.p', lambda path: refcoco.RefCoco(path, path, path.parent), 'a.p is no pickle .*or cut off'),
    ('a.json', lambda path: refcoco_repacks.RefCocoRepack(refcoco_repacks.RepackSource('train', (path,)), path.parent),
     'a.json is not a JSON file: it is empty'),
    ('a.tar', lambda path: webdataset.WebDataset(webdataset.TarsSource('train', (path,))),
     'a.tar is cut off or damaged'),
    ('a.parquet', lambda path: rows.Rows(rows.RowsSource('train', (path,))),
     'a.parquet is no Parquet file, or cut off'),
    ('a.parquet', lambda path: grit_parquet.GritParquet(grit_parquet.ParquetSource('train', (path,))),
     'a.parquet is no Parquet file, or cut off'),
    ('a.jsonl', lambda path: rows.Rows(rows.RowsSource('train', (path,))),
     "split 'train' of data set 'rows' has no examples")])
def test_files_of_no_bytes(tmp_path, name, importer, message):
  if name.endswith('.parquet'):
    pytest.importorskip('pyarrow')
  (tmp_path / name).write_bytes(b'')
  with pytest.raises(ValueError, match=message):
    engine.run(importer(tmp_path / name), out=tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


def big(width, height):
  file = io.BytesIO()
  PIL.Image.new('1', (width, height)).save(file, 'PNG')
  return file.getvalue()


def test_a_picture_beyond_the_limit_is_left_out_and_the_limit_named():
  report = counts_lib.Counts()
  assert images.check_image(big(20_000, 10_000), report, name='a') is None
  [said] = report.examples('images', 'dropped', 'unreadable')
  assert '200000000 pixels' in said and str(2 * PIL.Image.MAX_IMAGE_PIXELS) in said


def test_a_hundred_megapixels_are_imported_undecoded(tmp_path, monkeypatch):
  data = big(10_000, 10_000)
  (tmp_path / 'a.png').write_bytes(data)
  (tmp_path / 'rows.jsonl').write_text(json.dumps({'image': 'a.png', 'caption': 'a'}) + '\n')
  with monkeypatch.context() as patch:
    patch.setattr(PIL.ImageFile.ImageFile, 'load', lambda self: pytest.fail('its pixels would take 300 MB'))
    patch.setattr(cv2, 'imdecode', lambda *_: pytest.fail('its pixels would take 300 MB'))
    engine.run(rows.Rows(rows.RowsSource('train', (tmp_path / 'rows.jsonl',))), out=tmp_path / 'out')
  [got] = records(tmp_path / 'out')
  assert got.image == data and (got.height, got.width) == (10_000, 10_000)
  assert transforms.decode(data, where='a').shape == (10_000, 10_000, 3)


_ANNOTATIONS = '''
import pathlib, sys
from cloc_jax.data.importers import coco
root = pathlib.Path(sys.argv[1])
found = coco.Coco(coco.CocoSource('train', root, root / 'instances.json')).splits()
assert sum(len(task.payload.boxes) for task in found['train']) == int(sys.argv[2])
print(*[line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')])
'''


@pytest.mark.slow
def test_memory_for_big_annotations(tmp_path):
  """CLOC_TEST_JSON_GB=1 makes it a gigabyte: 326 MiB were taken for its 1.08 million boxes."""
  wanted = float(os.environ.get('CLOC_TEST_JSON_GB', '0.2')) * 1e9
  segmentation = [[round(0.37 * i, 2) for i in range(120)]]
  number = 0
  with open(tmp_path / 'instances.json', 'w', encoding='utf-8') as file:
    file.write('{"categories": [{"id": 1, "name": "dog"}], "images": [')
    file.write(', '.join(json.dumps({'id': i, 'file_name': f'{i:012}.jpg', 'height': 480, 'width': 640})
                         for i in range(120_000)))
    file.write('], "annotations": [')
    while file.tell() < wanted:
      pieces = [json.dumps({'id': number + i, 'image_id': (number + i) % 120_000, 'category_id': 1, 'iscrowd': 0,
                            'bbox': [10.5, 20.5, 300, 200], 'segmentation': segmentation}) for i in range(1000)]
      file.write((', ' if number else '') + ', '.join(pieces))
      number += 1000
    file.write(']}')
  done = subprocess.run([sys.executable, '-c', _ANNOTATIONS, str(tmp_path), str(number)], capture_output=True,
                        text=True, check=True, timeout=1200)
  took = int(done.stdout) // 1024  # not ru_maxrss, which begins with what this process had
  print(f'{(tmp_path / "instances.json").stat().st_size / 1e9:.2f} GB, {number:,} boxes: {took} MiB')
  assert took < 500
