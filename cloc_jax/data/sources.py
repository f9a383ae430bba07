"""Opening what is named as a data set: a folder made by `cloc data`, or files that are read as they are (spec.py).

Everything that reads records, or what a data set says of itself, opens it here.
"""
from collections.abc import Iterator
import difflib
import os
import re

from google.protobuf import message
import tensorflow_datasets as tfds

from cloc_jax.data import location
from cloc_jax.data import schema
from cloc_jax.data import spec as spec_lib
from cloc_jax.data.importers import record_files


# What a damaged record makes the reader (RuntimeError, OSError), protobuf, or our own decoding raise. A mistake in the
# code is none of these, and must not pass for data that may be masked.
_DAMAGE = (RuntimeError, OSError, ValueError, IndexError, message.DecodeError)


class RecordError(ValueError):
  """A record that cannot be read; the message names the data set, the split and the record.

  regions: how many it had, where annotations outside of it say so.
  """
  regions = 0


def open_source(data: spec_lib.Data, *, split: str):
  """Random access to one split: `source[i]` is a schema.Example, or raises RecordError.

  Args:
    data: a folder, or a text or dictionary as spec.parse takes them.
    split: a split's name; TFDS's slices ('train[:100]', 'train[10%:]') and sums ('train+val') work too.

  Returns:
    A RecordSource, or a direct.DirectSource. Both are picklable.

  Raises:
    FileNotFoundError: no data set there, or files of it are missing, naming them.
    ValueError: a wrong name, no such split, an empty one, or not what the format promises.
  """
  spec = spec_lib.parse(data)
  if spec is None:
    return RecordSource(data, split=split)
  from cloc_jax.data import direct  # the importers, which a folder does not need
  return direct.DirectSource(spec, split=split)


def read_meta(data: spec_lib.Data) -> schema.DatasetMeta:
  """What a data set says of itself, named as in open_source; raises as that does."""
  spec = spec_lib.parse(data)
  if spec is None:
    return schema.read_meta(data)
  from cloc_jax.data import direct
  return direct.read_meta(spec)


class RecordSource:
  """Random access to one split of a data set: `source[i]` is a schema.Example.

  Picklable: a worker process opens the files for itself.
  """

  def __init__(self, path: str | os.PathLike, *, split: str):
    """Opens a split.

    Args:
      path: the data set's folder, or its URL (see location.check_dataset_dir).
      split: a split's name; TFDS's slices ('train[:100]', 'train[10%:]') and sums ('train+val') work too.

    Raises:
      FileNotFoundError: if there is no data set at `path`.
      ValueError: if it has no such split, if the split is empty, or if its records are not region-text records.
      FileNotFoundError: if files of the split are missing, naming them.
    """
    self.path = os.fspath(location.check_dataset_dir(path))
    self.split = split
    self._open()

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index) -> schema.Example:
    """Raises RecordError if the record is damaged, IndexError beyond the end."""
    where = f'{self._where}{int(index)}'
    if not 0 <= index < self._length:
      raise IndexError(f'{where}: the split has {self._length}')
    try:
      return schema.decode(self._records[index], where=where)
    except _DAMAGE as error:
      said = str(error)
      raise RecordError(said if said.startswith(where) else f'{where}: {said}') from error

  def __repr__(self) -> str:
    return f'RecordSource({self.path!r}, split={self.split!r})'

  def __getstate__(self):
    return {'path': self.path, 'split': self.split}

  def __setstate__(self, state):
    self.__dict__.update(state)
    self._open()

  def _open(self):
    builder = tfds.builder_from_directory(self.path)
    check_split(self.split, valid=list(builder.info.splits), path=self.path)
    missing = sorted(set(schema.features()) - set(builder.info.features))
    if missing:
      raise ValueError(f'{self.path} is not a region-text data set: its records lack {missing}; '
                       f'they hold {sorted(builder.info.features)}')
    if not builder.info.splits[self.split].num_examples:
      raise ValueError(f'{self.path}: split {self.split!r} is empty')
    gone = sorted(set(builder.info.splits[self.split].filenames) - set(os.listdir(self.path)))
    if gone:
      raise FileNotFoundError(f'{self.path}: split {self.split!r} lacks {len(gone)} of its files: {", ".join(gone[:3])}'
                              + (' …' if len(gone) > 3 else ''))
    # The bytes, and our own decoding: TFDS's costs more than a small image's pixels do.
    self._records = record_files.ArrayRecords([
        (os.fspath(part.filename), part.skip, part.take) for part in builder.info.splits[self.split].file_instructions])
    self._length, self._where = len(self._records), f'{self.path}, split {self.split!r}, record '


def read_shard(path: str | os.PathLike) -> Iterator[schema.Example]:
  """The records of one ArrayRecord file of ours, in order.

  Raises:
    RecordError: the file cannot be read, or one of its records.
  """
  path = os.fspath(path)
  try:
    for index, record in enumerate(record_files.array_records(path)):
      yield schema.decode(record, where=f'{path}, record {index}')
  except _DAMAGE as error:
    raise RecordError(str(error) if path in str(error) else f'{path}: {error}') from error


def check_split(split: str, *, valid, path) -> None:
  """Raises ValueError, naming the nearest, if a split, slice or sum names one that is not among `valid`."""
  for name in re.findall(r'(?:^|\+)\s*(\w*)', split):
    if name not in valid and name != 'all':
      near = difflib.get_close_matches(name, valid, n=1)
      hint = f'; did you mean {near[0]!r}?' if near else ''
      raise ValueError(f'{path} has no split {name!r}; it has {valid}{hint}')
