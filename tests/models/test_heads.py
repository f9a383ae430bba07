"""RoI-Align against a loop over sampling points, and the box head against its definition."""
import math

import jax
import jax.numpy as jnp
import numpy as np
import numpy_transformer as twin
import pytest

from cloc_jax.models import heads


def bilinear(features, x, y):
  """(h, w, D) at a point in cell units: cell (i, j) has its centre at (j + 0.5, i + 0.5); clamped at the border."""
  h, w, _ = features.shape
  x, y = min(max(x - 0.5, 0), w - 1), min(max(y - 0.5, 0), h - 1)
  x0, y0 = min(math.floor(x), w - 2), min(math.floor(y), h - 2)
  fx, fy = x - x0, y - y0
  top = (1 - fx) * features[y0, x0] + fx * features[y0, x0 + 1]
  bottom = (1 - fx) * features[y0 + 1, x0] + fx * features[y0 + 1, x0 + 1]
  return (1 - fy) * top + fy * bottom


def roi_align_twin(features, box, *, bins, samples):
  """Mean over bins of the mean over each bin's sampling points."""
  h, w, _ = features.shape
  x0, y0, x1, y1 = box[0] * w, box[1] * h, box[2] * w, box[3] * h
  cells = []
  for i in range(bins):
    for j in range(bins):
      points = []
      for a in range(samples):
        for b in range(samples):
          y = y0 + (y1 - y0) / bins * (i + (a + 0.5) / samples)
          x = x0 + (x1 - x0) / bins * (j + (b + 0.5) / samples)
          points.append(bilinear(features, x, y))
      cells.append(sum(points) / len(points))
  return sum(cells) / len(cells)


BOXES = np.array([[[0.1, 0.2, 0.7, 0.9], [0, 0, 1, 1], [0.4, 0.4, 0.4, 0.4]],  # any, everything, a point
                  [[0.9, 0.0, 1.0, 0.05], [-0.3, 0.5, 0.4, 1.4], [0.48, 0.1, 0.52, 0.95]]])  # corner, outside, sliver


@pytest.mark.parametrize('bins, samples', [(7, 2), (3, 1), (1, 4)])
@pytest.mark.parametrize('h, w', [(5, 5), (4, 6)])
def test_roi_align_is_the_loop_over_sampling_points(bins, samples, h, w):
  features = np.random.default_rng(0).normal(size=(2, h, w, 3)).astype(np.float32)
  got = heads.roi_align(features, BOXES.astype(np.float32), bins=bins, samples=samples)
  want = [[roi_align_twin(features[i].astype(float), box, bins=bins, samples=samples) for box in BOXES[i]]
          for i in range(2)]
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_roi_align_of_a_ramp_is_the_boxs_centre():
  columns = np.broadcast_to(np.arange(8.0) + 0.5, (8, 8))
  features = np.stack([columns, columns.T], -1)[None].astype(np.float32)
  box = np.array([[[0.25, 0.125, 0.75, 0.375]]], np.float32)
  np.testing.assert_allclose(heads.roi_align(features, box)[0, 0], [8 * 0.5, 8 * 0.25], rtol=1e-6)


def test_roi_head_reads_tokens_row_by_row_and_projects():
  model = heads.RoIAlignHead(out_dim=4)
  rng = np.random.default_rng(1)
  params = {'head': {'kernel': rng.normal(size=(3, 4)).astype(np.float32)}}
  tokens = rng.normal(size=(2, 16, 3)).astype(np.float32)
  got = model.apply({'params': params}, tokens, BOXES.astype(np.float32))
  for i in range(2):
    features = np.array([[tokens[i, 4 * row + column] for column in range(4)] for row in range(4)], float)
    for j in range(3):
      want = roi_align_twin(features, BOXES[i, j], bins=7, samples=2) @ params['head']['kernel'].astype(float)
      np.testing.assert_allclose(got[i, j], want, rtol=1e-4, atol=1e-5)
  shapes = jax.eval_shape(model.init, jax.random.key(0), tokens, BOXES)['params']
  assert jax.tree.map(jnp.shape, shapes) == {'head': {'kernel': (3, 4)}}


def test_box_head_is_two_layers_with_gelu_and_a_sigmoid():
  model = heads.BoxHead(hidden=5)
  rng = np.random.default_rng(2)
  z = rng.normal(size=(2, 3, 4)).astype(np.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), z)['params']
  params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
  want = 1 / (1 + np.exp(-twin.mlp(z.astype(float), twin.as64(params), 'gelu_tanh')))
  got = model.apply({'params': params}, z.astype(jnp.bfloat16).astype(np.float32))
  assert got.dtype == jnp.float32 and got.shape == (2, 3, 4)
  np.testing.assert_allclose(model.apply({'params': params}, z), want, rtol=1e-5)


def test_box_head_starts_at_the_middle_half():
  model = heads.BoxHead(hidden=8)
  z = np.random.default_rng(3).normal(size=(50, 8)).astype(np.float32)
  z /= np.linalg.norm(z, axis=-1, keepdims=True)
  boxes = model.apply(model.init(jax.random.key(0), z), z)
  np.testing.assert_allclose(boxes, np.tile([0.25, 0.25, 0.75, 0.75], (50, 1)), atol=0.02)
