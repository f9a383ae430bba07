"""Open Images V7: small files in the published layout.

storage.googleapis.com/openimages/web/download_v7.html shows box files (the lines below are its own, but for one) and
class descriptions, google.github.io/localized-narratives/file-formats.html narratives.
"""
import json

import numpy as np
from painted_pictures import encode_png
import pytest

from cloc_jax import cli
from cloc_jax.data import schema
from cloc_jax.data import sources
from cloc_jax.data.importers import engine
from cloc_jax.data.importers import open_images

HEADER = 'ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside'
LINES = [
    '0001eeaf4aed83f9,xclick,/m/0cmf2,1,0.022673031,0.9642005,0.07103825,0.80054647,0,0,0,0,0',
    '000595fe6fee6369,xclick,/m/02xwb,1,0.45655376,0.6097202,0.20399113,0.50554323,0,0,1,0,0',
    '000595fe6fee6369,xclick,/m/02xwb,1,0.1,0.3,0.25,0.75,0,0,0,0,0',
    '00075905539074f2,xclick,/m/04yx4,1,0.020477816,0.32935154,0.0956023,0.665392,0,0,0,1,0',
    '000a1249af2bc5f0,xclick,/m/09j2d,1,0.56911767,0.99852943,0.0022172949,0.93569845,1,1,0,0,0']
CLASSES = '/m/0cmf2,Airplane\n/m/02xwb,Fruit\n/m/04yx4,Man\n/m/09j2d,"Clothing, worn"\n'


class OpenImages:
  """A folder of files to be written; images are 40×80 (height × width) pixels."""

  def __init__(self, root):
    self.root, self.lines, self.classes, self.narratives = root, list(LINES), CLASSES, []
    self.folder = lambda image_id: root / 'train'

  def importer(self, **settings):
    for line in self.lines:
      image_id = line.split(',')[0]
      self.folder(image_id).mkdir(parents=True, exist_ok=True)
      (self.folder(image_id) / f'{image_id}.jpg').write_bytes(encode_png(np.zeros((40, 80, 3), np.uint8)))
    (self.root / 'boxes.csv').write_text('\n'.join([HEADER, *self.lines]) + '\n')
    (self.root / 'classes.csv').write_text(self.classes)
    path = self.root / 'narratives.jsonl'
    path.write_text(''.join(json.dumps(item) + '\n' for item in self.narratives))
    source = open_images.OpenImagesSource('train', self.root / 'train', self.root / 'boxes.csv',
                                          (path,) if self.narratives else ())
    return open_images.OpenImages(source, classes=self.root / 'classes.csv', **settings)


@pytest.fixture(name='oi')
def oi_fixture(tmp_path):
  return OpenImages(tmp_path)


def records(path, split='train'):
  source = sources.RecordSource(path, split=split)
  return [source[i] for i in range(len(source))]


@pytest.mark.parametrize('images_per_shard', [1, 3, 1024])
@pytest.mark.parametrize('header', ['', 'LabelName,DisplayName\n'])
def test_boxes_and_narratives(oi, images_per_shard, header):
  oi.classes = header + oi.classes
  oi.narratives = [
      {'dataset_id': 'open_images', 'image_id': '00075905539074f2', 'annotator_id': 93, 'caption': 'In this image رجل.',
       'timed_caption': [{'utterance': 'In this', 'start_time': 0.0, 'end_time': 0.4}],
       'traces': [[{'x': 0.2, 'y': 0.3, 't': 0.02}]], 'voice_recording': 'x.ogg'},
      {'dataset_id': 'open_images', 'image_id': 'ffff', 'annotator_id': 93, 'caption': 'Of another.'}]
  found = engine.run(oi.importer(images_per_shard=images_per_shard), out=oi.root / 'out')['train']
  got = records(oi.root / 'out')
  assert [r.image_id for r in got] == ['0001eeaf4aed83f9', '000595fe6fee6369', '00075905539074f2', '000a1249af2bc5f0']
  assert [[r.caption for r in record.regions] for record in got] == [
      ['airplane'], ['fruit'], ['man'], ['clothing, worn']]
  np.testing.assert_allclose(got[1].regions[0].box, [0.1, 0.25, 0.3, 0.75], rtol=1e-6)
  assert (got[1].height, got[1].width, got[2].captions) == (40, 80, ('In this image رجل.',))
  assert found.examples('boxes', 'dropped', 'crowd') == ['image 000595fe6fee6369, line[3]']
  assert (found.of('boxes'), found.of('captions'), found.of('captions', 'dropped')) == (5, 2, 1)
  meta = schema.read_meta(oi.root / 'out')
  assert meta.categories == ('airplane', 'fruit', 'man', 'clothing, worn') and meta.extra['labels'][0] == '/m/0cmf2'


def test_images_as_the_archives_unpack(oi):
  oi.folder = lambda image_id: oi.root / 'train' / f'train_{image_id[0]}'
  assert engine.run(oi.importer(), out=oi.root / 'out')['train'].of('images', 'kept') == 4


@pytest.mark.parametrize('lines, message', [
    ([*LINES, LINES[0]], r'boxes.csv: line 7: image 0001eeaf4aed83f9 was in an earlier, other group'),
    ([*LINES[:2], LINES[2][:40]], r"line 4: expected 13 columns, got 6: '000595fe6fee6369,xclick.*cut off"),
    ([LINES[0].replace('0.9642005', 'wide')], "line 2: could not convert string to float: 'wide'"),
    ([LINES[0].replace('0.9642005', 'nan')], 'line 2: expected finite numbers'),
    ([LINES[0], LINES[1].replace('/m/02xwb', '/m/0')], "boxes.csv: line 3: LabelName '/m/0' is not in .*classes.csv")])
def test_bad_lines_are_named(oi, lines, message):
  oi.lines = lines
  with pytest.raises(ValueError, match=message):
    engine.run(oi.importer(), out=oi.root / 'out')


def test_a_file_without_the_columns(oi):
  importer = oi.importer()
  (oi.root / 'boxes.csv').write_text('\n'.join(LINES))
  with pytest.raises(ValueError, match='boxes.csv: expected a first line of columns, ImageID first'):
    engine.run(importer, out=oi.root / 'out')


def test_pixels_are_no_fractions(oi):
  rng = np.random.default_rng(0)
  x, y = rng.integers(0, 300, (2, 40)), rng.integers(301, 900, (2, 40))
  oi.lines = [f'{i:016x},xclick,/m/04yx4,1,{x[0, i]},{y[0, i]},{x[1, i]},{y[1, i]},0,0,0,0,0' for i in range(40)]
  with pytest.raises(ValueError, match='boxes.csv: looks like xyxy pixels'):
    engine.run(oi.importer(), out=oi.root / 'out')


def test_bad_narratives_are_named(oi):
  oi.narratives = [{'image_id': '00075905539074f2'}]
  with pytest.raises(ValueError, match=r"narratives.jsonl: line 1: no key 'caption'; found \['image_id'\]"):
    engine.run(oi.importer(), out=oi.root / 'out')


def test_missing_images_lose_their_boxes(oi):
  importer = oi.importer()
  (oi.root / 'train' / '000595fe6fee6369.jpg').unlink()
  found = engine.run(importer, out=oi.root / 'out', allow_missing=True)['train']
  assert found.of('boxes', 'dropped', 'image lost') == 2 and found.of('boxes') == 5


def test_the_verb(oi, capsys):
  oi.narratives = [{'image_id': '00075905539074f2', 'caption': 'A man.'}]
  oi.importer()
  argv = ['data', 'import', 'open-images', '--images', oi.root / 'train', '--boxes', oi.root / 'boxes.csv', '--classes',
          oi.root / 'classes.csv', '--narratives', oi.root / 'narratives.jsonl', '--out', oi.root / 'out', '--workers',
          1]
  assert cli.main([str(arg) for arg in argv]) == 0
  assert 'boxes dropped: crowd' in capsys.readouterr().out and records(oi.root / 'out')[2].captions == ('A man.',)
