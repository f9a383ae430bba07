"""The trainer: one loop, one file. Variants are configs, losses and models, never copies of this.

config → data → model → state → step, and around it: metrics, evaluations, checkpoints, and a clean way out.
"""
import collections
import contextlib
import dataclasses
import json
import logging
import math
import os
import pathlib
import signal
import time

import jax
import numpy as np

from cloc_jax import checkpoint, evaluate, guard, hardware, inference, initialize, losses, optim, sharding, train_step
from cloc_jax import stages as stages_lib
from cloc_jax import trees
from cloc_jax import config as config_lib
from cloc_jax import metrics as metrics_lib
from cloc_jax.data import mixture as mixture_lib
from cloc_jax.data import pipeline, spec, storage
from cloc_jax.data import tokenizer as tokenizer_lib
from cloc_jax.train_options import CheckpointOptions, DataOptions, EvalOptions, TrainOptions

_log = logging.getLogger('cloc_jax.train')
_IN_FLIGHT = 3  # steps dispatched ahead of the one that is known to be finished
_AGREE_EVERY = 10  # steps between hosts' asking each other whether to stop: an answer waits for all steps before it


class NonFiniteError(FloatingPointError):
  """The loss or the gradients are NaN or infinite."""


@dataclasses.dataclass(frozen=True)
class Result:
  """How a run ended. status: 'done', 'already_done', 'interrupted' or 'below_floor'. evaluations: {split: metrics} of
  the end."""
  status: str
  step: int
  total_steps: int
  workdir: pathlib.Path
  evaluations: dict[str, dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Schedule:
  """The sections `evals`, `checkpoint` and `train`, resolved to steps."""
  total: int
  log: int
  evals: int
  save: int


def train(config, *, workdir: str | os.PathLike, quiet: bool = False) -> Result:
  """Trains an experiment to its end, or resumes it.

  Args:
    config: an experiment (config.py). workdir: everything the run writes goes there. quiet: nothing on the terminal.

  Raises:
    TypeError, ValueError, FileNotFoundError: on a wrong config or data set, before anything is computed.
    CheckpointError: on an unwritable workdir, or checkpoints of another architecture.
    NonFiniteError: on NaN or Inf, naming the step; the last good checkpoint stays.
  """
  config_lib.check_sections(config, where='config')
  init = initialize.of_config(config, run=workdir)
  config = initialize.resolve(config, init)
  options = config_lib.call(TrainOptions, config['train'], name='train')
  data = config_lib.call(DataOptions, config['data'], name='data')
  evals = config_lib.call(EvalOptions, config['evals'], name='evals')
  saving = config_lib.call(CheckpointOptions, config['checkpoint'], name='checkpoint')
  if storage.is_url(workdir):
    raise ValueError(f'workdir: {workdir} is in an object store, and runs are written to mounted folders alone; mount the '
                     'bucket (gcsfuse, mountpoint-s3) and give the folder')
  data.use_cache()
  workdir = pathlib.Path(workdir)
  checkpoint.check_writable(workdir)
  mesh_section = dict(config_lib.plain(config['mesh']))
  rules = mesh_section.pop('rules', (('.*', 'fsdp'),))
  mesh = config_lib.call(sharding.make_mesh, mesh_section, name='mesh')
  parts = data.parts()
  sizes = mixture_lib.sizes(parts)
  _check_batch_size(data, parts, sizes)
  dataset_size = None if data.mixture else sizes[0]
  if data.mixture and options.total_epochs is not None:
    raise ValueError('config.train.total_epochs: the sources of a mixture have epochs of their own; give total_steps or '
                     'total_examples (`cloc data mix` says what they mean)')
  total = config_lib.duration(vars(options), 'total', batch_size=data.batch_size, dataset_size=dataset_size)
  schedule = Schedule(total=total, log=max(1, options.log_steps), evals=evals.every_steps or total,
                      save=saving.every_steps or total)
  eval_path = evals.path or data.path
  if eval_path is None and (evals.splits is None or len(evals.splits)):
    raise ValueError('config.evals.path: a mixture has no splits to evaluate on; name a data set, or set splits = ()')
  splits = evaluate.splits_to_evaluate(eval_path, evals.splits) if eval_path is not None else []

  guard.check_floors(evals.floors, splits)
  data.random_crop()  # fails on a wrong key now
  tokenizer = _tokenizer(data, workdir, init)
  model = inference.build_model(config, tokenizer=tokenizer)
  tx, rate = config_lib.call(optim.make, config['optim'], name='optim', total_steps=total)
  loss = config_lib.plain(config['loss'])
  config_lib.check_keys(losses.total, loss, name='loss', positional=2, given=('mesh', 'step'))
  preprocessing = inference.Preprocessing(image_size=data.image_size, pad=data.pad, text_length=data.text_length,
                                          region_text_length=data.region_text_length)
  info = {'config': config_lib.plain(config), 'tokenizer': tokenizer.to_dict(),
          'preprocessing': dataclasses.asdict(preprocessing)}

  keeper = checkpoint.Checkpointer(workdir / 'checkpoints', keep=saving.keep, best_metric=saving.best_metric,
                                   keep_best=saving.keep_best)
  progress = None
  try:
    initializer = train_step.initializer(model, tx, data.abstract_batch(), ema=options.ema_decay > 0)
    shapes = train_step.abstract_state(initializer)
    shardings = train_step.state_sharding(shapes, mesh=mesh, rules=rules)
    stages = stages_lib.Stages(
        config['optim'].get('multipliers', ()), shapes.params, data.step_flops(model), data.batch_size,
        lambda trained: train_step.jit_train_step(
            mesh=mesh, shardings=shardings, model=model, tx=tx, rate=rate, loss=loss,
            micro_batches=options.micro_batches, ema_decay=options.ema_decay, trained=trained))
    placed = lambda shape, place: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place)
    abstract, split = jax.tree.map(placed, shapes, shardings), sharding.batch_sharding(mesh)
    # Fails on what is wrong with loss or model now, before anything is computed. What is traced here is not traced again.
    stages.step_fn(0).trace(abstract, jax.tree.map(lambda shape: placed(shape, split), data.abstract_batch()))
    state, start, report = _state(initializer, abstract, keeper, shardings=shardings, seed=options.seed, init=init,
                                  parts=config['model'].get('init_parts') or 'both', batch_size=data.batch_size)
    functions = inference.Functions(model, tokenizer=tokenizer, preprocessing=preprocessing,
                                    mesh=sharding.local_mesh(mesh))
    run_evals = _evaluator(functions, evals, path=eval_path, splits=splits, workdir=workdir, mesh=mesh)
    if start >= total:
      return Result('already_done', start, total, workdir, _read_evaluations(workdir, splits))
    if start == 0 and jax.process_index() == 0:
      (workdir / 'config.json').write_text(config_lib.to_json(config))
      (workdir / 'parameters.txt').write_text(sharding.describe(state.params, shardings.params) + '\n')
      if report:
        (workdir / 'init.txt').write_text(report.full())
    progress = metrics_lib.Progress(total=total, start=start, batch_size=data.batch_size,
                                    quiet=quiet or jax.process_index() > 0)
    devices = mesh.devices.size
    progress.say(f'{trees.count(state.params):,} parameters · {devices} {jax.devices()[0].device_kind} device(s), '
                 f'mesh {dict(mesh.shape)} · batch {data.batch_size} · steps {start} → {total}')
    if data.mixture:
      progress.say(f'mixture: {mixture_lib.describe(parts)}')
    if report:
      progress.say(report.summary())
    progress.say(stages.describe(start))
    if evals.floors and start == 0:
      guard.check_start(run_evals(state.params, 0, progress), evals.floors)
    return _loop(state, stages, start=start, schedule=schedule, data=data, options=options, tokenizer=tokenizer,
                 mesh=mesh, keeper=keeper, info=info, run_evals=run_evals, progress=progress, workdir=workdir,
                 floors=evals.floors, config=config)
  finally:
    keeper.wait()
    keeper.close()
    if progress is not None:
      progress.close()


def _loop(state, stages, *, start, schedule, data, options, tokenizer, mesh, keeper, info, run_evals, progress,
          workdir, floors, config) -> Result:
  """Steps from `start` to the end."""
  batches = iter(_dataset(data, tokenizer=tokenizer, seed=options.seed, skip_examples=start * data.batch_size))
  seen = mixture_lib.Seen(data.parts(), seed=options.seed) if data.mixture else None
  writer = metrics_lib.Writer(workdir, wandb_project=options.wandb_project,
                              config=config_lib.plain(config)) if jax.process_index() == 0 else None
  pending: collections.deque = collections.deque()
  stats: collections.Counter = collections.Counter()
  meter = _Meter(data.batch_size, stages.flops)
  evaluations: dict[str, dict[str, float]] = {}
  step = start

  def save(metrics=None):
    keeper.save(step, state, info={**info, 'examples_seen': step * data.batch_size, 'metrics': metrics or {}},
                metrics=metrics)

  with _stop_signal() as stop, contextlib.ExitStack() as at_end:  # an error must not cost the metrics before it
    if hasattr(batches, 'close'):
      at_end.callback(batches.close)
    if writer:
      at_end.callback(writer.close)
    while step < schedule.total:
      with meter.waiting():
        element = next(batches)
      stats.update({k: int(v) for k, v in element['stats'].items()})
      with jax.transfer_guard('disallow'):
        state, metrics = stages.step_fn(step)(state, sharding.to_global(element['batch'], mesh))
      step += 1
      pending.append((step, metrics))
      if len(pending) > _IN_FLIGHT:
        jax.block_until_ready(pending[-1 - _IN_FLIGHT][1]['loss'])  # bounds the queue; the device stays busy
      progress.step()
      stopping = stop.requested(step) and step < schedule.total  # after the last step only the evaluation is left
      due = lambda every: step % every == 0 or step == schedule.total
      if not (due(schedule.log) or due(schedule.evals) or due(schedule.save) or stopping):
        continue

      latest = _fetch(pending, keeper)
      if due(schedule.log) or stopping:
        latest |= meter.read(step) | _shares(stats)
        if seen:
          latest |= seen.metrics(step * data.batch_size)
        progress.show(step, latest)
        if writer:
          writer.write(step, latest)
      scores = None
      if due(schedule.evals) and not stopping:
        with meter.paused():
          evaluations = run_evals(state.params if state.ema is None else state.ema, step, progress)
        scores = {f'{split}/{k}': v for split, found in evaluations.items() for k, v in found.items()}
        if writer and scores:
          writer.write(step, {f'eval/{k}': v for k, v in scores.items()})
      if due(schedule.save) or scores is not None or stopping:
        with meter.paused():
          save(scores)
      if stopping:
        keeper.wait()
        progress.say(f'stopped by {stop.name or "another host"} after step {step}; saved, run the same command to '
                     'go on')
        break
      below = guard.below(scores or {}, floors)
      if below:
        keeper.wait()
        progress.say(f'stopped after step {step}, saved: {below}. Go on from an earlier checkpoint with a lower '
                     'learning rate or fewer steps, or lower config.evals.floors')
        return Result('below_floor', step, schedule.total, workdir, evaluations)
  return Result('done' if step >= schedule.total else 'interrupted', step, schedule.total, workdir, evaluations)


def _fetch(pending, keeper) -> dict[str, float]:
  """Brings the metrics of all pending steps to the host; returns the newest.

  Nothing is saved before the steps up to it went through here, so every checkpoint is a good one.
  """
  latest: dict[str, float] = {}
  while pending:
    step, metrics = pending.popleft()
    latest = {k: float(v) for k, v in jax.device_get(metrics).items()}
    # The norm of the parameters is that after the update: a checkpoint of this step would hold them.
    bad = [k for k in ('loss', 'grad_norm', 'param_norm') if not math.isfinite(latest[k])]
    if bad:
      last = f'the last good checkpoint is step {keeper.steps[-1]}' if keeper.steps else 'there is no checkpoint yet'
      values = ', '.join(f'{k} {v:.4g}' for k, v in latest.items())
      raise NonFiniteError(f'step {step} (batch {step - 1} of the run): {" and ".join(bad)} not finite; {last}. '
                           f'Metrics of the step: {values}')
  return latest


def _shares(stats: collections.Counter) -> dict[str, float]:
  """What the data pipeline counted since the last call, as shares and sums, and resets the counter."""
  ratio = lambda a, b: stats[a] / max(stats[b], 1)
  out = {'data/truncated_captions': ratio('truncated_captions', 'captions'),
         'data/truncated_region_captions': ratio('truncated_region_captions', 'region_captions'),
         'data/corrupt_records': stats['corrupt_records'], 'data/corrupt_images': stats['corrupt_images'],
         'data/boxes_dropped': stats['boxes_dropped'],
         'data/boxes_clipped': stats['boxes_clipped'], 'data/empty_captions': stats['empty_captions'],
         'data/empty_region_captions': stats['empty_region_captions'], 'data/flipped': stats['flipped'],
         'data/regions_seen_per_image': ratio('regions_seen', 'examples')}
  # Of options that are off by default.
  out |= {f'data/{name}': stats[name] for name in ('other_captions', 'regions_cropped_out') if stats[name]}
  stats.clear()
  return out


class _Meter:
  """Rates since the last reading; time spent in evaluation and saving does not count."""

  def __init__(self, batch_size, step_flops):
    self._batch, self._flops = batch_size, step_flops
    self._step = None
    self._wait = self._pause = 0.0
    self._began = time.monotonic()

  @contextlib.contextmanager
  def waiting(self):
    began = time.monotonic()
    yield
    self._wait += time.monotonic() - began

  @contextlib.contextmanager
  def paused(self):
    began = time.monotonic()
    yield
    self._pause += time.monotonic() - began

  def read(self, step) -> dict[str, float]:
    now = time.monotonic()
    seconds = max(now - self._began - self._pause, 1e-9)
    out = {}
    if self._step is not None:  # the first interval holds compilation
      rate = (step - self._step) / seconds
      out = {'images_per_second': rate * self._batch, 'step_seconds': 1 / rate,
             'data_wait_share': min(1.0, self._wait / seconds), 'flops_per_second': rate * self._flops(step)}
      chip = hardware.of_kind(jax.devices()[0].device_kind)
      if chip:
        out['mfu'] = out['flops_per_second'] / (chip.flops * jax.device_count())
    self._began, self._wait, self._pause, self._step = now, 0.0, 0.0, step
    return out


class _StopFlag:
  """Set by SIGTERM or SIGINT; on several hosts, all of them must see it at the same step."""

  def __init__(self):
    self.name = ''

  def set(self, number, frame):
    del frame
    if self.name:  # a second signal: the user means it
      raise KeyboardInterrupt
    self.name = signal.Signals(number).name

  def requested(self, step: int) -> bool:
    if jax.process_count() == 1:
      return bool(self.name)
    if step % _AGREE_EVERY:
      return False
    from jax.experimental import multihost_utils
    return bool(multihost_utils.process_allgather(np.array(bool(self.name))).any())


@contextlib.contextmanager
def _stop_signal():
  flag = _StopFlag()
  try:
    before = {s: signal.signal(s, flag.set) for s in (signal.SIGTERM, signal.SIGINT)}
  except ValueError:  # not the main thread: nobody can signal us
    before = {}
  try:
    yield flag
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def _tokenizer(data: DataOptions, workdir: pathlib.Path, init) -> tokenizer_lib.Tokenizer:
  """The config's tokenizer; one trained on the data's captions is trained once and kept in the workdir."""
  if data.tokenizer == 'init':
    if init is None or init.tokenizer is None:
      raise ValueError("config.data.tokenizer: 'init' is that of config.model.init, which "
                       + ('is not set' if init is None else f'has none: {init.name}'))
    return init.tokenizer
  kind, _, size = data.tokenizer.partition(':')
  if kind != 'train':
    return tokenizer_lib.load(data.tokenizer)
  if not size.isdigit():
    raise ValueError(f"config.data.tokenizer: expected 'train:VOCABULARY_SIZE', got {data.tokenizer!r}")
  path = workdir / 'tokenizer.json'
  if path.exists():
    return tokenizer_lib.load(f'json:{path}')
  # Captions repeat their words soon; a sample of the records is plenty for a vocabulary.
  captions = [text for example in mixture_lib.sample(data.parts(), count=20_000)
              for text in (*example.captions, *(r.caption for r in example.regions))]
  tokenizer = tokenizer_lib.train(captions, vocab_size=int(size))
  if jax.process_index() == 0:
    temporary = path.with_suffix('.tmp')
    temporary.write_text(json.dumps(tokenizer.to_dict()))
    temporary.replace(path)
  return tokenizer


def _check_batch_size(data: DataOptions, parts, sizes) -> None:
  hosts, devices = jax.process_count(), jax.device_count()
  if data.batch_size < 1 or data.batch_size % hosts or data.batch_size % devices:
    raise ValueError(f'config.data.batch_size: {data.batch_size} does not divide over {hosts} hosts and {devices} '
                     'devices')
  if data.mixture:
    mixture_lib.check_batch(parts, sizes, batch_size=data.batch_size)
  elif data.batch_size > sizes[0]:
    raise ValueError(f'config.data.batch_size: {data.batch_size}, but {data.path}, split {data.split!r}, has '
                     f'{sizes[0]} examples')


def _dataset(data: DataOptions, *, tokenizer, seed, skip_examples):
  hosts = jax.process_count()
  own = {k: v for k, v in vars(data).items() if k not in ('path', 'mixture', 'crop', 'tokenizer', 'batch_size', 'cache')}
  return pipeline.train_dataset(
      data.path, tokenizer=tokenizer, batch_size=data.batch_size // hosts, seed=seed, crop=data.random_crop(),
      process_index=jax.process_index(), process_count=hosts, skip_examples=skip_examples,
      mixture=data.parts() if data.mixture else (), **own)


def _state(initializer, abstract, keeper, *, shardings, seed, init, parts, batch_size):
  """(state, step, report): of the newest good checkpoint, else fresh with the init's weights, and how."""
  found = keeper.restore_latest(abstract)
  if found is None:
    state = train_step.init_state(initializer, shardings=shardings, seed=seed)
    if init is None:
      return state, 0, None
    flat, report = initialize.load_params(init, abstract.params, parts=parts)
    return initialize.into_state(state, shardings, flat), 0, report
  step, state, info = found
  if info['examples_seen'] != step * batch_size:
    raise ValueError(f'config.data.batch_size: this run saw {info["examples_seen"]} examples in {step} steps; '
                     f'it cannot go on with a batch of {batch_size}')
  return state, step, None


def _evaluator(functions, evals: EvalOptions, *, path, splits, workdir, mesh):
  def run(params, step, progress):
    out = {}
    # Hosts share the images; none waits for another while it evaluates, so each needs all parameters.
    params = sharding.to_local(params, mesh)
    for split in splits:
      began = time.monotonic()
      evaluation, _ = evaluate.run(functions, params, path=path, split=split, batch_size=evals.batch_size,
                                   limit=evals.limit, pool_limit=evals.pool_limit)
      out[split] = {k: float(v) for k, v in evaluation.metrics.items()}
      if jax.process_index() == 0:
        evaluate.write(evaluation, workdir / 'evals' / f'{split}.json', step=step, data=spec.text(path), split=split)
      shown = ', '.join(f'{label} {100 * out[split][key]:.1f}' for key, label in evaluate.HEADLINES
                        if key in out[split] and key.endswith(('top1', 'i2t_r1', 'acc_iou50')))
      progress.say(f'step {step} · {split}: {shown}  ({time.monotonic() - began:.0f} s)')
    return out
  return run


def _read_evaluations(workdir, splits):
  out = {}
  for split in splits:
    path = workdir / 'evals' / f'{split}.json'
    if path.exists():
      out[split] = json.loads(path.read_text())['metrics']
  return out
