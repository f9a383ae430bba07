"""Runs an importer: tasks → shards, in parallel, taken up again where they stopped, with everything counted.

While an import runs, `OUT.incomplete/` holds one finished shard a task beside a JSON file with its counts. Whatever
ends the run, the same command does only what is missing. The data set appears at `OUT` by one rename.
"""
from collections.abc import Iterator
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import json
import multiprocessing
import os
import pathlib
import pickle
import shutil
import signal
import threading
from typing import Any

from cloc_jax.data import schema
from cloc_jax.data import storage
from cloc_jax.data.importers import counts as counts_lib
from cloc_jax.data.importers import progress as progress_lib

LAYOUT = 2  # of the unfinished folder: raised when shards begun by an older version must not be mixed in
_FINGERPRINT = 'fingerprint.json'
_NAMED = 10
MOST_CATEGORIES = 20_000  # more are an open vocabulary, among which nobody recognises regions


@dataclasses.dataclass(frozen=True)
class Task:
  """A piece of work that becomes one shard, whoever does it and whenever.

  label: names it in errors: 'images 0 to 1023', 'part-00017.tar'.
  payload: anything picklable; all that Importer.read needs beside the importer's own arguments.
  images: how many it will read; None where that is not known beforehand.
  """
  label: str
  payload: Any
  images: int | None = None


class Importer:
  """What a format has to say. Importers are picklable, best frozen dataclasses of their arguments.

  An importer travels to the worker processes as it was given to `run`; what `splits` finds and keeps in it (for
  `meta` and `counts`) stays in the main process.
  """
  name: str  # the data set's name, see schema.DatasetMeta
  gathers_categories = False  # the data set's classes are those that its regions name, MOST_CATEGORIES at most

  def arguments(self) -> dict[str, Any]:
    """All that decides what is written, as JSON can hold it; by default a dataclass's fields."""
    return dataclasses.asdict(self)

  def files(self) -> list[str | os.PathLike]:
    """The source files whose change would change the result: annotations and archives, not single images."""
    raise NotImplementedError

  def splits(self) -> dict[str, list[Task]]:
    """Split name → its tasks, in the order of the records. Reads the annotations where they are one big file."""
    raise NotImplementedError

  def counts(self) -> dict[str, counts_lib.Counts]:
    """What `splits` counted that is part of no task: boxes of images that no list holds, for instance."""
    return {}

  def read(self, task: Task, report: counts_lib.Counts) -> Iterator[schema.Example]:
    """One task's examples; says in `report` what became of every image, box and caption of the task."""
    raise NotImplementedError

  def meta(self) -> schema.DatasetMeta:
    """Called after `splits`: categories, description, and under `extra` provenance and licences."""
    raise NotImplementedError


def run(importer: Importer, *, out: str | os.PathLike, workers: int = 0, overwrite: bool = False,
        allow_missing: bool = False, max_error_share: float = 0.01,
        progress: bool = False) -> dict[str, counts_lib.Counts]:
  """Imports a data set, or goes on with an import that was interrupted.

  Args:
    importer: the source.
    out: the folder to make, see schema.write_dataset.
    workers: processes; 0 for this one alone. The bytes do not depend on it. Above 0 the caller's script needs the usual
      `if __name__ == '__main__'` guard, as workers are spawned.
    overwrite: replace a data set at `out`, and throw away an unfinished import of something else. An unfinished import
      of the same is gone on with.
    allow_missing: leave out, and count, any number of missing or unreadable images.
    max_error_share: how many of the images may be missing or unreadable without `allow_missing`.
    progress: show how far it is on stderr.

  Returns:
    Split name → what became of its images, boxes and captions; stored in the data set too, under extra['counts'].

  Raises:
    FileNotFoundError, ValueError: too many images are missing or unreadable, naming the first ten; or the source is not
      what it should be. What was read stays, and the same command goes on.
    FileExistsError: `out`, or an unfinished import of something else, is in the way; or another process writes it.
  """
  if storage.is_url(out):
    raise ValueError(f'{out}: shards are written to a disk; upload.run copies them to a store')
  out = pathlib.Path(out).expanduser().absolute()
  schema.check_target(out, overwrite=overwrite)
  payload = pickle.dumps(importer)
  for path in importer.files():
    if not storage.path(path).exists():
      raise FileNotFoundError(f'no such file: {path}')
  folder = out.parent / f'{out.name}.incomplete'
  folder.mkdir(parents=True, exist_ok=True)
  with _alone(folder):
    _check_fingerprint(folder, fingerprint(importer), overwrite=overwrite)
    with progress_lib.shown(progress):
      splits = importer.splits()
    schema.check_names(meta=importer.meta(), splits=splits)
    jobs = [(split, index, task) for split, tasks in splits.items() for index, task in enumerate(tasks)]
    errors = _Errors(jobs, share=float('inf') if allow_missing else max_error_share, folder=folder)
    done = {}
    for split, index, task in jobs:
      sidecar = _finished(folder, split, index, task)
      if sidecar is not None:
        done[split, index] = sidecar
        errors.add(sidecar)
    sizes = {(split, index): task.images for split, index, task in jobs}
    with progress_lib.Tasks(sizes, done=done, show=progress) as bar:
      for key, sidecar in _work(payload, [job for job in jobs if job[:2] not in done], folder, workers=workers):
        done[key] = sidecar
        bar.advance(key)
        errors.add(sidecar)
    errors.check(final=True)
    counts = {split: counts_lib.Counts() for split in splits}
    for split, found in importer.counts().items():
      counts[split].merge(found)
    for split, index, _ in jobs:
      counts[split].merge(_counts_of(done[split, index]))
    meta = importer.meta()
    if importer.gathers_categories:
      meta = _with_categories(meta, {name for sidecar in done.values() for name in sidecar['categories']}, counts)
    _finish(folder, out, meta=meta, splits=splits, done=done, counts=counts)
  shutil.rmtree(folder, ignore_errors=True)
  return counts


def _finish(folder, out, *, meta, splits, done, counts):
  """Shards that hold something → the data set at `out`. `folder` stays as it is, should this be interrupted."""
  scratch = out.parent / f'.{out.name}.finishing'  # one process holds the lock, so one name does
  shutil.rmtree(scratch, ignore_errors=True)
  scratch.mkdir()
  try:
    infos = []
    for split, tasks in splits.items():
      shards = []
      for index in range(len(tasks)):
        if done[split, index]['records']:
          path = scratch / f'{split}.{index}'
          _link(_shard(folder, split, index), path)
          shards.append((path, done[split, index]['records']))
      infos.append(schema.finish_split(
          scratch, name=meta.name, split=split, shards=shards,
          num_bytes=sum(done[split, index]['bytes'] for index in range(len(tasks)))))
    found = {split: c.to_json() for split, c in counts.items()}
    schema.write_info(scratch, meta=dataclasses.replace(meta, extra={**meta.extra, 'counts': found}), infos=infos)
    schema.swap_in(scratch, out)
  finally:
    shutil.rmtree(scratch, ignore_errors=True)


def _with_categories(meta, names, counts):
  if len(names) <= MOST_CATEGORIES:
    return dataclasses.replace(meta, categories=tuple(sorted(names)))
  for found in counts.values():
    found.noted('categories', 'an open vocabulary: not listed', f'more than {MOST_CATEGORIES:,}')
  return meta


def _link(source, target):
  try:
    os.link(source, target)
  except OSError:  # a file system without hard links
    shutil.copyfile(source, target)


# --- one task


def _shard(folder, split, index):
  return folder / f'{split}-{index:05}.array_record'


def _do(importer, folder, split, index, task) -> dict:
  """Writes one shard and its sidecar; returns the sidecar."""
  shard = _shard(folder, split, index)
  partial = shard.with_suffix('.tmp')
  report = counts_lib.Counts()
  records = num_bytes = 0
  gathers, categories = importer.gathers_categories, set()
  writer = schema.shard_writer(partial)
  try:
    for example in importer.read(task, report):
      record = schema.encode(example)
      writer.write(record)
      records += 1
      num_bytes += len(record)
      if gathers and len(categories) <= MOST_CATEGORIES:
        categories.update(region.category for region in example.regions if region.category)
  finally:
    writer.close()
  sidecar = {'label': task.label, 'categories': sorted(categories), 'records': records, 'bytes': num_bytes,
             'file_bytes': partial.stat().st_size,
             'counts': report.to_json(), 'lost': [dataclasses.asdict(image) for image in report.lost]}
  partial.rename(shard)
  note = shard.with_suffix('.json.tmp')
  note.write_text(json.dumps(sidecar))
  note.rename(shard.with_suffix('.json'))
  return sidecar


def _finished(folder, split, index, task):
  """The sidecar of a shard that is whole and would come out the same today, else None."""
  shard = _shard(folder, split, index)
  try:
    sidecar = json.loads(shard.with_suffix('.json').read_text())
    whole = shard.stat().st_size == sidecar['file_bytes'] and task.label == sidecar['label']
  except (OSError, ValueError, KeyError):
    return None
  same = all(storage.state(image['path']) == image['state'] for image in sidecar['lost'] if image['path'])
  return sidecar if whole and same else None


def _counts_of(sidecar):
  found = counts_lib.Counts.from_json(sidecar['counts'])
  found.lost = [counts_lib.LostImage(**image) for image in sidecar['lost']]
  return found


# --- all tasks


def _work(payload, jobs, folder, *, workers):
  """Yields ((split, index), sidecar) as tasks end."""
  if not workers or len(jobs) == 1:
    importer = pickle.loads(payload)
    for split, index, task in jobs:
      yield (split, index), _do(importer, folder, split, index, task)
    return
  if not jobs:
    return
  pool = concurrent.futures.ProcessPoolExecutor(
      min(workers, len(jobs)), mp_context=multiprocessing.get_context('spawn'), initializer=_begin_worker,
      initargs=(payload,))
  try:
    futures = {pool.submit(_do_in_worker, folder, *job): job for job in jobs}
    for future in concurrent.futures.as_completed(futures):
      split, index, task = futures.pop(future)
      try:
        sidecar = future.result()
      except concurrent.futures.process.BrokenProcessPool as error:
        raise RuntimeError(f'a worker process died at or near {split}, {task.label} (out of memory?); what was read is '
                           f'kept in {folder}: run the same again, perhaps with fewer workers') from error
      yield (split, index), sidecar
  finally:
    pool.shutdown(wait=True, cancel_futures=True)


_importer: Importer | None = None  # of a worker process


def _begin_worker(payload):
  global _importer
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process gets it as well, and ends the workers in good order
  threading.Thread(target=_end_with_parent, daemon=True).start()
  _importer = pickle.loads(payload)


def _end_with_parent():
  multiprocessing.parent_process().join()  # returns early only if the main process was killed
  os._exit(1)


def _do_in_worker(folder, split, index, task):
  return _do(_importer, folder, split, index, task)


# --- what guards a run


@contextlib.contextmanager
def _alone(folder):
  """Holds a lock on `folder`, which the system frees with the process."""
  with open(folder / 'lock', 'w') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise FileExistsError(f'another process is importing into {folder}') from None
    try:
      yield
    finally:
      if not _began(folder):
        shutil.rmtree(folder, ignore_errors=True)


def _began(folder):
  """Whether anything in the folder is worth keeping."""
  return any(child.suffix == '.array_record' for child in folder.iterdir())


def fingerprint(importer: Importer) -> dict[str, str]:
  """What must be the same for shards of two runs to be mixed: flat, so that a difference can be named."""
  kind = type(importer)
  found = {'importer': f'{kind.__module__}.{kind.__qualname__}', 'layout': str(LAYOUT)}
  found |= {f'argument {name}': json.dumps(value, default=os.fspath) for name, value in importer.arguments().items()}
  for path in importer.files():
    path = storage.path(path).absolute()
    found[f'file {path}'] = storage.state(path)
  return found


def _check_fingerprint(folder, wanted, *, overwrite):
  """Writes the fingerprint to an empty folder; compares it with the one of a folder in use."""
  path = folder / _FINGERPRINT
  try:
    have = json.loads(path.read_text())
  except (FileNotFoundError, ValueError):
    have = {}  # begun and killed at once: nothing in it can be trusted
  if have != wanted:
    changed = [f'{name}: {have.get(name, "absent")} → {wanted.get(name, "absent")}'
               for name in sorted(have.keys() | wanted.keys()) if have.get(name) != wanted.get(name)]
    if have and _began(folder) and not overwrite:
      raise FileExistsError(f'{folder} holds an unfinished import of something else; --overwrite starts anew. '
                            'What changed: ' + '; '.join(changed))
    for child in folder.iterdir():
      if child.name != 'lock':
        child.unlink()
    partial = path.with_suffix('.tmp')
    partial.write_text(json.dumps(wanted, indent=2))
    partial.rename(path)


class _Errors:
  """Stops an import that cannot end well: too many images are missing or unreadable."""

  def __init__(self, jobs, *, share, folder):
    sizes = [task.images for _, _, task in jobs]
    self._total = None if None in sizes else sum(sizes)
    self._share, self._folder = share, folder
    self._lost, self._read = [], 0

  def add(self, sidecar):
    self._lost += sidecar['lost']
    self._read += _counts_of(sidecar).of('images')
    self.check()

  def check(self, *, final=False):
    """Raises as soon as it is sure; where the number of images is not known beforehand, at the end."""
    total = self._read if final else self._total
    if total is None or not self._lost or len(self._lost) <= self._share * total:
      return
    named = [f'{image["name"]}: {image["reason"]}' for image in self._lost[:_NAMED]]
    more = f'\n  … and {len(self._lost) - _NAMED} more' if len(self._lost) > _NAMED else ''
    missing = any(image['reason'] == 'missing' for image in self._lost)
    so_far = '' if self._read >= total else ' (or more: the import stopped there)'
    raise (FileNotFoundError if missing else ValueError)(
        f'{len(self._lost)} of {total} images{so_far} are missing or unreadable, more than {self._share:.1%}. '
        f'--allow-missing leaves them out. What was read is kept in {self._folder}.\n  ' + '\n  '.join(named) + more)
