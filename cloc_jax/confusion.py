"""Which classes are taken for which: counts, the most confused pairs, and the matrix as inline SVG."""
import dataclasses
import html

import numpy as np

MOST_DRAWN = 100  # classes in a drawn matrix: beyond, its labels could not be read

STYLE = """
.confusion { overflow-x: auto; margin: 12px 0 20px; }
.confusion svg { display: block; max-width: 100%; height: auto; }
.confusion text { font: 10px system-ui, sans-serif; fill: var(--soft); }
.confusion .grid-line { stroke: var(--line); stroke-width: 0.5; }
.confusion .right { fill: var(--good); }
.confusion .wrong { fill: var(--bad); }
"""


@dataclasses.dataclass(frozen=True)
class Confusion:
  """classes: C names. counts: (C, C) int64, what is of class i and was taken for class j."""
  classes: tuple[str, ...]
  counts: np.ndarray

  def pairs(self, most: int) -> list[tuple[str, str, int, float]]:
    """(class, taken for, how often, share of the class), the most frequent first."""
    wrong = self.counts * (1 - np.eye(len(self.counts), dtype=np.int64))
    total = self.counts.sum(1)
    order = [k for k in np.argsort(-wrong, axis=None, kind='stable')[:most] if wrong.flat[k]]
    return [(self.classes[i], self.classes[j], int(wrong[i, j]), float(wrong[i, j] / total[i]))
            for i, j in (divmod(int(k), len(self.classes)) for k in order)]

  def by_class(self) -> list[tuple[str, int, int]]:
    """(class, right, all) of the classes that occur, the best first."""
    total, right = self.counts.sum(1), np.diag(self.counts)
    found = [(self.classes[i], int(right[i]), int(total[i])) for i in np.flatnonzero(total)]
    return sorted(found, key=lambda c: (-c[1] / c[2], -c[2]))


def count(labels, predicted, *, classes) -> Confusion:
  """Confusion of (n,) labels and predictions, among the classes that occur as one or the other, in their order."""
  labels, predicted = np.asarray(labels, np.int64), np.asarray(predicted, np.int64)
  occurring = np.unique(np.concatenate([labels, predicted]))
  counts = np.zeros((len(occurring), len(occurring)), np.int64)
  np.add.at(counts, (np.searchsorted(occurring, labels), np.searchsorted(occurring, predicted)), 1)
  return Confusion(classes=tuple(classes[i] for i in occurring), counts=counts)


def svg(confusion: Confusion) -> str:
  """The matrix: a row a class, a column what it was taken for, a cell as dark as its share of the row.

  Raises:
    ValueError: of more than MOST_DRAWN classes, which nobody could read.
  """
  count = len(confusion.classes)
  if count > MOST_DRAWN:
    raise ValueError(f'confusion: {count} classes are too many to draw; the most is {MOST_DRAWN}')
  cell = max(11, min(26, 640 // count))
  margin = 8 + int(5.6 * min(22, max(map(len, confusion.classes))))
  side = margin + count * cell + 2
  short = [html.escape(name if len(name) <= 22 else f'{name[:21]}…') for name in confusion.classes]
  parts = []
  for i, name in enumerate(short):
    at = margin + (i + 0.5) * cell
    parts.append(f'<text x="{margin - 5}" y="{at + 3.5:.1f}" text-anchor="end">{name}</text>'
                 f'<text transform="translate({at + 3.5:.1f} {margin - 5}) rotate(-90)">{name}</text>'
                 f'<path class="grid-line" d="M{margin} {margin + i * cell}H{side - 2}M{margin + i * cell} {margin}'
                 f'V{side - 2}"/>')
  total = confusion.counts.sum(1)
  for i, j in np.argwhere(confusion.counts):
    n = int(confusion.counts[i, j])
    share = n / total[i]
    says = html.escape(f'{confusion.classes[i]} → {confusion.classes[j]}: {n:,} of {total[i]:,}')
    # A share of a few percent must still show: the root lifts it.
    parts.append(f'<rect class="{"right" if i == j else "wrong"}" x="{margin + j * cell}" y="{margin + i * cell}" '
                 f'width="{cell}" height="{cell}" fill-opacity="{max(share, 0.01) ** 0.5:.2f}"><title>{says}</title>'
                 '</rect>')
  return (f'<div class="confusion"><svg viewBox="0 0 {side} {side}" width="{side}" role="img" '
          f'aria-label="confusion of {count} classes">{"".join(parts)}</svg></div>')
