"""JSONL and Parquet rows: the schema of importers/rows.py, and images as Hugging Face's datasets store them.

huggingface.co/docs/datasets/image_dataset: an image column of a Parquet file is a struct {bytes, path}.
"""
import base64
import json

import numpy as np
from painted_pictures import encode_png
import pytest

from cloc_jax import cli
from cloc_jax.data import schema
from cloc_jax.data import sources
from cloc_jax.data.importers import engine
from cloc_jax.data.importers import rows

PNG = encode_png(np.zeros((40, 80, 3), np.uint8))  # height × width


def records(path, split='train'):
  source = sources.RecordSource(path, split=split)
  return [source[i] for i in range(len(source))]


@pytest.fixture(name='make')
def make_fixture(tmp_path):
  (tmp_path / 'img').mkdir()
  (tmp_path / 'img' / 'a.png').write_bytes(PNG)

  def make(items, *, file='rows.jsonl', **settings):
    path = tmp_path / file
    path.write_text(''.join(f'{json.dumps(item)}\n' if isinstance(item, dict) else item for item in items))
    return rows.Rows(rows.RowsSource('train', (path,), tmp_path / 'img'), **settings)
  return make


ROWS = [
    {'image': 'a.png', 'caption': 'قطة', 'height': 40, 'width': 80, 'url': 'x',
     'regions': [{'box': [0.1, 0.2, 0.5, 0.9], 'caption': ' a cat ', 'category': 'cat', 'score': 0.5},
                 {'box': [0.5, 0.5, 0.4, 0.9], 'caption': 'none'}, {'box': [0, 0, 1, 1], 'caption': ' '}]},
    '\n',
    {'image': {'bytes': base64.b64encode(PNG).decode()}, 'image_id': 7, 'captions': ['one', ' ', 'two']},
    {'image': 'b.png', 'caption': 'lost', 'regions': [{'box': [0, 0, 1, 1], 'caption': 'lost'}]}]


@pytest.mark.parametrize('images_per_shard', [1, 2, 100])
def test_jsonl(make, tmp_path, images_per_shard):
  found = engine.run(make(ROWS, images_per_shard=images_per_shard), out=tmp_path / 'out', allow_missing=True)['train']
  first, second = records(tmp_path / 'out')
  assert (first.image, first.image_id, first.height, first.width, first.captions) == (PNG, 'a.png', 40, 80, ('قطة',))
  [region] = first.regions
  np.testing.assert_allclose(region.box, [0.1, 0.2, 0.5, 0.9], rtol=1e-6)
  assert (region.caption, region.category, region.score) == ('a cat', 'cat', 0.5)
  assert (second.image, second.image_id, second.captions, second.regions) == (PNG, '7', ('one', 'two'), ())
  assert found.examples('boxes', 'dropped', 'blank caption') == ['image a.png, regions[2]']
  assert found.examples('boxes', 'dropped', 'inverted') == ['image a.png, regions[1]']
  assert found.of('boxes', 'dropped', 'image lost') == found.of('captions', 'dropped', 'image lost') == 1
  assert (found.of('images'), found.of('boxes'), found.of('captions')) == (3, 4, 5)
  assert found.examples('rows', 'noted', "key 'url' not read") == ['row 1']


@pytest.mark.parametrize('as_struct', [True, False])
@pytest.mark.parametrize('images_per_shard', [1, 100])
def test_parquet(tmp_path, as_struct, images_per_shard):
  pa, parquet = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
  image = [{'bytes': PNG, 'path': f'{i}.png'} if as_struct else PNG for i in range(5)]
  regions = [[{'box': [8.0, 4.0, 40.0, 36.0], 'caption': f'thing {i}'}] for i in range(5)]
  parquet.write_table(pa.table({'image': image, 'caption': ['x', None, 'y', 'z', ''], 'regions': regions}),
                      tmp_path / 'rows.parquet', row_group_size=2)
  importer = rows.Rows(rows.RowsSource('train', (tmp_path / 'rows.parquet',)), boxes='xyxy pixels',
                       images_per_shard=images_per_shard)
  engine.run(importer, out=tmp_path / 'out')
  got = records(tmp_path / 'out')
  assert [r.image_id for r in got] == [f'{i}.png' if as_struct else f'rows-{i}' for i in range(5)]
  assert [r.captions for r in got] == [('x',), (), ('y',), ('z',), ()]
  assert [r.regions[0].caption for r in got] == [f'thing {i}' for i in range(5)]
  np.testing.assert_allclose(got[4].regions[0].box, [0.1, 0.1, 0.5, 0.9], rtol=1e-6)


@pytest.mark.parametrize('convention, box', [
    ('xyxy pixels', [8, 4, 40, 36]), ('xywh pixels', [8, 4, 32, 32]), ('yxyx pixels', [4, 8, 36, 40]),
    ('xywh normalised', [0.1, 0.1, 0.4, 0.8]), ('yxyx 0-1000', [100, 100, 900, 500])])
def test_conventions(make, tmp_path, convention, box):
  item = {'image': 'a.png', 'regions': [{'box': box, 'caption': 'x'}]}
  engine.run(make([item], boxes=convention), out=tmp_path / 'out')
  np.testing.assert_allclose(records(tmp_path / 'out')[0].regions[0].box, [0.1, 0.1, 0.5, 0.9], rtol=1e-6)


def test_boxes_of_another_convention_are_named(make, tmp_path):
  rng = np.random.default_rng(0)
  boxes = [[*rng.integers(0, 20, 2).tolist(), *rng.integers(21, 40, 2).tolist()] for _ in range(30)]
  importer = make([{'image': 'a.png', 'regions': [{'box': box, 'caption': 'x'}]} for box in boxes])
  with pytest.raises(ValueError, match='rows.jsonl: looks like xyxy pixels.*--trust-boxes'):
    engine.run(importer, out=tmp_path / 'out')


@pytest.mark.parametrize('item, message', [
    ('{"image": "a.p', r'row 2 is no JSON \(is the file cut off\?\)'),
    ('[1]\n', 'row 2: expected an object, got a list'),
    ({'caption': 'x'}, r"row 2: no key 'image'; found \['caption'\]"),
    ({'image': 3}, "row 2: 'image' must be a path"),
    ({'image': {'bytes': '$'}}, 'row 2: image: .bytes. is no base64'),
    ({'image': 'a.png', 'captions': [1]}, "row 2: 'captions' must be a text or a list"),
    ({'image': 'a.png', 'height': 40}, 'row 2: expected both height and width'),
    ({'image': 'a.png', 'regions': [{'box': [0, 0, 1], 'caption': 'x'}]},
     r'image a.png, regions\[0\]: a box must be four'),
    ({'image': 'a.png', 'regions': [{'caption': 'x'}]}, r"row 2, regions\[0\]: no key 'box'")])
def test_bad_rows_are_named(make, tmp_path, item, message):
  with pytest.raises(ValueError, match=message):
    engine.run(make([ROWS[0], item]), out=tmp_path / 'out')


def test_a_parquet_file_cut_off(tmp_path):
  pytest.importorskip('pyarrow')
  (tmp_path / 'rows.parquet').write_bytes(b'PAR1abc')
  with pytest.raises(ValueError, match='rows.parquet is no Parquet file, or cut off'):
    engine.run(rows.Rows(rows.RowsSource('train', (tmp_path / 'rows.parquet',))), out=tmp_path / 'out')


def test_the_verb(make, tmp_path, capsys):
  make([{'image': 'a.png', 'regions': [{'box': [8, 4, 32, 32], 'caption': 'x'}]}])
  argv = ['data', 'import', 'rows', '--rows', tmp_path / 'rows.jsonl', '--images', tmp_path / 'img', '--boxes',
          'xywh pixels', '--out', tmp_path / 'out', '--workers', 1]
  assert cli.main([str(arg) for arg in argv]) == 0
  np.testing.assert_allclose(records(tmp_path / 'out')[0].regions[0].box, [0.1, 0.1, 0.5, 0.9], rtol=1e-6)


def test_the_classes_are_those_that_the_regions_name(make, tmp_path, monkeypatch):
  """Without them nothing could be said of how well regions are recognised."""
  region = lambda category: {'box': [0.1, 0.2, 0.5, 0.9], 'caption': f'a {category}', 'category': category}
  items = [{'image': 'a.png', 'image_id': i, 'regions': [region(name) for name in names]}
           for i, names in enumerate((['dog', 'cat'], ['dog', ''], ['bird']))]
  engine.run(make(items, images_per_shard=1), out=tmp_path / 'out', workers=2)
  assert schema.read_meta(tmp_path / 'out').categories == ('bird', 'cat', 'dog')
  assert schema.read_meta(tmp_path / 'out').categories == sources.read_meta(
      f'jsonl:{tmp_path / "rows.jsonl"},images={tmp_path / "img"}').categories
  monkeypatch.setattr(engine, 'MOST_CATEGORIES', 2)
  found = engine.run(make(items), out=tmp_path / 'many')
  assert schema.read_meta(tmp_path / 'many').categories == ()
  assert found['train'].examples('categories', 'noted', 'an open vocabulary: not listed') == ['more than 2']
