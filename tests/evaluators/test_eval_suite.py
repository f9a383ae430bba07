import dataclasses
import json
import types

import numpy as np
import pytest

from cloc_jax.evaluators import EncoderFns, evaluate_all

CATEGORIES = ('red cat', 'blue cat', 'red dog')


def meta(unseen=(), extra=None):
  return types.SimpleNamespace(categories=CATEGORIES, unseen_categories=unseen, extra=extra or {})


def text_fns(calls=None):
  def encode_text(texts, *, region):
    if calls is not None:
      calls.append(list(texts))
    return np.eye(8, dtype=np.float32)[[CATEGORIES.index(t) for t in texts]]
  return EncoderFns(encode_image=None, image_embedding=None, embed_regions=None, encode_text=encode_text, ground=None)


@pytest.fixture(name='predictions')
def _predictions(make_predictions):
  eye = np.eye(8, dtype=np.float32)
  boxes = [[0, 0, .5, .5], [0, 0, .2, .2], [.5, .5, 1, 1]]
  return make_predictions(images=2, captions=['one', 'two'], caption_image=[0, 1], z_caption=eye[[0, 1]],
                          region_image=[0, 0, 1], boxes=boxes, pred_boxes=boxes, categories=CATEGORIES,
                          region_captions=['a', 'b', 'c'], z_region=eye[[0, 0, 2]], z_region_text=eye[[0, 1, 2]])


def test_everything_runs_and_seen_and_unseen_are_told_apart(predictions):
  calls = []
  got = evaluate_all(predictions, fns=text_fns(calls), meta=meta(unseen=('blue cat',)))
  m = got.metrics
  assert m['region_recognition/top1'] == pytest.approx(2 / 3)
  assert (m['region_recognition/seen/top1'], m['region_recognition/unseen/top1']) == (1, 0)
  assert (m['region_recognition/seen/boxes'], m['region_recognition/unseen/boxes']) == (2, 1)
  assert m['image_text_retrieval/i2t_r1'] == 1 and m['grounding/acc_iou50'] == 1
  assert m['region_retrieval/pool'] == 3
  assert got.skipped == {}
  assert got.protocols == {'region_retrieval': 'region_retrieval@2'} | {
      n: f'{n}@1' for n in ('region_recognition', 'image_text_retrieval', 'grounding', 'grounding_proposals',
                            'pointing_game')}
  assert calls == [list(CATEGORIES)], 'the class names are encoded once for all three parts'
  assert all(type(v) in (int, float) for v in m.values())


def test_what_is_missing_is_named(make_predictions):
  got = evaluate_all(make_predictions(region_image=[0]), fns=text_fns(), meta=meta())
  assert got.metrics == {} and got.protocols == {}
  assert sorted(got.skipped) == ['grounding', 'grounding_proposals', 'image_text_retrieval', 'pointing_game',
                                 'region_recognition', 'region_retrieval']
  assert 'box head' in got.skipped['grounding'] and 'embed regions' in got.skipped['region_retrieval']
  bare = types.SimpleNamespace(categories=(), unseen_categories=())
  got = evaluate_all(make_predictions(region_image=[0]), fns=text_fns(), meta=bare)
  assert 'no categories' in got.skipped['region_recognition']


def test_unseen_classes_that_do_not_occur_are_skipped_alone(predictions):
  fns = text_fns()
  short = predictions.__class__(**{**vars(predictions), 'categories': ('red cat', 'red cat', 'red dog')})
  got = evaluate_all(short, fns=fns, meta=meta(unseen=('blue cat',)), pool_limit=2)
  assert set(got.skipped) == {'region_recognition/unseen'}
  assert got.metrics['region_recognition/seen/top1'] == 1
  assert got.metrics['region_retrieval/pool'] == 2
  with pytest.raises(ValueError, match="'blue dog'.*nearest"):
    evaluate_all(short, fns=fns, meta=meta(unseen=('blue dog',)))


def test_frequencies_of_the_data_set_are_groups(predictions):
  got = evaluate_all(predictions, fns=text_fns(), meta=meta(extra={'lvis': {'frequencies': ['r', 'f', 'f']}}))
  assert got.metrics['region_recognition/boxes_rare'] == 1 and got.metrics['region_recognition/boxes_frequent'] == 2
  assert 'region_recognition/boxes_common' not in got.metrics
  with pytest.raises(ValueError, match="'red cat'.*'r', 'c', 'f'.*'x'"):
    evaluate_all(predictions, fns=text_fns(), meta=meta(extra={'lvis': {'frequencies': ['x', 'f', 'f']}}))
  with pytest.raises(ValueError, match='expected one for each of 3 categories, got 1'):
    evaluate_all(predictions, fns=text_fns(), meta=meta(extra={'lvis': {'frequencies': ['r']}}))


def test_json_holds_protocols_and_reads_back(predictions, tmp_path):
  got = evaluate_all(predictions, fns=text_fns(), meta=meta())
  path = tmp_path / 'eval.json'
  got.to_json(path, extra={'step': 7})
  back = json.loads(path.read_text())
  assert back['metrics'] == got.metrics and back['protocols'] == got.protocols and back['step'] == 7
  assert 'by the area of boxes' in back['notes'][0]
  assert dataclasses.replace(got, metrics={'grounding/acc_iou50': 1.0}).notes == ()
  assert [p.name for p in tmp_path.iterdir()] == ['eval.json']
  with pytest.raises(ValueError, match='metrics'):
    got.to_json(path, extra={'metrics': {}})
  with pytest.raises(ValueError):
    got.to_json(path, extra={'loss': float('nan')})
  assert json.loads(path.read_text()) == back, 'a failed write leaves the old file alone'
