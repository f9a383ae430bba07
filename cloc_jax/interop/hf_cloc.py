"""A Cloc as a self-contained Hugging Face folder: AutoModel.from_pretrained(FOLDER, trust_remote_code=True).

The PyTorch side is torch_model/*.py, copied into the folder as it is. The names of its parameters are mapped here.
"""
import contextlib
import importlib.resources
import json
import pathlib
from typing import Any

import numpy as np

from cloc_jax import trees
from cloc_jax.interop import name_map, tokenizer_json
from cloc_jax.interop.name_map import CONV, HEADS_BIAS, HEADS_IN, LINEAR, TABLE, VECTOR, dense, heads_out, norm, row
from cloc_jax.interop.exported import Probe, Source, Target

CODE = ('modeling_cloc.py', 'processing_cloc.py')
_AUTO_MODEL = {'AutoConfig': 'modeling_cloc.ClocConfig', 'AutoModel': 'modeling_cloc.ClocModel'}
_AUTO_PROCESSOR = {'AutoImageProcessor': 'processing_cloc.ClocImageProcessor',
                   'AutoProcessor': 'processing_cloc.ClocProcessor'}
_ATTENTION = 'MultiHeadDotProductAttention_0'
# Both corners' kernels (2, D, D) side by side in one Linear.
_CORNERS = name_map.Form(lambda x, h: x.T.reshape(2, len(x), len(x)), lambda x: x.reshape(-1, x.shape[-1]).T)
USE = '''```python
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)
inputs = processor(images=image, boxes=[[x0, y0, x1, y1]])                    # pixels of the original image
z = model.get_region_features(inputs['pixel_values'], inputs['boxes'])        # (1, 1, E), of length 1
```

Texts: `model.get_text_features(processor(text=['a dog'], region=True)['input_ids'])`. Their boxes:
`processor.boxes_from_canvas(model.ground(inputs['pixel_values'], z_text).boxes[0], inputs['original_sizes'][0])`.
It needs torch, transformers, safetensors, NumPy and Pillow. The code that runs is `modeling_cloc.py` and
`processing_cloc.py` in this folder; read them before you trust them.'''


def config(source: Source) -> dict[str, Any]:
  """The folder's config.json."""
  model, image, text = source.model, source.image, source.text
  v, (width, depth, heads) = image.sizes(), text.sizes()
  prompter = {}
  if model.region_encoder == 'prompter':
    part = model.bind({'params': source.params}).prompt
    prompter = dict(pool=part.pool, mlp_ratio=part.mlp_ratio, act=part.act, ln_eps=part.ln_eps)
  return dict(
      architectures=['ClocModel'], model_type='cloc', auto_map=_AUTO_MODEL, dtype='float32',
      image=dict(size=source.image_size, patch=v.patch, width=v.width, depth=v.depth, heads=v.heads, mlp_dim=v.mlp_dim,
                 pool=image.pool, out_dim=image.out_dim, act=image.act, ln_eps=image.ln_eps),
      text=dict(vocab_size=text.vocab_size, max_length=text.max_length, eos_id=text.eos_id, width=width, depth=depth,
                heads=heads, mlp_dim=source.text_mlp_dim, pool=text.pool, act=text.act, ln_eps=text.ln_eps),
      prompter=prompter, embed_dim=model.embed_dim, region_encoder=model.region_encoder,
      box_head_width=model.box_head_width or model.embed_dim, separate_temperature=model.separate_temperature)


def rows(source: Source) -> list[name_map.Row]:
  """The name map of torch_model/modeling_cloc.py for one model."""
  model, image, clip = source.model, source.image, source.image.pool == 'tok'
  table = [
      row('img/embedding/kernel', 'image.patch_embedding.weight', CONV),
      row('img/pos_embedding', 'image.position_embedding', TABLE),
      *_block('img/Transformer/encoderblock_{}', 'image.blocks.{}'),
      *norm('img/Transformer/encoder_norm', 'image.norm'),
      row('txt/Embed_0/embedding', 'text.token_embedding.weight'),
      row('txt/pos_embedding', 'text.position_embedding', TABLE),
      *_block('txt/Encoder_0/encoderblock_{}', 'text.blocks.{}'),
      *norm('txt/Encoder_0/encoder_norm', 'text.norm'),
      *_linear('txt/head', 'text.projection', bias=source.text.pool != 'eos'),
      row('t', 'logit_scale'), row('b', 'logit_bias')]
  if clip:
    table += [row('img/cls', 'image.class_embedding', VECTOR), *norm('img/pre_norm', 'image.pre_norm')]
  else:
    table.append(row('img/embedding/bias', 'image.patch_embedding.bias'))
  if image.pool == 'map':
    head, pool = 'img/MAPHead_0', 'image.attention_pool'
    table += [row(f'{head}/probe', f'{pool}.probe'), *_attention(f'{head}/{_ATTENTION}', f'{pool}.attention'),
              *norm(f'{head}/LayerNorm_0', f'{pool}.norm'), *_mlp(f'{head}/MlpBlock_0', f'{pool}.mlp')]
  if image.out_dim:
    table += _linear('img/head', 'image.projection', bias=not clip)
  if model.region_encoder == 'prompter':
    table += [row('prompter/box_embed/kernel', 'prompter.box_embedding.weight', _CORNERS),
              row('prompter/box_embed/bias', 'prompter.corner_bias'),
              *dense('prompter/text_embed', 'prompter.text_embedding'), *_block('prompter', 'prompter'),
              *_linear('prompter/head', 'prompter.projection', bias=False), *_mlp('box_head', 'box_head')]
  elif model.region_encoder == 'roi_align':
    table += _linear('roi_head/head', 'roi_head.projection', bias=False)
  if model.separate_temperature:
    table += [row('region_t', 'region_logit_scale'), row('region_b', 'region_logit_bias')]
  return table


def _linear(ours, theirs, *, bias):
  return dense(ours, theirs) if bias else [row(f'{ours}/kernel', f'{theirs}.weight', LINEAR)]


def _mlp(ours, theirs):
  return [*dense(f'{ours}/Dense_0', f'{theirs}.fc1'), *dense(f'{ours}/Dense_1', f'{theirs}.fc2')]


def _attention(ours, theirs):
  table = heads_out(ours, f'{theirs}.out')
  for name in ('query', 'key', 'value'):
    table += [row(f'{ours}/{name}/kernel', f'{theirs}.{name}.weight', HEADS_IN),
              row(f'{ours}/{name}/bias', f'{theirs}.{name}.bias', HEADS_BIAS)]
  return table


def _block(ours, theirs):
  return [*norm(f'{ours}/LayerNorm_0', f'{theirs}.norm1'), *norm(f'{ours}/LayerNorm_1', f'{theirs}.norm2'),
          *_attention(f'{ours}/{_ATTENTION}', f'{theirs}.attention'), *_mlp(f'{ours}/MlpBlock_0', f'{theirs}.mlp')]


def state_dict(source: Source) -> dict[str, np.ndarray]:
  """The parameters under the names of torch_model/modeling_cloc.py.

  Raises:
    ValueError: naming the parameters that have no place there.
  """
  table = rows(source)
  depths = {'img': source.image.sizes().depth, 'txt': source.text.sizes()[1]}
  covered = {path for one in name_map.unrolled(table, depths) for path in one.ours}
  left = sorted(set(trees.flatten(trees.scan_to_loop(source.params))) - covered)
  if left:
    raise ValueError(f'hf-cloc: no place for {left}')
  return name_map.from_jax(source.params, table)


def write(source: Source, folder: pathlib.Path) -> None:
  """Writes the folder's files: weights, config, code, processor, tokenizer."""
  from safetensors.numpy import save_file
  save_file(state_dict(source), folder / 'model.safetensors', metadata={'format': 'pt'})
  write_json(folder / 'config.json', config(source))
  copy_code(folder, CODE)
  write_processor(source, folder)


def write_processor(source: Source, folder: pathlib.Path) -> None:
  """What ClocProcessor is made of, its code not included."""
  write_json(folder / 'preprocessor_config.json', dict(image_processor_type='ClocImageProcessor',
                                                       auto_map=_AUTO_PROCESSOR, **image_settings(source)))
  write_json(folder / 'processor_config.json', dict(
      processor_class='ClocProcessor', auto_map=_AUTO_PROCESSOR, text_length=source.text_length,
      region_text_length=source.region_text_length, unescape_html='html' in source.tokenizer.steps))
  tokenizer_json.write(source.tokenizer, folder, length=source.text_length, pads_matter=True)


def image_settings(source: Source) -> dict[str, Any]:
  """The keywords of ClocImageProcessor."""
  return dict(image_size=source.image_size, pad=source.pad, pad_value=127, image_mean=list(source.model.image_mean),
              image_std=list(source.model.image_std))


def copy_code(folder: pathlib.Path, names) -> None:
  """Puts the PyTorch code into an exported folder."""
  code = importlib.resources.files('cloc_jax.interop') / 'torch_model'
  for name in names:
    (folder / name).write_text((code / name).read_text(encoding='utf-8'), encoding='utf-8')


def write_json(path: pathlib.Path, value) -> None:
  path.write_text(json.dumps(value, indent=2) + '\n', encoding='utf-8')


@contextlib.contextmanager
def quiet():
  """Without transformers' progress bars, and its reports of the half of a checkpoint that one tower does not take."""
  from transformers.utils import logging
  level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
  logging.set_verbosity_error()
  logging.disable_progress_bar()
  try:
    yield
  finally:
    logging.set_verbosity(level)
    if bars:
      logging.enable_progress_bar()


def load(folder):
  """(model, processor) of a folder, as a user loads them."""
  import transformers
  model = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
  return model.eval(), transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)


def outputs(source: Source, folder: pathlib.Path, probe: Probe) -> dict[str, np.ndarray]:
  """Everything the folder's model says of a probe, from PIL images, boxes in pixels and strings."""
  import torch
  with quiet():
    model, processor = load(folder)
  regions = source.model.region_encoder
  inputs = processor(images=probe.images, boxes=probe.boxes)
  captions, phrases = processor(text=probe.texts)['input_ids'], processor(text=probe.phrases, region=True)['input_ids']
  with torch.inference_mode():
    tokens = model.get_image_tokens(inputs['pixel_values'])
    z_phrase = model.get_text_features(phrases)
    out = {'pixel_values': inputs['pixel_values'], 'boxes': inputs['boxes'], 'text_ids': captions,
           'phrase_ids': phrases, 'image_tokens': tokens, 'phrase_features': z_phrase,
           'image_features': model.get_image_features(inputs['pixel_values']),
           'text_features': model.get_text_features(captions)}
    if regions != 'none':
      out['region_features'] = model.get_region_features(inputs['pixel_values'], inputs['boxes'])
    if regions == 'prompter':
      found = model.ground(tokens, z_phrase)
      out |= {'ground_boxes': found.boxes, 'ground_scores': found.scores}
  out = {name: x.numpy() for name, x in out.items()}
  if regions == 'prompter':
    out['ground_pixels'] = np.stack([processor.boxes_from_canvas(boxes, size) for boxes, size in
                                     zip(out['ground_boxes'], inputs['original_sizes'])])
  return out


TARGET = Target(name='hf-cloc', refuse=lambda source: None, write=write, outputs=outputs,
                how='AutoModel and AutoProcessor of transformers, in PyTorch, from images, boxes and texts', use=USE)
