"""Boxes against counting grid cells, and against plain loops."""
import jax.numpy as jnp
import numpy as np
import pytest

from cloc_jax import boxes

GRID = 12


def grid_boxes(seed, count):
  """Boxes with whole-number corners on a GRID × GRID board, some of them empty."""
  corners = np.random.default_rng(seed).integers(0, GRID + 1, (count, 2, 2))
  return np.concatenate([corners.min(1), corners.max(1)], -1).astype(np.float32)


def cells(box):
  x0, y0, x1, y1 = map(int, box)
  return {(x, y) for x in range(x0, x1) for y in range(y0, y1)}


def counted_iou(a, b):
  union = cells(a) | cells(b)
  return len(cells(a) & cells(b)) / len(union) if union else 0.0


def counted_giou(a, b):
  hull = [min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])]
  outside = cells(hull) - cells(a) - cells(b)
  return counted_iou(a, b) - (len(outside) / len(cells(hull)) if cells(hull) else 0.0)


@pytest.mark.parametrize('asarray', [np.asarray, jnp.asarray])
def test_area_iou_and_giou_count_cells(asarray):
  a, b = grid_boxes(0, 60), grid_boxes(1, 60)
  np.testing.assert_allclose(boxes.area(asarray(a)), [len(cells(x)) for x in a])
  np.testing.assert_allclose(boxes.iou(asarray(a), asarray(b)), list(map(counted_iou, a, b)), atol=1e-6)
  np.testing.assert_allclose(boxes.giou(asarray(a), asarray(b)), list(map(counted_giou, a, b)), atol=1e-6)


def test_pairwise_iou_is_a_double_loop():
  a, b = grid_boxes(2, 7), grid_boxes(3, 5)
  want = [[counted_iou(x, y) for y in b] for x in a]
  got = boxes.pairwise_iou(a, b)
  assert got.shape == (7, 5)
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_area_of_an_inverted_box_is_zero():
  assert boxes.area(np.array([0.6, 0.2, 0.4, 0.8])) == 0


@pytest.mark.parametrize('asarray', [np.asarray, jnp.asarray])
def test_conversions(asarray):
  xywh = asarray(np.array([[10., 20., 30., 40.], [0., 0., 5., 1.]], np.float32))
  xyxy = boxes.from_xywh(xywh)
  np.testing.assert_array_equal(xyxy, [[10, 20, 40, 60], [0, 0, 5, 1]])
  np.testing.assert_array_equal(boxes.to_xywh(xyxy), xywh)
  unit = boxes.normalize(xyxy, height=80, width=50)
  np.testing.assert_allclose(unit, [[0.2, 0.25, 0.8, 0.75], [0, 0, 0.1, 0.0125]], rtol=1e-6)
  np.testing.assert_allclose(boxes.denormalize(unit, height=80, width=50), xyxy, rtol=1e-6)
  assert type(unit) is type(xywh)


def test_flip_mirrors_a_painted_board():
  for box in grid_boxes(4, 20):
    board = np.zeros((GRID, GRID), bool)
    for x, y in cells(box):
      board[y, x] = True
    flipped = boxes.flip_horizontal(box / GRID) * GRID
    assert cells(np.round(flipped)) == {(x, y) for y, x in zip(*np.nonzero(board[:, ::-1]))}
    np.testing.assert_allclose(boxes.flip_horizontal(flipped / GRID) * GRID, box, atol=1e-5)


def test_check_normalized_accepts_annotators_generosity():
  boxes.check_normalized([[-0.02, 0, 1.04, 1]], where='here')
  boxes.check_normalized(np.zeros((0, 4)), where='here')


@pytest.mark.parametrize('bad, message', [
    ([[10, 20, 300, 400]], r'here.*looks like pixels'),
    ([[0.1, 0.2, float('nan'), 0.4]], r'here.*NaN'),
    ([[0.1, 0.2, 0.3]], r'here.*\(n, 4\).*\(1, 3\)'),
    ([0.1, 0.2, 0.3, 0.4], r'here.*\(n, 4\)')])
def test_check_normalized_names_the_place_and_the_fault(bad, message):
  with pytest.raises(ValueError, match=message):
    boxes.check_normalized(bad, where='here')


def test_sanitize_sorts_boxes_by_fault():
  given = np.array([
      [0.1, 0.1, 0.5, 0.5],    # sound
      [-0.1, 0.2, 0.4, 1.2],   # sticks out: clipped
      [0.5, 0.5, 1.01, 0.9],   # sticks out by little: clipped
      [0.6, 0.1, 0.4, 0.5],    # inverted
      [0.3, 0.9, 0.4, 0.1],    # inverted
      [0.2, 0.2, 0.2, 0.7],    # no width
      [1.1, 0.2, 1.3, 0.4],    # wholly outside: empty once clipped
  ])
  clipped, keep, counts = boxes.sanitize(given)
  assert keep.tolist() == [True, True, True, False, False, False, False]
  assert counts == {'inverted': 2, 'empty': 2, 'clipped': 2}
  np.testing.assert_allclose(clipped[:3], [[0.1, 0.1, 0.5, 0.5], [0, 0.2, 0.4, 1], [0.5, 0.5, 1, 0.9]], rtol=1e-6)
  assert clipped.dtype == np.float32


def test_sanitize_min_size_and_nothing():
  _, keep, counts = boxes.sanitize([[0, 0, 0.01, 0.5], [0, 0, 0.5, 0.5]], min_size=0.02)
  assert keep.tolist() == [False, True] and counts['empty'] == 1
  clipped, keep, counts = boxes.sanitize([])
  assert clipped.shape == (0, 4) and keep.shape == (0,) and not any(counts.values())
