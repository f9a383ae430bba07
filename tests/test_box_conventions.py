"""Box conventions: every pair of promise and truth on random boxes, mixtures, and hand-made cases."""
import json

import numpy as np
import pytest

from cloc_jax import box_conventions as conventions


def random_boxes(seed, count, *, height=(300, 641), width=(400, 641)):
  """xyxy pixels (n, 4) of objects of all sizes, and their images' sizes (n, 2)."""
  rng = np.random.default_rng(seed)
  sizes = np.stack([rng.integers(*height, count), rng.integers(*width, count)], -1)
  extent = sizes[:, ::-1]
  wh = extent * np.exp(rng.uniform(np.log(0.03), 0, (count, 2)))
  start = rng.random((count, 2)) * (extent - wh)
  return np.concatenate([start, start + wh], -1), sizes


def write(xyxy, sizes, convention):
  """The same boxes in another convention, by a loop."""
  order, unit = convention.split(' ')
  rows = []
  for (x0, y0, x1, y1), (height, width) in zip(xyxy, sizes):
    sx, sy = {'pixels': (1, 1), 'normalised': (1 / width, 1 / height), '0-1000': (1000 / width, 1000 / height)}[unit]
    x0, y0, x1, y1 = x0 * sx, y0 * sy, x1 * sx, y1 * sy
    rows.append({'xyxy': [x0, y0, x1, y1], 'xywh': [x0, y0, x1 - x0, y1 - y0], 'yxyx': [y0, x0, y1, x1]}[order])
  return np.array(rows)


# Geometry cannot tell these (see the module's docstring): in thousandths every image is a square; and pixel
# boxes of images under a thousand pixels lie inside the thousandths' square.
def distinguishable(truth, promised):
  (order, unit), (other, wanted) = truth.split(' '), promised.split(' ')
  if wanted == '0-1000' and unit == 'pixels':
    order_differs = {order, other} != {'xyxy', 'yxyx'} and order != other
    return order_differs
  square = wanted != 'pixels' and unit == wanted
  return not (square and {order, other} == {'xyxy', 'yxyx'})


@pytest.mark.parametrize('promised', conventions.CONVENTIONS)
@pytest.mark.parametrize('truth', conventions.CONVENTIONS)
def test_every_pair(truth, promised):
  xyxy, sizes = random_boxes(0, 2000)
  verdict = conventions.recognise(write(xyxy, sizes, truth), sizes=sizes, promised=promised)
  if truth == promised:
    assert (verdict.kind, verdict.kept) == ('as promised', 1.0)
  elif distinguishable(truth, promised):
    assert verdict.kind == 'mistaken' and verdict.kept < 0.97
    if {'0-1000', 'normalised'} & {truth.split(' ')[1]}:  # square: xyxy and yxyx fit alike
      assert verdict.looks_like.replace('yxyx', 'xyxy') == truth.replace('yxyx', 'xyxy')
    else:
      assert verdict.looks_like == truth


@pytest.mark.parametrize('share', [0.03, 0.3, 0.6])
@pytest.mark.parametrize('promised, other', [
    ('xywh pixels', 'xyxy pixels'), ('xyxy pixels', 'xywh pixels'), ('xyxy normalised', 'xyxy pixels'),
    ('xywh pixels', 'xywh normalised')])
def test_mixtures_are_named(promised, other, share):
  xyxy, sizes = random_boxes(1, 3000)
  turned = np.random.default_rng(2).random(3000) < share
  boxes = np.where(turned[:, None], write(xyxy, sizes, other), write(xyxy, sizes, promised))
  verdict = conventions.recognise(boxes, sizes=sizes, promised=promised)
  assert (verdict.kind, verdict.looks_like) == ('mixed', other)
  assert promised in str(verdict) and other in str(verdict)


def test_annotators_mistakes_are_no_other_convention():
  xyxy, sizes = random_boxes(3, 3000)
  rng = np.random.default_rng(4)
  boxes = write(xyxy, sizes, 'xywh pixels')
  boxes[:30] += 400  # outside
  boxes[30:60, 2:] *= -1  # inverted
  boxes[60:90, 2] = 0  # empty
  boxes[90:] += rng.uniform(-3, 3, (2910, 4))  # a few pixels over the border
  assert conventions.recognise(boxes, sizes=sizes, promised='xywh pixels').kind == 'as promised'


@pytest.mark.parametrize('promised', ['xyxy normalised', 'xywh normalised', 'xywh pixels', 'xyxy pixels'])
def test_boxes_that_reach_far_out_of_their_image_are_no_other_convention(promised):
  xyxy, sizes = random_boxes(8, 3000)
  xyxy[:150, 2] = 1.2 * sizes[:150, 1]
  verdict = conventions.recognise(write(xyxy, sizes, promised), sizes=sizes, promised=promised)
  assert verdict.kind == 'as promised' and verdict.kept == 0.95


def test_nonsense_is_said_to_be_nonsense():
  boxes = np.random.default_rng(5).uniform(0, 5000, (500, 4))
  with pytest.raises(ValueError, match='file.json: no known convention fits.*Are the image sizes right'):
    conventions.check(boxes, sizes=np.full((500, 2), 400), promised='xywh pixels', where='file.json')


def test_the_message_says_what_it_looks_like():
  xyxy, sizes = random_boxes(6, 1000)
  with pytest.raises(ValueError, match=r'^a.json: looks like xyxy pixels: 100 % of the boxes fit that; the format '
                                       r'promises xywh pixels, which \d+ % of 1000 boxes fit$'):
    conventions.check(xyxy, sizes=sizes, promised='xywh pixels', where='a.json')


def test_few_boxes_say_nothing():
  xyxy, sizes = random_boxes(7, conventions.MIN_BOXES - 1)
  assert conventions.recognise(xyxy, sizes=sizes, promised='xywh normalised').kind == 'as promised'


def test_hand_made_boxes():
  boxes = np.array([[10, 20, 30, 40], [90, 20, 110, 40], [-1, 20, 30, 40], [30, 20, 10, 40], [60, 20, 50, 10]])
  sizes = np.tile([60, 100], (5, 1))  # height 60, width 100
  assert conventions.fits(boxes, 'xyxy pixels', sizes=sizes).tolist() == [True, False, True, False, False]
  assert conventions.fits(boxes, 'xywh pixels', sizes=sizes).tolist() == [True, False, True, True, False]
  assert conventions.fits(boxes, 'yxyx pixels', sizes=sizes).tolist() == [True, False, True, False, False]
  assert conventions.fits(boxes / 100, 'xywh normalised', sizes=sizes).tolist() == [True, False, True, True, False]
  assert not conventions.fits(boxes, 'xyxy normalised', sizes=sizes).any()


@pytest.mark.parametrize('boxes, sizes, promised', [
    (np.zeros((3, 4)), np.ones((3, 2)), 'xyhw pixels'), (np.zeros((3, 5)), np.ones((3, 2)), 'xywh pixels'),
    (np.zeros((3, 4)), np.ones((4, 2)), 'xywh pixels')])
def test_wrong_arguments(boxes, sizes, promised):
  with pytest.raises(ValueError, match='unknown box convention|expected boxes'):
    conventions.recognise(boxes, sizes=sizes, promised=promised)


@pytest.mark.parametrize('truth', ['xyxy pixels', 'xywh pixels', 'yxyx pixels', 'xywh normalised'])
def test_real_boxes(coco_mini, truth):
  content = json.loads((coco_mini / 'annotations' / 'instances_train2017.json').read_text())
  size = {image['id']: (image['height'], image['width']) for image in content['images']}
  xywh = np.array([a['bbox'] for a in content['annotations']])
  sizes = np.array([size[a['image_id']] for a in content['annotations']])
  xyxy = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], -1)
  verdict = conventions.recognise(write(xyxy, sizes, truth), sizes=sizes, promised='xywh pixels')
  assert verdict.looks_like == ('' if truth == 'xywh pixels' else truth)
