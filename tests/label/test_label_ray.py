"""The same work on Ray: the same bytes, whatever is killed on the way."""
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

import label_jobs
from cloc_jax.label import engine
from cloc_jax.label import report
from cloc_jax.label import folders

pytest.importorskip('ray')
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings('ignore')]  # Ray's own warnings are not ours to mend
HERE = pathlib.Path(__file__).resolve().parent
RAY = dict(num_cpus=2, object_store_bytes=150 * 2**20)
COUNT, BROKEN = 200, (17, 113)


@pytest.fixture(name='photos', scope='module')
def photos_fixture(tmp_path_factory):
  return label_jobs.write_photos(tmp_path_factory.mktemp('photos'), COUNT, broken=BROKEN)


@pytest.fixture(name='expected', scope='module')
def expected_fixture(photos, tmp_path_factory):
  """What a run in this process gives: file name → hash."""
  out = tmp_path_factory.mktemp('expected') / 'out'
  engine.run(label_jobs.job(photos, out, shard_size=10))
  return label_jobs.digests(out)


@pytest.fixture(name='start')
def start_fixture():
  """A function that starts a run on Ray in a process of its own; what still runs at the end of the test is killed."""
  processes = []

  def start(photos, out, pids, *, seconds):
    """seconds: that the captioner takes for an image."""
    pids.mkdir(exist_ok=True)
    script = pids / 'driver.py'
    script.write_text(f'''
import label_jobs
from cloc_jax.label import engine
if __name__ == '__main__':
  engine.run(label_jobs.job({str(photos)!r}, {str(out)!r}, shard_size=10, captioner=dict(
      spec='python:slow_stages:Captioner', pids={str(pids)!r}, seconds={seconds})), runner='ray', ray_options={RAY!r})
''')
    paths = [str(HERE), str(HERE.parents[1]), os.environ.get('PYTHONPATH', '')]
    with open(pids / 'log', 'a') as log:
      processes.append(subprocess.Popen([sys.executable, str(script)], stdout=log, stderr=log,
                                        env=os.environ | {'PYTHONPATH': os.pathsep.join(paths)}))
    return processes[-1]
  yield start
  for process in processes:
    process.kill()
    process.wait()


def wait_for(condition, *, process, pids, seconds=300):
  until = time.monotonic() + seconds
  while not condition():
    assert process.poll() is None, (pids / 'log').read_text()[-3000:]
    assert time.monotonic() < until, 'waited too long: ' + (pids / 'log').read_text()[-3000:]
    time.sleep(0.05)


def notes(out):
  return [path for path in pathlib.Path(f'{out}.incomplete').glob('0*.json')]


def workers(pids):
  return [int(path.name) for path in pids.iterdir() if path.name.isdigit()]


def alive(pid):
  try:
    return 'Z' not in pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0]
  except FileNotFoundError:
    return False


def check(out, expected):
  assert label_jobs.digests(out) == expected
  ids = [example.image_id for example in label_jobs.records(out)]
  assert ids == [f'{i:04}.jpg' for i in range(COUNT) if i not in BROKEN]
  assert not [path for path in out.parent.rglob('*') if folders.PARTIAL in path.name]
  assert not pathlib.Path(f'{out}.incomplete').exists()
  assert report.load(out).summary.tables['errors'] == {'read': 1, 'decode': 1}


def test_the_records_are_those_of_one_process(photos, expected, tmp_path):
  outcome = engine.run(label_jobs.job(photos, tmp_path / 'out', shard_size=10), runner='ray', ray_options=RAY,
                       pools={'captioner': {'size': (1, 2), 'num_cpus': 0.25}, 'detector': {'num_cpus': 0.25},
                              'writer': {'size': 1}}, cache=str(tmp_path / 'cache'))
  assert outcome.summary.counts['written'] == 198
  check(tmp_path / 'out', expected)


def test_a_killed_worker_costs_nothing_but_time(photos, expected, tmp_path, start):
  out, pids = tmp_path / 'out', tmp_path / 'pids'
  process = start(photos, out, pids, seconds=0.05)
  wait_for(lambda: workers(pids), process=process, pids=pids)  # it has its first images, of 10 s in all
  first, = workers(pids)
  os.kill(first, signal.SIGKILL)
  wait_for(lambda: len(workers(pids)) == 2, process=process, pids=pids)
  assert process.wait(300) == 0, (pids / 'log').read_text()[-3000:]
  check(out, expected)


def test_a_killed_driver_goes_on_where_it_stopped(photos, expected, tmp_path, start):
  out, pids = tmp_path / 'out', tmp_path / 'pids'
  process = start(photos, out, pids, seconds=0.04)
  wait_for(lambda: len(notes(out)) >= 4, process=process, pids=pids)
  process.kill()
  process.wait()
  until = time.monotonic() + 60
  while any(map(alive, workers(pids))):  # the cluster on this machine ends with its driver
    assert time.monotonic() < until, 'workers outlive their driver'
    time.sleep(0.1)
  done = {path: path.stat().st_mtime_ns for path in notes(out)}
  assert 4 <= len(done) < 20 and not out.exists()
  (pathlib.Path(f'{out}.incomplete') / f'000019-00000.array_record{folders.PARTIAL}x').write_bytes(b'half')
  process = start(photos, out, pids, seconds=0.04)
  wait_for(lambda: len(notes(out)) > len(done), process=process, pids=pids)
  assert all(path.stat().st_mtime_ns == when for path, when in done.items())  # none of them is done twice
  assert process.wait(300) == 0, (pids / 'log').read_text()[-3000:]
  check(out, expected)


def test_too_many_errors_stop_a_cluster_too(photos, tmp_path):
  job = label_jobs.job(photos, tmp_path / 'out', captioner={'spec': label_jobs.SCRIPTED + 'Captioner', 'fail': '.jpg'})
  with pytest.raises(engine.TooManyErrors, match='refused as the script says'):
    engine.run(job, runner='ray', ray_options=RAY)


def test_a_stage_that_is_broken_says_so_without_rays_words(photos, tmp_path, monkeypatch):
  monkeypatch.setenv('PYTHONPATH', os.pathsep.join([str(HERE), str(HERE.parents[1])]))
  with pytest.raises(FileNotFoundError, match='^no weights at SOMEWHERE$'):
    engine.run(label_jobs.job(photos, tmp_path / 'out', captioner={'spec': 'python:slow_stages:Missing'}),
               runner='ray', ray_options=RAY)


@pytest.mark.parametrize('pools, message', [
    ({'detectr': {}}, "Did you mean 'detector'"), ({'detector': {'num_gpu': 1}}, "Did you mean 'num_gpus'")])
def test_pools_are_checked_before_anything_starts(photos, tmp_path, pools, message):
  with pytest.raises((ValueError, TypeError), match=message):
    engine.run(label_jobs.job(photos, tmp_path / 'out'), runner='ray', pools=pools)
