"""Published figures beside ours, and whether the two may be compared.

data/tasks/published.json holds them, and region_recognition.json the class lists that they are over.
"""
from collections.abc import Sequence
import dataclasses
import functools
import importlib.resources
import json

from cloc_jax import evaluators


@dataclasses.dataclass(frozen=True)
class Row:
  """What one paper says of a metric that was measured. theirs: system → fraction.

  reasons: why it may not be compared; empty where the protocol is the same.
  """
  metric: str
  theirs: dict[str, float]
  source: str
  reasons: tuple[str, ...]

  @property
  def text(self) -> str:
    """In percent: 'CLOC B/16 71.1, CLOC L/14 72.9'."""
    return ', '.join(f'{system} {100 * value:.1f}' for system, value in self.theirs.items())

  @property
  def verdict(self) -> str:
    return f'no: {"; ".join(self.reasons)}' if self.reasons else 'yes'


def rows(evaluation: evaluators.Evaluation, *, data: str, info: dict, split: str = '',
         categories: Sequence[str] = ()) -> list[Row]:
  """What is published of the metrics that an evaluation has.

  Args:
    data: as `data_of` or the name of an ImageNet task says; '' for data that nobody has published about.
    info: of the encoder (encoders.Encoder.info).
    split: the name of the split, where the data have several; '' where it is not known.
    categories: the candidates of region recognition; () where they are not known.
  """
  out = []
  for entry in _content()['figures']:
    if data not in (entry['data'], entry.get('near', entry['data'])) or entry['metric'] not in evaluation.metrics:
      continue
    reasons = [entry['differs']] if 'differs' in entry else []
    if data != entry['data']:
      reasons.append("those are Karpathy's test images, which `cloc data import karpathy` reads")
    elif split and 'split' in entry and entry['split'] != ('val' if split.startswith('val') else split):
      reasons.append(f'split {split!r} here, {entry["split"]!r} there')
    images, captions = (evaluation.metrics.get(f'image_text_retrieval/{name}') for name in ('images', 'captions'))
    if entry['metric'].startswith('image_text_retrieval/') and captions is not None and captions != 5 * images:
      reasons.append(f'{captions:,} captions of {images:,} images here, five of each there')
    if entry['metric'].startswith('region_recognition/') and categories:
      reasons += _other_classes(entry['data'], categories)
    # Only whole-image figures lose: regions need every box on the canvas, whatever the encoder.
    if 'preprocessing' in info and entry['metric'].startswith(('image_text_retrieval/', 'zeroshot/')):
      reasons.append('here images are padded, which is not how this encoder was trained')
    coverage = evaluation.coverage
    if coverage is not None and 'images' in entry and coverage.images != entry['images']:
      reasons.append(f'{coverage.images:,} images here, {entry["images"]:,} there')
    elif coverage is not None and not coverage.complete:
      reasons.append(f'here of {coverage}')
    out.append(Row(metric=entry['metric'], theirs={k: v / 100 for k, v in entry['values'].items()},
                   source=_content()['papers'][entry['paper']], reasons=tuple(reasons)))
  order = [row.metric for row in out]
  return sorted(out, key=lambda row: order.index(row.metric))  # all that is said of a metric stands together


def data_of(meta) -> str:
  """Which published data set a DatasetMeta is: 'coco', 'lvis', 'grit', 'refcoco', 'refcoco+', 'refcocog', 'flickr30k',
  'coco-karpathy', 'flickr30k-karpathy'; or ''."""
  said = f'{meta.extra.get("provenance", "")} '.lower()
  if said.startswith('refcoco annotations '):
    return meta.extra.get('data_set') or 'refcoco'  # what was imported before '+' and 'g' were told apart has none
  for start, name in (("karpathy's splits of coco ", 'coco-karpathy'),
                      ("karpathy's splits of flickr30k ", 'flickr30k-karpathy'), ('coco annotations ', 'coco'),
                      ('lvis annotations ', 'lvis'), ('flickr30k', 'flickr30k')):
    if said.startswith(start):
      return name
  return 'grit' if meta.name == 'grit' else ''  # its importer says nothing of where the tars came from


def classes_of(data: str) -> tuple[str, ...]:
  """The candidates of region recognition on 'coco' (80) or 'lvis' (1 203), in the order of their ids; () of others."""
  return tuple(_file('region_recognition')['classes'].get(data, ()))


def _other_classes(data, categories):
  wanted = classes_of(data)
  lacking = [name for name in wanted if name not in set(categories)]
  if len(categories) != len(wanted):
    return [f'{len(categories):,} classes here, {len(wanted):,} there']
  return [f'{len(lacking)} classes have other names here, such as {lacking[0]!r}'] if lacking else []


def _content() -> dict:
  return _file('published')


@functools.cache
def _file(name) -> dict:
  return json.loads(importlib.resources.files('cloc_jax.data').joinpath(f'tasks/{name}.json').read_text('utf-8'))
