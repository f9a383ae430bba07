"""Geometry against pixels: what is painted in a box must be found in the transformed box."""
import numpy as np
import pytest

from cloc_jax import geometry
from cloc_jax.data import transforms


def random_geometry(rng):
  """A geometry of a random size onto a random canvas, padded and flipped at random."""
  height, width = (int(v) for v in rng.integers(5, 400, 2))
  made = geometry.resize_with_pad(
      height=height, width=width, canvas=int(rng.integers(24, 300)), pad=geometry.PAD_MODES[rng.integers(2)])
  return made.flip() if rng.random() < 0.5 else made


def random_box(rng, made):
  """A box with whole-number corners inside the original image, at least 3 canvas pixels a side where that fits."""
  least = np.minimum(np.ceil(3 / made.scale_xy), [made.width, made.height]).astype(int)
  x0, y0 = (int(rng.integers(0, n - m + 1)) for n, m in zip((made.width, made.height), least))
  x1, y1 = int(rng.integers(x0 + least[0], made.width + 1)), int(rng.integers(y0 + least[1], made.height + 1))
  return np.array([x0, y0, x1, y1])


def extent(found):
  """Bounding box of a boolean picture, in its pixels."""
  cols, rows = np.flatnonzero(found.any(0)), np.flatnonzero(found.any(1))
  return np.array([cols[0], rows[0], cols[-1] + 1, rows[-1] + 1])


@pytest.mark.parametrize('seed', range(60))
def test_a_painted_marker_lies_in_its_box(seed):
  rng = np.random.default_rng(seed)
  made = random_geometry(rng)
  x0, y0, x1, y1 = box = random_box(rng, made)
  image = np.zeros((made.height, made.width, 3), np.uint8)
  image[y0:y1, x0:x1] = 255
  canvas = transforms.resize_with_pad(image, made, pad_value=0)
  assert canvas.shape == (made.canvas, made.canvas, 3)
  want = made.boxes_to_canvas(box) * made.canvas
  # Half a pixel, and a grey level of rounding.
  np.testing.assert_allclose(extent(canvas[..., 0] >= 128), want, atol=0.5 + 1 / 255)


@pytest.mark.parametrize('seed', range(30))
def test_a_mask_lies_in_its_box(seed):
  rng = np.random.default_rng(100 + seed)
  made = random_geometry(rng)
  x0, y0, x1, y1 = box = random_box(rng, made)
  mask = np.zeros((made.height, made.width), bool)
  mask[y0:y1, x0:x1] = True
  np.testing.assert_allclose(
      extent(made.mask_to_canvas(mask)), made.boxes_to_canvas(box) * made.canvas, atol=0.5 + 1e-3)


@pytest.mark.parametrize('seed', range(30))
def test_inverses(seed):
  rng = np.random.default_rng(200 + seed)
  made = random_geometry(rng)
  points = rng.uniform(0, [made.width, made.height], (5, 3, 2))
  np.testing.assert_allclose(made.points_from_canvas(made.points_to_canvas(points)), points, atol=1e-9)
  boxes = np.stack([random_box(rng, made) for _ in range(4)])
  np.testing.assert_allclose(made.boxes_from_canvas(made.boxes_to_canvas(boxes)), boxes, atol=1e-3)
  assert made.flip().flip() == made


@pytest.mark.parametrize('seed', range(20))
def test_the_image_is_kept_whole_and_in_proportion(seed):
  rng = np.random.default_rng(300 + seed)
  made = random_geometry(rng)
  assert max(made.resized_height, made.resized_width) == made.canvas
  assert 0 <= made.top <= made.canvas - made.resized_height
  assert 0 <= made.left <= made.canvas - made.resized_width
  assert abs(made.resized_height - made.height * made.canvas / max(made.height, made.width)) <= 1
  corners = made.boxes_to_canvas(np.array([0, 0, made.width, made.height]))
  assert corners.min() > -1e-6 and corners.max() < 1 + 1e-6 and (corners[2:] > corners[:2]).all()


def test_by_hand():
  made = geometry.resize_with_pad(height=100, width=200, canvas=50)
  assert (made.resized_height, made.resized_width, made.top, made.left) == (25, 50, 12, 0)
  np.testing.assert_allclose(made.boxes_to_canvas(np.array([20, 40, 60, 80])), [0.1, 0.44, 0.3, 0.64], rtol=1e-6)
  np.testing.assert_allclose(made.flip().boxes_to_canvas(np.array([20, 40, 60, 80])), [0.7, 0.44, 0.9, 0.64], rtol=1e-6)
  corner = geometry.resize_with_pad(height=100, width=200, canvas=50, pad='corner')
  np.testing.assert_allclose(corner.boxes_to_canvas(np.array([20, 40, 60, 80])), [0.1, 0.2, 0.3, 0.4], rtol=1e-6)
  np.testing.assert_allclose(
      geometry.normalized_boxes_to_canvas(made, np.array([[0.1, 0.4, 0.3, 0.8]])), [[0.1, 0.44, 0.3, 0.64]], rtol=1e-6)


def test_boxes_from_canvas_stay_in_the_image_unless_told():
  made = geometry.resize_with_pad(height=100, width=200, canvas=50)
  whole = np.array([0.0, 0.0, 1.0, 1.0])
  np.testing.assert_allclose(made.boxes_from_canvas(whole), [0, 0, 200, 100])
  np.testing.assert_allclose(made.boxes_from_canvas(whole, clip=False), [0, -48, 200, 152])


def test_refusals():
  with pytest.raises(ValueError, match="'middle'"):
    geometry.resize_with_pad(height=4, width=4, canvas=8, pad='middle')
  with pytest.raises(ValueError, match='0×4'):
    geometry.resize_with_pad(height=0, width=4, canvas=8)
  with pytest.raises(ValueError, match='expected 4×6, got 6×4'):
    geometry.resize_with_pad(height=4, width=6, canvas=8).mask_to_canvas(np.zeros((6, 4), bool))
