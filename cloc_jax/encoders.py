"""Which encoder is evaluated, and how it embeds a region: ours and others', in the form that the evaluators take."""
import dataclasses
import os
from typing import Any

import jax

from cloc_jax import evaluators, inference, initialize, sharding
from cloc_jax.evaluators import EncoderFns
from cloc_jax.interop import source

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


def load(spec: str, *, step: int | None = None, tokenizer: str | None = None,
         mesh: jax.sharding.Mesh | None = None) -> Encoder:
  """Opens an encoder.

  Args:
    spec: 'hf:DIR' or 'hf:OWNER/NAME', a CLIP, SigLIP or SigLIP 2 of Hugging Face, run by transformers;
      'open_clip:FILE', 'openai:FILE' or 'big_vision:FILE', imported into our model; anything else is one of our
      checkpoints.
    tokenizer: KIND:PATH, for an imported one that has none beside it.
    step: of our checkpoint; the newest by default.
    mesh: our checkpoints split each batch over its devices.

  Raises:
    FileNotFoundError, ValueError, ModuleNotFoundError: saying what is missing.
  """
  kind, _, name = spec.partition(':')
  foreign = source.is_foreign(spec)
  if foreign:
    if step is not None:
      raise ValueError(f'--step belongs to our checkpoints; {spec!r} has no steps')
    if not name:
      raise ValueError(f'{spec!r}: expected {kind}:NAME')
    if kind == 'hf':
      return _hugging_face(name)
  elif tokenizer:
    raise ValueError(f'--tokenizer belongs to imported encoders; {spec!r} has its own')
  cloc = initialize.import_model(spec, tokenizer=tokenizer)[0] if foreign else inference.load(spec, step=step)
  functions, params = cloc.functions, cloc.params
  if mesh is not None:
    functions = inference.Functions(functions.model, tokenizer=functions.tokenizer,
                                    preprocessing=functions.preprocessing, mesh=mesh)
    params = jax.device_put(params, sharding.replicated(mesh))
  encoder = of_functions(functions, params)
  if foreign:
    return dataclasses.replace(encoder, info={
        'encoder': f'{kind}:{os.path.abspath(name)}', 'image_size': encoder.image_size,
        'preprocessing': f"{_PAD_RESIZE}; not as in the model's own: figures of whole images differ from published "
                         'ones'})
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
