"""SOURCE → units → images, for every kind of source."""
import dataclasses
import io
import json
import tarfile

import numpy as np
from PIL import Image
import pytest

import label_jobs
from cloc_jax.data import schema
from cloc_jax.label import inputs
from cloc_jax.label import work


def jpeg(seed=0):
  data = io.BytesIO()
  Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 12, 3)).astype(np.uint8)).save(data, 'JPEG')
  return data.getvalue()


def write_tar(path, members):
  with tarfile.open(path, 'w') as tar:
    for name, data in members.items():
      info = tarfile.TarInfo(name)
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))


def read_all(units, **settings):
  """[(unit, part, last, image ids, failures)] of all shards."""
  settings = dict(shard_size=2, text_keys=inputs.TEXT_KEYS) | settings
  return [(shard.unit, shard.part, shard.last, [item.example.image_id for item in shard.items],
           [(f.id, f.stage) for f in shard.failures])
          for index, unit in enumerate(units) for shard in work.read(unit, index, **settings)]


def texts(units):
  return {item.example.image_id: item.example.captions for index, unit in enumerate(units)
          for shard in work.read(unit, index, shard_size=99, text_keys=inputs.TEXT_KEYS) for item in shard.items}


def test_a_folder_of_images(tmp_path):
  label_jobs.write_photos(tmp_path / 'b', 2)
  label_jobs.write_photos(tmp_path / 'a' / 'deep', 3, broken=(1,), alt_texts=False)
  (tmp_path / '.hidden.jpg').write_bytes(b'')
  units = inputs.plan([tmp_path], shard_size=2)
  assert [unit.paths for unit in units] == [('a/deep/0000.jpg', 'a/deep/0001.jpg'), ('a/deep/0002.jpg', 'b/0000.jpg'),
                                            ('b/0001.jpg',)]
  assert read_all(units) == [
      (0, 0, True, ['a/deep/0000.jpg'], [('a/deep/0001.jpg', 'read')]),
      (1, 0, True, ['a/deep/0002.jpg', 'b/0000.jpg'], []), (2, 0, True, ['b/0001.jpg'], [])]
  (tmp_path / 'b' / '0000.txt').write_bytes(b'\xff')
  assert read_all(units)[1] == (1, 0, True, ['a/deep/0002.jpg'], [('b/0000.jpg', 'read')])
  assert texts(units)['b/0001.jpg'] == ('alt-text 1', 'second line 1') and texts(units)['a/deep/0000.jpg'] == ()


def test_archives_are_cut_into_shards_without_being_counted_first(tmp_path):
  write_tar(tmp_path / '00000.tar', {f'{i}.{kind}': data for i in range(5) for kind, data in
                                     (('jpg', jpeg(i)), ('txt', b'text'), ('json', b'{"caption": "other"}'))})
  write_tar(tmp_path / '00001.tar', {'0.jpg': jpeg(), '1.jpg': b'none', '2.txt': b'alone'})
  (tmp_path / '00000.parquet').write_bytes(b"img2dataset's table beside the archive")
  units = inputs.plan([tmp_path])
  assert [(unit.kind, unit.images) for unit in units] == [('tar', None)] * 2
  assert read_all(units) == [
      (0, 0, False, ['00000/0', '00000/1'], []), (0, 1, False, ['00000/2', '00000/3'], []),
      (0, 2, True, ['00000/4'], []),
      (1, 0, True, ['00001/0'], [('00001/1', 'read'), ('00001/2', 'read')])]
  assert read_all(units[:1], done=frozenset({0, 2})) == [(0, 1, False, ['00000/2', '00000/3'], [])]
  assert texts(units)['00000/3'] == ('text', 'other')
  # A number of images that the shards divide: the last full one knows that it is the last.
  assert read_all(units[:1], shard_size=5) == [(0, 0, True, [f'00000/{i}' for i in range(5)], [])]
  assert [unit.label for unit in inputs.plan([tmp_path / '0*1.tar'])] == [units[1].label]


def test_an_archive_that_is_cut_off_gives_what_is_before_the_cut(tmp_path):
  write_tar(tmp_path / 'x.tar', {f'{i}.jpg': jpeg(i) for i in range(6)})
  whole = (tmp_path / 'x.tar').read_bytes()
  (tmp_path / 'x.tar').write_bytes(whole[:len(whole) // 3])
  unit, = inputs.plan([tmp_path])
  *first, (_, _, last, _, failures) = read_all([unit])
  assert last and failures[-1][1] == 'source' and not any(f for *_, f in first)


def test_rows(tmp_path):
  pa = pytest.importorskip('pyarrow')
  from pyarrow import parquet
  rows = [{'image': {'bytes': jpeg(i), 'path': f'{i}.jpg'}, 'caption': f'text {i}',
           'regions': [{'box': [0.0, 0.0, 1.0, 1.0], 'caption': 'old'}]} for i in range(3)]
  parquet.write_table(pa.Table.from_pylist(rows), tmp_path / 'part.parquet')
  units = inputs.plan([tmp_path])
  assert [(part, last, len(ids)) for _, part, last, ids, _ in read_all(units)] == [(0, False, 2), (1, True, 1)]
  shard, = work.read(units[0], 0, shard_size=9, text_keys=inputs.TEXT_KEYS)
  found = [(item.example.captions, item.example.regions) for item in shard.items]
  assert found == [((f'text {i}',), ()) for i in range(3)]


def test_a_data_set_of_ours_and_of_others(tmp_path):
  examples = [schema.Example(image=jpeg(i), image_id=f'id {i}', height=9, width=12, captions=(f'text {i}',),
                             regions=(schema.Region((0, 0, 1, 1), 'old'),)) for i in range(3)]
  schema.write_dataset(tmp_path / 'ours', meta=schema.DatasetMeta('ours'),
                       splits={'train': examples, 'val': examples[:1]})
  assert texts(inputs.plan([tmp_path / 'ours'])) == {f'id {i}': (f'text {i}',) for i in range(3)}
  assert texts(inputs.plan([tmp_path / 'ours'], split='val')) == {'id 0': ('text 0',)}
  with pytest.raises(ValueError, match=r"split 'test'; it has \['train', 'val'\]"):
    inputs.plan([tmp_path / 'ours'], split='test')


def test_any_data_set_of_tfds_with_its_texts_and_without_its_boxes(tmp_path):
  """As coco_captions has them: texts in a list of dictionaries, boxes that nothing says the names of."""
  import tensorflow_datasets as tfds
  f = tfds.features
  features = f.FeaturesDict({
      'image': f.Image(encoding_format='jpeg'), 'image/id': np.int64, 'alt_text': f.Text(),
      'captions': f.Sequence({'id': np.int64, 'text': f.Text()}), 'objects': f.Sequence({'bbox': f.BBoxFeature()})})
  root = tmp_path / 'theirs' / '1.0.0'
  root.mkdir(parents=True)
  template = tfds.core.ShardedFileTemplate(data_dir=root, dataset_name='other', split='train',
                                           filetype_suffix='array_record')
  for shard, rows in enumerate([(0, 1), (2,)]):
    writer = schema.shard_writer(template.sharded_filepath(shard_index=shard, num_shards=2))
    for i in rows:
      writer.write(features.serialize_example({
          'image': io.BytesIO(jpeg(i)), 'image/id': 100 + i, 'alt_text': f'alt {i}',
          'captions': [{'id': 1, 'text': f'one {i}'}, {'id': 2, 'text': f'two {i}'}],
          'objects': [{'bbox': f.BBox(0.1, 0.2, 0.3, 0.4)}]}))
    writer.close()
  info = tfds.core.SplitInfo(name='train', shard_lengths=[2, 1], num_bytes=1, filename_template=template)
  tfds.folder_dataset.write_metadata(data_dir=root, features=features, split_infos=[info], version='1.0.0',
                                     check_data=False, description='')
  units = inputs.plan([root])
  assert [unit.images for unit in units] == [2, 1]
  assert read_all(units) == [(0, 0, True, ['100', '101'], []), (1, 0, True, ['102'], [])]
  assert texts(units) == {str(100 + i): (f'alt {i}',) for i in range(3)}  # what text_keys name
  shard, = work.read(units[1], 1, shard_size=9, text_keys=('caption',))
  assert [item.example.captions for item in shard.items] == [('one 2', 'two 2')]  # or what such data sets usually have
  assert not shard.items[0].example.regions
  with pytest.raises(ValueError, match="no split 'test'"):
    inputs.plan([root], split='test')


def test_patterns_and_streams_of_a_store(tmp_path):
  files = pytest.importorskip('fsspec').filesystem('memory')
  for folder in ('a', 'b'):
    (tmp_path / folder).mkdir()
    write_tar(tmp_path / folder / f'{folder}.tar', {'0.jpg': jpeg(), '0.txt': b'text'})
  assert [unit.paths for unit in inputs.plan([tmp_path / '*' / '?.tar'])] == [
      (f'{tmp_path}/a/a.tar',), (f'{tmp_path}/b/b.tar',)]
  files.put(str(tmp_path / 'a'), '/inputs/a', recursive=True)
  label_jobs.write_photos(tmp_path / 'photos', 2)
  files.put(str(tmp_path / 'photos'), '/inputs/photos', recursive=True)
  files.pipe('/inputs/photos/rows.jsonl', b'{"image": "0001.jpg", "caption": "row"}\n')
  try:
    for source in ('memory://inputs/a', 'memory://inputs/a/*.tar', 'memory://inputs/a/a.tar'):
      assert texts(inputs.plan([source])) == {'a/0': ('text',)}
    assert list(texts(inputs.plan(['memory://inputs/photos/*.jpg']))) == ['0000.jpg', '0001.jpg']
    assert list(texts(inputs.plan(['memory://inputs/photos/rows.jsonl'])).values()) == [('row',)]
    with pytest.raises(FileNotFoundError, match='memory://inputs/nothing'):
      inputs.plan(['memory://inputs/nothing'])
  finally:
    files.rm('/inputs', recursive=True)


def test_an_id_that_comes_twice_in_a_file_is_reported(tmp_path):
  rows = [{'image': '0000.jpg', 'image_id': 'same'}, {'image': '0001.jpg', 'image_id': 'same'}]
  label_jobs.write_photos(tmp_path / 'photos', 2)
  (tmp_path / 'photos' / 'rows.jsonl').write_text('\n'.join(map(json.dumps, rows)) + '\n')
  unit, = inputs.plan([tmp_path / 'photos' / 'rows.jsonl'])
  assert read_all([unit]) == [(0, 0, True, ['same'], [('same', 'read')])]


def test_what_is_no_source_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match='nowhere'):
    inputs.plan([tmp_path / 'nowhere'])
  (tmp_path / 'notes.md').write_text('x')
  with pytest.raises(ValueError, match=r"expected images, .tar.*found \['notes.md'\]"):
    inputs.plan([tmp_path])
  label_jobs.write_photos(tmp_path, 1)
  write_tar(tmp_path / 'a.tar', {'0.jpg': jpeg()})
  with pytest.raises(ValueError, match=r'several kinds of input.*1 tar \(a.tar …\), 1 images'):
    inputs.plan([tmp_path])
  (tmp_path / 'b').mkdir()
  write_tar(tmp_path / 'b' / 'a.tar', {'0.jpg': jpeg()})
  with pytest.raises(ValueError, match="two input files are called 'a.tar'"):
    inputs.plan([tmp_path / 'a.tar', tmp_path / 'b' / 'a.tar'])
  label_jobs.write_photos(tmp_path / 'c', 1)
  with pytest.raises(ValueError, match="two images are called '0000.jpg'"):
    inputs.plan([tmp_path / 'c', tmp_path / '0000.jpg'])


def test_a_changed_file_changes_its_label(tmp_path):
  write_tar(tmp_path / 'a.tar', {'0.jpg': jpeg()})
  before, = inputs.plan([tmp_path])
  write_tar(tmp_path / 'a.tar', {'0.jpg': jpeg(), '1.jpg': jpeg()})
  after, = inputs.plan([tmp_path])
  assert before.label != after.label and dataclasses.replace(before, label='') == dataclasses.replace(after, label='')
