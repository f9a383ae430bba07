"""Weights for open_clip, big_vision and anyone who reads arrays by name. `read_…` brings back what lies on disk."""
import json
import pathlib
from typing import Any

import numpy as np

from cloc_jax import trees
from cloc_jax.interop import big_vision, hf_cloc, open_clip, tokenizer_json
from cloc_jax.interop.exported import Source

OPEN_CLIP_USE = '''```python
import open_clip
model, _, preprocess = open_clip.create_model_and_transforms('local-dir:FOLDER')
tokenizer = open_clip.get_tokenizer('local-dir:FOLDER')
```

The weights are `open_clip_model.safetensors`, the config `open_clip_config.json`: images are padded to a square
(`resize_mode` longest), with bicubic resampling instead of ours.'''
BIG_VISION_USE = '''```python
flat = dict(np.load('FOLDER/params.npz'))          # 'params/img/…', 'params/txt/…', 'params/t', 'params/b'
```

`config.json` gives the keywords of big_vision's two_towers (models.vit, models.proj.image_text.text_transformer).'''
SAFETENSORS_USE = '''```python
from safetensors.numpy import load_file
flat = load_file('FOLDER/params.safetensors')      # 'img/embedding/kernel', 'prompter/head/kernel', …
```

Blocks of a tower are stacked on a leading axis. `config.json` holds the shapes, `tokenizer.json` the tokenizer.'''


def refuse_open_clip(source: Source) -> str | None:
  """Why open_clip's own ViT cannot express a model, or None."""
  image, text = source.image, source.text
  if image.pool != 'tok':
    return (f"open_clip's own image tower pools a class token, this one pools by {image.pool!r}; SigLIP runs there "
            "through timm, under names of fixed sizes: use --to hf-siglip, big-vision or hf-cloc")
  if text.pool != 'eos':
    return f"open_clip's CLIP text tower is causal and pools at the end token, this one pools by {text.pool!r}"
  if not image.out_dim:
    return 'open_clip projects the pooled image, this tower has no projection (out_dim is 0)'
  v, width = image.sizes(), text.sizes()[0]
  for what, mlp_dim, of in (('image', v.mlp_dim, v.width), ('text', source.text_mlp_dim, width)):
    if int(of * (mlp_dim / of)) != mlp_dim:
      return (f'open_clip gives the MLP as a ratio of the width; {mlp_dim} / {of} of the {what} tower does not come '
              'back whole')
  if 'quick_gelu' in (image.act, text.act) and image.act != text.act:
    return f'open_clip has one quick_gelu for both towers, these have {image.act} and {text.act}'
  return None


def open_clip_config(source: Source) -> dict[str, Any]:
  """open_clip_config.json."""
  image, text, tokenizer = source.image, source.text, source.tokenizer
  v, (width, depth, heads) = image.sizes(), text.sizes()
  tanh = lambda act: {'act_kwargs': {'approximate': 'tanh'}} if act == 'gelu_tanh' else {}
  vision = dict(image_size=source.image_size, layers=v.depth, width=v.width, head_width=v.width // v.heads,
                mlp_ratio=v.mlp_dim / v.width, patch_size=v.patch, norm_kwargs={'eps': image.ln_eps}, **tanh(image.act))
  tower = dict(context_length=text.max_length, vocab_size=text.vocab_size, width=width, heads=heads, layers=depth,
               mlp_ratio=source.text_mlp_dim / width, norm_kwargs={'eps': text.ln_eps}, **tanh(text.act))
  if not (tokenizer.name == 'clip' and text.eos_id == text.vocab_size - 1):
    # open_clip's own tokenizer is CLIP's; any other is read from the folder.
    tower |= dict(pool_type='eos', eos_id=text.eos_id, pad_id=tokenizer.pad_id, hf_tokenizer_name='.')
  return {'model_cfg': dict(embed_dim=source.model.embed_dim, quick_gelu=image.act == 'quick_gelu', vision_cfg=vision,
                            text_cfg=tower),
          'preprocess_cfg': dict(mode='RGB', mean=list(source.model.image_mean), std=list(source.model.image_std),
                                 interpolation='bicubic', resize_mode='longest', fill_color=127)}


def write_open_clip(source: Source, folder: pathlib.Path) -> None:
  from safetensors.numpy import save_file
  save_file(open_clip.from_jax(source.params, family='open_clip'), folder / 'open_clip_model.safetensors',
            metadata={'format': 'pt'})
  hf_cloc.write_json(folder / 'open_clip_config.json', open_clip_config(source))
  tokenizer_json.write(source.tokenizer, folder, length=source.text_length, pads_matter=True)


def read_open_clip(source: Source, folder: pathlib.Path) -> dict[str, Any]:
  """The towers' parameters, through the reader of foreign models, which reads the config as well."""
  from safetensors.numpy import load_file
  config = json.loads((folder / 'open_clip_config.json').read_text(encoding='utf-8'))
  spec = open_clip.spec(config)
  v, text = source.image.sizes(), source.text
  ours = dict(width=v.width, depth=v.depth, heads=v.heads, mlp_dim=v.mlp_dim, act=source.image.act,
              ln_eps=source.image.ln_eps, pool='tok')
  ours_text = dict(zip(('width', 'depth', 'heads'), text.sizes()), mlp_dim=source.text_mlp_dim, act=text.act,
                   ln_eps=text.ln_eps, pool='eos', vocab_size=text.vocab_size, max_length=text.max_length)
  for what, want, got in (('vision_cfg', ours, spec.image), ('text_cfg', ours_text, spec.text),
                          ('model_cfg', dict(eos_id=text.eos_id, image_size=source.image_size),
                           dict(eos_id=spec.eos_id, image_size=spec.image_size))):
    differ = {key: (value, got.get(key)) for key, value in want.items() if got.get(key) != value}
    if differ:
      raise ValueError(f'open_clip_config.json: {what} reads back as another model, (expected, got): {differ}')
  state = load_file(folder / 'open_clip_model.safetensors')
  return open_clip.to_jax(state, spec, where='open_clip_model.safetensors').params


def refuse_big_vision(source: Source) -> str | None:
  """Why big_vision's two_towers cannot express a model, or None."""
  image, text = source.image, source.text
  if image.pool == 'tok':
    return "big_vision's towers have no norm before the blocks, CLIP's have one; use --to hf-clip or open-clip"
  if text.pool != 'last':
    return f"big_vision's text tower pools at the last position, this one pools by {text.pool!r}"
  for what, tower in (('image', image), ('text', text)):
    if tower.act != 'gelu_tanh' or tower.ln_eps != 1e-6:
      return (f"big_vision's towers use tanh-GELU and an epsilon of 1e-6 in their norms; the {what} tower has "
              f'{tower.act} and {tower.ln_eps:g}')
  return None


def write_big_vision(source: Source, folder: pathlib.Path) -> None:
  v, (width, depth, heads) = source.image.sizes(), source.text.sizes()
  np.savez(folder / 'params.npz', **big_vision.from_jax(source.params))
  hf_cloc.write_json(folder / 'config.json', dict(
      model_name='proj.image_text.two_towers', image_model='vit', out_dim=[source.image.out_dim or None,
                                                                         source.model.embed_dim],
      image=dict(width=v.width, depth=v.depth, mlp_dim=v.mlp_dim, num_heads=v.heads, patch_size=[v.patch, v.patch],
                 pool_type=source.image.pool, posemb='learn', scan=True),
      text=dict(vocab_size=source.text.vocab_size, width=width, depth=depth, mlp_dim=source.text_mlp_dim,
                num_heads=heads, scan=True), bias_init=0.0, image_size=source.image_size,
      text_length=source.text.max_length, image_mean=list(source.model.image_mean),
      image_std=list(source.model.image_std)))
  tokenizer_json.write(source.tokenizer, folder, length=source.text_length, pads_matter=True)


def read_big_vision(source: Source, folder: pathlib.Path) -> dict[str, Any]:
  """The towers' parameters, through the reader of foreign models."""
  del source
  with np.load(folder / 'params.npz', allow_pickle=False) as arrays:
    state = dict(arrays)
  return big_vision.to_jax(state, big_vision.spec(state), where='params.npz').params


def write_safetensors(source: Source, folder: pathlib.Path) -> None:
  """All parameters under their own names; img/pos_embedding also where the model computes it."""
  from safetensors.numpy import save_file
  flat = {path: np.asarray(x, order='C') for path, x in trees.flatten(source.params).items()}
  save_file(flat, folder / 'params.safetensors')
  hf_cloc.write_json(folder / 'config.json', {key: value for key, value in hf_cloc.config(source).items()
                                              if key not in ('architectures', 'auto_map')})  # no code lies here
  hf_cloc.write_json(folder / 'preprocessor_config.json', hf_cloc.image_settings(source))
  tokenizer_json.write(source.tokenizer, folder, length=source.text_length, pads_matter=True)


def read_safetensors(source: Source, folder: pathlib.Path) -> dict[str, Any]:
  del source
  from safetensors.numpy import load_file
  return trees.unflatten(load_file(folder / 'params.safetensors'))
