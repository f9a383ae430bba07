"""`cloc label`: images with alt-texts → a region-text data set, taken up again where it stopped.

The input is cut into shards that do not depend on who works on them or when. A shard goes through read, decode,
caption, phrases, detect and write; whatever ends a run, the same command does only the shards that are missing.
"""
from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import importlib
import json
import os
import pathlib
import sys
import time
from typing import Any

import tqdm

from cloc_jax import config as config_lib
from cloc_jax.data import schema
from cloc_jax.label import folders
from cloc_jax.label import inputs
from cloc_jax.label import runners
from cloc_jax.label import summary as summary_lib
from cloc_jax.label import writer

LAYOUT = 1  # of the unfinished folder: raised when shards begun by an older version must not be mixed in
STAGES = ('captioner', 'phrases', 'detector')
TRANSIENT = ('source', 'caption', 'phrases', 'detect')  # failures that another try may mend
_FINGERPRINT = 'fingerprint.json'
_ENOUGH = 4096  # images; a share of errors is not judged by fewer, unless there are fewer in all
_SECONDS_BETWEEN_LINES = 30
_NAMED = 10


@dataclasses.dataclass(frozen=True)
class Job:
  """What is to be made; together with the input's files it decides every byte of the records.

  inputs, split: see inputs.plan.
  out: the data set's folder or URL.
  captioner, phrases, detector: {'spec': …} and the settings of that stage, see build_stage.
  name: the data set's, see schema.DatasetMeta.
  shard_size: images a shard.
  chunk: images handed to a model at a time; it cuts its batches from them.
  text_keys: where archives, rows and records have alt-texts.
  parquet: write Parquet files too.
  """
  inputs: tuple[str, ...]
  out: str
  captioner: Mapping[str, Any]
  phrases: Mapping[str, Any]
  detector: Mapping[str, Any]
  name: str = 'vesl'
  split: str = 'train'
  shard_size: int = 1024
  chunk: int = 64
  text_keys: tuple[str, ...] = inputs.TEXT_KEYS
  parquet: bool = False


@dataclasses.dataclass(frozen=True)
class Outcome:
  """out: the data set. summary: its figures. already: it was complete before."""
  out: str
  summary: summary_lib.Summary
  already: bool = False


class TooManyErrors(ValueError):
  """More images were lost than the run allows."""


def run(job: Job, *, runner: str = 'local', pools: Mapping[str, Mapping[str, Any]] | None = None,
        ray_options: Mapping[str, Any] | None = None, cache: str | None = None, max_error_share: float = 0.01,
        retry_errors: bool = False, overwrite: bool = False, progress: bool = False) -> Outcome:
  """Labels everything, or goes on with a run that was interrupted.

  Args:
    job: what to make.
    runner: 'local', in this process, or 'ray'. The records do not depend on it.
    pools, ray_options: see runners.ray_notes.
    cache: folder or URL of the caption cache, see cache.CaptionCache; None keeps captions only in the records.
    max_error_share: images that may be lost, as a share of those seen.
    retry_errors: do again the shards that lost images to anything but the images themselves.
    overwrite: replace a data set at `out`, and throw away an unfinished run of something else.
    progress: show how far it is on stderr.

  Raises:
    TooManyErrors: naming the first ten. Complete shards stay.
    FileExistsError: `out` or an unfinished run of something else is in the way, naming what changed; or another
      process works on it.
    FileNotFoundError, ValueError, TypeError: see inputs.plan and build_stage.
  """
  if runner not in ('local', 'ray'):
    raise ValueError(f"unknown runner {runner!r}; known are 'local' and 'ray'")
  if job.shard_size < 1 or job.chunk < 1:
    raise ValueError(f'shard_size and chunk: expected at least 1, got {job.shard_size} and {job.chunk}')
  meta = schema.DatasetMeta(name=job.name, description='Images labelled by VESL: new captions, and regions found for '
                            'phrases of the captions. `captions` is the new caption and then the alt-texts.')
  schema.check_names(meta=meta, splits=(job.split,))
  units = inputs.plan(job.inputs, split=job.split, shard_size=job.shard_size)
  wanted = fingerprint(job, units)
  out = folders.Folder(job.out).path
  done = _finished(out, wanted, overwrite=overwrite)
  if done is not None:
    return Outcome(out, done, already=True)
  folder = folders.Folder(out + '.incomplete')
  with _alone(folder):
    _check_fingerprint(folder, wanted, overwrite=overwrite)
    todo, tally = _resume(folder, units, max_error_share=max_error_share, retry_errors=retry_errors)
    plan = runners.Plan(
        units=tuple(units), todo=todo, shard_size=job.shard_size, chunk=job.chunk, text_keys=tuple(job.text_keys),
        folder=folder.path, parquet=job.parquet, cache=cache,
        makers={stage: functools.partial(build_stage, stage, dict(getattr(job, stage))) for stage in STAGES})
    notes = runners.local_notes(plan) if runner == 'local' else runners.ray_notes(
        plan, pools=pools or {}, **(ray_options or {}))
    with contextlib.closing(notes), _Progress(tally, units=len(units), show=progress) as shown:
      tally.check()
      for note in notes:
        tally.add(note)
        shown.advance(note)
        tally.check()
    tally.check(final=True)
    missing = [units[index].label for index in _open_units(folder, units)]
    if missing:
      raise RuntimeError(f'{len(missing)} of {len(units)} inputs are not complete, such as {missing[0]}: run it again')
    _remove_partial(folder)
    total = writer.finish(folder, out, meta=meta, split=job.split, fingerprint=wanted, parquet=job.parquet)
  folder.remove_all()
  return Outcome(out, total)


def build_stage(stage: str, settings: Mapping[str, Any]):
  """A captioner, phrase extractor or detector; `settings` are its 'spec' and what its factory takes.

  spec: what the factories of captioners, phrases and detectors know, or 'python:MODULE:NAME', a class or function of
  your own that takes the other settings.

  Raises:
    ValueError: no spec, or one without such a module or name.
    What its factory raises: TypeError for a setting that it does not have, FileNotFoundError for a missing folder.
  """
  settings = config_lib.plain(dict(settings))
  spec = settings.pop('spec', None)
  if not spec:
    raise ValueError(f'{stage}: no spec given')
  if spec.startswith('python:'):
    module, _, name = spec.removeprefix('python:').partition(':')
    try:
      make = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
      raise ValueError(f'{stage} {spec!r}: {error}') from error
    return make(**settings)
  plural = {'captioner': 'captioners', 'detector': 'detectors'}.get(stage, stage)
  return importlib.import_module(f'cloc_jax.label.{plural}').make(spec, **settings)


def fingerprint(job: Job, units: Sequence[inputs.Unit]) -> dict[str, str]:
  """What must be the same for shards of two runs to be mixed: flat, so that a difference can be named."""
  found = {'layout': str(LAYOUT), 'input': f'{len(units)} units {hashlib.sha256(_labels(units)).hexdigest()[:16]}'}
  for name in ('name', 'split', 'shard_size', 'text_keys', 'parquet'):
    found[name] = json.dumps(getattr(job, name))
  # A stage's version leaves out what does not change its answers: one may go on with smaller batches.
  return found | {stage: build_stage(stage, getattr(job, stage)).version for stage in STAGES}


def _labels(units):
  return '\n'.join('\t'.join((unit.kind, unit.label, *unit.paths)) for unit in units).encode()


def _differences(have, wanted):
  return '; '.join(f'{name}: {have.get(name, "absent")} → {wanted.get(name, "absent")}'
                   for name in sorted(have.keys() | wanted.keys()) if have.get(name) != wanted.get(name))


# --- what is there already


def _finished(out, wanted, *, overwrite):
  """The summary of a data set at `out` that this very job made; None where there is none, or it is to be replaced."""
  target = folders.Folder(out)
  have = json.loads(target.read('label.json') or b'{}')
  complete = target.read(schema.INFO_FILE) is not None
  if complete and have.get('fingerprint') == wanted and not overwrite:
    return summary_lib.Summary.from_json(have['summary'])
  if target.remote:
    if complete and not overwrite:
      raise FileExistsError(f'{out} holds a data set of something else; --overwrite replaces it. What differs: '
                            + _differences(have.get('fingerprint', {}), wanted))
    return None
  if complete and have and not overwrite:
    raise FileExistsError(f'{out} holds labels of something else; --overwrite replaces them. What differs: '
                          + _differences(have['fingerprint'], wanted))
  schema.check_target(pathlib.Path(out), overwrite=overwrite)
  return None


def _check_fingerprint(folder, wanted, *, overwrite):
  """Writes the fingerprint to an empty folder; compares it with that of a folder in use."""
  have = json.loads(folder.read(_FINGERPRINT) or b'{}')
  if have == wanted:
    return
  began = any(name.endswith(writer.SHARD) for name, _ in folder.names())
  if have and began and not overwrite:
    raise FileExistsError(f'{folder.path} holds an unfinished run of something else; --overwrite starts anew. '
                          f'What changed: {_differences(have, wanted)}')
  for name, _ in folder.names():
    if name != 'lock':
      folder.remove(name)
  folder.write(_FINGERPRINT, json.dumps(wanted, indent=1).encode())


def _resume(folder, units, *, max_error_share, retry_errors):
  """({unit to do: its parts that are done}, the tally so far); what a killed run left half-written goes away."""
  _remove_partial(folder)
  tally = _Tally(units, share=max_error_share, folder=folder.path)
  parts: dict[int, list] = {}
  for note in writer.notes(folder):
    if retry_errors and any(failure['stage'] in TRANSIENT for failure in note['failures']):
      folder.remove(note['name'] + writer.NOTE)
      continue
    tally.add(note)
    parts.setdefault(note['unit'], []).append((note['part'], note['last']))
  todo = {index: frozenset(part for part, _ in parts.get(index, ())) for index in range(len(units))
          if not _whole(parts.get(index, ()))}
  return todo, tally


def _whole(parts):
  """Whether parts [(number, last)] are all of a unit."""
  ends = [number for number, last in parts if last]
  return bool(ends) and len(parts) == ends[0] + 1


def _open_units(folder, units):
  parts: dict[int, list] = {}
  for note in writer.notes(folder):
    parts.setdefault(note['unit'], []).append((note['part'], note['last']))
  return [index for index in range(len(units)) if not _whole(parts.get(index, ()))]


def _remove_partial(folder):
  for name, _ in list(folder.names()):
    if folders.PARTIAL in name:
      folder.remove(name)


@contextlib.contextmanager
def _alone(folder):
  """Holds a lock that the system frees with the process. Object stores have none: two runs there waste work only."""
  if folder.remote:
    yield
    return
  os.makedirs(folder.path, exist_ok=True)
  with open(folder.place('lock'), 'w') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise FileExistsError(f'another process is labelling into {folder.path}') from None
    yield


# --- while it runs


class _Tally:
  """Counts what was seen and lost, and stops a run that cannot end well."""

  def __init__(self, units, *, share, folder):
    known = [unit.images for unit in units]
    self.total = None if None in known else sum(known)
    self._units, self._share, self._folder = len(units), share, folder
    self.seen = self.written = self.shards = self.units = 0
    self.lost, self._sources, self._named = 0, 0, []

  def add(self, note):
    self.seen += note['summary']['counts']['images']
    self.written += note['records']
    self.shards += 1
    self.units += note['last']
    for failure in note['failures']:
      if failure['stage'] == 'source':
        self._sources += 1
      else:
        self.lost += 1
      if len(self._named) < _NAMED:
        self._named.append(f'{failure["id"]}: {failure["stage"]}: {failure["message"]}')

  def check(self, *, final=False):
    least = 0 if final else _ENOUGH if self.total is None else min(_ENOUGH, self.total)
    many = self.lost > self._share * max(self.seen, least)
    sources = self._sources > self._share * self._units
    if many or sources:
      what = f'{self.lost} of {self.seen} images' if many else f'{self._sources} of {self._units} input files'
      raise TooManyErrors(
          f'{what} were lost, more than --max-error-share {self._share:.1%}. Complete shards are kept in '
          f'{self._folder}: mend the cause and run the same again with --retry-errors, or allow more.\n  '
          + '\n  '.join(self._named) + ('\n  …' if self.lost + self._sources > len(self._named) else ''))


class _Progress:
  """Images a second and the time left: a bar on a terminal, else a line now and then."""

  def __init__(self, tally, *, units, show):
    self._tally, self._units = tally, units
    terminal = sys.stderr.isatty()
    self._bar = tqdm.tqdm(total=tally.total, initial=tally.seen, unit='image', smoothing=0.05,
                          disable=not (show and terminal))
    self._lines = show and not terminal
    self._ready, self._ready_units = tally.seen, tally.units
    self._began = self._said = time.monotonic()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._bar.close()

  def advance(self, note):
    tally = self._tally
    self._bar.update(note['summary']['counts']['images'])
    self._bar.set_postfix_str(f'{tally.units}/{self._units} inputs, {tally.lost} lost', refresh=False)
    now = time.monotonic()
    if not self._lines or now - self._said < _SECONDS_BETWEEN_LINES:
      return
    self._said, seconds = now, now - self._began
    if tally.total:
      share = (tally.seen - self._ready) / max(tally.total - self._ready, 1)
    else:
      share = (tally.units - self._ready_units) / max(self._units - self._ready_units, 1)
    left = f'{seconds * (1 - share) / share / 60:.0f} min left' if share else 'time left unknown'
    print(f'{tally.seen:,} images ({tally.lost:,} lost), {tally.units:,} of {self._units:,} inputs, '
          f'{(tally.seen - self._ready) / seconds:,.1f} images/s, {left}', file=sys.stderr)
