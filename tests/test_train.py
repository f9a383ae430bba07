"""Runs from their first step to their last, through the real entry point: stopped, killed, poisoned, damaged.

The reference is one undisturbed run in a process of its own (tiny_experiment.run). It and the runs inside the test's
process use one device, since many simulated ones on few cores mostly wait for each other; one test has four.
"""
import functools
import itertools
import json
import logging
import math
import shutil
import signal
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny_experiment as tiny

from cloc_jax import cli, evaluators, inference, metrics, sharding, train
from cloc_jax.data import schema, sources
from cloc_jax.models import cloc


@pytest.fixture(autouse=True, scope='module')
def compiled_once(base):
  with tiny.compiled_once(base):
    yield


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  monkeypatch.setattr(sharding, 'make_mesh', functools.partial(sharding.make_mesh, devices=jax.devices()[:1]))


@pytest.fixture(name='config')
def config_fixture(base):
  return tiny.get_config(str(tiny.data(base)))


@pytest.fixture(name='cut_short')
def cut_short_fixture(reference, tmp_path):
  """cut_short(step): a copy of the reference as it was after that step."""
  def copy(step):
    workdir = tmp_path / 'run'
    shutil.copytree(reference.workdir, workdir)
    for folder in (workdir / 'checkpoints').iterdir():
      if int(folder.name) > step:
        shutil.rmtree(folder)
    lines = (workdir / 'metrics.jsonl').read_text().splitlines(keepends=True)
    (workdir / 'metrics.jsonl').write_text(''.join(line for line in lines if json.loads(line)['step'] <= step))
    return workdir
  return copy


@pytest.fixture(name='traced')
def traced_fixture(monkeypatch):
  """Grows with every time that JAX has the whole model run through, which is most of a start's seconds."""
  found, run = [], cloc.Cloc.__call__

  def counted(self, batch):
    found.append(batch.image.shape[0])
    return run(self, batch)
  monkeypatch.setattr(cloc.Cloc, '__call__', counted)
  return found


def state_on_disk(workdir, step):
  with ocp.StandardCheckpointer() as reader:
    return reader.restore(workdir / 'checkpoints' / f'{step:08d}' / 'state')


def assert_losses_close(workdir, reference, *, steps=range(1, tiny.TOTAL + 1), rtol=2e-4):
  got, want = tiny.losses(workdir), tiny.losses(reference.workdir)
  np.testing.assert_allclose([got[s] for s in steps], [want[s] for s in steps], rtol=rtol)


def argv(base, workdir, *overrides):
  return ['train', '--config', f'{tiny.CONFIG}:{tiny.data(base)}', '--workdir', str(workdir),
          *(f'--config.{o}' for o in overrides)]


# --- an undisturbed run


def test_a_run_leaves_everything_behind(reference):
  workdir = reference.workdir
  found = metrics.read(workdir)
  assert list(found) == list(range(1, tiny.TOTAL + 1))
  losses = [found[s]['loss'] for s in found]
  assert all(map(math.isfinite, losses)) and np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])
  last = found[tiny.TOTAL]
  for name in ('loss_image_text', 'loss_region_text', 'loss_grounding', 'logit_scale', 'grad_norm', 'param_norm',
               'filtered_pairs', 'regions_per_image', 'lambda', 'learning_rate', 'images_per_second', 'step_seconds',
               'data_wait_share', 'flops_per_second', 'data/truncated_captions', 'data/corrupt_images',
               'eval/val/region_recognition/top1', 'eval/unseen/grounding/acc_iou50'):
    assert name in last, name
  assert 'images_per_second' not in found[1]  # that interval held compilation
  assert sorted(int(p.name) for p in (workdir / 'checkpoints').iterdir()) == [10, 20, 30, 40, 50, 60]
  assert next((workdir / 'tensorboard').iterdir()).stat().st_size > 10_000
  for split in ('val', 'unseen'):
    written = json.loads((workdir / 'evals' / f'{split}.json').read_text())
    assert written['step'] == tiny.TOTAL and written['split'] == split
    assert all(last[f'eval/{split}/{k}'] == v for k, v in written['metrics'].items())
  assert json.loads((workdir / 'config.json').read_text())['optim']['learning_rate'] == 1e-3
  assert 'img/embedding/kernel' in (workdir / 'parameters.txt').read_text()


def test_the_learning_rate_warms_up_and_falls(reference):
  rates = [row['learning_rate'] for row in metrics.read(reference.workdir).values()]
  assert rates[0] == 0 and max(rates) == pytest.approx(1e-3) and rates.index(max(rates)) == 4
  assert all(a > b for a, b in zip(rates[4:], rates[5:])) and rates[-1] < 1e-5


def test_a_run_says_what_it_does_and_where_everything_lies(reference):
  out, err = reference.finished.out, reference.finished.err
  assert err == ''
  assert "1 cpu device(s), mesh {'data': 1, 'fsdp': 1} · batch 16 · steps 0 → 60" in out
  assert f'step {tiny.TOTAL}/{tiny.TOTAL}  loss ' in out and 'images/s' in out
  assert '| metric, % ' in out and 'region recognition, top-1' in out
  for path in ('checkpoints', 'metrics.jsonl', 'evals', 'tensorboard'):
    assert str(reference.workdir / path) in out and (reference.workdir / path).exists()


def test_a_finished_run_says_so(base, reference, capsys):
  before = (reference.workdir / 'metrics.jsonl').read_text()
  assert cli.main(argv(base, reference.workdir, "evals.splits=('val','unseen')")) == 0
  out = capsys.readouterr().out
  assert f'all {tiny.TOTAL} steps are done' in out and '| metric, %' in out and 'steps 60 →' not in out
  assert (reference.workdir / 'metrics.jsonl').read_text() == before


# --- stopped and killed


def frozen_while(condition, process):
  """Stops the process and looks again, since it goes on between a look and a signal. It stays stopped if it holds."""
  process.send_signal(signal.SIGSTOP)
  time.sleep(0.01)
  if condition():
    return True
  process.send_signal(signal.SIGCONT)
  return False


@pytest.mark.slow
def test_stopped_killed_and_resumed_it_is_the_run_that_never_was(base, reference, tmp_path):
  workdir = tmp_path / 'run'
  command = argv(base, workdir)

  process = tiny.start(*command, base=base)
  tiny.wait_until(lambda: len(tiny.losses(workdir)) >= 4, process)
  process.send_signal(signal.SIGTERM)
  stopped = tiny.finish(process)
  first = tiny.newest(workdir)
  assert stopped.status == 0 and stopped.err == ''
  assert f'stopped by SIGTERM after step {first}; saved' in stopped.out
  assert 4 <= first < tiny.TOTAL and max(tiny.losses(workdir)) == first

  process = tiny.start(*command, base=base)
  between_checkpoints = lambda: first < tiny.newest(workdir) < max(tiny.losses(workdir))
  tiny.wait_until(lambda: between_checkpoints() and frozen_while(between_checkpoints, process), process)
  process.kill()
  killed = tiny.finish(process)
  second = tiny.newest(workdir)
  assert killed.status == -signal.SIGKILL and f'steps {first} → {tiny.TOTAL}' in killed.out
  assert second < max(tiny.losses(workdir)) < tiny.TOTAL  # steps were lost

  resumed = tiny.finish(tiny.start(*command, base=base))
  assert resumed.status == 0 and f'steps {second} → {tiny.TOTAL}' in resumed.out and resumed.err == ''
  want = tiny.losses(reference.workdir)
  assert len(want) == tiny.TOTAL and tiny.losses(workdir) == want
  # The lost steps too, which are there twice.
  steps = [row['step'] for row in tiny.rows(workdir)]
  assert len(steps) > len(set(steps)) and all(
      row['loss'] == want[row['step']] for row in tiny.rows(workdir) if 'loss' in row)
  jax.tree.map(np.testing.assert_array_equal, state_on_disk(workdir, tiny.TOTAL),
               state_on_disk(reference.workdir, tiny.TOTAL))


# --- poisoned


def poison(monkeypatch, *, batch):
  """Puts a NaN into the boxes of the n-th batch that a run takes."""
  count, to_global = itertools.count(1), sharding.to_global

  def poisoned(host_batch, mesh):
    if next(count) == batch:
      host_batch.boxes[0, 0] = np.nan
    return to_global(host_batch, mesh)

  monkeypatch.setattr(sharding, 'to_global', poisoned)


def test_nan_stops_the_run_names_the_step_and_keeps_the_last_good_checkpoint(base, cut_short, capsys, monkeypatch):
  workdir = cut_short(30)
  poison(monkeypatch, batch=3)
  # Nothing looks at step 33 before step 40, where the next checkpoint would be written.
  status = cli.main(argv(base, workdir, 'train.log_steps=25'))
  out, err = capsys.readouterr()
  assert status == 2 and 'steps 30 → 60' in out
  assert err.startswith('cloc train: step 33 (batch 32 of the run): loss and grad_norm and param_norm not finite')
  assert 'the last good checkpoint is step 30' in err and 'loss_image_text 2.' in err and err.count('\n') == 1
  assert tiny.newest(workdir) == 30 and max(tiny.losses(workdir)) == 30
  cloc = inference.load(workdir)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(cloc.params))


def test_parameters_that_overflow_are_not_saved(config, tmp_path, monkeypatch):
  """Of a step whose loss and gradients were still fine."""
  last = jax.jit(lambda state, batch: (state, {'loss': 1.0, 'grad_norm': 1.0, 'param_norm': np.inf}))
  monkeypatch.setattr(train.train_step, 'jit_train_step', lambda **settings: last)
  config.checkpoint.every_steps = 1
  with pytest.raises(train.NonFiniteError, match='^step 1 .*: param_norm not finite; there is no checkpoint yet'):
    train.train(config, workdir=tmp_path, quiet=True)
  assert tiny.newest(tmp_path) == 0


# --- damaged and foreign checkpoints


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')  # see test_checkpoint.py
def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before_it(base, reference, cut_short, capsys, caplog, traced):
  workdir = cut_short(40)
  for path in (workdir / 'checkpoints' / '00000040' / 'state').rglob('*'):
    if path.is_file() and path.parent.name == 'd':
      path.write_bytes(path.read_bytes()[:100])
  with caplog.at_level(logging.WARNING, logger='cloc_jax'):
    assert cli.main(argv(base, workdir)) == 0
  said, = [r.getMessage() for r in caplog.records if r.name == 'cloc_jax.checkpoint']
  assert '00000040' in said and 'falling back to the checkpoint before it' in said
  assert f'steps 30 → {tiny.TOTAL}' in capsys.readouterr().out
  assert (workdir / 'damaged-checkpoints' / '00000040').is_dir()
  assert_losses_close(workdir, reference)
  assert traced == [2, tiny.BATCH]
  assert inference.load(workdir, step=40).info['step'] == 40  # written anew


def test_a_checkpoint_of_another_architecture(base, reference, capsys):
  files = sorted(reference.workdir.rglob('*'))
  assert cli.main(argv(base, reference.workdir, 'model.text.width=24')) == 2
  out, err = capsys.readouterr()
  assert err.startswith('cloc train: ') and 'belong to another architecture' in err
  assert '\n! txt/Embed_0/embedding: expected (' in err
  assert cli.main(argv(base, reference.workdir, 'model.region_encoder=roi_align')) == 2
  assert '\n+ box_head/Dense_0/bias (16,)' in capsys.readouterr().err
  assert sorted(reference.workdir.rglob('*')) == files


def test_a_run_cannot_go_on_with_another_batch_size(base, reference, capsys):
  assert cli.main(argv(base, reference.workdir, 'data.batch_size=32')) == 2
  assert 'config.data.batch_size: this run saw 960 examples in 60 steps' in capsys.readouterr().err


# --- unusable settings: each ends before anything is computed


def test_an_unwritable_workdir(base, tmp_path, capsys):
  (tmp_path / 'file').write_text('in the way')
  for workdir in (tmp_path / 'file', tmp_path / 'file' / 'run'):
    assert cli.main(argv(base, workdir)) == 2
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and f'{workdir} cannot be written: ' in err


@pytest.mark.parametrize('override, error, message', [
    (dict(data=dict(path='/no/such/data')), FileNotFoundError, 'no data set at /no/such/data'),
    (dict(data=dict(split='trian')), ValueError, "no split 'trian'.*did you mean 'train'"),
    (dict(data=dict(batch_size=12)), ValueError, r'batch_size: 12 does not divide over 1 hosts and 8 devices'),
    (dict(data=dict(batch_size=0)), ValueError, r'batch_size: 0 does not divide'),
    (dict(data=dict(batch_size=800)), ValueError, "batch_size: 800, but .* has 96 examples"),
    (dict(data=dict(tokenizer='train:many')), ValueError, "expected 'train:VOCABULARY_SIZE', got 'train:many'"),
    (dict(evals=dict(splits=('val', 'tset'))), ValueError, "no split 'tset'; it has"),
    (dict(mesh=dict(data=3)), ValueError, 'mesh: data=3 × fsdp=1 does not fit 1 devices'),
    (dict(mesh=dict(rules=(('.*', 'split'),))), ValueError, "mesh.rules: expected one of .*got 'split'"),
    (dict(model=dict(region_encoder='promptr')), ValueError, "region_encoder: expected one of .*got 'promptr'"),
    (dict(model=dict(dtype='float16')), ValueError, "model.dtype: expected one of .*got 'float16'"),
    (dict(loss=dict(grounding='l3')), ValueError, "loss.grounding: expected one of .*got 'l3'"),
    (dict(loss=dict(lamda0=1.0)), TypeError, "config.loss.lamda0: no such key. Did you mean 'lambda0'"),
    (dict(train=dict(total_epochs=3)), ValueError, 'expected one of total_steps, total_examples, total_epochs'),
    (dict(checkpoint=dict(keep=0)), ValueError, 'checkpoint.keep: expected at least 1'),
    (dict(optim=dict(warmup_steps=61)), ValueError, 'optim.warmup_steps: expected 0 … total_steps = 60, got 61'),
])
def test_unusable_settings(config, tmp_path, monkeypatch, override, error, message):
  for section, values in override.items():
    with config.unlocked(), config.ignore_type():
      config[section].update(values)
  monkeypatch.setattr(train.train_step, 'init_state', lambda *a, **k: pytest.fail('something was computed'))
  with pytest.raises(error, match=message):
    train.train(config, workdir=tmp_path, quiet=True)


def test_missing_sections_are_named(config, tmp_path):
  del config['loss']
  with pytest.raises(ValueError, match=r"config: missing sections \['loss'\]"):
    train.train(config, workdir=tmp_path, quiet=True)


# --- bad records


@pytest.fixture(name='bad_data', scope='module')
def bad_data_fixture(base, tmp_path_factory):
  """16 examples, some of which cannot be used in whole or in part."""
  source = sources.RecordSource(tiny.data(base), split='train')
  good = [source[i] for i in range(16)]
  change = lambda i, **fields: schema.dataclasses.replace(good[i], **fields)
  caption = good[4].regions[0].caption
  region = lambda *box, text=caption: schema.Region(box, text)
  good[0] = change(0, image=good[0].image[:200])
  good[1] = change(1, regions=())
  good[2] = change(2, captions=('',))
  good[3] = change(3, captions=(), regions=())
  good[4] = change(4, regions=(region(0.1, 0.1, 0.5, 0.5), region(0.2, 0.2, 0.2, 0.9), region(0.6, 0.1, 0.3, 0.9),
                               region(0.5, 0.5, 1.3, 0.9), region(0, 0, 1, 1, text=' ')))
  path = tmp_path_factory.mktemp('bad') / 'scenes'
  schema.write_dataset(path, meta=schema.DatasetMeta(name='bad'), splits={'train': good})
  return path


def test_bad_records_are_counted_and_the_run_goes_on(bad_data, config, tmp_path, caplog):
  config.data.path = str(bad_data)
  with caplog.at_level(logging.WARNING, logger='cloc_jax.data'):
    result = train.train(config, workdir=tmp_path, quiet=True)
  assert (result.status, result.step) == ('done', tiny.TOTAL)
  for row in metrics.read(tmp_path).values():  # an epoch each
    assert {k: v for k, v in row.items() if k.startswith('data/') and 'truncated' not in k} == {
        'data/corrupt_records': 0, 'data/corrupt_images': 1, 'data/empty_captions': 2, 'data/boxes_dropped': 2,
        'data/boxes_clipped': 1, 'data/empty_region_captions': 1, 'data/flipped': 0,
        'data/regions_seen_per_image': pytest.approx(regions_seen(bad_data) / 16)}
    # 16 examples, without the corrupt one and the one that has neither caption nor region; one more has no region.
    assert row['lambda'] == pytest.approx(13 / 14)
    assert math.isfinite(row['loss']) and row['loss_region_text'] > 0
  said = [r.getMessage() for r in caplog.records if r.name == 'cloc_jax.data']
  assert said and all("record 'train-00000000'" in text and 'masked' in text for text in said)


def regions_seen(path):
  source = sources.RecordSource(path, split='train')
  return 2 + sum(len(source[i].regions) for i in range(16) if i not in (0, 4))


def test_bad_records_can_be_made_to_stop_the_run(bad_data, config, tmp_path):
  config.data.path = str(bad_data)
  with config.unlocked():
    config.data.on_error = 'raise'
  with pytest.raises(ValueError, match="record 'train-00000000'"):
    train.train(config, workdir=tmp_path, quiet=True)


def test_object_stores_are_refused_by_name(config, tmp_path, monkeypatch):
  monkeypatch.delenv('CLOC_DATA_CACHE', raising=False)
  place = 'gs://bucket/folder'
  with pytest.raises(ValueError, match=f'workdir: {place} is in an object store.*mount the bucket'):
    train.train(config, workdir=place, quiet=True)
  config.data.path = place
  with pytest.raises(ValueError, match=f'{place}: data sets are read from a disk. Set data.cache .*cloc data copy'):
    train.train(config, workdir=tmp_path, quiet=True)


# --- options


@pytest.mark.slow
def test_averages_evaluations_on_schedule_and_gradients_in_parts(config, reference, tmp_path, monkeypatch):
  """The averages follow their definition, are what is evaluated and exported, and the best by them is kept."""
  seen = []

  def evaluate_run(functions, params, *, path, split, **options):
    seen.append((split, options['limit'], jax.device_get(params)))
    return evaluators.Evaluation(metrics={'score': [0.1, 0.9, 0.5][len(seen) - 1]}, skipped={}, protocols={}), None

  monkeypatch.setattr(train.evaluate, 'run', evaluate_run)
  config.train.update(total_steps=6, ema_decay=0.75, micro_batches=2)
  with config.unlocked(), config.ignore_type():
    config.evals.update(every_steps=2, splits=('val',), limit=5)
    config.checkpoint.update(every_steps=1, keep=2, best_metric='val/score')
  result = train.train(config, workdir=tmp_path, quiet=True)
  assert_losses_close(tmp_path, reference, steps=range(1, 6))  # the rate does not yet depend on the run's length
  assert result.evaluations == {'val': {'score': 0.5}}
  assert [(split, limit) for split, limit, _ in seen] == [('val', 5)] * 3
  scores = {s: row['eval/val/score'] for s, row in metrics.read(tmp_path).items() if 'eval/val/score' in row}
  assert scores == {2: 0.1, 4: 0.9, 6: 0.5}
  assert json.loads((tmp_path / 'evals' / 'val.json').read_text())['step'] == 6
  assert sorted(int(p.name) for p in (tmp_path / 'checkpoints').iterdir()) == [4, 5, 6]

  states = {step: state_on_disk(tmp_path, step) for step in (4, 5, 6)}
  for step in (5, 6):
    want = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, states[step - 1]['ema'], states[step]['params'])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), states[step]['ema'], want)
  differ = jax.tree.map(lambda a, b: np.abs(a - b).max(), states[6]['ema'], states[6]['params'])
  assert max(jax.tree.leaves(differ)) > 1e-5
  for params in (seen[-1][2], inference.load(tmp_path).params):
    jax.tree.map(np.testing.assert_array_equal, params, states[6]['ema'])


def test_quiet_is_quiet_and_worker_processes_change_nothing(config, reference, tmp_path, capfd, traced):
  config.data.num_workers = 1
  assert train.train(config, workdir=tmp_path, quiet=True).status == 'done'
  assert capfd.readouterr() == ('', '')
  assert_losses_close(tmp_path, reference)
  assert traced == [2, tiny.BATCH]  # for the state, from two images, and for the step


# --- real photos


@pytest.mark.slow
def test_the_main_job_on_real_photos(coco_mini, base, tmp_path, capsys):
  data, workdir = tmp_path / 'coco', tmp_path / 'run'
  arguments = ['data', 'import', 'coco', '--out', str(data)]
  for split in ('train', 'val'):
    annotations = coco_mini / 'annotations'
    arguments += ['--split', split, '--images', str(coco_mini / f'{split}2017'),
                  '--instances', str(next(annotations.glob(f'instances_{split}*.json'))),
                  '--captions', str(next(annotations.glob(f'captions_{split}*.json')))]
  assert cli.main(arguments) == 0
  capsys.readouterr()
  config = tiny.ROOT / 'configs' / 'coco_mini.py'
  overrides = ['train.total_steps=5', 'train.log_steps=1', 'optim.warmup_steps=1', 'evals.every_steps=5',
               "evals.splits=('val',)"]
  found = tiny.finish(tiny.start('train', '--config', f'{config}:{data}', '--workdir', workdir,
                                 *(f'--config.{o}' for o in overrides), base=base), timeout=400)
  assert found.status == 0, found.err
  rows = metrics.read(workdir)
  assert len(rows) == 5 and all(math.isfinite(row['loss']) for row in rows.values())
  assert rows[5]['loss'] < rows[1]['loss'] and sum(row['data/corrupt_images'] for row in rows.values()) == 0
  written = json.loads((workdir / 'evals' / 'val.json').read_text())['metrics']
  assert 0 <= written['region_recognition/macc'] <= 1 and written['grounding/mean_iou'] > 0
  source = sources.RecordSource(data, split='val')
  image = inference.load(workdir)
  example = source[0]
  encoded = image.encode_image(inference.transforms.decode(example.image, where='val 0'))
  boxes = image.ground(encoded, [r.caption for r in example.regions][:3]).boxes
  assert (boxes[:, [0, 2]] <= example.width).all() and (boxes[:, [1, 3]] <= example.height).all()
