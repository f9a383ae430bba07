import numpy as np
import pytest

from cloc_jax import encoders
from cloc_jax.evaluators import EncoderFns, pooled_regions


def fns(patches, **changes):
  return EncoderFns(**{**dict(encode_image=lambda images: len(images), image_embedding=lambda n: np.ones((n, 1)),
                              embed_regions=None, encode_text=None, ground=None, embed_patches=lambda n: patches[:n]),
                       **changes})


def pooled(patches, boxes, how):
  model = pooled_regions(fns(patches), how)
  return np.asarray(model.embed_regions(model.encode_image(np.zeros((len(patches), 2, 2, 3), np.uint8)), boxes))


@pytest.fixture(name='case')
def _case():
  rng = np.random.default_rng(0)
  corners = np.sort(rng.random((2, 6, 2, 2)), 2).reshape(2, 6, 4).astype(np.float32)
  corners[0, 0], corners[0, 1] = [0, 0, 1, 1], [0.4, 0.55, 0.401, 0.551]
  return rng.normal(size=(2, 5, 4, 3)).astype(np.float32), corners


def test_mask_pool_against_a_loop_over_cells(case):
  patches, boxes = case
  b, h, w, _ = patches.shape
  want = np.zeros((*boxes.shape[:2], 3))
  for i in range(b):
    for j, (x0, y0, x1, y1) in enumerate(boxes[i].astype(np.float64)):
      for row in range(h):
        for column in range(w):
          wide = min(x1, (column + 1) / w) - max(x0, column / w)
          high = min(y1, (row + 1) / h) - max(y0, row / h)
          if wide > 0 and high > 0:
            want[i, j] += wide * high * patches[i, row, column]
  want /= np.linalg.norm(want, axis=-1, keepdims=True)
  np.testing.assert_allclose(pooled(patches, boxes, 'mask-pool'), want, atol=1e-4)


def test_roi_against_a_loop_over_samples(case):
  patches, boxes = case
  b, h, w, _ = patches.shape
  want = np.zeros((*boxes.shape[:2], 3))

  def bilinear(grid, y, x):
    y, x = min(max(y - 0.5, 0), h - 1), min(max(x - 0.5, 0), w - 1)
    top, left = int(min(y, h - 2)), int(min(x, w - 2))
    dy, dx = y - top, x - left
    return ((1 - dy) * (1 - dx) * grid[top, left] + (1 - dy) * dx * grid[top, left + 1]
            + dy * (1 - dx) * grid[top + 1, left] + dy * dx * grid[top + 1, left + 1])

  for i in range(b):
    for j, (x0, y0, x1, y1) in enumerate(boxes[i].astype(np.float64)):
      for bin_y in range(7):
        for bin_x in range(7):
          for sample_y in (0.25, 0.75):
            for sample_x in (0.25, 0.75):
              y = y0 + (y1 - y0) * (bin_y + sample_y) / 7
              x = x0 + (x1 - x0) * (bin_x + sample_x) / 7
              want[i, j] += bilinear(patches[i], y * h, x * w)
  want /= np.linalg.norm(want, axis=-1, keepdims=True)
  np.testing.assert_allclose(pooled(patches, boxes, 'roi'), want, atol=1e-4)


def test_grounding_and_images_are_passed_on():
  model = fns(np.ones((2, 2, 2, 3), np.float32), ground=lambda handle, z: (handle, z))
  got = pooled_regions(model, 'roi')
  handle = got.encode_image(np.zeros((2, 2, 2, 3)))
  assert got.ground(handle, 'z') == (2, 'z') and got.image_embedding(handle).shape == (2, 1)
  assert pooled_regions(fns(None), 'roi').ground is None
  with pytest.raises(ValueError, match='no patch embeddings'):
    pooled_regions(fns(None, embed_patches=None), 'roi')
  with pytest.raises(ValueError, match="'roi', 'mask-pool'"):
    pooled_regions(model, 'median')


def test_region_embeddings_that_a_model_lacks_are_refused():
  plain = encoders.Encoder(fns=fns(None), image_size=2, pad='center', info={'region_branch': 'roi_align'})
  with pytest.raises(ValueError, match="'prompter' needs a model with a Prompter; .* region branch 'roi_align'"):
    encoders.with_regions(plain, 'prompter')
  with pytest.raises(ValueError, match='expected one of'):
    encoders.with_regions(plain, 'rio')
  assert encoders.with_regions(plain, None).info['region_embedding'] == 'model'
