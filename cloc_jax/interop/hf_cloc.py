"""A Cloc as a self-contained Hugging Face folder: AutoModel.from_pretrained(FOLDER, trust_remote_code=True).

The PyTorch side is torch_model/*.py, copied into the folder as it is. The names of its parameters are mapped here.
"""
import importlib.resources
import json
import pathlib

import numpy as np

from cloc_jax import trees
from cloc_jax.interop import tokenizer_json
from cloc_jax.models import posemb
from cloc_jax.models.cloc import Cloc

CODE = ('modeling_cloc.py', 'processing_cloc.py')
_AUTO_MODEL = {'AutoConfig': 'modeling_cloc.ClocConfig', 'AutoModel': 'modeling_cloc.ClocModel'}
_AUTO_PROCESSOR = {'AutoImageProcessor': 'processing_cloc.ClocImageProcessor',
                   'AutoProcessor': 'processing_cloc.ClocProcessor'}


def config(model: Cloc, params, *, image_size: int) -> dict:
  """The folder's config.json."""
  bound = model.bind({'params': params})
  image, text = bound.img, bound.txt
  v, (width, depth, heads) = image.sizes(), text.sizes()
  prompter = {}
  if model.region_encoder == 'prompter':
    part = bound.prompt
    prompter = dict(pool=part.pool, mlp_ratio=part.mlp_ratio, act=part.act, ln_eps=part.ln_eps)
  return dict(
      architectures=['ClocModel'], model_type='cloc', auto_map=_AUTO_MODEL, dtype='float32',
      image=dict(size=image_size, patch=v.patch, width=v.width, depth=v.depth, heads=v.heads, mlp_dim=v.mlp_dim,
                 pool=image.pool, out_dim=image.out_dim, act=image.act, ln_eps=image.ln_eps),
      text=dict(vocab_size=text.vocab_size, max_length=text.max_length, eos_id=text.eos_id, width=width, depth=depth,
                heads=heads, pool=text.pool, act=text.act, ln_eps=text.ln_eps),
      prompter=prompter, embed_dim=model.embed_dim, region_encoder=model.region_encoder,
      box_head_width=model.box_head_width or model.embed_dim, separate_temperature=model.separate_temperature)


def state_dict(model: Cloc, params, *, image_size: int) -> dict[str, np.ndarray]:
  """The parameters under the names of torch_model/modeling_cloc.py; float32, contiguous.

  Raises:
    ValueError: naming the parameters that have no place there.
  """
  left = {name: np.asarray(x, np.float32) for name, x in trees.flatten(trees.scan_to_loop(params)).items()}
  out = {}

  def put(name, value):
    out[name] = np.array(value, order='C')

  def dense(name, path, bias=True):
    put(f'{name}.weight', left.pop(f'{path}/kernel').T)
    if bias:
      put(f'{name}.bias', left.pop(f'{path}/bias'))

  def norm(name, path):
    put(f'{name}.weight', left.pop(f'{path}/scale'))
    put(f'{name}.bias', left.pop(f'{path}/bias'))

  def attention(name, path):
    for part in ('query', 'key', 'value', 'out'):
      kernel, bias = left.pop(f'{path}/{part}/kernel'), left.pop(f'{path}/{part}/bias')
      width = bias.size
      put(f'{name}.{part}.weight', kernel.reshape(width, width).T)
      put(f'{name}.{part}.bias', bias.reshape(width))

  def mlp(name, path):
    dense(f'{name}.fc1', f'{path}/Dense_0')
    dense(f'{name}.fc2', f'{path}/Dense_1')

  def block(name, path):
    norm(f'{name}.norm1', f'{path}/LayerNorm_0')
    attention(f'{name}.attention', f'{path}/MultiHeadDotProductAttention_0')
    norm(f'{name}.norm2', f'{path}/LayerNorm_1')
    mlp(f'{name}.mlp', f'{path}/MlpBlock_0')

  def tower(name, path, depth):
    for i in range(depth):
      block(f'{name}.blocks.{i}', f'{path}/encoderblock_{i}')
    norm(f'{name}.norm', f'{path}/encoder_norm')

  bound = model.bind({'params': params})
  image, text = bound.img, bound.txt
  v, clip = image.sizes(), image.pool == 'tok'
  put('image.patch_embedding.weight', left.pop('img/embedding/kernel').transpose(3, 2, 0, 1))
  put('image.position_embedding', position_table(image, left, grid=image_size // v.patch))
  if clip:
    put('image.class_embedding', left.pop('img/cls').reshape(-1))
    norm('image.pre_norm', 'img/pre_norm')
  else:
    put('image.patch_embedding.bias', left.pop('img/embedding/bias'))
  tower('image', 'img/Transformer', v.depth)
  if image.pool == 'map':
    put('image.attention_pool.probe', left.pop('img/MAPHead_0/probe'))
    attention('image.attention_pool.attention', 'img/MAPHead_0/MultiHeadDotProductAttention_0')
    norm('image.attention_pool.norm', 'img/MAPHead_0/LayerNorm_0')
    mlp('image.attention_pool.mlp', 'img/MAPHead_0/MlpBlock_0')
  if image.out_dim:
    dense('image.projection', 'img/head', bias=not clip)

  put('text.token_embedding.weight', left.pop('txt/Embed_0/embedding'))
  put('text.position_embedding', left.pop('txt/pos_embedding')[0])
  tower('text', 'txt/Encoder_0', text.sizes()[1])
  dense('text.projection', 'txt/head', bias=text.pool != 'eos')

  if model.region_encoder == 'prompter':
    kernel = left.pop('prompter/box_embed/kernel')
    put('prompter.box_embedding.weight', kernel.reshape(-1, kernel.shape[-1]).T)
    put('prompter.corner_bias', left.pop('prompter/box_embed/bias'))
    dense('prompter.text_embedding', 'prompter/text_embed')
    block('prompter', 'prompter')
    dense('prompter.projection', 'prompter/head', bias=False)
    mlp('box_head', 'box_head')
  elif model.region_encoder == 'roi_align':
    dense('roi_head.projection', 'roi_head/head', bias=False)
  for ours, theirs in (('', 'logit'), ('region_', 'region_logit'))[:1 + model.separate_temperature]:
    put(f'{theirs}_scale', left.pop(f'{ours}t'))
    put(f'{theirs}_bias', left.pop(f'{ours}b'))
  if left:
    raise ValueError(f'hf-cloc: no place for {sorted(left)}')
  return out


def position_table(image, flat, *, grid: int) -> np.ndarray:
  """(grid² [+ 1], D): what the tower adds to its tokens; takes the learned one out of `flat`. The class token's is 0
  where positions are computed."""
  if image.posemb == 'learn':
    return flat.pop('img/pos_embedding')[0]
  codes = np.asarray(posemb.patch_codes(dim=image.sizes().width, grid=grid))[0]
  return np.concatenate([np.zeros_like(codes[:1]), codes]) if image.pool == 'tok' else codes


def write(model: Cloc, params, folder: pathlib.Path, *, tokenizer, preprocessing) -> None:
  """Writes the folder's files: code, config, weights, processor, tokenizer.

  preprocessing: has image_size, pad, text_length, region_text_length (inference.Preprocessing).
  """
  from safetensors.numpy import save_file
  size = preprocessing.image_size
  save_file(state_dict(model, params, image_size=size), folder / 'model.safetensors', metadata={'format': 'pt'})
  _write_json(folder / 'config.json', config(model, params, image_size=size))
  image_processor = dict(
      image_processor_type='ClocImageProcessor', auto_map=_AUTO_PROCESSOR, image_size=size, pad=preprocessing.pad,
      image_mean=list(model.image_mean), image_std=list(model.image_std), pad_value=127)
  _write_json(folder / 'preprocessor_config.json', image_processor)
  _write_json(folder / 'processor_config.json', dict(
      processor_class='ClocProcessor', auto_map=_AUTO_PROCESSOR, text_length=preprocessing.text_length,
      region_text_length=preprocessing.region_text_length, unescape_html='html' in tokenizer.steps))
  tokenizer_json.write(tokenizer, folder, length=preprocessing.text_length, pads_matter=True)
  code = importlib.resources.files('cloc_jax.interop') / 'torch_model'
  for name in CODE:
    (folder / name).write_text((code / name).read_text(encoding='utf-8'), encoding='utf-8')


def _write_json(path, value):
  path.write_text(json.dumps(value, indent=2) + '\n', encoding='utf-8')
