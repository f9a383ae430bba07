"""A run of seconds: an experiment file (`--config tests/tiny_experiment.py:DATASET`), its data, and real processes.

The data set and the finished run are made once a test session, by the worker (pytest-xdist) that asks first. Each worker
has a compilation cache of its own, since JAX's is not made for two that write at once; it begins with that of the run.
"""
import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import ml_collections

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = ROOT / 'tests' / 'tiny_experiment.py'
IMAGE_SIZE = 24
BATCH = 16
TOTAL = 60
COUNTS = {'train': 96, 'val': 12, 'unseen': 12}


def get_config(arg=''):
  """An experiment whose MLP kernels are just large enough for the FSDP rule to split them."""
  config = ml_collections.ConfigDict()
  config.data = dict(path=arg, split='train', batch_size=BATCH, image_size=IMAGE_SIZE, tokenizer='train:300',
                     text_length=12, region_text_length=6, regions_per_image=2, num_workers=0)
  config.model = dict(
      image=dict(variant='mu/12', width=64, depth=1, heads=2, posemb='sincos2d'),
      text=dict(variant='mu', width=16, depth=1, heads=2), prompter=dict(pool='prompt'), embed_dim=16,
      region_encoder='prompter', dtype='float32')
  config.loss = dict(image_text='softmax', grounding='l2', filter_threshold=0.9)
  config.optim = dict(learning_rate=1e-3, warmup_steps=4, weight_decay=0.1)
  config.mesh = dict(data=-1, fsdp=1)
  config.evals = dict(every_steps=None, splits=(), batch_size=12)
  config.checkpoint = dict(every_steps=10, keep=20)
  config.train = dict(total_steps=TOTAL, seed=0, micro_batches=1, ema_decay=0.0, log_steps=1)
  return config


@contextlib.contextmanager
def _shared(base: pathlib.Path):
  """The folder of all workers of a session, one of them at a time."""
  folder = base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base
  with open(folder / 'tiny.lock', 'w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    yield folder


@functools.cache
def data(base: pathlib.Path) -> pathlib.Path:
  """The drawn data set of a session; `base` is tmp_path_factory.getbasetemp()."""
  from cloc_jax.data import scenes
  with _shared(base) as folder:
    path = folder / 'tiny-scenes'
    if not path.exists():  # it has this name when it is complete
      scenes.write_scenes(path, num_train=COUNTS['train'], num_val=COUNTS['val'], num_unseen=COUNTS['unseen'],
                          size=32, seed=3, encoding='png')
  return path


def environment(base: pathlib.Path, **more: str) -> dict[str, str]:
  """Of a child process: one CPU device, and executables that were compiled once are read from disk."""
  return {**os.environ, 'JAX_COMPILATION_CACHE_DIR': str(base / 'compiled'), 'JAX_NUM_CPU_DEVICES': '1',
          'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0', 'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '0',
          'PYTHONPATH': str(ROOT), **more}


@contextlib.contextmanager
def compiled_once(base: pathlib.Path):
  """The same cache for this process (whose number of devices makes its entries different ones), for a while."""
  import jax
  from jax.experimental.compilation_cache import compilation_cache
  settings = {'jax_compilation_cache_dir': str(base / 'compiled'), 'jax_persistent_cache_min_compile_time_secs': 0.0,
              'jax_persistent_cache_min_entry_size_bytes': 0}
  before = {name: getattr(jax.config, name) for name in settings}
  for values in (settings, before):
    for name, value in values.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()
    if values is settings:
      yield


def start(*argv, base: pathlib.Path, **env: str) -> subprocess.Popen:
  """`cloc ARGV` in a process of its own."""
  return subprocess.Popen([sys.executable, '-m', 'cloc_jax.cli', *map(str, argv)], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(base, **env))


@dataclasses.dataclass(frozen=True)
class Finished:
  status: int
  out: str
  err: str


def finish(process: subprocess.Popen, *, timeout: float = 600) -> Finished:
  """Waits for a process; one that hangs is killed and fails the test."""
  try:
    out, err = process.communicate(timeout=timeout)
  except subprocess.TimeoutExpired:
    process.kill()
    process.communicate()
    raise
  return Finished(process.returncode, out, err)


def wait_until(condition, process: subprocess.Popen, *, timeout: float = 600) -> None:
  """Polls often, since the run it watches makes a step in milliseconds."""
  end = time.monotonic() + timeout
  while not condition():
    if process.poll() is not None:
      raise AssertionError(f'ended with {process.returncode} too early: {finish(process)}')
    if time.monotonic() > end:
      process.kill()
      raise AssertionError(f'waited {timeout} s in vain: {finish(process)}')
    time.sleep(0.002)


def rows(workdir: pathlib.Path) -> list[dict]:
  """The lines of metrics.jsonl as they are, duplicates and all; one that is cut off is left out."""
  path = workdir / 'metrics.jsonl'
  lines = path.read_text().splitlines(keepends=True) if path.exists() else []
  return [json.loads(line) for line in lines if line.endswith('}\n') and line.count('"step"') == 1]


def losses(workdir: pathlib.Path) -> dict[int, float]:
  """{step: loss}, of the last line of each step that has one."""
  return {row['step']: row['loss'] for row in rows(workdir) if 'loss' in row}


def newest(workdir: pathlib.Path) -> int:
  """Step of the newest complete checkpoint; 0 for none."""
  folder = workdir / 'checkpoints'
  return max((int(p.name) for p in folder.iterdir() if p.name.isdigit()), default=0) if folder.is_dir() else 0


@dataclasses.dataclass(frozen=True)
class Run:
  workdir: pathlib.Path
  data: pathlib.Path
  finished: Finished


@functools.cache
def run(base: pathlib.Path) -> Run:
  """One undisturbed run through the real entry point, with an evaluation at its end. Nobody writes into its folder."""
  path = data(base)
  with _shared(base) as folder:
    workdir, said = folder / 'tiny-run', folder / 'tiny-run.json'
    if not said.exists():
      finished = finish(start('train', '--config', f'{CONFIG}:{path}', '--workdir', workdir,
                              "--config.evals.splits=('val','unseen')", base=folder))
      said.write_text(json.dumps(dataclasses.asdict(finished)))
    if folder != base:
      shutil.copytree(folder / 'compiled', base / 'compiled', dirs_exist_ok=True)
  return Run(workdir, path, Finished(**json.loads(said.read_text())))
