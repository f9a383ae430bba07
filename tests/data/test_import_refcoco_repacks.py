"""The same two images and three references in every layout of importers/refcoco_repacks.py, which cites their sources.

What each must give is what the original pickle gives: the same sentences, boxes and images.
"""
import base64
import json

import numpy as np
from painted_pictures import encode_png
import pytest
from test_import_webdataset import records

from cloc_jax import cli
from cloc_jax.data import schema
from cloc_jax.data.importers import engine
from cloc_jax.data.importers import refcoco_counts
from cloc_jax.data.importers import refcoco_repacks

PNG = encode_png(np.zeros((40, 80, 3), np.uint8))
# image, annotation, xywh pixels, sentences
REFS = [(581857, 1719310, [8.0, 4.0, 32.0, 32.0], ['the lady with the blue shirt', 'lady on right']),
        (9, 5, [40.0, 20.0, 40.0, 20.0], ['le garçon']), (581857, 1719311, [0.0, 0.0, 8.0, 4.0], ['السيدة'])]
EXPECTED = {'581857': [('the lady with the blue shirt', [0.1, 0.1, 0.5, 0.9]), ('lady on right', [0.1, 0.1, 0.5, 0.9]),
                       ('السيدة', [0, 0, 0.1, 0.1])], '9': [('le garçon', [0.5, 0.5, 1, 1])]}


def file_name(image, suffix=''):
  return f'COCO_train2014_{image:012}{suffix}.jpg'


def coco_layout(images, annotations, categories):
  return {'info': {}, 'licenses': [], 'images': images, 'annotations': annotations, 'categories': categories}


def mdetr():
  images, annotations = [], []
  for image, annotation, box, sentences in REFS:
    for sentence in sentences:
      images.append({'file_name': file_name(image), 'height': 40, 'width': 80, 'id': len(images), 'original_id': image,
                     'caption': sentence, 'dataset_name': 'refcoco', 'tokens_negative': [[0, 1]]})
      annotations.append({'area': 9.0, 'iscrowd': 0, 'image_id': len(images) - 1, 'category_id': 1,
                          'id': len(annotations), 'bbox': box, 'original_id': annotation, 'tokens_positive': [[4, 8]]})
  return coco_layout(images, annotations, [{'supercategory': 'person', 'id': 1, 'name': 'person'}])


def uninext():
  images = [{'file_name': file_name(image), 'height': 40, 'width': 80, 'id': i + 1, 'expressions': sentences}
            for i, (image, _, _, sentences) in enumerate(REFS)]
  annotations = [{'bbox': box, 'segmentation': [[1, 2, 3, 4, 5, 6]], 'image_id': i + 1, 'iscrowd': 0, 'category_id': 1,
                  'id': i + 1, 'area': 9.0} for i, (_, _, box, _) in enumerate(REFS)]
  return coco_layout(images, annotations, [{'supercategory': 'object', 'id': 1, 'name': 'object'}])


def seqtr():
  return {split: [{'bbox': box, 'image_id': image, 'expressions': sentences, 'height': 40, 'width': 80,
                   'mask': [[1, 2, 3, 4, 5, 6]]} for image, _, box, sentences in refs]
          for split, refs in (('train', REFS), ('val', REFS[1:2]))}


def lmms_lab():
  return [{'question_id': str(annotation), 'image': {'bytes': PNG, 'path': None}, 'question': 'Please …',
           'answer': sentences, 'segmentation': [1.0, 2.0], 'bbox': box, 'iscrowd': 0,
           'file_name': file_name(image, f'_{i}')} for i, (image, annotation, box, sentences) in enumerate(REFS)]


def jxu124():
  rows = []
  for i, (image, annotation, (x, y, w, h), sentences) in enumerate(REFS):
    rows.append({
        'sent_ids': [i], 'file_name': file_name(image, f'_{i}'), 'ann_id': annotation, 'ref_id': i, 'image_id': image,
        'split': 'train', 'sentences': [{'raw': s.upper(), 'sent': s, 'sent_id': i, 'tokens': s.split()}
                                        for s in sentences],
        'category_id': 1, 'raw_anns': json.dumps({'bbox': [x, y, w, h], 'id': annotation, 'image_id': image}),
        'raw_image_info': json.dumps({'file_name': file_name(image), 'height': 40, 'width': 80, 'id': image}),
        'raw_sentences': json.dumps(sentences), 'image_path': f'coco/train2014/{file_name(image)}',
        'bbox': [x, y, x + w, y + h], 'captions': sentences, 'global_image_id': f'coco.{image}',
        'anns_id': str(annotation)})
  return rows


def refcoco_m():
  rows = {}
  for i, (image, annotation, box, sentences) in enumerate(REFS):
    row = rows.setdefault(image, {'image': {'bytes': PNG, 'path': None}, 'image_id': image,
                                  'file_name': file_name(image), 'samples': []})
    row['samples'].append({'id': annotation, 'image_id': image, 'category': 'person', 'supercategory': 'person',
                           'label': 'x', 'sentences': sentences, 'bbox': box,
                           'mask': {'counts': 'a', 'size': [40, 80]}})
  return list(rows.values())


def write(path, content):
  if path.suffix == '.parquet':
    pyarrow = pytest.importorskip('pyarrow')
    from pyarrow import parquet
    parquet.write_table(pyarrow.Table.from_pylist(content), path, row_group_size=1)
  elif path.suffix == '.jsonl':
    for row in content:
      if 'image' in row:
        row['image'] = {'bytes': base64.b64encode(row['image']['bytes']).decode(), 'path': None}
    path.write_text(''.join(json.dumps(row) + '\n' for row in content))
  else:
    path.write_text(json.dumps(content))
  return path


@pytest.fixture(name='images')
def images_fixture(tmp_path):
  (tmp_path / 'train2014').mkdir()
  for image in (581857, 9):
    (tmp_path / 'train2014' / file_name(image)).write_bytes(PNG)
  return tmp_path / 'train2014'


def run(path, out, *, split='train', images=None, **settings):
  return engine.run(refcoco_repacks.RefCocoRepack(refcoco_repacks.RepackSource(split, (path,)), images, **settings),
                    out=out)[split]


@pytest.mark.parametrize('layout, suffix, category', [
    (mdetr, '.json', 'person'), (uninext, '.json', ''), (seqtr, '.json', ''), (lmms_lab, '.parquet', ''),
    (lmms_lab, '.jsonl', ''), (jxu124, '.parquet', ''), (jxu124, '.jsonl', ''), (refcoco_m, '.parquet', 'person')])
@pytest.mark.parametrize('size', [1, 1024])
def test_every_layout_gives_the_same(tmp_path, images, layout, suffix, category, size):
  path = write(tmp_path / f'a{suffix}', layout())
  inside = layout in (lmms_lab, refcoco_m)
  found = run(path, tmp_path / 'out', images=None if inside else images, images_per_shard=size)
  got = {r.image_id: r for r in records(tmp_path / 'out')}
  assert list(got) == list(EXPECTED) and found.of('boxes', 'kept') == 4
  for image_id, regions in EXPECTED.items():
    assert [r.caption for r in got[image_id].regions] == [text for text, _ in regions]
    np.testing.assert_allclose([r.box for r in got[image_id].regions], [box for _, box in regions], rtol=1e-6)
    assert {r.category for r in got[image_id].regions} == {category} and got[image_id].image == PNG


def test_another_split_of_one_file(tmp_path, images):
  run(write(tmp_path / 'instances.json', seqtr()), tmp_path / 'out', split='val', images=images)
  assert [r.image_id for r in records(tmp_path / 'out', 'val')] == ['9']
  with pytest.raises(ValueError, match=r"no key 'testA'; found \['train', 'val'\]"):
    run(tmp_path / 'instances.json', tmp_path / 'other', split='testA', images=images)


def change(content, **changes):
  content['images'][0] |= changes
  return content


@pytest.mark.parametrize('name, content, message', [
    ('a.json', {'refs': [], 'sents': []}, r"its keys \['refs', 'sents'\] are of no layout that is known. MDETR's"),
    ('a.json', {'images': [{'id': 1, 'file_name': 'a', 'height': 1, 'width': 1}], 'annotations': [], 'categories': []},
     r"images\[0\]: expected the sentences, .*got None among the keys \['file_name', 'height', 'id', 'width'\]"),
    ('a.json', change(mdetr(), id=77), r'annotations\[0\]: image_id 0 is not among'),
    ('a.json', {'train': [{'image_id': 9, 'bbox': [1, 1, 2, 2], 'height': 40, 'width': 80}]},
     r"train\[0\]: no key 'expressions'"),
    ('a.json', {'train': [seqtr()['val'][0] | {'data_source': 'visual-genome'}]}, "expected COCO's images, got"),
    ('a.jsonl', [{'phrase': 'a', 'bbox': [1, 2, 3, 4]}], r"its columns \['bbox', 'phrase'\] are of no layout"),
    ('a.jsonl', [jxu124()[0] | {'raw_anns': 'x'}], "row 0: 'raw_anns' must be a JSON text, got 'x'"),
    ('a.json', {'train': [seqtr()['val'][0] | {'bbox': [1, 2, 3]}]}, 'a box must be four numbers')])
def test_what_is_no_such_file_is_named(tmp_path, images, name, content, message):
  with pytest.raises(ValueError, match=message):
    run(write(tmp_path / name, content), tmp_path / 'out', images=images)


def test_images_are_asked_for(tmp_path):
  with pytest.raises(ValueError, match='expected their folder'):
    run(write(tmp_path / 'a.json', mdetr()), tmp_path / 'out')


def test_boxes_in_another_convention(tmp_path, images):
  content = seqtr()
  content['train'] = [content['train'][0] | {'bbox': [40, 20, 79, 39 - i % 3]} for i in range(60)]
  with pytest.raises(ValueError, match='looks like xyxy pixels'):
    run(write(tmp_path / 'a.json', content), tmp_path / 'out', images=images)


def test_the_verb(tmp_path, images, capsys):
  argv = ['data', 'import', 'refcoco', '--repack', write(tmp_path / 'a.json', uninext()), '--split', 'val', '--images',
          images, '--name', 'refcoco_plus', '--out', tmp_path / 'out', '--workers', 1]
  assert cli.main([str(arg) for arg in argv]) == 0
  assert schema.read_meta(tmp_path / 'out').splits == {'val': 2}
  assert '3 references, 2 images, 4 sentences; published: 3,805 references, 1,500 images (refcoco+ unc)' in (
      capsys.readouterr().out)


# --- published numbers


def test_published_numbers_fit_each_other():
  # github.com/MasterBin-IIAU/UNINEXT, convert_mix_ref.py: the three train splits together have 126908 references.
  train = [refcoco_counts.PUBLISHED[name][by]['train'][0]
           for name, by in (('refcoco', 'unc'), ('refcocog', 'umd'), ('refcoco+', 'unc'))]
  assert sum(train) == 126908
  # Yu et al., 2016: RefCOCO has 50 000 objects with 142 209 expressions; the files have one more.
  unc = refcoco_counts.PUBLISHED['refcoco']['unc'].values()
  assert (sum(n for n, _, _ in unc), sum(n for _, _, n in unc)) == (50000, 142210)


@pytest.mark.parametrize('found, known, split_by, expected', [
    ({'val': (3811, 1500, 10834)}, 'refcoco', 'unc', []), ({'validation': (5000, 4559, 1)}, 'refcoco', None, []),
    ({'val': (3811, 1500, 10833)}, 'refcoco', 'unc', ['10,833 sentences; published: 3,811 references']),
    ({'val': (8811, 4000, 9)}, 'refcoco', None, ['(refcoco unc), 5,000 references, 4,559 images (refcoco google)']),
    ({'train': (5, 5, 5)}, None, None, []), ({'extra': (5, 5, 5)}, 'refcoco', None, []),
    ({'test': (5023, 2600, 1)}, 'refcocog', 'umd', [])])
def test_differences(found, known, split_by, expected):
  got = [text for _, text in refcoco_counts.differences(found, known=known, split_by=split_by)]
  assert len(got) == len(expected) and all(wanted in text for wanted, text in zip(expected, got))
