"""Two real processes on loopback: they learn what one does, and one goes on with what two began."""
import signal
import socket

import numpy as np
import pytest
import tiny_experiment as tiny

pytestmark = pytest.mark.slow


def command(base, workdir, *more):
  return ['train', '--config', f'{tiny.CONFIG}:{tiny.data(base)}', '--workdir', workdir, *more]


def start_two(base, workdir, *more):
  with socket.socket() as probe:
    probe.bind(('localhost', 0))
    port = probe.getsockname()[1]
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
