"""COCO's own annotation files → a region-text data set.

An image's captions are COCO's, its regions are the annotated boxes, and a region's caption is its category's name.
Source: Lin et al., *Microsoft COCO: Common Objects in Context*, 2014; the format is described at cocodataset.org.
"""
from collections.abc import Callable, Iterator, Sequence
import dataclasses
import difflib
import json
import os
import pathlib

import numpy as np
import PIL.Image

from cloc_jax import boxes as box_lib
from cloc_jax.data import schema

_NAMED_FILES = 10  # how many bad files an error names; the rest are counted
_EXIF_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap height and width


@dataclasses.dataclass(frozen=True)
class CocoSource:
  """One split of the data set to be, and where it comes from.

  split: its name.
  images: the folder of image files.
  instances: an `instances_*.json` file: boxes and categories.
  captions: a `captions_*.json` file; None for a data set without image captions.
  """
  split: str
  images: str | os.PathLike
  instances: str | os.PathLike
  captions: str | os.PathLike | None = None


@dataclasses.dataclass
class SplitReport:
  """What became of one split's annotations. Every box and caption of the files is in exactly one of these counts.

  images, regions, captions: written.
  crowd: boxes around groups, left out. inverted, empty: boxes of negative size, or without area in their image, left
    out. clipped: boxes that were cut at their image's border, and kept.
  blank_captions: captions without a word, left out.
  orphans: boxes and captions of images that the files do not list, left out.
  lost_with_image: boxes and captions of images left out.
  images_without_regions, images_without_captions: written, but without these.
  missing: image files that do not exist. unreadable: that are no images, or not of the annotated size.
  """
  images: int = 0
  regions: int = 0
  captions: int = 0
  crowd: int = 0
  inverted: int = 0
  empty: int = 0
  clipped: int = 0
  blank_captions: int = 0
  orphans: int = 0
  lost_with_image: int = 0
  images_without_regions: int = 0
  images_without_captions: int = 0
  missing: tuple[str, ...] = ()
  unreadable: tuple[str, ...] = ()

  def counts(self) -> dict[str, int]:
    """All fields as numbers; for lists of files, their lengths."""
    return {name: value if isinstance(value, int) else len(value) for name, value in vars(self).items()}


@dataclasses.dataclass
class _Image:
  """An image to import. captions, boxes (xywh pixels) and names gather as annotations are read."""
  image_id: str
  path: pathlib.Path
  height: int
  width: int
  captions: list[str] = dataclasses.field(default_factory=list)
  boxes: list[list[float]] = dataclasses.field(default_factory=list)
  names: list[str] = dataclasses.field(default_factory=list)
  regions: tuple[schema.Region, ...] = ()


def import_coco(sources: Sequence[CocoSource], *, out: str | os.PathLike, name: str = 'coco', description: str = '',
                allow_missing: bool = False, overwrite: bool = False,
                progress: Callable[[str, int], None] | None = None) -> dict[str, SplitReport]:
  """Writes a region-text data set from COCO's files, one split for each source.

  All annotations and image headers are read and checked before anything is written; the images themselves are
  streamed, byte for byte.

  Args:
    sources: one for each split, all with the same categories.
    out: the data set's folder, see schema.write_dataset.
    name, description: see schema.DatasetMeta.
    allow_missing: leave out, and count, images that are missing or not of the annotated size, instead of stopping.
    overwrite: replace a data set at `out`.
    progress: see schema.write_dataset.

  Returns:
    Split name → what became of its annotations. The counts are stored in the data set too, under extra['counts'].

  Raises:
    FileNotFoundError: a file or folder is missing; for images, the first ten are named and the others counted.
    ValueError: a file is not what it should be: its name, the key and the place in it are named.
  """
  if isinstance(sources, CocoSource):
    sources = [sources]
  splits = [source.split for source in sources]
  if len(set(splits)) != len(splits):
    raise ValueError(f'two sources for the same split: {splits}')
  categories: dict[int, str] = {}
  images, reports, licenses = {}, {}, {}
  for source in sources:
    instances = _load(source.instances, keys=('images', 'annotations', 'categories'))
    _add_categories(categories, instances, path=source.instances)
    images[source.split], reports[source.split] = _read_source(source, instances, categories=categories)
    licenses |= {item.get('name', ''): item.get('url', '') for item in instances.get('licenses', ())}
  _check_files(reports, allow_missing=allow_missing)
  extra = {
      'provenance': 'COCO annotations', 'files': [pathlib.Path(s.instances).name for s in sources],
      'licenses': licenses, 'counts': {split: report.counts() for split, report in reports.items()}}
  meta = schema.DatasetMeta(
      name=name, description=description or 'COCO: images, their captions, and boxes captioned by category.',
      categories=tuple(categories[key] for key in sorted(categories)), extra=extra)
  schema.write_dataset(
      out, meta=meta, splits={split: _examples(images[split]) for split in splits}, overwrite=overwrite,
      progress=progress)
  return reports


def format_report(reports: dict[str, SplitReport]) -> str:
  """The counts as a table for people, a column for each split; rows that are zero everywhere are left out."""
  rows = [('', *reports)]
  for name in SplitReport().counts():
    values = [report.counts()[name] for report in reports.values()]
    if any(values):
      rows.append((name.replace('_', ' '), *(f'{value:,}' for value in values)))
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  return '\n'.join(
      '  '.join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:]))]) for row in rows)


def _load(path, *, keys):
  """Reads a JSON file and checks its top-level keys."""
  path = pathlib.Path(path).expanduser()
  if not path.is_file():
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob('*.json')], n=1, cutoff=0.4)
    raise FileNotFoundError(f'no such file: {path}' + (f'; did you mean {path.parent / near[0]}?' if near else ''))
  try:
    content = json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f'{path} is not a JSON file: {error}') from error
  if not isinstance(content, dict):
    raise ValueError(f'{path}: expected an object with the keys {list(keys)}, got a {type(content).__name__}')
  for key in keys:
    _get(content, key, where=str(path))
    if not isinstance(content[key], list):
      raise ValueError(f'{path}: {key!r} must be a list, got a {type(content[key]).__name__}')
  return content


def _get(item, key, *, where):
  """item[key], or a ValueError that names the file, the place in it, and the keys there are."""
  try:
    return item[key]
  except (KeyError, TypeError):
    have = sorted(item) if isinstance(item, dict) else f'a {type(item).__name__}'
    raise ValueError(f'{where}: no key {key!r}; found {have}') from None


def _add_categories(categories, instances, *, path):
  for i, item in enumerate(instances['categories']):
    where = f'{path}: categories[{i}]'
    key, name = _get(item, 'id', where=where), str(_get(item, 'name', where=where)).lower()
    if categories.setdefault(key, name) != name:
      raise ValueError(f'{where}: category {key} is {name!r} here but {categories[key]!r} in another source')


def _read_source(source, instances, *, categories):
  """Returns (images to write, SplitReport) of one source."""
  folder = pathlib.Path(source.images).expanduser()
  if not folder.is_dir():
    raise FileNotFoundError(f'split {source.split!r}: no such folder of images: {folder}')
  captions = None if source.captions is None else _load(source.captions, keys=('annotations',))
  report = SplitReport()
  images = _read_images(instances, folder=folder, path=source.instances)
  for i, item in enumerate(instances['annotations']):
    _add_box(images, item, categories=categories, report=report, where=f'{source.instances}: annotations[{i}]')
  for i, item in enumerate(captions['annotations'] if captions else ()):
    _add_caption(images, item, report=report, where=f'{source.captions}: annotations[{i}]')
  kept = []
  for image in images.values():
    if _is_sound(image, report):
      _finish(image, report)
      kept.append(image)
    else:
      report.lost_with_image += len(image.boxes) + len(image.captions)
  return kept, report


def _read_images(instances, *, folder, path):
  images = {}
  for i, item in enumerate(instances['images']):
    where = f'{path}: images[{i}]'
    key, file_name, height, width = (_get(item, k, where=where) for k in ('id', 'file_name', 'height', 'width'))
    images[key] = _Image(image_id=str(key), path=folder / file_name, height=height, width=width)
  return images


def _add_box(images, item, *, categories, report, where):
  image = images.get(_get(item, 'image_id', where=where))
  box, category = _get(item, 'bbox', where=where), _get(item, 'category_id', where=where)
  if category not in categories:
    raise ValueError(f'{where}: category_id {category!r} is not among the categories {sorted(categories)}')
  try:
    box = [float(value) for value in box]
  except (TypeError, ValueError):
    box = []
  if len(box) != 4 or not np.isfinite(box).all():
    raise ValueError(f"{where}: 'bbox' must be four numbers (left, top, width, height), got {item['bbox']!r}")
  if image is None:
    report.orphans += 1
  elif item.get('iscrowd'):
    report.crowd += 1
  else:
    image.boxes.append(box)
    image.names.append(categories[category])


def _add_caption(images, item, *, report, where):
  image = images.get(_get(item, 'image_id', where=where))
  caption = str(_get(item, 'caption', where=where)).strip()
  if image is None:
    report.orphans += 1
  elif not caption:
    report.blank_captions += 1
  else:
    image.captions.append(caption)


def _is_sound(image, report):
  """Whether the file exists and is of the annotated size; the report takes its name if not."""
  if not image.path.is_file():
    report.missing += (str(image.path),)
    return False
  try:
    with PIL.Image.open(image.path) as opened:  # reads the header alone
      width, height = opened.size
      if opened.getexif().get(_EXIF_ORIENTATION) in _TURNED:
        height, width = width, height
  except (OSError, SyntaxError, ValueError) as error:
    report.unreadable += (f'{image.path} ({error})',)
    return False
  if (height, width) != (image.height, image.width):
    report.unreadable += (f'{image.path} (annotated as {image.height}×{image.width}, but is {height}×{width})',)
    return False
  return True


def _finish(image, report):
  """Turns an image's boxes into regions and counts all there is about it."""
  boxes = np.array(image.boxes, np.float64).reshape(-1, 4)
  boxes, keep, found = box_lib.sanitize(
      box_lib.normalize(box_lib.from_xywh(boxes), height=image.height, width=image.width))
  for name, count in found.items():
    setattr(report, name, getattr(report, name) + count)
  image.regions = tuple(
      schema.Region(box=tuple(boxes[i].tolist()), caption=image.names[i], category=image.names[i], source='coco')
      for i in np.flatnonzero(keep))
  report.images += 1
  report.regions += len(image.regions)
  report.captions += len(image.captions)
  report.images_without_regions += not image.regions
  report.images_without_captions += not image.captions


def _check_files(reports, *, allow_missing):
  if allow_missing:
    return
  for kind, problem in (('missing', 'do not exist'), ('unreadable', 'are no images of the annotated size')):
    files = [name for report in reports.values() for name in getattr(report, kind)]
    if files:
      more = f'\n  … and {len(files) - _NAMED_FILES} more' if len(files) > _NAMED_FILES else ''
      listing = '\n  '.join(files[:_NAMED_FILES])
      raise (FileNotFoundError if kind == 'missing' else ValueError)(
          f'{len(files)} of the annotated images {problem}; allow missing images to leave them out:\n  {listing}{more}')


def _examples(images) -> Iterator[schema.Example]:
  for image in images:
    yield schema.Example(
        image=image.path.read_bytes(), image_id=image.image_id, height=image.height, width=image.width,
        captions=tuple(image.captions), regions=image.regions)
