"""Which images of a source are in a data set: against its index, or against what its import has counted."""
from collections.abc import Iterator, Mapping
import csv
import dataclasses
import hashlib
import itertools
import json
import os

import numpy as np

from cloc_jax.data.importers import json_stream
from cloc_jax.data.importers import parquet_file

# The first there is names an image; in Karpathy's files COCO's number does, or the file's name without its ending.
_KEYS = ('image_id', 'id', 'ImageID', 'image', 'file_name', 'cocoid', 'filename')
_BATCH = 1 << 16


@dataclasses.dataclass
class Coverage:
  """What of an index is there.

  listed: images in the index, each once. absent: how many of them the data set lacks. examples: some of these.
  unlisted: how many images of the data set the index does not know.
  """
  listed: int = 0
  absent: int = 0
  examples: list[str] = dataclasses.field(default_factory=list)
  unlisted: int = 0

  def text(self) -> str:
    share = 100 * (self.listed - self.absent) / max(self.listed, 1)
    return (f'{self.listed - self.absent:,} of {self.listed:,} images ({share:.4g} %)'
            + (f'; {self.unlisted:,} images are not in the index' if self.unlisted else ''))


def id_hash(image_id: str) -> int:
  """64 bits that stand for an image's id."""
  return int.from_bytes(hashlib.blake2b(image_id.encode(), digest_size=8).digest(), 'big')


def compare(path: str | os.PathLike, *, present: np.ndarray, split: str = '', examples: int = 10) -> Coverage:
  """Compares an index with the images that are there; holds 8 bytes an id.

  Args:
    path, split: see image_ids.
    present: (n,) uint64, id_hash of the data set's images.
    examples: how many absent images are named.
  """
  here, found, seen = np.unique(present), Coverage(), []
  ids = image_ids(path, split=split)
  while batch := list(itertools.islice(ids, _BATCH)):
    hashes = np.array([id_hash(image_id) for image_id in batch], np.uint64)
    seen.append(hashes)
    for i in np.flatnonzero(~np.isin(hashes, here)):
      if len(found.examples) >= examples:
        break
      if batch[i] not in found.examples:
        found.examples.append(batch[i])
  listed = np.unique(np.concatenate(seen)) if seen else np.zeros(0, np.uint64)
  found.listed = len(listed)
  found.absent = int((~np.isin(listed, here)).sum())
  found.unlisted = int((~np.isin(here, listed)).sum())
  return found


def image_ids(path: str | os.PathLike, *, split: str = '') -> Iterator[str]:
  """Yields the ids of a source's images, as importers call them; the same may come more than once.

  path: a file of annotations with `images` (COCO's, LVIS's, Objects365's), a JSON list (Visual Genome's
    image_data.json), JSONL or Parquet rows, a CSV file whose first line names a column (Open Images'), or a text file
    with an id a line.
    An image's name is its image_id, id, ImageID, image, file_name, cocoid or filename (that without its ending).
  split: of entries that say which split they are of ('split'), those of this one alone; '' for all.

  Raises:
    FileNotFoundError; ValueError naming the file and the entry that has none of these keys, or if every entry is of
      another split.
  """
  path = json_stream.check_file(path)
  if path.suffix == '.json':
    with path.open('rb') as file:
      key = None if file.read(1024).removeprefix(b'\xef\xbb\xbf').lstrip()[:1] == b'[' else 'images'
    found = enumerate(json_stream.items(path, key))
  elif path.suffix == '.parquet':
    found = parquet_file.read(path, wanted=(*_KEYS, 'split'))
  elif path.suffix == '.jsonl':
    found = _lines(path)
  elif path.suffix == '.csv':
    found = _table(path)
  else:
    with path.open('r', encoding='utf-8') as file:
      yield from (line.strip() for line in file if line.strip())
    return
  of_others, count = set(), 0
  for number, row in found:
    given = row if isinstance(row, Mapping) else {}
    if split and isinstance(given.get('split'), str) and given['split'] != split:
      of_others.add(given['split'])
      continue
    key, name = next(((k, given[k]) for k in _KEYS if isinstance(given.get(k), (str, int))), (None, None))
    if name is None:
      have = sorted(row) if isinstance(row, Mapping) else f'a {type(row).__name__}'
      raise ValueError(f'{path}: entry {number}: expected one of the keys {list(_KEYS)}, got {have}')
    count += 1
    yield os.path.splitext(name)[0] if key == 'filename' else str(name)
  if of_others and not count:
    raise ValueError(f'{path}: no entry is of split {split!r}; they are of {sorted(of_others)}')


def of_import(extra: Mapping) -> dict[str, str]:
  """Split → what became of the source's images, as the import has counted them (DatasetMeta.extra); {} without."""
  found = {}
  for split, counts in extra.get('counts', {}).items():
    images = counts.get('images', {})
    dropped = {reason: row['count'] for reason, row in images.get('dropped', {}).items()}
    total = images.get('kept', 0) + sum(dropped.values()) + sum(r['count'] for r in images.get('repaired', {}).values())
    if not total:
      continue  # files that are read as they are: nothing was imported
    reasons = ', '.join(f'{count:,} {reason}' for reason, count in dropped.items())
    found[split] = f'{total - sum(dropped.values()):,} of {total:,} images of the source' + (
        f'; dropped: {reasons}' if reasons else '')
  return found


def _lines(path):
  with path.open('r', encoding='utf-8') as file:
    for number, line in enumerate(file, 1):
      if line.strip():
        try:
          yield number, json.loads(line)
        except ValueError as error:
          raise ValueError(f'{path}: line {number} is no JSON: {error}') from None


def _table(path):
  with path.open('r', encoding='utf-8-sig', newline='') as file:
    yield from enumerate(csv.DictReader(file), 2)
