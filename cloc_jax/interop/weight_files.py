"""Weights from files: safetensors, torch's .pt and .bin, TorchScript archives, npz. Nothing in a file is executed."""
import json
import os
import pathlib
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from cloc_jax.interop import torch_archive

_SHARDS = ('model.safetensors.index.json', 'pytorch_model.bin.index.json')
_WHOLE = ('model.safetensors', 'open_clip_model.safetensors', 'pytorch_model.bin', 'open_clip_pytorch_model.bin')


def read(path: str | os.PathLike) -> Mapping[str, np.ndarray]:
  """Name → array, in the file's own dtype; by the file's suffix.

  Raises:
    FileNotFoundError: when there is no such file. ModuleNotFoundError: a .pt or .bin file without torch.
    ValueError: naming the file, when it is damaged, cut short, or of another kind.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f'{path}: {"is a folder; name the file in it" if path.is_dir() else "no such file"}')
  readers = {'.safetensors': _safetensors, '.npz': _npz, '.pt': _torch, '.pth': _torch, '.bin': _torch}
  if path.suffix not in readers:
    raise ValueError(f'{path}: expected weights with one of the suffixes {", ".join(readers)}')
  return readers[path.suffix](path)


def read_folder(folder: str | os.PathLike) -> tuple[Mapping[str, np.ndarray], str]:
  """(name → array, what was read) of a folder as Hugging Face lays it out: one file, or shards with an index.

  Raises:
    FileNotFoundError: when it holds no weights, or lacks a shard. ValueError: as `read`; shards that lack a name.
  """
  folder = pathlib.Path(folder)
  for name in _WHOLE:
    if (folder / name).is_file():
      return read(folder / name), os.fspath(folder / name)
  for name in _SHARDS:
    if (folder / name).is_file():
      return _shards(folder / name), os.fspath(folder / name)
  held = sorted(p.name for p in folder.iterdir())[:12] if folder.is_dir() else 'nothing: there is no such folder'
  raise FileNotFoundError(f'{folder}: no weights; looked for {", ".join((*_WHOLE, *_SHARDS))}; it holds {held}')


def _shards(index):
  try:
    places = json.loads(index.read_text(encoding='utf-8'))['weight_map']
    files = sorted(set(places.values()))
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(f'{index}: expected JSON with weight_map {{NAME: FILE}}: {error!r}') from error
  state = {}
  for file in files:
    if pathlib.Path(file).name != file:
      raise ValueError(f'{index}: weight_map: expected names of files beside it, got {file!r}')
    state |= read(index.parent / file)
  missing = sorted(set(places) - set(state))
  if missing:
    raise ValueError(f'{index}: {len(missing)} arrays are in no shard, such as {missing[:3]}')
  return state


def _safetensors(path):
  import safetensors
  try:
    # ml_dtypes, imported above, tells NumPy what bfloat16 is.
    with safetensors.safe_open(path, framework='numpy') as file:
      return {name: file.get_tensor(name) for name in file.keys()}
  except (safetensors.SafetensorError, TypeError) as error:
    raise ValueError(f'{path}: a damaged or cut safetensors file, or with numbers that NumPy has not: {error}') from error


def _npz(path):
  try:
    with open(path, 'rb') as raw, np.load(raw, allow_pickle=False) as file:
      state = {}
      for name in file.files:
        try:
          state[name] = file[name]
        except ValueError as error:
          raise ValueError(f'{name}: {error}') from error
  except Exception as error:  # zipfile, zlib, struct and NumPy each raise their own kinds on damage
    raise ValueError(f'{path}: a damaged or cut npz file: {error}') from error
  # NumPy itself writes bfloat16 as two bytes without a meaning.
  return {name: x.view(ml_dtypes.bfloat16) if x.dtype.kind == 'V' and x.dtype.itemsize == 2 else x
          for name, x in state.items()}


def _torch(path):
  if torch_archive.is_torchscript(path):
    return torch_archive.read(path)
  try:
    import torch
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{path} needs torch to be read (pip install 'cloc_jax[hf]'); a .safetensors file of the "
                              'same weights does not') from error
  try:
    found = torch.load(path, map_location='cpu', weights_only=True)
  except Exception as error:  # torch raises UnpicklingError, RuntimeError, EOFError, … on damage and on refused content
    reason = str(error).strip().splitlines()
    raise ValueError(f'{path}: cannot be read as plain weights (damaged, or it holds more than tensors, which is not '
                     f'run here; use a .safetensors file): {reason[0] if reason else type(error).__name__}') from error
  for wrapper in ('state_dict', 'model'):  # open_clip's training checkpoints, and others'
    if isinstance(found, dict) and isinstance(found.get(wrapper), dict):
      found = found[wrapper]
  if not isinstance(found, dict) or not found:
    raise ValueError(f'{path}: expected a state dict, got {type(found).__name__}')
  strange = [name for name, x in found.items() if not isinstance(x, torch.Tensor)]
  if strange:
    raise ValueError(f'{path}: {strange[0]}: expected a tensor, got {type(found[strange[0]]).__name__}')
  wrapped = all(name.startswith('module.') for name in found)  # DistributedDataParallel
  as_numpy = lambda x: (x.view(torch.uint16).numpy().view(ml_dtypes.bfloat16) if x.dtype == torch.bfloat16
                        else x.numpy())
  return {name.removeprefix('module.') if wrapped else name: as_numpy(x.detach().contiguous())
          for name, x in found.items()}
