"""RefCOCO's pickle and instances.json.

github.com/lichengunc/refer: README ("refs(dataset).json" entries), refer.py (how both files hang together).
"""
import hashlib
import json
import os
import pickle

import numpy as np
from painted_pictures import encode_png
import pytest

from cloc_jax import cli
from cloc_jax.data import schema
from cloc_jax.data import sources
from cloc_jax.data.importers import engine
from cloc_jax.data.importers import refcoco


def ref(index, *, image, ann, split, sents, category=1):
  return {'sent_ids': [10 * index + j for j in range(len(sents))],
          'file_name': f'COCO_train2014_{image:012}_{index}.jpg', 'ann_id': ann, 'ref_id': index, 'image_id': image,
          'split': split, 'category_id': category,
          'sentences': [{'tokens': sent.split(), 'raw': sent.upper(), 'sent_id': 10 * index + j, 'sent': sent}
                        for j, sent in enumerate(sents)]}


REFS = [ref(0, image=581857, ann=1719310, split='train', sents=['the lady with the blue shirt', 'lady on right']),
        ref(1, image=9, ann=5, split='testB', sents=['le garçon'], category=2),
        ref(2, image=581857, ann=1719311, split='train', sents=['left one']),
        ref(3, image=581857, ann=1719311, split='val', sents=['again'])]
INSTANCES = {
    'info': {}, 'licenses': [],
    'images': [{'license': 1, 'file_name': f'COCO_train2014_{i:012}.jpg', 'coco_url': '', 'height': 40, 'width': 80,
                'date_captured': '', 'flickr_url': '', 'id': i} for i in (581857, 9, 10)],
    'annotations': [{'segmentation': [[1, 2, 3, 4]], 'area': 9.0, 'iscrowd': 0, 'image_id': image, 'bbox': box,
                     'category_id': 1, 'id': key} for key, image, box in (
                         (1719310, 581857, [8.0, 4.0, 32.0, 32.0]), (1719311, 581857, [0, 0, 8, 4]),
                         (5, 9, [40, 20, 40, 20]), (6, 9, [0, 0, 1, 1]))],
    'categories': [{'supercategory': 'person', 'id': 1, 'name': 'person'},
                   {'supercategory': 'x', 'id': 2, 'name': 'boy'}]}


@pytest.fixture(name='make')
def make_fixture(tmp_path):
  (tmp_path / 'train2014').mkdir()
  for i in (581857, 9):
    (tmp_path / 'train2014' / f'COCO_train2014_{i:012}.jpg').write_bytes(encode_png(np.zeros((40, 80, 3), np.uint8)))

  def make(refs=REFS, *, data=None, instances=INSTANCES, **settings):
    (tmp_path / 'refs(unc).p').write_bytes(pickle.dumps(refs, protocol=2) if data is None else data)
    (tmp_path / 'instances.json').write_text(json.dumps(instances))
    return refcoco.RefCoco(tmp_path / 'refs(unc).p', tmp_path / 'instances.json', tmp_path / 'train2014', **settings)
  return make


def records(path, split='train'):
  source = sources.RecordSource(path, split=split)
  return [source[i] for i in range(len(source))]


def test_sentences_are_regions(make, tmp_path):
  found = engine.run(make(), out=tmp_path / 'out')
  assert list(found) == ['train', 'val', 'testB']
  [got] = records(tmp_path / 'out')
  assert (got.image_id, got.height, got.width, got.captions) == ('581857', 40, 80, ())
  assert [(r.caption, r.category, r.source) for r in got.regions] == [
      (text, 'person', 'refcoco') for text in ('the lady with the blue shirt', 'lady on right', 'left one')]
  np.testing.assert_allclose([r.box for r in got.regions], [[0.1, 0.1, 0.5, 0.9]] * 2 + [[0, 0, 0.1, 0.1]], rtol=1e-6)
  assert [r.regions[0].caption for r in records(tmp_path / 'out', 'testB')] == ['le garçon']
  meta = schema.read_meta(tmp_path / 'out')
  assert meta.categories == ('person', 'boy')
  assert meta.extra['sha256'] == {'refs(unc).p': hashlib.sha256((tmp_path / 'refs(unc).p').read_bytes()).hexdigest()}


def test_other_numbers_than_the_published_ones_are_noted(make, tmp_path):
  found = engine.run(make(), out=tmp_path / 'out')
  [said] = found['testB'].examples('references', 'noted', 'not the published number')
  assert said == ('testB: 1 references, 1 images, 1 sentences; '
                  'published: 1,810 references, 750 images, 5,095 sentences (refcoco unc)')
  assert found['train'].of('references', 'noted') == 1


def test_wanted_splits(make, tmp_path):
  assert list(engine.run(make(wanted=('val',)), out=tmp_path / 'out')) == ['val']
  with pytest.raises(ValueError, match=r"no references of split 'testA'; it has \['testB', 'train', 'val'\]"):
    engine.run(make(wanted=('val', 'testA')), out=tmp_path / 'other')


def test_pickles_of_python_2():
  # Protocol 0 as Python 2 writes it: {'sent': 'gar\xc3\xa7on'} with a byte string.
  assert _read(b"(dp0\nS'sent'\np1\nS'gar\\xc3\\xa7on'\np2\ns.") == {'sent': 'garçon'}


class Harmful:
  """Would make a file if it were unpickled."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (str(self.path),)


def test_pickles_run_nothing(make, tmp_path):
  for protocol in range(5):
    with pytest.raises(ValueError, match=r'refs\(unc\).p is no pickle of plain containers.*asks for \w+.mkdir'):
      engine.run(make(data=pickle.dumps([Harmful(tmp_path / 'harm')], protocol=protocol)), out=tmp_path / 'out')
  assert not (tmp_path / 'harm').exists()


@pytest.mark.parametrize('settings, message', [
    (dict(data=pickle.dumps(REFS)[:-30]), 'no pickle of plain containers, or cut off'),
    (dict(data=b''), 'cut off'),
    (dict(refs={'a': 1}), 'expected a list of references, got a dict'),
    (dict(refs=[{'ann_id': 5}]), r"\[0\]: no key 'image_id'; found \['ann_id'\]"),
    (dict(refs=[ref(0, image=9, ann=77, split='val', sents=['a'])]), r'\[0\]: ann_id 77 is not in .*instances.json'),
    (dict(refs=[ref(0, image=10, ann=5, split='val', sents=['a'])]), 'ann_id 5 is of image 9, not of 10'),
    (dict(refs=[ref(0, image=9, ann=5, split='val', sents=['a'], category=3)]), 'category_id 3 is not among')])
def test_bad_files_are_named(make, tmp_path, settings, message):
  with pytest.raises(ValueError, match=message):
    engine.run(make(**settings), out=tmp_path / 'out')


def test_lost_images(make, tmp_path):
  (tmp_path / 'train2014' / 'COCO_train2014_000000000009.jpg').unlink()
  with pytest.raises(FileNotFoundError, match='000000000009.jpg: missing'):
    engine.run(make(), out=tmp_path / 'out')


def test_the_verb(make, tmp_path):
  make()
  argv = ['data', 'import', 'refcoco', '--refs', tmp_path / 'refs(unc).p', '--instances', tmp_path / 'instances.json',
          '--images', tmp_path / 'train2014', '--split', 'testB', '--split', 'train', '--name', 'refcoco_plus', '--out',
          tmp_path / 'out', '--workers', 1]
  assert cli.main([str(arg) for arg in argv]) == 0
  assert records(tmp_path / 'out', 'testB')[0].regions[0].source == 'refcoco_plus'


def _read(data):
  import tempfile
  with tempfile.NamedTemporaryFile(suffix='.p') as file:
    file.write(data)
    file.flush()
    return refcoco.read_pickle(file.name)
