import json
import pathlib
import types

import pytest

import cloc_jax
from cloc_jax import evaluators, published

CONTENT = json.loads((pathlib.Path(cloc_jax.__file__).parent / 'data' / 'tasks' / 'published.json').read_text())


def evaluation(metrics, **coverage):
  return evaluators.Evaluation(metrics=metrics, skipped={}, protocols={},
                               coverage=evaluators.Coverage(**coverage) if coverage else None)


def test_every_figure_has_a_source_and_no_two_entries_say_the_same():
  seen = [(e['data'], e['metric'], e['paper']) for e in CONTENT['figures']]
  assert len(set(seen)) == len(seen) and {e['paper'] for e in CONTENT['figures']} == set(CONTENT['papers'])
  for entry in CONTENT['figures']:
    assert set(entry) <= {'data', 'near', 'split', 'metric', 'images', 'paper', 'differs', 'values'}
    assert all(1 < value < 100 for value in entry['values'].values()), 'percent'


def test_the_same_protocol_on_the_same_images():
  """SPEC's Table 2, row 13 and below."""
  full = evaluation({'region_recognition/macc': 0.5, 'region_recognition/top1': 0.6}, images=5000, of_images=5000)
  got = {row.metric: row for row in published.rows(full, data='coco', info={})}
  assert got['region_recognition/macc'].theirs == pytest.approx(
      {'CLOC B/16': 0.711, 'CLOC L/14': 0.729, 'CLOC H/14': 0.730})
  assert got['region_recognition/macc'].verdict == 'yes'
  assert got['region_recognition/macc'].text == 'CLOC B/16 71.1, CLOC L/14 72.9, CLOC H/14 73.0'
  assert got['region_recognition/top1'].verdict == 'no: its pre-processing and prompts are its own'
  assert {row.metric for row in published.rows(full, data='lvis', info={})} == set(got)
  assert not published.rows(full, data='', info={}) and not published.rows(full, data='refcoco', info={})


def test_what_differs_is_said():
  some = evaluation({'region_recognition/macc': 0.5, 'image_text_retrieval/i2t_r1': 0.5}, images=79, of_images=79)
  ours = {(r.metric, 'CLOC B/16' in r.theirs): r.verdict for r in published.rows(some, data='coco', info={})}
  assert ours['region_recognition/macc', True] == 'no: 79 images here, 5,000 there'
  foreign = {'preprocessing': 'padded'}
  theirs = {(r.metric, 'CLOC B/16' in r.theirs): r.verdict for r in published.rows(some, data='coco', info=foreign)}
  assert theirs['region_recognition/macc', True] == ours['region_recognition/macc', True], 'regions need the padding'
  assert 'images are padded' in theirs['image_text_retrieval/i2t_r1', True]
  lost = evaluation({'region_recognition/macc': 0.5}, images=5000, of_images=5000, regions=9, of_regions=10)
  assert published.rows(lost, data='coco', info={})[0].verdict == 'no: here of 5,000 of 5,000 images, 9 of 10 regions'


def test_other_classes_are_another_task(coco_mini):
  full = evaluation({'region_recognition/macc': 0.5}, images=5000, of_images=5000)
  verdict = lambda names: published.rows(full, data='coco', info={}, categories=names)[0].verdict
  coco, lvis = map(published.classes_of, ('coco', 'lvis'))
  assert verdict(coco) == verdict(coco[::-1]) == 'yes' and not published.classes_of('grit')
  assert verdict((*coco, 'sky')) == 'no: 81 classes here, 80 there'
  assert verdict(('human', *coco[1:])) == "no: 1 classes have other names here, such as 'person'"
  # The list itself: COCO's own file, and what LVIS's paper and annotations are known for.
  stored = json.loads((coco_mini / 'annotations' / 'instances_val2017.json').read_text())['categories']
  assert coco == tuple(c['name'] for c in sorted(stored, key=lambda c: c['id']))
  assert len(set(lvis)) == 1203 and (lvis[0], lvis[-1]) == ('aerosol can', 'zucchini')
  assert not any('_' in name for name in lvis) and {'bow (weapon)', 'bow (decorative ribbons)'} <= set(lvis)


def test_retrieval_may_be_compared_on_karpathys_test_images_alone():
  def verdict(data, split, **metrics):
    found = {f'image_text_retrieval/{name}': value for name, value in metrics.items()}
    found = evaluation({'image_text_retrieval/i2t_r1': 0.5} | found, images=5000, of_images=5000)
    return next(r.verdict for r in published.rows(found, data=data, info={}, split=split) if 'CLOC B/16' in r.theirs)
  assert verdict('coco-karpathy', 'test', images=5000, captions=25000) == 'yes'
  assert verdict('coco-karpathy', 'test', images=5000, captions=25010) == (
      'no: 25,010 captions of 5,000 images here, five of each there')
  # As many images as the test split has, but others.
  assert verdict('coco-karpathy', 'val', images=5000, captions=25000) == "no: split 'val' here, 'test' there"
  assert verdict('coco', 'val', images=5000, captions=25000).startswith("no: those are Karpathy's test images")


def test_as_many_images_of_another_split_are_others():
  full = evaluation({'region_recognition/macc': 0.5}, images=5000, of_images=5000)
  of = lambda split: published.rows(full, data='coco', info={}, split=split)[0].verdict
  assert of('val') == of('validation') == of('val2017') == 'yes'
  folder = evaluation({'zeroshot/top1': 0.5}, images=50000, of_images=50000)
  assert published.rows(folder, data='imagenet', info={}, split='val_images')  # a folder's name is no split
  assert of('train') == "no: split 'train' here, 'val' there"  # --limit 5000


def test_the_splits_and_kinds_of_refcoco_are_told_apart():
  found = evaluation({'grounding_supplied/acc_iou50': 0.5})
  of = lambda data, split: [r.verdict for r in published.rows(found, data=data, info={}, split=split)]
  assert of('refcoco', 'val') == of('refcoco', 'validation') == ['no: unless the proposals are the same']
  assert of('refcoco', 'testA') == ["no: unless the proposals are the same; split 'testA' here, 'val' there"]
  assert of('refcoco+', 'val') == of('refcocog', 'val') == []


def test_data_sets_are_known_by_their_provenance():
  of = lambda provenance, name='x': published.data_of(
      types.SimpleNamespace(name=name, extra={'provenance': provenance}))
  assert [of('coco annotations'), of('lvis annotations'), of('RefCOCO annotations on COCO images'),
          of('Flickr30k Entities annotations on …'), of('objects365 annotations'), of('cocoa annotations')] == [
              'coco', 'lvis', 'refcoco', 'flickr30k', '', '']
  assert of("Karpathy's splits of coco") == 'coco-karpathy' and of("Karpathy's splits of flickr8k") == ''
  kinds = [types.SimpleNamespace(name='x', extra={'provenance': 'RefCOCO annotations on', 'data_set': kind})
           for kind in ('refcoco+', None)]
  assert [published.data_of(meta) for meta in kinds] == ['refcoco+', 'refcoco']
  assert of('', name='grit') == 'grit' and of('', name='coco') == ''
