"""A Cloc's towers as a CLIPModel or SiglipModel folder of Hugging Face, which loads without custom code.

The Prompter and the box head stay behind: see hf_cloc. Neither library class pads an image to a square; the folder's
processor is the class that everyone expects (CLIPImageProcessor crops, SiglipImageProcessor stretches), and with
trust_remote_code=True the one that pads as in training.
"""
import pathlib

import numpy as np

from cloc_jax.interop import hf_cloc, hf_weights, tokenizer_json
from cloc_jax.interop.exported import HF_ACTS, Probe, Source, Target

_USE = '''```python
from transformers import AutoTokenizer, {model}
model, tokenizer = {model}.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)
```

{more} The model saw images whose long side was resized to {{size}} pixels and whose short side was padded with grey
(127). `AutoImageProcessor.from_pretrained(FOLDER, trust_remote_code=True)` does that; without trust_remote_code it is
`{processor}`, which {does}.'''
CLIP_USE = _USE.format(
    model='CLIPModel', processor='CLIPImageProcessor', does='crops the middle of an image that was not padded before',
    more='`CLIPVisionModel.from_pretrained(FOLDER)` is the image tower alone; LLaVA-1.5 and llava-hf take the folder '
    'as their vision tower.')
SIGLIP_USE = _USE.format(
    model='SiglipModel', processor='SiglipImageProcessor', does='stretches an image to a square',
    more='Texts are padded to full length: `tokenizer(texts, padding="max_length", truncation=True)`.')


def refuse_clip(source: Source) -> str | None:
  """Why a model is no CLIPModel, or None."""
  image, text = source.image, source.text
  if image.pool != 'tok':
    hint = 'try --to hf-siglip, or hf-cloc' if image.pool == 'map' else 'try --to hf-cloc'
    return f'CLIPModel pools a class token, this image tower pools by {image.pool!r}; {hint}'
  if text.pool != 'eos':
    return f"CLIPModel's text tower is causal and pools at the end token, this one pools by {text.pool!r}"
  if not image.out_dim:
    return 'CLIPModel projects the pooled image, this tower has no projection (out_dim is 0)'
  if text.eos_id == 2:
    return ('transformers takes eos_token_id 2 for an older rule, the place of the largest id; this tokenizer ends '
            'texts with 2')
  return None


def refuse_siglip(source: Source) -> str | None:
  """Why a model is no SiglipModel, or None."""
  image, text = source.image, source.text
  if image.pool != 'map':
    hint = 'try --to hf-clip, or hf-cloc' if image.pool == 'tok' else 'try --to hf-cloc'
    return f'SiglipModel pools by a MAP head, this image tower pools by {image.pool!r}; {hint}'
  if text.pool != 'last':
    return f"SiglipModel's text tower pools at the last position, this one pools by {text.pool!r}"
  if image.out_dim:
    return f'SiglipModel has no projection behind its image tower, this one projects to {image.out_dim}'
  return None


def config(source: Source, family: str) -> dict:
  """config.json of a CLIPModel ('clip') or SiglipModel ('siglip')."""
  v, (width, depth, heads) = source.image.sizes(), source.text.sizes()
  clip = family == 'clip'
  tokenizer, embed_dim = source.tokenizer, source.model.embed_dim
  vision = dict(
      model_type=f'{family}_vision_model', hidden_size=v.width, intermediate_size=v.mlp_dim, num_hidden_layers=v.depth,
      num_attention_heads=v.heads, image_size=source.image_size, patch_size=v.patch, num_channels=3,
      hidden_act=HF_ACTS[source.image.act], layer_norm_eps=source.image.ln_eps)
  text = dict(
      model_type=f'{family}_text_model', hidden_size=width, intermediate_size=source.text_mlp_dim,
      num_hidden_layers=depth, num_attention_heads=heads, vocab_size=source.text.vocab_size,
      max_position_embeddings=source.text.max_length, hidden_act=HF_ACTS[source.text.act],
      layer_norm_eps=source.text.ln_eps, bos_token_id=tokenizer.bos_id, eos_token_id=source.text.eos_id,
      pad_token_id=tokenizer.pad_id)
  if clip:
    more = dict(projection_dim=embed_dim, logit_scale_init_value=float(source.params['t']))
    vision['projection_dim'] = text['projection_dim'] = embed_dim
  else:
    more = {}
    text['projection_size'] = embed_dim
  return dict(architectures=['CLIPModel' if clip else 'SiglipModel'], model_type=family, dtype='float32',
              vision_config=vision, text_config=text, **more)


def write(source: Source, folder: pathlib.Path, *, family: str) -> None:
  """Writes the folder's files: weights, config, image processor, tokenizer."""
  from safetensors.numpy import save_file
  clip, size = family == 'clip', source.image_size
  save_file(hf_weights.from_jax(source.params, family=family), folder / 'model.safetensors',
            metadata={'format': 'pt'})
  hf_cloc.write_json(folder / 'config.json', config(source, family))
  square = {'height': size, 'width': size}
  stock = dict(image_processor_type='CLIPImageProcessor', size={'shortest_edge': size}, do_center_crop=True,
               crop_size=square) if clip else dict(image_processor_type='SiglipImageProcessor', size=square)
  hf_cloc.write_json(folder / 'preprocessor_config.json', dict(
      auto_map={'AutoImageProcessor': 'processing_cloc.ClocImageProcessor'}, do_convert_rgb=True, do_resize=True,
      resample=3, do_rescale=True, rescale_factor=1 / 255, do_normalize=True, **stock,
      **hf_cloc.image_settings(source)))
  hf_cloc.copy_code(folder, ('processing_cloc.py',))
  tokenizer_json.write(source.tokenizer, folder, length=source.text_length, pads_matter=not clip, clip_class=clip)


def outputs(source: Source, folder: pathlib.Path, probe: Probe, *, family: str) -> dict[str, np.ndarray]:
  """What the folder says of a probe, through transformers' own classes."""
  import torch
  import transformers
  clip = family == 'clip'
  both, alone = ((transformers.CLIPModel, transformers.CLIPVisionModel) if clip
                 else (transformers.SiglipModel, transformers.SiglipVisionModel))
  with hf_cloc.quiet():
    model, vision = both.from_pretrained(folder).eval(), alone.from_pretrained(folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  pixels = processor(probe.images)['pixel_values']

  def text(texts, length):
    ids = tokenizer(texts, padding='max_length', truncation=True, max_length=length, return_tensors='pt')['input_ids']
    z = model.get_text_features(input_ids=ids)
    return ids.numpy(), _unit(z)

  with torch.inference_mode():
    out = vision(pixel_values=pixels, output_hidden_states=True)
    tower = getattr(vision, 'vision_model', vision)
    tokens = tower.post_layernorm(out.last_hidden_state)[:, 1:] if clip else out.last_hidden_state
    text_ids, text_features = text(probe.texts, source.text_length)
    phrase_ids, phrase_features = text(probe.phrases, source.region_text_length)
    return {'pixel_values': pixels.numpy(), 'text_ids': text_ids, 'phrase_ids': phrase_ids,
            'image_tokens': tokens.numpy(), 'hidden_states': torch.stack(out.hidden_states).numpy(),
            'image_features': _unit(model.get_image_features(pixel_values=pixels)),
            'text_features': text_features, 'phrase_features': phrase_features}


def _unit(found) -> np.ndarray:
  import torch
  # transformers 5 wraps what transformers 4 returned bare.
  z = found if isinstance(found, torch.Tensor) else found.pooler_output
  return torch.nn.functional.normalize(z.float(), dim=-1).numpy()


def _target(name, family, refuse, use):
  return Target(name=name, refuse=refuse, use=use,
                how=f"transformers' {family} classes, in PyTorch, from images and texts",
                write=lambda source, folder: write(source, folder, family=family),
                outputs=lambda source, folder, probe: outputs(source, folder, probe, family=family))


CLIP = _target('hf-clip', 'clip', refuse_clip, CLIP_USE)
SIGLIP = _target('hf-siglip', 'siglip', refuse_siglip, SIGLIP_USE)
