"""RefCOCO, RefCOCO+ and RefCOCOg → a region-text data set with their own splits.

A data set is a pickle, `refs(unc).p` or the like, of a list of references: {image_id, ann_id, category_id, split,
sentences: [{sent, raw, tokens, sent_id}], …}; and `instances.json` in COCO's layout, with the boxes and sizes.
Sources: Yu et al., *Modeling Context in Referring Expressions*, 2016; github.com/lichengunc/refer (layout).
"""
from collections.abc import Iterator
import dataclasses
import os
import pickle
from typing import Any

from cloc_jax.data import schema
from cloc_jax.data import storage
from cloc_jax.data.importers import counts as counts_lib
from cloc_jax.data.importers import engine
from cloc_jax.data.importers import json_stream
from cloc_jax.data.importers import records
from cloc_jax.data.importers import refcoco_counts

_ORDER = ('train', 'val', 'test', 'testA', 'testB')


@dataclasses.dataclass
class RefCoco(engine.Importer):
  """The importer; one region for each sentence. Images of several splits (RefCOCOg's google has some) are in each.

  refs: the pickle, read without running any of it.
  instances: instances.json.
  images: the folder of COCO_train2014_….jpg.
  wanted: splits to import; empty for all there are.
  name: 'refcoco', 'refcoco_plus', …; Region.source too. trust_boxes, images_per_shard: see coco.Coco.
  """
  refs: str | os.PathLike
  instances: str | os.PathLike
  images: str | os.PathLike
  wanted: tuple[str, ...] = ()
  name: str = 'refcoco'
  trust_boxes: bool = False
  images_per_shard: int = 1024

  def __post_init__(self):
    records.check_folder(self.images)

  def files(self) -> list[str | os.PathLike]:
    return [json_stream.check_file(path) for path in (self.refs, self.instances)]

  def splits(self) -> dict[str, list[engine.Task]]:
    refs = read_pickle(self.refs)
    if not isinstance(refs, list):
      raise ValueError(f'{self.refs}: expected a list of references, got a {type(refs).__name__}')
    self._categories = {}
    for i, item in enumerate(json_stream.items(self.instances, 'categories')):
      where = f'{self.instances}: categories[{i}]'
      self._categories[json_stream.get(item, 'id', where=where)] = str(json_stream.get(item, 'name', where=where))
    by_split = self._gather(refs)
    images = {}
    for i, item in enumerate(json_stream.items(self.instances, 'images')):
      where = f'{self.instances}: images[{i}]'
      key, name, *size = (json_stream.get(item, k, where=where) for k in ('id', 'file_name', 'height', 'width'))
      images[key] = (str(name), tuple(size))
    folder, found, self._counts = storage.path(self.images), {}, {}
    for split in [s for s in (*_ORDER, *sorted(by_split.keys() - set(_ORDER))) if s in by_split]:
      counts, rows = self._counts.setdefault(split, counts_lib.Counts()), []
      for key, phrases in by_split[split].items():
        if key not in images:
          counts.dropped('boxes', 'of an image not listed', f'image {key}', len(phrases))
          continue
        name, size = images[key]
        rows.append(records.Record(str(key), folder / name, size=size, phrases=tuple(phrases),
                                   convention='xywh pixels'))
      found[split] = [engine.Task(f'{split}, images {i * self.images_per_shard} on', piece, images=len(piece))
                      for i, piece in enumerate(records.chunks(rows, self.images_per_shard))]
    refcoco_counts.check(self._tally, self._counts, name=self.name, path=storage.path(self.refs))
    return found

  def counts(self) -> dict[str, counts_lib.Counts]:
    return self._counts

  def read(self, task: engine.Task, report: counts_lib.Counts) -> Iterator[schema.Example]:
    yield from records.examples(task.payload, report, where=f'{self.instances}, {task.label}',
                                trust_boxes=self.trust_boxes)

  def meta(self) -> schema.DatasetMeta:
    return schema.DatasetMeta(
        name=self.name, description='Referring expressions for objects in COCO images.',
        categories=tuple(self._categories[key] for key in sorted(self._categories)),
        extra={'provenance': 'RefCOCO annotations on COCO images',
               'data_set': refcoco_counts.data_set(self.name, storage.path(self.refs)),
               'files': [storage.path(path).name for path in self.files()],
               'sha256': {storage.path(self.refs).name: storage.sha256(self.refs)}})

  def _gather(self, refs):
    """{split: {image id: phrases}}, images in the order of their first reference."""
    boxes = {json_stream.get(ref, 'ann_id', where=f'{self.refs}: [{i}]'): None for i, ref in enumerate(refs)}
    for i, item in enumerate(json_stream.items(self.instances, 'annotations')):
      where = f'{self.instances}: annotations[{i}]'
      key = json_stream.get(item, 'id', where=where)
      if key in boxes:
        boxes[key] = json_stream.get(item, 'image_id', where=where), json_stream.get(item, 'bbox', where=where)
    found: dict[str, dict[Any, list]] = {}
    self._tally: dict[str, refcoco_counts.Tally] = {}
    for i, ref in enumerate(refs):
      where = f'{self.refs}: [{i}]'
      key, annotation, category, split, sentences = (
          json_stream.get(ref, name, where=where)
          for name in ('image_id', 'ann_id', 'category_id', 'split', 'sentences'))
      if self.wanted and split not in self.wanted:
        continue
      if boxes[annotation] is None:
        raise ValueError(f'{where}: ann_id {annotation} is not in {self.instances}')
      if boxes[annotation][0] != key:
        raise ValueError(f'{where}: ann_id {annotation} is of image {boxes[annotation][0]}, not of {key}')
      if category not in self._categories:
        raise ValueError(f'{where}: category_id {category} is not among the categories of {self.instances}')
      phrases = found.setdefault(split, {}).setdefault(key, [])
      tally = self._tally.setdefault(split, refcoco_counts.Tally())
      tally.references.add(i)
      tally.images.add(key)
      tally.sentences += len(sentences)
      for j, sentence in enumerate(sentences):
        phrases.append(records.Phrase(
            boxes[annotation][1], str(json_stream.get(sentence, 'sent', where=f'{where}: sentences[{j}]')),
            f'refs[{i}], sentences[{j}]', category=self._categories[category], source=self.name))
    missing = [split for split in self.wanted if split not in found]
    if missing:
      raise ValueError(f'{self.refs}: no references of split {missing[0]!r}; '
                       f'it has {sorted({ref["split"] for ref in refs})}')
    return found


class _Plain(pickle.Unpickler):
  """Reads containers, texts and numbers; a pickle that names a class or function, which could run code, is refused."""

  def find_class(self, module, name):
    raise pickle.UnpicklingError(f'it asks for {module}.{name}; only lists, dicts, texts and numbers are read')


def read_pickle(path: str | os.PathLike) -> Any:
  """A pickle of plain containers, also of Python 2; runs nothing that stands in it.

  Raises:
    ValueError: naming the file, if it holds anything else or is cut off.
  """
  with storage.open_binary(json_stream.check_file(path)) as file:
    try:
      return _Plain(file, encoding='utf-8', errors='replace').load()
    except Exception as error:  # what a damaged pickle raises is not bounded
      raise ValueError(f'{path} is no pickle of plain containers, or cut off: {error}') from error
