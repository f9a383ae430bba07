import sys
import types

import numpy as np
import pytest

from cloc_jax.evaluators import EncoderFns, crop_regions
from cloc_jax.evaluators.crop import _pixel_corners


def mean_colour_model():
  """Embeds an image by its mean colour: a crop of one colour has a known embedding."""
  batches = []
  def encode_image(images):
    batches.append(images)
    return np.asarray(images, np.float32).reshape(len(images), -1, 3).mean(1)
  def image_embedding(mean):
    return mean / np.maximum(np.linalg.norm(mean, axis=-1, keepdims=True), 1e-6)
  fns = EncoderFns(encode_image=encode_image, image_embedding=image_embedding, embed_regions=None,
                   encode_text=lambda texts, *, region: np.ones((len(texts), 3)), ground=lambda h, z: None)
  return fns, batches


@pytest.fixture(name='stretched')
def _stretched(monkeypatch):
  """A stand-in for the data layer's resize, which fills the canvas by nearest neighbour, without padding."""
  def prepare_image(image, *, image_size, pad):
    assert image.dtype == np.uint8 and image.flags['C_CONTIGUOUS']
    rows = np.arange(image_size) * image.shape[0] // image_size
    cols = np.arange(image_size) * image.shape[1] // image_size
    return image[rows][:, cols], None
  module = types.ModuleType('cloc_jax.data.transforms')
  module.prepare_image = prepare_image
  import cloc_jax.data
  monkeypatch.setitem(sys.modules, 'cloc_jax.data.transforms', module)
  monkeypatch.setattr(cloc_jax.data, 'transforms', module, raising=False)


def quadrants():
  """(2, 8, 8, 3): four colours an image, and the boxes of the four quadrants."""
  images = np.zeros((2, 8, 8, 3), np.uint8)
  images[0, :4, :4, 0] = images[0, :4, 4:, 1] = images[0, 4:, :4, 2] = 200
  images[0, 4:, 4:] = 200
  images[1] = images[0, ::-1]
  boxes = np.float32([[0, 0, .5, .5], [.5, 0, 1, .5], [0, .5, .5, 1], [.5, .5, 1, 1]])
  return images, np.stack([boxes, boxes])


def test_each_region_is_embedded_from_its_own_pixels(stretched):
  fns, batches = mean_colour_model()
  images, boxes = quadrants()
  cropped = crop_regions(fns, image_size=8)
  handle = cropped.encode_image(images)
  z = cropped.embed_regions(handle, boxes)
  white = np.ones(3) / 3 ** 0.5
  r, g, b = np.eye(3)
  np.testing.assert_allclose(z, [[r, g, b, white], [b, white, r, g]], atol=1e-6)
  np.testing.assert_array_equal(cropped.image_embedding(handle), fns.image_embedding(fns.encode_image(images)))
  assert cropped.ground is None
  assert all(x.shape == (2, 8, 8, 3) and x.dtype == np.uint8 for x in batches)


def test_repeated_boxes_are_encoded_once(stretched):
  fns, batches = mean_colour_model()
  images, boxes = quadrants()
  cropped = crop_regions(fns, image_size=8)
  handle = cropped.encode_image(images)
  batches.clear()
  padded = np.concatenate([boxes[:, :1], np.repeat(boxes[:, :1], 15, 1)], 1)
  z = cropped.embed_regions(handle, padded)
  assert z.shape == (2, 16, 3) and len(batches) == 1
  np.testing.assert_array_equal(z, np.repeat(z[:, :1], 16, 1))


def test_pixel_corners_round_outwards_and_never_vanish():
  boxes = np.array([[.1, .1, .2, .2], [.5, .5, .5, .5], [1, 1, 1, 1], [-1, 0, 2, 1], [0.3, 0.3, 0.1, 0.1],
                    [.08, .17, .16, .52]])
  got = _pixel_corners(boxes, height=10, width=20)
  assert got.tolist() == [[2, 1, 4, 2], [10, 5, 11, 6], [19, 9, 20, 10], [0, 0, 20, 10], [6, 3, 7, 4], [1, 1, 4, 6]]


def test_a_box_of_whole_pixels_keeps_its_pixels_in_float32():
  pixels = np.array([[x0, y0, x0 + 3, y0 + 2] for x0 in range(46) for y0 in range(46)])
  boxes = np.float32(pixels / 49).astype(np.float64)
  assert (boxes * 49 != pixels).any()
  np.testing.assert_array_equal(_pixel_corners(boxes, height=49, width=49), pixels)


def test_with_the_real_resize():
  pytest.importorskip('cv2')
  pytest.importorskip('cloc_jax.data.transforms')
  fns, _ = mean_colour_model()
  images, boxes = quadrants()
  cropped = crop_regions(fns, image_size=8)
  # A square crop fills the canvas: no padding colour mixes in.
  z = cropped.embed_regions(cropped.encode_image(images), boxes)
  np.testing.assert_allclose(z[0, 1], [0, 1, 0], atol=1e-6)
