"""OpenAI's CLIP ViTs: the names of their state dict, which open_clip kept, and sizes read off the weights."""
from collections.abc import Mapping

import numpy as np

from cloc_jax.interop import name_map, spec as spec_lib
from cloc_jax.interop.name_map import CONV, NUMBER, TABLE, VECTOR, Converted, dense, heads_out, norm, packed, row

# Of the archives; they are no parameters.
SKIP = ((r'input_resolution|context_length|vocab_size', 'a size, read off the weights'),
        (r'(text\.)?attn_mask', 'a buffer: the causal mask'))
_HEAD_WIDTH = 64


def spec(state: Mapping[str, np.ndarray], *, where: str = 'state dict') -> spec_lib.Spec:
  """The architecture from the weights' shapes. Heads are 64 wide and the activation is quick_gelu in all of OpenAI's.

  Raises:
    ValueError: when these are not the weights of one of their ViTs.
  """
  if any(name.startswith('visual.layer1.') for name in state):
    raise ValueError(f'{where}: a ResNet; only ViTs can be imported')
  shape = {}
  for name in ('visual.conv1.weight', 'visual.positional_embedding', 'visual.proj', 'token_embedding.weight',
               'positional_embedding', 'visual.transformer.resblocks.0.mlp.c_fc.weight',
               'transformer.resblocks.0.mlp.c_fc.weight'):
    if name not in state:
      raise ValueError(f'{where}: no {name}: not the weights of an OpenAI CLIP ViT; they hold {sorted(state)[:4]} …')
    shape[name] = np.shape(state[name])
  width, _, patch, _ = shape['visual.conv1.weight']
  vocab_size, text_width = shape['token_embedding.weight']
  length, grid = shape['positional_embedding'][0], round((shape['visual.positional_embedding'][0] - 1)**0.5)
  common = dict(act='quick_gelu', ln_eps=1e-5)
  return spec_lib.Spec(
      family='openai',
      image=spec_lib.image_tower(
          width=width, depth=depth(state, 'visual.transformer.resblocks.'), heads=max(1, width // _HEAD_WIDTH),
          mlp_dim=shape['visual.transformer.resblocks.0.mlp.c_fc.weight'][0], patch=patch, pool='tok', **common),
      text=spec_lib.text_tower(
          width=text_width, depth=depth(state, 'transformer.resblocks.'), heads=max(1, text_width // _HEAD_WIDTH),
          mlp_dim=shape['transformer.resblocks.0.mlp.c_fc.weight'][0], vocab_size=vocab_size, max_length=length,
          pool='eos', **common),
      embed_dim=shape['visual.proj'][1], image_size=grid * patch, text_length=length, eos_id=vocab_size - 1)


def depth(state: Mapping[str, np.ndarray], prefix: str) -> int:
  """How many blocks there are under a prefix."""
  return len({name[len(prefix):].split('.')[0] for name in state if name.startswith(prefix)})


def image_rows() -> list[name_map.Row]:
  return [
      row('img/cls', 'visual.class_embedding', VECTOR),
      row('img/embedding/kernel', 'visual.conv1.weight', CONV),
      row('img/pos_embedding', 'visual.positional_embedding', TABLE),
      *norm('img/pre_norm', 'visual.ln_pre'),
      *blocks('img/Transformer', 'visual.transformer.resblocks'),
      *norm('img/Transformer/encoder_norm', 'visual.ln_post'),
      row('img/head/kernel', 'visual.proj')]  # a parameter of its own, (in, out), not a Linear


def text_rows(prefix: str = '') -> list[name_map.Row]:
  """The text tower without its projection; prefix: 'text.' in open_clip's two-tower class."""
  return [
      row('txt/Embed_0/embedding', f'{prefix}token_embedding.weight'),
      row('txt/pos_embedding', f'{prefix}positional_embedding', TABLE),
      *blocks('txt/Encoder_0', f'{prefix}transformer.resblocks'),
      *norm('txt/Encoder_0/encoder_norm', f'{prefix}ln_final')]


def blocks(ours: str, theirs: str) -> list[name_map.Row]:
  ours, theirs = f'{ours}/encoderblock_{{}}', f'{theirs}.{{}}'
  attention = f'{ours}/MultiHeadDotProductAttention_0'
  return [
      *norm(f'{ours}/LayerNorm_0', f'{theirs}.ln_1'), *norm(f'{ours}/LayerNorm_1', f'{theirs}.ln_2'),
      *packed(attention, ('query', 'key', 'value'), f'{theirs}.attn.in_proj_weight', f'{theirs}.attn.in_proj_bias'),
      *heads_out(attention, f'{theirs}.attn.out_proj'),
      *dense(f'{ours}/MlpBlock_0/Dense_0', f'{theirs}.mlp.c_fc'),
      *dense(f'{ours}/MlpBlock_0/Dense_1', f'{theirs}.mlp.c_proj')]


def rows() -> list[name_map.Row]:
  """The whole name map."""
  return [*image_rows(), *text_rows(), row('txt/head/kernel', 'text_projection'), row('t', 'logit_scale', NUMBER)]


def to_jax(state: Mapping[str, np.ndarray], spec: spec_lib.Spec, **options) -> Converted:  # pylint: disable=redefined-outer-name
  """A state dict → our tree; options as in name_map.to_jax."""
  return name_map.to_jax(state, rows(), depths=spec.depths, heads=spec.heads, skip=SKIP, **options)


def from_jax(params) -> dict[str, np.ndarray]:
  """Our tree → OpenAI's state dict."""
  return name_map.from_jax(params, rows())
