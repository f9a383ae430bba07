"""From a detector's raw boxes to detections: threshold, un-padding, clipping, order; NumPy only."""
import numpy as np

from cloc_jax import boxes as box_lib
from cloc_jax.label import stages


def select(boxes: np.ndarray, scores: np.ndarray, phrases: np.ndarray, *, extent: tuple[float, float],
           height: int, width: int, threshold: float, nms: float | None = None) -> list[stages.Detection]:
  """What is kept of one image's predictions, the most confident first.

  Boxes go from the detector's canvas to the image, are clipped to it, and left out where less than a pixel of the
  original image remains: predictions in the padding end here.

  Args:
    boxes: (n, 4) centre x, centre y, width, height as fractions of the canvas, as DETR-like models predict them.
    scores: (n,) confidence of each box's best phrase, 0 to 1. phrases: (n,) its index.
    extent: (x, y): which part of the canvas, from its top left corner, is image.
    height, width: of the original image, pixels.
    threshold: boxes must be more confident than this.
    nms: if given, a box that overlaps a more confident one by more than this IoU is left out, whatever the phrases.

  Raises:
    ValueError: if a prediction is not a number.
  """
  if not (np.isfinite(scores).all() and np.isfinite(boxes).all()):
    raise ValueError('the detector predicted NaN or infinity: damaged weights, or a dtype too narrow for them')
  chosen = np.flatnonzero(scores > threshold)
  chosen = chosen[np.argsort(-scores[chosen], kind='stable')]
  centre, size = np.split(boxes[chosen].astype(np.float64), 2, -1)
  corners = np.concatenate([centre - size / 2, centre + size / 2], -1) / np.tile(extent, 2)
  corners = box_lib.clip(corners)
  sides = (corners[:, 2:] - corners[:, :2]) * (width, height)
  # A side of exactly a pixel must not hang on the last bit.
  whole = (sides > 1 - 1e-6).all(-1)
  corners, chosen = corners[whole], chosen[whole]
  if nms is not None:
    kept = _suppress(corners, nms)
    corners, chosen = corners[kept], chosen[kept]
  return [stages.Detection(box=tuple(box), phrase=int(phrases[i]), score=float(scores[i]))
          for box, i in zip(corners.tolist(), chosen)]


def _suppress(boxes, limit):
  """Indices of the boxes, in falling confidence, that overlap no kept one by more than `limit`."""
  kept = []
  for i, box in enumerate(boxes):
    if not kept or box_lib.iou(boxes[kept], box[None]).max() <= limit:
      kept.append(i)
  return kept
