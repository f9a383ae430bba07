"""Open Images V7's boxes (CSV) → a region-text data set, with Localized Narratives as captions.

A box file has one line a box, grouped by image, `ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,…` in
fractions of the image; `*-class-descriptions-boxable.csv` names the labels. Sizes are not given: images say them. The
file is streamed: a task is a range of its bytes, and its lines are read by whoever does the task.
Sources: storage.googleapis.com/openimages/web/download_v7.html (layout); Kuznetsova et al., *The Open Images Dataset
V4*, 2020; Pont-Tuset et al., *Connecting Vision and Language with Localized Narratives*, 2020.
"""
from collections.abc import Iterator
import csv
import dataclasses
import json
import os

import numpy as np

from cloc_jax import box_conventions
from cloc_jax.data import schema
from cloc_jax.data import storage
from cloc_jax.data.importers import counts as counts_lib
from cloc_jax.data.importers import engine
from cloc_jax.data.importers import images
from cloc_jax.data.importers import json_stream
from cloc_jax.data.importers import records

_COLUMNS = ('ImageID', 'LabelName', 'XMin', 'XMax', 'YMin', 'YMax', 'IsGroupOf')
_FIRST, _EVERY = 2000, 64  # the boxes whose convention is checked: the first, then one in so many
_SIDE = 1024  # a usual side in pixels, for recognising boxes that are no fractions; sizes are not in the file


@dataclasses.dataclass(frozen=True)
class OpenImagesSource:
  """One split.

  split: its name.
  images: the folder of `ImageID.jpg`, flat or as the archives unpack (`train_0/…`).
  boxes: `*-annotations-bbox.csv`.
  narratives: `*_localized_narratives*.jsonl` files, any number.
  """
  split: str
  images: str | os.PathLike
  boxes: str | os.PathLike
  narratives: tuple[str | os.PathLike, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Lines:
  """A task: bytes begin to end of a box file, the first of them in line number `line`; captions by image id."""
  source: OpenImagesSource
  begin: int
  end: int
  line: int
  captions: dict[str, list[str]]


@dataclasses.dataclass
class OpenImages(engine.Importer):
  """Open Images' importer. Boxes around groups (`IsGroupOf`) are left out, and counted as crowd.

  sources: one for each split.
  classes: `*-class-descriptions-boxable.csv`: label, name.
  name, trust_boxes, images_per_shard: see coco.Coco.
  """
  sources: tuple[OpenImagesSource, ...]
  classes: str | os.PathLike
  name: str = 'open_images'
  trust_boxes: bool = False
  images_per_shard: int = 1024

  def __post_init__(self):
    self.sources = records.check_splits(self.sources)
    for source in self.sources:
      records.check_folder(source.images, where=f'split {source.split!r}: ')

  def files(self) -> list[str | os.PathLike]:
    return [json_stream.check_file(path)
            for path in (self.classes, *(p for s in self.sources for p in (s.boxes, *s.narratives)))]

  def splits(self) -> dict[str, list[engine.Task]]:
    self._counts = {source.split: counts_lib.Counts() for source in self.sources}
    return {source.split: self._tasks(source, self._counts[source.split]) for source in self.sources}

  def counts(self) -> dict[str, counts_lib.Counts]:
    return self._counts

  def meta(self) -> schema.DatasetMeta:
    return schema.DatasetMeta(
        name=self.name, description='Open Images V7: photos with boxes, and narratives as captions.',
        categories=tuple(read_class_names(self.classes).values()),
        extra={'provenance': 'Open Images annotations (CC BY 4.0); images are listed as CC BY 2.0',
               'files': [storage.path(source.boxes).name for source in self.sources],
               'labels': list(read_class_names(self.classes))})

  def read(self, task: engine.Task, report: counts_lib.Counts) -> Iterator[schema.Example]:
    lines, source = task.payload, task.payload.source
    names = read_class_names(self.classes)
    category = {label: i for i, label in enumerate(names)}
    at: dict[str, int] = {}
    box_image, place, boxes, categories, skip = [], [], [], [], []
    for number, row in _rows(source.boxes, lines):
      where = f'{source.boxes}: line {number}'
      if row['LabelName'] not in category:
        raise ValueError(f'{where}: LabelName {row["LabelName"]!r} is not in {self.classes}')
      box_image.append(at.setdefault(row['ImageID'], len(at)))
      place.append(number)
      boxes.append(_box(row, where))
      categories.append(category[row['LabelName']])
      skip.append(int(row['IsGroupOf'] == '1'))
    captions = [(i, text) for key, i in at.items() for text in lines.captions.get(key, ())]
    yield from images.read_piece(images.Piece(
        folder=os.fspath(storage.path(source.images)), ids=images.Texts(list(at)),
        names=images.Texts([f'train_{key[0]}/{key}.jpg' for key in at]), sizes=np.zeros((len(at), 2), np.int32),
        box_image=np.array(box_image, np.int64), box_place=np.array(place), boxes=np.array(boxes, np.float32),
        category=np.array(categories), skip=np.array(skip), caption_image=np.array([i for i, _ in captions], np.int64),
        captions=images.Texts([text for _, text in captions]), categories=tuple(names.values()), source='open_images',
        list_name='line', search=True, normalised=True), report)

  def _tasks(self, source, counts):
    """One pass over the box file: where each task's lines lie, whether images are together, what boxes look like."""
    captions = self._captions(source)
    found, seen, sample = [], set(), []
    with storage.open_binary(json_stream.check_file(source.boxes)) as file:
      header = _header(source.boxes, file.readline())
      begin = end = file.tell()
      first_line, current, ids = 2, b'', []
      for number, line in enumerate(file, 2):
        image_id = line[:line.find(b',')]
        if image_id != current:
          if len(ids) == self.images_per_shard:
            found.append(self._task(source, begin, end, first_line, ids, captions, len(found)))
            begin, first_line, ids = end, number, []
          if image_id in seen:
            raise ValueError(f'{source.boxes}: line {number}: image {image_id.decode()} was in an earlier, other group '
                             'of lines; sort the file by ImageID')
          seen.add(image_id)
          ids.append(image_id.decode())
          current = image_id
        if number <= _FIRST or number % _EVERY == 0:
          where = f'{source.boxes}: line {number}'
          sample.append(_box(_row(header, line.decode(), where), where))
        end += len(line)
    if ids:
      found.append(self._task(source, begin, end, first_line, ids, captions, len(found)))
    if not self.trust_boxes:
      box_conventions.check(np.array(sample).reshape(-1, 4), sizes=np.full((len(sample), 2), _SIDE),
                            promised='xyxy normalised', where=f'{source.boxes}')
    for image_id, texts in captions.items():  # those that found their image are taken out
      counts.dropped('captions', 'of an image not listed', f'image {image_id}', len(texts))
    return found

  def _task(self, source, begin, end, line, ids, captions, index):
    mine = {key: captions.pop(key) for key in ids if key in captions}
    first = index * self.images_per_shard
    return engine.Task(f'images {first} to {first + len(ids) - 1}', images=len(ids),
                       payload=_Lines(source, begin, end, line, mine))

  def _captions(self, source):
    found: dict[str, list[str]] = {}
    for path in source.narratives:
      with json_stream.check_file(path).open('r', encoding='utf-8') as file:
        for number, line in enumerate(file, 1):
          where = f'{path}: line {number}'
          try:
            item = json.loads(line)
          except ValueError as error:
            raise ValueError(f'{where} is no JSON: {error}') from error
          key = str(json_stream.get(item, 'image_id', where=where))
          found.setdefault(key, []).append(str(json_stream.get(item, 'caption', where=where)))
    return found


def read_class_names(path: str | os.PathLike) -> dict[str, str]:
  """Label → name in lower case, in the order of a class file (label,name), whose first line may be a header."""
  found = {}
  with json_stream.check_file(path).open('r', encoding='utf-8', newline='') as file:
    for number, row in enumerate(csv.reader(file), 1):
      if len(row) != 2:
        raise ValueError(f'{path}: line {number}: expected label,name, got {row}')
      if row[0] != 'LabelName':
        found[row[0]] = row[1].lower()
  return found


def _header(path, line):
  columns = line.decode('utf-8-sig').strip().split(',')
  missing = [name for name in _COLUMNS if name not in columns]
  if missing or columns[0] != 'ImageID':
    raise ValueError(f'{path}: expected a first line of columns, ImageID first, with {list(_COLUMNS)}; got {columns}')
  return columns


def _row(header, line, where):
  values = line.rstrip('\r\n').split(',')
  if len(values) != len(header):
    raise ValueError(f'{where}: expected {len(header)} columns, got {len(values)}: {line.strip()[:80]!r} '
                     '(is the file cut off?)')
  return dict(zip(header, values))


def _rows(path, lines):
  """Yields (line number, {column: text}) of a task's lines."""
  with storage.open_binary(path) as file:
    header = _header(path, file.readline())
    file.seek(lines.begin)
    for number, line in enumerate(file.read(lines.end - lines.begin).decode().splitlines(), lines.line):
      yield number, _row(header, line, f'{path}: line {number}')


def _box(row, where):
  try:
    box = [float(row[name]) for name in ('XMin', 'YMin', 'XMax', 'YMax')]
  except ValueError as error:
    raise ValueError(f'{where}: {error}') from None
  if not np.isfinite(box).all():
    raise ValueError(f'{where}: expected finite numbers, got {box}')
  return box
