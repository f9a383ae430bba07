"""Grounding by ranking given boxes: which of an image's boxes is most like the phrase."""
import numpy as np

from cloc_jax import boxes as box_lib
from cloc_jax.evaluators import grounding, ranking
from cloc_jax.evaluators.collect import Predictions


class ProposalGrounding:
  """Protocol grounding_proposals@1: the proposals are all boxes of the image, the phrase's own among them.

  The box whose embedding is most similar to the phrase's is the answer; it is compared as in Grounding, and yields the
  same names. Of boxes that are equally similar, the one that fits worst is taken: ties count against the model. Beside
  those:
    proposals            different boxes an image, mean over the phrases: chance is about one in so many. RefCOCO has
                         a region for each sentence, and so the same box several times
    phrases_one_box      phrases of images with a single box, which any model answers rightly
    acc_iou50_choice     acc_iou50 of the other phrases alone

  Do not compare with figures over a detector's proposals (AlphaCLIP's and ReCLIP's on RefCOCO take MAttNet's boxes): no
  proposal misses its object here. Nor with a box head's, which is given no boxes.

  Args:
    prefix: goes before each yielded name.
  """
  protocol = 'grounding_proposals@1'

  def __init__(self, *, prefix: str = ''):
    self._prefix = prefix

  def run(self, predictions: Predictions):
    """Yields (name, value). Raises NothingToMeasure without region embeddings or phrases."""
    result = self.measure(predictions)
    distinct, _ = ranking.distinct_boxes(predictions.region_image, predictions.boxes)
    counts = np.bincount(predictions.region_image[distinct])[predictions.region_image[result.region]]
    choice = counts > 1
    values = {**grounding.figures(result, predictions), 'proposals': float(counts.mean()),
              'phrases_one_box': int((~choice).sum())}
    if choice.any():
      values['acc_iou50_choice'] = float((result.iou[choice] >= grounding.IOU_THRESHOLD).mean())
    for name, value in values.items():
      yield self._prefix + name, value

  def measure(self, predictions: Predictions) -> grounding.GroundingResult:
    """Chooses a box for every phrase; the outcome phrase by phrase. Raises as `run` does."""
    if predictions.z_region is None:
      raise ranking.NothingToMeasure('the model does not embed regions')
    region, no_caption = grounding.named_regions(predictions)
    boxes = predictions.in_pixels(predictions.boxes, image=predictions.region_image)
    found = np.empty((len(region), 4), boxes.dtype)
    order = np.argsort(predictions.region_image, kind='stable')
    starts = np.searchsorted(predictions.region_image[order], np.arange(len(predictions.image_ids) + 1))
    for position, r in enumerate(region):
      image = predictions.region_image[r]
      own = order[starts[image]:starts[image + 1]]
      similarity = predictions.z_region[own] @ predictions.z_region_text[r]
      best = own[similarity >= similarity.max() - ranking.TIE]
      found[position] = boxes[best[box_lib.iou(boxes[best], boxes[r][None]).argmin()]]
    return grounding.compare(predictions, found, region=region, no_caption=no_caption)
