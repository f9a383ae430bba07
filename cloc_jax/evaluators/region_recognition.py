"""Region recognition: zero-shot classification of given boxes."""
import dataclasses
import difflib
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from cloc_jax.evaluators import ranking
from cloc_jax.evaluators.collect import Predictions


@dataclasses.dataclass(frozen=True)
class RecognitionResult:
  """What became of every box that counts; for dumps and confusion tables beside the figures.

  categories: the C candidate classes.
  region: (b,) int64, which region of the Predictions each box is.
  label: (b,) int64, its class.
  predicted: (b,) int64, the most similar class; the first one in a tie.
  rank: (b,) int64, how many other classes are at least as similar as the right one.
  unknown: how many regions were left out because their category is ''.
  """
  categories: tuple[str, ...]
  region: np.ndarray
  label: np.ndarray
  predicted: np.ndarray
  rank: np.ndarray
  unknown: int

  def accuracy(self, *, top: int = 1) -> float:
    """Share of boxes whose class is among the `top` most similar (micro average)."""
    return float((self.rank < top).mean())

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
  Ties count as wrong.

  Do not compare macc with top1; figures over different candidate lists (80 and 1 203 classes, or seen classes alone);
  figures with prompt templates; or boxes that a detector proposed with ground-truth ones. With five classes or fewer,
  top5 is 1 by construction.

  Args:
    categories: the candidate class names, each once.
    encode_text: as EncoderFns.encode_text; called once a run, with `region=True`.
    subset: count boxes of these classes alone (for seen and unseen splits); the candidates stay all `categories`.
    prefix: goes before each yielded name.
  """
  protocol = 'region_recognition@1'

  def __init__(self, *, categories: Sequence[str], encode_text: Callable, subset: Iterable[str] | None = None,
               prefix: str = ''):
    self._categories = tuple(categories)
    self._number = {name: i for i, name in enumerate(self._categories)}
    if not self._categories or '' in self._number or len(self._number) < len(self._categories):
      twice = sorted({c for c in self._categories if self._categories.count(c) > 1})
      raise ValueError('categories: expected at least one class name, none empty, each once; got '
                       f'{len(self._categories)}, twice: {twice[:5]}')
    self._encode_text = encode_text
    self._subset = None if subset is None else {self._lookup(name, where='subset') for name in subset}
    self._prefix = prefix

  def run(self, predictions: Predictions):
    """Yields (name, value). Raises NothingToMeasure if no box counts, ValueError on a category that is no candidate."""
    result = self.measure(predictions)
    values = {'macc': result.macc, 'top1': result.accuracy(), 'top5': result.accuracy(top=5),
              'boxes': len(result.rank), 'classes': len(result.per_class), 'boxes_unknown': result.unknown}
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
    z_class = np.asarray(self._encode_text(list(self._categories), region=True), np.float32)
    z_region, label = predictions.z_region[region], label[region]
    rank = ranking.ranks(z_region, z_pool=z_class, query=np.arange(len(region)), item=label)
    return RecognitionResult(categories=self._categories, region=region, label=label,
                             predicted=ranking.nearest(z_region, z_pool=z_class), rank=rank, unknown=unknown)

  def _lookup(self, name: str, *, where: str) -> int:
    if name in self._number:
      return self._number[name]
    close = difflib.get_close_matches(name, self._categories, n=1, cutoff=0)
    raise ValueError(f'{where}: category {name!r} is not among the {len(self._categories)} categories; '
                     f'the nearest is {close[0]!r}')
