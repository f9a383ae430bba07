import time

import numpy as np
import pytest

from cloc_jax.evaluators import NothingToMeasure, RegionRecognition
from cloc_jax.geometry import resize_with_pad

NAMES = ('cat', 'dog', 'bus', 'car', 'cow', 'zebra')


def one_hot_text(texts, *, region):
  assert region, 'class names are embedded at the length of region captions'
  return np.eye(8, dtype=np.float32)[[NAMES.index(t) for t in texts]]


def recognise(predictions, **kw):
  return dict(RegionRecognition(categories=NAMES, encode_text=one_hot_text, **kw).run(predictions))


def test_perfect_and_all_wrong(make_predictions):
  labels = [0, 1, 1, 2]
  eye = np.eye(8, dtype=np.float32)
  kw = dict(region_image=[0] * 4, categories=[NAMES[i] for i in labels])
  right = recognise(make_predictions(z_region=eye[labels], **kw))
  assert right == dict(macc=1.0, top1=1.0, top5=1.0, boxes=4, classes=3, boxes_unknown=0, macc_large=1.0,
                       top1_large=1.0, boxes_large=4, ap_gt=1.0)
  wrong = recognise(make_predictions(z_region=eye[[3, 3, 3, 3]], **kw))
  assert (wrong['macc'], wrong['top1']) == (0.0, 0.0)


def test_macc_weighs_classes_and_top1_weighs_boxes(make_predictions):
  eye = np.eye(8, dtype=np.float32)
  # Three cats, all right; one dog, taken for a bus. Cows and zebras do not occur: they are no class to average.
  predictions = make_predictions(region_image=[0] * 5, categories=['cat', 'cat', 'cat', 'dog', ''],
                                 z_region=eye[[0, 0, 0, 2, 5]])
  got = recognise(predictions)
  assert got['top1'] == pytest.approx(3 / 4)
  assert got['macc'] == pytest.approx((1 + 0) / 2)
  assert (got['boxes'], got['classes'], got['boxes_unknown']) == (4, 2, 1)
  result = RegionRecognition(categories=NAMES, encode_text=one_hot_text).measure(predictions)
  assert result.per_class == {'cat': 1.0, 'dog': 0.0}
  assert [NAMES[i] for i in result.predicted] == ['cat', 'cat', 'cat', 'bus']
  assert result.region.tolist() == [0, 1, 2, 3]


def test_matches_a_slow_loop(make_predictions, unit):
  rng = np.random.default_rng(0)
  z_class, z_region = unit(rng.normal(size=(len(NAMES), 8))), unit(rng.normal(size=(200, 8)))
  labels = rng.integers(0, 5, 200)
  predictions = make_predictions(region_image=[0] * 200, categories=[NAMES[i] for i in labels], z_region=z_region)
  got = dict(RegionRecognition(categories=NAMES, encode_text=lambda texts, *, region: z_class).run(predictions))
  hits, per_class, top5 = 0, {}, 0
  for z, label in zip(z_region.astype(np.float64), labels):
    order = sorted(range(len(NAMES)), key=lambda c: -float(z @ z_class[c]))
    hits += order[0] == label
    top5 += label in order[:5]
    per_class.setdefault(label, []).append(order[0] == label)
  assert got['top1'] == pytest.approx(hits / 200)
  assert got['top5'] == pytest.approx(top5 / 200)
  assert got['macc'] == pytest.approx(np.mean([np.mean(v) for v in per_class.values()]))


def test_a_collapsed_model_scores_zero(make_predictions):
  same = np.tile(np.eye(8, dtype=np.float32)[:1], (10, 1))
  predictions = make_predictions(region_image=[0] * 4, categories=['cat', 'dog', 'bus', 'car'], z_region=same[:4])
  got = dict(RegionRecognition(categories=NAMES, encode_text=lambda t, *, region: same[:len(t)]).run(predictions))
  assert got['top1'] == got['top5'] == got['macc'] == 0


def test_subset_counts_its_boxes_among_all_candidates(make_predictions):
  eye = np.eye(8, dtype=np.float32)
  # The dog looks like a cat; with dogs alone as candidates it would be right.
  predictions = make_predictions(region_image=[0] * 3, categories=['cat', 'dog', 'dog'], z_region=eye[[0, 0, 1]])
  got = recognise(predictions, subset=['dog'], prefix='unseen/')
  assert got['unseen/top1'] == 0.5
  assert got['unseen/boxes'] == 2
  with pytest.raises(NothingToMeasure, match='1 categories'):
    recognise(predictions, subset=['zebra'])


def test_errors_name_the_image_and_the_nearest_category(make_predictions):
  predictions = make_predictions(region_image=[0], categories=['zebras'], z_region=np.eye(1, 8, dtype=np.float32))
  with pytest.raises(ValueError, match=r"'im0'.*'zebras'.*nearest is 'zebra'"):
    recognise(predictions)
  with pytest.raises(ValueError, match=r"subset.*'dogg'.*'dog'"):
    RegionRecognition(categories=NAMES, encode_text=one_hot_text, subset=['dogg'])
  with pytest.raises(ValueError, match='twice.*cat'):
    RegionRecognition(categories=('cat', 'dog', 'cat'), encode_text=one_hot_text)
  with pytest.raises(NothingToMeasure, match='1 without a category'):
    recognise(make_predictions(region_image=[0], z_region=np.eye(1, 8, dtype=np.float32)))
  with pytest.raises(NothingToMeasure, match='does not embed regions'):
    recognise(make_predictions(region_image=[0], categories=['cat']))


def test_sizes_are_of_the_original_pixels_and_groups_of_classes(make_predictions):
  eye = np.eye(8, dtype=np.float32)
  # An image of 200×100 pixels on a canvas of 50: a box of half the canvas's width is 100 pixels wide.
  geometry = resize_with_pad(height=100, width=200, canvas=50)
  pixels = np.array([[0, 0, 31, 31], [0, 0, 32, 32], [0, 0, 95, 96], [0, 0, 96, 96], [5, 0, 200, 100]])
  predictions = make_predictions(
      region_image=[0] * 5, geometry=[geometry], boxes=geometry.boxes_to_canvas(pixels), z_region=eye[[0, 1, 2, 1, 1]],
      categories=['cat', 'dog', 'dog', 'dog', 'bus'])
  got = recognise(predictions, groups={'rare': ['cat', 'bus'], 'common': ['dog'], 'frequent': ['zebra']})
  assert {k: got[f'boxes_{k}'] for k in ('small', 'medium', 'large')} == dict(small=1, medium=2, large=2)
  assert (got['top1_small'], got['top1_medium'], got['top1_large']) == (1, 0.5, 0.5)
  assert (got['macc_large'], got['boxes_rare'], got['macc_rare']) == (0.5, 2, 0.5)
  assert got['top1_common'] == pytest.approx(2 / 3) and 'boxes_frequent' not in got
  with pytest.raises(ValueError, match=r"groups\['rare'\].*'catt'.*'cat'"):
    recognise(predictions, groups={'rare': ['catt']})


def test_figures_agree_with_scikit_learn(make_predictions, unit):
  metrics = pytest.importorskip('sklearn.metrics')
  rng = np.random.default_rng(5)
  z_class, labels = unit(rng.normal(size=(len(NAMES), 8))), rng.integers(1, 6, 300)
  z_region = unit(z_class[labels] + 0.5 * rng.normal(size=(300, 8)))
  got = dict(RegionRecognition(categories=NAMES, encode_text=lambda t, *, region: z_class).run(make_predictions(
      region_image=[0] * 300, categories=[NAMES[i] for i in labels], z_region=z_region)))
  scores = z_region.astype(np.float64) @ z_class.T
  assert got['macc'] == pytest.approx(metrics.recall_score(
      labels, scores.argmax(1), labels=range(1, 6), average='macro'))
  assert got['top1'] == pytest.approx(metrics.accuracy_score(labels, scores.argmax(1)))
  assert got['top5'] == pytest.approx(metrics.top_k_accuracy_score(labels, scores, k=5, labels=range(6)))
  assert got['ap_gt'] == pytest.approx(np.mean(
      [metrics.average_precision_score(labels == c, scores[:, c]) for c in range(1, 6)]), abs=1e-5)
  assert 0.3 < got['top1'] < 0.95


def test_ten_thousand_regions_are_quick(make_predictions, unit):
  rng = np.random.default_rng(0)
  names = tuple(f'class {i}' for i in range(200))
  z_class, z_region = unit(rng.normal(size=(200, 64))), unit(rng.normal(size=(10_000, 64)))
  predictions = make_predictions(region_image=np.zeros(10_000, int), z_region=z_region,
                                 categories=[names[i] for i in rng.integers(0, 200, 10_000)])
  start = time.process_time()
  got = dict(RegionRecognition(categories=names, encode_text=lambda t, *, region: z_class).run(predictions))
  assert time.process_time() - start < 1.0
  assert 0.001 < got['top1'] < 0.01  # chance is 1/200
