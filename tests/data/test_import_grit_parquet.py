"""GRIT's Parquet files in the layouts of img2dataset's writer.py and downloader.py, and of the data set's own card.

github.com/rom1504/img2dataset: ParquetSampleWriter appends a column named after the encoding to the schema of the saved
columns, key, status, error_message, width, height, original_width, original_height, exif and sha256; failures are
rows without bytes. FilesSampleWriter writes SHARD/KEY.jpg beside SHARD.parquet.
huggingface.co/datasets/zzliang/GRIT: the fields.
"""
import numpy as np
from painted_pictures import encode_png
import pytest
from test_import_grit import CAPTION
from test_import_grit import HANGER
from test_import_grit import INSTANCE
from test_import_grit import PAPER
from test_import_webdataset import records

from cloc_jax import cli
from cloc_jax.data.importers import engine
from cloc_jax.data.importers import grit_parquet

pyarrow = pytest.importorskip('pyarrow')
from pyarrow import parquet  # noqa: E402

PNG = encode_png(np.zeros((173, 256, 3), np.uint8))
LISTS = pyarrow.list_(pyarrow.list_(pyarrow.float64()))
SAVED = [('id', pyarrow.int64()), ('noun_chunks', LISTS), ('ref_exps', LISTS), ('caption', pyarrow.string()),
         ('url', pyarrow.string())]
FETCHED = SAVED + [(name, pyarrow.string()) for name in ('key', 'status', 'error_message')] + [
    (name, pyarrow.int32()) for name in ('width', 'height', 'original_width', 'original_height')] + [
    ('exif', pyarrow.string()), ('sha256', pyarrow.string())]
OWN = [('key', pyarrow.string()), ('clip_similarity_vitb32', pyarrow.float64()),
       ('clip_similarity_vitl14', pyarrow.float64()), ('id', pyarrow.int64()), ('url', pyarrow.string()),
       ('caption', pyarrow.string()), ('width', pyarrow.int64()), ('height', pyarrow.int64()), ('noun_chunks', LISTS),
       ('ref_exps', LISTS)]


def write(path, items, fields):
  rows = [{name: item.get(name) for name, _ in fields} for item in items]
  parquet.write_table(pyarrow.Table.from_pylist(rows, pyarrow.schema(fields)), path, row_group_size=100)
  return path


def run(path, out, *, images=None, allow_missing=False, **settings):
  importer = grit_parquet.GritParquet(grit_parquet.ParquetSource('train', (path,), images), **settings)
  return engine.run(importer, out=out, allow_missing=allow_missing)['train']


FAILED = INSTANCE | {'key': '000000013', 'status': 'failed_to_download', 'error_message': 'HTTP Error 404',
                     'width': None, 'height': None, 'original_width': None, 'original_height': None, 'sha256': None}


@pytest.mark.parametrize('encoding', ['jpg', 'png', 'webp'])
def test_bytes_in_the_rows(tmp_path, encoding):
  fields = FETCHED + [(encoding, pyarrow.binary())]
  path = write(tmp_path / '00000.parquet', [INSTANCE | {encoding: PNG}, FAILED], fields)
  found = run(path, tmp_path / 'out')
  [got] = records(tmp_path / 'out')
  assert (got.image_id, got.image, got.captions) == ('00000/000000012', PNG, (CAPTION,))
  assert [r.caption for r in got.regions] == ['a paper cover', 'a wire hanger', CAPTION[19:], CAPTION]
  np.testing.assert_allclose([r.box for r in got.regions[:2]], [PAPER, HANGER], rtol=1e-6)
  assert got.regions[0].score == pytest.approx(0.79298526)
  assert found.examples('images', 'dropped', 'failed to download') == ['00000/000000013']
  assert (found.of('images'), found.of('boxes', 'dropped', 'image lost')) == (2, 4)


def test_files_beside_the_rows(tmp_path):
  path = write(tmp_path / '00000.parquet', [INSTANCE, FAILED], FETCHED)
  (tmp_path / '00000').mkdir()
  (tmp_path / '00000' / '000000012.jpg').write_bytes(PNG)
  run(path, tmp_path / 'out', phrases='ref_exps')
  [got] = records(tmp_path / 'out')
  assert got.image == PNG and [r.caption for r in got.regions] == [CAPTION[19:], CAPTION]


@pytest.mark.parametrize('name, image_path', [
    ('1795296605919.png', None), ('x/000373938.webp', 'x/{key}'),
    ('coyo_0_snappy-1795296605919.jpg', '{file}-{id}.jpg')])
def test_own_files_and_images_by_a_column(tmp_path, name, image_path):
  path = write(tmp_path / 'coyo_0_snappy.parquet', [INSTANCE | {'key': '000373938', 'width': 1024, 'height': 693}], OWN)
  (tmp_path / 'img' / name).parent.mkdir(parents=True)
  (tmp_path / 'img' / name).write_bytes(PNG)
  run(path, tmp_path / 'out', images=tmp_path / 'img', image_path=image_path)
  [got] = records(tmp_path / 'out')
  assert (got.image_id, got.image, len(got.regions)) == ('1795296605919', PNG, 4)


def test_images_as_hugging_face_stores_them(tmp_path):
  fields = OWN + [('image', pyarrow.struct([('bytes', pyarrow.binary()), ('path', pyarrow.string())]))]
  row = INSTANCE | {'image': {'bytes': PNG, 'path': None}, 'width': 1024, 'height': 693}
  path = write(tmp_path / 'a.parquet', [row], fields)
  run(path, tmp_path / 'out')
  assert records(tmp_path / 'out')[0].image == PNG


def test_padded_images_lose_their_boxes_and_missing_ones_are_named(tmp_path):
  square = encode_png(np.zeros((256, 256, 3), np.uint8))
  fields = FETCHED + [('jpg', pyarrow.binary())]
  found = run(write(tmp_path / '0.parquet', [INSTANCE | {'jpg': square}], fields), tmp_path / 'out')
  assert found.of('boxes', 'dropped', 'image padded, cropped or turned') == 4
  many = write(tmp_path / '1.parquet', [INSTANCE | {'jpg': square}] * 20, fields)
  with pytest.raises(ValueError, match='1.parquet.*of 80 of 80 boxes have lost their proportions'):
    run(many, tmp_path / 'many')
  own = write(tmp_path / '2.parquet', [INSTANCE], OWN)
  with pytest.raises(FileNotFoundError, match='1795296605919.jpg: missing'):
    run(own, tmp_path / 'own', images=tmp_path)


def test_what_is_missing_is_named(tmp_path):
  plain = [field for field in FETCHED if field[0] not in ('noun_chunks', 'ref_exps')]
  with pytest.raises(ValueError, match=r"0.parquet: no columns \['noun_chunks', 'ref_exps'\]; found .*save_additional"):
    run(write(tmp_path / '0.parquet', [INSTANCE], plain), tmp_path / 'out')
  path = write(tmp_path / '1.parquet', [INSTANCE | {'noun_chunks': [[0, 1, 2]]}], OWN)
  (tmp_path / '1795296605919.jpg').write_bytes(PNG)
  with pytest.raises(ValueError, match=r'image 1795296605919, noun_chunks\[0\]: a box must be four'):
    run(path, tmp_path / 'out', images=tmp_path)
  with pytest.raises(ValueError, match="the image path '{name}.jpg' asks for 'name'; there are file and the columns"):
    run(path, tmp_path / 'out', images=tmp_path, image_path='{name}.jpg')


def test_the_verb(tmp_path):
  write(tmp_path / '00000.parquet', [INSTANCE | {'jpg': PNG}], FETCHED + [('jpg', pyarrow.binary())])
  argv = ['data', 'import', 'grit', '--parquet', tmp_path / '*.parquet', '--phrases', 'ref_exps', '--out',
          tmp_path / 'out', '--workers', 1]
  assert cli.main([str(arg) for arg in argv]) == 0
  assert len(records(tmp_path / 'out')[0].regions) == 2
