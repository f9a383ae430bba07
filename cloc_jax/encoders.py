"""Which encoder is evaluated, and how it embeds a region: ours and others', in the form that the evaluators take."""
import dataclasses
import os
from typing import Any

import jax

from cloc_jax import evaluators, inference, sharding
from cloc_jax.evaluators import EncoderFns

# 'model' is whatever region branch the model has of its own.
REGION_EMBEDDINGS = ('model', 'prompter', 'roi', 'mask-pool', 'crop')
_PAD_RESIZE = 'the long side resized, the short side padded with grey'


@dataclasses.dataclass(frozen=True)
class Encoder:
  """An encoder as the evaluators take it.

  fns: the functions. image_size, pad: of the canvases they take. info: JSON values for the reports. trained_on: the
  path of its training data, '' where that is not known. devices: the size of a batch is a multiple of them.
  """
  fns: EncoderFns
  image_size: int
  pad: str
  info: dict[str, Any]
  trained_on: str = ''
  devices: int = 1


def of_functions(functions: inference.Functions, params) -> Encoder:
  """One of our models; its regions by its own branch."""
  p = functions.preprocessing
  return Encoder(fns=functions.encoder_fns(params), image_size=p.image_size, pad=p.pad, devices=functions.devices,
                 info={'region_embedding': 'model', 'region_branch': functions.model.region_encoder})


def load(spec: str, *, step: int | None = None, mesh: jax.sharding.Mesh | None = None) -> Encoder:
  """Opens an encoder.

  Args:
    spec: 'hf:DIR' or 'hf:OWNER/NAME', a CLIP, SigLIP or SigLIP 2 of Hugging Face; 'open_clip:FILE'; anything else is
      one of our checkpoints.
    step: of our checkpoint; the newest by default.
    mesh: our checkpoints split each batch over its devices.

  Raises:
    FileNotFoundError, ValueError, ModuleNotFoundError: saying what is missing.
  """
  kind, colon, name = spec.partition(':')
  if colon and kind in ('hf', 'open_clip'):
    if step is not None:
      raise ValueError(f'--step belongs to our checkpoints; {spec!r} has no steps')
    if not name:
      raise ValueError(f'{spec!r}: expected {kind}:NAME')
    return _hugging_face(name) if kind == 'hf' else _open_clip(name)
  cloc = inference.load(spec, step=step)
  functions, params = cloc.functions, cloc.params
  if mesh is not None:
    functions = inference.Functions(functions.model, tokenizer=functions.tokenizer,
                                    preprocessing=functions.preprocessing, mesh=mesh)
    params = jax.device_put(params, sharding.replicated(mesh))
  encoder = of_functions(functions, params)
  return dataclasses.replace(encoder, trained_on=cloc.info['config']['data'].get('path') or '',
                             info={'encoder': cloc.info['path'], 'step': cloc.info['step'], **encoder.info})


def with_regions(encoder: Encoder, how: str | None) -> Encoder:
  """The same encoder with its regions embedded by `how`, one of REGION_EMBEDDINGS.

  None is its own region branch, and 'roi' for an encoder that has none.

  Raises:
    ValueError: on an unknown `how`, or one that this encoder cannot do.
  """
  fns, own = encoder.fns, encoder.info.get('region_branch')
  if how is None:
    how = 'model' if own is not None else 'roi'
  if how not in REGION_EMBEDDINGS:
    raise ValueError(f'region_embedding: expected one of {REGION_EMBEDDINGS}, got {how!r}')
  if how == 'crop':
    fns = evaluators.crop_regions(fns, encoder.image_size)
  elif how in ('roi', 'mask-pool'):
    fns = evaluators.pooled_regions(fns, how)
  elif own is None or (how == 'prompter' and own != 'prompter'):
    branch = 'no region branch' if own in (None, 'none') else f'the region branch {own!r}'
    raise ValueError(f'region_embedding: {how!r} needs a model with a Prompter; this one has {branch}: choose roi, '
                     'mask-pool or crop')
  return dataclasses.replace(encoder, fns=fns, info={**encoder.info, 'region_embedding': how})


def _hugging_face(name: str) -> Encoder:
  from cloc_jax.interop import huggingface
  model = huggingface.load(name)
  fns = EncoderFns(
      encode_image=model.encode_image, image_embedding=lambda image: image.z, embed_regions=None,
      encode_text=lambda texts, *, region: model.encode_text(texts), ground=None, embed_patches=model.embed_patches)
  usual = {'clip': 'shorter side resized, centre cropped', 'siglip': 'stretched to a square',
           'siglip2': 'as many patches as fit the aspect ratio'}[model.model_type]
  return Encoder(fns=fns, image_size=model.image_size, pad='center', info={
      'encoder': f'hf:{os.path.abspath(name) if os.path.isdir(name) else name}', 'model_type': model.model_type,
      'image_size': model.image_size,
      'preprocessing': f"{_PAD_RESIZE}, so that every box is on the canvas; not as in the model's own ({usual}): "
                       'figures of whole images differ from published ones'})


def _open_clip(name: str) -> Encoder:
  raise ValueError(
      f'open_clip:{name}: the open_clip package needs torchvision, and is not used here; use the model as a folder in '
      "transformers' layout, --encoder hf:DIR (config.json, weights, tokenizer, preprocessor_config.json). LAION's "
      'repositories on the hub hold both layouts, so that hf:laion/CLIP-ViT-B-16-laion2B-s34B-b88K works; for weights '
      'of your own, rename them to those of transformers.CLIPModel and save that with save_pretrained')
