"""Grounding: does the box head find what a phrase names."""
import dataclasses

import numpy as np

from cloc_jax import boxes as box_lib
from cloc_jax.evaluators import ranking
from cloc_jax.evaluators.collect import Predictions

IOU_THRESHOLD = 0.5


@dataclasses.dataclass(frozen=True)
class GroundingResult:
  """What became of every phrase; for dumps beside the figures.

  region: (p,) int64, which region of the Predictions each phrase is.
  boxes, pred_boxes: (p, 4) float32 xyxy in pixels of the original image.
  iou: (p,) of the predicted box with the phrase's own box.
  iou_any: (p,) the best IoU with a box of this image that has the same phrase.
  ambiguous: (p,) bool, the image has other boxes with the same phrase.
  no_caption: how many regions were left out for want of a phrase.
  """
  region: np.ndarray
  boxes: np.ndarray
  pred_boxes: np.ndarray
  iou: np.ndarray
  iou_any: np.ndarray
  ambiguous: np.ndarray
  no_caption: int


class Grounding:
  """Protocol grounding@1: one predicted box a phrase, against the box that the phrase was written for.

  Boxes are compared in pixels of the *original* image: undoing the resize moves the two sides of an IoU alike, but
  predicted boxes are clipped to the image, and a prediction that lies in the padding alone has no overlap. Yields:
    acc_iou50        share of phrases with IoU ≥ 0.5 with their own box (RefCOCO's accuracy)
    mean_iou         mean IoU with their own box
    acc_iou50_any    the same, where any box of the image with an equal phrase will do (Flickr30k's any-box protocol):
    mean_iou_any     class names as phrases are ambiguous, and one predicted box cannot be all of them
    phrases, images, phrases_ambiguous, no_caption    how many; left out for want of a phrase
  Phrases are equal if they are in lower case with white space collapsed.

  Do not compare phrases that name one object (RefCOCO) with class names (COCO); own-box with any-box figures; nor the
  accuracy of a box head with that of ranking a detector's proposals.

  Args:
    prefix: goes before each yielded name.
  """
  protocol = 'grounding@1'

  def __init__(self, *, prefix: str = ''):
    self._prefix = prefix

  def run(self, predictions: Predictions):
    """Yields (name, value). Raises NothingToMeasure without predicted boxes or phrases."""
    for name, value in figures(self.measure(predictions), predictions).items():
      yield self._prefix + name, value

  def measure(self, predictions: Predictions) -> GroundingResult:
    """Compares every phrase's boxes; the outcome phrase by phrase. Raises as `run` does."""
    if predictions.pred_boxes is None:
      raise ranking.NothingToMeasure('the model has no box head')
    region, no_caption = named_regions(predictions)
    found = predictions.in_pixels(predictions.pred_boxes[region], image=predictions.region_image[region])
    return compare(predictions, found, region=region, no_caption=no_caption)


def named_regions(predictions: Predictions) -> tuple[np.ndarray, int]:
  """(the regions that have a caption, how many have none). Raises NothingToMeasure where none has one."""
  named = np.array([bool(ranking.canonical(c)) for c in predictions.region_captions], bool)
  if not named.any():
    raise ranking.NothingToMeasure(f'none of {len(named)} regions has a caption')
  return np.flatnonzero(named), int((~named).sum())


def compare(predictions: Predictions, found: np.ndarray, *, region: np.ndarray, no_caption: int) -> GroundingResult:
  """What becomes of the boxes `found` (p, 4), pixels of the original images, for the phrases of `region` (p,)."""
  boxes = predictions.in_pixels(predictions.boxes[region], image=predictions.region_image[region])
  iou = box_lib.iou(found, boxes)
  iou_any, ambiguous = iou.copy(), np.zeros(len(region), bool)
  for members in same_phrase(predictions, region):
    iou_any[members] = box_lib.pairwise_iou(found[members], boxes[members]).max(1)
    ambiguous[members] = True
  return GroundingResult(region=region, boxes=boxes, pred_boxes=found, iou=iou, iou_any=iou_any, ambiguous=ambiguous,
                         no_caption=no_caption)


def figures(result: GroundingResult, predictions: Predictions) -> dict[str, float | int]:
  """The figures of Grounding and ProposalGrounding."""
  return {'acc_iou50': float((result.iou >= IOU_THRESHOLD).mean()),
          'mean_iou': float(result.iou.mean()),
          'acc_iou50_any': float((result.iou_any >= IOU_THRESHOLD).mean()),
          'mean_iou_any': float(result.iou_any.mean()),
          'phrases': len(result.iou),
          'images': len(np.unique(predictions.region_image[result.region])),
          'phrases_ambiguous': int(result.ambiguous.sum()),
          'no_caption': result.no_caption}


def same_phrase(predictions, region) -> list[np.ndarray]:
  """Groups of two or more positions in `region` that share image and phrase."""
  groups: dict[tuple[int, str], list[int]] = {}
  for position, r in enumerate(region):
    key = (int(predictions.region_image[r]), ranking.canonical(predictions.region_captions[r]))
    groups.setdefault(key, []).append(position)
  return [np.array(g) for g in groups.values() if len(g) > 1]
