"""Losses between the boxes a text was grounded to and the true ones (SPEC §3)."""
import jax.numpy as jnp

from cloc_jax import boxes as box_lib


def _mean_over_valid(values_bm, mask_bm):
  return jnp.where(mask_bm, values_bm, 0).sum() / jnp.maximum(mask_bm.sum(), 1)


def _harmless(boxes_bm4, mask_bm):
  """Masked regions may hold anything; a mask after the arithmetic would let NaN through into the gradient."""
  return jnp.where(mask_bm[..., None], boxes_bm4, jnp.asarray([0., 0., 1., 1.]).reshape(1, 1, 4))


def l2(pred_bm4, boxes_bm4, mask_bm):
  """1 / (4·K) Σ ‖box − pred‖² over the K valid regions, on normalised coordinates."""
  return _mean_over_valid(jnp.square(pred_bm4 - _harmless(boxes_bm4, mask_bm)).mean(-1), mask_bm)


def l1_giou(pred_bm4, boxes_bm4, mask_bm):
  """DETR's mixture (Carion et al. 2020): 5 · mean |box − pred| + 2 · (1 − GIoU), averaged over the valid regions."""
  safe = _harmless(boxes_bm4, mask_bm)
  distance = jnp.abs(pred_bm4 - safe).mean(-1)
  return _mean_over_valid(5 * distance + 2 * (1 - box_lib.giou(pred_bm4, safe)), mask_bm)


GROUNDINGS = {'l2': l2, 'l1_giou': l1_giou}
