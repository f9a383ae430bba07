import numpy as np
import pytest
from html_tree import parse

from cloc_jax import confusion


def test_counts_pairs_and_classes():
  rng = np.random.default_rng(0)
  names = [f'c{i}' for i in range(9)]
  labels, predicted = rng.integers(0, 6, 300), rng.integers(2, 8, 300)
  got = confusion.count(labels, predicted, classes=names)
  assert got.classes == tuple(names[:8]), 'what occurs in neither is left out'
  want = [[sum((a, b) == (i, j) for a, b in zip(labels, predicted)) for j in range(8)] for i in range(8)]
  np.testing.assert_array_equal(got.counts, want)
  pairs = got.pairs(5)
  every = sorted((-want[i][j] for i in range(8) for j in range(8) if i != j))
  assert [-n for _, _, n, _ in pairs] == every[:5] and all(a != b for a, b, _, _ in pairs)
  a, b, n, share = pairs[0]
  assert share == n / (labels == names.index(a)).sum() and n == want[names.index(a)][names.index(b)]
  best = got.by_class()
  assert {c for c, _, _ in best} == set(names[:6])
  shares = [right / total for _, right, total in best]
  assert shares == sorted(shares, reverse=True)


def test_the_matrix_draws_each_cell_once_in_its_place():
  got = confusion.count([0, 0, 0, 1, 2], [0, 0, 1, 1, 0], classes=['<cat>', 'dog', 'bus'])
  tree = parse(confusion.svg(got))
  cells = tree.all('rect')
  found = {c.text: c for c in cells}
  assert set(found) == {'<cat> → <cat>: 2 of 3', '<cat> → dog: 1 of 3', 'dog → dog: 1 of 1', 'bus → <cat>: 1 of 1'}
  side = float(cells[0].attributes['width'])
  place = lambda c: (round(float(c.attributes['y']) / side, 6), round(float(c.attributes['x']) / side, 6))
  origin = place(found['<cat> → <cat>: 2 of 3'])
  assert np.allclose(np.subtract(place(found['<cat> → dog: 1 of 3']), origin), (0, 1))
  assert np.allclose(np.subtract(place(found['bus → <cat>: 1 of 1']), origin), (2, 0))
  kind = lambda name: found[name].attributes['class']
  assert kind('dog → dog: 1 of 1') == 'right' and kind('bus → <cat>: 1 of 1') == 'wrong'
  opacity = lambda name: float(found[name].attributes['fill-opacity'])
  assert opacity('<cat> → dog: 1 of 3') < opacity('<cat> → <cat>: 2 of 3') < opacity('bus → <cat>: 1 of 1') == 1
  many = confusion.count(range(101), range(101), classes=[str(i) for i in range(101)])
  with pytest.raises(ValueError, match='101 classes are too many to draw; the most is 100'):
    confusion.svg(many)
