"""Boxes that somebody else's detector proposed, read from a file."""
import dataclasses
import os
import pathlib
import zipfile

import numpy as np

from cloc_jax import box_conventions
from cloc_jax import boxes as box_lib
from cloc_jax.data import sources
from cloc_jax.data.importers import json_stream

_RECORDS, _BOXES = 256, 200  # that are looked at, at least, to see how boxes are written
_NONE = (np.zeros((0, 4), np.float32), np.zeros(0, np.float32))


@dataclasses.dataclass(frozen=True)
class Proposals:
  """boxes, scores: image_id → (n, 4) float32 xyxy in pixels of the original image, (n,) float32, 1 where none came.

  dropped: proposals without area.
  """
  boxes: dict[str, np.ndarray]
  scores: dict[str, np.ndarray]
  dropped: int = 0

  def of(self, image_id: str) -> tuple[np.ndarray, np.ndarray]:
    """(boxes, scores) of an image; empty where it has none."""
    return (self.boxes[image_id], self.scores[image_id]) if image_id in self.boxes else _NONE

  def some_sizes(self, source) -> dict[str, tuple[int, int]]:
    """image_id → (height, width) of some records, spread over a split: as many as `check` needs.

    Of all of them only where next to none has a proposal. Records that cannot be read are passed over.
    """
    sizes, boxes, step = {}, 0, -(-len(source) // _RECORDS)
    order = (i for start in range(step) for i in range(start, len(source), step))
    for place, i in enumerate(order):
      if place >= _RECORDS and boxes >= _BOXES:
        break
      try:
        example = source[i]
      except sources.RecordError:
        continue
      sizes[example.image_id] = (example.height, example.width)
      boxes += len(self.of(example.image_id)[0])
    return sizes

  def check(self, sizes: dict[str, tuple[int, int]], *, where: str) -> None:
    """Checks them against the (height, width) of images of the data set.

    Raises:
      ValueError: if none of the images has a proposal, or the boxes are not pixels in COCO's order.
    """
    known = [image_id for image_id in self.boxes if image_id in sizes]
    if not known:
      raise ValueError(f'{where}: no proposal for any of the {len(sizes)} images; the file speaks of images such as '
                       f'{list(self.boxes)[:3]}, the data set of {list(sizes)[:3]}')
    boxes = np.concatenate([self.boxes[i] for i in known])
    repeated = np.repeat(np.array([sizes[i] for i in known]), [len(self.boxes[i]) for i in known], axis=0)
    box_conventions.check(box_lib.to_xywh(boxes), sizes=repeated, promised='xywh pixels', where=where)


def read(path: str | os.PathLike) -> Proposals:
  """Reads proposals: `bbox` is left, top, width, height in pixels, as in COCO's results.

  Args:
    path: JSON, a list of {"image_id": …, "bbox": [x, y, w, h], "score": s} as detectors write for COCO (other keys,
      such as category_id, are ignored); or NPZ with arrays `image_id` (n,), `bbox` (n, 4) and `score` (n,). Scores may
      be left out: all of them, not some.

  Raises:
    FileNotFoundError, ValueError: naming the file, the entry and what was expected.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f'{path}: no such file')
  ids, boxes, scores = (_read_npz if path.suffix == '.npz' else _read_json)(path)
  if boxes.shape != (len(ids), 4) or scores.shape != (len(ids),):
    raise ValueError(f'{path}: expected image_id (n,), bbox (n, 4) and score (n,), got {ids.shape}, {boxes.shape} and '
                     f'{scores.shape}')
  bad = np.flatnonzero(~np.isfinite(boxes).all(1) | ~(scores >= 0) | ~np.isfinite(scores))
  if len(bad):
    raise ValueError(f'{path}: entry {bad[0]} (image {ids[bad[0]]}): expected finite numbers and a score of 0 or more, '
                     f'got {boxes[bad[0]].tolist()} and {scores[bad[0]]}')
  if not len(ids):
    raise ValueError(f'{path}: holds no proposals')
  kept = (boxes[:, 2:] > 0).all(1)
  ids, boxes, scores = ids[kept], box_lib.from_xywh(boxes[kept]).astype(np.float32), scores[kept].astype(np.float32)
  order = np.argsort(ids, kind='stable')
  names, starts = np.unique(ids[order], return_index=True)
  rows = np.split(order, starts[1:])
  return Proposals(boxes={str(n): boxes[r] for n, r in zip(names, rows)}, dropped=int((~kept).sum()),
                   scores={str(n): scores[r] for n, r in zip(names, rows)})


def _read_json(path):
  ids, boxes, scores = [], [], []
  for i, item in enumerate(json_stream.items(path, None)):
    where = f'{path}: entry {i}'
    ids.append(str(json_stream.get(item, 'image_id', where=where)))
    box = json_stream.get(item, 'bbox', where=where)
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(v, (int, float)) for v in box):
      raise ValueError(f"{where}: expected 'bbox' as four numbers (left, top, width, height), got {box!r}")
    boxes.append(box)
    if i and ('score' in item) != bool(scores):
      raise ValueError(f"{where}: expected a 'score' in every entry or in none")
    if 'score' in item:
      scores.append(item['score'])
  try:
    scores = np.array(scores or [1.0] * len(ids), np.float64)
  except (TypeError, ValueError) as error:
    raise ValueError(f'{path}: score: expected numbers: {error}') from error
  return np.array(ids, object), np.array(boxes, np.float64).reshape(-1, 4), scores


def _read_npz(path):
  try:
    with np.load(path, allow_pickle=False) as content:
      arrays = dict(content)
  except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
    raise ValueError(f'{path}: not an NPZ file of plain arrays: {error}') from error
  missing = sorted({'image_id', 'bbox'} - set(arrays))
  if missing:
    raise ValueError(f'{path}: lacks {missing}; it holds {sorted(arrays)}')
  ids = arrays['image_id'].astype(str).astype(object)
  scores = arrays.get('score', np.ones(len(ids)))
  return ids, arrays['bbox'].astype(np.float64), scores.astype(np.float64)
