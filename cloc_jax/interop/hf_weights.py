"""Weights and configs of Hugging Face's CLIPModel, SiglipModel and Siglip2Model (NaFlex), in both directions.

MetaCLIP, DFN and FG-CLIP's global part are CLIPModels. Names as transformers 4.56 to 5.23 writes them.
"""
from collections.abc import Mapping
from typing import Any

import numpy as np

from cloc_jax.interop import name_map, spec as spec_lib
from cloc_jax.interop.name_map import CONV, FLAT_PATCHES, HEADS_BIAS, HEADS_IN, LINEAR, NUMBER, NUMBER_1D, TABLE, VECTOR
from cloc_jax.interop.name_map import Converted, dense, heads_out, norm, packed, row

FAMILIES = ('clip', 'siglip', 'siglip2')

# What the config classes take for a key that a config.json leaves out.
_BLOCKS = dict(num_hidden_layers=12)
_DEFAULTS = {
    'clip': (
        dict(_BLOCKS, hidden_size=768, intermediate_size=3072, num_attention_heads=12, image_size=224, patch_size=32,
             hidden_act='quick_gelu', layer_norm_eps=1e-5),
        dict(_BLOCKS, hidden_size=512, intermediate_size=2048, num_attention_heads=8, vocab_size=49408,
             max_position_embeddings=77, hidden_act='quick_gelu', layer_norm_eps=1e-5, eos_token_id=49407)),
    'siglip': (
        dict(_BLOCKS, hidden_size=768, intermediate_size=3072, num_attention_heads=12, image_size=224, patch_size=16,
             hidden_act='gelu_pytorch_tanh', layer_norm_eps=1e-6),
        dict(_BLOCKS, hidden_size=768, intermediate_size=3072, num_attention_heads=12, vocab_size=32000,
             max_position_embeddings=64, hidden_act='gelu_pytorch_tanh', layer_norm_eps=1e-6)),
    'siglip2': (
        dict(_BLOCKS, hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_patches=256, patch_size=16,
             hidden_act='gelu_pytorch_tanh', layer_norm_eps=1e-6),
        dict(_BLOCKS, hidden_size=768, intermediate_size=3072, num_attention_heads=12, vocab_size=32000,
             max_position_embeddings=64, hidden_act='gelu_pytorch_tanh', layer_norm_eps=1e-6)),
}

SKIP = (
    (r'.*\.position_ids', 'a buffer of consecutive numbers'),
    (r'text_model\.embeddings\.position_embedding_(res|ori)\.weight', "FG-CLIP's long texts; short ones do not use it"),
    (r'text_filip_projection\.weight', "FG-CLIP's projection of region texts"),
    (r'logit_scale_(finegraind|hardneg)', "a temperature of FG-CLIP's other losses"),
)


def spec(config: Mapping[str, Any], *, where: str = 'config.json') -> spec_lib.Spec:
  """A config.json → the architecture.

  Raises:
    ValueError: naming the key, when the model is none of FAMILIES, or has what our towers have not.
  """
  family = config.get('model_type')
  if family not in FAMILIES:
    raise ValueError(f'{where}: model_type: expected one of {", ".join(FAMILIES)}, got {family!r}')
  vision, text = ({**defaults, **{k: v for k, v in section.items() if v is not None}} for defaults, section in zip(
      _DEFAULTS[family], (_section(config, 'vision_config', where), _section(config, 'text_config', where))))
  clip = family == 'clip'
  if vision.get('num_channels', 3) != 3:
    raise ValueError(f'{where}: vision_config.num_channels: expected 3, got {vision["num_channels"]}')
  if not clip and not vision.get('vision_use_head', True):
    raise ValueError(f'{where}: vision_config.vision_use_head: expected true, got false: without its pooling head this '
                     'SigLIP embeds no images')
  patch = vision['patch_size']
  grid = round(vision['num_patches']**0.5) if family == 'siglip2' else vision['image_size'] // patch
  if family == 'siglip2' and grid**2 != vision['num_patches']:
    raise ValueError(f'{where}: vision_config.num_patches: expected a square number, got {vision["num_patches"]}')
  notes = []
  if clip:
    embed_dim = config.get('projection_dim') or 512
    # 2 is transformers' sign for the older rule, the place of the largest id; CLIP's end token is the largest.
    eos = text['eos_token_id']
    eos = text['vocab_size'] - 1 if eos == 2 else eos
    if 'FGCLIPModel' in (config.get('architectures') or ()):
      eos = 49407
      notes.append("FG-CLIP: its global image and short-text embedding; its dense and long-text parts are left out")
    if not isinstance(eos, int):
      raise ValueError(f'{where}: text_config.eos_token_id: expected one number, got {eos!r}')
  else:
    embed_dim, eos = vision['hidden_size'], None
    width = text.get('projection_size') or text['hidden_size']
    if width != embed_dim:
      raise ValueError(f'{where}: the image tower gives {embed_dim} numbers (vision_config.hidden_size) and the text '
                       f'tower {width} (text_config.projection_size); expected the same')
  act = lambda section, name: spec_lib.activation(section['hidden_act'], where=f'{where}: {name}.hidden_act')
  mean, std = ((spec_lib.CLIP_MEAN, spec_lib.CLIP_STD) if clip else (spec_lib.SIGLIP_MEAN, spec_lib.SIGLIP_STD))
  return spec_lib.Spec(
      family=family,
      image=spec_lib.image_tower(
          width=vision['hidden_size'], depth=vision['num_hidden_layers'], mlp_dim=vision['intermediate_size'],
          heads=vision['num_attention_heads'], patch=patch, pool='tok' if clip else 'map',
          act=act(vision, 'vision_config'), ln_eps=vision['layer_norm_eps'], **({} if clip else {'out_dim': 0})),
      text=spec_lib.text_tower(
          width=text['hidden_size'], depth=text['num_hidden_layers'], mlp_dim=text['intermediate_size'],
          heads=text['num_attention_heads'], vocab_size=text['vocab_size'],
          max_length=text['max_position_embeddings'], pool='eos' if clip else 'last', act=act(text, 'text_config'),
          ln_eps=text['layer_norm_eps']),
      embed_dim=embed_dim, image_size=grid * patch, text_length=text['max_position_embeddings'], eos_id=eos, mean=mean,
      std=std, notes=tuple(notes))


def _section(config, name, where):
  # Old files carry a second section, NAME_dict, which the library lets win.
  section = {**(config.get(name) or {}), **(config.get(f'{name}_dict') or {})}
  if not section:
    raise ValueError(f'{where}: {name}: expected a section with the sizes of the tower, found none; this is not a '
                     'dual encoder (a tower alone cannot be read)')
  return section


def rows(family: str) -> list[name_map.Row]:
  """The name map of a family of FAMILIES."""
  if family not in FAMILIES:
    raise ValueError(f'family: expected one of {FAMILIES}, got {family!r}')
  clip = family == 'clip'
  table = [
      *_stack('txt/Encoder_0', 'text_model'),
      row('txt/Embed_0/embedding', 'text_model.embeddings.token_embedding.weight'),
      row('txt/pos_embedding', 'text_model.embeddings.position_embedding.weight', TABLE),
      *norm('txt/Encoder_0/encoder_norm', 'text_model.final_layer_norm'),
      *_stack('img/Transformer', 'vision_model'),
      row('img/embedding/kernel', 'vision_model.embeddings.patch_embedding.weight',
          FLAT_PATCHES if family == 'siglip2' else CONV),
      row('img/pos_embedding', 'vision_model.embeddings.position_embedding.weight', TABLE),
      *norm('img/Transformer/encoder_norm', 'vision_model.post_layernorm'),
  ]
  if clip:
    return table + [
        row('img/cls', 'vision_model.embeddings.class_embedding', VECTOR),
        *norm('img/pre_norm', 'vision_model.pre_layrnorm'),
        row('img/head/kernel', 'visual_projection.weight', LINEAR),
        row('txt/head/kernel', 'text_projection.weight', LINEAR),
        row('t', 'logit_scale', NUMBER)]
  head, pool = 'img/MAPHead_0', 'vision_model.head'
  return table + [
      row('img/embedding/bias', 'vision_model.embeddings.patch_embedding.bias'),
      row(f'{head}/probe', f'{pool}.probe'),
      *packed(f'{head}/MultiHeadDotProductAttention_0', ('query', 'key', 'value'), f'{pool}.attention.in_proj_weight',
              f'{pool}.attention.in_proj_bias'),
      *heads_out(f'{head}/MultiHeadDotProductAttention_0', f'{pool}.attention.out_proj'),
      *norm(f'{head}/LayerNorm_0', f'{pool}.layernorm'),
      *dense(f'{head}/MlpBlock_0/Dense_0', f'{pool}.mlp.fc1'),
      *dense(f'{head}/MlpBlock_0/Dense_1', f'{pool}.mlp.fc2'),
      *dense('txt/head', 'text_model.head'),
      row('t', 'logit_scale', NUMBER_1D),
      row('b', 'logit_bias', NUMBER_1D)]


def _stack(ours, theirs):
  ours, theirs = f'{ours}/encoderblock_{{}}', f'{theirs}.encoder.layers.{{}}'
  attention = f'{ours}/MultiHeadDotProductAttention_0'
  table = [*norm(f'{ours}/LayerNorm_0', f'{theirs}.layer_norm1'), *norm(f'{ours}/LayerNorm_1', f'{theirs}.layer_norm2'),
           *heads_out(attention, f'{theirs}.self_attn.out_proj'),
           *dense(f'{ours}/MlpBlock_0/Dense_0', f'{theirs}.mlp.fc1'),
           *dense(f'{ours}/MlpBlock_0/Dense_1', f'{theirs}.mlp.fc2')]
  for name in ('query', 'key', 'value'):
    table += [row(f'{attention}/{name}/kernel', f'{theirs}.self_attn.{name[0]}_proj.weight', HEADS_IN),
              row(f'{attention}/{name}/bias', f'{theirs}.self_attn.{name[0]}_proj.bias', HEADS_BIAS)]
  return table


def to_jax(state: Mapping[str, np.ndarray], spec: spec_lib.Spec, **options) -> Converted:  # pylint: disable=redefined-outer-name
  """A state dict → our tree; options as in name_map.to_jax."""
  return name_map.to_jax(state, rows(spec.family), depths=spec.depths, heads=spec.heads, skip=SKIP, **options)


def from_jax(params, *, family: str) -> dict[str, np.ndarray]:
  """Our tree → the state dict of a model of `family`; see name_map.from_jax."""
  return name_map.from_jax(params, rows(family))
