"""Copies of finished data sets: fsspec's memory:// of one process, and file:// where several processes look on."""
import collections
import os
import pathlib
import shutil
import subprocess
import sys
import time
import types

from painted_pictures import painted_example
import pytest

from cloc_jax import cli
from cloc_jax.data import copies
from cloc_jax.data import location
from cloc_jax.data import schema
from cloc_jax.data import sources
from cloc_jax.data import spec
from cloc_jax.data import storage

fsspec = pytest.importorskip('fsspec')

SHARD = 'toy-train.array_record-0000{}-of-00003'


def write_set(path, *, examples=range(7), **meta):
  schema.write_dataset(path, meta=schema.DatasetMeta(name='toy', **meta), num_shards=3, overwrite=True,
                       splits={'train': [painted_example(i) for i in examples]})
  return path


@pytest.fixture(name='dataset')
def dataset_fixture(tmp_path):
  return write_set(tmp_path / 'set')


@pytest.fixture(name='store')
def store_fixture(request):
  """A folder in memory://, by its URL."""
  files, root = fsspec.filesystem('memory'), f'/{request.node.name}'.replace('[', '_').replace(']', '_')
  yield storage.path(f'memory:/{root}')
  if files.exists(root):
    files.rm(root, recursive=True)


@pytest.fixture(name='cache')
def cache_fixture(tmp_path, monkeypatch):
  """A folder for copies, set and empty; nothing is remembered of other tests."""
  location._cached.cache_clear()
  monkeypatch.setenv(location.CACHE, str(tmp_path / 'cache'))
  return tmp_path / 'cache'


@pytest.fixture(name='got')
def got_fixture(monkeypatch):
  """Names of the files that are fetched from memory://, in order. got.after: how many arrive before the store fails;
  got.half: of the next one a half is left. got.cut: that many bytes of each are lost without a word."""
  kind, got = fsspec.get_filesystem_class('memory'), types.SimpleNamespace(names=[], after=None, cut=0)
  get_file = kind.get_file

  def counted(self, source, target, **more):
    if got.after is not None and len(got.names) >= got.after:
      pathlib.Path(target).write_bytes(self.cat_file(source)[:50])
      raise ConnectionError('gone')
    got.names.append(source.rpartition('/')[2])
    get_file(self, source, target, **more)
    if got.cut:
      os.truncate(target, os.path.getsize(target) - got.cut)
  monkeypatch.setattr(kind, 'get_file', counted)
  monkeypatch.setattr(copies, '_IN_FLIGHT', 1)
  return got


def content(folder):
  """name → bytes, without hidden files; of a disk or memory://."""
  if isinstance(folder, storage.Remote):
    files, key = folder.backend()
    found = {name[len(key) + 1:]: files.cat_file(name) for name in files.find(key)}
  else:
    found = {str(p.relative_to(folder)): p.read_bytes() for p in pathlib.Path(folder).rglob('*') if p.is_file()}
  return {name: data for name, data in found.items() if not name.startswith('.')}


def records(path):
  source = sources.open_source(path, split='train')
  return [source[i] for i in range(len(source))]


def test_to_a_store_and_back(dataset, store, tmp_path):
  seen = []
  done = copies.copy(dataset, store / 'a', progress=lambda done, total: seen.append((done, total)))
  total = sum(len(data) for data in content(dataset).values())
  assert content(store / 'a') == content(dataset) and (done.files, done.bytes, done.kept) == (6, total, 0)
  assert seen[0] == (0, total) and seen[-1] == (total, total) and seen == sorted(seen)
  assert copies.copy(store / 'a', store / 'b').kept == 0 and content(store / 'b') == content(dataset)
  copies.copy(store / 'b', tmp_path / 'back')
  assert content(tmp_path / 'back') == content(dataset) and records(tmp_path / 'back') == records(dataset)
  assert [p.name for p in (tmp_path / 'back').iterdir() if p.name.startswith('.')] == [copies.NOTE_FILE]
  assert copies.copy(store / 'b', tmp_path / 'back').kept == 6


def test_disk_to_disk_on_the_command_line(dataset, tmp_path, capsys):
  assert cli.main(['data', 'copy', str(dataset), str(tmp_path / 'new')]) == 0
  assert content(tmp_path / 'new') == content(dataset) and '6 files' in capsys.readouterr().out
  assert cli.main(['data', 'copy', str(tmp_path / 'nothing'), str(tmp_path / 'b')]) == 2
  assert 'nothing is not a data set' in capsys.readouterr().err and not (tmp_path / 'b').exists()


def test_a_copy_that_broke_off_goes_on(dataset, store, got, tmp_path):
  copies.copy(dataset, store)
  got.after = 2
  with pytest.raises(storage.StorageError, match=f'{store}/.*: ConnectionError: gone'):
    copies.copy(store, tmp_path / 'new')
  there = content(tmp_path / 'new')
  assert set(there) == set(got.names) and len(there) == 2 and all(there[n] == content(dataset)[n] for n in there)
  with pytest.raises(FileNotFoundError, match='not a data set'):
    schema.read_meta(tmp_path / 'new')
  before, got.after = set(got.names), None
  got.names.clear()
  assert copies.copy(store, tmp_path / 'new').kept == 2
  assert not before & set(got.names) and got.names[-1] == schema.INFO_FILE
  assert content(tmp_path / 'new') == content(dataset)


def test_what_arrives_cut_off_is_named_and_not_kept(dataset, store, got, tmp_path):
  copies.copy(dataset, store)
  got.cut = 5
  with pytest.raises(storage.StorageError, match=r'memory://.*: \d+ bytes arrived at .*, of \d+'):
    copies.copy(store, tmp_path / 'new')
  assert not content(tmp_path / 'new')


def test_sources_that_are_not_whole(dataset, store, tmp_path):
  with pytest.raises(FileNotFoundError, match='memory://.* is not a data set .*nothing of that name'):
    copies.copy(store, tmp_path / 'new')
  copies.copy(dataset, store / 'a')
  with pytest.raises(FileNotFoundError, match=f'{store} is not a data set .*{store}/a'):
    copies.copy(store, tmp_path / 'new')
  files, key = (store / 'a').backend()
  files.rm_file(f'{key}/{SHARD.format(1)}')
  with pytest.raises(ValueError, match=f'{store}/a is incomplete: 1 of its 3 files .*: {SHARD.format(1)}'):
    copies.copy(store / 'a', tmp_path / 'new')
  files.pipe_file(f'{key}/{SHARD.format(1)}', (dataset / SHARD.format(1)).read_bytes()[:1000])
  with pytest.raises(ValueError, match=f'{store}/a/{SHARD.format(1)}: .*cut off.* says 2 records'):
    copies.copy(store / 'a', tmp_path / 'new')
  assert not (tmp_path / 'new' / schema.INFO_FILE).exists() and not (tmp_path / 'new' / SHARD.format(1)).exists()
  few = write_set(tmp_path / 'few', examples=range(3))
  files.pipe_file(f'{key}/{SHARD.format(1)}', (few / SHARD.format(1)).read_bytes())
  with pytest.raises(ValueError, match=f'{store}/a/{SHARD.format(1)}: 1 records; .* says 2 records'):
    copies.copy(store / 'a', tmp_path / 'new')
  files.pipe_file(f'{key}/{schema.INFO_FILE}', b'{"splits": 3')
  with pytest.raises(ValueError, match=f'{store}/a/{schema.INFO_FILE} is damaged'):
    copies.copy(store / 'a', tmp_path / 'new')
  (dataset / SHARD.format(2)).write_bytes((few / SHARD.format(2)).read_bytes())
  with pytest.raises(ValueError, match=f'{dataset}/{SHARD.format(2)}: 1 records'):
    copies.copy(dataset, store / 'b')
  assert not content(store / 'b')


def test_a_source_that_has_changed(dataset, store, tmp_path):
  copies.copy(dataset, store)
  copies.copy(store, tmp_path / 'new')
  changed = bytearray((dataset / 'features.json').read_bytes())
  changed[-2:] = b' }'  # of equal size
  files, key = store.backend()
  files.pipe_file(f'{key}/features.json', bytes(changed))
  (tmp_path / 'new' / 'stray').write_bytes(b'x')
  with pytest.raises(FileExistsError, match=r'older state of memory://.*: 1 files have changed there \(features.json\)'):
    copies.copy(store, tmp_path / 'new')
  assert copies.copy(store, tmp_path / 'new', overwrite=True).kept == 4  # but for that file, and the one that is last
  assert content(tmp_path / 'new') == content(store) and content(store)['features.json'] == bytes(changed)


def test_what_is_in_the_way(dataset, store, tmp_path):
  copies.copy(dataset, store)
  (tmp_path / 'thesis').mkdir()
  (tmp_path / 'thesis' / 'a.tex').write_text('x')
  with pytest.raises(FileExistsError, match=r'thesis exists and is not a data set \(a.tex\)'):
    copies.copy(store, tmp_path / 'thesis', overwrite=True)
  other = write_set(tmp_path / 'other', examples=range(9))
  with pytest.raises(FileExistsError, match='holds another data set'):
    copies.copy(store, other)
  assert len(records(other)) == 9
  copies.copy(store, other, overwrite=True)
  assert content(other) == content(dataset)
  by_hand = shutil.copytree(dataset, tmp_path / 'by_hand')
  assert copies.copy(store, by_hand).kept == 6
  with pytest.raises(ValueError, match='onto itself'):
    copies.copy(store, f'{store}/')


def test_space_is_looked_at_first(dataset, store, got, tmp_path, monkeypatch):
  copies.copy(dataset, store)
  monkeypatch.setattr(shutil, 'disk_usage', lambda _: types.SimpleNamespace(free=1 << 20))
  with pytest.raises(storage.StorageError, match='new: memory://.* needs 1 MiB more, and 1 MiB are free'):
    copies.copy(store, tmp_path / 'new')
  assert not got.names and not (tmp_path / 'new').exists()
  other = write_set(tmp_path / 'other', examples=range(9))
  (other / 'stray').write_bytes(b'x')
  before = content(other)
  with pytest.raises(storage.StorageError, match='needs 1 MiB more'):
    copies.copy(store, other, overwrite=True)
  assert content(other) == before and len(records(other)) == 9


# --- the cache


def test_a_data_set_in_a_store_is_read_from_a_copy(dataset, store, got, cache):
  copies.copy(dataset, store)
  assert records(str(store)) == records(dataset) and sources.read_meta(f'{store}/') == schema.read_meta(dataset)
  assert collections.Counter(got.names) == dict.fromkeys(content(dataset), 1)
  copy, = (p for p in cache.iterdir() if p.is_dir())
  assert content(copy) == content(dataset)
  assert spec.absolute(str(store)) == str(store)
  location._cached.cache_clear()
  (copy / SHARD.format(0)).unlink()  # somebody made room
  assert records(str(store)) == records(dataset) and got.names[-2:] == [SHARD.format(0), schema.INFO_FILE]


def test_a_cached_copy_follows_its_source(dataset, store, cache, tmp_path, caplog):
  copies.copy(dataset, store)
  first = location.check_dataset_dir(str(store))
  copies.copy(write_set(tmp_path / 'longer', examples=range(9)), store, overwrite=True)
  assert location.check_dataset_dir(str(store)) == first  # one process sees one state
  location._cached.cache_clear()
  second = location.check_dataset_dir(str(store))
  assert second != first and len(records(second)) == 9 and len(records(first)) == 7
  assert f'{store} has changed since it was copied' in caplog.text and schema.INFO_FILE in caplog.text
  assert str(first) in caplog.text


def test_a_cache_that_cannot_be_written(dataset, store, tmp_path, monkeypatch):
  copies.copy(dataset, store)
  (tmp_path / 'file').write_text('x')
  monkeypatch.setenv(location.CACHE, str(tmp_path / 'file' / 'cache'))
  with pytest.raises(PermissionError, match='data.cache or .CLOC_DATA_CACHE. cannot be written: .*file'):
    sources.read_meta(str(store))


# What a process does: every file that it fetches is a line of the log, and is fetched slowly.
CHILD = '''
import sys, time
import fsspec
from cloc_jax.data import copies, location
url, log, sleep = sys.argv[1], sys.argv[2], float(sys.argv[3])
kind = fsspec.get_filesystem_class('file')
get_file = kind.get_file
def slow(self, source, target, **more):
  get_file(self, source, target, **more)
  with open(log, 'a') as file:
    file.write(source.rpartition('/')[2] + '\\n')
  time.sleep(sleep)
kind.get_file = slow
copies._IN_FLIGHT = 2
print(location.check_dataset_dir(url))
'''


def child(dataset, log, sleep):
  return subprocess.Popen([sys.executable, '-c', CHILD, f'file://{dataset}', str(log), str(sleep)], text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=pathlib.Path(__file__).parents[2])


def test_two_processes_copy_once(dataset, cache, tmp_path):
  running = [child(dataset, tmp_path / 'log', 0.3) for _ in range(2)]
  said = [process.communicate(timeout=60) for process in running]
  assert [process.returncode for process in running] == [0, 0], said
  folder, other = (pathlib.Path(out.strip()) for out, _ in said)
  assert folder == other and content(folder) == content(dataset)
  assert collections.Counter((tmp_path / 'log').read_text().split()) == dict.fromkeys(content(dataset), 1)
  assert folder.parent == cache


def test_a_killed_process_blocks_nobody(dataset, cache, tmp_path):
  log = tmp_path / 'log'
  process = child(dataset, log, 600)
  deadline = time.monotonic() + 60
  while not (log.exists() and log.read_text().count('\n') == 2) and time.monotonic() < deadline:
    time.sleep(0.02)
  process.kill()
  process.communicate(timeout=60)
  copy, = (p for p in cache.iterdir() if p.is_dir())
  assert not content(copy)  # what was on its way has no name yet
  assert records(f'file://{dataset}') == records(dataset)
  assert content(copy) == content(dataset) and not list(copy.glob('.*.part'))
