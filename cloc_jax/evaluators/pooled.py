"""Regions and points from a grid of patch embeddings: RoI-Align, mask pooling, and the patch most like a text."""
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cloc_jax.evaluators.collect import EncoderFns
from cloc_jax.models import heads, layers

POOLINGS = ('roi', 'mask-pool')


class PooledHandle(NamedTuple):
  """The encoded images, and their patches in the joint space: (B, h, w, E)."""
  encoded: Any
  patches: Any


def pooled_regions(fns: EncoderFns, how: str) -> EncoderFns:
  """The same model, with regions embedded by pooling its patch embeddings; the result is L2-normalised.

  The patches are what `fns.embed_patches` gives: the last layer's tokens through the final norm and the projection.
    roi        RoI-Align: 7 × 7 bins of 2 × 2 bilinear samples, then the mean over the bins
    mask-pool  the mean of the patches, each weighted by the area of its overlap with the box

  Raises:
    ValueError: on another `how`, or a model without patch embeddings.
  """
  if how not in POOLINGS:
    raise ValueError(f'pooled_regions: expected one of {POOLINGS}, got {how!r}')
  if fns.embed_patches is None:
    raise ValueError(f'region embedding {how!r}: this model gives no patch embeddings')
  pool = jax.jit(_roi if how == 'roi' else _mask_pool)

  def encode_image(images):
    encoded = fns.encode_image(images)
    return PooledHandle(encoded=encoded, patches=fns.embed_patches(encoded))

  return dataclasses.replace(
      fns, encode_image=encode_image, image_embedding=lambda handle: fns.image_embedding(handle.encoded),
      embed_patches=lambda handle: handle.patches, embed_regions=lambda handle, boxes: pool(handle.patches, boxes),
      ground=None if fns.ground is None else lambda handle, z_text: fns.ground(handle.encoded, z_text))


def _roi(patches_bhwe, boxes_bm4):
  return layers.l2_normalize(heads.roi_align(patches_bhwe, boxes_bm4))


def _mask_pool(patches_bhwe, boxes_bm4):
  _, h, w, _ = patches_bhwe.shape

  def overlap(low, high, cells):
    """(B, M) and (B, M) in cells → (B, M, cells): the share of what lies between them that each cell has."""
    cell = jnp.arange(cells, dtype=jnp.float32).reshape(1, 1, -1)
    out = jnp.maximum(jnp.minimum(high[..., None], cell + 1) - jnp.maximum(low[..., None], cell), 0)
    return out / jnp.maximum(out.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)

  columns = overlap(boxes_bm4[..., 0] * w, boxes_bm4[..., 2] * w, w)
  rows = overlap(boxes_bm4[..., 1] * h, boxes_bm4[..., 3] * h, h)
  return layers.l2_normalize(jnp.einsum('bmh,bmw,bhwe->bme', rows, columns, patches_bhwe.astype(jnp.float32)))
