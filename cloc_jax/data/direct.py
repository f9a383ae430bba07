"""Reading JSONL, COCO's JSON and WebDataset archives as they are: the importers' examples, one at a time in any order.

Opening reads the annotations once into a table of compact arrays: COCO's boxes themselves, or where each JSONL line or
each file of an archive begins. Where that took long, the table is kept beside the source, if it may be written there.
"""
from collections.abc import Sequence
import dataclasses
import functools
import hashlib
import json
import logging
import os
import pathlib
import time
import types
from typing import Any
import zipfile

import numpy as np
import tensorflow_datasets as tfds

from cloc_jax.data import direct_formats as formats
from cloc_jax.data import location
from cloc_jax.data import schema
from cloc_jax.data import sources
from cloc_jax.data import spec as spec_lib
from cloc_jax.data import storage
from cloc_jax.data.importers import images
from cloc_jax.data.importers import counts as counts_lib
from cloc_jax.data.importers import progress as progress_lib

LAYOUT = 1  # of the kept tables
_KEEP_SECONDS = 5.0  # a table that took longer is kept
_NAMED = 10

_log = logging.getLogger('cloc_jax.data')


class DirectSource:
  """Random access to a split of files in another format; what sources.RecordSource is for a data set.

  Picklable, with its tables: a worker process reads no annotations.
  """

  def __init__(self, spec: spec_lib.Spec, *, split: str):
    opened = _open(spec)
    self.path, self.split = str(spec), split
    sizes = opened.meta.splits
    sources.check_split(split, valid=list(sizes), path=self.path)
    if split in sizes:
      self._parts = [(split, np.arange(sizes[split]))]
    else:
      infos = {name: types.SimpleNamespace(num_examples=size) for name, size in sizes.items()}
      found = tfds.core.ReadInstruction.from_spec('+'.join(sizes) if split == 'all' else split).to_absolute(infos)
      self._parts = [(part.splitname, np.arange(part.from_ or 0, sizes[part.splitname] if part.to is None else part.to))
                     for part in found]
    self._readers = {name: opened.readers[name] for name, _ in self._parts}
    self._ends = np.cumsum([len(indices) for _, indices in self._parts])
    if not len(self):
      raise ValueError(f'{self.path}: split {split!r} is empty')

  def __len__(self) -> int:
    return int(self._ends[-1])

  def __getitem__(self, index) -> schema.Example:
    """Raises RecordError if the record cannot be read or its image is missing; IndexError beyond the end; StorageError
    if a store fails."""
    return self.read(index, counts_lib.Counts())

  def read(self, index, report: counts_lib.Counts) -> schema.Example:
    """As source[index]; says in `report` what became of its boxes and captions, as an import does."""
    where = f'{self.path}, split {self.split!r}, record {int(index)}'
    if not 0 <= index < len(self):
      raise IndexError(f'{where}: the split has {len(self)}')
    part = int(np.searchsorted(self._ends, index, side='right'))
    name, indices = self._parts[part]
    place = int(indices[int(index) - (int(self._ends[part - 1]) if part else 0)])
    lost, boxes = len(report.lost), report.of('boxes', 'dropped', 'image lost')
    try:
      example = self._readers[name].read(place, report)
      if example is not None:
        schema.check_example(example)
    except storage.StorageError:  # a store that fails says nothing of its records, which must not be masked
      raise
    except (OSError, ValueError, TypeError) as error:
      raise sources.RecordError(f'{where}: {error}') from error
    if example is None:
      said = [f'image {image.name} is {image.reason}' for image in report.lost[lost:]] or ['its image is lost']
      error = sources.RecordError(f'{where}: {"; ".join(said)}')
      error.regions = report.of('boxes', 'dropped', 'image lost') - boxes
      raise error
    return example

  def __repr__(self) -> str:
    return f'DirectSource({self.path!r}, split={self.split!r})'


def read_meta(spec: spec_lib.Spec) -> schema.DatasetMeta:
  """As schema.read_meta. Under extra['counts'] is what was left out when the source was opened, by split."""
  return _open(spec).meta


# --- opening


@dataclasses.dataclass(frozen=True)
class _Opened:
  """readers: split → its records, see formats.READERS."""
  meta: schema.DatasetMeta
  readers: dict[str, Any]


def _open(spec):
  splits = spec.splits()
  made = formats.FORMATS[spec.format](spec, splits)
  wanted = {'layout': LAYOUT, 'spec': str(spec), 'splits': list(splits),
            'files': {os.fspath(path): storage.state(path) for path in made.files()}}
  return _opened(spec, json.dumps(wanted, sort_keys=True))


@functools.lru_cache(maxsize=8)
def _opened(spec, fingerprint) -> _Opened:
  """Opened once a process, for as long as no file of annotations changes."""
  splits = spec.splits()
  made = formats.FORMATS[spec.format](spec, splits)
  kept = _kept_at(made.files(), fingerprint)
  found = None if kept is None else _load(kept, fingerprint, made.table)
  if found is None:
    began = time.monotonic()
    counts = {name: counts_lib.Counts() for name in splits}
    with progress_lib.shown(True):
      tables = made.build(counts)
    meta = made.meta(tables)
    if kept is not None and time.monotonic() - began > _KEEP_SECONDS:
      _keep(kept, fingerprint, tables, meta, counts)
  else:
    tables, meta, counts = found
  readers = {}
  for name, table in tables.items():
    keep = made.present(name, table, counts[name])
    _check_missing(counts[name], spec, name)
    readers[name] = made.reader(name, table, keep)
  return _Opened(readers=readers, meta=dataclasses.replace(
      meta, splits={name: len(reader) for name, reader in readers.items()},
      extra={**meta.extra, 'counts': {name: found.to_json() for name, found in counts.items()}}))


def _check_missing(counts, spec, split):
  lost = counts.lost
  if not lost or spec.options.get('allow_missing'):
    return
  more = f'\n  … and {len(lost) - _NAMED} more' if len(lost) > _NAMED else ''
  raise FileNotFoundError(
      f'{spec}, split {split!r}: {len(lost)} images are missing; allow_missing=true leaves them out.\n  '
      + '\n  '.join(image.name for image in lost[:_NAMED]) + more)


# --- keeping tables: arrays in an .npz, everything else as JSON in one of them


def _kept_at(files: Sequence[str | os.PathLike], fingerprint: str) -> pathlib.Path | None:
  """Beside the first file; for a store's in the cache for data sets (location.py), nowhere without one."""
  first = storage.path(files[0])
  folder = os.environ.get(location.CACHE) if isinstance(first, storage.Remote) else first.parent
  name = hashlib.blake2b(json.loads(fingerprint)['spec'].encode(), digest_size=6).hexdigest()
  return pathlib.Path(folder, f'.{first.name}.cloc-{name}.npz') if folder else None


def _keep(path, fingerprint, tables, meta, counts):
  """Writes what `_load` reads; a folder that may not be written is no error."""
  arrays, plain = {}, {}
  for split, table in tables.items():
    plain[split] = {}
    for field in dataclasses.fields(table):
      value, name = getattr(table, field.name), f'{split}/{field.name}'
      if isinstance(value, np.ndarray):
        arrays[name] = value
      elif isinstance(value, images.Texts):
        arrays[f'{name}/bytes'], arrays[f'{name}/ends'] = value.to_arrays()
      else:
        plain[split][field.name] = value
  head = {'fingerprint': fingerprint, 'plain': plain, 'meta': dataclasses.asdict(meta),
          'counts': {name: found.to_json() for name, found in counts.items()}}
  arrays['head'] = np.frombuffer(json.dumps(head).encode(), np.uint8)
  partial = path.with_name(f'{path.name}.{os.getpid()}.tmp')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(partial, 'wb') as file:
      np.savez(file, **arrays)
    partial.replace(path)
  except OSError as error:
    _log.info('%s: not kept: %s', path, error)
    partial.unlink(missing_ok=True)


def _load(path, fingerprint, kind):
  """(tables, meta, counts) as they were kept, or None if there are none of the files as they are now."""
  try:
    with open(path, 'rb') as file, np.load(file, allow_pickle=False) as arrays:
      head = json.loads(arrays['head'].tobytes())
      if head['fingerprint'] != fingerprint:
        return None
      tables = {}
      for split, plain in head['plain'].items():
        values = {}
        for field in dataclasses.fields(kind):
          name = f'{split}/{field.name}'
          if field.name in plain:
            value = plain[field.name]
            values[field.name] = tuple(value) if isinstance(value, list) else value
          elif name in arrays:
            values[field.name] = arrays[name]
          else:
            values[field.name] = images.Texts.from_arrays(arrays[f'{name}/bytes'], arrays[f'{name}/ends'])
        tables[split] = kind(**values)
  except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
    return None  # not there, cut off, or of another version: it is made anew
  meta = {key: tuple(value) if isinstance(value, list) else value for key, value in head['meta'].items()}
  return (tables, schema.DatasetMeta(**meta),
          {name: counts_lib.Counts.from_json(found) for name, found in head['counts'].items()})
