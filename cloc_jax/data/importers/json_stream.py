"""Big JSON files read item by item: memory is bounded by the largest item, not by the file.

ijson's C backend reads about as fast as json.loads; a file whose lists are wanted one after the other is read once for
each, which is what bounds the memory.
"""
from collections.abc import Iterator
import contextlib
import difflib
import os
from typing import Any

import ijson

from cloc_jax.data import storage
from cloc_jax.data.importers import progress

_CHUNK = 1 << 18


def items(path: str | os.PathLike, key: str | None, *, optional: bool = False) -> Iterator[Any]:
  """Yields the items of the list under a key of a file's top-level object, whatever the order of its keys.

  Numbers are int or float. With `optional`, a file without the key yields nothing. Without a key the file is the list.

  Raises:
    FileNotFoundError: naming the nearest file there is.
    ValueError: naming the file, the key, and where it can be told the index and the byte.
  """
  path = check_file(path)
  count = 0
  with _open(path, b'[' if key is None else b'{') as file:
    try:
      with progress.reading(file, path=path, what=key or 'its list') as shown:
        for item in ijson.items(shown, 'item' if key is None else f'{key}.item', use_float=True, buf_size=_CHUNK):
          yield item
          count += 1
    except (ijson.JSONError, UnicodeDecodeError) as error:
      raise _broken(path, file, error, where=f'{key or ""}[{count}]' if count else 'its beginning') from error
  if not count and key is not None:
    _check_empty(path, key, optional=optional)


def value(path: str | os.PathLike, key: str, default: Any = None) -> Any:
  """The value under a top-level key that is small enough for memory; `default` where there is no such key.

  Raises: see `items`.
  """
  path = check_file(path)
  with _open(path, b'{') as file:
    try:
      return next(iter(ijson.items(file, key, use_float=True, buf_size=_CHUNK)), default)
    except (ijson.JSONError, UnicodeDecodeError) as error:
      raise _broken(path, file, error, where='its beginning') from error


def keys(path: str | os.PathLike) -> Iterator[str]:
  """Yields the keys of a file's top-level object; what they hold is passed over as they are asked for.

  Raises: see `items`.
  """
  path = check_file(path)
  with _open(path, b'{') as file:
    try:
      for prefix, event, content in ijson.parse(file, buf_size=_CHUNK):
        if prefix == '' and event == 'map_key':
          yield content
    except (ijson.JSONError, UnicodeDecodeError) as error:
      raise _broken(path, file, error, where='its beginning') from error


def get(item: Any, key: str, *, where: str) -> Any:
  """item[key], or a ValueError that names the place (file, list, index) and the keys there are."""
  try:
    return item[key]
  except (KeyError, TypeError, IndexError):
    have = sorted(item) if isinstance(item, dict) else f'a {type(item).__name__}'
    raise ValueError(f'{where}: no key {key!r}; found {have}') from None


def check_file(path: str | os.PathLike) -> storage.Path:
  """The path if there is such a file, else FileNotFoundError that names the nearest of its kind."""
  path = storage.path(path)
  if not path.is_file():
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob(f'*{path.suffix}')], n=1, cutoff=0.4)
    raise FileNotFoundError(f'no such file: {path}' + (f'; did you mean {path.parent / near[0]}?' if near else ''))
  return path


class _Stream:
  """A file whose first bytes were read already and come again: not every store can go back."""

  def __init__(self, file, head):
    self._file, self._head = file, head
    self._read = 0

  def read(self, size=-1):
    if size == 0:  # so ijson asks whether these are bytes or text
      return b''
    data, self._head = self._head or self._file.read(size), b''
    self._read += len(data)
    return data

  def tell(self):
    return self._read


@contextlib.contextmanager
def _open(path, wanted):
  """Gives a stream; ValueError unless it begins as an object (b'{') or a list (b'['); skips a byte order mark."""
  with storage.open_binary(path) as file:
    head = file.read(1024)
    _check_top(path, head, wanted)
    yield _Stream(file, head.removeprefix(b'\xef\xbb\xbf'))


def _check_top(path, head, wanted):
  begin = head.removeprefix(b'\xef\xbb\xbf').lstrip()[:1]
  names = {b'{': 'an object', b'[': 'a list'}
  if begin not in names:
    what = f'begins with {head[:20]!r}' if head else 'is empty (0 bytes)'
    raise ValueError(f'{path} is not a JSON file: it {what}')
  if begin != wanted:
    raise ValueError(f'{path}: expected {names[wanted]} at the top, got {names[begin]}')


def _check_empty(path, key, *, optional):
  """Tells an empty list from a missing key and from another type."""
  found = []
  with _open(path, b'{') as file:
    for prefix, event, content in ijson.parse(file, buf_size=_CHUNK):
      if prefix == '' and event == 'map_key':
        found.append(content)
      elif prefix == key:
        if event == 'start_array':
          return
        raise ValueError(f'{path}: {key!r} must be a list, got {event.removeprefix("start_")}')
  if not optional:
    raise ValueError(f'{path}: no key {key!r}; found {sorted(found)}')


def _broken(path, file, error, *, where):
  size, read = storage.size(path), file.tell()
  text = error.args[0] if error.args and isinstance(error.args[0], bytes) else str(error).encode()
  reason, *context = (line.strip(' .') for line in text.decode(errors='replace').split('\n'))
  if 'incomplete' in reason or 'premature' in reason:
    return ValueError(f'{path} is cut off: it ends after {size:,} bytes, in or after {where}; fetch it again')
  near = f' near {context[0]!r}' if context else ''  # yajl shows what surrounds the place
  return ValueError(f'{path} is not a JSON file: {reason}{near}, in or after {where}, '
                    f'between bytes {max(0, read - _CHUNK):,} and {read:,} of {size:,}')
