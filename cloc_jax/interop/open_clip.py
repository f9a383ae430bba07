"""open_clip's state dicts and JSON configs: its own ViTs, which keep OpenAI's names, and SigLIP through timm's ViT."""
from collections.abc import Mapping
from typing import Any

import numpy as np

from cloc_jax.interop import name_map, openai, spec as spec_lib
from cloc_jax.interop.name_map import CONV, LINEAR, NUMBER, Converted, dense, heads_out, norm, packed, row

FAMILIES = ('open_clip', 'open_clip_custom', 'open_clip_siglip')

# timm's ViTs for SigLIP that run tanh-GELU (timm 1.0); the others of the name run erf-GELU.
_TIMM_TANH = ('patch32_siglip_256', 'large_patch16_siglip_512', 'so400m_patch16_siglip', 'giantopt_patch16_siglip')
_TIMM_SIZES = {'base': (768, 12, 3072, 12), 'large': (1024, 24, 4096, 16), 'so400m': (1152, 27, 4304, 16),
               'giantopt': (1536, 40, 6144, 16)}
# Settings whose other values are other architectures: (key, the value that ours has).
_VISION_PLAIN = (('ls_init_value', None), ('attentional_pool', False), ('no_ln_pre', False),
                 ('pos_embed_type', 'learnable'), ('pool_type', 'tok'), ('block_type', None), ('qk_norm', False),
                 ('scaled_cosine_attn', False), ('scale_heads', False), ('scale_attn_inner', False),
                 ('scale_attn', False), ('scale_fc', False))
_TEXT_PLAIN = (('text_arch', 'clip'), ('hf_model_name', None), ('ls_init_value', None), ('embed_cls', False),
               ('proj_type', 'linear'), ('block_type', None), ('qk_norm', False), ('scaled_cosine_attn', False),
               ('scale_heads', False), ('scale_attn_inner', False), ('scale_attn', False), ('scale_fc', False),
               ('final_ln_after_pool', False), ('variable_text', False))


def spec(config: Mapping[str, Any], *, where: str = 'open_clip_config.json') -> spec_lib.Spec:
  """A model config (open_clip_config.json, or one of open_clip/model_configs) → the architecture.

  Raises:
    ValueError: naming the key, when the model has what our towers have not.
  """
  model = config.get('model_cfg', config)
  for key in ('embed_dim', 'vision_cfg', 'text_cfg'):
    if key not in model:
      raise ValueError(f'{where}: no {key}: expected the config of an open_clip model, with embed_dim, vision_cfg and '
                       f'text_cfg; it holds {sorted(model)[:8]}')
  vision, text, embed_dim = model['vision_cfg'], model['text_cfg'], model['embed_dim']
  quick = model.get('quick_gelu', False)
  _check_plain(text, _TEXT_PLAIN, f'{where}: text_cfg')
  siglip = bool(vision.get('timm_model_name'))
  if siglip:
    image, image_size = _timm(vision, embed_dim, where)
  else:
    _check_plain(vision, _VISION_PLAIN, f'{where}: vision_cfg')
    if not isinstance(vision.get('layers', 12), int):
      raise ValueError(f'{where}: vision_cfg.layers: {vision["layers"]} is a ResNet; only ViTs can be imported')
    width, patch, image_size = vision.get('width', 768), vision.get('patch_size', 16), vision.get('image_size', 224)
    image = spec_lib.image_tower(
        width=width, depth=vision.get('layers', 12), mlp_dim=int(width * vision.get('mlp_ratio', 4.0)),
        heads=width // vision.get('head_width', 64), patch=patch, pool='tok', act=_act(vision, quick),
        ln_eps=_eps(vision))
    image_size = image_size // patch * patch
  width, pool = text.get('width', 512), text.get('pool_type', 'argmax')
  bidirectional, bias = text.get('no_causal_mask', False), text.get('proj_bias', False)
  if (pool, bidirectional, bias) not in (('argmax', False, False), ('eos', False, False), ('last', True, True)):
    raise ValueError(f'{where}: text_cfg: pool_type {pool!r}, no_causal_mask {bidirectional}, proj_bias {bias}: '
                     "expected CLIP's (argmax or eos, false, false) or SigLIP's (last, true, true)")
  length, vocab_size = text.get('context_length', 77), text.get('vocab_size', 49408)
  eos = {'argmax': vocab_size - 1, 'eos': text.get('eos_id'), 'last': None}[pool]
  custom = siglip or model.get('custom_text', False)
  pixels = config.get('preprocess_cfg', {})
  default = (spec_lib.SIGLIP_MEAN, spec_lib.SIGLIP_STD) if siglip else (spec_lib.CLIP_MEAN, spec_lib.CLIP_STD)
  return spec_lib.Spec(
      family='open_clip_siglip' if siglip else 'open_clip_custom' if custom else 'open_clip',
      image=image,
      text=spec_lib.text_tower(
          width=width, depth=text.get('layers', 12), mlp_dim=int(width * text.get('mlp_ratio', 4.0)),
          heads=text.get('heads', 8), vocab_size=vocab_size, max_length=length,
          pool='last' if pool == 'last' else 'eos', act=_act(text, quick), ln_eps=_eps(text)),
      embed_dim=embed_dim, image_size=image_size, text_length=length, eos_id=eos,
      mean=tuple(pixels.get('mean') or default[0]), std=tuple(pixels.get('std') or default[1]))


def _timm(vision, embed_dim, where):
  name = vision['timm_model_name']
  size = next((s for s in _TIMM_SIZES if name.startswith(f'vit_{s}_patch') and '_siglip_' in name), None)
  if size is None or 'gap' in name:
    raise ValueError(f'{where}: vision_cfg.timm_model_name: expected a ViT of SigLIP with MAP head '
                     f'(vit_{{{",".join(_TIMM_SIZES)}}}_patchN_siglip_M), got {name!r}')
  for key, value in (('timm_pool', 'map'), ('timm_proj', 'none')):
    if vision.get(key) != value:
      raise ValueError(f'{where}: vision_cfg.{key}: expected {value!r}, got {vision.get(key)!r}')
  width, depth, mlp_dim, heads = _TIMM_SIZES[size]
  if embed_dim != width:
    raise ValueError(f'{where}: embed_dim: expected the width of {name}, {width}, got {embed_dim}')
  patch = int(name.split('_patch')[1].split('_')[0])
  act = 'gelu_tanh' if any(part in name for part in _TIMM_TANH) else 'gelu'
  size = vision.get('image_size', 224) // patch * patch
  return spec_lib.image_tower(width=width, depth=depth, mlp_dim=mlp_dim, heads=heads, patch=patch, pool='map', act=act,
                              ln_eps=1e-6, out_dim=0), size


def _check_plain(section, plain, where):
  for key, value in plain:
    if section.get(key, value) != value:
      raise ValueError(f'{where}.{key}: expected {value!r}, got {section[key]!r}: another architecture than ours')


def _act(section, quick):
  if quick:
    return 'quick_gelu'
  return 'gelu_tanh' if (section.get('act_kwargs') or {}).get('approximate') == 'tanh' else 'gelu'


def _eps(section):
  return (section.get('norm_kwargs') or {}).get('eps', 1e-5)


def rows(family: str) -> list[name_map.Row]:
  """The name map of one of FAMILIES: text keys bare, under 'text.', or under 'text.' beside timm's image tower."""
  if family == 'open_clip':
    return openai.rows()
  if family == 'open_clip_custom':
    return [*openai.image_rows(), *openai.text_rows('text.'), row('txt/head/kernel', 'text.text_projection'),
            row('t', 'logit_scale', NUMBER)]
  if family != 'open_clip_siglip':
    raise ValueError(f'family: expected one of {FAMILIES}, got {family!r}')
  block, head = 'img/Transformer/encoderblock_{}', 'img/MAPHead_0'
  attention, trunk, pool = 'MultiHeadDotProductAttention_0', 'visual.trunk.blocks.{}', 'visual.trunk.attn_pool'
  return [
      row('img/embedding/kernel', 'visual.trunk.patch_embed.proj.weight', CONV),
      row('img/embedding/bias', 'visual.trunk.patch_embed.proj.bias'),
      row('img/pos_embedding', 'visual.trunk.pos_embed'),
      *norm(f'{block}/LayerNorm_0', f'{trunk}.norm1'), *norm(f'{block}/LayerNorm_1', f'{trunk}.norm2'),
      *packed(f'{block}/{attention}', ('query', 'key', 'value'), f'{trunk}.attn.qkv.weight', f'{trunk}.attn.qkv.bias'),
      *heads_out(f'{block}/{attention}', f'{trunk}.attn.proj'),
      *dense(f'{block}/MlpBlock_0/Dense_0', f'{trunk}.mlp.fc1'), *dense(f'{block}/MlpBlock_0/Dense_1', f'{trunk}.mlp.fc2'),
      *norm('img/Transformer/encoder_norm', 'visual.trunk.norm'),
      row(f'{head}/probe', f'{pool}.latent'),
      *packed(f'{head}/{attention}', ('query',), f'{pool}.q.weight', f'{pool}.q.bias'),
      *packed(f'{head}/{attention}', ('key', 'value'), f'{pool}.kv.weight', f'{pool}.kv.bias'),
      *heads_out(f'{head}/{attention}', f'{pool}.proj'), *norm(f'{head}/LayerNorm_0', f'{pool}.norm'),
      *dense(f'{head}/MlpBlock_0/Dense_0', f'{pool}.mlp.fc1'), *dense(f'{head}/MlpBlock_0/Dense_1', f'{pool}.mlp.fc2'),
      *openai.text_rows('text.'),
      row('txt/head/kernel', 'text.text_projection.weight', LINEAR), row('txt/head/bias', 'text.text_projection.bias'),
      row('t', 'logit_scale', NUMBER), row('b', 'logit_bias', NUMBER)]


def to_jax(state: Mapping[str, np.ndarray], spec: spec_lib.Spec, **options) -> Converted:  # pylint: disable=redefined-outer-name
  """A state dict → our tree; options as in name_map.to_jax. A two-tower model may be saved under the older bare names."""
  family = spec.family
  if family == 'open_clip' and 'text.token_embedding.weight' in state:
    family = 'open_clip_custom'
  elif family == 'open_clip_custom' and 'token_embedding.weight' in state:
    family = 'open_clip'
  table = rows(family)
  if 'logit_bias' in state and family != 'open_clip_siglip':  # trained with the sigmoid loss
    table.append(row('b', 'logit_bias', NUMBER))
  return name_map.to_jax(state, table, depths=spec.depths, heads=spec.heads, skip=openai.SKIP, **options)


def from_jax(params, *, family: str) -> dict[str, np.ndarray]:
  """Our tree → the state dict of an open_clip model of `family`, one of FAMILIES; see name_map.from_jax."""
  return name_map.from_jax(params, rows(family))
