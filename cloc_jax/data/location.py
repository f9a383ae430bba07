"""Where a finished data set lies on a disk: the folder that is named, or the copy in a cache of one that lies in a store.

Records are read in any order, and a store would be asked for each by itself; ArrayRecord's reader knows gs:// only, and
goes on trying for minutes where it fails. So a data set is copied before it is read, into a folder that was named for
that, and into none otherwise.
"""
import contextlib
import difflib
import fcntl
import functools
import hashlib
import json
import logging
import os
import pathlib
import shutil
import sys
import time

from cloc_jax.data import copies
from cloc_jax.data import storage

CACHE = 'CLOC_DATA_CACHE'  # the environment's variable, which worker processes see too
_MOUNTS = {'gs': 'gcsfuse --implicit-dirs BUCKET FOLDER', 's3': 'mount-s3 BUCKET FOLDER'}
_SECONDS_BETWEEN_LINES = 30

_log = logging.getLogger('cloc_jax.data')


def use_cache(folder: str | os.PathLike) -> None:
  """Names the folder for copies of data sets in stores, for this process and those that it starts."""
  os.environ[CACHE] = os.path.abspath(os.path.expanduser(folder))


def check_dataset_dir(path: str | os.PathLike) -> pathlib.Path:
  """The folder of a data set on a disk. One at a URL is copied to the cache first, if there is a cache.

  Raises:
    FileNotFoundError: there is none, naming the nearest that is.
    ValueError: a URL, and no cache is set. StorageError, PermissionError: it cannot be copied.
  """
  if storage.is_url(path):
    where, cache = storage.path(path), os.environ.get(CACHE)
    if where.on_web:
      raise ValueError(f'{path}: data sets are read from a disk, and web servers do not list the files to copy: fetch '
                       'the folder first')
    if not cache:
      mount = f', or mount its bucket ({_MOUNTS[where.scheme]})' if where.scheme in _MOUNTS else ''
      raise ValueError(f'{path}: data sets are read from a disk. Set data.cache or ${CACHE} to a folder for copies, or '
                       f'copy it (cloc data copy {path} FOLDER){mount}.')
    return _cached(os.fspath(path).rstrip('/'), cache)
  root = pathlib.Path(path).expanduser()
  if (root / copies.INFO_FILE).exists():
    return root
  if root.is_dir():
    inside = sorted(str(p.parent) for p in root.glob(f'*/{copies.INFO_FILE}'))
    hint = f'it holds these data sets: {", ".join(inside)}' if inside else 'was its writing interrupted?'
    raise FileNotFoundError(f'{root} is a folder, but not a data set (no {copies.INFO_FILE} in it); {hint}')
  if not root.parent.is_dir():
    raise FileNotFoundError(f'no data set at {root}: not even the folder {root.parent} exists')
  siblings = [p.name for p in root.parent.iterdir() if p.is_dir() and not p.name.startswith('.')]
  near = difflib.get_close_matches(root.name, siblings, n=1, cutoff=0.3)
  hint = f'did you mean {root.parent / near[0]}?' if near else f'{root.parent} holds {sorted(siblings) or "no folders"}'
  raise FileNotFoundError(f'no data set at {root}; {hint}')


@functools.lru_cache(maxsize=None)  # a process reads one state of a data set, and asks the store once
def _cached(url, cache):
  source, folder = storage.path(url), pathlib.Path(cache).expanduser().absolute()
  found = copies.contents(source)
  states = json.dumps({name: file.state for name, file in found.files.items()})
  name = f'{source.name}-{_hash(url)}'
  # A name for each state: a run that reads an older copy is not disturbed.
  copy = folder / f'{name}-{_hash(states)}'
  if found.lie_in(copy):
    return copy
  try:
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / f'.{name}.lock', 'ab')
  except OSError as error:
    raise PermissionError(f'the cache (data.cache or ${CACHE}) cannot be written: {error}') from error
  with lock, _alone(lock, what=url):
    if found.lie_in(copy):  # another process has made it meanwhile
      return copy
    for older in sorted(folder.glob(f'{name}-*')):
      if older == copy:
        continue
      if (older / copies.INFO_FILE).exists():
        names = copies.changed(found, older)
        _log.warning('%s has changed since it was copied (%s%s): it is copied anew to %s. The older copy stays for runs '
                     'that read it; remove it when there are none: %s', url, ', '.join(names[:3]),
                     ' …' if len(names) > 3 else '', copy, older)
      else:  # broken off, and of a state that is no more
        shutil.rmtree(older, ignore_errors=True)
    with shown(url, copy) as progress:
      copies.copy(source, copy, progress=progress)
  return copy


@contextlib.contextmanager
def _alone(lock, *, what):
  """No other process of this machine is inside with the same lock file; the system frees that of a killed process."""
  try:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      _log.warning('another process copies %s; waiting for it', what)
      fcntl.flock(lock, fcntl.LOCK_EX)
  except OSError as error:
    raise storage.StorageError(f'{lock.name}: cannot be locked, choose a cache on a local disk: {error}') from error
  yield  # closing the file frees it


@contextlib.contextmanager
def shown(source, target):
  """Gives copies.copy's `progress`: rate and ETA on stderr, a bar on a terminal, else a line every half minute."""
  import tqdm
  units = dict(unit='B', unit_scale=True, unit_divisor=1024)
  bar, first, began, said = None, 0, 0.0, 0.0

  def progress(done, total):
    nonlocal bar, first, began, said
    if bar is None:  # what is there already does not count for the rate
      bar = tqdm.tqdm(total=total, initial=done, disable=not sys.stderr.isatty(), **units)
      first, began, said = done, time.monotonic(), time.monotonic()
      print(f'copying {source} to {target}: {(total - done) / 2**20:,.1f} MiB', file=sys.stderr)
    bar.update(done - bar.n)
    now = time.monotonic()
    if bar.disable and now - said > _SECONDS_BETWEEN_LINES:
      said = now
      print(tqdm.tqdm.format_meter(done, total, now - began, initial=first, ncols=0, prefix=str(source), **units),
            file=sys.stderr)
  try:
    yield progress
  finally:
    if bar is not None:
      bar.close()


def _hash(text):
  return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
