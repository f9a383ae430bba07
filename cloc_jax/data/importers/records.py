"""One image as a source describes it → an example, with everything counted and the boxes' convention checked.

For formats that say of each image all at once: rows, archives, a file an image.
"""
from collections.abc import Callable, Iterable, Iterator, Sequence
import dataclasses
import functools
import os
from typing import Any

import numpy as np

from cloc_jax import box_conventions
from cloc_jax import boxes as box_lib
from cloc_jax.data import schema
from cloc_jax.data import storage
from cloc_jax.data.importers import counts as counts_lib
from cloc_jax.data.importers import images


@dataclasses.dataclass(frozen=True)
class Phrase:
  """A region as the source has it.

  box: four numbers in the record's convention.
  name: its place in the source, for reports: 'regions[3]'.
  skip: why it is not wanted, '' if it is.
  caption, category, score, source: see schema.Region.
  """
  box: Sequence[float]
  caption: str
  name: str
  category: str = ''
  score: float = 1.0
  source: str = ''
  skip: str = ''


@dataclasses.dataclass(frozen=True)
class Record:
  """An image with what belongs to it.

  image: the file's path, or its bytes.
  size: (height, width) in pixels as annotated; None where the source does not say.
  convention: of the boxes, one of box_conventions.CONVENTIONS.
  """
  image_id: str
  image: bytes | storage.Path
  captions: tuple[str, ...] = ()
  phrases: tuple[Phrase, ...] = ()
  size: tuple[int, int] | None = None
  convention: str = 'xyxy normalised'


def examples(records: Iterable[Record], report: counts_lib.Counts, *, where: str,
             trust_boxes: bool = False) -> Iterator[schema.Example]:
  """Yields the examples of a task's records.

  Raises:
    ValueError: for a box that is not four finite numbers; and at the end, naming `where`, if all boxes together do not
      look like what their format promises.
  """
  seen: dict[str, tuple[list, list]] = {}
  for record in records:
    loaded = _load(record, report)
    if loaded is None:
      lost(report, 'image lost', image_id=record.image_id, boxes=len(record.phrases), captions=len(record.captions))
      continue
    data, size = loaded
    at = '{}: image {}, {}'.format
    raw = np.array([four_numbers(p.box, functools.partial(at, where, record.image_id, p.name))
                    for p in record.phrases]).reshape(-1, 4)
    if not trust_boxes:
      found, sizes = seen.setdefault(record.convention, ([], []))
      found.append(raw)
      sizes.append(np.broadcast_to(size, (len(raw), 2)))
    yield _example(record, data, size, _fractions(raw, record.convention, size), report)
  for convention, (found, sizes) in seen.items():
    try:
      box_conventions.check(np.concatenate(found), sizes=np.concatenate(sizes), promised=convention, where=where)
    except ValueError as error:
      raise ValueError(f'{error}. Mend the file, or read it as promised with --trust-boxes (trust_boxes=true)') from None


def lost(report: counts_lib.Counts, reason: str, *, image_id: str, boxes: int, captions: int) -> None:
  """Counts the boxes and captions of an image that is not written."""
  report.dropped('boxes', reason, f'image {image_id}', boxes)
  report.dropped('captions', reason, f'image {image_id}', captions)


def four_numbers(box: Any, where: Callable[[], str], *, what: str = 'a box') -> list[float]:
  """A box as four finite floats, or ValueError naming `where()`, which is spelt out only then."""
  try:
    found = [float(value) for value in box]
  except (TypeError, ValueError):
    found = []
  if len(found) != 4 or not np.isfinite(found).all():
    raise ValueError(f'{where()}: {what} must be four numbers, got {box!r:.80}')
  return found


def chunks(rows: Sequence, size: int) -> list[Sequence]:
  """Cuts a sequence into pieces of `size`."""
  return [rows[begin:begin + size] for begin in range(0, len(rows), size)]


def check_splits(sources: Sequence) -> tuple:
  """A format's sources, one for each split, as a tuple; ValueError if two have the same split, or there is none."""
  sources = tuple(sources) if isinstance(sources, (list, tuple)) else (sources,)
  splits = [source.split for source in sources]
  if not splits or len(set(splits)) != len(splits):
    raise ValueError(f'two sources for the same split: {splits}' if splits else 'no sources given')
  return sources


def list_files(text: str) -> tuple[str, ...]:
  """'a.tar,b-*.tar' → all the files, those of a pattern in order of their names; FileNotFoundError if none fits."""
  return tuple(name for pattern in text.split(',') for name in storage.expand(pattern))


def check_folder(folder: str | os.PathLike, *, what: str = 'images', where: str = '') -> None:
  """Raises FileNotFoundError, with `where` before it, unless there is such a folder."""
  if not storage.path(folder).is_dir():
    raise FileNotFoundError(f'{where}no such folder of {what}: {folder}')


def _load(record, report):
  if not isinstance(record.image, bytes):
    return images.load_image(record.image, report, annotated=record.size)
  size = images.check_image(record.image, report, name=record.image_id, annotated=record.size)
  return None if size is None else (record.image, size)


def _fractions(boxes, convention, size):
  order, unit = convention.split(' ')
  if order == 'xywh':
    boxes = box_lib.from_xywh(boxes)
  elif order == 'yxyx':
    boxes = boxes[:, [1, 0, 3, 2]]
  if unit == 'pixels':
    return box_lib.normalize(boxes, height=size[0], width=size[1])
  return boxes / 1000 if unit == '0-1000' else boxes


def _example(record, data, size, boxes, report):
  phrases = record.phrases
  boxes, keep = images.sound_boxes(
      boxes, report, label=lambda i: f'image {record.image_id}, {phrases[i].name}',
      skip=[p.skip or ('' if p.caption.strip() else 'blank caption') for p in phrases])
  regions = tuple(
      schema.Region(box=tuple(boxes[i].tolist()), caption=phrases[i].caption.strip(), category=phrases[i].category,
                    score=float(np.float32(phrases[i].score)), source=phrases[i].source) for i in np.flatnonzero(keep))
  captions = images.sound_captions(record.captions, report, image_id=record.image_id)
  report.kept('images')
  if not regions:
    report.noted('images', 'without boxes', f'image {record.image_id}')
  if not captions:
    report.noted('images', 'without captions', f'image {record.image_id}')
  return schema.Example(image=data, image_id=record.image_id, height=size[0], width=size[1], captions=captions,
                        regions=regions)
