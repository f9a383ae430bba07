"""What a mixture will do, before anyone trains on it: `cloc data mix`."""
from collections.abc import Sequence
import dataclasses
import itertools
import json

import numpy as np

from cloc_jax.data import mixture
from cloc_jax.data import prepare
from cloc_jax.data import sources
from cloc_jax.data import spec

_SAMPLE = 500  # records of a source that are looked at


@dataclasses.dataclass(frozen=True)
class PartReport:
  """A source. share: of the examples. seen: examples of it in the run, epochs: the same over its size.

  with_regions: share of its images that have a usable region, captions, regions: mean of usable ones an image; of a
  sample, of which `unreadable` records could not be read.
  """
  name: str
  path: str
  split: str
  captions_drawn: str
  size: int
  weight: float
  share: float
  seen: int
  epochs: float
  with_regions: float
  captions: float
  regions: float
  unreadable: int
  categories: int


@dataclasses.dataclass(frozen=True)
class Report:
  """batch: examples a step; examples: of the run; notes: what is worth knowing."""
  parts: tuple[PartReport, ...]
  batch: int
  examples: int
  notes: tuple[str, ...]

  @property
  def with_regions(self) -> float:
    """Share of a batch's images that have a region: the loss's λ is λ0 times this."""
    return sum(p.share * p.with_regions for p in self.parts)

  def to_json(self) -> str:
    return json.dumps(dataclasses.asdict(self) | {'with_regions': self.with_regions}, indent=1, ensure_ascii=False)

  def text(self) -> str:
    """A table for a terminal."""
    rows = [('source', 'images', 'weight', 'share', 'in a batch', 'with regions', 'captions', 'regions', 'images seen',
             'epochs')]
    rows += [(p.name, f'{p.size:,}', f'{p.weight:g}', f'{100 * p.share:.1f} %', f'{p.share * self.batch:.1f}',
              f'{100 * p.with_regions:.0f} %', f'{p.captions:.1f}', f'{p.regions:.1f}', f'{p.seen:,}',
              f'{p.epochs:.2f}') for p in self.parts]
    rows.append(('all', f'{sum(p.size for p in self.parts):,}', '', '', f'{self.batch}',
                 f'{100 * self.with_regions:.0f} %', '', '', f'{self.examples:,}', ''))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ['  '.join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]) for row in rows]
    return '\n'.join([*lines, *self.notes])


def report(parts: Sequence[mixture.Part], *, batch_size: int, examples: int | None = None, seed: int = 0) -> Report:
  """Opens every source and looks at some of its records.

  Args:
    parts: from mixture.parts.
    batch_size: examples a step, over all hosts.
    examples: of the run; None for as many as it takes to see every source once.
    seed: of the run.

  Raises:
    FileNotFoundError, ValueError: naming the part, as training would.
  """
  sizes = mixture.sizes(parts)
  shares = mixture.shares(parts)
  mixture.check_batch(parts, sizes, batch_size=batch_size)
  if examples is None:
    examples = int(np.ceil(max(size / share for size, share in zip(sizes, shares))))
  seen = mixture.Schedule(parts, seed=seed).seen(examples)
  metas = [sources.read_meta(part.path) for part in parts]
  found = tuple(
      PartReport(name=part.name or 'data', path=spec.text(part.path), split=part.split, captions_drawn=str(part.captions),
                 size=size, weight=part.weight, share=float(share), seen=int(n), epochs=float(n / size),
                 categories=len(meta.categories), **_look(part))
      for part, size, share, n, meta in zip(parts, sizes, shares, seen, metas))
  return Report(parts=found, batch=batch_size, examples=examples, notes=tuple(_notes(parts, found, metas)))


def _look(part):
  source = sources.open_source(part.path, split=part.split)
  captions, regions, unreadable = [], [], 0
  for i in np.unique(np.linspace(0, len(source) - 1, min(len(source), _SAMPLE)).astype(int)):
    try:
      example = source[int(i)]
    except sources.RecordError:
      unreadable += 1
      continue
    captions.append(len(prepare.usable_captions(example)))
    regions.append(len(prepare.usable_regions(example).regions))
  mean = lambda values: float(np.mean(values)) if values else 0.0
  return {'captions': mean(captions), 'regions': mean(regions), 'with_regions': mean([n > 0 for n in regions]),
          'unreadable': unreadable}


def _notes(parts, found, metas):
  for p in found:
    whole = int(p.epochs)
    if p.epochs > 1:
      times = f'{whole}' if p.seen == whole * p.size else f'{whole} to {whole + 1}'
      yield f'{p.name}: each image is read {times} times'
    elif p.epochs < 1:
      yield f'{p.name}: {p.size - p.seen:,} of its images are not read'
    if p.unreadable:
      yield f'{p.name}: {p.unreadable} of the records looked at CANNOT BE READ: see `cloc data validate`'
    if not p.captions:
      yield f'{p.name}: no image has a caption: only its regions are learned from'
  for (a, meta_a), (b, meta_b) in itertools.combinations(zip(parts, metas), 2):
    if spec.absolute(a.path) == spec.absolute(b.path):
      yield (f'{a.name} and {b.name} read the same data ({a.split} and {b.split})'
             + (': every image of it comes by both' if a.split == b.split else ''))
    own, other = set(meta_a.categories), set(meta_b.categories)
    if own and other and own != other:
      yield (f'{a.name} has {len(own)} categories and {b.name} {len(other)}, {len(own & other)} of them in common; '
             'training goes by the regions\' captions, and evaluation by the categories of its own data set')
