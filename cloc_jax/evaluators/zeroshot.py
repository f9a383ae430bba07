"""Zero-shot classification of whole images from class names."""
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from cloc_jax.evaluators import ranking

TOP = 5
# The plainest template; ImageNet's published figures use eighty.
DEFAULT_TEMPLATES = ('a photo of a {}.',)


@dataclasses.dataclass(frozen=True)
class Classified:
  """What became of every image. images: names, where they are known. class_names: C names.

  label, rank: (n,) int64, the right class and how many others come before it. own_score: (n,) its cosine.
  top, top_scores: (n, ≤ 5), the most similar classes, best first, and their cosines.
  """
  class_names: tuple[str, ...]
  label: np.ndarray
  rank: np.ndarray
  own_score: np.ndarray
  top: np.ndarray
  top_scores: np.ndarray
  images: tuple[str, ...] = ()


class ZeroShot:
  """Protocol zeroshot@1: a class is the mean of its name's embeddings in all templates; the most similar class wins.

  Each embedding is L2-normalised before the mean, and the mean after it (Radford et al. 2021, §3.1.4). Yields, as
  fractions of the images: top1, top5; macc, the mean over the classes that occur of their top-1 (what VTAB's unbalanced
  sets report); and images, classes. Ties count as wrong, but of classes with one and the same name (ImageNet has two
  missiles and two sunglasses) the first is taken, as published code does.

  Do not compare figures with other templates or other class names (the curated ImageNet names are worth several
  points), or with region recognition, which uses no templates. With five classes or fewer, top5 is 1 by construction.

  Args:
    class_names: C names, in the order of the labels.
    encode_text: as EncoderFns.encode_text; called with `region=False`, one class's templates beside the next.
    templates: format strings with one `{}` each.
    prefix: goes before each yielded name.
  """
  protocol = 'zeroshot@1'

  def __init__(self, *, class_names: Sequence[str], encode_text: Callable,
               templates: Sequence[str] = DEFAULT_TEMPLATES, prefix: str = ''):
    if not class_names or not templates:
      raise ValueError(f'expected class names and templates, got {len(class_names)} and {len(templates)}')
    for template in templates:
      if template.count('{}') != 1:
        raise ValueError(f'templates: expected one {{}} in each, got {template!r}')
    self._class_names = tuple(class_names)
    self._encode_text = encode_text
    self._templates = tuple(templates)
    self._prefix = prefix

  def classifier(self) -> np.ndarray:
    """(C, E) float32, L2-normalised: the zero-shot classifier."""
    texts = [t.replace('{}', name) for name in self._class_names for t in self._templates]
    z = np.asarray(self._encode_text(texts, region=False), np.float32)
    z = z.reshape(len(self._class_names), len(self._templates), -1)
    z = (z / np.linalg.norm(z, axis=-1, keepdims=True)).mean(1)
    return z / np.linalg.norm(z, axis=-1, keepdims=True)

  def run(self, *, z_image, labels):
    """Yields (name, value); arguments and errors as `ranks`."""
    labels, rank = np.asarray(labels), self.ranks(z_image=z_image, labels=labels)
    yield self._prefix + 'top1', float((rank < 1).mean())
    yield self._prefix + 'top5', float((rank < 5).mean())
    yield self._prefix + 'macc', float(np.mean(list(self.per_class(rank, labels=labels).values())))
    yield self._prefix + 'images', len(labels)
    yield self._prefix + 'classes', len(self._class_names)

  def measure(self, *, z_image, labels) -> Classified:
    """The outcome image by image; arguments and errors as `ranks`."""
    rank, z_class = self.ranks(z_image=z_image, labels=labels), self.classifier()
    top, scores = ranking.top(z_image, z_pool=z_class, k=TOP)
    return Classified(class_names=self._class_names, label=np.asarray(labels), rank=rank, top=top, top_scores=scores,
                      own_score=np.einsum('ne,ne->n', z_image, z_class[labels]))

  def per_class(self, rank, *, labels) -> dict[str, float]:
    """Top-1 accuracy of each class that occurs; names that are there twice get their number behind them."""
    names = [n if self._class_names.count(n) == 1 else f'{n} ({i})' for i, n in enumerate(self._class_names)]
    images = np.bincount(labels, minlength=len(names))
    right = np.bincount(labels, weights=rank == 0, minlength=len(names))
    return {names[c]: float(right[c] / images[c]) for c in np.flatnonzero(images)}

  def ranks(self, *, z_image, labels) -> np.ndarray:
    """How many wrong classes are at least as similar as the right one, for each image: (n,) int64.

    Args:
      z_image: (n, E) L2-normalised image embeddings.
      labels: (n,) int, indices into `class_names`.

    Raises:
      NothingToMeasure: without images.
      ValueError: if there is not one label an image, or a label is no class.
    """
    z_image, labels = np.asarray(z_image, np.float32), np.asarray(labels)
    if labels.shape != (len(z_image),):
      raise ValueError(f'labels: expected one an image ({len(z_image)}), got shape {labels.shape}')
    if not len(labels):
      raise ranking.NothingToMeasure('no image has a label')
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= len(self._class_names):
      raise ValueError(f'labels: expected integers from 0 to {len(self._class_names) - 1}, got {labels.dtype} from '
                       f'{labels.min()} to {labels.max()}')
    number: dict[str, list[int]] = {}
    for i, name in enumerate(self._class_names):
      number.setdefault(name, []).append(i)
    # Classes of one name are all right for ranks(); those that stand before the image's own then come before it.
    same = [number[self._class_names[label]] for label in labels]
    rank = ranking.ranks(z_image, z_pool=self.classifier(), query=np.repeat(np.arange(len(labels)), [*map(len, same)]),
                         item=np.concatenate(same))
    return rank + [classes.index(label) for classes, label in zip(same, labels)]
