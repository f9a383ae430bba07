"""The stages one after another in this process, or side by side on a Ray cluster; both give the shards' notes."""
from collections.abc import Callable, Iterator, Mapping
import dataclasses
import functools
import logging
import os
import pickle
from typing import Any

from cloc_jax import config as config_lib
from cloc_jax.label import inputs
from cloc_jax.label import work
from cloc_jax.label import writer

POOLS = ('read', 'decode', 'captioner', 'phrases', 'detector', 'writer')
_POOL_KEYS = ('size', 'num_cpus', 'num_gpus', 'resources', 'threads')
_READ_TASKS = 2000  # at most; a task reads several inputs in turn where there are more


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a runner needs.

  todo: index of a unit → its parts that are done. makers: stage → a picklable function that builds it.
  folder: of the unfinished shards. The rest: see engine.Job.
  """
  units: tuple[inputs.Unit, ...]
  todo: Mapping[int, frozenset[int]]
  shard_size: int
  chunk: int
  text_keys: tuple[str, ...]
  folder: str
  parquet: bool
  cache: str | None
  makers: Mapping[str, Callable[[], Any]]


def local_notes(plan: Plan) -> Iterator[dict]:
  """Runs the stages in this process, shard by shard. Models are built when the first shard needs them."""
  if not plan.todo:
    return
  threads = work.all_threads()
  stages = [
      work.Decode(threads=threads),
      work.Caption(plan.makers['captioner'], chunk=plan.chunk, threads=threads, cache=plan.cache),
      work.Phrases(plan.makers['phrases']),
      work.Detect(plan.makers['detector'], chunk=plan.chunk, threads=threads),
      writer.Write(plan.folder, parquet=plan.parquet)]
  for index, done in plan.todo.items():
    for shard in work.read(plan.units[index], index, shard_size=plan.shard_size, text_keys=plan.text_keys, done=done):
      for stage in stages:
        shard = stage(shard)
      yield shard


def ray_notes(plan: Plan, *, pools: Mapping[str, Mapping[str, Any]], address: str | None = None,
              num_cpus: int | None = None, object_store_bytes: int | None = None) -> Iterator[dict]:
  """Runs each stage in a pool of its own on Ray Data; one row is one shard.

  Args:
    plan: what to do.
    pools: stage (see POOLS) → {'size': n or (least, most), 'num_cpus', 'num_gpus', 'resources': {'TPU': 4}, 'threads'
      for decoding}. Captioner and detector are actors, which keep their model; the others are tasks, of which `size`
      is the most at a time.
    address: of a running cluster ('auto', 'ray://HOST:10001'); None starts one on this machine that ends with it.
    num_cpus, object_store_bytes: of that one.

  Raises:
    ModuleNotFoundError: Ray is not installed.
    ValueError, TypeError: a pool or a key of it is unknown; or `num_cpus` and the like with `address`.
  """
  settings = {pool: _pool(pool, pools) for pool in POOLS}
  for pool in pools:
    if pool not in POOLS:
      raise ValueError(f'pools.{pool}: no such stage.{config_lib.nearest(pool, POOLS)} Stages: {POOLS}')
  ray, ours = _connect(address, num_cpus=num_cpus, object_store_bytes=object_store_bytes)
  try:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # ours count images
    context.target_max_block_size = 1  # a block is then a row: a shard waits for no other
    if not plan.todo:
      return
    # Which parts are done is settled here, once: a task that Ray does again must give the same rows.
    rows = [{'unit': pickle.dumps((index, plan.units[index], done))} for index, done in plan.todo.items()]
    data = ray.data.from_items(rows, override_num_blocks=min(len(rows), _READ_TASKS))
    data = data.flat_map(_Read(plan.shard_size, plan.text_keys), **_tasks(ray, settings['read']))
    data = data.map(_OnRow(work.Decode, dict(threads=settings['decode'].get('threads', 1))),
                    **_tasks(ray, settings['decode']))
    data = data.map(_Stage, fn_constructor_args=(work.Caption, dict(
        make=plan.makers['captioner'], chunk=plan.chunk, threads=settings['captioner'].get('threads', 2),
        cache=plan.cache)), **_actors(ray, settings['captioner']))
    data = data.map(_OnRow(work.Phrases, dict(make=plan.makers['phrases'])), **_tasks(ray, settings['phrases']))
    data = data.map(_Stage, fn_constructor_args=(work.Detect, dict(
        make=plan.makers['detector'], chunk=plan.chunk, threads=settings['detector'].get('threads', 2))),
        **_actors(ray, settings['detector']))
    data = data.map(_OnRow(writer.Write, dict(folder=plan.folder, parquet=plan.parquet)),
                    **_tasks(ray, settings['writer']))
    for row in data.iter_rows():
      note = pickle.loads(row['shard'])
      if isinstance(note, Exception):
        raise note
      yield note
  finally:
    if ours:
      ray.shutdown()


class _Read:
  """A row that names a unit → a row a shard."""

  def __init__(self, shard_size, text_keys):
    self._shard_size, self._text_keys = shard_size, text_keys

  def __call__(self, row):
    index, unit, done = pickle.loads(row['unit'])
    try:
      for shard in work.read(unit, index, shard_size=self._shard_size, text_keys=self._text_keys, done=done):
        yield {'shard': pickle.dumps(shard)}
    except Exception as error:
      yield _error_row(error)


class _Stage:
  """A stage between rows. The shard travels as bytes, which Ray moves as they are."""

  def __init__(self, kind, arguments):
    self._stage = kind(**arguments)

  def __call__(self, row):
    return _apply(self._stage, row)


class _OnRow:
  """A stage as a task's function: built once in each worker process, which serves many tasks."""

  def __init__(self, kind, arguments):
    self._recipe = pickle.dumps((kind, arguments))

  def __call__(self, row):
    return _apply(_built(self._recipe), row)


def _apply(stage, row):
  """A stage's answer to a row. An error that is to end the run goes on as a row: Ray would keep only its text."""
  shard = pickle.loads(row['shard'])
  if isinstance(shard, Exception):
    return row
  try:
    return {'shard': pickle.dumps(stage(shard))}
  except Exception as error:
    return _error_row(error)


def _error_row(error):
  try:
    data = pickle.dumps(error)
    pickle.loads(data)  # errors with a constructor of their own may not survive it
  except Exception:
    data = pickle.dumps(RuntimeError(f'{type(error).__name__}: {error}'))
  return {'shard': data}


@functools.lru_cache(maxsize=8)
def _built(recipe):
  kind, arguments = pickle.loads(recipe)
  return kind(**arguments)


def _connect(address, *, num_cpus, object_store_bytes):
  """(the ray module, whether this call started or joined it)."""
  # Before the import, which reads them.
  os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')
  if address is None:
    os.environ.setdefault('RAY_AUTH_MODE', 'disabled')  # a cluster of one process tree on this machine
  try:
    import ray
    import ray.data
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"the Ray runner needs Ray ({error}): pip install 'cloc_jax[label]', or use --runner local") from error
  if address is not None and (num_cpus or object_store_bytes):
    raise ValueError('--ray-cpus and --ray-object-store are for a cluster on this machine, not with --ray-address')
  logging.getLogger('ray.data').setLevel(logging.WARNING)  # it reports plans and logs of its own at each start
  logging.getLogger('ray.data._internal.progress').setLevel(logging.ERROR)  # it warns that its bars are off
  ours = not ray.is_initialized()
  if ours and address is not None:
    ray.init(address=address, log_to_driver=False, logging_level='WARNING')
  elif ours:
    ray.init(num_cpus=num_cpus, object_store_memory=object_store_bytes, include_dashboard=False, log_to_driver=False,
             logging_level='WARNING')
  return ray, ours


def _pool(pool, pools):
  settings = config_lib.plain(dict(pools.get(pool, {})))
  for key in settings:
    if key not in _POOL_KEYS:
      raise TypeError(f'pools.{pool}.{key}: no such key.{config_lib.nearest(key, _POOL_KEYS)} Keys: {_POOL_KEYS}')
  return settings


def _tasks(ray, settings):
  size = settings.get('size')
  return _resources(settings, num_cpus=1) | {
      'compute': ray.data.TaskPoolStrategy(size=size[1] if isinstance(size, (tuple, list)) else size)}


def _actors(ray, settings):
  size = settings.get('size') or 1
  least, most = size if isinstance(size, (tuple, list)) else (size, size)
  # Half a CPU, so that two models leave room for the tasks on a machine of two.
  return _resources(settings, num_cpus=0.5) | {'compute': ray.data.ActorPoolStrategy(min_size=least, max_size=most)}


def _resources(settings, *, num_cpus):
  found = {'num_cpus': settings.get('num_cpus', num_cpus)}
  if settings.get('num_gpus'):
    found['num_gpus'] = settings['num_gpus']
  if settings.get('resources'):
    found['resources'] = dict(settings['resources'])
  return found
