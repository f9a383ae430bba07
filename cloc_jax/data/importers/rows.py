"""JSONL and Parquet files with one image a row → a region-text data set.

A row:
  image: a path, relative to the folder of images; or {'bytes': …, 'path': …} as Hugging Face's datasets store images
    (in JSONL the bytes are base64); in Parquet also plain bytes.
  image_id: optional, a text or a number; else the path, or the file and the row.
  caption, captions: optional, a text or a list of texts.
  regions: optional, a list of {'box': four numbers, 'caption': text, 'category', 'score', 'source': optional}.
  height, width: optional, in pixels; checked against the image.
Other keys are left alone, and named in the counts.
"""
import base64
import binascii
from collections.abc import Iterator
import dataclasses
import itertools
import json
import os
from typing import Any

from cloc_jax import box_conventions
from cloc_jax.data import schema
from cloc_jax.data import storage
from cloc_jax.data.importers import counts as counts_lib
from cloc_jax.data.importers import engine
from cloc_jax.data.importers import json_stream
from cloc_jax.data.importers import parquet_file
from cloc_jax.data.importers import records

_KEYS = {'image', 'image_id', 'caption', 'captions', 'regions', 'height', 'width'}


@dataclasses.dataclass(frozen=True)
class RowsSource:
  """One split.

  split: its name.
  files: .jsonl and .parquet files.
  images: the folder that paths start from; None for the folder of each file.
  """
  split: str
  files: tuple[str | os.PathLike, ...]
  images: str | os.PathLike | None = None


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a row of a JSONL file stands: bytes begin to end, and its number, from 1."""
  begin: int
  end: int
  row: int


@dataclasses.dataclass(frozen=True)
class Piece:
  """Lines (bytes begin to end of a JSONL file) or row groups (begin to end of a Parquet file); `row` is the first.

  folder: where paths of images start.
  """
  path: storage.Path
  folder: storage.Path
  begin: int
  end: int
  row: int


@dataclasses.dataclass
class Rows(engine.Importer):
  """The importer of rows.

  sources: one for each split.
  boxes: their convention, one of box_conventions.CONVENTIONS.
  name, trust_boxes, images_per_shard: see coco.Coco. A Parquet shard is at least one row group.
  """
  sources: tuple[RowsSource, ...]
  boxes: str = 'xyxy normalised'
  name: str = 'rows'
  trust_boxes: bool = False
  images_per_shard: int = 1024

  gathers_categories = True

  def __post_init__(self):
    self.sources = records.check_splits(self.sources)
    if self.boxes not in box_conventions.CONVENTIONS:
      raise ValueError(f'unknown box convention {self.boxes!r}; known are {list(box_conventions.CONVENTIONS)}')
    for source in self.sources:
      if source.images is not None:
        records.check_folder(source.images)
      for path in source.files:
        if storage.path(path).suffix not in ('.jsonl', '.parquet'):
          raise ValueError(f'{path}: expected a .jsonl or .parquet file')

  def files(self) -> list[str | os.PathLike]:
    return [json_stream.check_file(path) for source in self.sources for path in source.files]

  def splits(self) -> dict[str, list[engine.Task]]:
    found = {}
    for source in self.sources:
      tasks = found[source.split] = []
      for path in map(json_stream.check_file, source.files):
        folder = path.parent if source.images is None else storage.path(source.images)
        cut = parquet_file.cut if path.suffix == '.parquet' else _cut_jsonl
        for begin, end, row, count in cut(path, self.images_per_shard):
          tasks.append(engine.Task(f'{path.name}, rows {row} to {row + count - 1}', images=count,
                                   payload=Piece(path, folder, begin, end, row)))
    return found

  def read(self, task: engine.Task, report: counts_lib.Counts) -> Iterator[schema.Example]:
    piece = task.payload
    if piece.path.suffix == '.parquet':  # its rows are numbered from 0
      rows = parquet_file.read(piece.path, begin=piece.begin, end=piece.end, row=piece.row, wanted=_KEYS)
    else:
      rows = ((number, row) for number, _, _, row in _jsonl_rows(piece))
    found = (self._record(row, number, piece, report) for number, row in rows)
    yield from records.examples(found, report, where=str(piece.path), trust_boxes=self.trust_boxes)

  def places(self, path: storage.Path, *, images: str | os.PathLike | None) -> Iterator[tuple[Place, records.Record]]:
    """Yields where each row of a JSONL file stands, and what it holds; `images` as in RowsSource."""
    piece = self._piece(path, Place(0, storage.size(path), 1), images)
    for number, begin, end, row in _jsonl_rows(piece):
      yield Place(begin, end, number), self._record(row, number, piece, counts_lib.Counts())

  def record_at(self, path: storage.Path, place: Place, *, images: str | os.PathLike | None) -> records.Record:
    """What one row of a JSONL file holds; see `places`."""
    piece = self._piece(path, place, images)
    (number, _, _, row), = _jsonl_rows(piece)
    return self._record(row, number, piece, counts_lib.Counts())

  def _piece(self, path, place, images):
    folder = path.parent if images is None else storage.path(images)
    return Piece(path, folder, place.begin, place.end, place.row)

  def meta(self) -> schema.DatasetMeta:
    return schema.DatasetMeta(name=self.name, description='Images, captions and regions from JSONL or Parquet rows.',
                              extra={'files': [storage.path(p).name for s in self.sources for p in s.files]})

  def _record(self, row, number, piece, report):
    where = f'{piece.path}: row {number}'
    for key in row.keys() - _KEYS:
      report.noted('rows', f'key {key!r} not read', f'row {number}')
    image, name = image_of(json_stream.get(row, 'image', where=where), piece.folder, where)
    image_id = row.get('image_id')
    size = tuple(row.get(key) for key in ('height', 'width'))
    if (size[0] is None) != (size[1] is None) or not all(s is None or isinstance(s, int) and s > 0 for s in size):
      raise ValueError(f'{where}: expected both height and width in whole pixels, or neither; got {size}')
    return records.Record(
        image_id=str(image_id) if image_id is not None else name or f'{piece.path.stem}-{number}',
        image=image, captions=_texts(row, 'caption', where) + _texts(row, 'captions', where),
        phrases=tuple(_phrases(row.get('regions'), where)), size=None if size[0] is None else size,
        convention=self.boxes)


def image_of(value: Any, folder: storage.Path, where: str) -> tuple[bytes | storage.Path, str]:
  """An image cell → (bytes or path, the path as written), as the top of this file says; ValueError names `where`."""
  name = ''
  if isinstance(value, dict):
    name, value = value.get('path') or '', value.get('bytes') or value.get('path')
    if isinstance(value, str) and value != name:
      try:
        value = base64.b64decode(value, validate=True)
      except binascii.Error as error:
        raise ValueError(f"{where}: image: 'bytes' is no base64: {error}") from None
  if isinstance(value, bytes):
    return value, name
  if not isinstance(value, str) or not value:
    raise ValueError(f"{where}: 'image' must be a path, bytes, or {{'bytes', 'path'}}, got {value!r:.80}")
  return storage.join(folder, value), value


def _texts(row, key, where):
  value = row.get(key)
  value = () if value is None else (value,) if isinstance(value, str) else value
  if not isinstance(value, (list, tuple)) or not all(isinstance(text, str) for text in value):
    raise ValueError(f'{where}: {key!r} must be a text or a list of texts, got {value!r:.80}')
  return tuple(value)


def _phrases(value, where):
  if not isinstance(value, (list, type(None))):
    raise ValueError(f"{where}: 'regions' must be a list, got {value!r:.80}")
  for i, item in enumerate(value or ()):
    at = f'{where}, regions[{i}]'
    caption = json_stream.get(item, 'caption', where=at)
    score = item.get('score')
    if not isinstance(caption, str):
      raise ValueError(f"{at}: 'caption' must be a text, got {caption!r:.80}")
    if not isinstance(score, (int, float, type(None))):
      raise ValueError(f"{at}: 'score' must be a number, got {score!r:.80}")
    yield records.Phrase(
        box=json_stream.get(item, 'box', where=at), caption=caption, name=f'regions[{i}]',
        category=str(item.get('category') or ''), score=1.0 if score is None else score,
        source=str(item.get('source') or ''))


# --- JSONL: rows are numbered as lines are, from 1


def _cut_jsonl(path, size):
  """Yields (first byte, last byte, first line, lines)."""
  with storage.open_binary(path) as file:
    begin, row = 0, 1
    while lines := list(itertools.islice(file, size)):
      end = begin + sum(map(len, lines))
      yield begin, end, row, len(lines)
      begin, row = end, row + len(lines)


def _jsonl_rows(piece):
  """Yields (number, first byte, last byte, row)."""
  with storage.open_range(piece.path, piece.begin, piece.end) as file:
    end = piece.begin
    for number in itertools.count(piece.row):
      if end >= piece.end:
        return
      line = file.readline()
      begin, end = end, end + len(line)
      if not line.strip():
        continue
      try:
        row = json.loads(line)
      except ValueError as error:
        cut = '' if line.endswith(b'\n') else ' (is the file cut off?)'
        raise ValueError(f'{piece.path}: row {number} is no JSON{cut}: {error}') from None
      if not isinstance(row, dict):
        raise ValueError(f'{piece.path}: row {number}: expected an object, got a {type(row).__name__}')
      yield number, begin, end, row
