"""Zero-shot detection and grounding over supplied proposals, of which each image keeps its best detections alone."""
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from cloc_jax import boxes as box_lib
from cloc_jax.evaluators import average_precision, ranking
from cloc_jax.evaluators.collect import EncoderFns, Predictions, collect
from cloc_jax.evaluators.grounding import IOU_THRESHOLD

SCALE = 100.0  # of the softmax over classes: CLIP's own temperature, where its training clips it
NMS_IOU = 0.5
_FIRST = 4096  # candidates that are sorted first; nearly always enough


class Detection:
  """Protocols detection@1 and grounding_supplied@1: the boxes come from a file, the model says what is in them.

  A proposal's embedding is compared with all class names (no templates, at the length of region captions), as in region
  recognition; its score for a class is softmax(100 · cosine) over all classes, times the proposal's own score. (The
  root of that product, which RegionCLIP takes, ranks alike.) Of boxes of one class that overlap by more than IoU 0.5,
  the best stays (class-wise NMS, as in two-stage detectors). The 100 best of an image count, 300 for LVIS: a proposal
  may be there with several classes. Yields, besides what average_precision gives for them under detection/:
    detection/proposals                     of an image, mean over the images that have any
    detection/images_without_proposals      they find nothing, and count
    detection/recall_proposals              share of the true boxes that some proposal meets at IoU 0.5: a bound
  and where regions have captions, of ranking the proposals by their similarity to each:
    grounding_supplied/acc_iou50, mean_iou  of the most similar proposal; of equals the one that fits worst
    grounding_supplied/recall_proposals, phrases

  Do not compare figures over other proposals; or AP of boxes whose areas are those of masks (COCO's small, medium and
  large are by mask area, ours by that of the box); or grounding by class names with RefCOCO's.

  Args:
    categories, encode_text: as RegionRecognition.
    proposals: image_id → (boxes (n, 4) float32 xyxy, pixels of the original image; scores (n,)).
    truth: the annotations beside the boxes: crowds, and what LVIS says of absent classes.
  """
  protocols = {'detection': 'detection@1', 'grounding_supplied': 'grounding_supplied@1'}

  def __init__(self, *, categories: Sequence[str], encode_text: Callable, proposals: Callable,
               truth: average_precision.Truth):
    self._categories = tuple(categories)
    self._proposals, self._truth = proposals, truth
    self._z_class = None
    if categories:
      self._z_class = np.asarray(encode_text(list(categories), region=True), np.float32)
    self._images: list[average_precision.Image] = []
    self._counts: list[int] = []  # proposals an image
    self._met = [0, 0]  # true boxes that some proposal meets, all
    # Of each phrase: its image, the number of its region there, and the most similar proposal, its IoU (None and 0
    # where the image has no proposals).
    self._phrases: list[tuple[str, int, tuple[float, ...] | None, float]] = []
    self._reachable = 0  # phrases that some proposal meets

  def watch(self, fns: EncoderFns, batches):
    """Yields the batches unchanged, and looks at each once it was used. With fns of `once` all is encoded once."""
    for batch in batches:
      yield batch
      self.add(fns, batch)

  def add(self, fns: EncoderFns, batch) -> None:
    """Finds the objects in a batch, as eval_pipeline yields them."""
    examples = [self._with_proposals(e) for e in batch.examples]
    if not np.asarray(batch.image_mask).any():
      return
    # The true boxes come first, so that their captions are embedded.
    bare = dataclasses.replace(fns, ground=None, embed_patches=None)
    some = collect(bare, [dataclasses.replace(batch, examples=examples)])
    kept = [e for e, valid in zip(batch.examples, batch.image_mask) if valid]
    for number, example in enumerate(kept):
      own = np.flatnonzero(some.region_image == number)
      true, found = own[:len(example.boxes)], own[len(example.boxes):]
      boxes = example.geometry.boxes_from_canvas(some.boxes[own])
      self._add_image(example, boxes[:len(true)], z=some.z_region[found], z_text=some.z_region_text[true])

  @property
  def share(self) -> tuple:
    """What was found so far, for `take`."""
    return self._images, self._counts, self._met, self._phrases, self._reachable

  def take(self, shares: Sequence[tuple]) -> None:
    """Puts the shares of several hosts, which had different images, in the place of what was found so far."""
    images, counts, met, phrases, reachable = zip(*shares)
    self._images, self._counts, self._phrases = (
        [x for part in parts for x in part] for parts in (images, counts, phrases))
    self._met, self._reachable = [sum(values) for values in zip(*met)], sum(reachable)

  @property
  def images_with_proposals(self) -> int:
    """How many of the images so far."""
    return len(self._counts) - self._counts.count(0)

  def run(self):
    """Yields ('detection/NAME' or 'grounding_supplied/NAME', value); nothing of what could not be measured."""
    if self._z_class is not None:
      images = sorted(self._images, key=lambda image: image.image_id)  # whoever looked at them
      for name, value in average_precision.run(images, categories=self._categories, truth=self._truth):
        yield f'detection/{name}', value
      yield 'detection/proposals', float(np.mean([n for n in self._counts if n] or [0]))
      yield 'detection/images_without_proposals', self._counts.count(0)
      if self._met[1]:
        yield 'detection/recall_proposals', self._met[0] / self._met[1]
    if self._phrases:
      ious = np.array([iou for *_, iou in self._phrases])
      yield 'grounding_supplied/acc_iou50', float((ious >= IOU_THRESHOLD).mean())
      yield 'grounding_supplied/mean_iou', float(ious.mean())
      yield 'grounding_supplied/recall_proposals', self._reachable / len(ious)
      yield 'grounding_supplied/phrases', len(ious)

  def chosen(self, predictions: Predictions) -> np.ndarray:
    """(k, 4) float32 xyxy, pixels of the original images: each phrase's proposal, NaN where there is none.

    predictions: of the same images.
    """
    first = dict(zip(predictions.image_ids, predictions.first_region))
    out = np.full((len(predictions.boxes), 4), np.nan, np.float32)
    for image_id, region, box, _ in self._phrases:
      if box is not None:
        out[first[image_id] + region] = box
    return out

  def _with_proposals(self, example):
    boxes, _ = self._proposals(example.image_id)
    more = ('',) * len(boxes)
    return dataclasses.replace(
        example, boxes=np.concatenate([example.boxes.reshape(-1, 4), example.geometry.boxes_to_canvas(boxes)]),
        region_captions=tuple(example.region_captions) + more, categories=tuple(example.categories) + more)

  def _add_image(self, example, true, *, z, z_text):
    boxes, scores = self._proposals(example.image_id)
    self._counts.append(len(boxes))
    overlap = box_lib.pairwise_iou(true, boxes) if len(boxes) else np.zeros((len(true), 0))
    met = (overlap >= IOU_THRESHOLD).any(1)
    for r, caption in enumerate(example.region_captions):
      if ranking.canonical(caption):
        box, iou = None, 0.0
        if len(boxes):
          similarity = z @ z_text[r]
          best = np.flatnonzero(similarity >= similarity.max() - ranking.TIE)
          worst = best[overlap[r][best].argmin()]
          box, iou = tuple(boxes[worst].tolist()), float(overlap[r][worst])
        self._phrases.append((example.image_id, r, box, iou))
        self._reachable += int(met[r])
    if self._z_class is None:
      return
    named = np.array([bool(c) for c in example.categories], bool)
    self._met[0] += int(met[named].sum())
    self._met[1] += int(named.sum())
    proposal, label, score = best_detections(z, z_class=self._z_class, boxes=boxes, weight=scores,
                                             most=self._truth.most)
    self._images.append(average_precision.Image(
        image_id=example.image_id, boxes=true[named],
        categories=tuple(c for c in example.categories if c), found=boxes[proposal], found_label=label, score=score,
        size=(example.geometry.height, example.geometry.width)))


def best_detections(z, *, z_class, boxes, weight, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """An image's best (proposal, class) pairs after class-wise NMS.

  Args:
    z: (n, E) embeddings of the proposals. z_class: (C, E). boxes: (n, 4) xyxy. weight: (n,) the proposals' scores.
    most: pairs at most.

  Returns:
    (proposal, class, score), best first: (m,) int, int, float64.
  """
  if not len(boxes):
    return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
  logits = SCALE * (z.astype(np.float64) @ z_class.T.astype(np.float64))
  logits -= logits.max(1, keepdims=True)
  score = np.exp(logits)
  score *= (weight / score.sum(1))[:, None]
  count = score.shape[1]
  flat = score.reshape(-1)
  over = box_lib.pairwise_iou(boxes, boxes) > NMS_IOU
  first = min(max(_FIRST, 4 * most), len(flat))
  for size in dict.fromkeys((first, len(flat))):  # all are sorted only where the first do not suffice
    some = np.argpartition(-flat, size - 1)[:size] if size < len(flat) else np.arange(size)
    # Equal scores in the order of the file, whatever the partition made of them.
    order = some[np.lexsort((some, -flat[some]))]
    kept: list[int] = []
    gone = np.zeros((count, len(boxes)), bool)
    for candidate in order.tolist():
      p, c = divmod(candidate, count)
      if not gone[c, p]:
        kept.append(candidate)
        gone[c] |= over[p]
        if len(kept) == most:
          break
    if len(kept) == most:
      break
  kept = np.array(kept, np.int64)
  return kept // count, kept % count, flat[kept]


def once(fns: EncoderFns) -> EncoderFns:
  """The same model for two that look at the same batches: it remembers the last images, and all texts of regions."""
  last: list = [None, None]
  known: dict[str, np.ndarray] = {}

  def encode_image(images):
    if last[0] is not images:
      last[:] = images, fns.encode_image(images)
    return last[1]

  def encode_text(texts, *, region):
    if not region:
      return fns.encode_text(texts, region=False)
    new = [t for t in dict.fromkeys(texts) if t not in known]
    if new:
      known.update(zip(new, np.asarray(fns.encode_text(new, region=True), np.float32)))
    return np.stack([known[t] for t in texts])

  return dataclasses.replace(fns, encode_image=encode_image, encode_text=encode_text)
