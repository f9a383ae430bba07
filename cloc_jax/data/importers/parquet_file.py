"""Parquet files cut into row groups and read row by row; memory is that of a few rows."""
from collections.abc import Iterator, Sequence
import itertools
from typing import Any

from cloc_jax.data import storage

_BATCH = 64  # rows in memory at a time


def open_file(path: storage.Path):
  """A pyarrow.parquet.ParquetFile. Raises ValueError, naming the file, if it is none or cut off."""
  try:
    from pyarrow import parquet
    import pyarrow
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError("Parquet files need pyarrow: pip install 'cloc_jax[parquet]'") from error
  try:
    return parquet.ParquetFile(storage.open_binary(path) if isinstance(path, storage.Remote) else path)
  except pyarrow.ArrowException as error:
    raise ValueError(f'{path} is no Parquet file, or cut off: {error}') from None


def columns(path: storage.Path) -> list[str]:
  """The names of a file's columns."""
  with open_file(path) as file:
    return list(file.schema_arrow.names)


def cut(path: storage.Path, size: int) -> Iterator[tuple[int, int, int, int]]:
  """Yields (first row group, the one after the last, first row, rows) of pieces of at least `size` rows."""
  with open_file(path) as file:
    begin = row = count = 0
    for group in range(file.num_row_groups):
      count += file.metadata.row_group(group).num_rows
      if count >= size or group == file.num_row_groups - 1:
        if count:
          yield begin, group + 1, row, count
        begin, row, count = group + 1, row + count, 0


def read(path: storage.Path, *, begin: int = 0, end: int | None = None, row: int = 0,
         wanted: Sequence[str] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yields (number, row) of row groups `begin` to `end`, of which `row` is the first row.

  wanted: names of columns; those that are not there are left out, None for all.
  """
  with open_file(path) as file:
    names = [name for name in file.schema_arrow.names if wanted is None or name in wanted]
    groups = range(begin, file.num_row_groups if end is None else end)
    numbers = itertools.count(row)
    for batch in file.iter_batches(_BATCH, row_groups=groups, columns=names):
      for item in batch.to_pylist():
        yield next(numbers), item
