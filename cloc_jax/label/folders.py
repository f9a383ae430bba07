"""Folders whose files appear whole or not at all, on a disk or in an object store (data/storage.py)."""
from collections.abc import Iterator
import contextlib
import os
import pathlib
import shutil
import tempfile
import uuid

from cloc_jax.data import storage

PARTIAL = '.tmp.'  # in the name of a file that is being written


class Folder:
  """A flat folder of files; picklable, and made when the first file is written. remote: it is in an object store."""

  def __init__(self, path: str | os.PathLike):
    where = storage.path(path)
    self.remote = isinstance(where, storage.Remote)
    self.path = where.url.rstrip('/') if self.remote else os.path.abspath(where)

  def __repr__(self):
    return f'Folder({self.path!r})'

  def place(self, name: str) -> str:
    """A file's whole path or URL."""
    return f'{self.path}/{name}'

  def names(self) -> Iterator[tuple[str, int]]:
    """(name, bytes) of every file, in no order; nothing where there is no such folder."""
    if self.remote:
      with contextlib.suppress(FileNotFoundError), self._store() as (files, key):
        for entry in files.ls(key, detail=True, refresh=True):
          if entry['type'] == 'file':
            yield entry['name'].rstrip('/').rpartition('/')[2], entry['size']
      return
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(self.path) as entries:
      for entry in entries:
        if entry.is_file():
          yield entry.name, entry.stat().st_size

  def read(self, name: str) -> bytes | None:
    """A file's content, None where there is no such file."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
      return storage.path(self.place(name)).read_bytes()
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
    if self.remote:
      with tempfile.TemporaryDirectory() as scratch:
        path = pathlib.Path(scratch, 'file')
        yield path
        with self._store() as (files, key):
          files.makedirs(key, exist_ok=True)
          files.put_file(os.fspath(path), f'{key}/{name}')
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
    if self.remote:
      with self._store() as (files, key), to._store() as (_, target):
        files.makedirs(target, exist_ok=True)
        files.cp_file(f'{key}/{name}', f'{target}/{new}')
      return
    os.makedirs(to.path, exist_ok=True)
    try:
      os.link(self.place(name), to.place(new))
    except OSError:  # a file system without hard links, or one that bounds their number
      shutil.copyfile(self.place(name), to.place(new))

  def remove(self, name: str) -> None:
    """Removes a file, if it is there."""
    with contextlib.suppress(FileNotFoundError):
      if not self.remote:
        os.unlink(self.place(name))
        return
      with self._store() as (files, key):
        files.rm_file(f'{key}/{name}')

  def remove_all(self) -> None:
    """Removes the folder and all that is in it."""
    if not self.remote:
      shutil.rmtree(self.path, ignore_errors=True)
      return
    with self._store() as (files, key):
      if files.exists(key):
        files.rm(key, recursive=True)

  @contextlib.contextmanager
  def _store(self):
    """(file system, key of the folder); what the store raises names the folder."""
    with storage.naming(self.path):
      files, key = storage.Remote(self.path).backend()
      yield files, key.rstrip('/')
