"""Files wherever they lie: on a disk, or at gs://, s3://, https://, memory:// … through fsspec.

`path` gives a pathlib.Path for the first and a Remote for the others, which has the part of its interface that readers
need. A Remote is read as a stream; nothing is copied to a disk.
"""
from collections.abc import Iterator
import contextlib
import dataclasses
import functools
import hashlib
import io
import os
import pathlib
import re
import tempfile
from typing import Any, BinaryIO
import urllib.parse

_SCHEME = re.compile(r'([a-z][a-z0-9+.-]+)://', re.IGNORECASE)
_WEB = ('http', 'https')
_ONE_REQUEST = 1 << 25  # bytes
_NEEDS = {'gs': 'gcsfs', 'gcs': 'gcsfs', 's3': 's3fs', 's3a': 's3fs', 'http': 'aiohttp', 'https': 'aiohttp'}
_STATES = ('generation', 'ETag', 'etag', 'md5Hash', 'mtime', 'LastModified', 'updated', 'created')  # the first there is


class StorageError(OSError):
  """A store, a connection or a disk that failed; the message names the file."""


class AccessDenied(StorageError, PermissionError):
  """A store that does not let us."""


@dataclasses.dataclass(frozen=True)
class Remote:
  """A file or folder at a URL; '/' joins, and `os.fspath` gives the URL. Picklable."""
  url: str

  def __str__(self):
    return self.url

  def __fspath__(self):
    return self.url

  def __truediv__(self, name) -> 'Remote':
    name = os.fspath(name)
    if self.on_web:
      name = urllib.parse.quote(name)
    return Remote(f'{self.url.rstrip("/")}/{name}')

  def joinpath(self, *names) -> 'Remote':
    return functools.reduce(Remote.__truediv__, names, self)

  def expanduser(self) -> 'Remote':
    return self

  def absolute(self) -> 'Remote':
    return self

  @property
  def scheme(self) -> str:
    return _SCHEME.match(self.url).group(1).lower()

  @property
  def on_web(self) -> bool:
    """Whether it is on a web server, of whose folders there are no lists."""
    return self.scheme in _WEB

  @property
  def _pure(self):
    parts = urllib.parse.urlsplit(self.url) if self.on_web else None
    return pathlib.PurePosixPath(parts.path if parts else self.url.split('://', 1)[1])

  @property
  def name(self) -> str:
    return self._pure.name

  @property
  def stem(self) -> str:
    return self._pure.stem

  @property
  def suffix(self) -> str:
    return self._pure.suffix

  @property
  def parent(self) -> 'Remote':
    return Remote(self.url.rstrip('/').rpartition('/')[0])

  def open(self, mode: str = 'rb', *, encoding: str | None = None, newline: str | None = None):
    """As pathlib.Path.open, for reading; bytes are fetched as they are read, and errors then name the file too."""
    if mode not in ('r', 'rt', 'rb'):
      raise ValueError(f'{self.url}: opened with mode {mode!r}; files in a store are opened for reading')
    with naming(self.url):
      file = io.BufferedReader(_Reader(self.url, self._filesystem().open(self._key(), 'rb')), 1 << 16)
    return file if mode == 'rb' else io.TextIOWrapper(file, encoding=encoding, newline=newline)

  def read_bytes(self) -> bytes:
    """All of it in one request. Raises FileNotFoundError; OSError for whatever else the store says."""
    with naming(self.url):
      return self._filesystem().cat_file(self._key())

  def read_text(self, encoding: str = 'utf-8') -> str:
    return self.read_bytes().decode(encoding)

  def is_file(self) -> bool:
    return self._says('isfile')

  def exists(self) -> bool:
    return self._says('exists')

  def is_dir(self) -> bool:
    """Web servers do not tell: theirs are taken for granted."""
    return self.on_web or self._says('isdir')

  def glob(self, pattern: str) -> Iterator['Remote']:
    """What fits below this folder, sorted; nothing on web servers, which have no lists."""
    if self.on_web:
      return
    with naming(self.url):
      key = self._key().rstrip('/')
      found = self._filesystem().glob(f'{key}/{pattern}')
    yield from (Remote(self.url.rstrip('/') + name[len(key):]) for name in sorted(found))  # spelt as this folder is

  def info(self) -> dict[str, Any]:
    """What the store says of it: size, type, and times or hashes under names of its own."""
    with naming(self.url):
      store = self._filesystem()
      store.invalidate_cache()
      return store.info(self._key())

  def backend(self) -> tuple[Any, str]:
    """(the fsspec file system, the key in it), for what is not offered here: writing, say. Errors: see `naming`."""
    return self._filesystem(), self._key()

  def _says(self, question):
    with naming(self.url):
      return bool(getattr(self._filesystem(), question)(self._key()))

  def _filesystem(self):
    return _filesystem(self.scheme, urllib.parse.urlsplit(self.url).netloc)

  def _key(self):
    return self._filesystem()._strip_protocol(self.url)


class _Reader(io.RawIOBase):
  """A store's open file whose errors name it."""

  def __init__(self, url, file):
    self._url, self._file = url, file
    self.name = url

  def readinto(self, buffer):
    with naming(self._url):
      data = self._file.read(len(buffer))
    buffer[:len(data)] = data
    return len(data)

  def readall(self):
    with naming(self._url):
      return self._file.read()

  def readable(self):
    return True

  def seekable(self):
    return self._file.seekable()

  def seek(self, offset, whence=io.SEEK_SET):
    with naming(self._url):
      return self._file.seek(offset, whence)

  def tell(self):
    return self._file.tell()

  def close(self):
    if not self.closed:
      self._file.close()
    super().close()


Path = pathlib.Path | Remote


@dataclasses.dataclass(frozen=True)
class Entry:
  """A file of a listing. size: bytes; state: see `state`."""
  size: int
  state: str


def path(name: str | os.PathLike) -> Path:
  """A path for a name: a Remote for a URL, else a pathlib.Path with ~ filled in."""
  if isinstance(name, Remote):
    return name
  name = os.fspath(name)
  return Remote(name) if is_url(name) else pathlib.Path(name).expanduser()


def is_url(name: str | os.PathLike) -> bool:
  """Whether a name is a URL with a scheme: gs://bucket/a."""
  return isinstance(os.fspath(name), str) and _SCHEME.match(os.fspath(name)) is not None


def join(folder: Path, name: str) -> Path:
  """folder/name, or the name alone where it is a URL."""
  return Remote(name) if is_url(name) else folder / name


def open_binary(name: str | os.PathLike) -> BinaryIO:
  """A file to read bytes from; closed by the caller."""
  return path(name).open('rb')


def open_range(name: str | os.PathLike, begin: int, end: int) -> BinaryIO:
  """A file opened at byte `begin`, to read up to `end`; of a store's file little is fetched in one request."""
  where = path(name)
  if isinstance(where, Remote) and not where.on_web and 0 < end - begin <= _ONE_REQUEST:
    with naming(where.url):
      store, key = where.backend()
      return io.BytesIO(store.cat_file(key, start=begin, end=end))
  file = where.open('rb')
  file.seek(begin)
  return file


def size(name: str | os.PathLike) -> int:
  """Bytes; 0 where a web server does not say."""
  where = path(name)
  return int(where.info().get('size') or 0) if isinstance(where, Remote) else where.stat().st_size


def state(name: str | os.PathLike) -> str:
  """Size and time of change (or a store's hash) as text, 'missing' without a file: equal texts, an unchanged file."""
  where = path(name)
  try:
    return _of_info(where.info()).state if isinstance(where, Remote) else _of_stat(where.stat()).state
  except FileNotFoundError:
    return 'missing'
  except OSError:
    if isinstance(where, Remote):  # it may be there; a store that refuses or fails has not said
      raise
    return 'missing'


def sha256(name: str | os.PathLike) -> str:
  """A file's SHA-256 in hexadecimal, read as a stream."""
  with open_binary(name) as file:
    found = hashlib.sha256()
    while chunk := file.read(1 << 20):
      found.update(chunk)
  return found.hexdigest()


def expand(pattern: str) -> list[str]:
  """The files that a pattern with * or ? fits, in order; a name without them, or of a file there is, alone.

  Raises:
    FileNotFoundError: if no file fits.
  """
  import glob
  if not is_url(pattern):
    pattern = os.path.expanduser(pattern)
    if not glob.has_magic(pattern) or os.path.exists(pattern):
      return [pattern]
    found = sorted(glob.glob(pattern))
  elif Remote(pattern).on_web or not glob.has_magic(pattern):  # '?' begins a query there
    return [pattern]
  else:
    base = re.split(r'[*?\[]', pattern)[0].rpartition('/')[0]
    found = [os.fspath(p) for p in Remote(base).glob(pattern[len(base) + 1:])]
  if not found:
    raise FileNotFoundError(f'no file fits {pattern}')
  return found


def walk(folder: Path) -> list[str]:
  """All files below a folder by their names relative to it, sorted; hidden files and folders are left out.

  Nothing where there is no such folder.

  Raises:
    ValueError: for a folder of a web server, which has no lists.
  """
  if isinstance(folder, Remote):
    return list(files(folder))
  found = []
  for where, folders, names in os.walk(folder):
    folders[:] = [name for name in folders if not name.startswith('.')]
    inside = os.path.relpath(where, folder).replace(os.sep, '/')
    found += [name if inside == '.' else f'{inside}/{name}' for name in names if not name.startswith('.')]
  return sorted(found)


def files(folder: Path) -> dict[str, Entry]:
  """What `walk` names, with sizes and states; a store is asked for its list once."""
  if not isinstance(folder, Remote):
    return {name: _of_stat((folder / name).stat()) for name in walk(folder)}
  if folder.on_web:
    raise ValueError(f'{folder}: no such file, and web servers do not list folders: name the files')
  with naming(folder.url):
    store, key = folder.backend()
    store.invalidate_cache()
    found = {name[len(key.rstrip('/')):].lstrip('/'): info for name, info in store.find(key, detail=True).items()}
  return {name: _of_info(info) for name, info in sorted(found.items())
          if name and not any(part.startswith('.') for part in name.split('/'))}


@contextlib.contextmanager
def local_copy(name: str | os.PathLike) -> Iterator[pathlib.Path]:
  """A path on a disk, for what cannot read streams: the file's own, or that of a copy that goes with the block."""
  where = path(name)
  if not isinstance(where, Remote):
    yield where
    return
  with tempfile.TemporaryDirectory() as scratch:
    copy = pathlib.Path(scratch, where.name)
    with naming(where.url):
      store, key = where.backend()
      store.get_file(key, os.fspath(copy))
    yield copy


def remove_files(folder: Remote, *, first: str) -> None:
  """Removes the files of a folder, without those of folders in it; `first` before the others."""
  store = folder._filesystem()
  with naming(folder.url):
    store.invalidate_cache()
    names = [entry['name'] for entry in store.ls(folder._key(), detail=True) if entry['type'] == 'file']
    for name in sorted(names, key=lambda name: not name.endswith(f'/{first}')):
      store.rm_file(name)
    store.invalidate_cache()


@functools.lru_cache(maxsize=None)
def _filesystem(scheme, host):
  try:
    import fsspec
    if scheme in _WEB:
      import aiohttp  # noqa: F401  fsspec imports it late, and speaks of itself then
    return fsspec.filesystem(scheme)
  except ImportError as error:
    raise ModuleNotFoundError(
        f"{scheme}:// needs {_NEEDS.get(scheme, 'fsspec and what it asks for')}: pip install 'cloc_jax[cloud]' "
        f'({error})') from error
  except ValueError as error:
    raise ValueError(f'{scheme}://{host}…: {error}') from None


@contextlib.contextmanager
def naming(url):
  """Whatever a store raises (each has errors of its own) becomes an OSError that names the file.

  Raises:
    FileNotFoundError, AccessDenied: where the store says so. StorageError: all else.
  """
  try:
    yield
  except (ImportError, ValueError, StorageError):
    raise
  except Exception as error:
    if isinstance(error, FileNotFoundError) or getattr(error, 'status', None) == 410:  # 'gone'; fsspec knows 404 only
      raise FileNotFoundError(f'{url}: no such file, folder or bucket') from error
    if isinstance(error, PermissionError):
      raise AccessDenied(f'{url}: the store denies access: {error}') from error
    raise StorageError(f'{url}: {type(error).__name__}: {error}') from error


def _of_stat(found):
  return Entry(found.st_size, f'{found.st_size} bytes, changed {found.st_mtime_ns}')


def _of_info(info):
  count = int(info.get('size') or 0)
  mark = next((f', {key} {info[key]}' for key in _STATES if info.get(key)), '')
  return Entry(count, f'{count} bytes{mark}')
