"""The Prompter: one transformer layer that turns an image's tokens and a prompt into a region embedding (SPEC §2).

Run as written down, every prompt costs a full layer over all N image tokens. But the image tokens' norm, Q, K and V
are the same for every prompt, and a prompt adds only P ≤ 2 tokens. What one image's prompts share is computed once
(`image_state`); each prompt then joins exactly (`prompt_rows`, `image_rows`):

  pool='prompt' averages the outputs of the prompt's tokens. They attend to the shared K and V and to each other; the
    image tokens' own outputs are never needed.
    Per prompt 24·P·D² + 4·P·N·D FLOPs; shared 4·N·D².
  pool='all' is the paper's global average over all N + P outputs. A prompt changes image token n's attention from
    E_n·V / Z_n to (a·E_n·V + Σ_p e_np·v_p) / (a·Z_n + Σ_p e_np): merging two softmax partial sums, that is a rank-P
    update. The first MLP product is linear in it, and the second commutes with the mean because no norm stands
    between block and pool. Left per prompt and image token: elementwise work over 4·D.
    Adds 4·N·D² (Q, U·Wo) + 4·N²·D + 16·N·D² shared, and per prompt 2·N·P·D FLOPs + 4·N·D GELUs.
  The literal layer would cost 24·(N + P)·D² + 4·(N + P)²·D for each prompt; `literal_block` below is that definition,
  kept as the reference that tests and benchmarks compare with.
"""
import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cloc_jax.models import layers, posemb

POOLS = ('all', 'prompt')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ImageState:
  """What all prompts of an image share. `keys`, `values`: (B, N, D); `rows` only for pool='all'."""
  keys: Any
  values: Any
  rows: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ImageRows:
  """The image tokens' own half of the layer, before any prompt: partial softmax sums and their products.

  queries (B, N, D); row_max, row_sum (B, N): max and sum of exponentials over the image's own keys;
  base (B, N, D): the token plus the output bias; update (B, N, D): unnormalised attention output through Wo;
  base_mlp, update_mlp (B, N, 4D): both through the first MLP product (norm gain folded in).
  """
  queries: Any
  row_max: Any
  row_sum: Any
  base: Any
  update: Any
  base_mlp: Any
  update_mlp: Any


class _Kernel(nn.Module):
  """A dense layer's parameters by name, for code that needs the matrix itself."""
  shape: tuple[int, ...]
  bias_shape: tuple[int, ...]
  kernel_init: Any = nn.initializers.xavier_uniform()

  @nn.compact
  def __call__(self):
    kernel = self.param('kernel', self.kernel_init, self.shape)
    return kernel, self.param('bias', nn.initializers.zeros, self.bias_shape)


# How the Prompter starts (open in the paper). Left to random numbers, finding out *where* a prompt points takes several
# times longer than learning *what* is there, so the first attention is given: a prompt reads the patches it covers.
#   1. Queries and keys are multiples of the identity, so that attention compares position codes as they are.
#   2. A prompt's code is the sum of both corners' codes, its longer waves alone (and queries read no others): two waves
#      of a period over twice their distance add up to one that peaks half-way, at the box's centre. For a box larger than
#      that the sum peaks outside, so the longer a wave, the more it weighs.
#   3. A constant in the remaining channels outweighs the code, and queries read it with the opposite sign. A token
#      compared with itself would otherwise win every softmax: a prompt would read nothing but itself, and, with no
#      gradient left through its attention, go on so (seen in training: 99.98 % for phrases).
#   4. Box prompts are small: norms make attention blind to that, and on the residual path they do not drown what is
#      read. Phrases are larger, else the first optimizer steps would overwrite point 6.
#   5. Values pass as they are and come out negated, and the MLP starts small. An image token reads itself, so its output
#      is what it was minus what it read, about nothing: the global average then starts as the prompt tokens' outputs
#      too, instead of as a mean of the whole image in which two tokens of many hundreds are lost.
#   6. The text embedding starts as minus the transposed projection head. Once a region's embedding is like its phrase's,
#      a phrase's token is then like the image tokens that hold the thing, and attends to them.
_LONG_WAVES = 0.6       # share of the frequencies
_SHORTEST_LONG_WAVE = 0.2  # weight of the shortest of them in a box's code, of the longest: 1; about as their periods
_QUERY_GAIN = 6.0
_QUERY_CONSTANT = -0.5
_BOX_SCALE, _TEXT_SCALE = 0.01, 0.15
_CONSTANT_RATIO = 3.5   # of the constant to the code
_MLP_SCALE = 0.1

_GPU_BLOCK = 32


def _long_waves(width: int) -> np.ndarray:
  """(D,) bool: the channels of the longer periods in the code's four parts."""
  quarter = np.arange(width // 4) < round(_LONG_WAVES * (width // 4))
  return np.tile(quarter, 4)


def _query_init(key, shape, dtype=jnp.float32):
  del key
  return jnp.diag(jnp.where(_long_waves(shape[0]), _QUERY_GAIN, _QUERY_CONSTANT).astype(dtype)).reshape(shape)


def _identity_init(gain):
  def init(key, shape, dtype=jnp.float32):
    del key
    return gain * jnp.eye(math.isqrt(math.prod(shape)), dtype=dtype).reshape(shape)
  return init


def _constant_init(scale):
  """Random signs in the channels that hold no code; (…, D)."""
  def init(key, shape, dtype=jnp.float32):
    signs = jax.random.rademacher(key, shape, dtype)
    silent = jnp.asarray(~_long_waves(shape[-1]), dtype).reshape((1,) * (len(shape) - 1) + (-1,))
    return _CONSTANT_RATIO * scale * signs * silent
  return init


def _head_init(key, shape, dtype=jnp.float32):
  """(D, E). One fixed draw, whatever the seed: the text embedding has to start from the same numbers."""
  del key
  return jax.random.normal(jax.random.key(0), shape, dtype) * shape[0]**-0.5


def _text_embed_init(key, shape, dtype=jnp.float32):
  """(E, D)."""
  return -_TEXT_SCALE * math.sqrt(shape[1] / shape[0]) * _head_init(key, shape[::-1], dtype).T


def _corners_init(key, shape, dtype=jnp.float32):
  """(2, D, D): the same from the own and from the other corner."""
  del key
  long = _long_waves(shape[-1])
  count = long.sum() // 4
  weight = np.zeros(long.shape)
  weight[long] = np.tile(np.geomspace(1, _SHORTEST_LONG_WAVE, count), 4)
  weight /= math.sqrt(np.square(weight[long]).mean())
  kernel = _BOX_SCALE * jnp.diag(jnp.asarray(weight, dtype))
  return jnp.stack([kernel, kernel])


class _BoxEmbed(nn.Module):
  """One linear layer from the codes of both corners to two tokens: each sees its own corner and the other's."""
  width: int

  @nn.compact
  def __call__(self, codes_bmpd):
    kernel = self.param('kernel', _corners_init, (2, self.width, self.width))
    bias = self.param('bias', _constant_init(_BOX_SCALE), (2, self.width))
    both = jnp.stack([codes_bmpd, codes_bmpd[:, :, ::-1]], 3)  # the own corner's code, then the other's
    return jnp.einsum('bmpcd,cde->bmpe', both, kernel) + bias[None, None]


class _Norm(nn.Module):
  width: int

  @nn.compact
  def __call__(self):
    return self.param('scale', nn.initializers.ones, (self.width,)), self.param('bias', nn.initializers.zeros,
                                                                             (self.width,))


class _Attention(nn.Module):
  """One head: parameters shaped as MultiHeadDotProductAttention's with heads = 1."""
  width: int

  @nn.compact
  def __call__(self):
    d = self.width
    out = {}
    for name in ('query', 'key', 'value'):
      init = _query_init if name == 'query' else _identity_init(1.0)
      kernel, bias = _Kernel((d, 1, d), (1, d), kernel_init=init, name=name)()
      out[name] = (kernel.reshape(d, d), bias.reshape(d))
    kernel, bias = _Kernel((1, d, d), (d,), kernel_init=_identity_init(-1.0), name='out')()
    out['out'] = (kernel.reshape(d, d), bias)
    return out


class _Mlp(nn.Module):
  width: int
  mlp_dim: int

  @nn.compact
  def __call__(self):
    narrow, wide = self.width, self.mlp_dim
    out_init = nn.initializers.normal(_MLP_SCALE * narrow**-0.5)
    return (_Kernel((narrow, wide), (wide,), name='Dense_0')(),
            _Kernel((wide, narrow), (narrow,), kernel_init=out_init, name='Dense_1')())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockParams:
  """The layer's parameters as plain arrays: norms (D,), projections (D, D), MLP (D, 4D) and (4D, D)."""
  norm_0: Any
  attention: Any
  norm_1: Any
  mlp: Any


def _layer_norm(x, norm, eps):
  scale, bias = norm
  x = x.astype(jnp.float32)
  mean = x.mean(-1, keepdims=True)
  var = jnp.square(x - mean).mean(-1, keepdims=True)
  lead = (1,) * (x.ndim - 1)
  return (x - mean) * jax.lax.rsqrt(var + eps) * scale.reshape(*lead, -1) + bias.reshape(*lead, -1)


def _dense(x, params, dtype):
  kernel, bias = params
  y = jnp.matmul(x.astype(dtype), kernel.astype(dtype), preferred_element_type=jnp.float32)
  return y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


def _mlp(x, params: BlockParams, act, eps, dtype):
  hidden = layers.activation(act)(_dense(_layer_norm(x, params.norm_1, eps), params.mlp[0], dtype))
  return _dense(hidden, params.mlp[1], dtype)


def literal_block(params: BlockParams, tokens_bnd, prompts_bmpd, *, pool, act='gelu_tanh', eps=layers.LN_EPS,
                  dtype=jnp.float32):
  """The definition: each prompt's P tokens and all N image tokens through one pre-norm layer, then the mean.

  (B, N, D), (B, M, P, D) → (B, M, D) float32. M full layers of work: a reference for tests and benchmarks.
  """
  b, n, d = tokens_bnd.shape
  m, p = prompts_bmpd.shape[1:3]
  image = jnp.broadcast_to(tokens_bnd[:, None], (b, m, n, d))
  x = jnp.concatenate([prompts_bmpd.astype(jnp.float32), image.astype(jnp.float32)], 2).reshape(b * m, n + p, d)
  h = _layer_norm(x, params.norm_0, eps)
  q, k, v = (_dense(h, params.attention[name], dtype) for name in ('query', 'key', 'value'))
  weights = jax.nn.softmax(jnp.einsum('bqd,bkd->bqk', q, k) / math.sqrt(d), -1)
  x = x + _dense(jnp.einsum('bqk,bkd->bqd', weights, v), params.attention['out'], dtype)
  x = x + _mlp(x, params, act, eps, dtype)
  pooled = x.mean(1) if pool == 'all' else x[:, :p].mean(1)
  return pooled.reshape(b, m, d)


def image_state(params: BlockParams, tokens_bnd, *, pool, eps=layers.LN_EPS, dtype=jnp.float32) -> ImageState:
  """Computes once what every prompt of an image shares; see the module's docstring."""
  d = tokens_bnd.shape[-1]
  tokens_bnd = layers.split_batch(tokens_bnd)
  h = _layer_norm(tokens_bnd, params.norm_0, eps)
  keys, values = (layers.split_batch(_dense(h, params.attention[name], dtype)) for name in ('key', 'value'))
  if pool == 'prompt':
    return ImageState(keys, values)
  queries = _dense(h, params.attention['query'], dtype)
  logits = jnp.einsum('bqd,bkd->bqk', queries.astype(dtype), keys.astype(dtype),
                      preferred_element_type=jnp.float32) / math.sqrt(d)
  row_max = jax.lax.stop_gradient(logits.max(-1))  # cancels exactly in the merged softmax
  weights = jnp.exp(logits - row_max[..., None])
  attended = jnp.einsum('bqk,bkd->bqd', weights.astype(dtype), values.astype(dtype),
                        preferred_element_type=jnp.float32)
  out_kernel, out_bias = params.attention['out']
  base = tokens_bnd.astype(jnp.float32) + out_bias[None, None]
  update = _matmul(attended, out_kernel, dtype)
  gain_kernel = params.norm_1[0][:, None] * params.mlp[0][0]
  rows = ImageRows(queries=queries, row_max=row_max, row_sum=weights.sum(-1), base=base, update=update,
                   base_mlp=_matmul(base, gain_kernel, dtype), update_mlp=_matmul(update, gain_kernel, dtype))
  return ImageState(keys, values, rows)


def _matmul(x, kernel, dtype):
  return layers.split_batch(jnp.matmul(x.astype(dtype), kernel.astype(dtype), preferred_element_type=jnp.float32))


def shared_block(params: BlockParams, state: ImageState, prompts_bmpd, *, pool, act='gelu_tanh', eps=layers.LN_EPS,
                 chunk=4, block=0, dtype=jnp.float32):
  """Equal to `literal_block`, at the cost the module's docstring gives. (B, M, P, D) → (B, M, D) float32.

  For pool='all', block images and chunk prompts of each are computed at once, (block, chunk, N, 4D). One image keeps it
  all in a CPU's cache or on a TPU's chip: there a third of the memory traffic, as compiled. A GPU would spend its time
  starting kernels. block=0 is 1, and on GPUs 32 (a guess: not measured).
  """
  p, d = prompts_bmpd.shape[2:]
  prompts = layers.split_batch(prompts_bmpd.astype(jnp.float32))
  h = _layer_norm(prompts, params.norm_0, eps)
  q, k, v = (_dense(h, params.attention[name], dtype) for name in ('query', 'key', 'value'))
  prompt_out = _prompt_rows(params, state, prompts, q, k, v, act, eps, dtype)
  if pool == 'prompt':
    return prompt_out.mean(2)
  n = state.keys.shape[1]
  image_sum = _image_rows_sum(params, state.rows, k, v, act, eps, chunk, block, dtype)
  return (image_sum + prompt_out.sum(2)) / (n + p)


def _prompt_rows(params, state, prompts, q, k, v, act, eps, dtype):
  """The prompt tokens' own outputs, (B, M, P, D): they attend to the image's shared K, V and to one another."""
  n = state.keys.shape[1]
  to_image = jnp.einsum('bmpd,bnd->bmpn', q.astype(dtype), state.keys.astype(dtype), preferred_element_type=jnp.float32)
  to_prompt = jnp.einsum('bmpd,bmrd->bmpr', q, k)
  weights = jax.nn.softmax(jnp.concatenate([to_image, to_prompt], -1) / math.sqrt(q.shape[-1]), -1)
  attended = jnp.einsum('bmpn,bnd->bmpd', weights[..., :n].astype(dtype), state.values.astype(dtype),
                        preferred_element_type=jnp.float32)
  attended += jnp.einsum('bmpr,bmrd->bmpd', weights[..., n:], v)
  x = prompts + _dense(attended, params.attention['out'], dtype)
  return x + _mlp(x, params, act, eps, dtype)


def _image_rows_sum(params, rows, k, v, act, eps, chunk, block, dtype):
  """Sum over the image tokens of their outputs under each prompt, (B, M, D)."""
  b, m, p, d = k.shape
  n = rows.queries.shape[1]
  to_prompt = jnp.einsum('bnd,bmpd->bmnp', rows.queries.astype(dtype), k.astype(dtype),
                         preferred_element_type=jnp.float32) / math.sqrt(d)
  # Merge the two softmax partial sums around their common maximum.
  peak = jax.lax.stop_gradient(jnp.maximum(rows.row_max[:, None], to_prompt.max(-1)))
  exp_prompt = jnp.exp(to_prompt - peak[..., None])
  exp_image = jnp.exp(rows.row_max[:, None] - peak)
  total = exp_image * rows.row_sum[:, None] + exp_prompt.sum(-1)
  share_image = exp_image / total                                   # (B, M, N)
  share_prompt = exp_prompt / total[..., None]                      # (B, M, N, P)
  prompt_update = _matmul(v, params.attention['out'][0], dtype)     # (B, M, P, D)
  scale, bias = params.norm_1
  (kernel_0, bias_0), (kernel_1, bias_1) = params.mlp
  gain_kernel = scale[:, None] * kernel_0
  prompt_mlp = _matmul(prompt_update, gain_kernel, dtype)           # (B, M, P, 4D)
  kernel_sum = gain_kernel.sum(0)                                   # (4D,)
  offset = _matmul(bias[None], kernel_0, dtype)[0] + bias_0         # (4D,)

  def rank_update(base_nf, update_nf, c_image_mn, c_prompt_mnp, w_mpf):
    # P is 1 or 2: spelled out, XLA fuses the update with what follows instead of calling a thin matrix product.
    x = base_nf[None] + c_image_mn[..., None] * update_nf[None]
    for i in range(p):
      x += c_prompt_mnp[..., i, None] * w_mpf[:, None, i]
    return x

  def some_prompts(prompts, rows, shared):
    (c_image, c_prompt, w, w_mlp), (kernel_sum, offset) = prompts, shared
    x = rank_update(rows.base, rows.update, c_image, c_prompt, w)
    mean = x.mean(-1, keepdims=True)
    inv = jax.lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + eps)
    hidden = rank_update(rows.base_mlp, rows.update_mlp, c_image, c_prompt, w_mlp)
    hidden = layers.activation(act)((hidden - mean * kernel_sum[None, None]) * inv + offset[None, None])
    return x.sum(1), hidden.sum(1)

  def one_image(args, shared):
    rows, *prompts = args
    if m <= chunk:
      return some_prompts(prompts, rows, shared)

    @jax.checkpoint
    def one_prompt(prompt):
      return jax.tree.map(lambda y: y[0], some_prompts([x[None] for x in prompt], rows, shared))
    return jax.lax.map(one_prompt, prompts, batch_size=chunk)

  block = block or (_GPU_BLOCK if jax.default_backend() == 'gpu' else 1)
  x_sum, hidden_sum = layers.map_images(one_image, (rows, share_image, share_prompt, prompt_update, prompt_mlp),
                                        (kernel_sum, offset), block=block)
  return x_sum + _matmul(hidden_sum, kernel_1, dtype) + n * bias_1[None, None]


class Prompter(nn.Module):
  """Image tokens and prompts → region embeddings, before normalisation.

  width: D, the ViT's. out_dim: E, the joint width. grid: patches along a side of the image at this resolution.
  pool: 'all' is the paper's global average pool; 'prompt' averages the prompt's own tokens (cheaper; see above).
  chunk, block: prompts and images at a time; see shared_block.
  """
  width: int
  out_dim: int
  mlp_ratio: int = 4
  pool: str = 'all'
  act: str = 'gelu_tanh'
  ln_eps: float = layers.LN_EPS
  chunk: int = 4
  block: int = 0
  dtype: Any = jnp.float32

  def setup(self):
    if self.pool not in POOLS:
      raise ValueError(f'prompter pool: expected one of {POOLS}, got {self.pool!r}')
    if self.width % 4:
      raise ValueError(f'prompter: codes of box corners need a width that is a multiple of 4, the image tower has '
                       f'{self.width}')
    self.box_embed = _BoxEmbed(self.width, name='box_embed')
    self.text_embed = nn.Dense(self.width, dtype=jnp.float32, kernel_init=_text_embed_init,
                               bias_init=_constant_init(_TEXT_SCALE), name='text_embed')
    self.norm_0 = _Norm(self.width, name='LayerNorm_0')
    self.attention = _Attention(self.width, name='MultiHeadDotProductAttention_0')
    self.norm_1 = _Norm(self.width, name='LayerNorm_1')
    self.mlp = _Mlp(self.width, self.mlp_ratio * self.width, name='MlpBlock_0')
    self.head = nn.Dense(self.out_dim, dtype=jnp.float32, kernel_init=_head_init, use_bias=False, name='head')

  def block_params(self) -> BlockParams:
    return BlockParams(self.norm_0(), self.attention(), self.norm_1(), self.mlp())

  def image_state(self, tokens_bnd) -> ImageState:
    """(B, N, D) → what the prompts of these images share; compute it once, prompt it often."""
    return image_state(self.block_params(), tokens_bnd, pool=self.pool, eps=self.ln_eps, dtype=self.dtype)

  def box_tokens(self, boxes_bm4, *, grid: int):
    """(B, M, 4) xyxy on the canvas → (B, M, 2, D): one token for each of the two corners."""
    corners = boxes_bm4.astype(jnp.float32).reshape(*boxes_bm4.shape[:2], 2, 2)
    return self.box_embed(posemb.sincos2d(corners, dim=self.width, grid=grid))

  def text_tokens(self, z_text_bme):
    """(B, M, E) normalised text embeddings → (B, M, 1, D)."""
    # A unit vector's components shrink with E; bring them to unit variance, like every other token.
    scaled = z_text_bme.astype(jnp.float32) * math.sqrt(z_text_bme.shape[-1])
    return self.text_embed(scaled)[:, :, None]

  def __call__(self, state: ImageState, prompts_bmpd):
    """Prompt tokens → (B, M, E) float32."""
    pooled = shared_block(self.block_params(), state, prompts_bmpd, pool=self.pool, act=self.act, eps=self.ln_eps,
                          chunk=self.chunk, block=self.block, dtype=self.dtype)
    return self.head(pooled)
