"""Every record of a data set once, in pieces, by several processes."""
import collections
from collections.abc import Callable, Iterator, Sequence
import concurrent.futures
import multiprocessing
from typing import Any

from cloc_jax.data import sources
from cloc_jax.data import spec as spec_lib

_CHUNK = 128  # records a piece: some seconds of decoding, so that progress shows and little waits at the end


def split_sizes(path: spec_lib.Data, splits: Sequence[str] | None) -> dict[str, int]:
  """Split → number of records, of the splits asked for, or of all for None.

  Raises:
    FileNotFoundError: no data set at `path`.
    ValueError: no such split.
  """
  sizes = sources.read_meta(path).splits
  for split in splits or ():
    if split not in sizes:
      raise ValueError(f'{path} has no split {split!r}; it has {list(sizes)}')
  return {split: size for split, size in sizes.items() if splits is None or split in splits}


def scan(path: spec_lib.Data, *, splits: dict[str, int],
         visit: Callable[[Any, range], Any], workers: int = 0,
         progress: Callable[[int, int], None] | None = None) -> Iterator[tuple[str, range, Any]]:
  """Yields (split, indices, visit(source, indices)) piece by piece, in order; memory is that of a few pieces.

  Args:
    path: the data set, see sources.open_source.
    splits: split → number of its records.
    visit: a picklable function of the split's source and a range of indices; its result is picklable too.
    workers: processes; 0 for this one. They are spawned: a script that calls this guards its `__main__`.
    progress: called with (records done, records in all).

  Raises:
    What `visit` and sources.open_source raise.
  """
  pieces = [(split, range(start, min(start + _CHUNK, size))) for split, size in splits.items()
            for start in range(0, size, _CHUNK)]
  opened = {split: sources.open_source(path, split=split) for split in splits}
  total, done = sum(splits.values()), 0
  for (split, indices), found in zip(pieces, _run(opened, pieces, visit, workers)):
    done += len(indices)
    if progress:
      progress(done, total)
    yield split, indices, found


def _run(opened, pieces, visit, workers):
  if not workers:
    yield from (visit(opened[split], indices) for split, indices in pieces)
    return
  context = multiprocessing.get_context('spawn')  # a fork of a process with JAX's threads may hang
  # Opened sources travel once to each worker: where annotations had to be read, they are not read again.
  with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker,
                                              initargs=(opened,)) as pool:
    pending = collections.deque()
    try:
      for split, indices in pieces:
        pending.append(pool.submit(_visit_in_worker, split, indices, visit))
        if len(pending) > 2 * workers:
          yield pending.popleft().result()
      while pending:
        yield pending.popleft().result()
    finally:
      for future in pending:
        future.cancel()


_opened: dict = {}  # of a worker process


def _begin_worker(opened):
  _opened.update(opened)


def _visit_in_worker(split, indices, visit):
  return visit(_opened[split], indices)
