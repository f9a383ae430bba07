"""A labelled shard → its files; and all shards → a data set.

While a run is under way, `OUT.incomplete/` holds for each shard NAME.array_record (and NAME.parquet), and NAME.json
with its figures and failures. The JSON is written last: it is the mark that the shard is complete.
"""
from collections.abc import Iterator
import concurrent.futures
import contextlib
import dataclasses
import json
import os
import pathlib
import tempfile
import time

from cloc_jax.data import schema
from cloc_jax.data.importers import counts as counts_lib
from cloc_jax.label import folders
from cloc_jax.label import summary as summary_lib
from cloc_jax.label import work

SHARD, NOTE, PARQUET = '.array_record', '.json', '.parquet'
_OWN_NOTES = ('fingerprint.json',)
_PARQUET_GROUP = 256  # rows
_REQUESTS = 32  # to a store at once
_AHEAD = 1024  # that are waited for together


class Write:
  """Writes a shard and its note; gives the note. Doing it twice leaves the same files."""

  def __init__(self, folder: str, *, parquet: bool):
    self._folder, self._parquet = folders.Folder(folder), parquet

  def __call__(self, shard: work.Shard) -> dict:
    began = time.perf_counter()
    records = num_bytes = file_bytes = 0
    if shard.items:
      with self._folder.writing(shard.name + SHARD) as path, contextlib.ExitStack() as stack:
        parquet = stack.enter_context(_parquet_writer(self._folder, shard.name)) if self._parquet else None
        writer = schema.shard_writer(path)
        try:
          for example in work.examples(shard):
            record = schema.encode(example)
            writer.write(record)
            records, num_bytes = records + 1, num_bytes + len(record)
            if parquet is not None:
              parquet(example)
        finally:
          writer.close()
        file_bytes = path.stat().st_size
    shard.summary.tables['errors'].update(failure.stage for failure in shard.failures)
    shard.summary.seconds['write'] += time.perf_counter() - began
    note = {'name': shard.name, 'unit': shard.unit, 'part': shard.part, 'last': shard.last, 'records': records,
            'bytes': num_bytes, 'file_bytes': file_bytes, 'versions': shard.versions,
            'failures': [dataclasses.asdict(failure) for failure in shard.failures], 'began': shard.began,
            'ended': time.time(), 'summary': shard.summary.to_json()}
    self._folder.write(shard.name + NOTE, json.dumps(note).encode())
    return note


def notes(folder: folders.Folder) -> Iterator[dict]:
  """The notes of all complete shards, in the order of the input; those whose shard file is not whole are left out."""
  sizes = dict(folder.names())
  names = sorted(name for name in sizes if name.endswith(NOTE) and name not in _OWN_NOTES)
  for data in _at_once(folder, folder.read, [(name,) for name in names]):
    note = json.loads(data)
    if not note['records'] or sizes.get(note['name'] + SHARD) == note['file_bytes']:
      yield note


def _at_once(folder, call, rows):
  """Yields call(*row) in order. A store answers after tens of milliseconds, so it is asked many things at a time."""
  if not folder.remote:
    yield from (call(*row) for row in rows)
    return
  with concurrent.futures.ThreadPoolExecutor(_REQUESTS) as pool:
    for start in range(0, len(rows), _AHEAD):
      yield from pool.map(lambda row: call(*row), rows[start:start + _AHEAD])


def finish(folder: folders.Folder, out: str, *, meta: schema.DatasetMeta, split: str, fingerprint: dict,
           parquet: bool) -> summary_lib.Summary:
  """Complete shards → the data set at `out`, with label.json (figures) and errors.jsonl beside the records.

  On a disk it appears by one rename. In an object store the files that make it a data set are written last.

  Raises:
    ValueError: shards were made by different versions of a stage, or none of them has a record.
  """
  remote = folders.Folder(out).remote
  place = pathlib.Path(out)
  total, shards, versions, spans, num_bytes = summary_lib.Summary(), [], {}, [], 0
  outcomes = counts_lib.Counts()  # as an import counts, so that validation and evaluation know what is not there
  with contextlib.ExitStack() as stack:
    scratch = (pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory())) if remote
               else place.parent / f'.{place.name}.finishing')  # one process holds the lock, so one name does
    if not remote:
      folders.Folder(scratch).remove_all()
      scratch.mkdir()
      stack.callback(folders.Folder(scratch).remove_all)
    target = folders.Folder(out if remote else scratch)
    if remote:  # a data set that is replaced is none from here on
      target.remove('dataset_info.json')
    with open(scratch / 'errors.jsonl', 'w', encoding='utf-8') as errors:
      for note in notes(folder):
        for failure in note['failures']:
          errors.write(json.dumps(failure, ensure_ascii=False) + '\n')
          if failure['stage'] == 'source':
            outcomes.noted('files', 'not read to the end', failure['id'])
          else:
            outcomes.dropped('images', f'stage {failure["stage"]}', failure['id'])
        total.merge(summary_lib.Summary.from_json(note['summary']))
        spans.append((note['began'], note['ended']))
        if note['records']:
          _same_versions(versions, note, folder)
          shards.append((pathlib.Path(note['name'] + SHARD), note['records']))
          num_bytes += note['bytes']
    total.trim()
    copies = []

    def move(source, final):
      copies.append((source.name, target, final.name))
      if remote:
        final.touch()  # TFDS reads the data set's name from the files beside its metadata
    info = schema.finish_split(scratch, name=meta.name, split=split, shards=shards, num_bytes=num_bytes, move=move)
    if parquet:
      tables = folders.Folder(f'{target.path}/parquet')
      copies += [(source.stem + PARQUET, tables, source.stem + PARQUET) for source, _ in shards]
    for _ in _at_once(folder, folder.copy, copies):
      pass
    label = {'fingerprint': fingerprint, 'versions': versions, 'busy_seconds': busy_seconds(spans),
             'summary': total.to_json()}
    (scratch / 'label.json').write_text(json.dumps(label, indent=1))
    outcomes.kept('images', total.counts['written'])
    outcomes.kept('boxes', total.counts['regions'])
    extra = {**meta.extra, 'label': versions, 'counts': {split: outcomes.to_json()}}
    schema.write_info(scratch, meta=dataclasses.replace(meta, extra=extra), infos=[info], made_by=True)
    if remote:
      for path in sorted(scratch.glob('*.json*'), key=lambda path: path.name == 'dataset_info.json'):
        target.write(path.name, path.read_bytes())
      final = {os.path.basename(path) for path in info.filenames}
      for name in [name for name, _ in target.names() if SHARD + '-' in name and name not in final]:
        target.remove(name)
    else:
      schema.swap_in(scratch, place)
  return total


def busy_seconds(spans: list[tuple[float, float]]) -> float:
  """For how long at least one shard was worked on: the length of the union of (began, ended)."""
  busy, until = 0.0, float('-inf')
  for began, ended in sorted(spans):
    busy += max(0.0, ended - max(began, until))
    until = max(until, ended)
  return busy


def _same_versions(versions, note, folder):
  for stage, version in note['versions'].items():
    if versions.setdefault(stage, version) != version:
      raise ValueError(f'{folder.path}: shard {note["name"]} was made by {stage} {version!r}, those before it by '
                       f'{versions[stage]!r}; --overwrite starts anew')


@contextlib.contextmanager
def _parquet_writer(folder, name):
  """A function that takes an Example, for `folder`/NAME.parquet in the layout that `cloc data import rows` reads."""
  try:
    import pyarrow as pa
    from pyarrow import parquet
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError("--parquet needs pyarrow: pip install 'cloc_jax[parquet]'") from error
  region = pa.struct({'box': pa.list_(pa.float32()), 'caption': pa.string(), 'category': pa.string(),
                      'score': pa.float32(), 'source': pa.string()})
  table = pa.schema({'image': pa.large_binary(), 'image_id': pa.string(), 'height': pa.int32(), 'width': pa.int32(),
                     'captions': pa.list_(pa.string()), 'regions': pa.list_(region), 'made_by': pa.list_(pa.string())})
  rows = []
  with folder.writing(name + PARQUET) as path, parquet.ParquetWriter(os.fspath(path), table) as writer:
    def flush():
      if rows:
        writer.write_table(pa.Table.from_pylist(rows, schema=table))
        rows.clear()

    def add(example):
      rows.append(dataclasses.asdict(example))
      if len(rows) == _PARQUET_GROUP:
        flush()
    yield add
    flush()
