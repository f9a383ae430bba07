"""COCO's own annotation files → a region-text data set.

An image's captions are COCO's, its regions are the annotated boxes, and a region's caption is its category's name.
Source: Lin et al., *Microsoft COCO: Common Objects in Context*, 2014; Kirillov et al., *Panoptic Segmentation*, 2019;
the formats are described at cocodataset.org/#format-data.
"""
from collections.abc import Iterator
import dataclasses
import functools
import operator
import os
from typing import Any

from cloc_jax.data import schema
from cloc_jax.data import storage
from cloc_jax.data.importers import counts as counts_lib
from cloc_jax.data.importers import engine
from cloc_jax.data.importers import images
from cloc_jax.data.importers import json_stream
from cloc_jax.data.importers import records


@dataclasses.dataclass(frozen=True)
class CocoSource:
  """One split of the data set to be, and where it comes from.

  split: its name.
  images: the folder of image files.
  instances: an `instances_*.json` file: boxes and categories.
  captions: a `captions_*.json` file; None for a data set without image captions.
  panoptic: a `panoptic_*.json` file in place of `instances`: it holds the same things, and stuff.
  With `captions` alone the data set has no regions.
  """
  split: str
  images: str | os.PathLike
  instances: str | os.PathLike | None = None
  captions: str | os.PathLike | None = None
  panoptic: str | os.PathLike | None = None

  @property
  def boxes(self) -> str | os.PathLike | None:
    """The file that boxes come from."""
    return self.instances if self.instances is not None else self.panoptic

  @property
  def main(self) -> str | os.PathLike:
    """The file that says which images there are: that of the boxes, or of the captions where there are no boxes."""
    return self.captions if self.boxes is None else self.boxes


@dataclasses.dataclass
class Coco(engine.Importer):
  """COCO's importer, and the base of those for formats in COCO's layout.

  sources: one for each split, all with the same categories.
  name, description: see schema.DatasetMeta.
  stuff: take boxes around stuff (sky, grass) from panoptic files too.
  trust_boxes: do not ask whether the boxes look like COCO's xywh pixels.
  images_per_shard: how many images make a shard.
  """
  sources: tuple[CocoSource, ...]
  name: str = 'coco'
  description: str = 'COCO: images, their captions, and boxes captioned by category.'
  stuff: bool = False
  trust_boxes: bool = False
  images_per_shard: int = 1024

  label = 'coco'  # Region.source
  search = False  # see images.Piece
  reasons = ('', 'crowd', 'stuff')
  note_crowds = True  # extra['crowds']: split → image_id → [category number, x0, y0, x1, y1], for detection

  def __post_init__(self):
    self.sources = records.check_splits(self.sources)
    for source in self.sources:
      if source.instances is not None and source.panoptic is not None:
        raise ValueError(f'split {source.split!r}: expected either instances or panoptic, which hold the same things')
      if source.main is None:
        raise ValueError(f'split {source.split!r}: expected instances or panoptic for boxes, or captions, or both')
      records.check_folder(source.images, where=f'split {source.split!r}: ')

  def files(self) -> list[str | os.PathLike]:
    found = [path for s in self.sources for path in (s.boxes, s.captions) if path is not None]
    return [json_stream.check_file(path) for path in found]

  def splits(self) -> dict[str, list[engine.Task]]:
    self._categories: dict[int, str] = {}
    self._extra: dict[str, Any] = {}
    self._licenses, self._counts = {}, {}
    self._crowds: dict[str, dict[str, list]] = {}
    found = {}
    for source in self.sources:
      table = images.Table(list_name='annotations' if source.instances is not None else 'segments')
      self._read_images(table, source)
      if source.boxes is not None:
        self._add_categories(source.boxes)
        (self._read_instances if source.instances is not None else self._read_panoptic)(table, source)
      if source.captions is not None:
        self._read_captions(table, source)
      for item in json_stream.value(source.main, 'licenses', ()):  # COCO's stand before the long lists
        self._licenses[str(item.get('name', ''))] = str(item.get('url', ''))
      found[source.split] = table.tasks(
          folder=storage.path(source.images), category_names=self._categories, promised='xywh pixels',
          where=str(source.main), images_per_shard=self.images_per_shard, trust_boxes=self.trust_boxes,
          source=self.label, reasons=self.reasons, search=self.search)
      self._counts[source.split] = table.counts
    return found

  def counts(self) -> dict[str, counts_lib.Counts]:
    return self._counts

  def read(self, task: engine.Task, report: counts_lib.Counts) -> Iterator[schema.Example]:
    return images.read_piece(task.payload, report)

  def meta(self) -> schema.DatasetMeta:
    number = {key: i for i, key in enumerate(sorted(self._categories))}
    crowds = {split: {image: [[number[c], *box] for c, *box in boxes] for image, boxes in images.items()}
              for split, images in self._crowds.items()}
    extra = {'provenance': f'{self.label} annotations', 'files': [storage.path(s.main).name for s in self.sources],
             'licenses': self._licenses, **({'crowds': crowds} if self.note_crowds else {})}
    return schema.DatasetMeta(
        name=self.name, description=self.description, extra=extra | self._extra,
        categories=tuple(self._categories[key] for key in sorted(self._categories)))

  # What formats in COCO's layout say otherwise.

  def category_name(self, item: dict, *, where: str) -> str:
    """A category's name as captions will have it."""
    return str(json_stream.get(item, 'name', where=where)).lower()

  def file_name(self, item: dict, *, where: str) -> str:
    """An image's file name, relative to the source's folder."""
    name = json_stream.get(item, 'file_name', where=where)
    if not isinstance(name, str) or not name:
      raise ValueError(f"{where}: 'file_name' must be a file's name, got {name!r}")
    return name

  def note_image(self, item: dict, source: CocoSource) -> None:
    """Called with every image's entry, for what a format says of images beside their size."""

  def note_category(self, item: dict) -> None:
    """The same for the categories."""

  def _add_categories(self, path):
    things = {}
    for i, item in enumerate(json_stream.items(path, 'categories')):
      where = f'{path}: categories[{i}]'
      key, name = json_stream.get(item, 'id', where=where), self.category_name(item, where=where)
      things[key] = bool(item.get('isthing', 1))
      if key not in self._categories:
        self.note_category(item)
      if self._categories.setdefault(key, name) != name:
        raise ValueError(f'{where}: category {key} is {name!r} here but {self._categories[key]!r} in another source')
    self._things = things

  def _read_images(self, table, source):
    for i, item in enumerate(json_stream.items(source.main, 'images')):
      where = f'{source.main}: images[{i}]'
      key, height, width = (json_stream.get(item, k, where=where) for k in ('id', 'height', 'width'))
      name = self.file_name(item, where=where)
      if not all(isinstance(side, int) and side > 0 for side in (height, width)):
        raise ValueError(f'{where}: expected height and width in whole pixels, got {height!r} and {width!r}')
      if table.add_image(key, name=name, height=height, width=width, where=where):
        self.note_image(item, source)

  def _read_instances(self, table, source):
    for i, item in enumerate(json_stream.items(source.boxes, 'annotations')):
      where = functools.partial('{}: annotations[{}]'.format, source.boxes, i)
      self._add_box(table, _get(item, 'image_id', where), item, where, split=source.split)

  def _read_panoptic(self, table, source):
    for i, item in enumerate(json_stream.items(source.boxes, 'annotations')):
      where = functools.partial('{}: annotations[{}]'.format, source.boxes, i)
      image = _get(item, 'image_id', where)
      for j, segment in enumerate(_get(item, 'segments_info', where)):
        self._add_box(table, image, segment,
                      functools.partial('{}: annotations[{}]: segments_info[{}]'.format, source.boxes, i, j),
                      split=source.split)

  def _add_box(self, table, image, item, where, *, split):
    category = _get(item, 'category_id', where)
    skip = 1 if item.get('iscrowd') else 2 if not (self.stuff or self._things.get(category, True)) else 0
    try:
      category = operator.index(category)
    except TypeError:
      raise ValueError(f'{where()}: category_id must be a whole number, got {category!r}') from None
    box = records.four_numbers(_get(item, 'bbox', where), where, what="'bbox' (left, top, width, height)")
    table.add_box(image, box=box, category=category, skip=skip)
    if skip == 1 and self.note_crowds and category in self._categories:
      x, y, w, h = box
      self._crowds.setdefault(split, {}).setdefault(str(image), []).append([category, x, y, x + w, y + h])

  def _read_captions(self, table, source):
    for i, item in enumerate(json_stream.items(source.captions, 'annotations')):
      where = functools.partial('{}: annotations[{}]'.format, source.captions, i)
      table.add_caption(_get(item, 'image_id', where), str(_get(item, 'caption', where)))


def _get(item, key, where):
  """json_stream.get with a `where` that is spelt out only for an error: there may be millions of items."""
  try:
    return item[key]
  except (KeyError, TypeError):
    return json_stream.get(item, key, where=where())
