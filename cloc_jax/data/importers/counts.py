"""What became of a source's images, boxes and captions: kept, repaired or dropped, why, and which ones for instance."""
from collections.abc import Mapping
import dataclasses
import os

from cloc_jax.data import storage

EXAMPLES = 10  # how many are named for each reason; all are counted
_WHAT = ('images', 'boxes', 'captions')  # shown first, in this order
_OUTCOMES = ('kept', 'repaired', 'dropped', 'noted')


@dataclasses.dataclass(frozen=True)
class LostImage:
  """An image that is missing or unreadable.

  name: for people. reason: 'missing', 'unreadable', ….
  path: its file, '' for a part of an archive; state: what was there (see storage.state), so that a repair is noticed.
  """
  name: str
  reason: str
  path: str = ''
  state: str = ''


class Counts:
  """Counts by (what, outcome, reason), each with up to ten named examples.

  Everything that a source holds is in exactly one of kept, repaired and dropped: kept + repaired is what was written.
  'noted' stands beside them and says more of things already counted, such as images without a caption.
  """

  def __init__(self):
    self._rows: dict[tuple[str, str, str], tuple[int, list[str]]] = {}
    self.lost: list[LostImage] = []

  def __eq__(self, other):
    return isinstance(other, Counts) and self.to_json() == other.to_json()

  def __repr__(self):
    return f'Counts({self.to_json()})'

  def kept(self, what: str, count: int = 1) -> None:
    """Written as it was. `what` is a plural: 'images', 'boxes', 'captions'."""
    self._add(what, 'kept', '', '', count)

  def repaired(self, what: str, reason: str, example: str, count: int = 1) -> None:
    """Written after a change; `example` names it: 'image 139, annotations[7]'."""
    self._add(what, 'repaired', reason, example, count)

  def dropped(self, what: str, reason: str, example: str, count: int = 1) -> None:
    """Not written."""
    self._add(what, 'dropped', reason, example, count)

  def noted(self, what: str, reason: str, example: str, count: int = 1) -> None:
    """Worth knowing of something that is counted already."""
    self._add(what, 'noted', reason, example, count)

  def lost_image(self, name: str, reason: str, *, path: str | os.PathLike = '', detail: str = '') -> None:
    """An image dropped because it is missing or unreadable: these are what `max_error_share` limits.

    reason is a class ('missing', 'unreadable', 'of another size'), detail what was found in this one.
    """
    path = os.fspath(path)
    shown = f'{name} ({detail})' if detail else name
    self.lost.append(LostImage(shown, reason, path, storage.state(path) if path else ''))
    self.dropped('images', reason, shown)

  def merge(self, other: 'Counts') -> None:
    """Adds another's counts to these; the examples of those merged first stay."""
    for (what, outcome, reason), (count, examples) in other._rows.items():
      have, named = self._rows.get((what, outcome, reason), (0, []))
      self._rows[what, outcome, reason] = (have + count, (named + examples)[:EXAMPLES])
    self.lost += other.lost

  def of(self, what: str, outcome: str | None = None, reason: str | None = None) -> int:
    """How many; without an outcome: how many there were in the source, without a reason: whatever the reason."""
    outcomes = _OUTCOMES[:3] if outcome is None else (outcome,)
    return sum(count for (w, o, r), (count, _) in self._rows.items()
               if w == what and o in outcomes and reason in (None, r))

  def examples(self, what: str, outcome: str, reason: str) -> list[str]:
    """The named ones."""
    return list(self._rows.get((what, outcome, reason), (0, []))[1])

  def written(self, what: str) -> int:
    """kept + repaired."""
    return self.of(what, 'kept') + self.of(what, 'repaired')

  def rows(self) -> list[tuple[str, str, str]]:
    """All (what, outcome, reason) there are, in the order of the table."""
    whats = [*_WHAT, *sorted({what for what, _, _ in self._rows} - set(_WHAT))]
    return sorted(self._rows, key=lambda row: (whats.index(row[0]), _OUTCOMES.index(row[1]), row[2]))

  def to_json(self) -> dict:
    """{what: {'kept': n, 'repaired' | 'dropped' | 'noted': {reason: {'count': n, 'examples': […]}}}}."""
    found: dict = {}
    for what, outcome, reason in self.rows():
      count, examples = self._rows[what, outcome, reason]
      place = found.setdefault(what, {})
      if outcome == 'kept':
        place['kept'] = count
      else:
        place.setdefault(outcome, {})[reason] = {'count': count, 'examples': list(examples)}
    return found

  @classmethod
  def from_json(cls, content: Mapping) -> 'Counts':
    """The reverse of to_json; `lost` is not part of it."""
    counts = cls()
    for what, outcomes in content.items():
      for outcome, found in outcomes.items():
        if outcome == 'kept':
          counts.kept(what, found)
        else:
          for reason, row in found.items():
            counts._rows[what, outcome, reason] = (row['count'], list(row['examples']))
    return counts

  def _add(self, what, outcome, reason, example, count):
    if not count:
      return
    have, examples = self._rows.get((what, outcome, reason), (0, []))
    if example and len(examples) < EXAMPLES:
      examples = [*examples, example]
    self._rows[what, outcome, reason] = (have + count, examples)


def table(counts: Mapping[str, Counts]) -> str:
  """Counts of all splits for people: a column a split, a row a reason, and the examples of what was lost below."""
  every = Counts()
  for found in counts.values():
    every.merge(found)
  rows = [('', *counts)]
  for what, outcome, reason in every.rows():
    rows.append((f'{what} {outcome}' + (f': {reason}' if reason else ''),
                 *(f'{found.of(what, outcome, reason):,}' for found in counts.values())))
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  lines = ['  '.join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]) for row in rows]
  for what, outcome, reason in every.rows():
    named = every.examples(what, outcome, reason)
    if named and (outcome != 'noted' or what not in _WHAT):
      more = ', …' if every.of(what, outcome, reason) > 3 else ''
      lines.append(f'  {what} {outcome}, {reason}: {", ".join(named[:3])}{more}')
  return '\n'.join(lines)
