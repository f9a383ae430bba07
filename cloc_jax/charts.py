"""Line charts as inline SVG, small enough to stand in rows. Colours follow the page's light or dark style."""
from collections.abc import Mapping, Sequence
import dataclasses
import html
import math

import numpy as np

_WIDTH, _HEIGHT = 320, 150
_LEFT, _RIGHT, _TOP, _BOTTOM = 42, 8, 8, 20
_MOST_POINTS = 240  # more than that in 270 px are noise; neighbours are then averaged and their range is shaded
_LOG_SPAN = 20  # from this ratio of largest to smallest, a chart that may be logarithmic is

STYLE = """
:root { --line-0: #2b6cb0; --line-1: #c2570c; --line-2: #0f7b5f; --line-3: #8a4fb0; }
@media (prefers-color-scheme: dark) {
  :root { --line-0: #6db3f2; --line-1: #f59a56; --line-2: #4cc9a0; --line-3: #c79be8; }
}
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(280px, 1fr)); gap: 16px; margin: 12px 0 20px; }
.chart { padding: 12px 12px 6px; }
.chart figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 12px; padding: 0 2px 6px; }
.chart figcaption > span:first-child { font-size: 14px; }
.chart strong { font-weight: 600; font-variant-numeric: tabular-nums; }
.chart svg { display: block; width: 100%; height: auto; overflow: visible; }
.chart text { font: 10px system-ui, sans-serif; fill: var(--soft); font-variant-numeric: tabular-nums; }
.chart .tick { stroke: var(--line); stroke-width: 1; }
.chart .curve { fill: none; stroke-width: 1.75; stroke-linejoin: round; stroke-linecap: round; }
.chart .band { stroke: none; fill-opacity: 0.16; }
.chart .legend { display: flex; gap: 12px; flex-basis: 100%; font-size: 12px; color: var(--soft); }
.chart .legend b { font-weight: 600; }
"""


@dataclasses.dataclass(frozen=True)
class Scale:
  """A map from values to a chart's pixels. low, high: values at `start` and `end`; ticks: values to write."""
  low: float
  high: float
  start: float
  end: float
  ticks: tuple[float, ...]
  log: bool = False

  def __call__(self, values):
    f = np.log10 if self.log else np.asarray
    share = (f(np.asarray(values, np.float64)) - f(self.low)) / (f(self.high) - f(self.low))
    return self.start + share * (self.end - self.start)


def chart(title: str, series: Mapping[str, tuple[Sequence[float], Sequence[float | None]]], *, log: bool = False,
          percent: bool = False, head: str | None = None) -> str:
  """A figure with curves over steps; the last value of each stands above it.

  Args:
    title: text.
    series: name → (steps ascending, values). A value of None, NaN or infinity breaks the curve. The names are shown
      where there are several.
    log: a logarithmic axis, where the values are positive and span enough for it.
    percent: values are fractions, to be shown in percent.
    head: text that stands above in place of the last values, for curves whose end says nothing.

  Raises:
    ValueError: without any finite value, or where steps and values differ in number.
  """
  curves = {name: _clean(title, *points) for name, points in series.items()}
  shown = np.concatenate([y[np.isfinite(y)] for _, y in curves.values()] or [np.zeros(0)])
  if not len(shown):
    raise ValueError(f'chart {title!r}: no finite value')
  steps = np.concatenate([x for x, _ in curves.values()])
  log = log and shown.min() > 0 and shown.max() / shown.min() >= _LOG_SPAN
  x_scale = _x_scale(float(steps.min()), float(steps.max()))
  y_scale = (_log_scale if log else _linear_scale)(float(shown.min()), float(shown.max()))
  write = _percent if percent else number
  parts = [_axes(x_scale, y_scale, write)]
  parts += [_curve(x, y, x_scale, y_scale, color=f'var(--line-{i % 4})') for i, (x, y) in enumerate(curves.values())]
  write = _rounded_percent if percent else number
  last = {name: write(y[np.isfinite(y)][-1]) for name, (_, y) in curves.items() if np.isfinite(y).any()}
  if head is not None:
    head = f'<strong>{html.escape(head)}</strong>'
  elif len(curves) == 1:
    head = f'<strong>{next(iter(last.values()))}</strong>'
  else:
    head = '<span class="legend">' + ''.join(
        f'<span><b style="color:var(--line-{i % 4})">{html.escape(name)}</b> {last.get(name, "–")}</span>'
        for i, name in enumerate(curves)) + '</span>'
  scale_note = ' <span class="soft">(log)</span>' if log else ''
  says = html.escape(f'{title}: ' + ', '.join(f'{name} {value}'.strip() for name, value in last.items()))
  return (f'<figure class="chart"><figcaption><span>{html.escape(title)}{scale_note}</span>{head}</figcaption>'
          f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{says}">{"".join(parts)}</svg></figure>')


def number(value: float) -> str:
  """A value in a few characters: '12.3k', '0.031', '5e-4'."""
  value = float(value)
  size = abs(value)
  if size == 0:
    return '0'
  if size < 1e-3:
    mantissa, exponent = f'{value:.1e}'.split('e')
    return f'{mantissa.removesuffix(".0")}e{int(exponent)}'
  for limit, suffix in ((1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e4, 'k')):
    if size >= limit:
      return f'{value / (1e3 if suffix == "k" else limit):.3g}{suffix}'
  return f'{value:.4g}' if size >= 1000 else f'{value:.3g}'


def _percent(value):
  return f'{100 * float(value):.3g} %'


def _rounded_percent(value):
  return f'{100 * float(value):.1f} %'


def _clean(title, steps, values):
  x = np.asarray(steps, np.float64)
  y = np.array([math.nan if v is None else v for v in values], np.float64)
  if x.shape != y.shape:
    raise ValueError(f'chart {title!r}: {len(x)} steps for {len(y)} values')
  return x, np.where(np.isfinite(y), y, np.nan)


def _nice_step(span: float, count: int) -> float:
  """The round step (1, 2, 2.5, 5 × 10ⁿ) that cuts `span` into about `count` parts."""
  raw = span / count
  power = 10.0 ** math.floor(math.log10(raw))
  return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)


def _multiples(low, high, step):
  first = math.ceil(low / step - 1e-9)
  # Multiplying once keeps 0.30000000000000004 away from the labels, as does rounding.
  return tuple(round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1))


def _x_scale(low, high):
  if low == high:
    low, high = low - 1, high + 1
    ticks = (low + 1,)
  else:
    low = 0.0 if low < 0.1 * high else low
    ticks = tuple(t for t in _multiples(low, high, _nice_step(high - low, 4)) if t == int(t))
  return Scale(low=low, high=high, start=_LEFT, end=_WIDTH - _RIGHT, ticks=ticks)


def _linear_scale(low, high):
  if high - low <= 1e-9 * max(abs(low), abs(high)):  # a flat curve runs through the middle
    low, high = (low - 0.5 * abs(low), high + 0.5 * abs(high)) if low else (-1.0, 1.0)
  if 0 < low < 0.4 * high:
    low = 0.0
  step = _nice_step(high - low, 3)
  low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
  return Scale(low=low, high=high, start=_HEIGHT - _BOTTOM, end=_TOP, ticks=_multiples(low, high, step))


def _log_scale(low, high):
  decades = range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
  ticks = [10.0 ** d for d in decades]
  if len(ticks) < 3:
    ticks = [m * 10.0 ** d for d in range(decades.start - 1, decades.stop) for m in (1, 2, 5)]
  elif len(ticks) > 5:
    ticks = ticks[::math.ceil(len(ticks) / 5)]
  margin = (high / low) ** 0.04
  low, high = low / margin, high * margin
  return Scale(low=low, high=high, start=_HEIGHT - _BOTTOM, end=_TOP, log=True,
               ticks=tuple(t for t in ticks if low <= t <= high))


def _axes(x_scale, y_scale, write):
  parts = []
  for tick in y_scale.ticks:
    y = float(y_scale(tick))
    parts.append(f'<path class="tick" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>'
                 f'<text x="{_LEFT - 5}" y="{y + 3.5:.1f}" text-anchor="end">{write(tick)}</text>')
  for tick in x_scale.ticks:
    x = float(x_scale(tick))
    # A label at the right edge ends there; centred, it would be cut off.
    anchor = 'end' if x > _WIDTH - _RIGHT - 12 else 'middle'
    parts.append(f'<text x="{x + (_RIGHT if anchor == "end" else 0):.1f}" y="{_HEIGHT - 5}" text-anchor="{anchor}">'
                 f'{number(tick)}</text>')
  return ''.join(parts)


def _curve(x, y, x_scale, y_scale, *, color):
  out = []
  if len(x) > _MOST_POINTS:
    groups = [g for g in np.array_split(np.arange(len(x)), _MOST_POINTS) if np.isfinite(y[g]).any()]
    px = x_scale([x[g].mean() for g in groups])
    low, high = (y_scale([f(y[g]) for g in groups]) for f in (np.nanmin, np.nanmax))
    edge = [*zip(px, low), *zip(px[::-1], high[::-1])]
    out.append(f'<path class="band" style="fill:{color}" d="{_path(edge)}Z"/>')
    py = y_scale([np.nanmean(y[g]) for g in groups])
  else:
    px, py = x_scale(x), y_scale(y)
  runs, run = [], []
  for point in zip(px, py):
    if math.isfinite(point[1]):
      run.append(point)
    elif run:
      runs, run = [*runs, run], []
  runs = [*runs, run] if run else runs
  d = ''.join(_path(r) for r in runs if len(r) > 1)
  if d:
    out.append(f'<path class="curve" style="stroke:{color}" d="{d}"/>')
  # A lone value between gaps, and where the curve ends now.
  dots = [r[0] for r in runs if len(r) == 1] + ([runs[-1][-1]] if runs and len(runs[-1]) > 1 else [])
  out += [f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="2.5" style="fill:{color}"/>' for cx, cy in dots]
  return ''.join(out)


def _path(points):
  return 'M' + 'L'.join(f'{px:.1f} {py:.1f}' for px, py in points)
