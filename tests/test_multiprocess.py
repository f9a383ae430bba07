"""Two real processes on loopback: they learn what one does, and one goes on with what two began."""
import os
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import tiny_experiment as tiny

pytestmark = pytest.mark.slow


def command(base, workdir, *more):
  return ['train', '--config', f'{tiny.CONFIG}:{tiny.data(base)}', '--workdir', workdir, *more]


def free_port():
  with socket.socket() as probe:
    probe.bind(('localhost', 0))
    return probe.getsockname()[1]


def start_two(base, workdir, *more):
  port = free_port()
  return [tiny.start(*command(base, workdir, *more, '--coordinator', f'localhost:{port}', '--num-processes', 2,
                              '--process-id', i), base=base, JAX_PLATFORMS='cpu') for i in range(2)]


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
