"""All evaluators that fit a data set and a model, and the JSON they end up in."""
import dataclasses
import json
import os
from collections.abc import Callable

from cloc_jax.evaluators.collect import EncoderFns, Predictions
from cloc_jax.evaluators.coverage import Coverage
from cloc_jax.evaluators.grounding import Grounding
from cloc_jax.evaluators.pointing import PointingGame
from cloc_jax.evaluators.proposals import ProposalGrounding
from cloc_jax.evaluators.ranking import NothingToMeasure
from cloc_jax.evaluators.region_recognition import SIZES, RegionRecognition
from cloc_jax.evaluators.region_retrieval import RegionRetrieval
from cloc_jax.evaluators.retrieval import ImageTextRetrieval

_SIZED = tuple(f'_{name}' for name in SIZES)


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """What the evaluators found.

  metrics: 'EVALUATOR/NAME' → value; fractions from 0 to 1, and counts as int.
  skipped: what was not measured → why.
  protocols: evaluator → its protocol and version, for what was measured.
  coverage: how much of the data the figures are of; None where that was not counted.
  """
  metrics: dict[str, float | int]
  skipped: dict[str, str]
  protocols: dict[str, str]
  coverage: Coverage | None = None

  @property
  def notes(self) -> tuple[str, ...]:
    """What people have to know of some of the figures before they compare them."""
    if any(name.endswith(_SIZED) for name in self.metrics):
      return ('Small, medium and large are by the area of boxes; COCO and LVIS go by that of masks.',)
    return ()

  def to_json(self, path: str | os.PathLike, *, extra: dict | None = None) -> None:
    """Writes these, the notes and the entries of `extra` (data set, step, …) to `path`, atomically.

    Raises:
      ValueError: if `extra` uses one of those names, or a value is NaN or infinite, which JSON cannot hold.
    """
    content = dataclasses.asdict(self) | {'notes': self.notes}
    clash = sorted(set(extra or ()) & set(content))
    if clash:
      raise ValueError(f'extra: {clash} are names of the report itself; choose others')
    text = json.dumps({**(extra or {}), **content}, indent=2, ensure_ascii=False, allow_nan=False)
    path = os.fspath(path)
    temporary = f'{path}.{os.getpid()}.tmp'
    with open(temporary, 'w', encoding='utf-8') as f:
      f.write(text + '\n')
    os.replace(temporary, path)


def evaluate_all(predictions: Predictions, *, fns: EncoderFns, meta, pool_limit: int | None = None) -> Evaluation:
  """Runs every evaluator that has what it needs; the others are named, with the reason, in `skipped`.

  Names: region_recognition/…, with seen/… and unseen/… where `meta` names unseen categories (the boxes of those
  classes alone, among all classes as candidates); region_retrieval/…, image_text_retrieval/…, grounding/…,
  grounding_proposals/…, pointing_game/….

  Args:
    predictions: as `collect` returns.
    fns: the model, for the class names; they are encoded once.
    meta: a DatasetMeta, or anything with `categories` and `unseen_categories`; of `extra`, ['lvis']['frequencies']
      is read where there is one: 'r', 'c' or 'f' for each of `categories`, as LVIS says of its own.
    pool_limit: RegionRetrieval's `limit`.

  Raises:
    ValueError: if a region's category, or an unseen category, is not among `meta.categories`.
  """
  metrics, skipped, protocols = {}, {}, {}
  encode_text = encoded_once(fns.encode_text)
  if meta.categories:
    for part, subset in _category_subsets(meta).items():
      recognition = RegionRecognition(categories=meta.categories, encode_text=encode_text, subset=subset,
                                      groups=frequency_groups(meta), prefix=part)
      _run(recognition, 'region_recognition', predictions, metrics, skipped, protocols, part=part)
  else:
    skipped['region_recognition'] = 'the data set lists no categories'
  _run(RegionRetrieval(limit=pool_limit), 'region_retrieval', predictions, metrics, skipped, protocols)
  _run(ImageTextRetrieval(), 'image_text_retrieval', predictions, metrics, skipped, protocols)
  _run(Grounding(), 'grounding', predictions, metrics, skipped, protocols)
  _run(ProposalGrounding(), 'grounding_proposals', predictions, metrics, skipped, protocols)
  _run(PointingGame(), 'pointing_game', predictions, metrics, skipped, protocols)
  return Evaluation(metrics=metrics, skipped=skipped, protocols=protocols)


def _category_subsets(meta) -> dict[str, tuple[str, ...] | None]:
  """Prefix → the classes whose boxes count (None: all)."""
  subsets: dict[str, tuple[str, ...] | None] = {'': None}
  if meta.unseen_categories:
    unseen = set(meta.unseen_categories)
    subsets['seen/'] = tuple(c for c in meta.categories if c not in unseen)
    subsets['unseen/'] = tuple(meta.unseen_categories)
  return subsets


def frequency_groups(meta) -> dict[str, list[str]]:
  """'rare', 'common' and 'frequent' → their classes, from meta.extra['lvis']['frequencies']; empty without it."""
  letters = getattr(meta, 'extra', {}).get('lvis', {}).get('frequencies', ())
  if letters and len(letters) != len(meta.categories):
    raise ValueError(f"extra['lvis']['frequencies']: expected one for each of {len(meta.categories)} categories, got "
                     f'{len(letters)}')
  names = {'r': 'rare', 'c': 'common', 'f': 'frequent'}
  groups: dict[str, list[str]] = {}
  for category, letter in zip(meta.categories, letters):
    if letter not in names:
      raise ValueError(f"extra['lvis']['frequencies'], {category!r}: expected one of {list(names)}, got {letter!r}")
    groups.setdefault(names[letter], []).append(category)
  return groups


def _run(evaluator, name: str, predictions, metrics, skipped, protocols, *, part: str = '') -> None:
  try:
    found = {f'{name}/{key}': value for key, value in evaluator.run(predictions)}
  except NothingToMeasure as reason:
    skipped[f'{name}/{part}'.rstrip('/')] = str(reason)
    return
  metrics.update(found)
  protocols[name] = evaluator.protocol


def encoded_once(encode_text: Callable) -> Callable:
  """The same function, which remembers what it was asked: three parts of the evaluation share one list of names."""
  known = {}

  def wrapper(texts, *, region):
    key = (tuple(texts), region)
    if key not in known:
      known[key] = encode_text(texts, region=region)
    return known[key]

  return wrapper
