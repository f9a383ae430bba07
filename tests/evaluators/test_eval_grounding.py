import numpy as np
import pytest

from cloc_jax.evaluators import Grounding, NothingToMeasure
from cloc_jax.geometry import resize_with_pad


def slow_iou(a, b):
  w = min(a[2], b[2]) - max(a[0], b[0])
  h = min(a[3], b[3]) - max(a[1], b[1])
  inter = w * h if w > 0 and h > 0 else 0.0
  area = lambda x: max(x[2] - x[0], 0) * max(x[3] - x[1], 0)
  return inter / (area(a) + area(b) - inter)


def test_hand_made_boxes(make_predictions):
  boxes = [[0, 0, .4, .4], [0, 0, .4, .4], [.5, .5, 1, 1], [.5, .5, 1, 1]]
  found = [[0, 0, .4, .4],      # exact: 1
           [0, 0, .4, .2],      # half of it: 0.5, right at the threshold
           [0, 0, .5, .5],      # elsewhere: 0
           [.9, .9, .6, .6]]    # inverted: no area
  got = dict(Grounding().run(make_predictions(region_image=[0] * 4, region_captions=list('abcd'), boxes=boxes,
                                              pred_boxes=found)))
  assert got['acc_iou50'] == 0.5
  assert got['mean_iou'] == pytest.approx(1.5 / 4, abs=1e-6)
  assert (got['phrases'], got['images'], got['phrases_ambiguous'], got['no_caption']) == (4, 1, 0, 0)


def test_boxes_are_compared_in_original_pixels(make_predictions):
  # A wide image fills the middle half of the canvas: y from 0.25 to 0.75. The prediction sticks out into the padding.
  geometry = resize_with_pad(height=100, width=200, canvas=64)
  predictions = make_predictions(region_image=[0, 0], region_captions=['a', 'b'], geometry=[geometry],
                                 boxes=[[0, .25, 1, .75]] * 2, pred_boxes=[[0, 0, 1, 1], [0, 0, 1, .25]])
  result = Grounding().measure(predictions)
  np.testing.assert_allclose(result.boxes[0], [0, 0, 200, 100], atol=1e-3)
  np.testing.assert_allclose(result.iou, [1, 0], atol=1e-6)  # on the canvas the first would be 0.5


def test_random_boxes_of_several_images_match_a_slow_loop(make_predictions):
  rng = np.random.default_rng(4)
  geometry = [resize_with_pad(height=h, width=w, canvas=96) for h, w in ((50, 333), (480, 640), (97, 31))]
  geometry[1] = geometry[1].flip()
  image = rng.integers(0, 3, 40)  # not in order
  original, boxes, found = [], [], []
  for i in image:
    pair = []
    for _ in range(2):
      x, y = np.sort(rng.uniform(0, geometry[i].width, 2)), np.sort(rng.uniform(0, geometry[i].height, 2))
      pair.append([x[0], y[0], x[1], y[1]])
    original.append(pair)
    boxes.append(geometry[i].boxes_to_canvas(pair[0]))
    found.append(geometry[i].boxes_to_canvas(pair[1]))
  phrases = [f'p{j}' for j in range(40)]
  result = Grounding().measure(make_predictions(images=3, region_image=image, region_captions=phrases, boxes=boxes,
                                                pred_boxes=found, geometry=geometry))
  np.testing.assert_allclose(result.iou, [slow_iou(a, b) for a, b in original], atol=2e-4)
  np.testing.assert_array_equal(result.iou, result.iou_any)


def test_any_box_of_the_same_phrase_in_the_same_image(make_predictions):
  left, right = [0, 0, .5, 1], [.5, 0, 1, 1]
  predictions = make_predictions(
      images=2, region_image=[0, 0, 0, 1], region_captions=['a dog', 'A dog', '', 'a dog'],
      boxes=[left, right, left, right], pred_boxes=[left, left, right, left])
  got = dict(Grounding(prefix='g/').run(predictions))
  # Both dogs of image 0 are answered by its left dog; image 1's answer is wrong, for the left dog is not in it.
  assert got['g/acc_iou50'] == pytest.approx(1 / 3)
  assert got['g/acc_iou50_any'] == pytest.approx(2 / 3)
  assert got['g/mean_iou_any'] == pytest.approx(2 / 3)
  assert (got['g/phrases'], got['g/phrases_ambiguous'], got['g/no_caption'], got['g/images']) == (3, 2, 1, 2)


def test_nothing_to_measure(make_predictions):
  with pytest.raises(NothingToMeasure, match='no box head'):
    dict(Grounding().run(make_predictions(region_image=[0], region_captions=['a'])))
  with pytest.raises(NothingToMeasure, match='none of 1'):
    dict(Grounding().run(make_predictions(region_image=[0], pred_boxes=[[0, 0, 1, 1]])))
