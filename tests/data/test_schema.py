"""Records: what is written is read, by this project and by plain TFDS."""
import concurrent.futures
import dataclasses
import json
import pickle
import shutil
import subprocess
import sys

import numpy as np
from painted_pictures import painted_example
import pytest
import tensorflow_datasets as tfds

from cloc_jax.data import schema
from cloc_jax.data import sources

Region, Example, Meta = schema.Region, schema.Example, schema.DatasetMeta


def example(image_id='a', **changes):
  base = Example(image=b'\x89PNG pretend', image_id=image_id, height=4, width=6, captions=('a caption',),
                 regions=(Region(box=(0, 0, 0.5, 1), caption='thing'),))
  return dataclasses.replace(base, **changes)


def test_a_record_survives_encoding():
  given = Example(
      image=bytes(range(256)), image_id='größe/01.jpg', height=480, width=640, captions=('eins', '', 'a “quoted” one'),
      regions=(Region(box=(0.125, 0.25, 0.5, 0.75), caption='a dog', category='dog', score=0.5, source='coco'),
               Region(box=(0, 0, 1, 1), caption='')))
  assert schema.decode(schema.encode(given), where='here') == given


def test_regions_as_columns_are_a_tuple_of_regions():
  """Everything that a tuple does, a record that was read does too, and it is stored as the tuple is."""
  want = painted_example(3, regions=5).regions
  want = tuple(dataclasses.replace(r, box=tuple(np.float32(r.box).tolist()), score=0.5, source=str(i))
               for i, r in enumerate(want))
  stored = schema.encode(example(regions=want))
  got = schema.decode(stored, where='here').regions
  assert isinstance(got, schema.Regions) and len(got) == 5
  assert got == want and want == got and hash(got) == hash(want) and tuple(got) == want
  assert got != want[:4] and got != list(want) and got == schema.Regions.of(want)
  assert (got[1], got[-1], got[np.int64(2)]) == (want[1], want[-1], want[2])
  assert got[1:4] == want[1:4] and got[::-2] == want[::-2] and isinstance(got[:2], tuple)
  assert tuple(got.take([3, 0])) == (want[3], want[0]) and got.take([]) == ()
  assert want[2] in got and got.index(want[2]) == 2 and repr(want[0]) in repr(got)
  assert schema.encode(example(regions=got)) == stored and pickle.loads(pickle.dumps(got)) == want
  assert all(type(x) is float for x in (*got[0].box, got[0].score))  # as JSON takes them
  with pytest.raises(IndexError):
    got[5]


def test_our_encoding_is_tfds_encoding():
  given = painted_example(3)
  plain = {'image': given.image, 'image_id': given.image_id, 'height': given.height, 'width': given.width,
           'captions': list(given.captions), 'regions': [dataclasses.asdict(r) for r in given.regions]}
  # Not equal as bytes (a map has no order): equal as TFDS reads it, and TFDS's bytes are equal as we read them.
  theirs = schema.features().serialize_example(plain)
  ours = schema.decode(theirs, where='here')
  np.testing.assert_allclose([r.box for r in ours.regions], [r.box for r in given.regions], rtol=1e-6)
  assert schema.encode(ours) is not None and schema.decode(schema.encode(ours), where='') == ours
  assert (ours.captions, ours.image, ours.image_id) == (given.captions, given.image, given.image_id)


def test_plain_tfds_reads_a_data_set(painted):
  builder = tfds.builder_from_directory(painted)
  assert builder.info.description == 'Squares.'
  records = builder.as_data_source('train')
  assert len(records) == 37
  for i in (0, 36):
    want, got = painted_example(i), records[i]
    assert got['image'].shape == (want.height, want.width, 3)
    assert (got['height'], got['width'], got['image_id'].decode()) == (want.height, want.width, want.image_id)
    np.testing.assert_allclose(np.stack(got['regions']['box']), [r.box for r in want.regions], rtol=1e-6)
    assert [c.decode() for c in got['regions']['caption']] == [r.caption for r in want.regions]
    assert [c.decode() for c in got['captions']] == list(want.captions)


def test_plain_tfds_reads_a_record_without_captions_and_regions(write):
  path = write([dataclasses.replace(painted_example(0), captions=(), regions=())])
  got = tfds.builder_from_directory(path).as_data_source('train')[0]
  assert len(got['captions']) == 0 and all(len(values) == 0 for values in got['regions'].values())
  assert sources.RecordSource(path, split='train')[0].regions == ()


def test_a_copied_folder_carries_everything(tmp_path):
  meta = Meta(name='toy', description='Toys.', categories=('cat', 'dog'), unseen_categories=('dog',),
              extra={'license': 'CC0', 'counts': {'train': 3}})
  counts = schema.write_dataset(
      tmp_path / 'first', meta=meta, splits={'train': (example(str(i)) for i in range(3)), 'val': [example()]})
  assert counts == {'train': 3, 'val': 1}
  shutil.copytree(tmp_path / 'first', tmp_path / 'elsewhere')
  shutil.rmtree(tmp_path / 'first')
  assert schema.read_meta(tmp_path / 'elsewhere') == dataclasses.replace(meta, splits={'train': 3, 'val': 1})
  source = sources.RecordSource(tmp_path / 'elsewhere', split='train')
  assert [source[i].image_id for i in range(len(source))] == ['0', '1', '2']


@pytest.mark.parametrize('options, lengths', [
    ({}, [10]), ({'num_shards': 4}, [3, 2, 3, 2]), ({'num_shards': 20}, [1] * 10), ({'shard_bytes': 1}, [1] * 10)])
def test_shards_keep_the_order(tmp_path, options, lengths):
  schema.write_dataset(
      tmp_path / 'set', meta=Meta(name='toy'), splits={'train': [example(str(i)) for i in range(10)]}, **options)
  files = sorted(p.name for p in (tmp_path / 'set').glob('*array_record*'))
  assert files == [f'toy-train.array_record-{i:05}-of-{len(lengths):05}' for i in range(len(lengths))]
  info = json.loads((tmp_path / 'set' / 'dataset_info.json').read_text())
  assert [int(n) for n in info['splits'][0]['shardLengths']] == lengths
  source = sources.RecordSource(tmp_path / 'set', split='train')
  assert [source[i].image_id for i in range(10)] == [str(i) for i in range(10)]


def test_num_shards_of_a_stream_is_refused(tmp_path):
  with pytest.raises(ValueError, match="'train'.*generator"):
    schema.write_dataset(
        tmp_path / 'set', meta=Meta(name='toy'), splits={'train': (example() for _ in range(3))}, num_shards=2)


def test_progress_ends_at_the_count(tmp_path):
  calls = []
  schema.write_dataset(tmp_path / 'set', meta=Meta(name='toy'), progress=lambda *call: calls.append(call),
                       splits={'train': (example() for _ in range(600)), 'val': [example()]})
  assert calls == [('train', 256), ('train', 512), ('train', 600), ('val', 1)]


def test_a_failure_leaves_nothing_behind(tmp_path):
  def broken():
    yield example()
    raise RuntimeError('the disk is on fire')
  with pytest.raises(RuntimeError, match='on fire'):
    schema.write_dataset(tmp_path / 'set', meta=Meta(name='toy'), splits={'train': broken()})
  assert not list(tmp_path.iterdir())


def test_overwriting(tmp_path):
  path = tmp_path / 'set'
  schema.write_dataset(path, meta=Meta(name='toy'), splits={'train': [example('old')]})
  with pytest.raises(FileExistsError, match='overwrite=True'):
    schema.write_dataset(path, meta=Meta(name='toy'), splits={'train': [example('new')]})
  with pytest.raises(ValueError, match='no examples'):  # a failed rewrite keeps what was there
    schema.write_dataset(path, meta=Meta(name='toy'), splits={'train': []}, overwrite=True)
  assert sources.RecordSource(path, split='train')[0].image_id == 'old'
  schema.write_dataset(path, meta=Meta(name='toy'), splits={'train': [example('new')]}, overwrite=True)
  assert sources.RecordSource(path, split='train')[0].image_id == 'new'
  assert [p.name for p in tmp_path.iterdir()] == ['set']


def test_a_folder_that_is_no_data_set_is_never_replaced(tmp_path):
  (tmp_path / 'thesis').mkdir()
  (tmp_path / 'thesis' / 'final.tex').write_text('years of work')
  with pytest.raises(FileExistsError, match='not a data set'):
    schema.write_dataset(tmp_path / 'thesis', meta=Meta(name='toy'), splits={'train': [example()]}, overwrite=True)
  assert (tmp_path / 'thesis' / 'final.tex').exists()
  (tmp_path / 'empty').mkdir()
  schema.write_dataset(tmp_path / 'empty', meta=Meta(name='toy'), splits={'train': [example()]})


def test_a_data_set_without_images_is_refused(tmp_path):
  with pytest.raises(ValueError, match="split 'val' of data set 'toy'.*without images"):
    schema.write_dataset(tmp_path / 'set', meta=Meta(name='toy'), splits={'train': [example()], 'val': iter(())})
  with pytest.raises(ValueError, match='no splits'):
    schema.write_dataset(tmp_path / 'set', meta=Meta(name='toy'), splits={})
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('changes, error, message', [
    ({'regions': (Region(box=(10, 20, 300, 400), caption='x'),)}, ValueError, "record 'a'.*looks like pixels"),
    ({'regions': (Region(box=(0, 0, float('nan'), 1), caption='x'),)}, ValueError, "record 'a'.*NaN"),
    ({'regions': (Region(box=(0, 0, 1), caption='x'),)}, ValueError, "record 'a', region 0.*four numbers"),
    ({'regions': (Region(box=(0, 0, 1, 1), caption=None),)}, TypeError, "record 'a', region 0: caption"),
    ({'captions': 'not a tuple'}, TypeError, "record 'a': captions"),
    ({'image': b''}, ValueError, "record 'a': the image has no bytes"),
    ({'image': np.zeros((4, 6, 3), np.uint8)}, TypeError, "record 'a': image must be encoded.*ndarray"),
    ({'height': 0}, ValueError, "record 'a': height"),
    ({'width': 6.5}, ValueError, "record 'a': width"),
    ({'image_id': ''}, TypeError, 'image_id')])
def test_an_example_that_cannot_be_stored_is_named(changes, error, message):
  with pytest.raises(error, match=message):
    schema.encode(example(**changes))


@pytest.mark.parametrize('meta, splits, message', [
    (Meta(name='my-set'), {'train': [example()]}, "'my-set'"), (Meta(name=''), {'train': [example()]}, "''"),
    (Meta(name='toy'), {'train-1': [example()]}, "'train-1'"), (Meta(name='toy'), {'all': [example()]}, "'all'")])
def test_names_that_tfds_would_misread(tmp_path, meta, splits, message):
  with pytest.raises(ValueError, match=message):
    schema.write_dataset(tmp_path / 'set', meta=meta, splits=splits)


def test_a_wrong_path_names_the_nearest(painted, tmp_path):
  with pytest.raises(FileNotFoundError, match=f'did you mean {painted}'):
    schema.read_meta(painted.parent / 'seet')
  with pytest.raises(FileNotFoundError, match=f'it holds these data sets: {painted}'):
    sources.RecordSource(painted.parent, split='train')
  with pytest.raises(FileNotFoundError, match='not even the folder'):
    schema.read_meta(tmp_path / 'no' / 'where')


def test_splits(painted):
  with pytest.raises(ValueError, match=r"no split 'trian'; it has \['train', 'val'\]; did you mean 'train'"):
    sources.RecordSource(painted, split='trian')
  with pytest.raises(ValueError, match="no split 'test'"):
    sources.RecordSource(painted, split='train+test')
  with pytest.raises(ValueError, match='empty'):
    sources.RecordSource(painted, split='train[:0]')
  assert len(sources.RecordSource(painted, split='train[30:]+val')) == 7 + 5


@pytest.mark.parametrize('split', ['train', 'train[3:8]', 'train[20%:90%]', 'train[-2:]+val+train[:4]', 'all'])
def test_records_are_those_of_tfds_and_threads_may_share_them(tmp_path, split):
  schema.write_dataset(tmp_path / 'set', meta=Meta(name='toy'), num_shards=3,
                       splits={name: [example(f'{name} {i}') for i in range(n)] for name, n in (('train', 11), ('val', 3))})
  raw = tfds.decode.DeserializeMethod.RAW_BYTES
  want = list(tfds.builder_from_directory(tmp_path / 'set').as_data_source(split, deserialize_method=raw).data_source)
  source = sources.RecordSource(tmp_path / 'set', split=split)
  assert [source[i] for i in range(len(source))] == [schema.decode(record, where='') for record in want]
  order = np.random.default_rng(0).integers(0, len(want), 400).tolist()
  fresh = sources.RecordSource(tmp_path / 'set', split=split)  # opens its files while eight ask at once
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    assert [e.image_id for e in pool.map(fresh.__getitem__, order)] == [source[i].image_id for i in order]


def test_another_kind_of_data_set_is_named(tmp_path):
  path = tmp_path / 'set'
  schema.write_dataset(path, meta=Meta(name='toy'), splits={'train': [example()]})
  tfds.folder_dataset.write_metadata(
      data_dir=path, features={'image': tfds.features.Image(), 'label': tfds.features.Text()}, check_data=False,
      split_infos=[tfds.core.SplitInfo(name='train', shard_lengths=[1], num_bytes=1)])
  with pytest.raises(ValueError, match=r"not a region-text data set.*'captions'.*'label'"):
    sources.RecordSource(path, split='train')


def test_a_damaged_record_is_named():
  message = schema.tf_example_pb2.Example.FromString(schema.encode(example()))
  del message.features.feature['regions/box'].float_list.value[:2]
  with pytest.raises(ValueError, match="here: region fields of unequal length.*'box': 0.5"):
    schema.decode(message.SerializeToString(), where='here')
  del message.features.feature['image']
  with pytest.raises(ValueError, match="here: the record has no 'image'"):
    schema.decode(message.SerializeToString(), where='here')


@pytest.mark.parametrize('name', ['captions', 'regions/caption', 'regions/category', 'regions/source'])
def test_bytes_that_are_no_text_are_damage_of_the_record(name):
  """Not of whoever looks at the region later: only reading knows how to mask a record."""
  message = schema.tf_example_pb2.Example.FromString(schema.encode(example()))
  message.features.feature[name].bytes_list.value[0] = b'caf\xe9'
  with pytest.raises(UnicodeDecodeError):
    schema.decode(message.SerializeToString(), where='here')


def test_a_newer_format_is_refused(tmp_path):
  schema.write_dataset(tmp_path / 'set', meta=Meta(name='toy'), splits={'train': [example()]})
  stored = tmp_path / 'set' / 'metadata.json'
  content = json.loads(stored.read_text())
  content['cloc_jax']['format'] += 1
  stored.write_text(json.dumps(content))
  with pytest.raises(ValueError, match='upgrade'):
    schema.read_meta(tmp_path / 'set')


def test_a_source_can_be_pickled(painted):
  source = sources.RecordSource(painted, split='train')
  assert source[2].image_id == 'picture-2'
  again = pickle.loads(pickle.dumps(source))
  assert len(again) == 37 and again[2] == source[2]


def test_reading_needs_no_tensorflow(painted):
  code = ('import sys; from cloc_jax.data import sources; '
          f'sources.RecordSource({str(painted)!r}, split="train")[0]; '
          'print([m for m in ("tensorflow", "torch") if m in sys.modules])')
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert done.stdout.strip() == '[]'
