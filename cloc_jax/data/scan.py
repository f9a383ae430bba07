"""Every record of a data set once, in pieces, by several processes."""
import collections
from collections.abc import Callable, Iterator, Sequence
import concurrent.futures
import functools
import multiprocessing
import os
from typing import Any

from cloc_jax.data import schema
from cloc_jax.data import sources

_CHUNK = 128  # records a piece: some seconds of decoding, so that progress shows and little waits at the end


def split_sizes(path: str | os.PathLike, splits: Sequence[str] | None) -> dict[str, int]:
  """Split → number of records, of the splits asked for, or of all for None.

  Raises:
    FileNotFoundError: no data set at `path`.
    ValueError: no such split.
  """
  sizes = schema.read_meta(path).splits
  for split in splits or ():
    if split not in sizes:
      raise ValueError(f'{path} has no split {split!r}; it has {list(sizes)}')
  return {split: size for split, size in sizes.items() if splits is None or split in splits}


def scan(path: str | os.PathLike, *, splits: dict[str, int], visit: Callable[[sources.RecordSource, range], Any],
         workers: int = 0, progress: Callable[[int, int], None] | None = None) -> Iterator[tuple[str, range, Any]]:
  """Yields (split, indices, visit(source, indices)) piece by piece, in order; memory is that of a few pieces.

  Args:
    path: the data set's folder.
    splits: split → number of its records.
    visit: a picklable function of the split's source and a range of indices; its result is picklable too.
    workers: processes; 0 for this one. They are spawned: a script that calls this guards its `__main__`.
    progress: called with (records done, records in all).

  Raises:
    What `visit` and sources.RecordSource raise.
  """
  pieces = [(split, range(start, min(start + _CHUNK, size))) for split, size in splits.items()
            for start in range(0, size, _CHUNK)]
  total, done = sum(splits.values()), 0
  for (split, indices), found in zip(pieces, _run(os.fspath(path), pieces, visit, workers)):
    done += len(indices)
    if progress:
      progress(done, total)
    yield split, indices, found


def _run(path, pieces, visit, workers):
  if not workers:
    yield from (_visit(path, split, indices, visit) for split, indices in pieces)
    return
  context = multiprocessing.get_context('spawn')  # a fork of a process with JAX's threads may hang
  with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
    pending = collections.deque()
    try:
      for split, indices in pieces:
        pending.append(pool.submit(_visit, path, split, indices, visit))
        if len(pending) > 2 * workers:
          yield pending.popleft().result()
      while pending:
        yield pending.popleft().result()
    finally:
      for future in pending:
        future.cancel()


def _visit(path, split, indices, visit):
  return visit(_source(path, split), indices)


@functools.lru_cache(maxsize=16)
def _source(path, split):
  return sources.RecordSource(path, split=split)
