"""Folders on a disk or in an object store (s3://, gs://, … through fsspec), whose files appear whole or not at all."""
from collections.abc import Iterator
import contextlib
import functools
import os
import pathlib
import shutil
import tempfile
import uuid

PARTIAL = '.tmp.'  # in the name of a file that is being written


def is_remote(path: str | os.PathLike) -> bool:
  """Whether `path` is a URL that fsspec has to open."""
  return '://' in os.fspath(path)


def file_system(url: str):
  """(fsspec file system, path in it). Raises ModuleNotFoundError naming what to install."""
  try:
    import fsspec
    return fsspec.core.url_to_fs(url)
  except ImportError as error:
    raise ModuleNotFoundError(f"{url}: {error}. pip install 'cloc_jax[label]', and s3fs or gcsfs for s3:// or gs://"
                              ) from error


class Folder:
  """A flat folder of files; picklable, and made when the first file is written."""

  def __init__(self, path: str | os.PathLike):
    path = os.fspath(path)
    self.path = path.rstrip('/') if is_remote(path) else os.path.abspath(os.path.expanduser(path))

  def __repr__(self):
    return f'Folder({self.path!r})'

  def __getstate__(self):
    return {'path': self.path}  # an open connection does not travel

  @functools.cached_property
  def _fs(self):
    return file_system(self.path)[0] if is_remote(self.path) else None

  def place(self, name: str) -> str:
    """A file's whole path or URL."""
    return f'{self.path}/{name}'

  def names(self) -> Iterator[tuple[str, int]]:
    """(name, bytes) of every file, in no order; nothing where there is no such folder."""
    if self._fs is not None:
      with contextlib.suppress(FileNotFoundError):
        for entry in self._fs.ls(self.path, detail=True, refresh=True):
          if entry['type'] == 'file':
            yield entry['name'].rstrip('/').rpartition('/')[2], entry['size']
      return
    with contextlib.suppress(FileNotFoundError), os.scandir(self.path) as entries:
      for entry in entries:
        if entry.is_file():
          yield entry.name, entry.stat().st_size

  def read(self, name: str) -> bytes | None:
    """A file's content, None where there is no such file."""
    try:
      if self._fs is not None:
        return self._fs.cat_file(self.place(name))
      return pathlib.Path(self.place(name)).read_bytes()
    except FileNotFoundError:
      return None

  def write(self, name: str, data: bytes) -> None:
    """Writes a file, or replaces it."""
    with self.writing(name) as path:
      path.write_bytes(data)

  @contextlib.contextmanager
  def writing(self, name: str) -> Iterator[pathlib.Path]:
    """Gives a local path to write to; the file is there under `name` once the block has ended without an error.

    On a disk it is renamed, which cannot be half done. Object stores show an upload when it is complete.
    """
    if self._fs is not None:
      with tempfile.TemporaryDirectory() as scratch:
        path = pathlib.Path(scratch, 'file')
        yield path
        self._fs.makedirs(self.path, exist_ok=True)
        self._fs.put_file(os.fspath(path), self.place(name))
      return
    os.makedirs(self.path, exist_ok=True)
    path = pathlib.Path(self.path, f'{name}{PARTIAL}{uuid.uuid4().hex[:12]}')
    try:
      yield path
      os.replace(path, self.place(name))
    finally:
      path.unlink(missing_ok=True)

  def copy(self, name: str, to: 'Folder', new: str) -> None:
    """Copies a file to another folder of the same store; on a disk by a hard link where that can be."""
    if self._fs is not None:
      self._fs.makedirs(to.path, exist_ok=True)
      self._fs.cp_file(self.place(name), to.place(new))
      return
    os.makedirs(to.path, exist_ok=True)
    try:
      os.link(self.place(name), to.place(new))
    except OSError:  # a file system without hard links, or one that bounds their number
      shutil.copyfile(self.place(name), to.place(new))

  def remove(self, name: str) -> None:
    """Removes a file, if it is there."""
    with contextlib.suppress(FileNotFoundError):
      if self._fs is not None:
        self._fs.rm_file(self.place(name))
      else:
        os.unlink(self.place(name))

  def remove_all(self) -> None:
    """Removes the folder and all that is in it."""
    if self._fs is None:
      shutil.rmtree(self.path, ignore_errors=True)
    elif self._fs.exists(self.path):
      self._fs.rm(self.path, recursive=True)


@contextlib.contextmanager
def local_copy(path: str) -> Iterator[pathlib.Path]:
  """A local path to read `path` from: itself on a disk, else a copy that goes away with the block."""
  if not is_remote(path):
    yield pathlib.Path(path)
    return
  fs, inside = file_system(path)
  with tempfile.TemporaryDirectory() as scratch:
    local = pathlib.Path(scratch, path.rpartition('/')[2])
    fs.get_file(inside, os.fspath(local))
    yield local
