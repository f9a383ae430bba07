"""Charts: the curve lies at its values, the axes say which, gaps stay gaps."""
import math
import re

import html_tree
import numpy as np
import pytest

from cloc_jax import charts


def read(text):
  """(path of the first curve as (n, 2) pixels, y ticks as {pixel: label}, x ticks as {pixel: label})."""
  root = html_tree.parse(text)
  curve = points(root.all('path', cls='curve')[0]) if root.all('path', cls='curve') else None
  lines = [float(re.search(r'M\S+ (\S+)H', p.attributes['d'])[1]) for p in root.all('path', cls='tick')]
  labels = [t for t in root.all('text') if t.attributes['text-anchor'] == 'end' and float(t.attributes['x']) < 50]
  across = [t for t in root.all('text') if t not in labels]
  return (root, curve, dict(zip(lines, [t.text for t in labels], strict=True)),
          {float(t.attributes['x']): t.text for t in across if t.attributes['text-anchor'] == 'middle'})


def points(path):
  return np.array([[float(v) for v in p.split()] for p in re.split('[ML]', path.attributes['d'].rstrip('Z')) if p])


def value_at(pixel, ticks, *, log=False):
  """The value at a height, read off two ticks as a person would."""
  (p0, t0), (p1, t1) = list(ticks.items())[0], list(ticks.items())[-1]
  t0, t1 = (float(t.removesuffix(' %')) for t in (t0, t1))
  if log:
    return 10 ** (math.log10(t0) + (pixel - p0) / (p1 - p0) * (math.log10(t1) - math.log10(t0)))
  return t0 + (pixel - p0) / (p1 - p0) * (t1 - t0)


@pytest.mark.parametrize('values', [(3, 1, 2, 8), (-2, 0, 5, 1), (0.071, 0.072, 0.0731, 0.07), (500, 940, 700, 611)])
def test_a_curve_can_be_read_off_its_ticks(values):
  root, curve, ticks, across = read(charts.chart('loss', {'': ([10, 20, 30, 40], values)}))
  assert root.all('strong')[0].text == charts.number(values[-1])
  assert 3 <= len(ticks) <= 6 and len(set(ticks.values())) == len(ticks)
  span = max(values) - min(values)
  np.testing.assert_allclose([value_at(y, ticks) for y in curve[:, 1]], values, atol=0.02 * span)
  np.testing.assert_allclose([value_at(x, across) for x in curve[:, 0]], [10, 20, 30, 40], atol=0.3)
  assert curve[:, 0].max() <= 320 and curve[:, 1].min() >= 0 and curve[:, 1].max() <= 150


def test_logarithmic_only_where_it_says_more():
  values = [1000, 10, 0.1, 0.2]
  root, curve, ticks, _ = read(charts.chart('loss', {'': (range(4), values)}, log=True))
  assert '(log)' in root.text
  plain = {p: t.replace('k', '000') for p, t in ticks.items()}
  np.testing.assert_allclose([value_at(y, plain, log=True) for y in curve[:, 1]], values, rtol=0.03)
  for other in ([1, 2, 3, 4], [1000, 1, 0, 1], [1000, 1, -1, 1]):
    assert '(log)' not in charts.chart('loss', {'': (range(4), other)}, log=True)
  narrow, *_ = read(charts.chart('loss', {'': (range(2), [0.3, 8])}, log=True))
  assert '(log)' in narrow.text and len(narrow.all('path', cls='tick')) >= 3


def test_gaps_break_the_curve():
  root, curve, *_ = read(charts.chart('loss', {'': (range(7), [1, 2, None, 3, math.nan, 4, math.inf])}))
  assert len(curve) == 2  # one segment of two; the lone values are dots
  assert len(root.all('circle')) == 2 and root.all('strong')[0].text == '4'


def test_many_points_are_averaged_and_their_range_shown():
  rng = np.random.default_rng(0)
  values = rng.normal(size=5000) + np.linspace(0, 40, 5000)
  root, curve, ticks, _ = read(charts.chart('loss', {'': (range(5000), values)}))
  assert 200 <= len(curve) <= 240
  means = values.reshape(250, 20).mean(1)
  assert abs(value_at(curve[0, 1], ticks) - means[0]) < 1 and abs(value_at(curve[-1, 1], ticks) - means[-1]) < 1
  # Means of some twenty draws stray by about 0.2 from each other's line; single draws by 1.
  assert np.std(np.diff([value_at(y, ticks) for y in curve[:, 1]])) < 0.6
  band = [value_at(y, ticks) for y in points(root.all('path', cls='band')[0])[:, 1]]
  assert abs(max(band) - values.max()) < 0.3 and abs(min(band) - values.min()) < 0.3
  assert root.all('strong')[0].text == charts.number(values[-1])


def test_several_series_are_named_with_their_last_values():
  root, *_ = read(charts.chart('top <1>', {'val': ([1, 2], [0.1, 0.256]), 'un&seen': ([1], [0.5])}, percent=True))
  assert root.all('figcaption')[0].text.startswith('top <1>')
  assert [s.text for s in root.all('span', cls='legend')[0].all('span')] == ['val 25.6 %', 'un&seen 50.0 %']
  assert len(root.all('path', cls='curve')) == 1 and len(root.all('circle')) == 2


@pytest.mark.parametrize('values', [[5.0, 5.0], [0.0, 0.0], [7.0]])
def test_flat_and_single_values_lie_inside(values):
  root, curve, ticks, _ = read(charts.chart('x', {'': (range(1, 1 + len(values)), values)}))
  heights = [float(c.attributes['cy']) for c in root.all('circle')]
  assert heights and all(0 < h < 150 for h in heights)
  assert value_at(heights[0], ticks) == pytest.approx(values[0], abs=0.05)


def test_nothing_to_draw_and_unequal_lengths():
  with pytest.raises(ValueError, match="chart 'x': no finite value"):
    charts.chart('x', {'': ([1, 2], [None, math.nan])})
  with pytest.raises(ValueError, match='2 steps for 1 values'):
    charts.chart('x', {'': ([1, 2], [1.0])})


@pytest.mark.parametrize('value, text', [
    (0, '0'), (1, '1'), (0.5, '0.5'), (0.00122, '0.00122'), (0.0005, '5e-4'), (-0.00025, '-2.5e-4'), (12.34, '12.3'),
    (1234.4, '1234'), (12345, '12.3k'), (200_000, '200k'), (1_500_000, '1.5M'), (2.5e9, '2.5G'), (989e12, '989T')])
def test_short_numbers(value, text):
  assert charts.number(value) == text
