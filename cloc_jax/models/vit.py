"""Image towers: OpenAI-CLIP's ViT (class token) and SigLIP's (MAP head)."""
import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cloc_jax.models import layers, posemb

# width, depth, MLP width, heads: big_vision's names; B/L/H are the paper's.
SIZES = {
    'mu': (32, 1, 128, 2),
    'Ti': (192, 12, 768, 3),
    'S': (384, 12, 1536, 6),
    'B': (768, 12, 3072, 12),
    'L': (1024, 24, 4096, 16),
    'H': (1280, 32, 5120, 16),
}
POOLS = ('tok', 'map', 'gap')
POSEMBS = ('learn', 'sincos2d')


@dataclasses.dataclass(frozen=True)
class Variant:
  width: int
  depth: int
  mlp_dim: int
  heads: int
  patch: int


def decode_variant(name: str) -> Variant:
  """'B/16' → its sizes.

  Raises:
    ValueError: when the name is not SIZE/PATCH with a known size.
  """
  size, slash, patch = name.partition('/')
  if size not in SIZES or not slash or not patch.isdigit():
    raise ValueError(f'image variant: expected SIZE/PATCH with SIZE one of {list(SIZES)}, e.g. "B/16"; got {name!r}')
  return Variant(*SIZES[size], patch=int(patch))


class MAPHead(nn.Module):
  """Multi-head attention pooling (SigLIP): one learned probe attends to all tokens."""
  heads: int
  mlp_dim: int
  act: str
  ln_eps: float
  dtype: Any

  @nn.compact
  def __call__(self, x_bnd):
    b, _, d = x_bnd.shape
    probe = self.param('probe', nn.initializers.xavier_uniform(), (1, 1, d))
    probe = jnp.broadcast_to(probe.astype(self.dtype), (b, 1, d))
    x = layers.MultiHeadDotProductAttention(self.heads, dtype=self.dtype,
                                            name='MultiHeadDotProductAttention_0')(probe, x_bnd)
    y = nn.LayerNorm(epsilon=self.ln_eps, dtype=self.dtype, name='LayerNorm_0')(x)
    x = x + layers.MlpBlock(self.mlp_dim, act=self.act, dtype=self.dtype, name='MlpBlock_0')(y)
    return x[:, 0]


class ViT(nn.Module):
  """(B, H, W, 3) normalised pixels → (pooled (B, E or D), patch tokens (B, N, D)).

  The tokens are taken after the final layer norm, without the class token: they are what the Prompter reads.

  pool: 'tok' is OpenAI-CLIP's form (class token, a norm before the blocks, no bias in patch embedding and projection);
    'map' is SigLIP's (MAP head, no class token); 'gap' averages the tokens.
  posemb: 'learn' is the paper's table; 'sincos2d' has no parameters and shares the box prompt's frequencies.
  out_dim: joint width E; 0 leaves the pooled vector as it is (SigLIP has no projection).
  """
  variant: str = 'B/16'
  width: int | None = None
  depth: int | None = None
  mlp_dim: int | None = None
  heads: int | None = None
  pool: str = 'tok'
  posemb: str = 'learn'
  out_dim: int = 512
  act: str = 'gelu_tanh'
  attention: str = 'einsum'
  ln_eps: float = layers.LN_EPS
  remat: str = 'none'
  unroll: int = 1
  dtype: Any = jnp.float32

  def sizes(self) -> Variant:
    """The variant with this tower's overrides applied."""
    v = decode_variant(self.variant)
    width = self.width or v.width
    default_mlp = v.mlp_dim if width == v.width else 4 * width
    return Variant(width=width, depth=self.depth or v.depth, mlp_dim=self.mlp_dim or default_mlp,
                   heads=self.heads or v.heads, patch=v.patch)

  @nn.compact
  def __call__(self, image):
    if self.pool not in POOLS:
      raise ValueError(f'pool: expected one of {POOLS}, got {self.pool!r}')
    if self.posemb not in POSEMBS:
      raise ValueError(f'posemb: expected one of {POSEMBS}, got {self.posemb!r}')
    v = self.sizes()
    b, h, w, _ = image.shape
    if h != w or h % v.patch:
      raise ValueError(f'image: expected a square whose side is a multiple of the patch ({v.patch}), got {h}×{w}')
    grid = h // v.patch
    clip_form = self.pool == 'tok'
    x = PatchEmbedding(v.width, v.patch, use_bias=not clip_form, dtype=self.dtype, name='embedding')(image)

    if self.posemb == 'sincos2d':
      x = x + posemb.patch_codes(dim=v.width, grid=grid).astype(self.dtype)
    if clip_form:
      cls = self.param('cls', nn.initializers.normal(v.width**-0.5), (1, 1, v.width))
      x = jnp.concatenate([jnp.broadcast_to(cls.astype(self.dtype), (b, 1, v.width)), x], 1)
    if self.posemb == 'learn':
      table = self.param('pos_embedding', nn.initializers.normal(v.width**-0.5), (1, x.shape[1], v.width))
      x = x + table.astype(self.dtype)
    if clip_form:
      x = nn.LayerNorm(epsilon=self.ln_eps, dtype=self.dtype, name='pre_norm')(x)

    x = layers.Encoder(v.depth, v.heads, v.mlp_dim, act=self.act, attention=self.attention, ln_eps=self.ln_eps,
                       remat=self.remat, unroll=self.unroll, dtype=self.dtype, name='Transformer')(x)
    tokens = x[:, 1:] if clip_form else x
    if self.pool == 'tok':
      pooled = x[:, 0]
    elif self.pool == 'map':
      pooled = MAPHead(v.heads, v.mlp_dim, self.act, self.ln_eps, self.dtype, name='MAPHead_0')(x)
    else:
      pooled = x.mean(1)
    if self.out_dim:
      pooled = nn.Dense(self.out_dim, use_bias=not clip_form, dtype=self.dtype,
                        kernel_init=nn.initializers.normal(v.width**-0.5), name='head')(pooled)
    return pooled, tokens


def embed_patches(tower: ViT, params, tokens_bnd):
  """Patch tokens through the tower's own head, each as if it alone were pooled: (B, N, D) → (B, N, E or D).

  For 'tok' and 'gap' that is the projection. A MAP head attends to the one token with weight 1.

  params: the tower's own.
  """
  b, n, d = tokens_bnd.shape
  x = tokens_bnd
  if tower.pool == 'map':
    v = tower.sizes()
    head = MAPHead(v.heads, v.mlp_dim, tower.act, tower.ln_eps, tower.dtype, parent=None)
    x = head.apply({'params': params['MAPHead_0']}, x.reshape(b * n, 1, d)).reshape(b, n, -1)
  if tower.out_dim:
    x = x @ params['head']['kernel'].astype(x.dtype)
    if 'bias' in params['head']:
      x = x + params['head']['bias'].astype(x.dtype).reshape(1, 1, -1)
  return x


def hidden_states(tower: ViT, params, image):
  """The residual stream before the first block and behind each: (depth + 1, B, N [+ 1], D), without the final norm.

  What multimodal LLMs read, LLaVA all but the last. The class token, where there is one, comes first.

  params: the tower's own, with pos_embedding also where positions are computed (interop.exported). image: normalised.
  """
  v, clip_form = tower.sizes(), tower.pool == 'tok'
  x = PatchEmbedding(v.width, v.patch, use_bias=not clip_form, dtype=tower.dtype, parent=None).apply(
      {'params': params['embedding']}, image)
  if clip_form:
    x = jnp.concatenate([jnp.broadcast_to(params['cls'], (len(x), 1, v.width)).astype(x.dtype), x], 1)
  x = x + params['pos_embedding'].astype(x.dtype)
  if clip_form:
    x = nn.LayerNorm(epsilon=tower.ln_eps, dtype=tower.dtype, parent=None).apply({'params': params['pre_norm']}, x)
  block = layers.EncoderBlock(v.heads, v.mlp_dim, act=tower.act, attention=tower.attention, ln_eps=tower.ln_eps,
                              dtype=tower.dtype, parent=None)

  def step(x, block_params):
    x, _ = block.apply({'params': block_params}, x)
    return x, x
  return jnp.concatenate([x[None], jax.lax.scan(step, x, params['Transformer']['encoderblock'])[1]])


class PatchEmbedding(nn.Module):
  """Non-overlapping patches to tokens as one matrix product; the kernel keeps the convolution's (p, p, 3, D) shape."""
  width: int
  patch: int
  use_bias: bool
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, image):
    b, h, _, c = image.shape
    p, g = self.patch, h // self.patch
    init = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform', in_axis=(0, 1, 2), out_axis=3)
    kernel = self.param('kernel', init, (p, p, c, self.width))
    x = image.astype(self.dtype).reshape(b, g, p, g, p, c).transpose(0, 1, 3, 2, 4, 5).reshape(b, g * g, p * p * c)
    x = layers.split_batch(x @ kernel.astype(self.dtype).reshape(p * p * c, self.width))
    if self.use_bias:
      x = x + self.param('bias', nn.initializers.zeros, (self.width,)).astype(self.dtype)[None, None]
    return x
