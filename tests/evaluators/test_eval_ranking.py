import subprocess
import sys

import numpy as np
import pytest

from cloc_jax.evaluators import ranking


def slow_ranks(z_query, z_pool, right):
  """A loop over queries and items; `right` is a list of sets. Nothing shared with the code under test."""
  out = []
  for q, answers in zip(z_query, right):
    sims = [float(np.dot(q.astype(np.float64), p.astype(np.float64))) for p in z_pool]
    best = max((sims[a] for a in answers), default=None)
    wrong = [s for i, s in enumerate(sims) if i not in answers]
    out.append(len(z_pool) if best is None else sum(s >= best - 1e-6 for s in wrong))
  return np.array(out)


@pytest.mark.parametrize('block', [1, 40, 1 << 24])
def test_ranks_match_a_slow_loop_in_any_block_size(unit, monkeypatch, block):
  monkeypatch.setattr(ranking, '_BLOCK', block)
  rng = np.random.default_rng(0)
  z_query, z_pool = unit(rng.normal(size=(31, 6))), unit(rng.normal(size=(17, 6)))
  z_pool[3] = z_pool[11]  # a tie
  right = [set(rng.choice(17, rng.integers(0, 4), replace=False).tolist()) for _ in range(31)]
  assert any(not r for r in right)
  pairs = np.array([(q, p) for q, items in enumerate(right) for p in items])
  pairs = pairs[rng.permutation(len(pairs))]
  got = ranking.ranks(z_query, z_pool=z_pool, query=pairs[:, 0], item=pairs[:, 1])
  np.testing.assert_array_equal(got, slow_ranks(z_query, z_pool, right))


def test_one_right_answer_gives_the_rank_of_argsort(unit):
  rng = np.random.default_rng(1)
  z_query, z_pool = unit(rng.normal(size=(20, 5))), unit(rng.normal(size=(12, 5)))
  answer = rng.integers(0, 12, 20)
  got = ranking.ranks(z_query, z_pool=z_pool, query=np.arange(20), item=answer)
  order = np.argsort(-(z_query @ z_pool.T), 1)
  np.testing.assert_array_equal(got, [list(o).index(a) for o, a in zip(order, answer)])


def test_ties_and_nan_count_against_the_query():
  z = np.ones((4, 4), np.float32) / 2
  everything_equal = ranking.ranks(z, z_pool=z, query=np.arange(4), item=np.arange(4))
  np.testing.assert_array_equal(everything_equal, [3, 3, 3, 3])
  broken = z.copy()
  broken[2] = np.nan
  got = ranking.ranks(broken, z_pool=np.eye(4, dtype=np.float32), query=np.arange(4), item=np.arange(4))
  assert got[2] == 4


def test_a_difference_of_rounding_is_a_tie_and_a_real_one_is_not(unit):
  near = unit([[1, 0], [1, 3e-5]])
  assert ranking.ranks(near[:1], z_pool=near, query=[0], item=[0])[0] == 1
  apart = unit([[1, 0], [1, 0.01]])
  assert ranking.ranks(apart[:1], z_pool=apart, query=[0], item=[0])[0] == 0


def test_distinct_texts_ignore_case_and_spacing_alone():
  first, group = ranking.distinct_texts(['a Dog', 'a cat', ' a  dog', 'a dog.', 'A CAT'])
  assert first.tolist() == [0, 1, 3]
  assert group.tolist() == [0, 1, 0, 2, 1]


def test_top_takes_the_first_of_equals(monkeypatch):
  monkeypatch.setattr(ranking, '_BLOCK', 5)
  pool = np.float32([[0, 1], [1, 0], [1, 0]])
  items, scores = ranking.top(np.float32([[1, 0], [0, 1]]), z_pool=pool, k=9)
  assert items.tolist() == [[1, 2, 0], [0, 1, 2]] and scores.tolist() == [[1, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize('block', [150, 1 << 24])
def test_average_precision_agrees_with_scikit_learn(unit, monkeypatch, block):
  metrics = pytest.importorskip('sklearn.metrics')
  monkeypatch.setattr(ranking, '_BLOCK', block)
  rng = np.random.default_rng(2)
  z_class = unit(rng.normal(size=(9, 5)))
  label = rng.integers(0, 8, 120)  # the last class does not occur, nor the first
  label[label == 0] = 3
  z = unit(z_class[label] + 0.8 * rng.normal(size=(120, 5)))
  z[60:] = z[:60]  # ties between right and wrong
  got = ranking.average_precisions(z, z_class=z_class, label=label)
  assert np.isnan(got[[0, 8]]).all()
  for c in range(1, 8):
    want = metrics.average_precision_score(label == c, np.round(z.astype(np.float64) @ z_class[c], 6))
    assert got[c] == pytest.approx(want, abs=1e-6)


def test_average_precision_by_hand():
  # One class; the ranking is right, wrong, right: (1/1 + 2/3) / 2.
  z = np.float32([[1, 0], [0.8, 0.6], [0.6, 0.8]])
  got = ranking.average_precisions(z, z_class=np.float32([[1, 0], [0, 1]]), label=[0, 1, 0])
  assert got[0] == pytest.approx((1 + 2 / 3) / 2)
  assert got[1] == pytest.approx(1 / 2)  # the third is ahead of it


@pytest.mark.slow
def test_a_large_pool_is_ranked_in_little_memory():
  """100 000 queries against 20 000 items: all similarities would be 8 GB; blocks take no more than half a GB."""
  code = '''
import resource
import numpy as np
from cloc_jax.evaluators import ranking
rng = np.random.default_rng(0)
pool = rng.normal(size=(20_000, 16)).astype(np.float32)
pool /= np.linalg.norm(pool, axis=1, keepdims=True)
item = rng.integers(0, 20_000, 100_000)
query = pool[item]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rank = ranking.ranks(query, z_pool=pool, query=np.arange(100_000), item=item)
print((rank == 0).mean(), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
'''
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  right, megabytes = map(float, done.stdout.split())
  assert right > 0.99 and megabytes < 500
