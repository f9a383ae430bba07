"""COCO files → records: a small made-up COCO where every count is known, and the real one where it is at hand."""
import copy
import dataclasses
import json

import numpy as np
from painted_pictures import encode_png
import PIL.Image
import pytest

from cloc_jax.data import eval_pipeline
from cloc_jax.data import schema
from cloc_jax.data import sources
from cloc_jax.data.importers import coco as coco_lib
from cloc_jax.data.importers import counts as counts_lib
from cloc_jax.data.importers import engine

CATEGORIES = [{'id': 7, 'name': 'Traffic Light'}, {'id': 2, 'name': 'dog'}]


def annotation(image, box, *, category=2, **more):
  return {'image_id': image, 'bbox': box, 'category_id': category, 'iscrowd': 0} | more


def caption(image, text):
  return {'image_id': image, 'caption': text}


class Coco:
  """A COCO folder to be written, with two images of 40×80 (height × width) pixels."""

  def __init__(self, root):
    self.root = root
    self.instances = {
        'images': [{'id': i, 'file_name': f'{i:03}.png', 'height': 40, 'width': 80} for i in (1, 2)],
        'annotations': [], 'categories': copy.deepcopy(CATEGORIES), 'licenses': [{'name': 'CC BY', 'url': 'http://x'}]}
    self.captions = {'annotations': []}

  def source(self, split='train', *, images=(1, 2)):
    """Writes the files and returns the CocoSource."""
    folder = self.root / split
    folder.mkdir()
    for i in images:
      (folder / f'{i:03}.png').write_bytes(encode_png(np.full((40, 80, 3), i, np.uint8)))
    for kind in ('instances', 'captions'):
      (self.root / f'{kind}_{split}.json').write_text(json.dumps(getattr(self, kind)))
    return coco_lib.CocoSource(
        split=split, images=folder, instances=self.root / f'instances_{split}.json',
        captions=self.root / f'captions_{split}.json')


@pytest.fixture(name='coco')
def coco_fixture(tmp_path):
  return Coco(tmp_path)


def import_coco(given, *, out, **settings):
  names = {f.name for f in dataclasses.fields(coco_lib.Coco)}
  importer = coco_lib.Coco(tuple(given), **{k: v for k, v in settings.items() if k in names})
  return engine.run(importer, out=out, **{k: v for k, v in settings.items() if k not in names})


def records(path, split='train'):
  source = sources.RecordSource(path, split=split)
  return [source[i] for i in range(len(source))]


def test_boxes_names_and_captions(coco):
  coco.instances['annotations'] = [annotation(2, [8, 10, 16, 20], category=7), annotation(2, [0, 0, 80, 40])]
  coco.captions['annotations'] = [caption(2, ' Two dogs. '), caption(2, 'Dogs, two.'), caption(1, 'Nothing at all.')]
  out = coco.root / 'out'
  report = import_coco([coco.source()], out=out)['train']
  first, second = records(out)
  assert (first.image_id, first.regions, first.captions) == ('1', (), ('Nothing at all.',))
  assert second.captions == ('Two dogs.', 'Dogs, two.') and (second.height, second.width) == (40, 80)
  assert [(r.caption, r.category, r.source, r.score) for r in second.regions] == [
      ('traffic light', 'traffic light', 'coco', 1.0), ('dog', 'dog', 'coco', 1.0)]
  np.testing.assert_allclose([r.box for r in second.regions], [[0.1, 0.25, 0.3, 0.75], [0, 0, 1, 1]], rtol=1e-6)
  assert second.image == (coco.root / 'train' / '002.png').read_bytes()
  assert [report.written(what) for what in ('images', 'boxes', 'captions')] == [2, 2, 3]
  assert report.examples('images', 'noted', 'without boxes') == ['image 1']


def test_every_annotation_is_counted_once(coco):
  coco.instances['annotations'] = [
      annotation(1, [1, 1, 5, 5]), annotation(1, [60, 30, 30, 30]), annotation(1, [1, 1, 5, 5], category=7, iscrowd=1),
      annotation(1, [1, 1, 0, 5]), annotation(1, [9, 9, -4, 5]), annotation(1, [90, 1, 5, 5]),
      annotation(99, [1, 1, 5, 5]), annotation(2, [1, 1, 5, 5])]
  coco.captions['annotations'] = [caption(1, 'one'), caption(1, '  '), caption(99, 'of nothing'), caption(2, 'lost')]
  out = coco.root / 'out'
  source = coco.source(images=[1])
  reports = import_coco([source], out=out, allow_missing=True)
  counts = reports['train']
  assert {row: counts.of(*row) for row in counts.rows()} == {
      ('images', 'kept', ''): 1, ('images', 'dropped', 'missing'): 1, ('boxes', 'kept', ''): 1,
      ('boxes', 'repaired', 'cut at the border'): 1, ('boxes', 'dropped', 'crowd'): 1,
      ('boxes', 'dropped', 'inverted'): 1, ('boxes', 'dropped', 'empty'): 2,
      ('boxes', 'dropped', 'of an image not listed'): 1, ('boxes', 'dropped', 'image lost'): 1,
      ('captions', 'kept', ''): 1, ('captions', 'dropped', 'blank'): 1,
      ('captions', 'dropped', 'of an image not listed'): 1, ('captions', 'dropped', 'image lost'): 1}
  assert counts.of('boxes') == len(coco.instances['annotations'])
  assert counts.of('captions') == len(coco.captions['annotations'])
  assert counts.examples('boxes', 'dropped', 'crowd') == ['image 1, annotations[2]']
  assert counts.examples('boxes', 'dropped', 'of an image not listed') == ['annotations[6]']
  meta = schema.read_meta(out)
  assert meta.extra['counts']['train'] == counts.to_json() and meta.extra['licenses'] == {'CC BY': 'http://x'}
  assert meta.categories == ('dog', 'traffic light')  # by their numbers
  assert meta.extra['crowds'] == {'train': {'1': [[1, 1, 1, 6, 6]]}}, 'for detection'
  np.testing.assert_allclose(records(out)[0].regions[1].box, [0.75, 0.75, 1, 1])
  table = counts_lib.table(reports)
  assert 'captions dropped: blank' in table and 'unreadable' not in table and 'image 1, annotations[2]' in table


def test_several_splits(coco, tmp_path_factory):
  coco.captions['annotations'] = [caption(1, 'one')]
  other = Coco(tmp_path_factory.mktemp('other'))
  out = coco.root / 'out'
  reports = import_coco([coco.source(), other.source('val')], out=out)
  assert schema.read_meta(out).splits == {'train': 2, 'val': 2}
  assert [reports[s].of('images', 'noted', 'without captions') for s in ('train', 'val')] == [1, 2]
  with pytest.raises(FileExistsError):
    import_coco([coco.source('again')], out=out)
  import_coco([coco.source('more')], out=out, overwrite=True)
  assert schema.read_meta(out).splits == {'more': 2}
  twice = coco.source('twice')
  with pytest.raises(ValueError, match='two sources for the same split'):
    import_coco([twice, twice], out=out, overwrite=True)


def test_without_captions(coco):
  source = coco.source()
  report = import_coco(
      [coco_lib.CocoSource(split='train', images=source.images, instances=source.instances)],
      out=coco.root / 'out')['train']
  assert report.written('images') == report.of('images', 'noted', 'without captions') == 2


def test_missing_images_are_named_and_counted(coco):
  coco.instances['images'] = [
      {'id': i, 'file_name': f'{i:03}.png', 'height': 40, 'width': 80} for i in range(1, 14)]
  source = coco.source(images=[5])
  with pytest.raises(FileNotFoundError) as error:
    import_coco([source], out=coco.root / 'out')
  text = str(error.value)
  assert '12 of 13 images are missing or unreadable' in text and 'and 2 more' in text
  assert '001.png' in text and '005.png' not in text and '011.png' in text and '012.png' not in text
  assert not (coco.root / 'out').exists()


def test_images_of_another_size_are_named(coco):
  source = coco.source()
  (coco.root / 'train' / '001.png').write_bytes(encode_png(np.zeros((80, 40, 3), np.uint8)))
  (coco.root / 'train' / '002.png').write_bytes(b'<html>')
  message = r'(?s)2 of 2 images.*001.png \(annotated as 40×80, but is 80×40\): of another size'
  with pytest.raises(ValueError, match=message) as error:
    import_coco([source], out=coco.root / 'out')
  assert '002.png' in str(error.value)


def test_the_upright_size_is_what_counts(coco):
  source = coco.source()
  exif = PIL.Image.Exif()
  exif[0x0112] = 6
  PIL.Image.new('RGB', (40, 80)).save(coco.root / 'train' / '001.png', exif=exif)
  assert import_coco([source], out=coco.root / 'out')['train'].written('images') == 2
  batch = next(iter(eval_pipeline.eval_batches(coco.root / 'out', split='train', batch_size=2, image_size=16)))
  assert (batch.examples[0].geometry.height, batch.examples[0].geometry.width) == (40, 80)


@pytest.mark.parametrize('path, message', [
    (('categories',), r"instances_train.json: no key 'categories'; found \['annotations', 'images', 'licenses'\]"),
    (('images', 1, 'file_name'), r"instances_train.json: images\[1\]: no key 'file_name'; found \['height', 'id'"),
    (('annotations', 0, 'bbox'), r"instances_train.json: annotations\[0\]: no key 'bbox'"),
    (('annotations', 0, 'category_id'), r"annotations\[0\]: no key 'category_id'"),
    (('categories', 1, 'name'), r"categories\[1\]: no key 'name'")])
def test_a_missing_key_is_named_with_its_file_and_place(coco, path, message):
  coco.instances['annotations'] = [annotation(1, [1, 1, 5, 5])]
  item = coco.instances
  for step in path[:-1]:
    item = item[step]
  del item[path[-1]]
  with pytest.raises(ValueError, match=message):
    import_coco([coco.source()], out=coco.root / 'out')


@pytest.mark.parametrize('key, value, message', [
    ('file_name', 5, r"images\[1\]: 'file_name' must be a file's name, got 5"),
    ('height', None, r'images\[1\]: expected height and width in whole pixels, got None and 80'),
    ('id', 1, "images\\[1\\]: image id 1 is there twice: as '001.png' and as '002.png'")])
def test_bad_images_are_named(coco, key, value, message):
  coco.instances['images'][1][key] = value
  with pytest.raises(ValueError, match=message):
    import_coco([coco.source()], out=coco.root / 'out')


def test_an_image_listed_twice_is_imported_once(coco):
  coco.instances['images'].append(dict(coco.instances['images'][0]))
  report = import_coco([coco.source()], out=coco.root / 'out')['train']
  assert len(records(coco.root / 'out')) == 2 and report.of('images') == 3
  assert report.of('images', 'dropped', 'listed twice') == 1


def test_captions_of_any_script_and_keys_in_any_order(coco):
  texts = ['كلب يركض', 'שני כלבים', 'ein Hündchen 🐕']
  coco.captions['annotations'] = [caption(2, text) for text in texts]
  coco.instances['annotations'] = [annotation(2, [8, 10, 16, 20])]
  coco.instances = dict(sorted(coco.instances.items()))  # annotations and categories before images
  import_coco([coco.source()], out=coco.root / 'out')
  assert records(coco.root / 'out')[1].captions == tuple(texts) and len(records(coco.root / 'out')[1].regions) == 1


def test_a_missing_key_of_the_captions_is_named(coco):
  coco.captions['annotations'] = [{'image_id': 1, 'text': 'one'}]
  with pytest.raises(ValueError, match=r"captions_train.json: annotations\[0\]: no key 'caption'; found \['image_id'"):
    import_coco([coco.source()], out=coco.root / 'out')


@pytest.mark.parametrize('bad, message', [
    (annotation(1, [1, 2, 3]), r"annotations\[0\]: 'bbox' .* must be four numbers.*\[1, 2, 3\]"),
    (annotation(1, 'abcd'), 'must be four numbers'),
    (annotation(1, [1, 1, 5, float('nan')]), 'instances_train.json is not a JSON file: .*near .*NaN'),
    (annotation(1, [1, 1, 5, 5], category='dog'), "category_id must be a whole number, got 'dog'"),
    (annotation(1, [1, 1, 5, 5], category=3), r'category_id 3 is not among the categories \[2, 7\]')])
def test_bad_annotations_are_named(coco, bad, message):
  coco.instances['annotations'] = [bad]
  with pytest.raises(ValueError, match=message):
    import_coco([coco.source()], out=coco.root / 'out')


def test_wrong_files(coco):
  source = coco.source()
  def run(**changes):
    return import_coco(
        [coco_lib.CocoSource(**(vars(source) | changes))], out=coco.root / 'out')
  with pytest.raises(FileNotFoundError, match=r'no such file: .*did you mean .*instances_train.json'):
    run(instances=coco.root / 'instance_train.json')
  with pytest.raises(FileNotFoundError, match="split 'train': no such folder of images"):
    run(images=coco.root / 'trian')
  with pytest.raises(ValueError, match="captions_train.json: no key 'images'"):
    run(instances=source.captions)
  (coco.root / 'broken.json').write_text('{"images": [')
  with pytest.raises(ValueError, match='broken.json is cut off: it ends after 12 bytes'):
    run(instances=coco.root / 'broken.json')
  (coco.root / 'list.json').write_text('[]')
  with pytest.raises(ValueError, match='list.json: expected an object'):
    run(instances=coco.root / 'list.json')
  with pytest.raises(ValueError, match='expected either instances or panoptic'):
    run(panoptic=source.instances)
  with pytest.raises(ValueError, match="split 'train': expected instances or panoptic for boxes, or captions, or both"):
    run(instances=None, captions=None)


def test_captions_alone(coco):
  """A captions file lists its images as the others do: with it alone there are captions and no regions."""
  coco.captions |= {'images': coco.instances['images'], 'licenses': coco.instances['licenses']}
  coco.captions['annotations'] = [caption(2, 'Two dogs.'), caption(1, 'Nothing at all.'), caption(2, 'Dogs.')]
  source = dataclasses.replace(coco.source(), instances=None)
  report = import_coco([source], out=coco.root / 'out')['train']
  assert [(e.image_id, e.captions, e.regions) for e in records(coco.root / 'out')] == [
      ('1', ('Nothing at all.',), ()), ('2', ('Two dogs.', 'Dogs.'), ())]
  assert [report.written(what) for what in ('images', 'boxes', 'captions')] == [2, 0, 3]
  meta = schema.read_meta(coco.root / 'out')
  assert meta.categories == () and meta.extra['files'] == ['captions_train.json'] and meta.extra['licenses']
  # Beside a split with boxes, for whose categories it does not matter.
  other = dataclasses.replace(source, split='val')
  coco.instances['annotations'] = [annotation(2, [8, 10, 16, 20])]
  (coco.root / 'instances_train.json').write_text(json.dumps(coco.instances))
  with_boxes = dataclasses.replace(source, instances=coco.root / 'instances_train.json')
  import_coco([with_boxes, other], out=coco.root / 'both')
  assert schema.read_meta(coco.root / 'both').categories == ('dog', 'traffic light')
  assert [len(e.regions) for split in ('train', 'val') for e in records(coco.root / 'both', split)] == [0, 1, 0, 0]


def test_sources_must_agree_on_categories(coco, tmp_path_factory):
  other = Coco(tmp_path_factory.mktemp('other'))
  other.instances['categories'] = [{'id': 2, 'name': 'cat'}]
  with pytest.raises(ValueError, match="category 2 is 'cat' here but 'dog' in another source"):
    import_coco([coco.source(), other.source('val')], out=coco.root / 'out')


def test_real_photos(coco_mini, tmp_path):
  given = [coco_lib.CocoSource(
      split=split, images=coco_mini / f'{split}2017',
      instances=coco_mini / 'annotations' / f'instances_{split}2017.json',
      captions=coco_mini / 'annotations' / f'captions_{split}2017.json') for split in ('train', 'val')]
  reports = import_coco(given, out=tmp_path / 'coco')
  for source in given:
    listed = json.loads(source.instances.read_text())['annotations']
    report = reports[source.split]
    assert report.of('boxes', 'dropped', 'crowd') == sum(a['iscrowd'] for a in listed)
    assert report.of('boxes') == len(listed)
    # The widest region, by a loop over the file: back in pixels, it is COCO's own box.
    plain = max((a for a in listed if not a['iscrowd']), key=lambda a: a['bbox'][2])
    record = next(r for r in records(tmp_path / 'coco', source.split) if r.image_id == str(plain['image_id']))
    x, y, w, h = plain['bbox']
    pixels = [np.array(r.box) * [record.width, record.height, record.width, record.height] for r in record.regions]
    assert min(np.abs(p - [x, y, x + w, y + h]).max() for p in pixels) < 0.01
  batches = list(eval_pipeline.eval_batches(tmp_path / 'coco', split='val', batch_size=16, image_size=64))
  assert sum(len(b.examples) for b in batches) == reports['val'].written('images') == 79
  assert all((e.boxes >= 0).all() and (e.boxes <= 1).all() for b in batches for e in b.examples)
