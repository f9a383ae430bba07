"""big_vision's two towers (SigLIP, SigLIP 2), the tree that ours follows: here, only layout differs.

Their npz files hold 'params/img/…', 'params/txt/…', 'params/t' and 'params/b', blocks stacked or one by one.
"""
import math
import re
from collections.abc import Mapping

import numpy as np

from cloc_jax import trees
from cloc_jax.interop import spec as spec_lib
from cloc_jax.interop.name_map import PARTS, Converted

_LN_EPS = 1e-6  # flax's default


def spec(state: Mapping[str, np.ndarray], *, where: str = 'npz') -> spec_lib.Spec:
  """The architecture from the weights' shapes, heads included.

  Raises:
    ValueError: when these are not two towers, the image tower without class token and the text tower with a head.
  """
  flat = _flat(state)
  for name in ('img/embedding/kernel', 'img/pos_embedding', 'txt/Embed_0/embedding', 'txt/pos_embedding',
               'txt/head/kernel', *(f'{stack}/encoderblock/MultiHeadDotProductAttention_0/query/kernel'
                                    for stack in ('img/Transformer', 'txt/Encoder_0'))):
    if name not in flat:
      raise ValueError(f'{where}: no params/{name}: not the two towers of big_vision; it holds {sorted(state)[:4]} …')
  if 'img/cls' in flat:
    raise ValueError(f"{where}: params/img/cls: the image tower has a class token; SigLIP's with MAP head is read here")
  shape = {name: np.shape(x) for name, x in flat.items()}
  kernel = shape['img/embedding/kernel']
  # NaFlex embeds flattened patches, and its table (grid, grid, D) is no list.
  patch = math.isqrt(kernel[0] // 3) if len(kernel) == 2 else kernel[0]
  grid = math.isqrt(math.prod(shape['img/pos_embedding'][:-1]))

  def sizes(stack):
    block = f'{stack}/encoderblock'
    depth, width, heads, _ = shape[f'{block}/MultiHeadDotProductAttention_0/query/kernel']
    return dict(width=width, depth=depth, heads=heads, mlp_dim=shape[f'{block}/MlpBlock_0/Dense_0/kernel'][-1],
                act='gelu_tanh', ln_eps=_LN_EPS)
  image, text = sizes('img/Transformer'), sizes('txt/Encoder_0')
  head = shape.get('img/head/kernel')
  length = shape['txt/pos_embedding'][1]
  return spec_lib.Spec(
      family='big_vision',
      image=spec_lib.image_tower(patch=patch, pool='map' if 'img/MAPHead_0/probe' in flat else 'gap', **image,
                                 **({} if head else {'out_dim': 0})),
      text=spec_lib.text_tower(vocab_size=shape['txt/Embed_0/embedding'][0], max_length=length, pool='last', **text),
      embed_dim=head[1] if head else image['width'], image_size=grid * patch, text_length=length,
      mean=spec_lib.SIGLIP_MEAN, std=spec_lib.SIGLIP_STD)


def to_jax(state: Mapping[str, np.ndarray], spec: spec_lib.Spec, *, expected=None, parts: str = 'both',  # pylint: disable=redefined-outer-name
           where: str = 'npz') -> Converted:
  """Their tree → ours: names as they are, blocks stacked, temperature and bias as scalars.

  Raises:
    ValueError: with ± lines, in our names (theirs behind 'params/'), on what is missing, unexplained or misshapen.
  """
  if parts not in PARTS:
    raise ValueError(f'init_parts: expected one of {PARTS}, got {parts!r}')
  wanted = {'image': ('img',), 'text': ('txt',), 'both': ('img', 'txt', 't', 'b')}[parts]
  skipped, flat = {}, {}
  for name, x in _flat(state, skipped=skipped).items():
    if name.split('/')[0] not in wanted:
      skipped[f'params/{name}'] = f'init_parts is {parts!r}'
      continue
    if name in ('t', 'b'):
      x = np.asarray(x).reshape(())
    elif name == 'img/embedding/kernel' and np.ndim(x) == 2:
      x = np.asarray(x).reshape(*2 * (int(spec.image['variant'].split('/')[1]),), 3, -1)
    elif name == 'img/pos_embedding':
      x = np.asarray(x).reshape(1, -1, np.shape(x)[-1])
    flat[name] = np.asarray(x, np.float32, order='C')
  loaded = tuple(f'params/{name}' for name in flat)
  if 'b' in wanted and 'b' not in flat:
    flat['b'] = np.zeros((), np.float32)  # a softmax model has none
  tree = trees.unflatten(flat)
  if expected is not None:
    want = trees.loop_to_scan(trees.unflatten({path: np.broadcast_to(np.float32(0), shape) for path, shape in
                                               expected.items() if path.split('/')[0] in wanted}))
    tree = trees.merge(want, tree, where=where)
  return Converted(tree, loaded, skipped)


def from_jax(params) -> dict[str, np.ndarray]:
  """Our tree → theirs, flat, blocks stacked: {'params/img/…': array}, as np.savez takes it.

  Raises:
    ValueError: when a tower has what theirs has not (the class token's form).
  """
  flat = {k: np.asarray(v) for k, v in trees.flatten(params).items()
          if k in ('t', 'b') or k.startswith(('img/', 'txt/'))}
  alien = sorted(k for k in flat if k == 'img/cls' or k.startswith('img/pre_norm/'))
  if alien or 'txt/head/bias' not in flat:
    what = f'{alien} have no place there' if alien else 'the text head has no bias'
    raise ValueError(f"big_vision's towers are SigLIP's (pool='map', text pool='last'): {what}")
  return {f'params/{k}': np.asarray(v.reshape(1) if k in ('t', 'b') else v, order='C') for k, v in flat.items()}


def _flat(state, skipped=None):
  """Their file's parameters without 'params/', blocks stacked."""
  prefix = 'params/' if any(name.startswith('params/') for name in state) else ''
  flat = {}
  for name, x in state.items():
    if name.startswith(prefix):
      flat[name[len(prefix):]] = x
    elif skipped is not None:
      skipped[name] = 'no parameter'
  if any(re.search(r'/encoderblock_\d+/', name) for name in flat):
    flat = trees.flatten(trees.loop_to_scan(trees.unflatten(flat)))
  return flat
