"""Contrastive losses between two sets of N paired embeddings, over the global batch (SPEC §3), exactly.

`softmax_contrast` and `sigmoid_contrast` go over the N × N pairs in tiles (`losses/tiles.py`) and write their backward
passes by hand: memory grows with N, and tiles are computed again where they are needed again. `softmax_dense` and
`sigmoid_dense` are the definitions, which hold all pairs at once: what tests compare with, and fine for small N.
"""
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from cloc_jax.losses import tiles

_MASKED = -1e30  # finite, so that a row without any valid entry has a defined (and unused) log-sum-exp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Contrast:
  """loss: scalar. filtered: share of the valid off-diagonal pairs that the text filter left out, scalar."""
  loss: Any
  filtered: Any


# --- the definitions


def _pair_masks(z_text_ne, mask_n, filter_threshold):
  """(kept (N, N), share filtered): pairs of valid entries, without the similar ones off the diagonal."""
  n = mask_n.shape[0]
  valid_nn = mask_n[:, None] & mask_n[None, :]
  off_diagonal_nn = valid_nn & ~jnp.eye(n, dtype=bool)
  if filter_threshold is None:
    return valid_nn, jnp.zeros(())
  z = jax.lax.stop_gradient(z_text_ne)
  similar_nn = off_diagonal_nn & (jnp.einsum('ne,me->nm', z, z) > filter_threshold)
  share = similar_nn.sum() / jnp.maximum(off_diagonal_nn.sum(), 1)
  return valid_nn & ~similar_nn, share


def softmax_dense(z_a_ne, z_text_ne, *, logit_scale, logit_bias=None, mask_n=None,
                  filter_threshold: float | None = None) -> Contrast:
  """Symmetric InfoNCE, (L_a→text + L_text→a) / 2, averaged over the valid entries, with all N × N pairs in memory.

  Args:
    z_a_ne, z_text_ne: (N, E) L2-normalised; row k of one belongs to row k of the other. They may be sharded over N.
    logit_scale: scalar, the inverse temperature. logit_bias: ignored, a softmax does not see it.
    mask_n: (N,) bool; invalid rows and columns leave the numerators and both denominators.
    filter_threshold: pairs k ≠ k' whose texts have a cosine above it leave both denominators; no gradient passes
      through this test. May be traced.
  """
  del logit_bias
  n = z_a_ne.shape[0]
  mask_n = jnp.ones((n,), bool) if mask_n is None else mask_n
  kept_nn, filtered = _pair_masks(z_text_ne, mask_n, filter_threshold)
  logits_nn = jnp.einsum('ne,me->nm', z_a_ne, z_text_ne, preferred_element_type=_accumulator(z_a_ne)) * logit_scale
  logits_nn = jnp.where(kept_nn, logits_nn, _MASKED)
  positive_n = jnp.einsum('ne,ne->n', z_a_ne, z_text_ne, preferred_element_type=_accumulator(z_a_ne)) * logit_scale
  both_n = jax.nn.logsumexp(logits_nn, 1) + jax.nn.logsumexp(logits_nn, 0) - 2 * positive_n
  loss = jnp.where(mask_n, both_n, 0).sum() / (2 * jnp.maximum(mask_n.sum(), 1))
  return Contrast(loss, filtered)


def sigmoid_dense(z_a_ne, z_text_ne, *, logit_scale, logit_bias, mask_n=None,
                  filter_threshold: float | None = None) -> Contrast:
  """SigLIP's pairwise loss (Zhai et al. 2023, eq. 1): −1/N Σ_ij log σ(±(scale · cos_ij + bias)).

  Arguments as in `softmax_dense`; filtered and invalid pairs leave the sum.
  """
  n = z_a_ne.shape[0]
  mask_n = jnp.ones((n,), bool) if mask_n is None else mask_n
  kept_nn, filtered = _pair_masks(z_text_ne, mask_n, filter_threshold)
  cos_nn = jnp.einsum('ne,me->nm', z_a_ne, z_text_ne, preferred_element_type=_accumulator(z_a_ne))
  sign_nn = 2 * jnp.eye(n, dtype=jnp.float32) - 1
  pair_nn = -jax.nn.log_sigmoid(sign_nn * (cos_nn * logit_scale + logit_bias))
  loss = jnp.where(kept_nn, pair_nn, 0).sum() / jnp.maximum(mask_n.sum(), 1)
  return Contrast(loss, filtered)


# --- the same in tiles


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Side:
  """Rows or columns of the pair matrix: embeddings (n, E), texts (n, E) where the filter needs them, valid (n,), number
  in the global batch (n,), cosine of the own pair (n,), and the excess (n,) once it is known."""
  z: Any
  text: Any
  mask: Any
  index: Any
  own: Any
  excess: Any = None


def _sides(tiling, a, text, mask, filtered, row_excess=None, column_excess=None):
  n = a.shape[0]
  index = jnp.arange(n, dtype=jnp.int32)
  if tiling.axes:
    index += lax.axis_index(tiling.axes) * n
  a, text = tiling.operand(a), tiling.operand(text)
  own = jnp.einsum('ne,ne->n', a, text, preferred_element_type=_accumulator(a), precision=lax.Precision.HIGHEST)
  rows = _Side(a, text if filtered else None, mask, index, own, row_excess)
  return rows, _Side(text, None, mask, index, own, column_excess)


def _pairs(tiling, row: _Side, column: _Side, threshold):
  """(cosines, kept, diagonal, number of filtered pairs) of a tile."""
  cosine = tiling.dot(row.z, column.z, (1, 1))
  diagonal = row.index[:, None] == column.index[None, :]
  kept = row.mask[:, None] & column.mask[None, :]
  if threshold is None:
    return cosine, kept, diagonal, jnp.zeros((), cosine.dtype)
  similar = kept & ~diagonal & (tiling.dot(row.text, column.z, (1, 1)) > threshold)
  return cosine, kept & ~similar, diagonal, similar.sum(dtype=jnp.int32).astype(cosine.dtype)


def _accumulator(x):
  return jnp.promote_types(jnp.float32, x.dtype)


def _total(tiling, x):
  return lax.psum(x, tiling.axes) if tiling.axes else x


def _share(count, valid):
  return count / jnp.maximum(valid * (valid - 1), 1)


# A softmax's loss is the excess of its log-sum-exp over the positive's logit, log(1 + Σ_others exp(logit − positive)).
# Summed like this, and not as the difference of two large numbers, it keeps its precision near the optimum.


def _add_exponentials(sums, x, axis):
  """A running (maximum, sum of exponentials) over one axis of tile after tile. The maximum starts at the positive's 0."""
  old_max, total = sums
  new_max = jnp.maximum(old_max, x.max(axis))
  return new_max, total * jnp.exp(old_max - new_max) + jnp.exp(x - jnp.expand_dims(new_max, axis)).sum(axis)


def _excess(sums):
  top, total = sums
  return top + jnp.log1p(total + jnp.expm1(-top))


def _combine_exponentials(tiling, sums, axes):
  """(maximum, sum) of gathered columns, each device's over its own rows → this device's columns over all rows."""
  part_max, part_sum = sums
  top = lax.pmax(part_max, axes)
  total = lax.psum(part_sum * jnp.exp(part_max - top), axes)
  n = top.shape[0] // math.prod(tiling.mesh.shape[axis] for axis in axes)
  own = lambda x: lax.dynamic_slice_in_dim(x, lax.axis_index(axes) * n, n)
  return own(top), own(total)


def _scatter(sums, axes):
  return lax.psum_scatter(sums, axes, tiled=True)


def _logits(cosine, row, column, scale):
  """Logits of a tile less the row's positive, and less the column's."""
  return (cosine - row.own[:, None]) * scale, (cosine - column.own[None, :]) * scale


def _softmax_statistics(tiling, a, text, scale, mask, threshold):
  """On this device's share: (loss, share filtered, row_excess (n,), column_excess (n,)); the first two of the whole
  batch."""
  rows, columns = _sides(tiling, a, text, mask, threshold is not None)
  kind = _accumulator(a)

  def tile(row, column, row_sums, column_sums, count):
    cosine, kept, diagonal, filtered = _pairs(tiling, row, column, threshold)
    over_row, over_column = _logits(jnp.where(kept & ~diagonal, cosine, _MASKED), row, column, scale)
    return _add_exponentials(row_sums, over_row, 1), _add_exponentials(column_sums, over_column, 0), count + filtered

  start = lambda n: (jnp.zeros((n,), kind), jnp.zeros((n,), kind))
  row_sums, column_sums, count = tiles.sweep(
      tiling, tile, rows, columns, row_sums=start, column_sums=start, scalars=jnp.zeros((), kind),
      combine=functools.partial(_combine_exponentials, tiling))
  row_excess, column_excess = _excess(row_sums), _excess(column_sums)
  valid = _total(tiling, mask.sum(dtype=kind))
  loss = _total(tiling, jnp.where(mask, row_excess + column_excess, 0).sum()) / (2 * jnp.maximum(valid, 1))
  return loss, _share(_total(tiling, count), valid), row_excess, column_excess


def _softmax_gradients(tiling, a, text, scale, mask, threshold, row_excess, column_excess, d_loss):
  """On this device's share: (d_a, d_text, d_scale)."""
  rows, columns = _sides(tiling, a, text, mask, threshold is not None, row_excess, column_excess)
  kind = _accumulator(a)

  def tile(row, column, d_row, d_column, d_scale):
    cosine, kept, diagonal, _ = _pairs(tiling, row, column, threshold)
    over_row, over_column = _logits(cosine, row, column, scale)
    d_logits = jnp.exp(over_row - row.excess[:, None]) + jnp.exp(over_column - column.excess[None, :])
    d_logits = jnp.where(kept & ~diagonal, d_logits, 0)
    g = tiling.operand(d_logits)
    return (d_row + tiling.dot(g, column.z, (1, 0)), d_column + tiling.dot(g, row.z, (0, 0)),
            d_scale + (d_logits * cosine).sum())

  start = lambda n: jnp.zeros((n, a.shape[1]), kind)
  d_a, d_text, d_scale = tiles.sweep(
      tiling, tile, rows, columns, row_sums=start, column_sums=start, scalars=jnp.zeros((), kind),
      combine=_scatter)
  # The positives, p − 1 for rows and for columns: at the end of training the largest part, and never rounded to operands.
  d_own = jnp.where(mask, jnp.expm1(-row_excess) + jnp.expm1(-column_excess), 0)
  positive = lambda z: jnp.where(mask[:, None], d_own[:, None] * z.astype(kind), 0)  # masked rows hold any number
  d_a, d_text = d_a + positive(text), d_text + positive(a)
  d_scale += jnp.where(mask, d_own * rows.own, 0).sum()
  factor = d_loss / (2 * jnp.maximum(_total(tiling, mask.sum(dtype=kind)), 1))
  return ((d_a * (factor * scale)).astype(a.dtype), (d_text * (factor * scale)).astype(text.dtype),
          _total(tiling, d_scale) * factor)


_SPLIT = (True, True, False, True, False)  # a, text, scale, mask, threshold


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _softmax(tiling, a, text, scale, mask, threshold):
  return _softmax_forward(tiling, a, text, scale, mask, threshold)[0]


def _softmax_forward(tiling, a, text, scale, mask, threshold):
  statistics = tiles.on_mesh(tiling, functools.partial(_softmax_statistics, tiling), split=_SPLIT,
                             out_split=(False, False, True, True))
  loss, filtered, row_excess, column_excess = statistics(a, text, scale, mask, threshold)
  return (loss, filtered), (a, text, scale, mask, threshold, row_excess, column_excess)


def _softmax_backward(tiling, residuals, cotangents):
  gradients = tiles.on_mesh(tiling, functools.partial(_softmax_gradients, tiling),
                            split=(*_SPLIT, True, True, False), out_split=(True, True, False))
  d_a, d_text, d_scale = gradients(*residuals, cotangents[0])
  return d_a, d_text, d_scale.astype(residuals[2].dtype), None, None


_softmax.defvjp(_softmax_forward, _softmax_backward)


def _sigmoid_sweep(tiling, differentiate, a, text, scale, mask, threshold, bias):
  """On this device's share: (loss, share filtered), and with `differentiate` its gradients by a, text, scale, bias.

  A pair's gradient needs that pair alone: one sweep gives both.
  """
  rows, columns = _sides(tiling, a, text, mask, threshold is not None)
  kind = _accumulator(a)

  def tile(row, column, d_row, d_column, scalars):
    cosine, kept, diagonal, filtered = _pairs(tiling, row, column, threshold)
    logits = cosine * scale + bias
    signed = jnp.where(diagonal, -logits, logits)
    loss, count, *d_scalars = scalars
    loss += jnp.where(kept, jax.nn.softplus(signed), 0).sum()
    if not differentiate:
      return d_row, d_column, (loss, count + filtered)
    d_logits = jnp.where(kept, jnp.where(diagonal, -1, 1) * jax.nn.sigmoid(signed), 0)
    g = tiling.operand(d_logits)
    d_scale, d_bias = d_scalars
    return (d_row + tiling.dot(g, column.z, (1, 0)), d_column + tiling.dot(g, row.z, (0, 0)),
            (loss, count + filtered, d_scale + (d_logits * cosine).sum(), d_bias + d_logits.sum()))

  start = lambda n: jnp.zeros((n, a.shape[1] if differentiate else 0), kind)
  d_a, d_text, scalars = tiles.sweep(
      tiling, tile, rows, columns, row_sums=start, column_sums=start,
      scalars=(jnp.zeros((), kind),) * (4 if differentiate else 2), combine=_scatter)
  loss, count, *d_scalars = (_total(tiling, x) for x in scalars)
  valid = _total(tiling, mask.sum(dtype=kind))
  factor = 1 / jnp.maximum(valid, 1)
  value = (loss * factor, _share(count, valid))
  if not differentiate:
    return value
  d_scale, d_bias = (d * factor for d in d_scalars)
  return value, ((d_a * (factor * scale)).astype(a.dtype), (d_text * (factor * scale)).astype(text.dtype), d_scale,
                 d_bias)


def _sigmoid_on_mesh(tiling, differentiate):
  value = (False, False)
  return tiles.on_mesh(tiling, functools.partial(_sigmoid_sweep, tiling, differentiate), split=(*_SPLIT, False),
                       out_split=(value, (True, True, False, False)) if differentiate else value)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sigmoid(tiling, a, text, scale, mask, threshold, bias):
  return _sigmoid_on_mesh(tiling, False)(a, text, scale, mask, threshold, bias)


def _sigmoid_forward(tiling, a, text, scale, mask, threshold, bias):
  value, (d_a, d_text, d_scale, d_bias) = _sigmoid_on_mesh(tiling, True)(a, text, scale, mask, threshold, bias)
  return value, (d_a, d_text, d_scale.astype(scale.dtype), d_bias.astype(bias.dtype))


def _sigmoid_backward(tiling, gradients, cotangents):
  del tiling
  d_a, d_text, d_scale, d_bias = (g * cotangents[0].astype(g.dtype) for g in gradients)
  return d_a, d_text, d_scale, None, None, d_bias


_sigmoid.defvjp(_sigmoid_forward, _sigmoid_backward)


def _arguments(z_a_ne, logit_scale, mask_n, filter_threshold):
  kind = _accumulator(z_a_ne)
  mask_n = jnp.ones(z_a_ne.shape[:1], bool) if mask_n is None else mask_n
  threshold = None if filter_threshold is None else jnp.asarray(filter_threshold, kind)
  return jnp.asarray(logit_scale, kind), mask_n, threshold


def softmax_contrast(z_a_ne, z_text_ne, *, logit_scale, logit_bias=None, mask_n=None,
                     filter_threshold: float | None = None, tiling: tiles.Tiling = tiles.Tiling()) -> Contrast:
  """`softmax_dense` in memory that grows with N: value and gradients are the same up to rounding.

  Two sweeps of tiles, one for the denominators of rows and columns, one for the gradients: 4·E and 8·E FLOPs a pair with
  the filter, 2·E and 6·E without. Differentiable once, by z_a_ne, z_text_ne and logit_scale.
  tiling: where the pairs are computed and how; with a mesh, N must divide by its devices.
  """
  del logit_bias
  scale, mask, threshold = _arguments(z_a_ne, logit_scale, mask_n, filter_threshold)
  return Contrast(*_softmax(tiling, z_a_ne, z_text_ne, scale, mask, threshold))


def sigmoid_contrast(z_a_ne, z_text_ne, *, logit_scale, logit_bias, mask_n=None,
                     filter_threshold: float | None = None, tiling: tiles.Tiling = tiles.Tiling()) -> Contrast:
  """`sigmoid_dense` in memory that grows with N, in one sweep of 6·E FLOPs a pair (8·E with the filter)."""
  scale, mask, threshold = _arguments(z_a_ne, logit_scale, mask_n, filter_threshold)
  return Contrast(*_sigmoid(tiling, z_a_ne, z_text_ne, scale, mask, threshold, jnp.asarray(logit_bias, scale.dtype)))


CONTRASTS = {'softmax': softmax_contrast, 'sigmoid': sigmoid_contrast}
DENSE = {'softmax': softmax_dense, 'sigmoid': sigmoid_dense}
