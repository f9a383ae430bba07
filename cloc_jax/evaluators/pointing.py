"""The pointing game: is the point that a phrase points at inside its box."""
import numpy as np

from cloc_jax.evaluators import grounding, ranking
from cloc_jax.evaluators.collect import Predictions


class PointingGame:
  """Protocol pointing_game@1: one point a phrase, right if it lies in the phrase's own box, borders included.

  Yields, as fractions of the phrases:
    patch_acc, patch_acc_any      the point is the centre of the patch whose embedding is most similar to the phrase,
                                  among those on the image; `any`: in any box of the image with an equal phrase
    center_acc, center_acc_any    the point is the centre of the box head's box
    chance                        what a point drawn at random on the image would reach (mean share of the image that
                                  the boxes cover)
    phrases
  Patches are the last layer's tokens through the final norm and projection, at the resolution of the patch grid: with
  14 × 14 patches a small object may hold no centre of any. Published pointing games (Zhang et al. 2016; Flickr30k
  Entities) allow a margin of 15 pixels around the box or use heat maps at full resolution: do not compare.

  Args:
    prefix: goes before each yielded name.
  """
  protocol = 'pointing_game@1'

  def __init__(self, *, prefix: str = ''):
    self._prefix = prefix

  def run(self, predictions: Predictions):
    """Yields (name, value). Raises NothingToMeasure without points, or phrases."""
    if predictions.points is None and predictions.pred_boxes is None:
      raise ranking.NothingToMeasure('the model has neither patch embeddings nor a box head')
    region, _ = grounding.named_regions(predictions)
    if predictions.points is not None:
      yield from self._figures('patch_acc', predictions.points[region], predictions, region)
    if predictions.pred_boxes is not None:
      image = predictions.region_image[region]
      # Clipped to the image first, as it is when its IoU is taken.
      found = predictions.in_pixels(predictions.pred_boxes[region], image=image)
      found = np.stack([predictions.geometry[i].boxes_to_canvas(box) for i, box in zip(image, found)])
      yield from self._figures('center_acc', (found[:, :2] + found[:, 2:]) / 2, predictions, region)
    boxes = predictions.in_pixels(predictions.boxes[region], image=predictions.region_image[region]).astype(np.float64)
    sizes = np.array([predictions.geometry[i].height * predictions.geometry[i].width
                      for i in predictions.region_image[region]])
    yield self._prefix + 'chance', float(np.mean(np.prod(boxes[:, 2:] - boxes[:, :2], -1) / sizes))
    yield self._prefix + 'phrases', len(region)

  def _figures(self, name, points, predictions, region):
    boxes = predictions.boxes[region]
    hit = _inside(points, boxes)
    any_hit = hit.copy()
    for members in grounding.same_phrase(predictions, region):
      any_hit[members] = _inside(points[members][:, None], boxes[members][None]).any(1)
    yield self._prefix + name, float(hit.mean())
    yield f'{self._prefix}{name}_any', float(any_hit.mean())


def _inside(points, boxes) -> np.ndarray:
  return ((points >= boxes[..., :2]) & (points <= boxes[..., 2:])).all(-1)
