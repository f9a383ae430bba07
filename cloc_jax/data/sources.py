"""Reading a data set's records back, one at a time and in any order."""
import difflib
import os
import re

from google.protobuf import message
import tensorflow_datasets as tfds

from cloc_jax.data import schema


# What a damaged record makes the reader (RuntimeError, OSError), protobuf, or our own decoding raise. A mistake in the
# code is none of these, and must not pass for data that may be masked.
_DAMAGE = (RuntimeError, OSError, ValueError, IndexError, message.DecodeError)


class RecordError(ValueError):
  """A record that cannot be read; the message names the data set, the split and the record."""


class RecordSource:
  """Random access to one split of a data set: `source[i]` is a schema.Example.

  Picklable: a worker process opens the files for itself.
  """

  def __init__(self, path: str | os.PathLike, *, split: str):
    """Opens a split.

    Args:
      path: the data set's folder.
      split: a split's name; TFDS's slices ('train[:100]', 'train[10%:]') and sums ('train+val') work too.

    Raises:
      FileNotFoundError: if there is no data set at `path`.
      ValueError: if it has no such split, if the split is empty, or if its records are not region-text records.
      FileNotFoundError: if files of the split are missing, naming them.
    """
    self.path = os.fspath(schema.check_dataset_dir(path))
    self.split = split
    self._open()

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index) -> schema.Example:
    """Raises RecordError if the record is damaged, IndexError beyond the end."""
    where = f'{self.path}, split {self.split!r}, record {int(index)}'
    if not 0 <= index < len(self):
      raise IndexError(f'{where}: the split has {len(self)}')
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
    _check_split(self.split, valid=list(builder.info.splits), path=self.path)
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
    # Our own decoding: TFDS's costs more than a small image's pixels do.
    self._records = builder.as_data_source(
        self.split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)


def _check_split(split, *, valid, path):
  for name in re.findall(r'(?:^|\+)\s*(\w*)', split):
    if name not in valid and name != 'all':
      near = difflib.get_close_matches(name, valid, n=1)
      hint = f'; did you mean {near[0]!r}?' if near else ''
      raise ValueError(f'{path} has no split {name!r}; it has {valid}{hint}')
