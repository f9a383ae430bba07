"""What a person wants to see of an evaluation: best and worst regions, confusions, answers. Chosen from Predictions."""
import dataclasses
from collections.abc import Sequence

import numpy as np

from cloc_jax import confusion as confusion_lib
from cloc_jax import evaluators
from cloc_jax.evaluators import ranking, zeroshot
from cloc_jax.evaluators.grounding import IOU_THRESHOLD

_ASKED = 256  # queries of a retrieval that examples are chosen among
_ANSWERS = 4


@dataclasses.dataclass(frozen=True)
class Region:
  """A region and what was said of it.

  image: its image's id. box: (4,) xyxy, pixels of the original; None for a whole image. title: its class or phrase.
  found: (4,) the box that was found; None for recognition. says: what came out, in words. right: whether it is.
  scores: (name, cosine) of the best classes, for recognition.
  """
  image: str
  box: np.ndarray | None
  title: str
  says: str
  right: bool
  found: np.ndarray | None = None
  scores: tuple[tuple[str, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Answer:
  """A query of a retrieval. query: a text, or an image's id; answers: (text or id, cosine, whether it is right)."""
  query: str
  answers: tuple[tuple[str, float, bool], ...]

  @property
  def right(self) -> bool:
    return self.answers[0][2]


@dataclasses.dataclass(frozen=True)
class Findings:
  """regions: heading → examples, best and worst in turn. retrieval: 'i2t' and 't2i' → examples. confusion: or None."""
  regions: dict[str, tuple[Region, ...]]
  retrieval: dict[str, tuple[Answer, ...]]
  confusion: confusion_lib.Confusion | None

  @property
  def images(self) -> set[str]:
    """The ids of all images that are shown."""
    shown = {r.image for some in self.regions.values() for r in some}
    for answer in self.retrieval.get('i2t', ()):
      shown.add(answer.query)
    for answer in self.retrieval.get('t2i', ()):
      shown |= {name for name, _, _ in answer.answers}
    return shown


def choose(predictions: evaluators.Predictions, *, categories: Sequence[str], encode_text,
           examples: int = 8) -> Findings:
  """Chooses up to `examples` of each kind; what cannot be measured is left out.

  Args:
    categories, encode_text: as RegionRecognition.
  """
  regions: dict[str, tuple[Region, ...]] = {}
  confusion = None
  if categories:
    try:
      result = evaluators.RegionRecognition(categories=categories, encode_text=encode_text).measure(predictions)
    except evaluators.NothingToMeasure:
      pass
    else:
      z_class = np.asarray(encode_text(list(categories), region=True), np.float32)
      regions |= _recognition(result, predictions, z_class=z_class, examples=examples)
      confusion = confusion_lib.count(result.label, result.predicted, classes=categories)
  for evaluator, what in ((evaluators.Grounding(), 'Grounding'),
                          (evaluators.ProposalGrounding(), "Grounding among the image's own boxes")):
    try:
      regions |= _grounding(evaluator.measure(predictions), predictions, what=what, examples=examples)
    except evaluators.NothingToMeasure:
      continue
    break  # a box head's own boxes say more than a choice among the true ones
  return Findings(regions=regions, retrieval=_retrieval(predictions, examples), confusion=confusion)


def of_folder(classified: zeroshot.Classified, *, examples: int = 8) -> Findings:
  """The same of the images of a folder, which are shown without boxes."""
  c = classified
  other = np.where(c.top[:, 0] == c.label, c.top_scores[:, min(1, c.top.shape[1] - 1)], c.top_scores[:, 0])
  margin, right, every = c.own_score - other, c.rank == 0, np.arange(len(c.label))

  def region(row):
    scores = [(c.class_names[k], float(s)) for k, s in zip(c.top[row], c.top_scores[row])]
    if c.label[row] not in c.top[row]:
      scores.append((c.class_names[c.label[row]], float(c.own_score[row])))
    title, says = c.class_names[c.label[row]], scores[0][0]
    return Region(image=c.images[row], box=None, title=title, right=bool(right[row]), scores=tuple(scores),
                  says=says if right[row] or says != title else f'{title}, tied')

  best = _spread(np.argsort(-margin), right, image=every, kind=c.label, most=examples)
  worst = _spread(np.argsort(margin), ~right, image=every, kind=c.label, most=examples)
  regions = {'Right, by the widest margin': tuple(map(region, best)),
             'Wrong, by the widest margin': tuple(map(region, worst))}
  return Findings(regions=regions, retrieval={},
                  confusion=confusion_lib.count(c.label, c.top[:, 0], classes=_distinct(c.class_names)))


def _distinct(names) -> tuple[str, ...]:
  """Names that are there twice get their number behind them."""
  return tuple(n if names.count(n) == 1 else f'{n} ({i})' for i, n in enumerate(names))


def _recognition(result, predictions, *, z_class, examples):
  """Best: right by the widest margin over the next class. Worst: wrong by the widest margin over the right one."""
  own = np.einsum('re,re->r', predictions.z_region[result.region], z_class[result.label])
  first_is_own = result.top[:, 0] == result.label
  other = np.where(first_is_own, result.top_scores[:, min(1, result.top.shape[1] - 1)], result.top_scores[:, 0])
  margin, right = own - other, result.rank == 0
  boxes = predictions.in_pixels(predictions.boxes[result.region], image=predictions.region_image[result.region])

  def region(row):
    names = [result.categories[c] for c in result.top[row]]
    label = result.categories[result.label[row]]
    said = names[0] if right[row] or names[0] != label else f'{label}, tied'
    scores = list(zip(names, result.top_scores[row].tolist()))
    if label not in names:
      scores.append((label, float(own[row])))
    return Region(image=_image(predictions, result.region[row]), box=boxes[row], title=label, says=said,
                  right=bool(right[row]), scores=tuple(scores))

  image = predictions.region_image[result.region]
  best = _spread(np.argsort(-margin), right, image=image, kind=result.label, most=examples)
  worst = _spread(np.argsort(margin), ~right, image=image, kind=result.label, most=examples)
  return {'Recognition: right, by the widest margin': tuple(map(region, best)),
          'Recognition: wrong, by the widest margin': tuple(map(region, worst))}


def _grounding(result, predictions, *, what, examples):
  hit = result.iou >= IOU_THRESHOLD

  def region(row):
    r = result.region[row]
    return Region(image=_image(predictions, r), box=result.boxes[row], found=result.pred_boxes[row],
                  title=predictions.region_captions[r], says=f'IoU {result.iou[row]:.2f}', right=bool(hit[row]))

  image = predictions.region_image[result.region]
  kind = np.unique([ranking.canonical(predictions.region_captions[r]) for r in result.region], return_inverse=True)[1]
  best = _spread(np.argsort(-result.iou, kind='stable'), hit, image=image, kind=kind, most=examples)
  # Of all that miss alike, the large ones say most: a box of some pixels is missed by anything.
  area = np.prod(result.boxes[:, 2:] - result.boxes[:, :2], axis=1)
  worst = _spread(np.lexsort((-area, result.iou.round(2))), ~hit, image=image, kind=kind, most=examples)
  return {f'{what}: the best boxes': tuple(map(region, best)), f'{what}: the worst boxes': tuple(map(region, worst))}


def _spread(order, wanted, *, image, kind, most) -> list[int]:
  """The first rows of `order` that are wanted: one an image, and two of a kind at most, so that not all are alike."""
  chosen, images, kinds = [], set(), {}
  for row in order:
    if wanted[row] and image[row] not in images and kinds.get(kind[row], 0) < 2:
      chosen.append(int(row))
      images.add(image[row])
      kinds[kind[row]] = kinds.get(kind[row], 0) + 1
      if len(chosen) == most:
        break
  return chosen


def _image(predictions, region) -> str:
  return predictions.image_ids[predictions.region_image[region]]


def _retrieval(predictions, examples) -> dict[str, tuple[Answer, ...]]:
  if not len(predictions.captions):
    return {}
  captioned = np.unique(predictions.caption_image)
  image = captioned[np.unique(np.linspace(0, len(captioned) - 1, min(_ASKED, len(captioned))).astype(int))]
  caption = np.unique(np.linspace(0, len(predictions.captions) - 1, min(_ASKED, len(predictions.captions))).astype(int))
  items, scores = ranking.top(predictions.z_image[image], z_pool=predictions.z_caption, k=_ANSWERS)
  i2t = [Answer(query=predictions.image_ids[i], answers=tuple(
      (predictions.captions[c], float(s), bool(predictions.caption_image[c] == i)) for c, s in zip(row, score)))
      for i, row, score in zip(image, items, scores)]
  items, scores = ranking.top(predictions.z_caption[caption], z_pool=predictions.z_image, k=_ANSWERS)
  t2i = [Answer(query=predictions.captions[c], answers=tuple(
      (predictions.image_ids[i], float(s), bool(predictions.caption_image[c] == i)) for i, s in zip(row, score)))
      for c, row, score in zip(caption, items, scores)]
  return {'i2t': _mixed(i2t, examples), 't2i': _mixed(t2i, examples)}


def _mixed(answers, examples) -> tuple[Answer, ...]:
  """Half of them right and half wrong, the surest of each, as far as there are such."""
  surest = sorted(answers, key=lambda a: -a.answers[0][1])
  right, wrong = [a for a in surest if a.right], [a for a in surest if not a.right]
  half = examples // 2
  right = right[:max(half, examples - len(wrong))]
  return (*right, *wrong[:examples - len(right)])
