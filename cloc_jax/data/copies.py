"""Copies of finished data sets: from a store to a disk, from a disk to a store, or within either.

A copy is made file by file, several at a time, and goes on where it was interrupted. The file that makes a folder a data
set comes last, so that whoever sees it sees all. A note in the folder says where the files are from and what state they
had there: from it one knows files that have changed at the source without a change of size.
"""
from collections.abc import Callable
from concurrent import futures
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import threading

import tensorflow_datasets as tfds

from cloc_jax.data import storage
from cloc_jax.data.importers import record_files

INFO_FILE = 'dataset_info.json'  # a folder with it is a data set
NOTE_FILE = '.cloc_copy.json'
_IN_FLIGHT = 8
_NAMED = 3


@dataclasses.dataclass(frozen=True)
class Copied:
  """What `copy` did: numbers of files and bytes, without the note. kept: files that were there already."""
  files: int
  bytes: int
  kept: int


@dataclasses.dataclass(frozen=True)
class Contents:
  """A finished data set's files. files: name → its size and state. shards: name → records that it should hold."""
  files: dict[str, storage.Entry]
  shards: dict[str, int]

  def lie_in(self, folder: storage.Path) -> bool:
    """Whether a folder holds a whole data set with files of these sizes."""
    there = storage.files(folder)
    return all(name in there and there[name].size == file.size for name, file in self.files.items())


def contents(source: storage.Path) -> Contents:
  """What a finished data set consists of; its store is asked for one list and one file.

  Raises:
    FileNotFoundError: there is no data set. ValueError: it lacks files, naming them, or is not to be understood.
  """
  files = storage.files(source)
  if INFO_FILE not in files:
    inside = sorted(name.removesuffix(f'/{INFO_FILE}') for name in files if name.endswith(f'/{INFO_FILE}'))
    hint = (f'it holds these data sets: {", ".join(f"{source}/{name}" for name in inside[:_NAMED])}' if inside else
            'was its writing interrupted?' if files else 'there is nothing of that name')
    raise FileNotFoundError(f'{source} is not a data set (no {INFO_FILE} in it); {hint}')
  try:
    shards = _shards(json.loads((source / INFO_FILE).read_text(encoding='utf-8')))
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(f'{source / INFO_FILE} is damaged, or not of a data set: {type(error).__name__}: {error}') from error
  gone = sorted(set(shards) - set(files))
  if gone:
    raise ValueError(f'{source} is incomplete: {len(gone)} of its {len(shards)} files of records are missing: '
                     + _some(gone))
  return Contents(files, shards)


def copy(source: str | os.PathLike, target: str | os.PathLike, *, overwrite: bool = False,
         progress: Callable[[int, int], None] | None = None) -> Copied:
  """Copies a finished data set, or goes on copying it: whole files are taken over if source, size and state agree.

  Args:
    source, target: folders on a disk or URLs of them.
    overwrite: replace another data set at `target`, or an older state of this one.
    progress: called with (bytes there, bytes in all) from several threads, one at a time.

  Raises:
    FileNotFoundError, ValueError: `source` is no whole data set; files of it, or what is missing, are named.
    FileExistsError: `target` holds something else, or an older state, without `overwrite`.
    StorageError: not enough space, or a store or connection failed; what has arrived is kept.
  """
  source, target = _path(source), _path(target)
  if source == target:
    raise ValueError(f'{source}: copied onto itself')
  found = contents(source)
  if isinstance(source, pathlib.Path):
    _check_records(source, found.shards)
  there = storage.files(target)
  stale = _stale(source, target, found, there, overwrite=overwrite)
  keep = {name for name, file in found.files.items()
          if name in there and there[name].size == file.size and name not in stale}
  todo = [name for name in found.files if name not in keep]
  strays = sorted(set(there) - set(found.files) - {INFO_FILE}) if overwrite else []
  # Before anything is touched. The note and the smallest files need blocks of their own.
  needed = sum(found.files[name].size for name in todo) + (1 << 20 if todo else 0)
  _check_space(target, needed - sum(there[name].size for name in strays), what=source)
  if todo and INFO_FILE in there:  # not a data set until it is whole again
    _remove(target, INFO_FILE)
    keep.discard(INFO_FILE)
  for name in strays:
    _remove(target, name)
  if todo or not (target / NOTE_FILE).exists():
    _write_note(target, {'source': os.fspath(source), 'files': {n: f.state for n, f in found.files.items()}})
  tally = _Tally(found.files, keep, progress)
  with futures.ThreadPoolExecutor(_IN_FLIGHT) as pool:
    running = [pool.submit(_copy_file, source / name, target / name, found.files[name].size, tally)
               for name in todo if name != INFO_FILE]
    try:
      for done in futures.as_completed(running):
        done.result()
    except BaseException:
      pool.shutdown(wait=True, cancel_futures=True)
      raise
  if isinstance(target, pathlib.Path):
    _check_records(target, found.shards, source=source)
  if INFO_FILE not in keep:
    _copy_file(source / INFO_FILE, target / INFO_FILE, found.files[INFO_FILE].size, tally)
  if not found.lie_in(target):
    raise storage.StorageError(f'{target}: files have changed or gone while {source} was copied; copy it again')
  return Copied(files=len(found.files), bytes=sum(file.size for file in found.files.values()), kept=len(keep))


def changed(found: Contents, folder: storage.Path) -> list[str]:
  """The files whose state at the source is no longer that of the note in a folder; all without a note."""
  states = (_read_note(folder) or {}).get('files', {})
  return sorted(name for name in found.files.keys() | states.keys()
                if name not in found.files or found.files[name].state != states.get(name))


class _Tally:
  """Bytes that are there, of all files; counts from several threads."""

  def __init__(self, files, keep, progress):
    self._total, self._progress, self._lock = sum(file.size for file in files.values()), progress, threading.Lock()
    self._done = sum(files[name].size for name in keep)
    self.add(0)

  def add(self, count: int) -> None:
    with self._lock:
      self._done += count
      if self._progress:
        self._progress(self._done, self._total)


def _shards(info):
  """name → records, of all files of records that a dataset_info.json speaks of."""
  found = {}
  for split in info['splits']:
    lengths = list(map(int, split['shardLengths']))
    template = tfds.core.ShardedFileTemplate(
        data_dir='.', dataset_name=info['name'], split=split['name'], filetype_suffix=info['fileFormat'],
        template=split.get('filepathTemplate'))
    for i, length in enumerate(lengths):
      found[os.path.basename(template.sharded_filepath(shard_index=i, num_shards=len(lengths)))] = length
  return found


def _path(name):
  where = storage.path(name)
  return storage.Remote(where.url.rstrip('/')) if isinstance(where, storage.Remote) else where.absolute()


def _stale(source, target, found, there, *, overwrite):
  """The files at the target that must not be taken over whatever their size."""
  if not there:
    return set()
  note = _read_note(target)
  if note and note.get('source') == os.fspath(source):
    differing = changed(found, target)
    if differing and INFO_FILE in there and not overwrite:
      raise FileExistsError(f'{target} is a copy of an older state of {source}: {len(differing)} files have changed '
                            f'there ({_some(differing)}); --overwrite (overwrite=True) refreshes it')
    return set(differing)
  if INFO_FILE in there:
    # Copied by other means, perhaps: the same description of splits and shards is the same data set.
    if not note and (target / INFO_FILE).read_bytes() == (source / INFO_FILE).read_bytes():
      return set()
    if not overwrite:
      raise FileExistsError(f'{target} holds another data set; --overwrite (overwrite=True) replaces it')
    return set(found.files)
  if note is None and not set(there) & set(found.files):
    raise FileExistsError(f'{target} exists and is not a data set ({_some(sorted(there))}); choose another folder')
  return set(found.files) if note else set()


def _copy_file(source, target, size, tally):
  """One file, which appears under its name when it is whole."""
  counted = 0

  def add(count):
    nonlocal counted
    count = max(-counted, min(count, size - counted))  # a store that tries again counts again
    counted += count
    tally.add(count)

  try:
    if isinstance(target, storage.Remote):
      with storage.local_copy(source) as file, storage.naming(target.url):
        store, key = target.backend()
        store.put_file(os.fspath(file), key, callback=_callback(add))
      arrived = int(target.info().get('size') or 0)
    else:
      target.parent.mkdir(parents=True, exist_ok=True)
      partial = target.with_name(f'.{target.name}.part')
      if isinstance(source, storage.Remote):
        with storage.naming(source.url):
          store, key = source.backend()
          store.get_file(key, os.fspath(partial), callback=_callback(add))
      else:
        shutil.copyfile(source, partial)
      arrived = partial.stat().st_size
    if arrived != size:
      raise storage.StorageError(f'{source}: {arrived} bytes arrived at {target}, of {size}; the same command goes on')
    if isinstance(target, pathlib.Path):
      os.replace(partial, target)
  except BaseException:
    add(-counted)
    if isinstance(target, pathlib.Path):
      with contextlib.suppress(OSError):
        target.with_name(f'.{target.name}.part').unlink(missing_ok=True)
    raise
  add(size - counted)


def _callback(add):
  import fsspec.callbacks

  class Callback(fsspec.callbacks.Callback):
    """Hands on how many bytes have come."""

    def relative_update(self, inc=1):
      add(inc)
  return Callback()


def _check_records(folder, shards, source=None):
  """Raises ValueError for a file on a disk that has not the records it should have; takes a copy away again."""
  for name, wanted in shards.items():
    if '.array_record' not in name:
      continue
    try:
      said = record_files.count(os.fspath(folder / name))
    except ValueError as error:
      said = str(error)
    if said != wanted:
      if source is not None:
        (folder / name).unlink()
      raise ValueError(f'{(source or folder) / name}: {said}{" records" if isinstance(said, int) else ""}; {INFO_FILE} '
                       f'says {wanted} records: the data set is damaged')


def _check_space(target, needed, *, what):
  if isinstance(target, storage.Remote):
    return
  folder = next(folder for folder in (target, *target.parents) if folder.exists())
  free = shutil.disk_usage(folder).free
  if free < needed:
    raise storage.StorageError(f'{target}: {what} needs {needed / 2**20:,.0f} MiB more, and {free / 2**20:,.0f} MiB are '
                               'free')


def _remove(folder, name):
  where = folder / name
  if isinstance(where, pathlib.Path):
    where.unlink()
    return
  with storage.naming(where.url):
    store, key = where.backend()
    store.rm_file(key)


def _read_note(folder):
  try:
    found = json.loads((folder / NOTE_FILE).read_bytes())
    return found if isinstance(found, dict) else None
  except (FileNotFoundError, NotADirectoryError, ValueError):
    return None


def _write_note(folder, note):
  where, data = folder / NOTE_FILE, json.dumps(note, indent=1).encode()
  if isinstance(where, storage.Remote):
    with storage.naming(where.url):
      store, key = where.backend()
      store.pipe_file(key, data)
    return
  folder.mkdir(parents=True, exist_ok=True)
  partial = where.with_name(f'{NOTE_FILE}.part')
  partial.write_bytes(data)
  os.replace(partial, where)


def _some(names):
  return ', '.join(names[:_NAMED]) + (' …' if len(names) > _NAMED else '')
