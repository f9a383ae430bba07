"""Prepared TFDS data sets, made by TFDS's own serializer and metadata, without TensorFlow.

Features are those of tensorflow_datasets' coco.py, coco_captions.py, voc.py, open_images_v4, ref_coco. A list of lists
is the one thing that TFDS cannot serialize without TensorFlow: it is written as core/example_serializer.py says, and
TFDS's own parser reads it.
"""
import io
import json
import struct

import numpy as np
from painted_pictures import encode_png
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2
from test_import_webdataset import records

from cloc_jax import cli
from cloc_jax.data import schema
from cloc_jax.data.importers import engine
from cloc_jax.data.importers import record_files
from cloc_jax.data.importers import tfds_named

f = tfds.features
PNG = encode_png(np.zeros((40, 80, 3), np.uint8))
BOXES = [(0.1, 0.2, 0.5, 0.9), (0.0, 0.0, 0.25, 1.0)]  # yxyx
COCO = {'image': f.Image(encoding_format='jpeg'), 'image/filename': f.Text(), 'image/id': np.int64,
        'objects': f.Sequence({'id': np.int64, 'area': np.int64, 'bbox': f.BBoxFeature(),
                               'label': f.ClassLabel(names=['person', 'traffic_light']), 'is_crowd': np.bool_,
                               'kind': f.ClassLabel(num_classes=3)})}


def coco_example(number, *, labels=('traffic_light', 'person'), crowd=(False, False)):
  objects = [{'id': i, 'area': 9, 'bbox': f.BBox(*BOXES[i]), 'label': label, 'is_crowd': crowd[i],
              'kind': 2}
             for i, label in enumerate(labels)]
  return {'image': io.BytesIO(PNG), 'image/filename': f'{number:012}.jpg', 'image/id': number, 'objects': objects}


def write_tf_records(path, messages):
  with open(path, 'wb') as file:
    for message in messages:
      length = struct.pack('<Q', len(message))
      file.write(length + struct.pack('<I', record_files.masked_crc32c(length)) + message + b'\0\0\0\0')


def prepare(root, features, splits, *, kind='array_record', shards=2, name='given'):
  """A version's folder as `tfds build` leaves it."""
  root.mkdir(parents=True)
  features = f.FeaturesDict(features)
  infos = []
  for split, examples in splits.items():
    messages = [example if isinstance(example, bytes) else features.serialize_example(example) for example in examples]
    template = tfds.core.ShardedFileTemplate(data_dir=root, dataset_name=name, split=split, filetype_suffix=kind)
    pieces = np.array_split(np.arange(len(messages)), shards)
    for i, piece in enumerate(pieces):
      path = template.sharded_filepath(shard_index=i, num_shards=shards)
      if kind == 'array_record':
        writer = schema.shard_writer(path)
        for j in piece:
          writer.write(messages[j])
        writer.close()
      else:
        write_tf_records(path, [messages[j] for j in piece])
    infos.append(tfds.core.SplitInfo(name=split, shard_lengths=[len(piece) for piece in pieces], num_bytes=1,
                                     filename_template=template))
  tfds.folder_dataset.write_metadata(data_dir=root, features=features, split_infos=infos, version=root.name,
                                     check_data=False, description='given')
  return root


def run(out, dataset, **settings):
  return engine.run(tfds_named.Tfds(dataset, **settings), out=out)


@pytest.mark.parametrize('kind, workers', [('array_record', 2), ('tfrecord', 0)])
def test_coco_by_name(tmp_path, kind, workers):
  prepare(tmp_path / 'coco' / '2017' / '1.1.0', COCO, {'train': [
      coco_example(139), coco_example(9, crowd=(True, False)), coco_example(10, labels=())]}, kind=kind)
  found = engine.run(tfds_named.Tfds('coco/2017', data_dir=tmp_path), out=tmp_path / 'out', workers=workers)['train']
  got = records(tmp_path / 'out')
  assert [r.image_id for r in got] == ['139', '9', '10'] and {r.image for r in got} == {PNG}
  assert [r.caption for r in got[0].regions] == ['traffic light', 'person']
  assert [r.category for r in got[1].regions] == ['person'] and got[2].regions == ()
  np.testing.assert_allclose(got[0].regions[0].box, [0.2, 0.1, 0.9, 0.5], rtol=1e-6)
  assert (found.of('boxes', 'kept'), found.of('boxes', 'dropped', 'crowd')) == (3, 1)
  meta = schema.read_meta(tmp_path / 'out')
  assert meta.categories == ('person', 'traffic light')
  assert meta.extra['fields'] == {'image': ['image'], 'image_id': ['image/id'], 'boxes': ['objects/bbox'],
                                  'category': ['objects/label'], 'crowd': ['objects/is_crowd']}


def test_captions_versions_and_slices(tmp_path):
  captions = {'captions': f.Sequence({'text': np.str_, 'id': np.int64}), 'title': f.Text()}
  def example(i):
    return coco_example(i) | {'captions': [{'text': f'فتاة {i}', 'id': 1}, {'text': 'a', 'id': 2}], 'title': 'T'}
  for version, count in (('1.0.0', 1), ('1.10.0', 5), ('1.9.0', 2)):
    prepare(tmp_path / 'coco_captions' / version, COCO | captions,
            {'train': map(example, range(count)), 'val': map(example, range(3, 5))}, shards=1)
  splits = (('few', 'train[1:4]'), ('val', 'val'))
  run(tmp_path / 'out', 'coco_captions', data_dir=tmp_path, wanted=splits)
  assert [r.image_id for r in records(tmp_path / 'out', 'few')] == ['1', '2', '3']
  assert records(tmp_path / 'out', 'few')[0].captions == ('فتاة 1', 'a')
  run(tmp_path / 'old', 'coco_captions:1.0.0', data_dir=tmp_path,
      fields=(('captions', 'title'), ('captions', 'captions/text'), ('image_id', 'image/filename')))
  [got] = records(tmp_path / 'old')
  assert (got.image_id, got.captions) == ('000000000000', ('T', 'فتاة 0', 'a'))


@pytest.mark.parametrize('name, expected', [
    ('voc/2007', ('image/filename', 'objects/bbox', 'objects/label', None, None)),
    ('lvis', ('image/id', 'objects/bbox', 'objects/label', None, None)),
    ('open_images_v4', ('image/filename', 'bobjects/bbox', 'bobjects/label', None, 'bobjects/is_group_of')),
    ('ref_coco/refcoco_unc', ('image/id', 'objects/bbox', None, 'objects/refexp/raw', None))])
def test_what_is_usual_fits_the_data_sets_of_tfds(tmp_path, name, expected):
  features = tfds.builder(name, data_dir=tmp_path).info.features  # coco's code needs TensorFlow: its features are above
  found = tfds_named.choose(features, (), where=name)
  roles = ('image_id', 'boxes', 'category', 'phrases', 'crowd')
  assert tuple(found[role][0].name if role in found else None for role in roles) == expected


def ragged(message, name, rows):
  """Adds a list of lists of texts as core/example_serializer.py writes it."""
  found = tf_example_pb2.Example.FromString(message)
  flat = [text.encode() for row in rows for text in row]
  found.features.feature[f'{name}/ragged_flat_values'].bytes_list.value.extend(flat)
  found.features.feature[f'{name}/ragged_row_lengths_0'].int64_list.value.extend(map(len, rows))
  return found.SerializeToString()


def test_phrases_in_lists_of_lists(tmp_path):
  plain = f.FeaturesDict({'image': f.Image(encoding_format='jpeg'), 'image/id': np.int64,
                          'objects': f.Sequence({'bbox': f.BBoxFeature(), 'label': np.int64})})
  whole = {'image': plain['image'], 'image/id': np.int64, 'objects': f.Sequence({
      'bbox': f.BBoxFeature(), 'label': np.int64, 'refexp': f.Sequence({'raw': f.Text()})})}
  rows = [['le garçon', 'left one'], ['']]
  message = ragged(plain.serialize_example({'image': io.BytesIO(PNG), 'image/id': 7, 'objects': [
      {'bbox': f.BBox(*box), 'label': 3} for box in BOXES]}), 'objects/refexp/raw', rows)
  read = f.FeaturesDict(whole)._example_parser_np.parse_example(message)['objects']['refexp']['raw']
  assert [[text.decode() for text in row] for row in read] == rows  # so TFDS reads it too
  prepare(tmp_path / 'ref_coco' / 'refcoco_unc' / '1.1.0', whole, {'testA': [message]}, shards=1,
          name='ref_coco')
  found = run(tmp_path / 'out', 'ref_coco/refcoco_unc', data_dir=tmp_path, wanted=(('testA', 'testA'),))['testA']
  [got] = records(tmp_path / 'out', 'testA')
  assert [(r.caption, r.source) for r in got.regions] == [('le garçon', 'ref_coco'), ('left one', 'ref_coco')]
  np.testing.assert_allclose(got.regions[1].box, [0.2, 0.1, 0.9, 0.5], rtol=1e-6)
  assert found.of('boxes', 'dropped', 'blank caption') == 1


def test_codes_need_names_and_boxes_may_be_said(tmp_path):
  features = {'image': f.Image(), 'image/filename': f.Text(), 'bobjects': f.Sequence({
      'label': f.ClassLabel(names=['/m/011k07', '/m/01g317']), 'bbox': f.BBoxFeature(), 'is_group_of': np.int8})}
  example = {'image': io.BytesIO(PNG), 'image/filename': '226f0a1873b9bf8e.jpg', 'bobjects': [
      {'label': '/m/01g317', 'bbox': f.BBox(*BOXES[0]), 'is_group_of': -1},
      {'label': '/m/01g317', 'bbox': f.BBox(*BOXES[1]), 'is_group_of': 1}]}
  path = prepare(tmp_path / 'open_images_v4' / '2.0.0', features, {'train': [example]}, shards=1)
  with pytest.raises(ValueError, match="labels are codes such as '/m/011k07': expected --classes"):
    run(tmp_path / 'out', path)
  (tmp_path / 'classes.csv').write_text('/m/01g317,Person\n/m/011k07,Tortoise\n')
  run(tmp_path / 'out', path, classes=tmp_path / 'classes.csv', boxes='xyxy normalised')
  [got] = records(tmp_path / 'out')
  assert (got.image_id, [r.caption for r in got.regions]) == ('226f0a1873b9bf8e', ['person'])
  np.testing.assert_allclose(got.regions[0].box, BOXES[0], rtol=1e-6)


@pytest.mark.parametrize('settings, message', [
    (dict(fields=(('box', 'x'),)), "unknown field 'box'; known are .*did you mean 'boxes'"),
    (dict(fields=(('boxes', 'objects/bbo'),)), "no feature 'objects/bbo'; did you mean 'objects/bbox'.*; its features"),
    (dict(fields=(('boxes', 'objects/label'),)), r'boxes=objects/label: expected a list of boxes .*got ClassLabel in'),
    (dict(fields=(('category', 'objects/id'),)), 'expected a list of ClassLabels with names'),
    (dict(fields=(('category', 'objects/kind'),)), 'expected a list of ClassLabels with names'),
    (dict(fields=(('image', 'image/id'),)), 'image=image/id: expected an Image'),
    (dict(fields=(('image_id', 'image/id'), ('image_id', 'image/filename'))), "field 'image_id' is there twice"),
    (dict(boxes='yxyx fractions'), "unknown box convention 'yxyx fractions'; known are"),
    (dict(wanted=(('a', 'nonsense'),)), r"has no split 'nonsense'; it has \['train'\]"),
    (dict(wanted=(('train[:1]', 'train[:1]'),)), 'split name')])
def test_what_is_wrong_is_named(tmp_path, settings, message):
  path = prepare(tmp_path / 'coco' / '1.1.0', COCO, {'train': [coco_example(1)]}, shards=1)
  with pytest.raises(ValueError, match=message):
    run(tmp_path / 'out', path, **settings)


def test_categories_that_are_texts_become_the_classes(tmp_path):
  features = {'image': f.Image(), 'objects': f.Sequence({'bbox': f.BBoxFeature(), 'kind': f.Text()})}
  example = lambda *kinds: {'image': io.BytesIO(PNG), 'objects': [
      {'bbox': f.BBox(*BOXES[0]), 'kind': kind} for kind in kinds]}
  path = prepare(tmp_path / 'mine' / '1.0.0', features, {'train': [example('dog', 'bird'), example('cat')]}, shards=2)
  run(tmp_path / 'out', path, fields=(('category', 'objects/kind'),))
  assert schema.read_meta(tmp_path / 'out').categories == ('bird', 'cat', 'dog')


def test_boxes_without_names(tmp_path):
  path = prepare(tmp_path / 'faces' / '1.0.0', {'image': f.Image(), 'objects': f.Sequence({'bbox': f.BBoxFeature()})},
                 {'train': [{'image': io.BytesIO(PNG), 'objects': [{'bbox': f.BBox(*BOXES[0])}]}]}, shards=1)
  with pytest.raises(ValueError, match='boxes without names: expected --field category'):
    run(tmp_path / 'out', path)


def test_what_is_not_prepared(tmp_path):
  prepare(tmp_path / 'coco' / '2017' / '1.1.0', COCO, {'train': [coco_example(1)]}, shards=1)
  with pytest.raises(FileNotFoundError, match=r"coco is not prepared in .*; it has the configs \['2017'\]"):
    run(tmp_path / 'out', 'coco', data_dir=tmp_path)
  with pytest.raises(FileNotFoundError, match='voc/2012 is not prepared .*tfds build voc/2012 .*array_record'):
    run(tmp_path / 'out', 'voc/2012', data_dir=tmp_path)
  info = tmp_path / 'coco' / '2017' / '1.1.0' / 'dataset_info.json'
  info.write_text(json.dumps(json.loads(info.read_text()) | {'fileFormat': 'riegeli'}))
  with pytest.raises(ValueError, match='is written as riegeli; read are .*tfds convert_format'):
    run(tmp_path / 'out', 'coco/2017', data_dir=tmp_path)


@pytest.mark.parametrize('kind, damage, message', [
    ('tfrecord', lambda data: data[:-40], 'is cut off in record 1'),
    ('tfrecord', lambda data: data[:5], 'it ends after 0'),
    ('tfrecord', lambda data: data[:3] + b'\1' + data[4:], 'record 0 is damaged, or this is no TFRecord file'),
    ('tfrecord', lambda data: data[:12] + b'\xff' * 8 + data[20:], 'record 0 is damaged'),
    ('array_record', lambda data: data[:-40], 'is cut off: 0 records are left')])
def test_damage_is_named(tmp_path, kind, damage, message):
  path = prepare(tmp_path / 'coco' / '1.1.0', COCO, {'train': [coco_example(1), coco_example(2)]}, kind=kind, shards=1)
  [shard] = path.glob(f'given-train.{kind}*')
  shard.write_bytes(damage(shard.read_bytes()))
  with pytest.raises(ValueError, match=f'{shard.name}.*{message}'):
    run(tmp_path / 'out', path)


def test_checksums_of_lengths():
  # RFC 3720, B.4: the CRC-32C of 32 zeros is 8A9136AA, of 32 bytes of ones 62A8AB43; TFRecord turns and shifts it.
  for data, crc in ((bytes(32), 0x8A9136AA), (b'\xff' * 32, 0x62A8AB43)):
    assert record_files.masked_crc32c(data) == (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def test_the_verb(tmp_path):
  prepare(tmp_path / 'coco' / '2017' / '1.1.0', COCO, {'train': [coco_example(1)], 'validation': [coco_example(2)]},
          shards=1)
  argv = ['data', 'import', 'tfds', '--name', 'coco/2017', '--data-dir', tmp_path, '--split', 'train', '--split',
          'val=validation', '--field', 'image_id=image/filename', '--boxes', 'yxyx normalised', '--out',
          tmp_path / 'out', '--workers', 1]
  assert cli.main([str(arg) for arg in argv]) == 0
  assert records(tmp_path / 'out', 'val')[0].image_id == '000000000002'
  assert schema.read_meta(tmp_path / 'out').name == 'coco_2017'
