"""A foreign model by one name: architecture, weights and tokenizer of hf:DIR, open_clip:, openai: or big_vision:FILE.

Only files are read: no network but for 'hf:OWNER/NAME', no code of theirs, and torch for .pt and .bin files alone.
"""
import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from cloc_jax.data import tokenizer as tokenizer_lib
from cloc_jax.interop import big_vision, hf_weights, huggingface, open_clip, openai, weight_files
from cloc_jax.interop.name_map import Converted
from cloc_jax.interop.spec import Spec

KINDS = ('hf', 'open_clip', 'openai', 'big_vision')


@dataclasses.dataclass(frozen=True)
class Source:
  """name: as the user wrote it. spec: the architecture. convert(expected=…, parts=…): reads the weights into our tree.

  tokenizer: None where the files hold none.
  """
  name: str
  spec: Spec
  convert: Callable[..., Converted]
  tokenizer: tokenizer_lib.Tokenizer | None


def is_foreign(name: str) -> bool:
  """Whether a name is one of KINDS and a colon; anything else is a checkpoint of ours."""
  return name.partition(':')[0] in KINDS and ':' in name


def open_source(name: str) -> Source:
  """Opens a foreign model. The weights are read by `convert` (before, where nothing else says how it is built).

  Raises:
    FileNotFoundError, ModuleNotFoundError, ValueError: naming the file and what is wrong.
  """
  kind, _, path = name.partition(':')
  if kind not in KINDS or not path:
    raise ValueError(f'{name!r}: expected one of {[f"{k}:PATH" for k in KINDS]}')
  return {'hf': _hugging_face, 'open_clip': _open_clip, 'openai': _openai, 'big_vision': _big_vision}[kind](name, path)


def _hugging_face(name, path):
  folder = pathlib.Path(path)
  if not folder.is_dir():
    folder = pathlib.Path(_from_hub(path))
  config = _json(folder / 'config.json')
  spec = hf_weights.spec(config, where=os.fspath(folder / 'config.json'))
  try:
    settings = huggingface.image_settings(lambda file: _if_there(folder / file), name=path)
    spec = dataclasses.replace(spec, mean=tuple(settings['image_mean']), std=tuple(settings['image_std']))
  except FileNotFoundError:
    spec = dataclasses.replace(spec, notes=(*spec.notes, f'no preprocessor_config.json: pixels are scaled as usual for '
                                            f'{spec.family}, mean {spec.mean}, std {spec.std}'))

  def convert(**options):
    state, where = weight_files.read_folder(folder)
    return hf_weights.to_jax(state, spec, where=where, **options)

  return Source(name, spec, convert, folder_tokenizer(folder, siglip=spec.siglip))


def _from_hub(path):
  if os.path.isabs(path) or path.startswith('.') or path.count('/') != 1:
    raise FileNotFoundError(f'hf:{path}: no such folder; a model of the hub is named OWNER/NAME')
  try:
    import huggingface_hub
  except ModuleNotFoundError as error:
    raise FileNotFoundError(f'hf:{path}: no such folder; a model of the hub needs huggingface_hub: '
                            "pip install 'cloc_jax[hf]'") from error
  try:
    return huggingface_hub.snapshot_download(path, allow_patterns=[
        '*.json', 'merges.txt', 'spiece.model', 'model*.safetensors', 'pytorch_model*.bin'])
  except Exception as error:  # the hub's library raises many kinds, of three packages
    raise FileNotFoundError(f'hf:{path}: {str(error).splitlines()[0]}') from error


def _open_clip(name, path):
  path = pathlib.Path(path)
  places = (path.with_suffix('.json'), path.parent / 'open_clip_config.json')
  config = next((place for place in places if place.is_file()), None)
  if not path.is_file():
    raise FileNotFoundError(f'{name}: no such file')
  if config is None:
    raise FileNotFoundError(
        f"{name}: no config beside it: heads and activation are not in the weights. Put the repository's "
        f"{places[1].name} there, or the model's own from open_clip/model_configs as {places[0].name}")
  spec = open_clip.spec(_json(config), where=os.fspath(config))
  convert = lambda **options: open_clip.to_jax(weight_files.read(path), spec, where=os.fspath(path), **options)
  return Source(name, spec, convert, folder_tokenizer(path.parent, siglip=spec.siglip, unescape=True))


def _openai(name, path):
  state = weight_files.read(path)
  spec = openai.spec(state, where=path)
  convert = lambda **options: openai.to_jax(state, spec, where=path, **options)
  return Source(name, spec, convert, folder_tokenizer(pathlib.Path(path).parent, siglip=False, unescape=True))


def _big_vision(name, path):
  state = weight_files.read(path)
  spec = big_vision.spec(state, where=path)
  convert = lambda **options: big_vision.to_jax(state, spec, where=path, **options)
  return Source(name, spec, convert, folder_tokenizer(pathlib.Path(path).parent, siglip=True))


# --- Tokenizers ---


def folder_tokenizer(folder: pathlib.Path, *, siglip: bool, unescape: bool = False) -> tokenizer_lib.Tokenizer | None:
  """The tokenizer that lies in a folder, with exactly its ids; None where there is none.

  siglip: texts are lower-cased first, whatever the files say: so were those it was trained on.
  unescape: entities such as '&amp;' are resolved, as OpenAI's and open_clip's code do and transformers' does not; of
  SigLIP's texts, punctuation is removed.

  Raises:
    ValueError: naming the file, when it is damaged or appends no end token.
  """
  settings = _json(folder / 'tokenizer_config.json') if (folder / 'tokenizer_config.json').is_file() else {}
  special = _json(folder / 'special_tokens_map.json') if (folder / 'special_tokens_map.json').is_file() else {}
  pad = _token(settings.get('pad_token') or special.get('pad_token'))
  sentencepiece, whole = folder / 'spiece.model', folder / 'tokenizer.json'
  gemma = any(word in settings.get('tokenizer_class', '') for word in ('Gemma', 'Siglip2'))
  if siglip and sentencepiece.is_file() and not gemma:
    return tokenizer_lib.load(f'siglip:{sentencepiece}', lowercase=settings.get('do_lower_case', True))
  if whole.is_file():
    steps = {(False, False): [], (False, True): ['html', 'spaces'], (True, False): ['lower'],
             (True, True): ['html', 'underscores', 'punctuation', 'lower', 'spaces']}[siglip, unescape]
    for key, value in (('add_eos_token', False), ('padding_side', 'left')):
      if siglip and settings.get(key) == value:
        raise ValueError(f'{folder / "tokenizer_config.json"}: {key}: {value!r}: SigLIP saw texts with an end token, '
                         'padded on the right')
    return tokenizer_lib.load_hugging_face(whole, steps=steps, pad=pad,
                                           bos=settings.get('add_bos_token') if siglip else None)
  if not siglip and (folder / 'vocab.json').is_file():
    return tokenizer_lib.load_clip(folder, steps=[*(['html'] if unescape else []), 'nfc', 'lower', 'spaces'],
                                   pad=pad or (None if unescape else '<|endoftext|>'))
  return None


def _token(value) -> str | None:
  return value.get('content') if isinstance(value, Mapping) else value


def _if_there(path):
  return path if path.is_file() else None


def _json(path: pathlib.Path) -> Any:
  try:
    found = json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError as error:
    raise FileNotFoundError(f'{path}: no such file') from error
  except ValueError as error:
    raise ValueError(f'{path}: expected JSON: {error}') from error
  if not isinstance(found, dict):
    raise ValueError(f'{path}: expected a JSON object, got {type(found).__name__}')
  return found
