"""`cloc eval --proposals`: from files to figures, through the data set and the command line."""
import dataclasses
import json
import sys

import numpy as np
import pytest

from cloc_jax import encoders, evaluate
from cloc_jax.data import proposals, schema, sources
from cloc_jax.evaluators import EncoderFns, average_precision
from data.painted_pictures import COLORS, painted_example

EYE = np.eye(8, dtype=np.float32)
NAMES = list(COLORS)


def embed_regions(images, boxes):
  """The painted colour that fills the box best."""
  out = np.tile(EYE[7], (*boxes.shape[:2], 1))
  for row, image in enumerate(images):
    for column, (x0, y0, x1, y1) in enumerate((boxes[row] * image.shape[0]).round().astype(int)):
      mean = image[y0:max(y1, y0 + 1), x0:max(x1, x0 + 1)].reshape(-1, 3).astype(float).mean(0)
      out[row, column] = EYE[np.argmin([np.abs(mean - color).sum() for color in COLORS.values()])]
  return out


def encoder():
  number = lambda text: NAMES.index(text) if text in NAMES else 6
  fns = EncoderFns(
      encode_image=lambda images: images, image_embedding=lambda images: EYE[np.zeros(len(images), int)],
      embed_regions=embed_regions, encode_text=lambda texts, *, region: EYE[[number(t) for t in texts]], ground=None)
  return encoders.Encoder(fns=fns, image_size=64, pad='center', info={'encoder': 'hf:x/colors', 'region_branch': 'x'})


@pytest.fixture(name='painted')
def painted_fixture(tmp_path):
  """(data set, its true boxes as COCO's results)."""
  examples = [painted_example(i) for i in range(6)]
  path = tmp_path / 'set'
  meta = schema.DatasetMeta(name='painted', categories=tuple(COLORS))
  schema.write_dataset(path, meta=meta, splits={'val': examples})
  rows = []
  for e in examples:
    for region in e.regions:
      x0, y0, x1, y1 = np.array(region.box) * [e.width, e.height, e.width, e.height]
      rows.append({'image_id': e.image_id, 'bbox': [x0, y0, x1 - x0, y1 - y0], 'score': 0.9})
  return path, rows


def test_detection_stands_beside_the_other_figures(painted, tmp_path, monkeypatch, capsys):
  pytest.importorskip('faster_coco_eval')
  from cloc_jax import cli
  path, rows = painted
  # The picture's dark corner is no colour, and lies above nothing in score.
  rows = [*rows, {'image_id': 'picture-0', 'bbox': [0, 0, 2, 2], 'score': 0.01}]
  (tmp_path / 'p.json').write_text(json.dumps(rows))
  monkeypatch.setattr(encoders, 'load', lambda spec, **options: encoder())
  argv = ['eval', '--encoder', 'hf:x/colors', '--data', str(path), '--out', str(tmp_path), '--batch-size', '4']
  assert cli.main([*argv, '--proposals', str(tmp_path / 'p.json')]) == 0
  assert 'detection over the supplied boxes, AP ' in capsys.readouterr().out
  got = json.loads((tmp_path / 'val.json').read_text())
  found = got['metrics']
  assert found['detection/ap50'] == pytest.approx(1) and found['detection/recall_proposals'] == 1
  assert found['grounding_supplied/acc_iou50'] == 1 and found['region_recognition/top1'] == 1
  assert found['detection/boxes'] == found['region_recognition/boxes'] == len(rows) - 1
  assert got['protocols'].items() >= {'detection': 'detection@1', 'grounding_supplied': 'grounding_supplied@1'}.items()
  assert got['proposals'] == str(tmp_path / 'p.json')
  assert cli.main(argv) == 0
  alone = json.loads((tmp_path / 'val.json').read_text())['metrics']
  assert alone == {k: v for k, v in found.items() if not k.startswith(('detection', 'grounding_supplied'))}


def test_wrong_files_are_refused_before_anything_is_encoded(painted, tmp_path, monkeypatch):
  path, rows = painted
  monkeypatch.setattr(average_precision, 'check_installed', lambda: None)

  def run(rows, one=None):
    (tmp_path / 'p.json').write_text(json.dumps(rows))
    return evaluate.run_encoder(one or encoder(), path=path, split='val', proposals=tmp_path / 'p.json')

  with pytest.raises(ValueError, match=r"speaks of images such as \['7'\], the data set of \['picture-0'"):
    run([{'image_id': 7, 'bbox': [0, 0, 1, 1]}])
  blind = encoder()
  blind = dataclasses.replace(blind, fns=dataclasses.replace(blind.fns, embed_regions=None))
  with pytest.raises(ValueError, match='embeds no regions; choose roi'):
    run(rows, blind)


def test_few_records_are_read_beforehand_and_what_was_not_used_is_said(painted, tmp_path, monkeypatch, caplog):
  pytest.importorskip('faster_coco_eval')
  path, rows = painted
  examples = {}
  read = sources.RecordSource.__getitem__
  monkeypatch.setattr(sources.RecordSource, '__getitem__', lambda self, i: examples.setdefault(int(i), read(self, i)))
  monkeypatch.setattr(proposals, '_RECORDS', 3)
  monkeypatch.setattr(proposals, '_BOXES', 1)
  rows = [*rows, {'image_id': 'elsewhere', 'bbox': [0, 0, 2, 2], 'score': 1}, dict(rows[0], bbox=[1, 1, 0, 4])]
  (tmp_path / 'p.json').write_text(json.dumps(rows))
  source = sources.open_source(path, split='val')
  found = proposals.read(tmp_path / 'p.json').some_sizes(source)
  assert list(examples) == [0, 2, 4] and found == {
      e.image_id: (e.height, e.width) for e in (source[i] for i in (0, 2, 4))}
  evaluate.run_encoder(encoder(), path=path, split='val', proposals=tmp_path / 'p.json', limit=4)
  assert '3 images have proposals but were not evaluated' in caplog.text and '1 proposals have no area' in caplog.text


def test_without_the_library_it_says_what_to_install(painted, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'faster_coco_eval', None)
  (tmp_path / 'p.json').write_text(json.dumps(painted[1]))
  with pytest.raises(ModuleNotFoundError, match=r"pip install 'cloc_jax\[coco\]'"):
    evaluate.run_encoder(encoder(), path=painted[0], split='val', proposals=tmp_path / 'p.json')
