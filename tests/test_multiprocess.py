"""Two real processes on loopback: they learn what one does, and one goes on with what two began."""
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import tiny_experiment as tiny

from cloc_jax import dump, encoders, evaluate
from cloc_jax.data import schema, sources

pytestmark = pytest.mark.slow


def command(base, workdir, *more):
  return ['train', '--config', f'{tiny.CONFIG}:{tiny.data(base)}', '--workdir', workdir, *more]


def free_port():
  with socket.socket() as probe:
    probe.bind(('localhost', 0))
    return probe.getsockname()[1]


def start_both(argv, base, **env):
  port = free_port()
  return [tiny.start(*argv, '--coordinator', f'localhost:{port}', '--num-processes', 2, '--process-id', i, base=base,
                     JAX_PLATFORMS='cpu', **env) for i in range(2)]


def start_two(base, workdir, *more):
  return start_both(command(base, workdir, *more), base)


def metrics_of(path):
  return json.loads(path.read_text())['metrics']


def finish(processes):
  return [tiny.finish(p) for p in processes]


def test_two_processes_are_killed_and_one_goes_on(base, reference, tmp_path):
  """Each has half of every batch."""
  workdir = tmp_path / 'run'
  processes = start_two(base, workdir)
  tiny.wait_until(lambda: 10 <= tiny.newest(workdir) < max(tiny.losses(workdir)), processes[0])
  for process in processes:
    process.kill()
  killed = finish(processes)
  assert [k.status for k in killed] == [-signal.SIGKILL] * 2
  assert '2 cpu device(s)' in killed[0].out and 'step' not in killed[1].out  # one of them speaks
  kept = tiny.newest(workdir)
  alone = tiny.finish(tiny.start(*command(base, workdir), base=base))
  assert alone.status == 0, alone.err
  assert '1 cpu device(s)' in alone.out and f'steps {kept} → {tiny.TOTAL}' in alone.out
  got, want = tiny.losses(workdir), tiny.losses(reference.workdir)
  assert list(got) == list(want)
  np.testing.assert_allclose(list(got.values()), list(want.values()), rtol=2e-4)


def test_two_processes_evaluate_and_stop_together(base, reference, tmp_path):
  """Each holds half of the parameters; a SIGTERM to one of them is everybody's."""
  workdir = tmp_path / 'run'
  processes = start_two(base, workdir, '--config.mesh.data=1', '--config.mesh.fsdp=2', '--config.evals.every_steps=10',
                        "--config.evals.splits=('val',)")
  tiny.wait_until(lambda: any('eval/val/region_recognition/top1' in row for row in tiny.rows(workdir)), processes[0])
  processes[1].send_signal(signal.SIGTERM)
  stopped = finish(processes)
  assert [s.status for s in stopped] == [0, 0], stopped
  step = tiny.newest(workdir)
  assert 10 <= step < tiny.TOTAL and f'stopped by another host after step {step}; saved' in stopped[0].out
  got, want = tiny.losses(workdir), tiny.losses(reference.workdir)
  assert list(got) == list(range(1, step + 1))
  np.testing.assert_allclose(list(got.values()), [want[s] for s in got], rtol=2e-4)
  # The figures are those of one process, which has the whole checkpoint and all images.
  evaluated = json.loads((workdir / 'evals' / 'val.json').read_text())
  encoder = encoders.load(str(workdir), step=evaluated['step'])
  alone, _ = evaluate.run_encoder(encoder, path=tiny.data(base), split='val', batch_size=12)
  assert evaluated['metrics'] == pytest.approx(alone.metrics, abs=1e-6) and evaluated['skipped'] == alone.skipped


def test_two_processes_share_the_images_of_an_evaluation(base, reference, tmp_path):
  """Five images: three and two, on two devices each. All figures, the order of the dump, and who speaks."""
  argv = ['eval', '--checkpoint', reference.workdir, '--data', reference.data, '--split', 'val', '--split', 'unseen',
          '--limit', 5, '--batch-size', 2]
  first, second = finish(start_both([*argv, '--out', tmp_path / 'two', '--dump', tmp_path / 'two.parquet'], base,
                                    JAX_NUM_CPU_DEVICES='2'))
  assert (first.status, second.status) == (0, 0), (first, second)
  alone = tiny.finish(tiny.start(*argv, '--out', tmp_path / 'one', '--dump', tmp_path / 'one.parquet', base=base))
  assert alone.status == 0, alone.err
  for split in ('val', 'unseen'):
    got, want = (metrics_of(tmp_path / name / f'{split}.json') for name in ('two', 'one'))
    assert want['image_text_retrieval/images'] == 5 and len(want) > 50
    assert got == pytest.approx(want, abs=1e-6)
  said = lambda finished: [line for line in finished.out.splitlines() if not line.startswith('[Gloo]')]
  assert said(first) == said(alone) != [] == said(second)
  (got, _), (want, _) = dump.read(tmp_path / 'two.parquet'), dump.read(tmp_path / 'one.parquet')
  for name in ('split', 'image_id', 'region', 'caption', 'category', 'rank', 'top_classes'):
    assert got[name] == want[name], name


def test_a_failure_of_one_process_ends_both(base, reference, tmp_path):
  """The second image, which is the second process's, cannot be read; the first does not wait for it."""
  source = sources.RecordSource(reference.data, split='val')
  records = [source[i] for i in range(4)]
  records[1] = dataclasses.replace(records[1], image=records[1].image[:-30], image_id='broken.png')
  schema.write_dataset(tmp_path / 'set', meta=schema.read_meta(reference.data), splits={'val': records})
  argv = ['eval', '--checkpoint', reference.workdir, '--data', tmp_path / 'set', '--out', tmp_path / 'out']
  first, second = finish(start_both(argv, base))
  assert first.status == second.status == 2 and not (tmp_path / 'out').exists()
  assert "host 1 of 2 failed: ImageError: record 'broken.png'" in first.err
  assert "cloc eval: record 'broken.png'" in second.err


# Two hosts with four devices each; the mesh takes them in turns. Row r of host h is 100·h + r.
INTERLEAVED = """
import sys
import jax
import numpy as np
from cloc_jax import sharding
from jax.experimental import multihost_utils
jax.config.update('jax_num_cpu_devices', 4)
jax.config.update('jax_cpu_collectives_implementation', 'gloo')
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
devices = sorted(jax.devices(), key=lambda d: d.id)
mesh = jax.sharding.Mesh(np.array([devices[i] for i in (0, 5, 1, 4, 7, 3, 6, 2)]).reshape(4, 2), sharding.AXES)
rows = 100 * jax.process_index() + np.arange(8)
batch = sharding.to_global({'a': rows, 'b': np.stack([rows, -rows], 1)}, mesh)
for shard in batch['a'].addressable_shards:
  assert set(np.asarray(shard.data)) <= set(rows), 'rows of another host'
whole = multihost_utils.process_allgather(batch, tiled=True)
np.testing.assert_array_equal(whole['b'], np.stack([whole['a'], -whole['a']], 1))
print(whole['a'].tolist())
try:
  sharding.to_global(rows[:6], mesh)
except ValueError as error:
  print(error)
"""


def test_hosts_whose_devices_take_turns_bring_each_row_once():
  address = f'localhost:{free_port()}'
  env = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'} | {'JAX_PLATFORMS': 'cpu'}
  processes = [subprocess.Popen([sys.executable, '-c', INTERLEAVED, address, str(i)], env=env, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for i in range(2)]
  expected = [0, 1, 100, 101, 2, 3, 102, 103, 104, 105, 4, 5, 106, 107, 6, 7]
  for process in processes:
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert out.splitlines()[-2:] == [str(expected), 'batch: 6 rows of a host do not divide over its 4 devices']
