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


def test_nearest_takes_the_first_of_equals(monkeypatch):
  monkeypatch.setattr(ranking, '_BLOCK', 5)
  pool = np.float32([[0, 1], [1, 0], [1, 0]])
  assert ranking.nearest(np.float32([[1, 0], [0, 1]]), z_pool=pool).tolist() == [1, 0]
