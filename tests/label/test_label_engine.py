"""Whole runs in this process: what is written, taking up again, errors, the caption cache, object stores."""
import json
import multiprocessing
import pathlib
import shutil

import pytest

import label_jobs
from cloc_jax.data import schema
from cloc_jax.data import sources
from cloc_jax.data import validate
from cloc_jax.label import engine
from cloc_jax.label import report
from cloc_jax.label import scripted
from cloc_jax.label import folders


class Counting(scripted.Captioner):
  """Notes whom it was asked about; stops the whole run, as a killed process would, at the image `stop`."""
  asked: list[str] = []
  stop = ''

  def caption(self, pictures):
    if any(picture.image_id == self.stop for picture in pictures):
      raise KeyboardInterrupt
    Counting.asked += [picture.image_id for picture in pictures]
    return super().caption(pictures)


@pytest.fixture(name='counting')
def counting_fixture(monkeypatch):
  monkeypatch.setattr(Counting, 'asked', [])
  monkeypatch.setattr(Counting, 'stop', '')
  return {'spec': 'python:test_label_engine:Counting'}


def partial_files(folder):
  return [path for path in pathlib.Path(folder).rglob('*') if folders.PARTIAL in path.name]


def test_two_broken_images_of_two_hundred(tmp_path):
  photos = label_jobs.write_photos(tmp_path / 'in', 200, broken=(17, 113))
  outcome = engine.run(label_jobs.job(photos, tmp_path / 'out', shard_size=32))
  found = label_jobs.records(tmp_path / 'out')
  assert [example.image_id for example in found] == [f'{i:04}.jpg' for i in range(200) if i not in (17, 113)]
  errors = [json.loads(line) for line in (tmp_path / 'out' / 'errors.jsonl').read_text().splitlines()]
  assert [(error['id'], error['stage']) for error in errors] == [('0017.jpg', 'read'), ('0113.jpg', 'decode')]
  assert 'no image' in errors[0]['message'] and 'cannot be decoded' in errors[1]['message']
  assert (outcome.summary.counts['images'], outcome.summary.counts['written']) == (200, 198)
  assert len(list((tmp_path / 'out').glob('vesl-train.array_record-*-of-00007'))) == 7
  assert not (tmp_path / 'out.incomplete').exists()

  # Against the scripts, asked directly.
  captioner, phrases, detector = scripted.Captioner(), scripted.Phrases(), scripted.Detector()
  for example in found[::23]:
    from cloc_jax.data import transforms
    from cloc_jax.label import stages
    picture = stages.Picture(example.image_id, transforms.decode(example.image, where=''), ())
    caption, = captioner.caption([picture])
    queries = phrases.phrases(caption, ())
    expected, = detector.detect([picture], [queries])
    assert example.captions[0] == caption
    assert [r.caption for r in example.regions] == [queries[d.phrase] for d in expected]
    assert [r.score for r in example.regions] == pytest.approx([d.score for d in expected], abs=1e-7)
    for region, detection in zip(example.regions, expected):
      assert region.box == pytest.approx(detection.box, abs=1e-7)
    assert example.made_by == ('captioner scripted captioner 1', 'phrases scripted phrases 1',
                               'detector scripted detector 1, threshold 0.1')
  checked = validate.validate(tmp_path / 'out')
  assert checked.ok, checked.text()
  assert checked.coverage == {'train': '198 of 200 images of the source; dropped: 1 stage decode, 1 stage read'}
  import tensorflow_datasets as tfds
  theirs = tfds.builder_from_directory(tmp_path / 'out').as_data_source('train')[0]
  assert [text.decode() for text in theirs['made_by']] == list(found[0].made_by)
  assert schema.read_meta(tmp_path / 'out').extra['label']['phrases'] == 'scripted phrases 1'


def test_a_data_set_without_made_by_is_still_read(tmp_path):
  example = schema.Example(image=b'x', image_id='a', height=1, width=1, captions=())
  schema.write_dataset(tmp_path / 'old', meta=schema.DatasetMeta('old'), splits={'train': [example]})
  assert 'made_by' not in json.loads((tmp_path / 'old' / 'features.json').read_text())['featuresDict']['features']
  assert sources.RecordSource(tmp_path / 'old', split='train')[0] == example


@pytest.mark.parametrize('stop', ['0000.jpg', '0013.jpg', '0029.jpg'])
def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(tmp_path, counting, stop):
  photos = label_jobs.write_photos(tmp_path / 'in', 30)
  engine.run(label_jobs.job(photos, tmp_path / 'whole', captioner=counting))
  Counting.asked.clear()
  Counting.stop = stop
  job = label_jobs.job(photos, tmp_path / 'out', captioner=counting)
  with pytest.raises(KeyboardInterrupt):
    engine.run(job)
  assert not (tmp_path / 'out').exists()
  left = tmp_path / 'out.incomplete' / f'000009-00000.array_record{folders.PARTIAL}dead'
  left.write_bytes(b'half')
  Counting.stop = ''
  engine.run(job)
  done = (int(stop[:4]) // 8) * 8  # images of whole shards
  assert sorted(Counting.asked)[:done] == [f'{i:04}.jpg' for i in range(done)]  # none of them twice
  assert label_jobs.digests(tmp_path / 'out') == label_jobs.digests(tmp_path / 'whole')
  assert not partial_files(tmp_path) and not (tmp_path / 'out.incomplete').exists()
  Counting.asked.clear()
  assert engine.run(job).already and not Counting.asked


def test_a_shard_that_is_not_whole_is_done_again(tmp_path, counting):
  photos = label_jobs.write_photos(tmp_path / 'in', 24)
  job = label_jobs.job(photos, tmp_path / 'out', captioner=counting)
  Counting.stop = '0016.jpg'
  with pytest.raises(KeyboardInterrupt):
    engine.run(job)
  shard = tmp_path / 'out.incomplete' / '000001-00000.array_record'
  shard.write_bytes(shard.read_bytes()[:100])
  Counting.stop = ''
  Counting.asked.clear()
  engine.run(job)
  assert sorted(Counting.asked) == [f'{i:04}.jpg' for i in range(8, 24)]
  assert len(label_jobs.records(tmp_path / 'out')) == 24


def test_what_changed_is_named(tmp_path, counting):
  photos = label_jobs.write_photos(tmp_path / 'in', 24)
  Counting.stop = '0010.jpg'
  with pytest.raises(KeyboardInterrupt):
    engine.run(label_jobs.job(photos, tmp_path / 'out', captioner=counting))
  Counting.stop = ''
  changed = label_jobs.job(photos, tmp_path / 'out', captioner=counting, shard_size=9,
                           detector={'spec': label_jobs.SCRIPTED + 'Detector', 'threshold': 0.3})
  with pytest.raises(FileExistsError, match=r'detector: .* 0.1 → .* 0.3; .*shard_size: 8 → 9'):
    engine.run(changed)
  label_jobs.write_photos(tmp_path / 'in', 25)
  with pytest.raises(FileExistsError, match=r'What changed: input: 3 units \w+ → 4 units'):
    engine.run(label_jobs.job(photos, tmp_path / 'out', captioner=counting))
  assert engine.run(changed, overwrite=True).summary.counts['written'] == 25
  with pytest.raises(FileExistsError, match=r'labels of something else.*detector: .* 0.3 → .* 0.1'):
    engine.run(label_jobs.job(photos, tmp_path / 'out', captioner=counting, shard_size=9))


def test_what_is_in_the_way_is_left_alone(tmp_path):
  photos = label_jobs.write_photos(tmp_path / 'in', 1)
  (tmp_path / 'out').mkdir()
  (tmp_path / 'out' / 'thesis.doc').write_text('')
  for overwrite in (False, True):
    with pytest.raises(FileExistsError, match='is not a data set'):
      engine.run(label_jobs.job(photos, tmp_path / 'out'), overwrite=overwrite)
  assert (tmp_path / 'out' / 'thesis.doc').exists()


def test_too_many_errors_stop_the_run_and_can_be_tried_again(tmp_path):
  photos = label_jobs.write_photos(tmp_path / 'in', 40)
  fail = {'spec': label_jobs.SCRIPTED + 'Captioner', 'fail': '3.jpg'}
  job = label_jobs.job(photos, tmp_path / 'out', captioner=fail)
  with pytest.raises(engine.TooManyErrors, match=r'(?s)1 of 8 images.*--retry-errors.*0003.jpg: caption: RuntimeError'):
    engine.run(job)
  # The first shard is complete, and is as bad as before; one may allow that.
  with pytest.raises(engine.TooManyErrors, match='1 of 8 images'):
    engine.run(job)
  with pytest.raises(engine.TooManyErrors, match='1 of 8 images'):
    engine.run(job, max_error_share=0.02)
  assert engine.run(job, max_error_share=0.1).summary.tables['errors'] == {'caption': 4}


def test_failures_that_were_the_captioners_are_tried_again(tmp_path, monkeypatch):
  photos = label_jobs.write_photos(tmp_path / 'in', 20, broken=(2,))

  class Down(scripted.Captioner):
    down = True

    def caption(self, pictures):
      return [TimeoutError('no answer') if self.down and p.image_id == '0012.jpg' else answer
              for p, answer in zip(pictures, super().caption(pictures))]
  monkeypatch.setattr(scripted, 'Captioner', Down)
  job = label_jobs.job(photos, tmp_path / 'out')
  with pytest.raises(engine.TooManyErrors, match='2 of 16'):
    engine.run(job, max_error_share=0.05)
  monkeypatch.setattr(Down, 'down', False)
  outcome = engine.run(job, max_error_share=0.05, retry_errors=True)
  assert outcome.summary.counts['written'] == 19 and outcome.summary.tables['errors'] == {'read': 1}


def test_captions_are_paid_for_once(tmp_path, counting):
  photos = label_jobs.write_photos(tmp_path / 'in', 20)
  cache = str(tmp_path / 'cache')
  Counting.stop = '0012.jpg'  # in the second chunk of the second shard: the first chunk of it is kept
  job = label_jobs.job(photos, tmp_path / 'a', captioner=counting)
  with pytest.raises(KeyboardInterrupt):
    engine.run(job, cache=cache)
  Counting.stop = ''
  first = engine.run(job, cache=cache)
  assert sorted(Counting.asked) == [f'{i:04}.jpg' for i in range(20)]
  assert first.summary.counts['captions_cached'] == 3
  Counting.asked.clear()
  other = label_jobs.job(photos, tmp_path / 'b', captioner=counting,
                         detector={'spec': label_jobs.SCRIPTED + 'Detector', 'threshold': 0.5})
  second = engine.run(other, cache=cache)
  assert not Counting.asked and second.summary.counts['captions_cached'] == 20
  captions = lambda out: [example.captions for example in label_jobs.records(out)]
  assert captions(tmp_path / 'a') == captions(tmp_path / 'b')
  assert sum(path.suffix == '.jsonl' for path in (tmp_path / 'cache').rglob('*')) == 3  # one a shard
  # Another image, or other alt-texts, are other keys.
  (photos / '0004.txt').write_text('new')
  shutil.copy(photos / '0000.jpg', photos / '0005.jpg')
  engine.run(label_jobs.job(photos, tmp_path / 'c', captioner=counting), cache=cache)
  assert Counting.asked == ['0004.jpg', '0005.jpg']


def test_parquet_holds_what_the_records_hold(tmp_path):
  parquet = pytest.importorskip('pyarrow.parquet')
  photos = label_jobs.write_photos(tmp_path / 'in', 20)
  engine.run(label_jobs.job(photos, tmp_path / 'out', parquet=True))
  tables = [parquet.read_table(path) for path in sorted((tmp_path / 'out' / 'parquet').iterdir())]
  rows = [row for table in tables for row in table.to_pylist()]
  for row, example in zip(rows, label_jobs.records(tmp_path / 'out'), strict=True):
    assert (row['image_id'], tuple(row['captions']), tuple(row['made_by'])) == (
        example.image_id, example.captions, example.made_by)
    assert row['image'] == example.image
    assert [(r['caption'], r['score'], tuple(r['box'])) for r in row['regions']] == [
        (r.caption, r.score, r.box) for r in example.regions]


def test_from_and_to_an_object_store(tmp_path):
  fs = pytest.importorskip('fsspec').filesystem('memory')
  photos = label_jobs.write_photos(tmp_path / 'in', 20, broken=(3,))
  engine.run(label_jobs.job(photos, tmp_path / 'out'), max_error_share=0.1)
  fs.put(str(photos), '/bucket/in', recursive=True)
  try:
    job = label_jobs.job('memory://bucket/in', 'memory://bucket/out', parquet=False)
    engine.run(job, cache='memory://bucket/cache', max_error_share=0.1)
    assert engine.run(job, max_error_share=0.1).already
    fs.get('/bucket/out', str(tmp_path / 'copy'), recursive=True)
    assert label_jobs.records(tmp_path / 'copy') == label_jobs.records(tmp_path / 'out')
    assert not fs.exists('/bucket/out.incomplete')
    with pytest.raises(FileExistsError, match='shard_size: 8 → 10'):
      engine.run(label_jobs.job('memory://bucket/in', 'memory://bucket/out', shard_size=10))
    engine.run(label_jobs.job('memory://bucket/in', 'memory://bucket/out', shard_size=10), overwrite=True,
               max_error_share=0.1)
    assert sorted(path.rpartition('/')[2] for path in fs.find('/bucket/out') if 'array_record' in path) == [
        'vesl-train.array_record-00000-of-00002', 'vesl-train.array_record-00001-of-00002']
    # An archive of a store is copied to read it.
    engine.run(label_jobs.job('memory://bucket/out', tmp_path / 'again'))
    assert len(label_jobs.records(tmp_path / 'again')) == 19
    assert report.load('memory://bucket/out').summary.counts['written'] == 19
  finally:
    fs.rm('/bucket', recursive=True)


def _hold(folder, ready, done):
  with engine._alone(folders.Folder(folder)):
    ready.set()
    done.wait(20)


def test_two_processes_do_not_write_the_same(tmp_path):
  photos = label_jobs.write_photos(tmp_path / 'in', 1)
  context = multiprocessing.get_context('spawn')
  ready, done = context.Event(), context.Event()
  process = context.Process(target=_hold, args=(str(tmp_path / 'out.incomplete'), ready, done))
  process.start()
  assert ready.wait(60)
  with pytest.raises(FileExistsError, match='another process is labelling'):
    engine.run(label_jobs.job(photos, tmp_path / 'out'))
  done.set()
  process.join()


def test_what_does_not_change_the_answers_may_change_on_the_way(tmp_path, counting):
  photos = label_jobs.write_photos(tmp_path / 'in', 24)
  Counting.stop = '0010.jpg'
  with pytest.raises(KeyboardInterrupt):
    engine.run(label_jobs.job(photos, tmp_path / 'out', captioner=counting))
  Counting.stop = ''
  slower = counting | {'seconds': 1e-4}
  assert engine.run(label_jobs.job(photos, tmp_path / 'out', captioner=slower, chunk=2)).summary.counts['written'] == 24


@pytest.mark.parametrize('settings, message', [
    ({}, 'no spec'), ({'spec': 'python:cloc_jax.label.scripted:Nobody'}, 'Nobody'),
    ({'spec': 'python:no_such_module:X'}, 'no_such_module'), ({'spec': 'python:cloc_jax.label.scripted'}, 'scripted')])
def test_a_stage_that_is_not_there_is_named(settings, message):
  with pytest.raises(ValueError, match=message):
    engine.build_stage('captioner', settings)


def test_nothing_in_is_an_error(tmp_path):
  photos = label_jobs.write_photos(tmp_path / 'in', 2, broken=(0, 1))
  with pytest.raises(ValueError, match='has no examples'):
    engine.run(label_jobs.job(photos, tmp_path / 'out'), max_error_share=1.0)
