"""The box head, and the RoI-Align alternative to the Prompter."""
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from cloc_jax.models import layers


class BoxHead(nn.Module):
  """Region embedding (..., E) → box (..., 4) in (0, 1), xyxy on the canvas: two dense layers with GELU, a sigmoid."""
  hidden: int
  act: str = 'gelu_tanh'

  @nn.compact
  def __call__(self, z):
    z = layers.activation(self.act)(nn.Dense(self.hidden, name='Dense_0')(z.astype(jnp.float32)))
    # Start near the box that covers the middle half of the image, not in a corner.
    bias_init = lambda key, shape, dtype=jnp.float32: jnp.array([-1.1, -1.1, 1.1, 1.1], dtype)
    return nn.sigmoid(nn.Dense(4, kernel_init=nn.initializers.normal(1e-2), bias_init=bias_init, name='Dense_1')(z))


def roi_align(features_bhwd, boxes_bm4, *, bins: int = 7, samples: int = 2):
  """RoI-Align (He et al. 2017, aligned variant) followed by the mean over its bins.

  features_bhwd: (B, h, w, D). boxes_bm4: (B, M, 4) xyxy normalised to the feature map's extent.
  Every box is cut in bins × bins, each sampled at samples × samples points, bilinearly between cell centres and
  clamped at the border. Since the bins are averaged, that is one weighted mean of the cells, and the weights are a
  product of a row and a column part: (B, M, h) and (B, M, w).

  Returns (B, M, D) float32.
  """
  _, h, w, _ = features_bhwd.shape
  points = bins * samples
  fractions = (jnp.arange(points, dtype=jnp.float32) + 0.5) / points

  def axis_weights(low, high, cells):
    at = (low[..., None] + (high - low)[..., None] * fractions.reshape(1, 1, -1)) * cells - 0.5
    at = jnp.clip(at, 0, cells - 1)
    # Bilinear interpolation is a triangle of half-width one cell around the sampling point.
    distance = jnp.abs(at[..., None] - jnp.arange(cells, dtype=jnp.float32).reshape(1, 1, 1, -1))
    return jnp.maximum(1 - distance, 0).mean(-2)

  columns = axis_weights(boxes_bm4[..., 0], boxes_bm4[..., 2], w)
  rows = axis_weights(boxes_bm4[..., 1], boxes_bm4[..., 3], h)
  return jnp.einsum('bmh,bmw,bhwd->bmd', rows, columns, features_bhwd.astype(jnp.float32))


class RoIAlignHead(nn.Module):
  """The ablation of SPEC §2: boxes → RoI-Align on the ViT's tokens → projection to the joint width."""
  out_dim: int
  bins: int = 7
  samples: int = 2
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, tokens_bnd, boxes_bm4):
    b, n, d = tokens_bnd.shape
    grid = round(n**0.5)
    pooled = roi_align(tokens_bnd.reshape(b, grid, grid, d), boxes_bm4, bins=self.bins, samples=self.samples)
    return nn.Dense(self.out_dim, use_bias=False, kernel_init=nn.initializers.normal(d**-0.5), name='head')(pooled)
