"""How far an import is, on stderr: a bar on a terminal, else a line now and then."""
from collections.abc import Collection, Iterator, Mapping
import contextlib
import contextvars
import os
import sys
import time
from typing import Any, BinaryIO

import tqdm

from cloc_jax.data import storage

_SECONDS_BETWEEN_LINES = 30
_BIG = 100 * 2**20  # bytes; smaller files are read before anyone asks
_shown = contextvars.ContextVar('shown', default=False)


@contextlib.contextmanager
def shown(show: bool) -> Iterator[None]:
  """Whether `reading` shows itself inside the block; it does not by default."""
  token = _shown.set(show)
  try:
    yield
  finally:
    _shown.reset(token)


@contextlib.contextmanager
def reading(file: BinaryIO, *, path: str | os.PathLike, what: str) -> Iterator[BinaryIO]:
  """Gives a file whose reading is shown if it is big: `what` is what it is read for."""
  path = storage.path(path)
  size, name = storage.size(path) if _shown.get() else 0, path.name
  if size < _BIG:
    yield file
  elif sys.stderr.isatty():
    with tqdm.tqdm.wrapattr(file, 'read', total=size, desc=f'{name}: {what}', leave=False) as wrapped:
      yield wrapped
  else:
    print(f'{name}: reading {what} in {size / 1e9:.1f} GB', file=sys.stderr)
    yield file


class Tasks:
  """Rate and ETA of tasks, by image where all say how many they have, else by shard.

  sizes: task → its number of images, or None. done: those of them that are done already.
  """

  def __init__(self, sizes: Mapping[Any, int | None], *, done: Collection, show: bool):
    by_image, terminal = None not in sizes.values(), sys.stderr.isatty()
    self._sizes = {key: size if by_image else 1 for key, size in sizes.items()}
    self._total = sum(self._sizes.values())
    self._done = self._ready = sum(self._sizes[key] for key in done)
    self._unit = 'image' if by_image else 'shard'
    self._bar = tqdm.tqdm(total=self._total, initial=self._ready, unit=self._unit, smoothing=0.05,
                          disable=not (show and terminal))
    self._lines = show and not terminal
    self._began = self._said = time.monotonic()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._bar.close()

  def advance(self, key) -> None:
    """A task has ended."""
    self._done += self._sizes[key]
    self._bar.update(self._sizes[key])
    now = time.monotonic()
    if self._lines and now - self._said > _SECONDS_BETWEEN_LINES:
      self._said = now
      rate = (self._done - self._ready) / (now - self._began)
      left = f', {(self._total - self._done) / rate / 60:.0f} min left' if rate else ''  # a task may hold no image
      print(f'{self._done:,} of {self._total:,} {self._unit}s, {rate:,.0f}/s{left}', file=sys.stderr)
