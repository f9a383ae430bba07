"""Checkpoints: state, place in the data, config, tokenizer and preprocessing, one self-contained folder a step.

  CHECKPOINTS/STEP/state/…        parameters, optimizer, averages (Orbax, written asynchronously)
  CHECKPOINTS/STEP/info/metadata  JSON: place in the data, config, tokenizer, preprocessing, metrics of that step
Orbax writes beside the final name and renames, so a killed run leaves whole checkpoints or none.
"""
import logging
import os
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from cloc_jax import trees

_log = logging.getLogger('cloc_jax.checkpoint')
managers = ocp.checkpoint_managers


class CheckpointError(RuntimeError):
  """A checkpoint cannot be read or written; the message says which and why."""


def _handlers():
  registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
  registry.add('state', ocp.args.StandardSave, ocp.StandardCheckpointHandler())
  registry.add('state', ocp.args.StandardRestore, ocp.StandardCheckpointHandler())
  registry.add('info', ocp.args.JsonSave, ocp.JsonCheckpointHandler())
  registry.add('info', ocp.args.JsonRestore, ocp.JsonCheckpointHandler())
  return registry


class Checkpointer:
  """Saves, keeps the newest N and the best, restores, and falls back when the newest is damaged."""

  def __init__(self, folder: str | os.PathLike, *, keep: int = 2, best_metric: str | None = None, keep_best: int = 1,
               read_only: bool = False):
    """Opens or makes the folder.

    Args:
      folder: where the steps lie.
      keep: how many of the newest to keep.
      best_metric: name of an evaluation metric (larger is better); the `keep_best` best checkpoints stay as well.
      read_only: open without making or deleting anything.

    Raises:
      CheckpointError: if the folder cannot be made or written.
    """
    self.folder = pathlib.Path(folder).absolute()
    if keep < 1:
      raise ValueError(f'checkpoint.keep: expected at least 1, got {keep}')
    if not read_only:
      check_writable(self.folder)
    policies, score = [managers.LatestN(keep)], None
    if best_metric:
      score = lambda metrics: metrics.get(best_metric, float('-inf'))
      policies.append(managers.BestN(get_metric_fn=score, n=keep_best, keep_checkpoints_without_metrics=False))
    # The policies decide what stays; without a best_fn Orbax would not write the metrics, and a restart forget the best.
    self._options = ocp.CheckpointManagerOptions(
        preservation_policy=managers.AnyPreservationPolicy(policies), best_fn=score, read_only=read_only,
        create=not read_only,
        cleanup_tmp_directories=not read_only, step_format_fixed_length=8,
        save_interval_steps=0 if read_only else 1)
    self._open()

  def _open(self):
    self._manager = ocp.CheckpointManager(self.folder, options=self._options, handler_registry=_handlers())

  @property
  def steps(self) -> list[int]:
    """Complete checkpoints, oldest first."""
    return sorted(self._manager.all_steps())

  def save(self, step: int, state: Any, *, info: dict[str, Any], metrics: dict[str, float] | None = None) -> None:
    """Starts writing `state` and `info` (JSON-able) as `step`; returns before it is on disk. See `wait`."""
    self._manager.save(step, args=ocp.args.Composite(
        state=ocp.args.StandardSave(state), info=ocp.args.JsonSave(info)), metrics=metrics or {}, force=True)

  def wait(self) -> None:
    """Returns when everything that was started is on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    self._manager.close()

  def info(self, step: int) -> dict[str, Any]:
    """The JSON part of a checkpoint."""
    try:
      return self._manager.restore(step, args=ocp.args.Composite(info=ocp.args.JsonRestore()))['info']
    except Exception as error:
      raise CheckpointError(f'{self.folder / f"{step:08d}"}: the info cannot be read: {error}') from error

  def restore(self, step: int, abstract_state: Any) -> Any:
    """The state of a step in the structure, dtypes and shardings of `abstract_state`.

    Raises:
      CheckpointError: on damage, or on another architecture, with the ± difference.
    """
    where = self.folder / f'{step:08d}'
    try:
      found = self._manager.item_metadata(step)['state']
      found = getattr(found, 'tree', found)
    except Exception as error:
      raise CheckpointError(f'{where} is damaged: {error}') from error
    if found is not None and 'params' in found and 'opt_state' not in found:
      raise ArchitectureError(f'{where}: an imported model, without optimizer state; train from it in another workdir, '
                              f'with --config.model.init={self.folder.parent}')
    if found is not None and 'params' in found:
      text = trees.difference(abstract_state.params, found['params'])
      if text:
        raise ArchitectureError(f'{where}: the parameters belong to another architecture '
                                f'(- expected and missing, + unexpected, ! other shape):\n{text}')
    try:
      return self._manager.restore(
          step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state)))['state']
    except Exception as error:
      raise CheckpointError(f'{where} is damaged: {type(error).__name__}: {str(error)[:500]}') from error

  def restore_params(self, step: int) -> Any:
    """Parameters alone (the averaged ones where there are any), as host arrays, for inference on any device."""
    where = self.folder / f'{step:08d}'
    try:
      tree = self._manager.item_metadata(step)['state']
      tree = getattr(tree, 'tree', tree)
      sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
      shapes = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=sharding), dict(tree))
      state = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(shapes)))['state']
    except Exception as error:
      raise CheckpointError(f'{where} cannot be read: {type(error).__name__}: {str(error)[:500]}') from error
    return state['params'] if state.get('ema') is None else state['ema']

  def restore_latest(self, abstract_state: Any) -> tuple[int, Any, dict[str, Any]] | None:
    """(step, state, info) of the newest checkpoint that can be read; None if there is none at all.

    A damaged one is named in a warning, set aside as 'damaged-STEP', and the one before it is taken.

    Raises:
      ArchitectureError: another architecture is no damage; starting over silently would lose the run.
      CheckpointError: when there are checkpoints and none can be read.
    """
    steps = self.steps[::-1]
    for step in steps:
      try:
        return step, self.restore(step, abstract_state), self.info(step)
      except ArchitectureError:
        raise
      except CheckpointError as error:
        _log.warning('%s; falling back to the checkpoint before it', error)
        self._set_aside(step)
    if steps:
      raise CheckpointError(f'{self.folder}: none of the checkpoints {steps} can be read; they were set aside')
    return None

  def _set_aside(self, step):
    if jax.process_index() == 0:
      source = self.folder / f'{step:08d}'
      if source.exists():
        target = self.folder.parent / 'damaged-checkpoints' / f'{step:08d}'
        target.parent.mkdir(exist_ok=True)
        number = 0
        while target.exists():
          number += 1
          target = target.with_name(f'{step:08d}-{number}')
        source.rename(target)
    self._manager.reload()


class ArchitectureError(CheckpointError):
  """The checkpoint holds other parameters than the model that was asked for."""


def check_writable(folder: pathlib.Path) -> None:
  """Makes the folder and a file in it.

  Raises:
    CheckpointError: with the reason, before any work is done.
  """
  try:
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f'.writable-{os.getpid()}'
    probe.write_text('')
    probe.unlink()
  except OSError as error:
    raise CheckpointError(f'{folder} cannot be written: {error.strerror or error}') from error


def find(path: str | os.PathLike) -> tuple[pathlib.Path, int | None]:
  """What a user calls "the checkpoint": a run's folder, its checkpoints folder, or one step → (folder, step or None).

  Raises:
    FileNotFoundError: if there is no checkpoint at `path`.
  """
  path = pathlib.Path(path)
  if path.name.isdigit() and (path / 'state').exists():
    return path.parent, int(path.name)
  for folder in (path / 'checkpoints', path):
    if folder.is_dir() and any(p.name.isdigit() and (p / 'state').exists() for p in folder.iterdir()):
      return folder, None
  what = 'does not exist' if not path.exists() else 'holds no checkpoint (expected PATH/checkpoints/STEP/state)'
  raise FileNotFoundError(f'{path} {what}')
