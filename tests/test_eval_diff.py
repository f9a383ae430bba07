import dataclasses
import json
import re

import numpy as np
import pytest
import tiny_experiment as tiny

from cloc_jax import dump, eval_diff
from cloc_jax.data import schema
from cloc_jax.evaluators import Predictions
from cloc_jax.geometry import resize_with_pad

parquet = pytest.importorskip('pyarrow.parquet')
NAMES = ('cat', 'dog', 'bus', 'car', 'cow', 'zebra')
EYE = np.eye(8, dtype=np.float32)
GEOMETRY = resize_with_pad(height=100, width=200, canvas=50)
BOXES = np.float32([[0, 0, 100, 100], [100, 0, 200, 100], [20, 20, 80, 80], [0, 0, 50, 100]])


def predictions(z_region, found=None, **changes):
  """Four regions of two images; the third has no class, the last no caption."""
  return Predictions(**{**dict(
      image_ids=('left', 'right'), z_image=EYE[:2], geometry=(GEOMETRY, GEOMETRY), captions=(),
      caption_image=np.zeros(0, int), z_caption=np.zeros((0, 8), np.float32), boxes=GEOMETRY.boxes_to_canvas(BOXES),
      region_image=np.array([0, 0, 1, 1]), region_captions=('a cat', 'a dog', 'a thing', ''),
      categories=('cat', 'dog', '', 'bus'), z_region=z_region, z_region_text=EYE[[0, 1, 3, 4]],
      pred_boxes=None if found is None else GEOMETRY.boxes_to_canvas(np.float32(found)),
      pred_scores=None if found is None else np.ones(4, np.float32)), **changes})


def write(path, some, *, info=None, split='val'):
  with dump.Writer(path, info=info or {'encoder': path.stem, 'data': '/nowhere'}) as writer:
    writer.write(some, split=split, encode_text=lambda texts, *, region: EYE[[NAMES.index(t) for t in texts]],
                 categories=NAMES)
  return path


@pytest.fixture(name='pair')
def pair_fixture(tmp_path):
  """A has the cat right and the dog wrong; B the other way round, and has a box head."""
  return (write(tmp_path / 'a.parquet', predictions(EYE[[0, 3, 3, 2]])),
          write(tmp_path / 'b.parquet', predictions(EYE[[2, 1, 3, 2]], found=BOXES[[0, 0, 2, 3]])))


def test_one_row_a_region_with_everything_said_of_it(pair):
  rows = parquet.read_table(pair[1]).to_pylist()
  assert [(r['split'], r['image_id'], r['region']) for r in rows] == [
      ('val', 'left', 0), ('val', 'left', 1), ('val', 'right', 0), ('val', 'right', 1)]
  np.testing.assert_allclose([[r[n] for n in ('x0', 'y0', 'x1', 'y1')] for r in rows], BOXES, atol=1e-3)
  assert [r['category'] for r in rows] == ['cat', 'dog', '', 'bus']
  assert rows[0]['top_classes'] == ['bus', 'cat', 'dog', 'car', 'cow'] and rows[0]['top_scores'][:2] == [1, 0]
  assert [r['rank'] for r in rows] == [5, 0, None, 0]  # the cat ties with four others, and the bus is ahead
  assert [r['iou'] for r in rows] == [1, 0, 1, None]
  assert rows[1]['found_x1'] == pytest.approx(100, abs=1e-3) and rows[3]['found_x1'] is None
  assert [r['chosen_iou'] for r in rows] == [0, 1, 1, None]
  assert rows[2]['top_classes'] is None
  bare = parquet.read_table(pair[0]).to_pylist()
  assert all(r['iou'] is None and r['chosen_iou'] is not None for r in bare[:2])


def test_flips_are_counted_by_class_and_direction(pair):
  diff = eval_diff.compare(*pair)
  assert set(diff.comparisons) == {'recognition', 'grounding_proposals'}, 'only one of them has a box head'
  found = diff.comparisons['recognition']
  assert (found.both, found.right_a, found.right_b) == (3, 2, 2)
  assert [(f.a['category'], f.better) for f in found.flips] == [('cat', False), ('dog', True)]
  assert found.by_class == {'cat': (1, 0), 'dog': (0, 1)}
  text = eval_diff.text(diff)
  assert re.search(r'recognition: 66.7 % → 66.7 % of 3; right → wrong 1, wrong → right 1', text)
  assert re.search(r'cat +1 +0\n +dog +0 +1', text)
  same = eval_diff.compare(pair[0], pair[0])
  assert all(not c.flips for c in same.comparisons.values())


def test_supplied_proposals(pair, tmp_path):
  """Of the first region the true box is taken, of the second another one, of the third's image there are none."""
  taken = np.float32([BOXES[0], BOXES[0], [np.nan] * 4, [np.nan] * 4])
  first = write(tmp_path / 'first.parquet', predictions(EYE[:4], chosen_proposals=taken))
  rows = parquet.read_table(first).to_pylist()
  assert [r['supplied_iou'] for r in rows] == pytest.approx([1, 0, 0, None], abs=1e-3)
  assert [r['supplied_x1'] for r in rows] == [100, 100, None, None]
  taken = np.float32([BOXES[3], BOXES[1], BOXES[2], [np.nan] * 4])
  second = write(tmp_path / 'second.parquet', predictions(EYE[:4], chosen_proposals=taken),
                 info={'encoder': 'x', 'data': '/nowhere', 'proposals': '/there/boxes.json'})
  diff = eval_diff.compare(first, second)
  found = diff.comparisons['grounding_supplied']
  assert (found.both, found.right_a, found.right_b) == (3, 1, 3)  # IoU 0.5 counts as right
  assert [(f.a['caption'], f.better) for f in found.flips] == [('a dog', True), ('a thing', True)]
  assert 'A and B chose from other proposals: none named, /there/boxes.json' in eval_diff.text(diff)
  assert 'Grounding among the supplied boxes' in eval_diff.write_page(diff, tmp_path / 'page.html').read_text()
  # A file of before there were these columns.
  table = parquet.read_table(pair[0])
  parquet.write_table(table.drop_columns([n for n in table.column_names if n.startswith('supplied')]), pair[0])
  assert 'grounding_supplied' not in eval_diff.compare(pair[0], first).comparisons
  assert dump.read(pair[0])[0]['supplied_iou'] == [None] * 4


def test_dumps_of_other_data_are_refused(pair, tmp_path):
  other = write(tmp_path / 'other.parquet', predictions(EYE[:4]), split='train')
  with pytest.raises(ValueError, match="no region is in both; .* of split 'val'.* of split 'train'"):
    eval_diff.compare(pair[0], other)
  moved = dataclasses.replace(predictions(EYE[:4]), boxes=GEOMETRY.boxes_to_canvas(BOXES[[0, 0, 2, 3]]))
  with pytest.raises(ValueError, match="not of the same data: region 1 of image 'left' is 'dog' at"):
    eval_diff.compare(pair[0], write(tmp_path / 'moved.parquet', moved))
  fewer = predictions(EYE[:4])
  fewer = dataclasses.replace(fewer, image_ids=('left', 'third'))
  diff = eval_diff.compare(pair[0], write(tmp_path / 'fewer.parquet', fewer))
  assert (diff.regions, diff.only_a, diff.only_b) == (2, 2, 2)


def test_files_that_are_no_dumps_are_named(tmp_path):
  with pytest.raises(FileNotFoundError, match='absent.parquet: no such file'):
    dump.read(tmp_path / 'absent.parquet')
  (tmp_path / 'text.parquet').write_text('hello')
  with pytest.raises(ValueError, match='text.parquet: not a Parquet file'):
    dump.read(tmp_path / 'text.parquet')
  import pyarrow
  parquet.write_table(pyarrow.table({'x': [1]}), tmp_path / 'x.parquet')
  with pytest.raises(ValueError, match='x.parquet: not a dump'):
    dump.read(tmp_path / 'x.parquet')


def test_an_interrupted_dump_leaves_the_old_one(pair):
  before = pair[0].read_bytes()
  with pytest.raises(RuntimeError), dump.Writer(pair[0], info={}):
    raise RuntimeError
  assert pair[0].read_bytes() == before and len(list(pair[0].parent.iterdir())) == 2


def test_the_page_shows_flips_on_the_images_of_the_data(base, tmp_path, monkeypatch):
  path = tiny.data(base)
  from cloc_jax.data import sources
  example = sources.RecordSource(path, split='val')[2]
  some = lambda z: dataclasses.replace(predictions(z, found=BOXES), image_ids=(example.image_id, 'absent'),
                                       categories=('<cat>', 'dog', '', 'bus'))
  monkeypatch.setattr('test_eval_diff.NAMES', ('<cat>', *NAMES[1:]))
  info = {'encoder': 'x', 'data': str(path)}
  diff = eval_diff.compare(write(tmp_path / 'a.parquet', some(EYE[[0, 3, 3, 2]]), info=info),
                           write(tmp_path / 'b.parquet', some(EYE[[2, 1, 3, 2]]), info=info))
  text = eval_diff.write_page(diff, tmp_path / 'page.html', image_size=64).read_text()
  assert text.count('data:image/') == 4 and '&lt;cat&gt;' in text and '<cat>' not in text
  assert 'No pictures' not in text
  gone = dataclasses.replace(diff, info_a={**info, 'data': str(tmp_path / 'gone')})
  text = eval_diff.write_page(gone, tmp_path / 'page.html').read_text()
  assert 'No pictures: no data set at' in text and 'right → wrong' in text


@pytest.mark.slow
def test_eval_dumps_and_eval_diff_compares(reference, tmp_path, capsys):
  from cloc_jax import cli
  argv = ['eval', '--encoder', str(reference.workdir), '--data', str(reference.data), '--split', 'val', '--out']
  for how in ('prompter', 'roi'):
    dumped = ['--dump', str(tmp_path / f'{how}.parquet')]
    assert cli.main([*argv, str(tmp_path / how), '--region-embedding', how, *dumped]) == 0
  files = [str(tmp_path / f'{how}.parquet') for how in ('prompter', 'roi')]
  capsys.readouterr()
  assert cli.main(['eval-diff', *files, '--out', str(tmp_path / 'diff.html')]) == 0
  out = capsys.readouterr().out
  metrics = [json.loads((tmp_path / how / 'val.json').read_text())['metrics'] for how in ('prompter', 'roi')]
  top1 = [100 * m['region_recognition/top1'] for m in metrics]
  assert f'recognition: {top1[0]:.1f} % → {top1[1]:.1f} % of {metrics[0]["region_recognition/boxes"]:,}' in out
  assert 'grounding: ' in out and (tmp_path / 'diff.html').exists()
  assert dump.read(files[1])[1]['region_embedding'] == 'roi'
  assert schema.read_meta(dump.read(files[1])[1]['data']).splits['val'] == tiny.COUNTS['val']
