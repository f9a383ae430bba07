"""Several sources as one endless sequence, by weight.

Which record of which source stands at which place is arithmetic of the place and the seed: nothing is drawn from a
stream whose state would have to be kept. So a run resumes from the number of examples alone, on any number of hosts and
worker processes, as with one source.
"""
from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import math
import sys
from typing import Any
import zlib

import grain
import numpy as np

from cloc_jax.data import prepare
from cloc_jax.data import schema
from cloc_jax.data import sources
from cloc_jax.data import spec as spec_lib

WINDOW = 256  # places over which the shares are exact; their order inside is drawn
_UNIT = 1_000_000  # shares are whole millionths


@dataclasses.dataclass(frozen=True)
class Part:
  """A source of a mixture.

  name: for metrics and messages; '' where a data set stands alone. path, split: see sources.open_source.
  weight: its share of the examples, relative to the other parts' weights; 0 leaves it out.
  captions: which of an image's captions is drawn, see prepare.check_captions.
  """
  name: str
  path: Any
  split: str = 'train'
  weight: float = 1.0
  captions: Any = 'random'


def parts(mixture: Mapping[str, Any]) -> tuple[Part, ...]:
  """{name: Part's fields, or just a path} → the parts with a weight above 0, by name.

  Configs do not keep the order of their keys, and a run must not depend on it.

  Raises:
    ValueError, TypeError: naming the part and the key.
  """
  found = []
  for name, fields in sorted(mixture.items()):
    where = f'mixture: {name}'
    if not name or any(c in name for c in '/ ,='):
      raise ValueError(f'{where!r}: a name without spaces, commas and slashes is needed; it is part of metrics')
    fields = {'path': fields} if not isinstance(fields, Mapping) or 'format' in fields else dict(fields)
    known = [f.name for f in dataclasses.fields(Part)][1:]
    unknown = sorted(fields.keys() - set(known))
    if unknown or 'path' not in fields:
      raise TypeError(f"{where}: expected 'path' and perhaps {known[1:]}, got {sorted(fields)}")
    part = Part(name, **fields)
    if isinstance(part.weight, bool) or not isinstance(part.weight, (int, float)) or not (
        0 <= part.weight < math.inf):
      raise ValueError(f'{where}: weight must be a number, 0 or more, got {part.weight!r}')
    prepare.check_captions(part.captions, where=f'{where}: captions')
    spec_lib.parse(part.path)
    found.append(part)
  if not any(part.weight for part in found):
    raise ValueError(f'mixture: no part has a weight above 0: {[part.name for part in found]}')
  return tuple(part for part in found if part.weight)


def sizes(of: Sequence[Part]) -> list[int]:
  """The number of records of each part; errors name the part."""
  found = []
  for part in of:
    try:
      found.append(len(sources.open_source(part.path, split=part.split)))
    except (ValueError, FileNotFoundError) as error:
      if not part.name:
        raise
      kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
      raise kind(f'mixture: {part.name}: {error}') from error
  return found


def sample(of: Sequence[Part], *, count: int) -> Iterator[schema.Example]:
  """About `count` examples, spread evenly over each part; each part as many as is its share, or all that it has."""
  for part, share in zip(of, shares(of)):
    source = sources.open_source(part.path, split=part.split)
    for i in np.unique(np.linspace(0, len(source) - 1, min(len(source), max(1, round(share * count)))).astype(int)):
      yield source[int(i)]


def check_batch(of: Sequence[Part], records: Sequence[int], *, batch_size: int) -> None:
  """Raises ValueError, naming the part, if a part would have to be in one batch with some of its images twice."""
  for part, size, share in zip(of, records, shares(of)):
    if share * batch_size > size:
      raise ValueError(
          f'mixture: {part.name} has {size} examples, fewer than the {share * batch_size:.0f} that its weight '
          f'{part.weight:g} ({100 * share:.1f} %) asks for in each batch of {batch_size}: images would be their own '
          'negatives. Lower its weight, or the batch size')


def shares(of: Sequence[Part]) -> np.ndarray:
  """(parts,) float64, with sum 1, to a millionth: what Schedule keeps to."""
  return _millionths(of) / _millionths(of).sum()


def describe(of: Sequence[Part]) -> str:
  """Names and shares, for people."""
  return ', '.join(f'{part.name} {100 * share:.3g} %' for part, share in zip(of, shares(of)))


def _millionths(of):
  weights = np.array([part.weight for part in of], np.float64)
  return np.maximum(1, np.round(weights / weights.sum() * _UNIT)).astype(np.int64)


def seed_of(part: Part, seed: int) -> int:
  """The seed of a part's own order and draws. It does not depend on the other parts."""
  return int(np.random.SeedSequence([seed, zlib.crc32(part.name.encode())]).generate_state(1)[0])


class Schedule(grain.transforms.DatasetSelectionMap):
  """Place in the mixture → (part, how many of that part came before).

  Among the first n places, n a multiple of WINDOW, each part has its share to within one for each part of the mixture;
  inside a window the parts are in an order drawn from the seed, and each part's examples follow each other.
  """

  def __init__(self, of: Sequence[Part], *, seed: int):
    self._units, self._seed = _millionths(of), seed
    self._window = (-1, None, None)

  def __len__(self):
    return sys.maxsize

  def __getitem__(self, index):
    window, place = divmod(index, WINDOW)
    part, before = self._table(window)
    return int(part[place]), int(before[place])

  def seen(self, count: int) -> np.ndarray:
    """(parts,) how many of each are among the first `count` places."""
    window, place = divmod(count, WINDOW)
    start = self._counts(np.array([window * WINDOW]))[:, 0]
    return start + np.bincount(self._table(window)[0][:place], minlength=len(self._units))

  def _counts(self, places):
    """(parts, n): how many of each part are among the first `places`, if parts were not shuffled inside windows."""
    out, left, units = [], places.astype(np.int64), self._units.sum()
    for own in self._units:  # of what the parts before left over, this one takes its share, rounded up
      rest = left * (units - own) // units
      out.append(left - rest)
      left, units = rest, units - own
    return np.stack(out)

  def _table(self, window):
    if self._window[0] != window:
      counts = self._counts(np.arange(window * WINDOW, (window + 1) * WINDOW + 1))
      part = np.argmax(np.diff(counts), 0)
      np.random.default_rng([self._seed, window]).shuffle(part)
      before = np.empty(WINDOW, np.int64)
      for i in range(len(self._units)):
        own = part == i
        before[own] = counts[i, 0] + np.arange(own.sum())
      self._window = (window, part, before)
    return self._window[1:]

  def __getstate__(self):
    return vars(self) | {'_window': (-1, None, None)}


class Seen:
  """How far a run has come in each part of its mixture, for its metrics; a matter of arithmetic too."""

  def __init__(self, of: Sequence[Part], *, seed: int):
    self._parts, self._sizes, self._schedule = of, sizes(of), Schedule(of, seed=seed)

  def metrics(self, examples: int) -> dict[str, float]:
    """data/images/NAME and data/epoch/NAME after so many examples of the mixture, over all hosts."""
    seen = self._schedule.seen(examples)
    return ({f'data/images/{part.name}': int(n) for part, n in zip(self._parts, seen)}
            | {f'data/epoch/{part.name}': float(n / size) for part, n, size in zip(self._parts, seen, self._sizes)})
