"""Boxes. One format everywhere inside the project: float xyxy (left, top, right, bottom), normalised to [0, 1].

In a Batch the unit square is the padded canvas; in a stored record it is the original image (geometry.py goes
between the two). Functions take NumPy or JAX arrays of shape (..., 4) and return the same kind.
"""
import jax
import jax.numpy as jnp
import numpy as np


def _xp(*arrays):
  return jnp if any(isinstance(a, jax.Array) for a in arrays) else np


def from_xywh(boxes):
  """(left, top, width, height), COCO's order, → xyxy."""
  xp = _xp(boxes)
  return xp.concatenate([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], -1)


def to_xywh(boxes):
  """xyxy → (left, top, width, height)."""
  xp = _xp(boxes)
  return xp.concatenate([boxes[..., :2], boxes[..., 2:] - boxes[..., :2]], -1)


def _extent(boxes, height, width):
  extent = _xp(boxes).asarray([width, height, width, height], dtype=boxes.dtype)
  return extent.reshape((1,) * (boxes.ndim - 1) + (4,))


def normalize(boxes, *, height, width):
  """Pixels → fractions of an image of `height` × `width` pixels."""
  return boxes / _extent(boxes, height, width)


def denormalize(boxes, *, height, width):
  """Fractions of an image of `height` × `width` pixels → pixels."""
  return boxes * _extent(boxes, height, width)


def clip(boxes):
  """Clips to the unit square."""
  return _xp(boxes).clip(boxes, 0.0, 1.0)


def flip_horizontal(boxes):
  """Mirrors left and right inside the unit square; xyxy order is kept."""
  xp = _xp(boxes)
  x0, y0, x1, y1 = (boxes[..., i] for i in range(4))
  return xp.stack([1 - x1, y0, 1 - x0, y1], -1)


def area(boxes):
  """(..., 4) → (...,); zero for empty and inverted boxes."""
  xp = _xp(boxes)
  wh = xp.maximum(boxes[..., 2:] - boxes[..., :2], 0)
  return wh[..., 0] * wh[..., 1]


def _overlap(a, b):
  xp = _xp(a, b)
  top_left = xp.maximum(a[..., :2], b[..., :2])
  bottom_right = xp.minimum(a[..., 2:], b[..., 2:])
  inter = area(xp.concatenate([top_left, bottom_right], -1))
  return inter, area(a) + area(b) - inter


def iou(a, b):
  """Intersection over union, elementwise under broadcasting: (..., 4), (..., 4) → (...,). Two empty boxes give 0."""
  xp = _xp(a, b)
  inter, union = _overlap(a, b)
  return inter / xp.maximum(union, 1e-12)


def pairwise_iou(a, b):
  """(n, 4), (m, 4) → (n, m)."""
  return iou(a[..., :, None, :], b[..., None, :, :])


def giou(a, b):
  """Generalised IoU (Rezatofighi et al. 2019) in [-1, 1], elementwise under broadcasting."""
  xp = _xp(a, b)
  inter, union = _overlap(a, b)
  hull = area(xp.concatenate([xp.minimum(a[..., :2], b[..., :2]), xp.maximum(a[..., 2:], b[..., 2:])], -1))
  return inter / xp.maximum(union, 1e-12) - (hull - union) / xp.maximum(hull, 1e-12)


# A box may stick out of its image by rounding or annotators' generosity; beyond this it is another format.
_FORMAT_SLACK = 0.5


def check_normalized(boxes, *, where: str) -> None:
  """Raises ValueError, naming `where`, if host boxes are not (n, 4) finite numbers that can be normalised xyxy."""
  boxes = np.asarray(boxes)
  if boxes.ndim != 2 or boxes.shape[-1] != 4:
    raise ValueError(f'{where}: expected boxes of shape (n, 4), got {boxes.shape}')
  if not np.isfinite(boxes).all():
    raise ValueError(f'{where}: boxes hold NaN or infinity: {boxes[~np.isfinite(boxes).all(-1)][0].tolist()}')
  if boxes.size and (boxes.max() > 1 + _FORMAT_SLACK or boxes.min() < -_FORMAT_SLACK):
    worst = boxes[np.abs(boxes - 0.5).max(-1).argmax()]
    raise ValueError(f'{where}: expected xyxy boxes normalised to [0, 1], got {worst.tolist()}, '
                     'which looks like pixels; divide x by the image width and y by its height')


def sanitize(boxes, *, min_size: float = 0.0):
  """Clips host boxes (n, 4) to the unit square and says which are usable.

  Returns:
    (boxes, keep, counts): the clipped boxes (n, 4) float32, `keep` (n,) bool, and counts of what was found:
    'inverted' (right < left or bottom < top), 'empty' (no area, before or after clipping, or a side at or under
    `min_size`), and 'clipped' (kept, but stuck out of the image). Callers report the counts; nothing is silent.
  """
  boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
  inverted = (boxes[:, 2:] < boxes[:, :2]).any(-1)
  clipped = clip(boxes)
  empty = ~inverted & ((clipped[:, 2:] - clipped[:, :2]) <= min_size).any(-1)
  keep = ~(inverted | empty)
  moved = keep & (np.abs(clipped - boxes) > 1e-4).any(-1)
  return clipped, keep, {'inverted': int(inverted.sum()), 'empty': int(empty.sum()), 'clipped': int(moved.sum())}
