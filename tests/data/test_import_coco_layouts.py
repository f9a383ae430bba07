"""Panoptic COCO, LVIS v1 and Objects365 v2: small samples in the published layouts.

Layouts: cocodataset.org/#format-data (panoptic: segments_info with boxes, isthing of categories); LVIS v1:
lvisdataset.org/dataset, and the entries in MMDetection's tests of its LVIS reader (coco_url instead of file_name,
neg_category_ids, not_exhaustive_category_ids, frequency, synonyms, synset); Objects365 v2: file names such as
'images/v2/patch16/objects365_v2_00900461.jpg', unpacked to 'patch16/…'.
"""
import copy
import json

import numpy as np
from painted_pictures import encode_png
import pytest

from cloc_jax import cli
from cloc_jax.data import direct
from cloc_jax.data import schema
from cloc_jax.data import sources
from cloc_jax.data.importers import coco
from cloc_jax.data.importers import engine
from cloc_jax.data.importers import lvis
from cloc_jax.data.importers import objects365


def picture(path, *, height=40, width=80):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(encode_png(np.zeros((height, width, 3), np.uint8)))


def records(path, split='train'):
  source = sources.RecordSource(path, split=split)
  return [source[i] for i in range(len(source))]


def write(path, content):
  path.write_text(json.dumps(content))
  return path


# --- panoptic


@pytest.fixture(name='panoptic')
def panoptic_fixture(tmp_path):
  picture(tmp_path / 'images' / '000000000139.jpg')
  path = tmp_path / 'panoptic_train2017.json'
  return coco.CocoSource(split='train', images=tmp_path / 'images', panoptic=write(path, {
      'info': {}, 'licenses': [],
      'images': [{'id': 139, 'file_name': '000000000139.jpg', 'height': 40, 'width': 80}],
      'annotations': [{'image_id': 139, 'file_name': '000000000139.png', 'segments_info': [
          {'id': 3226956, 'category_id': 72, 'iscrowd': 0, 'bbox': [8, 10, 16, 20], 'area': 100},
          {'id': 6979964, 'category_id': 1, 'iscrowd': 1, 'bbox': [0, 0, 40, 20], 'area': 100},
          {'id': 3937500, 'category_id': 184, 'iscrowd': 0, 'bbox': [0, 0, 80, 20], 'area': 100}]}],
      'categories': [{'supercategory': 'person', 'isthing': 1, 'id': 1, 'name': 'person'},
                     {'supercategory': 'electronic', 'isthing': 1, 'id': 72, 'name': 'tv'},
                     {'supercategory': 'plant', 'isthing': 0, 'id': 184, 'name': 'tree-merged'}]}))


@pytest.mark.parametrize('stuff, names', [(False, ['tv']), (True, ['tv', 'tree-merged'])])
def test_panoptic_segments(panoptic, tmp_path, stuff, names):
  found = engine.run(coco.Coco(panoptic, stuff=stuff), out=tmp_path / 'out')['train']
  record, = records(tmp_path / 'out')
  assert [r.caption for r in record.regions] == names
  np.testing.assert_allclose(record.regions[0].box, [0.1, 0.25, 0.3, 0.75], rtol=1e-6)
  assert found.of('boxes') == 3 and found.examples('boxes', 'dropped', 'crowd') == ['image 139, segments[1]']
  assert found.of('boxes', 'dropped', 'stuff') == (0 if stuff else 1)


def test_a_bad_segment_is_named(panoptic, tmp_path):
  content = json.loads(panoptic.panoptic.read_text())
  del content['annotations'][0]['segments_info'][2]['bbox']
  write(panoptic.panoptic, content)
  with pytest.raises(ValueError, match=r"panoptic_train2017.json: annotations\[0\]: segments_info\[2\]: no key 'bbox'"):
    engine.run(coco.Coco(panoptic), out=tmp_path / 'out')


# --- LVIS

LVIS = {
    'info': {}, 'licenses': [{'id': 1, 'name': 'CC BY-NC-SA', 'url': 'http://x'}],
    'images': [
        {'id': 391895, 'coco_url': 'http://images.cocodataset.org/train2017/000000391895.jpg', 'height': 40,
         'width': 80, 'neg_category_ids': [7, 3], 'not_exhaustive_category_ids': [5]},
        {'id': 139, 'coco_url': 'http://images.cocodataset.org/val2017/000000000139.jpg', 'height': 40, 'width': 80,
         'neg_category_ids': [], 'not_exhaustive_category_ids': []}],
    'annotations': [
        {'id': 1, 'image_id': 139, 'category_id': 3, 'bbox': [8, 10, 16, 20], 'area': 9, 'segmentation': []}],
    'categories': [
        {'id': 7, 'name': 'bow_(weapon)', 'synonyms': ['bow_(weapon)'], 'synset': 'bow.n.04', 'frequency': 'r',
         'def': 'a weapon for shooting arrows', 'image_count': 2, 'instance_count': 2},
        {'id': 3, 'name': 'aerosol_can', 'synonyms': ['aerosol_can', 'spray_can'], 'synset': 'aerosol.n.02',
         'frequency': 'c', 'def': '', 'image_count': 64, 'instance_count': 109},
        {'id': 5, 'name': 'cup', 'synonyms': ['cup'], 'synset': 'cup.n.01', 'frequency': 'f', 'def': ''}]}


def lvis_source(root, content, **captions):
  picture(root / 'images' / 'train2017' / '000000391895.jpg')
  picture(root / 'images' / 'val2017' / '000000000139.jpg')
  return coco.CocoSource(split='val', images=root / 'images',
                         instances=write(root / 'lvis_v1_val.json', content), **captions)


@pytest.mark.parametrize('kind', ['lvis', 'panoptic'])
def test_read_as_they_are_they_are_what_an_import_gives(kind, panoptic, tmp_path, monkeypatch):
  if kind == 'lvis':
    source = lvis_source(tmp_path, LVIS)
    importer = lvis.Lvis((source,))
    data = f'lvis:images={source.images},instances={source.instances},split=val'
  else:
    source = panoptic
    importer = coco.Coco((source,), stuff=True)
    data = f'coco:images={source.images},panoptic={source.panoptic},stuff=true,split=train'
  engine.run(importer, out=tmp_path / 'out')
  monkeypatch.setattr(direct, '_KEEP_SECONDS', -1)
  want = schema.read_meta(tmp_path / 'out')
  for _ in range(2):  # from the annotations, and from what was kept of them
    found, meta = sources.open_source(data, split=source.split), sources.read_meta(data)
    assert [found[i] for i in range(len(found))] == records(tmp_path / 'out', source.split)
    ours, theirs = ({k: v for k, v in m.extra.items() if k != 'counts'} for m in (meta, want))
    assert ours == theirs and (meta.categories, meta.splits) == (want.categories, want.splits)
    direct._opened.cache_clear()
    monkeypatch.setattr(direct.formats.CocoLayout, 'build', lambda *_: pytest.fail('read anew'))


def test_lvis(tmp_path):
  captions = write(tmp_path / 'captions.json', {'annotations': [
      {'image_id': 139, 'caption': 'A can.'}, {'image_id': 4, 'caption': 'of another split'}]})
  found = engine.run(lvis.Lvis(lvis_source(tmp_path, LVIS, captions=captions)), out=tmp_path / 'out')['val']
  first, second = records(tmp_path / 'out', 'val')
  assert (first.image_id, first.regions) == ('391895', ()) and second.captions == ('A can.',)
  assert [(r.caption, r.category, r.source) for r in second.regions] == [('aerosol can', 'aerosol can', 'lvis')]
  assert found.examples('captions', 'dropped', 'of an image not listed') == ['caption 1']
  meta = schema.read_meta(tmp_path / 'out')
  assert meta.categories == ('aerosol can', 'cup', 'bow (weapon)')
  assert meta.extra['lvis'] == {
      'category_ids': [3, 5, 7], 'frequencies': ['c', 'f', 'r'], 'synsets': ['aerosol.n.02', 'cup.n.01', 'bow.n.04'],
      'synonyms': [['aerosol_can', 'spray_can'], ['cup'], ['bow_(weapon)']],
      'negative': {'val': {'391895': [2, 0]}}, 'not_exhaustive': {'val': {'391895': [1]}}}


def test_lvis_finds_images_in_one_flat_folder(tmp_path):
  source = lvis_source(tmp_path, LVIS)
  for path in (tmp_path / 'images').glob('*/*.jpg'):
    path.rename(tmp_path / 'images' / path.name)
  assert engine.run(lvis.Lvis(source), out=tmp_path / 'out')['val'].of('images', 'kept') == 2


@pytest.mark.parametrize('path, message', [
    (('images', 1, 'coco_url'), r"lvis_v1_val.json: images\[1\]: no key 'coco_url'"),
    (('images', 1, 'neg_category_ids'), "image 139: no key 'neg_category_ids'"),
    (('categories', 0, 'frequency'), "category 7: no key 'frequency'")])
def test_lvis_keys_are_named(tmp_path, path, message):
  content = copy.deepcopy(LVIS)
  item = content
  for step in path[:-1]:
    item = item[step]
  del item[path[-1]]
  with pytest.raises(ValueError, match=message):
    engine.run(lvis.Lvis(lvis_source(tmp_path, content)), out=tmp_path / 'out')


# --- Objects365


def objects365_source(root, *, at):
  names = {1: 'images/v1/patch8/objects365_v1_00420917.jpg', 2: 'images/v2/patch16/objects365_v2_00900461.jpg'}
  for name in names.values():
    picture(root / 'train' / name.removeprefix(at))
  return coco.CocoSource(split='train', images=root / 'train', instances=write(root / 'zhiyuan_objv2_train.json', {
      'images': [{'id': i, 'file_name': name, 'height': 40, 'width': 80, 'license': 5, 'url': ''}
                 for i, name in names.items()],
      'annotations': [
          {'id': 1, 'image_id': 2, 'category_id': 9, 'bbox': [8, 10, 16, 20], 'area': 320, 'iscrowd': 0, 'isfake': 0,
           'isreflected': 0},
          {'id': 2, 'image_id': 1, 'category_id': 1, 'bbox': [8, 10, 16, 20], 'area': 320, 'iscrowd': 1, 'isfake': 0,
           'isreflected': 0}],
      'categories': [{'id': 1, 'name': 'Person'}, {'id': 9, 'name': 'Cabinet/shelf'}], 'licenses': []}))


@pytest.mark.parametrize('at', ['', 'images/', 'images/v'])
def test_objects365_wherever_the_archives_were_unpacked(tmp_path, at):
  source = objects365_source(tmp_path, at='images/' if at else '')
  if at == 'images/v':  # 'patch8/…'
    for path in list((tmp_path / 'train').glob('v*/patch*')):
      path.rename(tmp_path / 'train' / path.name)
  found = engine.run(objects365.Objects365(source), out=tmp_path / 'out')['train']
  assert [[r.caption for r in record.regions] for record in records(tmp_path / 'out')] == [[], ['cabinet/shelf']]
  assert found.of('boxes', 'dropped', 'crowd') == 1
  assert schema.read_meta(tmp_path / 'out').categories == ('person', 'cabinet/shelf')


def test_an_objects365_image_that_is_nowhere(tmp_path):
  source = objects365_source(tmp_path, at='')
  next((tmp_path / 'train').rglob('*0461.jpg')).unlink()
  with pytest.raises(FileNotFoundError, match='images/v2/patch16/objects365_v2_00900461.jpg: missing'):
    engine.run(objects365.Objects365(source), out=tmp_path / 'out')


# --- boxes of another convention, and the verbs


def test_boxes_of_another_convention_are_named_and_can_be_trusted(tmp_path):
  rng = np.random.default_rng(0)
  start, end = rng.uniform(0, [40, 20], (60, 2)), rng.uniform([41, 21], [80, 40], (60, 2))
  content = json.loads(objects365_source(tmp_path, at='').instances.read_text())
  content['annotations'] = [
      {'image_id': 1, 'category_id': 1, 'bbox': [*a.tolist(), *b.tolist()]} for a, b in zip(start, end)]
  source = coco.CocoSource(split='train', images=tmp_path / 'train', instances=write(tmp_path / 'a.json', content))
  with pytest.raises(ValueError, match=r'a.json: looks like xyxy pixels: 100 % of the boxes fit that; .*--trust-boxes'):
    engine.run(objects365.Objects365(source), out=tmp_path / 'out')
  found = engine.run(objects365.Objects365(source, trust_boxes=True), out=tmp_path / 'out')['train']
  assert found.of('boxes', 'repaired', 'cut at the border') > 20


@pytest.mark.parametrize('verb, source, split', [
    ('lvis', lambda root: lvis_source(root, LVIS), 'val'),
    ('objects365', lambda root: objects365_source(root, at='images/'), 'train')])
def test_verbs(tmp_path, capsys, verb, source, split):
  source = source(tmp_path)
  argv = ['data', 'import', verb, '--split', split, '--images', str(source.images), '--annotations',
          str(source.instances), '--out', str(tmp_path / 'out'), '--workers', '0']
  assert cli.main(argv) == 0
  out = capsys.readouterr().out
  assert out.splitlines()[-1] == str(tmp_path / 'out') and 'images kept' in out
  assert schema.read_meta(tmp_path / 'out').name == verb
