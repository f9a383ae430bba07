"""Long measurements under docs/results: a run that is cut off goes on, and other settings do not mix with its rows."""
import json
import pathlib
import sys

import numpy as np
import pytest

HERE = pathlib.Path(__file__).resolve().parents[1] / 'docs' / 'results'


@pytest.fixture(name='scripts', autouse=True)
def scripts_fixture(monkeypatch):
  monkeypatch.syspath_prepend(str(HERE))
  yield
  for name in ('result_page', 'eval_speed', 'eval_memory', 'losses'):
    sys.modules.pop(name, None)


def test_rows_are_kept_and_taken_over_with_the_same_settings_alone(tmp_path):
  import result_page
  file = tmp_path / 'r.json'
  results = result_page.begun(file, {'images': 3}, again=False)
  results['rows'] = {'a': 1.5}
  result_page.keep(file, results)
  assert result_page.begun(file, {'images': 3}, again=False) == {'images': 3, 'rows': {'a': 1.5}}
  assert result_page.begun(file, {'images': 4}, again=True) == {'images': 4}
  with pytest.raises(SystemExit, match=r"measured with {'images': 3}, not {'images': 4}"):
    result_page.begun(file, {'images': 4}, again=False)
  assert json.loads(file.read_text())['rows'] == {'a': 1.5} and [p.name for p in tmp_path.iterdir()] == ['r.json']


def test_only_what_is_missing_is_measured():
  import eval_speed
  calls = []
  made = {name: lambda given, name=name: calls.append(name) or np.zeros((2, 1)) for name in eval_speed.WAYS}
  settings = {'images': 2, 'batch': 1, 'side': 8, 'rounds': 2}
  first, *_, last = eval_speed.WAYS
  seconds = {first: [1.0, 2.0], last: [4.0]}
  before = [dict(seconds) for _ in eval_speed.measure(made, seconds, boxes=1, settings=settings)]
  # Everything once to compile, then two rounds without the three that were there.
  assert len(before) == 2 * len(made) - 3 and len(calls) == len(made) + len(before)
  assert seconds[first] == [1.0, 2.0] and seconds[last][0] == 4.0 and {len(s) for s in seconds.values()} == {2}
  calls.clear()
  assert not list(eval_speed.measure(made, seconds, boxes=1, settings=settings)) and not calls
  results = {'config': 'x', 'dtype': 'x', 'device': 'x', 'machine': 'x', 'jax': 'x', **settings,
             'seconds': {'36': {first: [1.0], last: [4.0]}, '7': {first: [2.0]}}}
  rows = [line for line in eval_speed.table(results).splitlines() if line[2:3].isdigit()]
  assert [row.split(' | ')[0] for row in rows] == ['| 7', '| 36', '| 36'] and '4.00 ×' in rows[-1]


def test_of_a_bounded_retrieval_the_first_ask_as_they_would_among_all():
  import eval_memory
  from cloc_jax.evaluators import ranking
  rng = np.random.default_rng(0)
  z, pool = rng.standard_normal((2, 40, 8), np.float32)
  pairs = np.arange(40)
  want = ranking.ranks(z, z_pool=pool, query=pairs, item=pairs)
  for queries in (0, 10):
    more = []
    got = eval_memory.first_ask(queries, more)(z, z_pool=pool, query=pairs, item=pairs)
    np.testing.assert_array_equal(got, np.resize(want[:queries or 40], 40))
    assert len(set(want)) > 10 and (more[0] > 0) == bool(queries)
