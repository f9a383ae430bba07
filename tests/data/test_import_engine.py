"""The import engine with a made-up importer: the same bytes by any number of workers, taken up again, all counted."""
from collections.abc import Iterator
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
from painted_pictures import encode_png
import pytest
import tensorflow_datasets as tfds

from cloc_jax.data import schema
from cloc_jax.data import sources
from cloc_jax.data.importers import counts as counts_lib
from cloc_jax.data.importers import engine
from cloc_jax.data.importers import progress

PIXELS = encode_png(np.zeros((4, 6, 3), np.uint8))


@dataclasses.dataclass
class Numbers(engine.Importer):
  """`tasks` tasks of `size` images named by their number; `folder` holds what they read and what they leave behind.

  A file NUMBER.missing makes that image missing; a file `stop` makes task 2 fail, a file `die` ends its process; task
  `empty` has no images.
  """
  folder: str
  tasks: int = 4
  size: int = 3
  name: str = 'numbers'
  empty: int = -1

  def files(self):
    return [pathlib.Path(self.folder) / 'index']

  def splits(self):
    return {'train': [engine.Task(f'task {i}', i, images=self.size) for i in range(self.tasks)],
            'val': [engine.Task('the only one', 100, images=self.size)]}

  def counts(self):
    found = counts_lib.Counts()
    found.dropped('boxes', 'of an image not listed', 'box 5', 2)
    return {'train': found}

  def read(self, task, report) -> Iterator[schema.Example]:
    folder = pathlib.Path(self.folder)
    with open(folder / 'log', 'a') as log:
      log.write(f'{task.label}\n')
    if task.payload == 2 and (folder / 'stop').exists():
      raise ValueError('index: number 2 is bad')
    if task.payload == 2 and (folder / 'die').exists():
      os._exit(1)
    for i in range(0 if task.payload == self.empty else self.size):
      number = self.size * task.payload + i
      flag = folder / f'{number}.missing'
      if flag.exists():
        report.lost_image(f'{number}', 'missing', path=flag)
        continue
      report.kept('images')
      report.dropped('boxes', 'crowd', f'box of {number}')
      yield schema.Example(image=PIXELS, image_id=str(number), height=4, width=6, captions=('zero',))

  def meta(self):
    return schema.DatasetMeta(name=self.name, extra={'provenance': 'counting'})


@pytest.fixture(name='importer')
def importer_fixture(tmp_path):
  folder = tmp_path / 'source'
  folder.mkdir()
  (folder / 'index').write_text('1')
  return Numbers(str(folder))


def log(importer):
  path = pathlib.Path(importer.folder) / 'log'
  lines = path.read_text().split('\n')[:-1] if path.exists() else []
  path.unlink(missing_ok=True)
  return lines


def ids(path, split='train'):
  source = sources.RecordSource(path, split=split)
  return [source[i].image_id for i in range(len(source))]


def contents(path):
  return {p.name: p.read_bytes() for p in sorted(path.iterdir())}


def test_every_task_is_a_shard(importer, tmp_path):
  found = engine.run(importer, out=tmp_path / 'out')
  assert ids(tmp_path / 'out') == [str(i) for i in range(12)] and ids(tmp_path / 'out', 'val') == ['300', '301', '302']
  assert log(importer) == ['task 0', 'task 1', 'task 2', 'task 3', 'the only one']
  builder = tfds.builder_from_directory(tmp_path / 'out')
  assert builder.info.splits['train'].shard_lengths == [3, 3, 3, 3]
  assert found['train'].of('images', 'kept') == 12 and found['train'].of('boxes') == 14
  meta = schema.read_meta(tmp_path / 'out')
  assert meta.extra['provenance'] == 'counting'
  assert {s: counts_lib.Counts.from_json(c) for s, c in meta.extra['counts'].items()} == found
  assert not (tmp_path / 'out.incomplete').exists() and sorted(p.name for p in tmp_path.iterdir()) == ['out', 'source']


def test_worker_processes_change_nothing(importer, tmp_path):
  alone = engine.run(importer, out=tmp_path / 'alone')
  together = engine.run(importer, out=tmp_path / 'together', workers=2)
  assert alone == together
  assert contents(tmp_path / 'alone') == contents(tmp_path / 'together')


def test_what_was_done_is_not_done_again(importer, tmp_path):
  stop = pathlib.Path(importer.folder) / 'stop'
  stop.write_text('')
  with pytest.raises(ValueError, match='number 2 is bad'):
    engine.run(importer, out=tmp_path / 'out')
  assert not (tmp_path / 'out').exists() and log(importer) == ['task 0', 'task 1', 'task 2']
  stop.unlink()
  found = engine.run(importer, out=tmp_path / 'out')
  assert log(importer) == ['task 2', 'task 3', 'the only one']
  fresh = engine.run(importer, out=tmp_path / 'fresh')
  assert found == fresh and contents(tmp_path / 'out') == contents(tmp_path / 'fresh')


@pytest.mark.slow
def test_a_worker_that_fails_names_its_error_and_keeps_the_rest(importer, tmp_path):
  stop = pathlib.Path(importer.folder) / 'stop'
  stop.write_text('')
  with pytest.raises(ValueError, match='number 2 is bad'):
    engine.run(importer, out=tmp_path / 'out', workers=2)
  first = set(log(importer)) - {'task 2'}
  stop.unlink()
  engine.run(importer, out=tmp_path / 'out')
  assert 'task 2' in (second := log(importer)) and not first & set(second) and first


@pytest.mark.slow
def test_a_worker_that_dies_is_told_of(importer, tmp_path):
  die = pathlib.Path(importer.folder) / 'die'
  die.write_text('')
  with pytest.raises(RuntimeError, match='a worker process died .*kept in .*out.incomplete: run the same again'):
    engine.run(importer, out=tmp_path / 'out', workers=2)
  die.unlink()
  engine.run(importer, out=tmp_path / 'out')
  assert len(ids(tmp_path / 'out')) == 12


def test_a_half_written_shard_is_written_again(importer, tmp_path):
  stop = pathlib.Path(importer.folder) / 'stop'
  stop.write_text('')
  with pytest.raises(ValueError):
    engine.run(importer, out=tmp_path / 'out')
  shard = tmp_path / 'out.incomplete' / 'train-00001.array_record'
  shard.write_bytes(shard.read_bytes()[:-1])
  stop.unlink()
  engine.run(importer, out=tmp_path / 'out')
  assert log(importer)[3:] == ['task 1', 'task 2', 'task 3', 'the only one'] and len(ids(tmp_path / 'out')) == 12


def test_a_killed_import_goes_on(importer, tmp_path):
  """A process that is killed in the middle of a task, twice in the same place, and the run that ends it."""
  code = (f'import sys; sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})\n'
          'import os, test_import_engine as t\n'
          'class Dies(t.Numbers):\n'
          '  def read(self, task, report):\n'
          '    for example in super().read(task, report):\n'
          '      yield example\n'
          '      if task.payload == 2: os.kill(os.getpid(), 9)\n'
          'Dies.__module__, Dies.__qualname__ = t.Numbers.__module__, t.Numbers.__qualname__\n'
          't.engine.pickle.loads = lambda _: Dies(*sys.argv[1:2])\n'
          't.engine.run(t.Numbers(*sys.argv[1:2]), out=sys.argv[2])\n')
  for expected in (['task 0', 'task 1', 'task 2'], ['task 2']):
    done = subprocess.run([sys.executable, '-c', code, importer.folder, str(tmp_path / 'out')], capture_output=True,
                          text=True, check=False, timeout=100)
    assert done.returncode == -9, done.stderr
    assert log(importer) == expected
  engine.run(importer, out=tmp_path / 'out')
  assert log(importer) == ['task 2', 'task 3', 'the only one']
  engine.run(importer, out=tmp_path / 'fresh')
  assert contents(tmp_path / 'out') == contents(tmp_path / 'fresh')


def stopped(importer, tmp_path):
  stop = pathlib.Path(importer.folder) / 'stop'
  stop.write_text('')
  with pytest.raises(ValueError):
    engine.run(importer, out=tmp_path / 'out')
  stop.unlink()
  log(importer)


def test_other_arguments_are_not_mixed_in(importer, tmp_path):
  stopped(importer, tmp_path)
  other = dataclasses.replace(importer, size=5)
  with pytest.raises(FileExistsError, match=r'--overwrite starts anew. What changed: argument size: 3 → 5$'):
    engine.run(other, out=tmp_path / 'out')
  assert log(importer) == []
  engine.run(other, out=tmp_path / 'out', overwrite=True)
  assert len(ids(tmp_path / 'out')) == 20


def test_a_changed_source_is_not_mixed_in(importer, tmp_path):
  stopped(importer, tmp_path)
  (pathlib.Path(importer.folder) / 'index').write_text('other')
  with pytest.raises(FileExistsError, match=r'What changed: file .*/index: 1 bytes.* → 5 bytes'):
    engine.run(importer, out=tmp_path / 'out')


def test_a_failure_before_any_shard_leaves_nothing_behind(importer, tmp_path):
  def fail(_):
    raise ValueError('index: no numbers')
  with pytest.raises(ValueError, match='no numbers'), pytest.MonkeyPatch.context() as patch:
    patch.setattr(Numbers, 'splits', fail)
    engine.run(importer, out=tmp_path / 'out')
  assert not (tmp_path / 'out.incomplete').exists()
  with pytest.raises(FileNotFoundError, match='no such file: .*/nowhere/index'):
    engine.run(Numbers('/nowhere'), out=tmp_path / 'out')


def missing(importer, numbers):
  for number in numbers:
    (pathlib.Path(importer.folder) / f'{number}.missing').write_text('')


def test_too_many_missing_images(importer, tmp_path):
  missing(importer, range(1, 12))
  with pytest.raises(FileNotFoundError) as error:
    engine.run(importer, out=tmp_path / 'out')
  text = str(error.value)
  assert text.startswith('2 of 15 images (or more: the import stopped there) are missing or unreadable, more than 1.0%')
  assert '\n  1: missing\n  2: missing' in text and log(importer) == ['task 0']
  with pytest.raises(FileNotFoundError, match='11 of 15 images') as error:
    engine.run(importer, out=tmp_path / 'out', max_error_share=0.7)
  assert str(error.value).count(': missing') == 10 and '… and 1 more' in str(error.value)
  # What was read is kept; shards without an image go.
  found = engine.run(importer, out=tmp_path / 'out', allow_missing=True)
  assert log(importer)[-1] == 'the only one' and ids(tmp_path / 'out') == ['0']
  assert (found['train'].of('images', 'dropped', 'missing'), found['train'].of('images')) == (11, 12)
  assert len(found['train'].examples('images', 'dropped', 'missing')) == 10
  assert tfds.builder_from_directory(tmp_path / 'out').info.splits['train'].num_shards == 1


def test_few_missing_images_are_left_out(importer, tmp_path):
  missing(importer, [4])
  found = engine.run(importer, out=tmp_path / 'out', max_error_share=0.1)
  assert len(ids(tmp_path / 'out')) == 11 and found['train'].examples('images', 'dropped', 'missing') == ['4']


def test_an_image_that_came_back_is_read(importer, tmp_path):
  missing(importer, [1, 7])
  with pytest.raises(FileNotFoundError):
    engine.run(importer, out=tmp_path / 'out')
  log(importer)
  (pathlib.Path(importer.folder) / '1.missing').unlink()
  engine.run(importer, out=tmp_path / 'out', allow_missing=True)
  assert ids(tmp_path / 'out') == [str(i) for i in range(12) if i != 7] and log(importer)[0] == 'task 0'


def test_empty_shards_are_dropped(importer, tmp_path):
  engine.run(dataclasses.replace(importer, empty=1), out=tmp_path / 'out')
  assert tfds.builder_from_directory(tmp_path / 'out').info.splits['train'].shard_lengths == [3, 3, 3]
  with pytest.raises(ValueError, match="split 'val' .* has no examples"):
    engine.run(dataclasses.replace(importer, empty=100), out=tmp_path / 'none')


def test_a_data_set_is_not_replaced_unasked(importer, tmp_path):
  engine.run(importer, out=tmp_path / 'out')
  log(importer)
  with pytest.raises(FileExistsError, match='holds a data set already'):
    engine.run(importer, out=tmp_path / 'out')
  assert log(importer) == []
  engine.run(dataclasses.replace(importer, tasks=1), out=tmp_path / 'out', overwrite=True)
  assert len(ids(tmp_path / 'out')) == 3


def test_two_imports_into_one_folder(importer, tmp_path):
  def splits(_):
    with pytest.raises(FileExistsError, match='another process is importing into'):
      engine.run(importer, out=tmp_path / 'out')
    raise ValueError('seen')
  with pytest.raises(ValueError, match='seen'), pytest.MonkeyPatch.context() as patch:
    patch.setattr(Numbers, 'splits', splits)
    engine.run(importer, out=tmp_path / 'out')


def test_progress_is_shown_in_lines_where_there_is_no_terminal(importer, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(progress, '_SECONDS_BETWEEN_LINES', -1)
  monkeypatch.setattr(time, 'monotonic', iter(range(0, 1000)).__next__)
  engine.run(importer, out=tmp_path / 'out', progress=True)
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 5 and lines[1].startswith('6 of 15 images, 3/s, 0 min left')
  engine.run(importer, out=tmp_path / 'quiet')
  assert capsys.readouterr().err == ''


# --- counts


def test_counts_add_up_and_come_back_from_json():
  first, second = counts_lib.Counts(), counts_lib.Counts()
  first.kept('boxes', 5)
  first.repaired('boxes', 'cut', 'a')
  second.repaired('boxes', 'cut', 'b', 2)
  for i in range(20):
    second.dropped('captions', 'blank', f'c{i}')
  second.noted('images', 'without boxes', 'd')
  second.dropped('boxes', 'nothing at all', 'e', 0)
  first.merge(second)
  assert (first.of('boxes'), first.written('boxes'), first.of('boxes', 'repaired')) == (8, 8, 3)
  assert first.examples('boxes', 'repaired', 'cut') == ['a', 'b'] and first.of('images') == 0
  assert first.examples('captions', 'dropped', 'blank') == [f'c{i}' for i in range(10)]
  assert first.of('captions', 'dropped', 'blank') == 20 and ('boxes', 'dropped', 'nothing at all') not in first.rows()
  assert counts_lib.Counts.from_json(json.loads(json.dumps(first.to_json()))) == first
  text = counts_lib.table({'train': first, 'val': second})
  assert [line.split() for line in text.splitlines()[1:4]] == [
      ['images', 'noted:', 'without', 'boxes', '1', '1'], ['boxes', 'kept', '5', '0'],
      ['boxes', 'repaired:', 'cut', '3', '2']]
  assert 'captions dropped, blank: c0, c1, c2, …' in text
