"""The report of hand-made predictions: what is shown is what was worst and best, computed another way."""
import dataclasses
import re

import numpy as np
import pytest
from html_tree import assert_own_direction, assert_stands_alone, parse

from cloc_jax import eval_report, evaluators, findings, pictures
from cloc_jax.evaluators import Predictions, zeroshot
from cloc_jax.geometry import resize_with_pad

NAMES = ('cat', 'dog', 'bus', 'car')
IMAGES = 40
GEOMETRY = resize_with_pad(height=100, width=200, canvas=50)


def unit(z):
  return (z / np.linalg.norm(z, axis=-1, keepdims=True)).astype(np.float32)


@pytest.fixture(name='z_class', scope='module')
def z_class_fixture():
  return unit(np.random.default_rng(1).normal(size=(4, 16)))


@pytest.fixture(name='predictions', scope='module')
def predictions_fixture(z_class):
  """A region an image, in part like its class; and a box found."""
  rng = np.random.default_rng(0)
  label = rng.integers(0, 4, IMAGES)
  low = rng.uniform(0, 80, (IMAGES, 2))
  boxes = np.concatenate([low, low + rng.uniform(10, 20, (IMAGES, 2))], 1)
  found = boxes + rng.normal(size=boxes.shape) * rng.uniform(0, 12, (IMAGES, 1))
  z_image = unit(rng.normal(size=(IMAGES, 16)))
  return Predictions(
      image_ids=tuple(f'im{i}' for i in range(IMAGES)), z_image=z_image, geometry=(GEOMETRY,) * IMAGES,
      captions=tuple(f'<caption> {i}' for i in range(IMAGES)), caption_image=np.arange(IMAGES),
      z_caption=unit(z_image + rng.normal(size=z_image.shape) * 0.4), boxes=GEOMETRY.boxes_to_canvas(boxes),
      region_image=np.arange(IMAGES), region_captions=tuple(f'a {NAMES[c]} {i}' for i, c in enumerate(label)),
      categories=tuple(NAMES[c] for c in label), z_region=unit(z_class[label] + rng.normal(size=(IMAGES, 16)) * 0.35),
      z_region_text=unit(rng.normal(size=(IMAGES, 16))), pred_boxes=GEOMETRY.boxes_to_canvas(found),
      pred_scores=np.ones(IMAGES, np.float32))


def choose(predictions, z_class, **changes):
  def encode_text(texts, *, region):
    return z_class[[NAMES.index(t) for t in texts]]
  return findings.choose(dataclasses.replace(predictions, **changes), categories=NAMES, encode_text=encode_text)


def test_best_and_worst_regions_by_their_margin(predictions, z_class):
  got = choose(predictions, z_class)
  sim = predictions.z_region @ z_class.T
  margin = {}
  for i, name in enumerate(predictions.categories):
    others = [s for c, s in enumerate(sim[i]) if NAMES[c] != name]
    margin[f'im{i}'] = float(sim[i][NAMES.index(name)] - max(others))
  best, worst = (got.regions[f'Recognition: {what}, by the widest margin'] for what in ('right', 'wrong'))
  assert len(best) == 8 and worst and all(margin[r.image] > 0 for r in best) and all(margin[r.image] < 0 for r in worst)
  assert best[0].image == max(margin, key=margin.get) and worst[0].image == min(margin, key=margin.get)
  shown = [margin[r.image] for r in best]
  assert shown == sorted(shown, reverse=True) and max([r.title for r in best].count(n) for n in NAMES) <= 2
  i = int(worst[0].image[2:])
  assert worst[0].says == NAMES[int(sim[i].argmax())] and worst[0].title == predictions.categories[i]
  assert dict(worst[0].scores) == pytest.approx(dict(zip(NAMES, sim[i].tolist())), abs=1e-6)
  wrong = sum(m < 0 for m in margin.values())
  counts = got.confusion.counts
  assert counts.sum() == IMAGES and counts.sum() - np.trace(counts) == wrong


def test_grounding_and_retrieval_examples(predictions, z_class):
  got = choose(predictions, z_class)
  result = evaluators.Grounding().measure(predictions)
  best, worst = (got.regions[f'Grounding: the {what} boxes'] for what in ('best', 'worst'))
  assert best[0].image == f'im{result.iou.argmax()}' and best[0].right and best[0].says == f'IoU {result.iou.max():.2f}'
  assert worst and not any(r.right for r in worst) and worst[0].says == f'IoU {result.iou.min():.2f}'
  for kind, asked in (('i2t', predictions.z_image @ predictions.z_caption.T),
                      ('t2i', predictions.z_caption @ predictions.z_image.T)):
    answers = got.retrieval[kind]
    assert len(answers) == 8 and 0 < sum(a.right for a in answers) <= 8
    for answer in answers:
      i = int(re.sub(r'\D', '', answer.query))
      first, score, right = answer.answers[0]
      assert int(re.sub(r'\D', '', first)) == asked[i].argmax() and score == pytest.approx(asked[i].max(), abs=1e-6)
      assert right == (asked[i].argmax() == i)
  bare = choose(predictions, z_class, pred_boxes=None, pred_scores=None)
  assert "Grounding among the image's own boxes: the best boxes" in bare.regions
  assert choose(predictions, z_class, pred_boxes=None, pred_scores=None, z_region=None).regions == {}


def part_of(predictions, z_class, **changes):
  found = choose(predictions, z_class)
  canvas = np.random.default_rng(0).integers(0, 255, (50, 50, 3)).astype(np.uint8)
  evaluation = evaluators.Evaluation(
      metrics={'region_recognition/macc': 0.5, 'region_recognition/top1': 0.25, 'region_recognition/boxes': 39,
               'region_recognition/macc_small': 0.125},
      skipped={'pointing_game': 'no <patches>'}, protocols={'region_recognition': 'region_recognition@1'},
      coverage=evaluators.Coverage(images=39, of_images=40, regions=39, of_regions=40, unreadable=('im7 <broken>',)))
  return eval_report.Part(name='val', evaluation=evaluation, data='coco', found=found,
                          pictures={name: (canvas, GEOMETRY) for name in found.images}, **changes)


def test_the_page_stands_alone_and_shows_all(predictions, z_class, tmp_path):
  part = part_of(predictions, z_class)
  info = {'encoder': 'hf:<x>', 'region_embedding': 'roi'}
  text = eval_report.write([part], tmp_path / 'deep' / 'r.html', info=info, data='<data>').read_text()
  assert_stands_alone(text)
  tree = parse(text)
  assert tree.all('h1')[0].text == 'Evaluation of hf:<x>'
  regions = sum(len(some) for some in part.found.regions.values())
  answers = sum(1 if kind == 'i2t' else 4 for kind, some in part.found.retrieval.items() for _ in some)
  assert len(tree.all('svg', cls='picture')) == regions + answers
  said = tree.text
  assert '50.0 (39 of 40 regions)' in said and 'val, left out: im7 <broken>' in said and 'no <patches>' in said
  assert said.count('by the area of boxes') == 1
  assert 'no: its pre-processing and prompts are its own; 39 images here, 5,000 there' in said
  for region in part.found.regions['Recognition: wrong, by the widest margin']:
    assert f'{region.says} ✗ should be {region.title}' in said
  pair = part.found.confusion.pairs(1)[0]
  assert tree.all('tbody')[3].all('td')[0].text == pair[0] and len(tree.all('div', cls='confusion')) == 1
  dashed = [r for r in tree.all('rect', cls='over') if 'dashed' in r.attributes['class']]
  assert len(dashed) == sum(r.found is not None for some in part.found.regions.values() for r in some)
  gone = dataclasses.replace(part, pictures={}, missing='no data set')
  text = eval_report.write([gone], tmp_path / 'r.html', info=info, data='x').read_text()
  assert 'No pictures: no data set' in text and 'class="picture"' not in text


def test_texts_from_right_to_left(predictions, z_class, tmp_path, monkeypatch):
  hebrew = tuple(f'חתול {c}' for c in NAMES)
  monkeypatch.setattr('test_eval_report.NAMES', hebrew)
  named = dataclasses.replace(
      predictions, categories=tuple(f'חתול {c}' for c in predictions.categories),
      region_captions=tuple(f'{c}, לבן' for c in predictions.region_captions),
      captions=tuple(f'{c} על ספה (2).' for c in predictions.captions))
  text = eval_report.write([part_of(named, z_class)], tmp_path / 'r.html', info={}, data='d').read_text()
  assert text.count('על ספה') > 8 and text.count('<bdi>חתול') > 8
  assert_own_direction(text)


def test_markdown_has_the_figures_and_what_is_published(predictions, z_class, tmp_path):
  path = eval_report.write([part_of(predictions, z_class)], tmp_path / 'r.md', info={'encoder': 'x|y'}, data='d')
  text = path.read_text()
  assert 'region_recognition@1. Small, medium and large are by the area of boxes' in text
  tables = [line for line in text.splitlines() if line.startswith('|')]
  assert any(re.match(r'\| region recognition, mAcc +\| 50.0 \(39 of 40 regions\) +\|$', line) for line in tables)
  theirs = 'CLOC B/16 71.1, CLOC L/14 72.9, CLOC H/14 73.0 '
  assert any(theirs in line and 'no: 39 images here' in line for line in tables)
  assert '- val: 39 of 40 images, 39 of 40 regions\n- val, left out: im7 <broken>' in text and 'arXiv 2410.02746v2' in text
  nothing = eval_report.Part('val', evaluators.Evaluation(metrics={'zeroshot/top1': 1.0}, skipped={}, protocols={}))
  text = eval_report.write([nothing], tmp_path / 'n.md', info={}, data='d').read_text()
  assert 'Nothing is published of these metrics on this data.' in text
  with pytest.raises(ValueError, match=r"ends in .html or .md, got 'r.pdf'"):
    eval_report.write([nothing], 'r.pdf', info={}, data='d')


def test_a_folder_of_images(tmp_path):
  from PIL import Image
  rng = np.random.default_rng(0)
  label = rng.integers(0, 4, 30)
  z_class = unit(rng.normal(size=(4, 8)))
  evaluator = zeroshot.ZeroShot(class_names=NAMES, templates=['{}'],
                                encode_text=lambda t, *, region: z_class[[NAMES.index(x) for x in t]])
  classified = evaluator.measure(z_image=unit(z_class[label] + rng.normal(size=(30, 8)) * 0.5), labels=label)
  for i in range(30):
    Image.new('RGB', (20, 10), (i, 0, 0)).save(tmp_path / f'{i}.png')
  classified = dataclasses.replace(classified, images=tuple(str(tmp_path / f'{i}.png') for i in range(30)))
  found = findings.of_folder(classified)
  right, wrong = found.regions.values()
  assert {r.title == r.scores[0][0] for r in right} == {True} and all(r.says != r.title for r in wrong) and wrong
  drawn = pictures.of_files([*found.images, 'absent.png'])
  assert set(drawn) == found.images
  part = eval_report.Part('folder', evaluators.Evaluation(metrics={'zeroshot/top1': 0.5}, skipped={}, protocols={}),
                          data='imagenet', found=found, pictures=drawn)
  text = eval_report.write([part], tmp_path / 'r.html', info={'encoder': 'x'}, data='d').read_text()
  assert_stands_alone(text)
  assert not parse(text).all('rect', cls='over'), 'a whole image has no box'


@pytest.mark.slow
def test_eval_writes_the_report_of_a_run(reference, tmp_path, capsys):
  from cloc_jax import cli
  argv = ['eval', '--checkpoint', str(reference.workdir), '--data', str(reference.data), '--split', 'val', '--out',
          str(tmp_path)]
  assert cli.main([*argv, '--report', str(tmp_path / 'r.html'), '--report', str(tmp_path / 'r.md')]) == 0
  text = (tmp_path / 'r.html').read_text()
  assert_stands_alone(text)
  assert 'Grounding: the worst boxes' in text and 'No pictures' not in text
  assert 'Nothing is published' in (tmp_path / 'r.md').read_text()
  assert cli.main([*argv, '--report', 'x.pdf']) == 2 and 'ends in .html or .md' in capsys.readouterr().err
