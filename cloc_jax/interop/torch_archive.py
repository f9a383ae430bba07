"""State of a TorchScript archive, such as OpenAI's CLIP .pt files, without running anything of it.

`torch.load(weights_only=True)` refuses these, and `torch.jit.load` would compile and hold the program inside. But the
archive is a zip: a pickle of the module tree (data.pkl), and one raw file a storage (data/KEY). A pickle is read here
that may name nothing but tensors, storages and lists; the module classes become bare holders of their attributes.
"""
import collections
import io
import os
import pickle
import zipfile

import ml_dtypes
import numpy as np

_STORAGES = {'FloatStorage': np.float32, 'HalfStorage': np.float16, 'BFloat16Storage': ml_dtypes.bfloat16,
             'DoubleStorage': np.float64, 'LongStorage': np.int64, 'IntStorage': np.int32, 'ShortStorage': np.int16,
             'CharStorage': np.int8, 'ByteStorage': np.uint8, 'BoolStorage': np.bool_}
_LISTS = ('build_intlist', 'build_doublelist', 'build_boollist', 'build_tensorlist')


class ArchiveError(ValueError):
  """The archive is damaged, or its pickle names what no weights need."""


def is_torchscript(path: str | os.PathLike) -> bool:
  """Whether a file is a TorchScript archive: a zip that holds constants.pkl and code beside its data."""
  try:
    with zipfile.ZipFile(path) as archive:
      names = archive.namelist()
  except (zipfile.BadZipFile, OSError):
    return False
  return any(name.endswith('/constants.pkl') for name in names) and any('/code/' in name for name in names)


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """'visual.conv1.weight' → array, for every tensor and number that a module holds.

  Raises:
    ArchiveError: naming the file and what is wrong.
  """
  try:
    with zipfile.ZipFile(path) as archive:
      root = next(name for name in archive.namelist() if name.endswith('/data.pkl'))[:-len('data.pkl')]
      module = _Unpickler(archive, root).load()
      return dict(_attributes(module))
  except ArchiveError as error:
    raise ArchiveError(f'{path}: {error}') from error
  except (zipfile.BadZipFile, StopIteration, KeyError, pickle.UnpicklingError, EOFError, ValueError, TypeError,
          IndexError, AttributeError) as error:
    raise ArchiveError(f'{path}: a damaged TorchScript archive: {type(error).__name__}: {error}') from error


class _Module:
  """A module of the archive: attributes, no code."""

  def __setstate__(self, state):
    self.attributes = state


class _Unpickler(pickle.Unpickler):

  def __init__(self, archive, root):
    super().__init__(io.BytesIO(archive.read(f'{root}data.pkl')))
    self._archive, self._root, self._classes = archive, root, {}

  def find_class(self, module, name):
    if module.partition('.')[0] == '__torch__':
      return self._classes.setdefault((module, name), type(name, (_Module,), {}))
    if module == 'torch' and name in _STORAGES:
      return _STORAGES[name]
    if (module, name) == ('torch._utils', '_rebuild_tensor_v2'):
      return _tensor
    if (module, name) == ('collections', 'OrderedDict'):
      return collections.OrderedDict
    if module == 'torch.jit._pickle' and name in _LISTS:
      return list
    if (module, name) == ('torch.jit._pickle', 'restore_type_tag'):
      return lambda value, type_name: value
    raise ArchiveError(f'its pickle names {module}.{name}, which no weights need; it is not read')

  def persistent_load(self, pid):
    if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == 'storage'):
      raise ArchiveError(f'its pickle refers to {pid!r:.80}; expected a storage')
    _, dtype, key, _, count = pid
    data = self._archive.read(f'{self._root}data/{key}')  # zipfile checks its CRC
    if len(data) < count * np.dtype(dtype).itemsize:
      raise ArchiveError(f'storage {key} holds {len(data)} bytes, expected {count} × {np.dtype(dtype).itemsize}')
    return np.frombuffer(data, dtype)


def _tensor(storage, offset, size, stride, *_):
  last = offset + sum((n - 1) * s for n, s in zip(size, stride)) if all(size) else offset
  if min((offset, *size, *stride)) < 0 or (all(size) and last >= len(storage)):
    raise ArchiveError(f'a tensor of shape {tuple(size)} reaches out of its storage of {len(storage)} numbers')
  strides = [s * storage.itemsize for s in stride]
  return np.lib.stride_tricks.as_strided(storage[offset:], size, strides, writeable=False)


def _attributes(module, prefix=''):
  for name, value in module.attributes.items():
    if isinstance(value, _Module):
      yield from _attributes(value, f'{prefix}{name}.')
    elif isinstance(value, np.ndarray):
      yield f'{prefix}{name}', value
