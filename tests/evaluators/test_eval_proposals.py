import numpy as np
import pytest

from cloc_jax.evaluators import NothingToMeasure, ProposalGrounding


def test_the_most_similar_box_of_the_same_image_answers(make_predictions):
  eye = np.eye(8, dtype=np.float32)
  left, right, most = [0, 0, .5, 1], [.5, 0, 1, 1], [0, 0, .6, 1]
  predictions = make_predictions(
      images=3, region_image=[0, 0, 1, 1, 2], region_captions=['a', 'b', 'c', 'd', 'e'],
      boxes=[left, right, left, most, left], z_region=eye[[0, 1, 2, 3, 4]],
      # 'b' is answered by the left box; 'c' by a box that overlaps with its own; 'e' has no other box to choose.
      z_region_text=eye[[0, 0, 3, 3, 0]])
  got = dict(ProposalGrounding(prefix='p/').run(predictions))
  assert got['p/acc_iou50'] == pytest.approx(4 / 5)
  assert got['p/mean_iou'] == pytest.approx((1 + 0 + 5 / 6 + 1 + 1) / 5)
  assert got['p/acc_iou50_choice'] == pytest.approx(3 / 4)
  assert (got['p/phrases'], got['p/phrases_one_box']) == (5, 1)
  assert got['p/proposals'] == pytest.approx(9 / 5)


def test_a_box_with_several_sentences_is_one_proposal(make_predictions):
  eye = np.eye(8, dtype=np.float32)
  left, right = [0, 0, .5, 1], [.5, 0, 1, 1]
  predictions = make_predictions(
      images=2, region_image=[0, 0, 0, 1, 1, 1], region_captions=list('abcdef'),
      boxes=[left, left, left, left, left, right], z_region=eye[[0, 0, 0, 1, 1, 2]],
      z_region_text=eye[[0, 0, 0, 1, 2, 2]])
  got = dict(ProposalGrounding().run(predictions))
  assert (got['proposals'], got['phrases_one_box']) == (1.5, 3)
  assert (got['acc_iou50'], got['acc_iou50_choice']) == (pytest.approx(5 / 6), pytest.approx(2 / 3))


def test_a_tie_goes_to_the_worst_box(make_predictions):
  same = np.tile(np.eye(1, 8, dtype=np.float32), (2, 1))
  predictions = make_predictions(region_image=[0, 0], region_captions=['a', 'a'], z_region=same, z_region_text=same,
                                 boxes=[[0, 0, .5, 1], [.5, 0, 1, 1]])
  got = dict(ProposalGrounding().run(predictions))
  # Either box will do where any with the phrase counts.
  assert (got['acc_iou50'], got['acc_iou50_any'], got['phrases_ambiguous']) == (0, 1, 2)


def test_regions_in_any_order_against_a_loop(make_predictions, unit):
  rng = np.random.default_rng(1)
  image = rng.integers(0, 6, 50)
  low = rng.uniform(0, .5, (50, 2))
  boxes = np.concatenate([low, low + rng.uniform(.1, .5, (50, 2))], 1)
  z, z_text = unit(rng.normal(size=(50, 8))), unit(rng.normal(size=(50, 8)))
  result = ProposalGrounding().measure(make_predictions(
      images=6, region_image=image, region_captions=[f'p{i}' for i in range(50)], boxes=boxes, z_region=z,
      z_region_text=z_text))
  for r in range(50):
    answer = max((j for j in range(50) if image[j] == image[r]), key=lambda j: float(z[j] @ z_text[r]))
    np.testing.assert_allclose(result.pred_boxes[r], 100 * boxes[answer], atol=1e-3)


def test_nothing_to_measure(make_predictions):
  with pytest.raises(NothingToMeasure, match='does not embed regions'):
    dict(ProposalGrounding().run(make_predictions(region_image=[0], region_captions=['a'])))
  with pytest.raises(NothingToMeasure, match='none of 1'):
    dict(ProposalGrounding().run(make_predictions(region_image=[0], z_region=np.eye(1, 8, dtype=np.float32))))
