import numpy as np
import pytest

from cloc_jax.evaluators import NothingToMeasure, PointingGame, points
from cloc_jax.geometry import resize_with_pad


def test_points_in_boxes_by_hand(make_predictions):
  left, right = [0, 0, .5, 1], [.5, 0, 1, 1]
  predictions = make_predictions(
      region_image=[0] * 4, region_captions=['dog', 'dog', 'cat', ''], boxes=[left, right, right, left],
      points=[[.2, .5], [.3, .9], [.5, 1], [.1, .1]],         # right; in the other dog; on the border; not asked
      pred_boxes=[[.4, 0, .8, 1], right, [0, 0, .2, .2], left])  # centre right of the middle; right; wrong
  got = dict(PointingGame(prefix='g/').run(predictions))
  assert got['g/patch_acc'] == pytest.approx(2 / 3) and got['g/patch_acc_any'] == 1
  assert got['g/center_acc'] == pytest.approx(1 / 3) and got['g/center_acc_any'] == pytest.approx(2 / 3)
  assert (got['g/phrases'], got['g/chance']) == (3, pytest.approx(0.5))


def test_either_kind_of_point_alone(make_predictions):
  names = lambda **kw: {name for name, _ in PointingGame().run(
      make_predictions(region_image=[0], region_captions=['a'], **kw))}
  assert names(points=[[0, 0]]) == {'patch_acc', 'patch_acc_any', 'chance', 'phrases'}
  assert names(pred_boxes=[[0, 0, 1, 1]]) == {'center_acc', 'center_acc_any', 'chance', 'phrases'}
  with pytest.raises(NothingToMeasure, match='neither patch embeddings nor a box head'):
    names()


def test_the_most_similar_patch_on_the_image_against_a_loop(unit):
  rng = np.random.default_rng(0)
  patches, z_text = 3 * rng.normal(size=(2, 4, 6, 5)).astype(np.float32), unit(rng.normal(size=(2, 3, 5)))
  on_image = rng.random((2, 4, 6)) < 0.6
  got = np.asarray(points.most_similar(patches, z_text, on_image))
  for b in range(2):
    for m in range(3):
      best = max(((r, c) for r in range(4) for c in range(6) if on_image[b, r, c]),
                 key=lambda at: patches[b][at] @ z_text[b, m] / np.linalg.norm(patches[b][at]))
      np.testing.assert_allclose(got[b, m], [(best[1] + .5) / 6, (best[0] + .5) / 4], atol=1e-6)


def test_padding_is_not_on_the_image():
  wide = resize_with_pad(height=100, width=200, canvas=64)
  assert points.on_image(wide, grid=(4, 4)).tolist() == [[False] * 4, [True] * 4, [True] * 4, [False] * 4]
  tall = resize_with_pad(height=200, width=50, canvas=64, pad='corner')
  assert points.on_image(tall, grid=(4, 4)).tolist() == [[True, False, False, False]] * 4
  assert points.on_image(resize_with_pad(height=1, width=200, canvas=64), grid=(4, 4)).all()
