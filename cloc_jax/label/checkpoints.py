"""Hugging Face checkpoints for the label stages: found, named, loaded whole, and run so that one image fails alone."""
from collections.abc import Callable, Sequence
import hashlib
import importlib.util
import json
import os
import pathlib
from typing import Any

_SAMPLE, _SAMPLES = 1 << 16, 32  # bytes read at each of so many places of a file for its fingerprint


class Lazy:
  """A stage with a model that is loaded at first use, in the process that uses it.

  A subclass's `load` sets `model`; what else it sets is private (one underscore). Pickles hold neither.
  """
  model: Any = None
  _failure: Exception | None = None

  def open(self) -> None:
    """Loads the model if need be. A failure is not tried again: a hub that cannot be reached takes half a minute."""
    if self._failure is not None:
      raise self._failure
    if self.model is None:
      try:
        self.load()
      except Exception as error:
        self._failure = error
        raise

  def load(self) -> None:
    """Sets self.model, and what else is needed beside it."""
    raise NotImplementedError

  def __getstate__(self):
    return {key: value for key, value in self.__dict__.items() if key != 'model' and not key.startswith('_')}


def version(name: str, **settings) -> str:
  """A stage's version: `name`, then its settings; texts of more than one word as a hash."""
  shown = []
  for key, value in settings.items():
    if value is None:
      continue
    value = str(value)
    shown.append(f'{key}={_digest(value.encode()) if len(value.split()) != 1 else value}')
  return ' '.join([name, *shown])


def identify(name: str, *, revision: str | None = None) -> str:
  """What stands for a checkpoint in a version: the folder's last name and a fingerprint of its files, or NAME@REVISION.

  The fingerprint covers names, sizes and samples of every file, so weights that were trained on are told apart.

  Raises:
    FileNotFoundError: if `name` is a path and no folder with a config.json is there.
    ImportError: without torch or transformers, so that it is said before anything is read.
  """
  if lacking := [package for package in ('torch', 'transformers') if importlib.util.find_spec(package) is None]:
    raise ImportError(f"{name}: models of Hugging Face need {' and '.join(lacking)}: pip install 'cloc_jax[label]'")
  folder = pathlib.Path(name)
  if not folder.is_dir():
    if _is_path(name):
      raise FileNotFoundError(f'{name}: no such folder. {_HOW}')
    return f'{name}@{revision or "main"}'
  if not (folder / 'config.json').is_file():
    raise FileNotFoundError(f'{folder}: expected a model folder with config.json, found '
                            f'{sorted(p.name for p in folder.iterdir())[:8]}. {_HOW}')
  digest = hashlib.sha256()
  for path in sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith('.')):
    size = path.stat().st_size
    digest.update(json.dumps([path.name, size]).encode())
    with path.open('rb') as file:
      for place in sorted({max(0, size - _SAMPLE) * k // _SAMPLES for k in range(_SAMPLES + 1)}):
        file.seek(place)
        digest.update(file.read(_SAMPLE))
  return f'{folder.resolve().name}@{digest.hexdigest()[:12]}'


_HOW = ('Place the checkpoint as transformers lays it out into a folder (config.json, model.safetensors, the files of '
        'tokenizer and preprocessor), for example where there is a network with '
        '`hf download OWNER/NAME --local-dir FOLDER`, and name that folder')


def load(auto_class: str, name: str, *, revision: str | None = None, **options) -> Any:
  """`transformers.<auto_class>.from_pretrained`, with errors that say what to do.

  Args:
    auto_class: such as 'AutoModelForCausalLM'; a model must find every one of its weights in the checkpoint.
    name: a folder, or OWNER/NAME on the hub.

  Raises:
    FileNotFoundError: if it is neither here nor to be had from the hub. ValueError: if weights are missing.
  """
  import transformers
  transformers.utils.logging.disable_progress_bar()  # a bar a worker says nothing
  is_model = auto_class.startswith('AutoModel')
  if is_model:
    options['output_loading_info'] = True
  try:
    loaded = getattr(transformers, auto_class).from_pretrained(name, revision=revision or 'main', **options)
  except OSError as error:  # transformers' and the hub's errors for files that are not there, or not to be reached
    where = 'the folder is not complete' if pathlib.Path(name).is_dir() else 'not here, and not to be had from the hub'
    raise FileNotFoundError(f'{name}: {auto_class}: {where}: {_first_line(error)}. {_HOW}') from error
  if not is_model:
    return loaded
  model, info = loaded
  if missing := sorted(info['missing_keys']):
    raise ValueError(f'{name}: the checkpoint lacks {len(missing)} of the weights of a {type(model).__name__}, such '
                     f'as {missing[:3]}: they would be random')
  return model.eval()


def device_and_dtype(device: str | None, dtype: str | None):
  """(torch.device, torch.dtype): the accelerator if there is one; bfloat16 there and float32 on a CPU by default.

  Raises:
    ValueError: on an unknown dtype.
  """
  import torch
  if device is None:
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
  dtypes = ('float32', 'bfloat16', 'float16')
  dtype = dtype or ('float32' if torch.device(device).type == 'cpu' else 'bfloat16')
  if dtype not in dtypes:
    raise ValueError(f'dtype: expected one of {dtypes}, got {dtype!r}')
  return torch.device(device), getattr(torch, dtype)


def each_alone(run: Callable[[list], Sequence], items: Sequence) -> list:
  """`run(items)`; if that raises, each half by itself, and so on: one result an item, or the exception it raised.

  So a batch that is too large for the memory goes through in parts, and an image that breaks the model breaks no other.
  """
  items = list(items)
  try:
    results = list(run(items))
  except Exception as error:  # whatever a model raises, it is reported for that image
    if len(items) == 1:
      return [error.with_traceback(None)]
    _free_memory()
    middle = len(items) // 2
    return each_alone(run, items[:middle]) + each_alone(run, items[middle:])
  if len(results) != len(items):
    raise AssertionError(f'expected {len(items)} results, got {len(results)}')
  return results


def _free_memory():
  import sys
  torch = sys.modules.get('torch')
  if torch is not None and torch.cuda.is_available():
    torch.cuda.empty_cache()


def _is_path(name):
  return name.startswith(('.', '/', '~')) or os.sep in name and name.count('/') != 1


def _digest(data):
  return hashlib.sha256(data).hexdigest()[:8]


def _first_line(error):
  return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip('.')
