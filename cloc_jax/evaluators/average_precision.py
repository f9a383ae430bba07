"""COCO's and LVIS's average precision of detections, by faster-coco-eval."""
import dataclasses
from collections.abc import Sequence

import numpy as np

from cloc_jax import boxes as box_lib

_MOST = {'coco': 100, 'lvis': 300}  # detections of an image, as each of the two counts them
_PAIRS = 1_000_000  # of image and class that are looked at together: faster-coco-eval keeps a list for each
_GROUPS = {'r': 'rare', 'c': 'common', 'f': 'frequent'}
INSTALL = "detection AP needs faster-coco-eval: pip install 'cloc_jax[coco]'"


@dataclasses.dataclass(frozen=True)
class Image:
  """boxes, categories: the true ones, (n, 4) xyxy pixels and n names. found: (m, 4); found_label, score: (m,).

  size: height, width.
  """
  image_id: str
  boxes: np.ndarray
  categories: tuple[str, ...]
  found: np.ndarray
  found_label: np.ndarray
  score: np.ndarray
  size: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Truth:
  """What annotations say beside the boxes.

  crowds: image_id → (category number, x0, y0, x1, y1) of boxes around many objects: what is found there is not wrong.
    None where the data set does not say.
  frequencies: LVIS's 'r', 'c' or 'f' for each category; empty for others than LVIS.
  negative, not_exhaustive: image_id → category numbers that are certainly absent; that are not all boxed (LVIS).
  """
  crowds: dict[str, list] | None = None
  frequencies: Sequence[str] = ()
  negative: dict[str, list[int]] = dataclasses.field(default_factory=dict)
  not_exhaustive: dict[str, list[int]] = dataclasses.field(default_factory=dict)

  @property
  def most(self) -> int:
    """Detections of an image that count."""
    return _MOST['lvis' if self.frequencies else 'coco']


def truth_of(meta, split: str) -> Truth:
  """From a data set's metadata, as the COCO and LVIS importers write it.

  Raises:
    ValueError: if LVIS's frequencies are not one for each category.
  """
  lvis = meta.extra.get('lvis', {})
  if lvis and len(lvis['frequencies']) != len(meta.categories):
    raise ValueError(f"extra['lvis']['frequencies']: expected one for each of {len(meta.categories)} categories, got "
                     f"{len(lvis['frequencies'])}")
  crowds = meta.extra.get('crowds')
  return Truth(crowds=None if crowds is None else crowds.get(split, {}), frequencies=lvis.get('frequencies', ()),
               negative=lvis.get('negative', {}).get(split, {}),
               not_exhaustive=lvis.get('not_exhaustive', {}).get(split, {}))


def check_installed() -> None:
  """Raises ModuleNotFoundError, saying what to install, without faster-coco-eval."""
  try:
    import faster_coco_eval  # noqa: F401
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(INSTALL) from error


def run(images: Sequence[Image], *, categories: Sequence[str], truth: Truth):
  """Yields (name, value): COCO's AP over IoU 0.5 to 0.95, mean over the classes that occur.

    ap, ap50, ap75            ap_small, ap_medium, ap_large by the box's area: 32² and 96² pixels
    ap_rare, ap_common, ap_frequent   of LVIS, where a class counts only on images that have it or are said to lack it,
                              and unmatched boxes of a class that is not boxed exhaustively are nobody's mistake
    ar                        recall over the same thresholds
    boxes, crowds, classes    how many; without crowds where the data set does not say
  Groups without boxes are left out. Of an image's detections the best of each class count, 100, as COCO has it; of
  LVIS the 300 best of all classes together.
  """
  check_installed()
  if truth.frequencies:
    images = [_best(image, truth.most) for image in images]
  number = {name: i for i, name in enumerate(categories)}
  gts, entries = [], []
  for i, image in enumerate(images, 1):  # faster-coco-eval takes ids as whole numbers; 0 would mean "unmatched"
    entries.append({'id': i, 'height': image.size[0], 'width': image.size[1],
                    'neg_category_ids': truth.negative.get(image.image_id, []),
                    'not_exhaustive_category_ids': truth.not_exhaustive.get(image.image_id, [])})
    crowds = (truth.crowds or {}).get(image.image_id, [])
    labels = [number[c] for c in image.categories] + [int(c[0]) for c in crowds]
    boxes = np.concatenate([np.asarray(image.boxes, np.float64).reshape(-1, 4),
                            np.array([c[1:] for c in crowds], np.float64).reshape(-1, 4)])
    for j, (label, xywh) in enumerate(zip(labels, box_lib.to_xywh(boxes).tolist())):
      gts.append({'id': len(gts) + 1, 'image_id': i, 'category_id': label, 'bbox': xywh, 'area': xywh[2] * xywh[3],
                  'iscrowd': int(j >= len(image.boxes))})
  precision, recall = _evaluate(entries, gts, images, categories=categories, truth=truth)
  mean = lambda values: float(values[values > -1].mean()) if (values > -1).any() else None
  values = {'ap': mean(precision[:, :, :, 0]), 'ap50': mean(precision[0, :, :, 0]), 'ap75': mean(precision[5, :, :, 0])}
  values |= {f'ap_{name}': mean(precision[:, :, :, 1 + i]) for i, name in enumerate(('small', 'medium', 'large'))}
  for letter, name in _GROUPS.items():
    members = [i for i, f in enumerate(truth.frequencies) if f == letter]
    values[f'ap_{name}'] = mean(precision[:, :, members, 0]) if members else None
  values['ar'] = mean(recall[:, :, 0])
  true = [gt for gt in gts if not gt['iscrowd']]
  counts = {'boxes': len(true), 'classes': len({gt['category_id'] for gt in true})}
  if truth.crowds is not None:
    counts['crowds'] = len(gts) - len(true)
  yield from ((name, value) for name, value in (values | counts).items() if value is not None)


def _best(image: Image, most: int) -> Image:
  """With its best detections alone; of equal scores the earlier."""
  kept = np.argsort(-image.score, kind='stable')[:most]
  return dataclasses.replace(image, found=image.found[kept], found_label=image.found_label[kept],
                             score=image.score[kept])


def _evaluate(entries, gts, images, *, categories, truth):
  """(precision (T, R, K, A), recall (T, K, A)) over thresholds, recalls, classes and areas; -1 where nothing is."""
  import faster_coco_eval
  listed = [{'id': i, 'name': name, 'frequency': f} for i, (name, f) in enumerate(
      zip(categories, truth.frequencies or [''] * len(categories)))]
  ranges = {'small': [0, 32**2], 'medium': [32**2, 96**2], 'large': [96**2, 1e5**2]}
  image = np.repeat(np.arange(1, len(images) + 1), [len(i.score) for i in images])
  label, score = (np.concatenate([getattr(i, name) for i in images]) for name in ('found_label', 'score'))
  xywh = box_lib.to_xywh(np.concatenate([i.found for i in images]).astype(np.float64))
  step = max(1, _PAIRS // len(entries))
  precision, recall = [], []
  for start in range(0, len(listed), step):
    some = range(start, min(start + step, len(listed)))
    # The library wants a dictionary of each box, writes into it, and of LVIS's six million they would not fit at once.
    rows = np.flatnonzero((label >= some.start) & (label < some.stop))
    found = [{'image_id': i, 'category_id': c, 'bbox': box, 'score': s} for i, c, box, s in zip(
        image[rows].tolist(), label[rows].tolist(), xywh[rows].tolist(), score[rows].tolist())]
    coco = faster_coco_eval.COCO({'images': entries, 'categories': listed,
                                  'annotations': [dict(gt) for gt in gts if gt['category_id'] in some]})
    evaluation = faster_coco_eval.COCOeval_faster(coco, coco.loadRes(found), 'bbox', ranges=ranges,
                                                  lvis_style=bool(truth.frequencies))
    evaluation.params.maxDets = [truth.most]
    evaluation.params.catIds = list(some)
    evaluation.evaluate()
    evaluation.accumulate()
    precision.append(np.asarray(evaluation.eval['precision'])[..., 0])
    recall.append(np.asarray(evaluation.eval['recall'])[..., 0])
  return np.concatenate(precision, 2), np.concatenate(recall, 1)
