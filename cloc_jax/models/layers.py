"""Transformer parts shared by the towers and the Prompter. Parameter names and shapes are big_vision's."""
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

ACTIVATIONS = {
    # tanh-GELU costs less than half of erf-GELU on CPUs and is what SigLIP uses; OpenAI's CLIP uses quick_gelu.
    'gelu_tanh': lambda x: nn.gelu(x, approximate=True),
    'gelu': lambda x: nn.gelu(x, approximate=False),
    'quick_gelu': lambda x: x * nn.sigmoid(1.702 * x),
}
ATTENTIONS = ('einsum', 'dot_product_attention')
REMAT_POLICIES = {
    'none': None,
    'full': 'nothing_saveable',
    # Keep the outputs of the matrix products, recompute norms, softmax and GELU.
    'dots': 'dots_with_no_batch_dims_saveable',
}
LN_EPS = 1e-5  # OpenAI CLIP's; SigLIP's own is 1e-6


def activation(name: str):
  if name not in ACTIVATIONS:
    raise ValueError(f'act: expected one of {sorted(ACTIVATIONS)}, got {name!r}')
  return ACTIVATIONS[name]


def split_batch(x):
  """Says that the leading axis is split over all devices of the mesh that is being compiled for (train_step sets it).

  Left to itself, the compiler may find it cheaper to collect a batch than the split parameters it meets (FSDP), which
  at pod scale means a thousand times the memory. Nothing without a mesh, or where the devices do not divide the axis.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1 or x.shape[0] % mesh.size or mesh.manual_axes:
    return x
  return jax.lax.with_sharding_constraint(x, PartitionSpec(mesh.axis_names))


def map_images(function, arrays, shared=(), *, block: int = 1):
  """`function(arrays of one image, shared)` for each image, `block` of them at a time; recomputed for gradients.

  What a long elementwise computation touches then stays in a CPU's cache or on a TPU's chip from one operation to the
  next. Each device loops over its own images of the mesh that is being compiled for (see split_batch).
  arrays: a tree with the images leading. shared: a tree without.
  """
  def each(arrays, shared):
    return jax.lax.map(jax.checkpoint(lambda one: function(one, shared)), arrays, batch_size=block)

  mesh, count = jax.sharding.get_abstract_mesh(), jax.tree.leaves(arrays)[0].shape[0]
  if mesh.empty or mesh.size == 1 or count % mesh.size or mesh.manual_axes:
    return each(arrays, shared)
  split = PartitionSpec(mesh.axis_names)
  return jax.shard_map(each, mesh=mesh, in_specs=(split, PartitionSpec()), out_specs=split)(arrays, shared)


class HeadProjection(nn.Module):
  """The parameters of a dense layer into heads, shaped as flax's own attention: kernel (D, heads, head_dim), bias."""
  heads: int

  @nn.compact
  def __call__(self, width: int):
    if width % self.heads:
      raise ValueError(f'attention: {self.heads} heads do not divide a width of {width}')
    shape = (self.heads, width // self.heads)
    kernel = self.param('kernel', nn.initializers.normal(width**-0.5), (width, *shape))
    return kernel, self.param('bias', nn.initializers.zeros, shape)


def project_heads(x_bnd, projections, *, dtype):
  """Several HeadProjections of the same tokens as one matrix product, (B, N, D) → (B, heads, N, head_dim) of each.

  One wide product reads the tokens once, forward and backward, where three read them three times.
  Heads come before the sequence because batched products over contiguous (N, head_dim) matrices are about twice as
  fast on CPUs as the sequence-major layout, and no slower elsewhere.
  """
  kernel = jnp.stack([kernel.astype(dtype) for kernel, _ in projections], 1)
  bias = jnp.stack([bias.astype(dtype) for _, bias in projections])
  x_sbhnk = jnp.einsum('bnd,dshk->sbhnk', x_bnd.astype(dtype), kernel) + bias[:, None, :, None, :]
  return tuple(x_sbhnk)


class OutProjection(nn.Module):
  """The inverse of HeadProjection: (B, heads, N, head_dim) → (B, N, D)."""
  init_scale: float = 1.0
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x_bhnk):
    _, h, _, k = x_bhnk.shape
    kernel = self.param('kernel', nn.initializers.normal(self.init_scale * (h * k)**-0.5), (h, k, h * k))
    bias = self.param('bias', nn.initializers.zeros, (h * k,))
    return jnp.einsum('bhnk,hkd->bnd', x_bhnk.astype(self.dtype), kernel.astype(self.dtype)) + bias.astype(self.dtype)[None, None]


def attend(q_bhnk, k_bhmk, v_bhmk, *, causal: bool = False, implementation: str = 'einsum'):
  """Softmax attention over head-major arrays; softmax in float32. Returns (B, heads, N, head_dim)."""
  if implementation == 'dot_product_attention':
    q, k, v = (x.swapaxes(1, 2) for x in (q_bhnk, k_bhmk, v_bhmk))
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal).swapaxes(1, 2)
  if implementation != 'einsum':
    raise ValueError(f'attention: expected one of {ATTENTIONS}, got {implementation!r}')
  logits_bhnm = jnp.einsum('bhnk,bhmk->bhnm', q_bhnk, k_bhmk, preferred_element_type=jnp.float32)
  logits_bhnm *= 1 / math.sqrt(q_bhnk.shape[-1])
  if causal:
    n, m = logits_bhnm.shape[-2:]
    allowed = jnp.tril(jnp.ones((n, m), bool))[None, None]
    logits_bhnm = jnp.where(allowed, logits_bhnm, -1e30)
  weights = jax.nn.softmax(logits_bhnm, -1).astype(v_bhmk.dtype)
  return jnp.einsum('bhnm,bhmk->bhnk', weights, v_bhmk)


class MultiHeadDotProductAttention(nn.Module):
  """Multi-head attention of (B, N, D) queries over (B, N', D) keys and values; over themselves without x_kv."""
  heads: int
  causal: bool = False
  attention: str = 'einsum'
  out_scale: float = 1.0
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x_q, x_kv=None):
    query, key, value = (HeadProjection(self.heads, name=n)(x_q.shape[-1]) for n in ('query', 'key', 'value'))
    if x_kv is None:
      q, k, v = project_heads(x_q, (query, key, value), dtype=self.dtype)
    else:
      q, = project_heads(x_q, (query,), dtype=self.dtype)
      k, v = project_heads(x_kv, (key, value), dtype=self.dtype)
    y = attend(q, k, v, causal=self.causal, implementation=self.attention)
    return OutProjection(self.out_scale, dtype=self.dtype, name='out')(y)


class MlpBlock(nn.Module):
  """Dense, activation, dense; width kept."""
  mlp_dim: int
  act: str = 'gelu_tanh'
  out_scale: float = 1.0
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    d = x.shape[-1]
    dense = lambda width, std, name: nn.Dense(width, dtype=self.dtype, kernel_init=nn.initializers.normal(std),
                                              name=name)
    x = dense(self.mlp_dim, (2 * d)**-0.5, 'Dense_0')(x)
    return dense(d, self.out_scale * d**-0.5, 'Dense_1')(activation(self.act)(x))


class EncoderBlock(nn.Module):
  """Pre-norm transformer block. Returns (x, None): the form nn.scan wants.

  out_scale: of the initial kernels that write to the residual stream.
  """
  heads: int
  mlp_dim: int
  causal: bool = False
  act: str = 'gelu_tanh'
  attention: str = 'einsum'
  ln_eps: float = LN_EPS
  out_scale: float = 1.0
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, _=None):
    ln = lambda name: nn.LayerNorm(epsilon=self.ln_eps, dtype=self.dtype, name=name)
    x = split_batch(x)
    y = ln('LayerNorm_0')(x)
    x = x + MultiHeadDotProductAttention(
        self.heads, causal=self.causal, attention=self.attention, out_scale=self.out_scale, dtype=self.dtype,
        name='MultiHeadDotProductAttention_0')(y)
    y = ln('LayerNorm_1')(x)
    y = MlpBlock(self.mlp_dim, act=self.act, out_scale=self.out_scale, dtype=self.dtype, name='MlpBlock_0')(y)
    return split_batch(x + y), None


class Encoder(nn.Module):
  """A stack of blocks under nn.scan, and the final norm. Block parameters are stacked on a leading axis of `depth`."""
  depth: int
  heads: int
  mlp_dim: int
  causal: bool = False
  act: str = 'gelu_tanh'
  attention: str = 'einsum'
  ln_eps: float = LN_EPS
  remat: str = 'none'
  unroll: int = 1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    if self.remat not in REMAT_POLICIES:
      raise ValueError(f'remat: expected one of {sorted(REMAT_POLICIES)}, got {self.remat!r}')
    block = EncoderBlock
    if self.remat != 'none':
      # Inside a scan the loop already keeps XLA from merging the recomputation with the first pass.
      block = nn.remat(block, prevent_cse=False,
                       policy=getattr(jax.checkpoint_policies, REMAT_POLICIES[self.remat]))
    scanned = nn.scan(block, variable_axes={'params': 0}, split_rngs={'params': True}, length=self.depth,
                      unroll=min(self.unroll, self.depth))
    # OpenAI CLIP's initialisation: what a block adds shrinks with depth, so that at the start every token still says
    # what and where its patch is.
    x, _ = scanned(heads=self.heads, mlp_dim=self.mlp_dim, causal=self.causal, act=self.act, attention=self.attention,
                   ln_eps=self.ln_eps, out_scale=(2 * self.depth)**-0.5, dtype=self.dtype,
                   name='encoderblock')(x, None)
    return nn.LayerNorm(epsilon=self.ln_eps, dtype=self.dtype, name='encoder_norm')(x)


def l2_normalize(x, *, eps: float = 1e-12):
  """x / ‖x‖ over the last axis, in float32, with a finite gradient at 0."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + eps)
