"""The formats that are read as they are: each makes a table of a split, and reads single records by it.

A format has `files()`, whose change asks for a new table; `build(counts)` → {split: table}; `meta(tables)`;
`present(split, table, counts)`, the places in the table that are records, with lost images counted; and `reader`, whose
`read(i, report)` is the i-th record's example. All parsing is the importers'.
"""
from collections.abc import Callable, Sequence
import dataclasses
import os

import numpy as np

from cloc_jax.data import storage
from cloc_jax.data.importers import coco
from cloc_jax.data.importers import counts as counts_lib
from cloc_jax.data.importers import engine
from cloc_jax.data.importers import grit
from cloc_jax.data.importers import images
from cloc_jax.data.importers import json_stream
from cloc_jax.data.importers import lvis
from cloc_jax.data.importers import objects365
from cloc_jax.data.importers import records
from cloc_jax.data.importers import rows
from cloc_jax.data.importers import webdataset

_CHECKED = 1000  # images whose boxes are looked at when rows or archives are opened, whose tables hold none
_CHECKED_ARCHIVES = 10


def _present(paths: Sequence[storage.Path | None], counts: counts_lib.Counts,
             annotated: Callable[[int], tuple[str, int, int]]) -> np.ndarray:
  """Indices of the files that are there; None is no file and always there. A folder is listed once.

  Files on web servers, which have no lists, are taken for there.

  annotated: index → the image's id and its numbers of boxes and captions, which are counted where it is missing.
  """
  listed: dict[str, set[str]] = {}
  keep = []
  for i, path in enumerate(paths):
    if path is not None and not (isinstance(path, storage.Remote) and path.on_web):
      folder, name = os.path.split(path)
      if folder not in listed:
        listed[folder] = _names(storage.path(folder))
      if name not in listed[folder]:
        counts.lost_image(str(path), 'missing', path=path)
        image_id, boxes, captions = annotated(i)
        records.lost(counts, 'image lost', image_id=image_id, boxes=boxes, captions=captions)
        continue
    keep.append(i)
  return np.array(keep, np.int64)


def _names(folder):
  if isinstance(folder, storage.Remote):
    return set(storage.files(folder))
  try:
    return set(os.listdir(folder))
  except OSError:
    return set()


def _evenly(values: Sequence[int], count: int) -> list[int]:
  """At most `count` of them, spread evenly."""
  return [int(values[i]) for i in np.unique(np.linspace(0, len(values) - 1, min(len(values), count)).astype(int))]


class CocoLayout:
  """COCO and formats in its layout: one importer of all splits, so that their categories are compared."""
  table = images.Piece
  kinds = {'coco': coco.Coco, 'lvis': lvis.Lvis, 'objects365': objects365.Objects365}

  def __init__(self, spec, splits):
    keys = ('images', 'instances', 'captions', 'panoptic')
    found = [coco.CocoSource(split=name, **{k: options[k] for k in keys if k in options})
             for name, options in splits.items()]
    more = {'stuff': True} if spec.options.get('stuff') else {}
    self._importer = self.kinds[spec.format](
        tuple(found), trust_boxes=spec.options.get('trust_boxes', False), images_per_shard=2**62, **more)

  def files(self):
    return self._importer.files()

  def build(self, counts):
    tasks = self._importer.splits()
    for name, found in self._importer.counts().items():
      counts[name].merge(found)
    for name, found in tasks.items():
      if not found:
        raise ValueError(f'{self._importer.name}: split {name!r} lists no images')
    return {name: found[0].payload for name, found in tasks.items()}

  def meta(self, tables):
    del tables
    return self._importer.meta()

  def present(self, name, table, counts):
    del name
    paths = [images.find_file(table.folder, table.names[i], search=table.search) for i in range(len(table.ids))]
    count = lambda images_of, i: int(np.subtract(*np.searchsorted(images_of, [i + 1, i])))
    return _present(paths, counts, lambda i: (table.ids[i], count(table.box_image, i), count(table.caption_image, i)))

  def reader(self, name, table, keep):
    del name
    return _Pieces(table, keep)


@dataclasses.dataclass(frozen=True)
class _Pieces:
  table: images.Piece
  keep: np.ndarray

  def __len__(self):
    return len(self.keep)

  def read(self, i, report):
    return images.read_one(self.table, int(self.keep[i]), report)


@dataclasses.dataclass(frozen=True)
class RowTable:
  """file: (n,) index into `files`. begin, end, row: (n,), see rows.Place. paths: images' files, '' for bytes."""
  files: tuple[str, ...]
  file: np.ndarray
  begin: np.ndarray
  end: np.ndarray
  row: np.ndarray
  paths: images.Texts
  categories: tuple[str, ...]


class Jsonl:
  """JSONL files with one image a row."""
  table = RowTable

  def __init__(self, spec, splits):
    self._importers = {}
    for name, options in splits.items():
      source = rows.RowsSource(split=name, files=records.list_files(options['rows']), images=options.get('images'))
      wrong = [path for path in source.files if not path.endswith('.jsonl')]
      if wrong:
        raise ValueError(f'{wrong[0]}: only .jsonl files are read as they are; `cloc data import rows` reads others')
      more = {'boxes': spec.options['boxes']} if 'boxes' in spec.options else {}
      self._importers[name] = rows.Rows((source,), trust_boxes=spec.options.get('trust_boxes', False), **more)

  def files(self):
    return [path for importer in self._importers.values() for path in importer.files()]

  def build(self, counts):
    del counts
    return {name: self._table(importer) for name, importer in self._importers.items()}

  def _table(self, importer):
    source, = importer.sources
    files = importer.files()
    places, paths, categories, boxed = [], images.Texts(), set(), []
    for number, path in enumerate(files):
      for place, record in importer.places(path, images=source.images):
        boxed += [len(places)] if record.phrases else []
        places.append((number, place.begin, place.end, place.row))
        paths.append('' if isinstance(record.image, bytes) else str(record.image))
        categories.update(phrase.category for phrase in record.phrases)
    categories -= {''}
    table = RowTable(tuple(map(str, files)), *np.array(places, np.int64).reshape(-1, 4).T.copy(), paths,
                     tuple(sorted(categories)) if len(categories) <= engine.MOST_CATEGORIES else ())
    reader = _Rows(table, np.arange(len(places)), importer)
    chosen = _evenly(boxed, _CHECKED)
    for _ in records.examples((reader.record(i) for i in chosen), counts_lib.Counts(),
                              where=', '.join(storage.path(path).name for path in files), trust_boxes=importer.trust_boxes):
      pass  # what is wanted is the check of all their boxes together
    return table

  def meta(self, tables):
    categories = sorted({name for table in tables.values() for name in table.categories})
    return dataclasses.replace(next(iter(self._importers.values())).meta(), categories=tuple(categories))

  def present(self, name, table, counts):
    def annotated(i):
      record = everything.record(i)
      return record.image_id, len(record.phrases), len(record.captions)
    everything = self.reader(name, table, np.arange(len(table.paths)))
    return _present([storage.path(path) if path else None for path in (table.paths[i] for i in everything.keep)], counts,
                    annotated)

  def reader(self, name, table, keep):
    return _Rows(table, keep, self._importers[name])


@dataclasses.dataclass(frozen=True)
class _Rows:
  table: RowTable
  keep: np.ndarray
  importer: rows.Rows

  def __len__(self):
    return len(self.keep)

  def record(self, i) -> records.Record:
    i, t = int(self.keep[i]), self.table
    place = rows.Place(int(t.begin[i]), int(t.end[i]), int(t.row[i]))
    return self.importer.record_at(storage.path(t.files[t.file[i]]), place, images=self.importer.sources[0].images)

  def read(self, i, report):
    # One image's boxes are too few to tell conventions apart: many were looked at when the table was made.
    return next(records.examples([self.record(i)], report, where=self.table.files[self.table.file[self.keep[i]]],
                                 trust_boxes=True), None)


@dataclasses.dataclass(frozen=True)
class TarTable:
  """file, first: (n,) archive and first member of a sample; its last member is before the next sample's first.

  extension, begin, size: (m,) of each member, see webdataset.Member; `extensions` are the words that are used.
  """
  files: tuple[str, ...]
  keys: images.Texts
  file: np.ndarray
  first: np.ndarray
  extension: np.ndarray
  begin: np.ndarray
  size: np.ndarray
  extensions: tuple[str, ...]


class Tars:
  """WebDataset archives, and GRIT's."""
  table = TarTable

  def __init__(self, spec, splits):
    kind = grit.Grit if spec.format == 'grit' else webdataset.WebDataset
    more = {key: spec.options[key] for key in ('phrases', 'trust_boxes') if key in spec.options}
    if 'caption_keys' in spec.options:
      more['caption_keys'] = tuple(spec.options['caption_keys'].split(','))
    self._importers = {
        name: kind((webdataset.TarsSource(name, records.list_files(options['tars'])),), **more)
        for name, options in splits.items()}
    self._boxes = spec.format == 'grit' and not spec.options.get('trust_boxes')

  def files(self):
    return [json_stream.check_file(path) for importer in self._importers.values() for path in importer.sources[0].tars]

  def build(self, counts):
    del counts
    return {name: self._table(importer) for name, importer in self._importers.items()}

  def _table(self, importer):
    importer.splits()  # checks the archives' names
    files = [json_stream.check_file(path) for path in importer.sources[0].tars]
    keys, samples, found, extensions = images.Texts(), [], [], {}
    for number, path in enumerate(files):
      key = None
      for member in webdataset.members(path):
        if member.key != key:
          key = member.key
          keys.append(key)
          samples.append((number, len(found)))
        found.append((extensions.setdefault(member.extension, len(extensions)), member.begin, member.size))
    table = TarTable(tuple(map(str, files)), keys, *np.array(samples, np.int64).reshape(-1, 2).T.copy(),
                     *np.array(found, np.int64).reshape(-1, 3).T.copy(), tuple(extensions))
    if self._boxes:
      reader = _Tars(table, np.arange(len(samples)), importer)
      for number in _evenly(range(len(files)), _CHECKED_ARCHIVES):
        own = np.flatnonzero(table.file == number)
        chosen = (reader.sample(i) for i in _evenly(own, _CHECKED // _CHECKED_ARCHIVES))
        for _ in importer.examples(chosen, files[number], counts_lib.Counts()):
          pass  # what is wanted is the check of all their boxes together
    return table

  def meta(self, tables):
    del tables
    return next(iter(self._importers.values())).meta()

  def present(self, name, table, counts):
    del name
    pictures = [i for i, name in enumerate(table.extensions) if name in webdataset.IMAGES]
    has = np.add.reduceat(np.isin(table.extension, pictures), table.first) if len(table.first) else np.zeros(0, int)
    for i in np.flatnonzero(has == 0):
      archive = storage.path(table.files[table.file[i]]).name
      counts.dropped('images', 'not in the archive', f'{archive}: {table.keys[i]}')
    return np.flatnonzero(has)

  def reader(self, name, table, keep):
    # As in Jsonl.
    return _Tars(table, keep, dataclasses.replace(self._importers[name], trust_boxes=True))


@dataclasses.dataclass(frozen=True)
class _Tars:
  table: TarTable
  keep: np.ndarray
  importer: webdataset.WebDataset

  def __len__(self):
    return len(self.keep)

  def sample(self, i) -> webdataset.Sample:
    i, t = int(self.keep[i]), self.table
    last, parts = t.first[i + 1] if i + 1 < len(t.first) else len(t.begin), {}
    first, begin = t.first[i], int(t.begin[t.first[i]])
    end = int(t.begin[last - 1] + t.size[last - 1])
    with storage.open_range(t.files[t.file[i]], begin, end) as file:
      data = file.read(end - begin)  # a sample's files stand together
    if len(data) != end - begin:
      raise ValueError(f'{t.files[t.file[i]]} is shorter than it was when it was opened')
    for j in range(first, last):
      at = int(t.begin[j]) - begin
      parts[t.extensions[t.extension[j]]] = data[at:at + int(t.size[j])]
    return webdataset.Sample(t.keys[i], parts)

  def read(self, i, report):
    path = storage.path(self.table.files[self.table.file[self.keep[i]]])
    return next(self.importer.examples([self.sample(i)], path, report), None)


FORMATS = {'jsonl': Jsonl, 'webdataset': Tars, 'grit': Tars} | {name: CocoLayout for name in CocoLayout.kinds}
