"""What a model answered on the first images of a split, region by region, as the evaluators measured it."""
import dataclasses
import os

import numpy as np

from cloc_jax import evaluators, inference
from cloc_jax.data import eval_pipeline, sources


@dataclasses.dataclass(frozen=True)
class RegionOutcome:
  """A region of an image and what became of it.

  index: which region of its image, from 0.
  caption, category: as in the data; the category may be ''.
  box: (4,) true box, xyxy, fractions of the canvas.
  found: (4,) where the model sees the caption; None where grounding was not measured.
  iou: of the two, in pixels of the original image; None like `found`.
  recognized: the class that the model gives to the true box; None where recognition was not measured.
  right: whether the evaluator counts that as right (it does not in a tie); None like `recognized`.
  """
  index: int
  caption: str
  category: str
  box: np.ndarray
  found: np.ndarray | None
  iou: float | None
  recognized: str | None
  right: bool | None


@dataclasses.dataclass(frozen=True)
class ImageOutcome:
  """canvas: (S, S, 3) uint8, what the model saw. captions: of the whole image."""
  image_id: str
  canvas: np.ndarray
  captions: tuple[str, ...]
  regions: tuple[RegionOutcome, ...]


@dataclasses.dataclass(frozen=True)
class Outcome:
  """images: in the order of the data. missing: 'grounding' or 'recognition' → why it was not measured."""
  images: tuple[ImageOutcome, ...]
  missing: dict[str, str]

  @property
  def grounded(self) -> list[tuple[ImageOutcome, RegionOutcome]]:
    """All regions whose grounding was measured, with their images."""
    return [(image, region) for image in self.images for region in image.regions if region.iou is not None]

  @property
  def recognized(self) -> list[RegionOutcome]:
    """All regions whose recognition was measured."""
    return [region for image in self.images for region in image.regions if region.recognized is not None]


def measure(cloc: inference.Cloc, *, path: str | os.PathLike, split: str, limit: int, batch_size: int = 64) -> Outcome:
  """Runs a model over the first `limit` images of a split.

  Args:
    cloc: the model.
    path, split: the data set.
    limit: images at most.
    batch_size: images at a time.

  Raises:
    FileNotFoundError, ValueError: as eval_pipeline.eval_batches and the evaluators.
  """
  fns = cloc.functions.encoder_fns(cloc.params)
  p = cloc.functions.preprocessing
  canvases: list[np.ndarray] = []

  def batches():
    for batch in eval_pipeline.eval_batches(path, split=split, batch_size=min(batch_size, limit), image_size=p.image_size,
                                       pad=p.pad, limit=limit):
      canvases.extend(batch.images[batch.image_mask])
      yield batch

  predictions = evaluators.collect(fns, batches())
  missing: dict[str, str] = {}
  grounding = _try(evaluators.Grounding(), predictions, missing, 'grounding')
  categories = sources.read_meta(path).categories
  recognition = None
  if categories:
    recognition = _try(evaluators.RegionRecognition(categories=categories, encode_text=fns.encode_text), predictions,
                       missing, 'recognition')
  else:
    missing['recognition'] = 'the data set lists no categories'
  regions = _regions(predictions, grounding=grounding, recognition=recognition)
  captions: list[list[str]] = [[] for _ in predictions.image_ids]
  for caption, image in zip(predictions.captions, predictions.caption_image):
    captions[image].append(caption)
  return Outcome(missing=missing, images=tuple(
      ImageOutcome(image_id=name, canvas=canvas, captions=tuple(texts), regions=tuple(own))
      for name, canvas, texts, own in zip(predictions.image_ids, canvases, captions, regions, strict=True)))


def _try(evaluator, predictions, missing, name):
  try:
    return evaluator.measure(predictions)
  except evaluators.NothingToMeasure as reason:
    missing[name] = str(reason)
    return None


def _regions(predictions, *, grounding, recognition) -> list[list[RegionOutcome]]:
  """The regions of each image."""
  ground_row = {} if grounding is None else {int(r): row for row, r in enumerate(grounding.region)}
  class_row = {} if recognition is None else {int(r): row for row, r in enumerate(recognition.region)}
  out: list[list[RegionOutcome]] = [[] for _ in predictions.image_ids]
  for number, image in enumerate(predictions.region_image):
    found = iou = recognized = right = None
    if number in ground_row:
      row = ground_row[number]
      # The box that was measured is clipped to the image; on the canvas it is that one which must be shown.
      found = predictions.geometry[image].boxes_to_canvas(grounding.pred_boxes[row])
      iou = float(grounding.iou[row])
    if number in class_row:
      row = class_row[number]
      recognized, right = recognition.categories[recognition.predicted[row]], bool(recognition.rank[row] == 0)
    out[image].append(RegionOutcome(
        index=len(out[image]), caption=predictions.region_captions[number], category=predictions.categories[number],
        box=predictions.boxes[number], found=found, iou=iou, recognized=recognized,
        right=right))
  return out
