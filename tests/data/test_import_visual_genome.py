"""Visual Genome: entries as its own description shows them, in images that are painted.

homes.cs.washington.edu/~ranjay/visualgenome/api_readme (image_data, region_descriptions, objects); the objects of
version 1.4 have `merged_object_ids`, image ids of the oldest version are `id`.
"""
import json

import numpy as np
from painted_pictures import encode_png
import pytest

from cloc_jax import cli
from cloc_jax.data import sources
from cloc_jax.data.importers import engine
from cloc_jax.data.importers import visual_genome

IMAGES = [{'image_id': 1, 'url': 'https://cs.stanford.edu/people/rak248/VG_100K_2/1.jpg', 'width': 800, 'height': 600,
           'coco_id': None, 'flickr_id': None},
          {'image_id': 2407890, 'url': 'https://cs.stanford.edu/people/rak248/VG_100K/2407890.jpg', 'width': 500,
           'height': 281, 'coco_id': 547168, 'flickr_id': 8505158818}]
REGIONS = [{'regions': [
    {'region_id': 1382, 'width': 82, 'height': 139, 'image_id': 1, 'phrase': 'the clock is green in colour', 'y': 57,
     'x': 421},
    {'region_id': 1383, 'width': 182, 'height': 109, 'image_id': 1, 'phrase': 'shade is along the street ', 'y': 372,
     'x': 700}], 'id': 1},
    {'regions': [{'region_id': 1353, 'x': 117, 'y': 79, 'width': 249, 'height': 107, 'image_id': 2407890, 'phrase': ' ',
                  'synsets': []}], 'id': 2407890},
    {'regions': [{'region_id': 5, 'x': 0, 'y': 0, 'width': 2, 'height': 2, 'image_id': 3, 'phrase': 'a'}], 'id': 3}]
OBJECTS = [{'image_id': 1, 'image_url': IMAGES[0]['url'], 'objects': [
    {'synsets': ['clock.n.01'], 'h': 339, 'object_id': 1058498, 'merged_object_ids': [], 'names': ['clock', 'dial'],
     'w': 79, 'y': 91, 'x': 421},
    {'synsets': [], 'h': 0, 'object_id': 2, 'merged_object_ids': [], 'names': ['street'], 'w': 9, 'y': 3, 'x': 4}]}]


@pytest.fixture(name='make')
def make_fixture(tmp_path):
  for item in IMAGES:
    path = tmp_path / 'vg' / '/'.join(item['url'].split('/')[-2:])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_png(np.zeros((item['height'], item['width'], 3), np.uint8)))

  def make(regions=REGIONS, objects=OBJECTS, image_data=IMAGES, **settings):
    for name, content in (('image_data', image_data), ('region_descriptions', regions), ('objects', objects)):
      (tmp_path / f'{name}.json').write_text(content if isinstance(content, str) else json.dumps(content))
    return visual_genome.VisualGenome(tmp_path / 'vg', tmp_path / 'image_data.json',
                                      tmp_path / 'region_descriptions.json', tmp_path / 'objects.json', **settings)
  return make


def records(path, split='train'):
  source = sources.RecordSource(path, split=split)
  return [source[i] for i in range(len(source))]


@pytest.mark.parametrize('images_per_shard', [1, 1024])
def test_regions_and_objects(make, tmp_path, images_per_shard):
  found = engine.run(make(images_per_shard=images_per_shard), out=tmp_path / 'out')['train']
  first, second = records(tmp_path / 'out')
  assert (first.image_id, first.height, first.width, second.image_id, second.regions) == ('1', 600, 800, '2407890', ())
  assert [(r.caption, r.category, r.source) for r in first.regions] == [
      ('the clock is green in colour', '', 'region'), ('shade is along the street', '', 'region'),
      ('clock', 'clock', 'object')]
  np.testing.assert_allclose(first.regions[0].box, [421 / 800, 57 / 600, 503 / 800, 196 / 600], rtol=1e-6)
  np.testing.assert_allclose(first.regions[2].box, [421 / 800, 91 / 600, 500 / 800, 430 / 600], rtol=1e-6)
  assert first.regions[1].box[2] == 1 and found.of('boxes', 'repaired', 'cut at the border') == 1
  assert found.examples('boxes', 'dropped', 'blank caption') == ['image 2407890, regions[0]']
  assert found.examples('boxes', 'dropped', 'empty') == ['image 1, objects[1]']
  assert found.of('boxes', 'dropped', 'of an image not listed') == 1 and found.of('boxes') == 6


def test_the_oldest_version(make, tmp_path):
  images = [{**item, 'id': item['image_id']} for item in IMAGES]
  objects = [{'id': 1, 'objects': [{'id': 9, 'names': ['clock'], 'x': 8, 'y': 6, 'w': 80, 'h': 60}]}]
  for item in images:
    del item['image_id']
  engine.run(make(image_data=images, objects=objects), out=tmp_path / 'out')
  np.testing.assert_allclose(records(tmp_path / 'out')[0].regions[2].box, [0.01, 0.01, 0.11, 0.11], rtol=1e-5)


@pytest.mark.parametrize('files, message', [
    (dict(regions={'regions': []}), 'region_descriptions.json: expected a list at the top, got an object'),
    (dict(regions=json.dumps(REGIONS)[:-9]), 'region_descriptions.json is cut off'),
    (dict(objects=[{'objects': []}]), r"objects.json: \[0\]: no key 'id'; found \['objects'\]"),
    (dict(objects=[{'image_id': 1, 'objects': [{'x': 1, 'y': 1, 'w': 3, 'names': ['a']}]}]),
     r"objects.json: \[0\], objects\[0\]: no key 'h'"),
    (dict(image_data=[{**IMAGES[0], 'width': None}]), r'image_data.json: \[0\]: expected height and width')])
def test_bad_files_are_named(make, tmp_path, files, message):
  with pytest.raises(ValueError, match=message):
    engine.run(make(**files), out=tmp_path / 'out')


def test_the_verb(make, tmp_path):
  make()
  argv = ['data', 'import', 'visual-genome', '--images', tmp_path / 'vg', '--image-data', tmp_path / 'image_data.json',
          '--regions', tmp_path / 'region_descriptions.json', '--out', tmp_path / 'out', '--workers', 1]
  assert cli.main([str(arg) for arg in argv]) == 0
  assert len(records(tmp_path / 'out')[0].regions) == 2
