"""Are boxes what their format promises? Recognises xyxy, xywh and yxyx in pixels, fractions or thousandths.

A box fits a convention if, read by it, it has a positive size and lies in its image. Boxes of the promised convention
nearly all fit; read by a wrong one, many do not: widths taken for right edges end left of where they begin, right edges
taken for widths end outside. What fits its promise is believed: geometry cannot tell xyxy from yxyx in square images,
nor pixels from thousandths in images of about a thousand pixels.
"""
import dataclasses

import numpy as np

ORDERS = ('xyxy', 'xywh', 'yxyx')
UNITS = ('pixels', 'normalised', '0-1000')
CONVENTIONS = tuple(f'{order} {unit}' for unit in UNITS for order in ORDERS)

MIN_BOXES = 20  # fewer say nothing
_SAMPLE = 100_000
_SLACK = 0.02  # of the image's side: annotators' generosity at the border
_FITS = 0.9  # a promise that so many boxes keep, and no other convention explains the rest, holds
_MIXED = 0.01  # so many boxes of another convention are a mixture, not stray mistakes
_REACH = 0.1  # of boxes in thousandths lie outside their image if read as pixels
_EXPLAINS = 0.9  # and so many of those that do not fit must fit the other


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What was found.

  promised: the convention looked for. kept: share of boxes that fit it, in [0, 1].
  looks_like: the convention that explains the boxes better, '' if the promise holds or nothing fits.
  share: share of boxes that fit `looks_like`; for a mixture, of those that break the promise.
  kind: 'as promised', 'mistaken' (another convention throughout), 'mixed' (two of them), 'unknown' (none fits).
  boxes: how many were looked at.
  """
  promised: str
  kept: float
  looks_like: str
  share: float
  kind: str
  boxes: int

  def __str__(self):
    promise = f'the format promises {self.promised}, which {_percent(self.kept)} of {self.boxes} boxes fit'
    if self.kind == 'mistaken':
      return f'looks like {self.looks_like}: {_percent(self.share)} of the boxes fit that; {promise}'
    if self.kind == 'mixed':
      return (f'looks like a mixture of {self.promised} and {self.looks_like}: {promise}, '
              f'and {_percent(self.share)} of the others fit {self.looks_like}')
    if self.kind == 'unknown':
      return f'no known convention fits these boxes; {promise}. Are the image sizes right?'
    return promise


def fits(boxes: np.ndarray, convention: str, *, sizes: np.ndarray) -> np.ndarray:
  """Whether each box, read by a convention, has a positive size and lies in its image.

  Args:
    boxes: (n, 4).
    convention: one of CONVENTIONS.
    sizes: (n, 2), height and width of each box's image in pixels.

  Returns:
    (n,) bool.
  """
  order, unit = convention.split(' ')
  boxes = np.asarray(boxes, np.float64)
  if unit == 'pixels':
    height, width = np.asarray(sizes, np.float64).T
  else:
    height = width = np.full(len(boxes), 1.0 if unit == 'normalised' else 1000.0)
  a, b, c, d = boxes.T
  x0, y0, x1, y1 = {'xyxy': (a, b, c, d), 'xywh': (a, b, a + c, b + d), 'yxyx': (b, a, d, c)}[order]
  tx, ty = _SLACK * width, _SLACK * height
  return (x1 > x0) & (y1 > y0) & (x0 >= -tx) & (y0 >= -ty) & (x1 <= width + tx) & (y1 <= height + ty)


def recognise(boxes: np.ndarray, *, sizes: np.ndarray, promised: str) -> Verdict:
  """Compares boxes (n, 4) in images of `sizes` (n, 2: height, width; pixels) with the convention they should be in.

  Raises:
    ValueError: for an unknown convention or arrays of other shapes.
  """
  if promised not in CONVENTIONS:
    raise ValueError(f'unknown box convention {promised!r}; known are {list(CONVENTIONS)}')
  boxes, sizes = np.asarray(boxes), np.asarray(sizes)
  if boxes.ndim != 2 or boxes.shape[1] != 4 or sizes.shape != (len(boxes), 2):
    raise ValueError(f'expected boxes (n, 4) and sizes (n, 2), got {boxes.shape} and {sizes.shape}')
  if len(boxes) > _SAMPLE:
    chosen = np.linspace(0, len(boxes) - 1, _SAMPLE).astype(np.int64)
    boxes, sizes = boxes[chosen], sizes[chosen]
  # Boxes that are inverted or empty by any reading say nothing about the convention.
  sound = (boxes > 0).any(-1) & np.isfinite(boxes).all(-1) & (boxes[:, 2:] > 0).all(-1)
  boxes, sizes = boxes[sound], sizes[sound]
  if len(boxes) < MIN_BOXES:
    return Verdict(promised, 1.0, '', 0.0, 'as promised', len(boxes))
  # Boxes about the unit square are fractions, though as pixels they would lie in any image's corner; unless they are
  # so few that they are just tiny.
  small = (np.abs(boxes) <= 2).all(-1)
  fit = {name: fits(boxes, name, sizes=sizes) & (name.endswith('normalised') | ~small) for name in CONVENTIONS}
  if small.mean() < _MIXED and not promised.endswith('normalised'):
    fit[promised] = fits(boxes, promised, sizes=sizes)
  kept = float(fit[promised].mean())
  # Thousandths forgive much in images of a few hundred pixels: they must show themselves by reaching out of them, and
  # the promise must fail.
  others = [name for name in CONVENTIONS if name != promised and not (name.endswith('0-1000') and (
      kept > _FITS or fits(boxes, name.replace('0-1000', 'pixels'), sizes=sizes).mean() > 1 - _REACH))]
  broken = ~fit[promised]
  best = max(others, key=lambda name: fit[name].mean())
  share = float(fit[best].mean())
  second = max(others, key=lambda name: fit[name][broken].sum())
  both = float((fit[promised] | fit[second]).mean())
  if share > _FITS and 1 - kept > _MIXED + 5 * (1 - share) and share > both - _MIXED / 2:
    return Verdict(promised, kept, best, share, 'mistaken', len(boxes))
  if broken.mean() >= _MIXED and broken.sum() >= MIN_BOXES and fit[second][broken].mean() >= _EXPLAINS:
    return Verdict(promised, kept, second, float(fit[second][broken].mean()), 'mixed', len(boxes))
  if kept < _FITS:
    return Verdict(promised, kept, '', 0.0, 'unknown', len(boxes))
  return Verdict(promised, kept, '', 0.0, 'as promised', len(boxes))


def check(boxes: np.ndarray, *, sizes: np.ndarray, promised: str, where: str) -> Verdict:
  """Raises ValueError, naming `where` and what the boxes look like, unless they are what is promised."""
  verdict = recognise(boxes, sizes=sizes, promised=promised)
  if verdict.kind != 'as promised':
    raise ValueError(f'{where}: {verdict}')
  return verdict


def _percent(share):
  return f'{100 * share:.0f} %' if share in (0, 1) or 0.01 <= share <= 0.99 else f'{100 * share:.1f} %'
