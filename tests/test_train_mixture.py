"""Training on a mixture: it resumes exactly, and says how far it is in each source."""
import json
import shutil

import pytest
import tiny_experiment as tiny

from cloc_jax import metrics
from cloc_jax import report
from cloc_jax import train
from cloc_jax.data import mixture
from cloc_jax.data import sources


@pytest.fixture(name='config')
def config_fixture(base, tmp_path):
  """Drawn scenes, and the same pictures as rows without regions that are read as they are; random crops."""
  source, lines = sources.open_source(tiny.data(base), split='train'), []
  for i in range(20):
    (tmp_path / f'{i}.png').write_bytes(source[i].image)
    lines.append(json.dumps({'image': f'{i}.png', 'captions': ['alt', *source[i].captions]}))
  (tmp_path / 'rows.jsonl').write_text('\n'.join(lines))
  config = tiny.get_config()
  with config.ignore_type():
    config.data.path = None
    config.data.mixture = dict(
        scenes=dict(path=str(tiny.data(base)), weight=3.0),
        rows=dict(path=dict(format='jsonl', rows=str(tmp_path / 'rows.jsonl')), weight=1.0, captions='last'))
  config.data.crop = dict(scale=(0.5, 1.0))
  config.data.num_workers = 0
  config.train.total_steps = 6
  config.checkpoint.every_steps = 3
  return config


@pytest.mark.slow
def test_a_mixture_resumes_exactly(config, base, tmp_path):
  with tiny.compiled_once(base):
    whole = tmp_path / 'whole'
    assert train.train(config, workdir=whole, quiet=True).status == 'done'
    again = tmp_path / 'again'
    shutil.copytree(whole, again)
    for folder in (again / 'checkpoints').iterdir():
      if int(folder.name) > 3:
        shutil.rmtree(folder)
    (again / 'metrics.jsonl').write_text('')
    assert train.train(config, workdir=again, quiet=True).step == 6
  rows, resumed = metrics.read(whole), metrics.read(again)
  assert sorted(resumed) == [4, 5, 6]
  of = mixture.parts(config.data.mixture.to_dict())
  schedule = mixture.Schedule(of, seed=0)
  for step, row in rows.items():
    seen = schedule.seen(step * tiny.BATCH)
    assert [row['data/images/rows'], row['data/images/scenes']] == seen.tolist()
    assert row['data/epoch/rows'] == pytest.approx(seen[0] / 20) and row['data/epoch/scenes'] == pytest.approx(seen[1] / 96)
  for step, row in resumed.items():
    keys = [k for k in row if k.startswith(('loss', 'data/', 'lambda'))]
    assert {k: row[k] for k in keys} == {k: rows[step][k] for k in keys}
  assert all(0.5 < row['lambda'] < 1 for row in rows.values())  # about three quarters of a batch have regions
  page = report.write(whole).read_text()
  assert 'a mixture: rows 25 %, scenes 75 %' in page and 'names no data set to evaluate on' in page


def test_what_a_mixture_needs_is_said_at_once(config, tmp_path, monkeypatch):
  monkeypatch.setattr(train.train_step, 'init_state', lambda *a, **k: pytest.fail('something was computed'))
  run = lambda: train.train(config, workdir=tmp_path / 'run', quiet=True)
  with config.ignore_type():
    config.evals.splits = None
  with pytest.raises(ValueError, match='config.evals.path: a mixture has no splits'):
    run()
  config.evals.splits = ()
  config.data.crop = dict(scales=(0.5, 1.0))
  with pytest.raises(TypeError, match="config.data.crop.scales: no such key. Did you mean 'scale'"):
    run()
  config.data.crop = dict(scale=(0.5, 1.5))
  with pytest.raises(ValueError, match='crop: scale: expected'):
    run()
  config.data.batch_size = 96
  with pytest.raises(ValueError, match='rows has 20 examples, fewer than the 24'):
    run()
  with config.unlocked():
    config.train = dict(total_epochs=1)
  config.data.batch_size = 16
  with pytest.raises(ValueError, match='the sources of a mixture have epochs of their own'):
    run()
  with config.ignore_type():
    config.data.path = 'x'
  with pytest.raises(ValueError, match='either path or mixture'):
    run()
