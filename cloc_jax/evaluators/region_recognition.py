"""Region recognition: zero-shot classification of given boxes."""
import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from cloc_jax import boxes as box_lib
from cloc_jax.evaluators import ranking
from cloc_jax.evaluators.collect import Predictions

TOP = 5
# COCO's bounds, in pixels² of the original image.
SIZES = {'small': (0, 32**2), 'medium': (32**2, 96**2), 'large': (96**2, np.inf)}


@dataclasses.dataclass(frozen=True)
class RecognitionResult:
  """What became of every box that counts; for dumps and confusion tables beside the figures.

  categories: the C candidate classes.
  region: (b,) int64, which region of the Predictions each box is.
  label: (b,) int64, its class.
  top: (b, ≤ 5) int64, the most similar classes, best first; of equals the first. top_scores: their cosines.
  rank: (b,) int64, how many other classes are at least as similar as the right one.
  unknown: how many regions were left out because their category is ''.
  """
  categories: tuple[str, ...]
  region: np.ndarray
  label: np.ndarray
  top: np.ndarray
  top_scores: np.ndarray
  rank: np.ndarray
  unknown: int

  @property
  def predicted(self) -> np.ndarray:
    """(b,) int64, the most similar class."""
    return self.top[:, 0]

  def accuracy(self, *, top: int = 1) -> float:
    """Share of boxes whose class is among the `top` most similar (micro average)."""
    return float((self.rank < top).mean())

  def only(self, kept: np.ndarray) -> 'RecognitionResult':
    """The same of some boxes alone, by (b,) bool."""
    return dataclasses.replace(self, **{name: getattr(self, name)[kept] for name in
                                        ('region', 'label', 'top', 'top_scores', 'rank')})

  @property
  def per_class(self) -> dict[str, float]:
    """Top-1 accuracy of each class that occurs, in the order of the candidates."""
    boxes = np.bincount(self.label, minlength=len(self.categories))
    right = np.bincount(self.label, weights=self.rank == 0, minlength=len(self.categories))
    return {self.categories[c]: float(right[c] / boxes[c]) for c in np.flatnonzero(boxes)}

  @property
  def macc(self) -> float:
    """Mean of the per-class accuracies, over the classes that occur."""
    return float(np.mean(list(self.per_class.values())))


class RegionRecognition:
  """Protocol region_recognition@1: every ground-truth box is embedded, the most similar class name wins.

  Class names are embedded as they are, without templates, at the length of region captions; the candidates are all
  `categories`, those that never occur included. Yields, as fractions:
    macc          mean, over the classes that occur, of per-class top-1 accuracy: what the paper reports
    top1, top5    micro averages over boxes: what FG-CLIP and SigLIP 2 comparisons publish
    boxes, classes, boxes_unknown   how many counted, of how many classes; left out for want of a category
    macc_small, top1_small, boxes_small; … medium; … large   of boxes of an area under 32², from 32² and from 96² pixels
                  of the original image (COCO's bounds; COCO takes the area of the mask, we have that of the box)
    macc_rare, top1_rare, boxes_rare; …   of each of `groups`: LVIS's rare, common and frequent
    ap_gt         mean, over the classes that occur, of the average precision of ranking all boxes by their similarity
                  to the class: detection AP with perfect boxes and no duplicates
  The last three lines are of all boxes, not of a `subset`, and leave out groups without boxes. Ties count as wrong.

  Do not compare macc with top1; figures over different candidate lists (80 and 1 203 classes, or seen classes alone);
  figures with prompt templates; or boxes that a detector proposed with ground-truth ones. With five classes or fewer,
  top5 is 1 by construction.

  Args:
    categories: the candidate class names, each once.
    encode_text: as EncoderFns.encode_text; called with `region=True`.
    subset: count boxes of these classes alone (for seen and unseen splits); the candidates stay all `categories`.
    groups: name → classes, for figures of their own.
    prefix: goes before each yielded name.
  """
  protocol = 'region_recognition@1'

  def __init__(self, *, categories: Sequence[str], encode_text: Callable, subset: Iterable[str] | None = None,
               groups: Mapping[str, Sequence[str]] | None = None, prefix: str = ''):
    self._categories = tuple(categories)
    self._number = {name: i for i, name in enumerate(self._categories)}
    if not self._categories or '' in self._number or len(self._number) < len(self._categories):
      twice = sorted({c for c in self._categories if self._categories.count(c) > 1})
      raise ValueError('categories: expected at least one class name, none empty, each once; got '
                       f'{len(self._categories)}, twice: {twice[:5]}')
    self._encode_text = encode_text
    self._subset = None if subset is None else {self._lookup(name, where='subset') for name in subset}
    self._groups = {group: [self._lookup(name, where=f'groups[{group!r}]') for name in names]
                    for group, names in (groups or {}).items()}
    self._prefix = prefix

  def run(self, predictions: Predictions):
    """Yields (name, value). Raises NothingToMeasure if no box counts, ValueError on a category that is no candidate."""
    result = self.measure(predictions)
    values = {'macc': result.macc, 'top1': result.accuracy(), 'top5': result.accuracy(top=5),
              'boxes': len(result.rank), 'classes': len(result.per_class), 'boxes_unknown': result.unknown}
    if self._subset is None:
      values |= self._parts(result, predictions)
      ap = ranking.average_precisions(_rows(predictions.z_region, result.region), z_class=self._z_class(),
                                      label=result.label)
      values['ap_gt'] = float(np.nanmean(ap))
    for name, value in values.items():
      yield self._prefix + name, value

  def measure(self, predictions: Predictions) -> RecognitionResult:
    """Classifies every box; the figures, and the outcome box by box. Raises as `run` does."""
    if predictions.z_region is None:
      raise ranking.NothingToMeasure('the model does not embed regions')
    names = predictions.categories
    label = np.array([self._lookup(name, where=f'image {predictions.image_ids[image]!r}') if name else -1
                      for name, image in zip(names, predictions.region_image)], np.int64)
    counted = label >= 0 if self._subset is None else np.isin(label, list(self._subset))
    region = np.flatnonzero(counted)
    unknown = int((label < 0).sum())
    if not len(region):
      of = '' if self._subset is None else f' of these {len(self._subset)} categories'
      raise ranking.NothingToMeasure(f'no region{of} among {len(names)} ({unknown} without a category)')
    z_class = self._z_class()
    z_region, label = _rows(predictions.z_region, region), label[region]
    rank = ranking.ranks(z_region, z_pool=z_class, query=np.arange(len(region)), item=label)
    top, scores = ranking.top(z_region, z_pool=z_class, k=TOP)
    return RecognitionResult(categories=self._categories, region=region, label=label, top=top, top_scores=scores,
                             rank=rank, unknown=unknown)

  def _z_class(self) -> np.ndarray:
    return np.asarray(self._encode_text(list(self._categories), region=True), np.float32)

  def _parts(self, result, predictions) -> dict[str, float | int]:
    """The figures by box size and by group of classes."""
    boxes = predictions.in_pixels(predictions.boxes[result.region], image=predictions.region_image[result.region])
    area = box_lib.area(boxes)
    parts = {name: (area >= low) & (area < high) for name, (low, high) in SIZES.items()}
    parts |= {name: np.isin(result.label, classes) for name, classes in self._groups.items()}
    values: dict[str, float | int] = {}
    for name, kept in parts.items():
      if kept.any():
        part = result.only(kept)
        values |= {f'macc_{name}': part.macc, f'top1_{name}': part.accuracy(), f'boxes_{name}': len(part.rank)}
    return values

  def _lookup(self, name: str, *, where: str) -> int:
    if name in self._number:
      return self._number[name]
    close = difflib.get_close_matches(name, self._categories, n=1, cutoff=0)
    raise ValueError(f'{where}: category {name!r} is not among the {len(self._categories)} categories; '
                     f'the nearest is {close[0]!r}')


def _rows(z, rows) -> np.ndarray:
  """Those rows; `z` itself where they are all: of LVIS's boxes a copy takes half a gigabyte."""
  return z if len(rows) == len(z) else z[rows]
