"""Contrastive losses between two sets of N paired embeddings, over the global batch (SPEC §3).

Inputs may be sharded over their first axis: under jit the similarity matrix is then computed row-sharded and every
denominator is global. This is the dense form; forms in bounded memory share these signatures.
"""
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

_MASKED = -1e30  # finite, so that a row without any valid entry has a defined (and unused) log-sum-exp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Contrast:
  """loss: scalar. filtered: share of the valid off-diagonal pairs that the text filter left out, scalar."""
  loss: Any
  filtered: Any


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


def softmax_contrast(z_a_ne, z_text_ne, *, logit_scale, logit_bias=None, mask_n=None,
                     filter_threshold: float | None = None) -> Contrast:
  """Symmetric InfoNCE, (L_a→text + L_text→a) / 2, averaged over the valid entries.

  Args:
    z_a_ne, z_text_ne: (N, E) L2-normalised; row k of one belongs to row k of the other.
    logit_scale: scalar, the inverse temperature. logit_bias: ignored, a softmax does not see it.
    mask_n: (N,) bool; invalid rows and columns leave the numerators and both denominators.
    filter_threshold: pairs k ≠ k' whose texts have a cosine above it leave both denominators; no gradient passes
      through this test.
  """
  del logit_bias
  n = z_a_ne.shape[0]
  mask_n = jnp.ones((n,), bool) if mask_n is None else mask_n
  kept_nn, filtered = _pair_masks(z_text_ne, mask_n, filter_threshold)
  logits_nn = jnp.einsum('ne,me->nm', z_a_ne, z_text_ne, preferred_element_type=jnp.float32) * logit_scale
  logits_nn = jnp.where(kept_nn, logits_nn, _MASKED)
  positive_n = jnp.einsum('ne,ne->n', z_a_ne, z_text_ne, preferred_element_type=jnp.float32) * logit_scale
  both_n = jax.nn.logsumexp(logits_nn, 1) + jax.nn.logsumexp(logits_nn, 0) - 2 * positive_n
  loss = jnp.where(mask_n, both_n, 0).sum() / (2 * jnp.maximum(mask_n.sum(), 1))
  return Contrast(loss, filtered)


def sigmoid_contrast(z_a_ne, z_text_ne, *, logit_scale, logit_bias, mask_n=None,
                     filter_threshold: float | None = None) -> Contrast:
  """SigLIP's pairwise loss (Zhai et al. 2023, eq. 1): −1/N Σ_ij log σ(±(scale · cos_ij + bias)).

  Arguments as in `softmax_contrast`; filtered and invalid pairs leave the sum.
  """
  n = z_a_ne.shape[0]
  mask_n = jnp.ones((n,), bool) if mask_n is None else mask_n
  kept_nn, filtered = _pair_masks(z_text_ne, mask_n, filter_threshold)
  cos_nn = jnp.einsum('ne,me->nm', z_a_ne, z_text_ne, preferred_element_type=jnp.float32)
  sign_nn = 2 * jnp.eye(n, dtype=jnp.float32) - 1
  pair_nn = -jax.nn.log_sigmoid(sign_nn * (cos_nn * logit_scale + logit_bias))
  loss = jnp.where(kept_nn, pair_nn, 0).sum() / jnp.maximum(mask_n.sum(), 1)
  return Contrast(loss, filtered)


CONTRASTS = {'softmax': softmax_contrast, 'sigmoid': sigmoid_contrast}
