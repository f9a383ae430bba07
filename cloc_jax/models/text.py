"""Text tower: CLIP's (causal, pooled at the end token) and SigLIP's (bidirectional, pooled at the last position)."""
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from cloc_jax.models import layers

# width, depth, heads. B, L and H are the paper's; the smaller ones follow the image towers of the same name.
SIZES = {
    'mu': (32, 1, 2),
    'Ti': (192, 6, 3),
    'S': (384, 12, 6),
    'B': (512, 12, 8),
    'L': (768, 12, 12),
    'H': (1024, 24, 16),
}
POOLS = ('eos', 'last')


def decode_variant(name: str) -> tuple[int, int, int]:
  """'B' → (width, depth, heads).

  Raises:
    ValueError: on an unknown name.
  """
  if name not in SIZES:
    raise ValueError(f'text variant: expected one of {list(SIZES)}, got {name!r}')
  return SIZES[name]


class TextTower(nn.Module):
  """(B, L) int32 tokens → (B, E).

  Any length up to `max_length` runs: the position table is cut, so short region captions cost what they hold.

  pool: 'eos' runs causally and takes the first position that holds `eos_id` (padding behind it cannot be seen);
    'last' runs bidirectionally and takes the last position, padding and all, as SigLIP does.
  mlp_dim: 4 × the width by default.
  """
  vocab_size: int
  variant: str = 'B'
  width: int | None = None
  depth: int | None = None
  heads: int | None = None
  mlp_dim: int | None = None
  max_length: int = 77
  eos_id: int = 1
  pool: str = 'eos'
  out_dim: int = 512
  act: str = 'gelu_tanh'
  attention: str = 'einsum'
  ln_eps: float = layers.LN_EPS
  remat: str = 'none'
  unroll: int = 1
  dtype: Any = jnp.float32

  def sizes(self) -> tuple[int, int, int]:
    """(width, depth, heads) with this tower's overrides applied."""
    width, depth, heads = decode_variant(self.variant)
    return self.width or width, self.depth or depth, self.heads or heads

  @nn.compact
  def __call__(self, text_bl):
    if self.pool not in POOLS:
      raise ValueError(f'text pool: expected one of {POOLS}, got {self.pool!r}')
    width, depth, heads = self.sizes()
    length = text_bl.shape[1]
    if length > self.max_length:
      raise ValueError(f'text: {length} tokens, but this tower has {self.max_length} positions')
    x = nn.Embed(self.vocab_size, width, dtype=self.dtype, embedding_init=nn.initializers.normal(0.02),
                 name='Embed_0')(text_bl)
    x = layers.split_batch(x)
    table = self.param('pos_embedding', nn.initializers.normal(0.01), (1, self.max_length, width))
    x = x + table[:, :length].astype(self.dtype)
    causal = self.pool == 'eos'
    x = layers.Encoder(depth, heads, self.mlp_dim or 4 * width, causal=causal, act=self.act, attention=self.attention,
                       ln_eps=self.ln_eps, remat=self.remat, unroll=self.unroll, dtype=self.dtype, name='Encoder_0')(x)
    if self.pool == 'eos':
      x = jnp.take_along_axis(x, end_position(text_bl, eos_id=self.eos_id)[:, None, None], axis=1)[:, 0]
    else:
      x = x[:, -1]
    return nn.Dense(self.out_dim, use_bias=not causal, dtype=self.dtype,
                    kernel_init=nn.initializers.normal(width**-0.5), name='head')(x)


def end_position(text_bl, *, eos_id: int):
  """(B, L) → (B,): the first position that holds eos_id; the last one where there is none (cut captions)."""
  is_end = text_bl == eos_id
  return jnp.where(is_end.any(-1), is_end.argmax(-1), text_bl.shape[-1] - 1)
