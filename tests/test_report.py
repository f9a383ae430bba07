"""The report of a run that nobody trained: every number on the page is computed again by another way."""
import dataclasses
import io
import json
import re
import shutil

import html_tree
import numpy as np
from PIL import Image
import pytest

from cloc_jax import page

PHRASE = '<b>"odd" & \'quoted\'</b>'
CAPTION = 'a <i>caption</i> & more'
IMAGES = {'val': 9, 'unseen': 7}
EVALUATED = {'val': {'grounding/mean_iou': 0.41234, 'region_recognition/top1': 0.5, 'some/new': 0.00012345},
             'unseen': {'grounding/mean_iou': 1.0, 'grounding/phrases': 12345}}


def build_run(folder, data_path, *, captions, region_encoder='prompter', step=40):
  """A workdir with a checkpoint of random parameters, in the form that train.py leaves. Returns (folder, Cloc)."""
  import jax
  import jax.numpy as jnp
  from cloc_jax import batch as batch_lib
  from cloc_jax import checkpoint, inference, train_step
  from cloc_jax.data import tokenizer as tokenizer_lib
  tokenizer = tokenizer_lib.train([*captions, 'red green blue white black purple yellow'], vocab_size=600)
  config = {
      'data': {'path': str(data_path), 'batch_size': 8, 'image_size': 32, 'split': 'train', 'text_length': 12},
      'model': {'image': {'variant': 'mu/8', 'width': 16, 'depth': 1, 'heads': 2},
                'text': {'variant': 'mu', 'width': 12, 'depth': 1, 'heads': 2}, 'embed_dim': 16,
                'region_encoder': region_encoder, 'prompter': {'pool': 'prompt'}},
      'loss': {'region_text': 'softmax'}, 'optim': {'learning_rate': 1e-3}, 'mesh': {'data': -1},
      'evals': {'every_steps': 20}, 'checkpoint': {'keep': 2}, 'train': {'total_steps': 40, 'seed': 0}}
  preprocessing = {'image_size': 32, 'pad': 'center', 'text_length': 12, 'region_text_length': 12}
  model = inference.build_model(config, tokenizer=tokenizer)
  batch = batch_lib.abstract_batch(batch_size=2, image_size=32, text_length=12, regions=3, region_text_length=12)
  shapes = jax.eval_shape(model.init, jax.random.key(0), batch)['params']
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: rng.normal(scale=0.5, size=x.shape).astype(np.float32), shapes)
  if region_encoder == 'prompter':  # boxes with an area, and not all the same
    last = params['box_head']['Dense_1']
    last['kernel'], last['bias'] = last['kernel'] * 0.02, np.float32([-1.1, -1.1, 1.1, 1.1])
  state = train_step.TrainState(step=jnp.int32(step), params=params, opt_state={'count': jnp.int32(step)}, ema=None)
  keeper = checkpoint.Checkpointer(folder / 'checkpoints')
  keeper.save(step, state, info={'config': config, 'tokenizer': tokenizer.to_dict(), 'preprocessing': preprocessing,
                                 'examples_seen': step * 8, 'metrics': {}})
  keeper.wait()
  keeper.close()
  rows = [{'step': 10 * i, 'time': 100.0 * i, 'loss': 5.0 / i, 'loss_grounding': 10.0 ** -i, 'loss_image_text': 0.75,
           'learning_rate': 1e-3 / i, 'region_logit_scale': 14.0 + i, 'grad_norm': None if i == 2 else 100.0 / 3 ** i,
           'images_per_second': [None, 80.0, 90.0, 400.0][i - 1], 'a_new_metric': 3.5 * i, 'step_seconds': 0.1 * i}
          for i in range(1, 5)]
  for i in (2, 4):
    rows.append({'step': 10 * i, 'time': 100.0 * i + 1, 'eval/val/grounding/mean_iou': 0.1 * i,
                 'eval/unseen/grounding/mean_iou': 0.05 * i, 'eval/val/grounding/phrases': 30})
  (folder / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows) + '{"step": 50, "lo')
  return folder, inference.load(folder)


@pytest.fixture(name='drawn', scope='module')
def _drawn(tmp_path_factory):
  """A drawn data set: its path, its examples by split, and its meta."""
  from cloc_jax.data import scenes, schema, sources
  path = tmp_path_factory.mktemp('drawn') / 'scenes'
  scenes.write_scenes(path, num_train=8, num_val=IMAGES['val'], num_unseen=IMAGES['unseen'], size=32, encoding='png')
  examples = {s: [e for e in map(sources.RecordSource(path, split=s).__getitem__, range(n))]
              for s, n in {'train': 8, **IMAGES}.items()}
  return path, examples, schema.read_meta(path)


@pytest.fixture(name='run', scope='module')
def _run(drawn, tmp_path_factory):
  """A run whose data holds some hits and an odd phrase: (workdir, Cloc, examples by split, categories)."""
  from cloc_jax import evaluate, evaluators
  from cloc_jax.data import schema
  _, examples, meta = drawn
  root = tmp_path_factory.mktemp('run')
  workdir, cloc = build_run(root / 'run', root / 'data', captions=meta.categories)
  examples = {s: with_hits(cloc, found, meta.categories) if s in IMAGES else found for s, found in examples.items()}
  schema.write_dataset(root / 'data', meta=meta, splits=examples)
  for split, count in IMAGES.items():
    evaluate.write(evaluators.Evaluation(metrics=EVALUATED[split] | {'image_text_retrieval/images': count},
                                         skipped={'image <retrieval>': f'{split} & co.'}, protocols={'x': 'x@1'}),
                   workdir / 'evals' / f'{split}.json', step=40, split=split)
  return workdir, cloc, examples, meta.categories


def with_hits(cloc, examples, categories):
  """Half of the first regions are moved to where the model sees them, and called what it calls them; the first image
  has odd texts."""
  odd = dataclasses.replace(examples[0].regions[0], caption=PHRASE)
  examples = [dataclasses.replace(examples[0], captions=(CAPTION,), image_id='id <1>',
                                  regions=(odd, *examples[0].regions[1:])), *examples[1:]]
  images = cloc.encode_image([Image.open(io.BytesIO(e.image)) for e in examples])
  found = [g.boxes for g in cloc.ground(images, [[r.caption for r in e.regions] for e in examples])]
  # A box must have an area to be in a data set.
  boxes = [f[:1] if (f[0, 2:] > f[0, :2] + 2).all() else np.float32([[0, 0, 32, 32]]) for f in found]
  names = [c.labels[0] for c in cloc.classify_regions(images, boxes, categories)]
  out = []
  for i, (e, box, name) in enumerate(zip(examples, boxes, names, strict=True)):
    moved = dataclasses.replace(e.regions[0], box=tuple(float(v) / 32 for v in box[0]), category=name)
    out.append(dataclasses.replace(e, regions=(moved, *e.regions[1:])) if i % 2 == 0 else e)
  return out


@dataclasses.dataclass(frozen=True)
class Answer:
  """What the public interface of the model says of a region; `found` in pixels."""
  caption: str
  category: str
  found: np.ndarray
  iou: float
  named: str


@pytest.fixture(name='answers', scope='module')
def _answers(run):
  """split → a list of Answer for each image, by `cloc_jax.load(…)` and loops."""
  _, cloc, examples, categories = run
  out = {}
  for split in IMAGES:
    every = examples[split]
    images = cloc.encode_image([Image.open(io.BytesIO(e.image)) for e in every])
    found = cloc.ground(images, [[r.caption for r in e.regions] for e in every])
    boxes = [[np.array(r.box) * 32 for r in e.regions] for e in every]
    named = cloc.classify_regions(images, boxes, categories)
    out[split] = [[Answer(r.caption, r.category, f, slow_iou(f, b), n)
                   for r, f, b, n in zip(e.regions, g.boxes, own, c.labels, strict=True)]
                  for e, g, own, c in zip(every, found, boxes, named, strict=True)]
  return out


def slow_iou(a, b):
  across = min(a[2], b[2]) - max(a[0], b[0])
  down = min(a[3], b[3]) - max(a[1], b[1])
  both = across * down if across > 0 and down > 0 else 0.0
  area = lambda c: max(c[2] - c[0], 0) * max(c[3] - c[1], 0)
  return both / (area(a) + area(b) - both)


@pytest.fixture(name='written', scope='module')
def _written(run):
  """The page's text, and its tree."""
  from cloc_jax import report
  path = report.write(run[0], images=6)
  assert path == run[0] / 'report.html'
  text = path.read_text(encoding='utf-8')
  return text, html_tree.parse(text)


def split_section(root, split):
  return next(s for s in root.all('section', cls='split') if s.all('h2')[0].text.endswith(split))


def shown_iou(node):
  """(IoU, whether marked as a hit)."""
  text = node.all('span', cls='iou')[0]
  assert ('✓' in text.text) == ('good' in text.attributes['class'].split())
  return float(re.search(r'IoU (\S+)', text.text)[1]), '✓' in text.text


def test_the_page_stands_alone_and_names_the_run(written):
  text, root = written
  html_tree.assert_stands_alone(text)
  assert PHRASE not in text and CAPTION not in text  # escaped
  assert root.all('h1')[0].text == 'run'
  facts = dict(zip([d.text for d in root.all('dl', cls='facts')[0].all('dt')],
                   [d.text for d in root.all('dl', cls='facts')[0].all('dd')]))
  assert facts['steps'] == '40 of 40' and facts['images seen'] == '320' and facts['state'] == 'finished'
  assert facts['images a second, median'] == '90'
  config = root.all('div', cls='config')[0].text
  assert 'image.variant' in config and 'mu/8' in config and '0.001' in config


def test_parameters_are_counted(run, written):
  import jax
  facts = written[1].all('dl', cls='facts')[0]
  assert f'{sum(np.size(x) for x in jax.tree.leaves(run[1].params)):,}' in [d.text for d in facts.all('dd')]


def test_scores_are_those_of_the_files(written):
  table, everything = written[1].all('table')
  rows = [[c.text for c in r.all('th') + r.all('td')] for r in table.all('tr')]
  assert rows == [
      ['in percent', 'val', 'unseen'],  # as the data set lists them
      ['region recognition, top-1', '50.0', '–'], ['grounding, mean IoU', '41.2', '100.0'], ['images', '9', '7'],
      ['phrases grounded', '–', '12,345'], ['at step', '40', '40']]
  rows = [[c.text for c in r.all('th') + r.all('td')] for r in everything.all('tr')[1:]]
  assert rows == [
      ['grounding/mean_iou', '0.4123', '1.0000'], ['grounding/phrases', '–', '12,345'],
      ['image_text_retrieval/images', '9', '7'], ['region_recognition/top1', '0.5000', '–'],
      ['some/new', '0.0001', '–']]
  assert [i.text for i in written[1].all('ol', cls='skipped')[0].all('li')] == [
      f'{split}: no image <retrieval>, because {split} & co.' for split in IMAGES]


def test_curves_hold_every_metric_once(written):
  charts = {c.all('figcaption')[0].all('span')[0].text: c for c in written[1].all('figure', cls='chart')}
  assert set(charts) == {'total', 'grounding (log)', 'learning rate', 'gradient norm (log)', 'images a second',
                         'a new metric', 'grounding, mean IoU'}
  assert charts['total'].all('strong')[0].text == '1.25' and charts['a new metric'].all('strong')[0].text == '14'
  assert [s.text for s in charts['grounding, mean IoU'].all('span', cls='legend')[0].all('span')] == [
      'val 40.0 %', 'unseen 20.0 %']
  assert 'The same at every step: image–text contrast 0.75.' in written[0]


def test_every_region_of_the_pictures(run, written, answers):
  hits = rights = 0
  for split, count in IMAGES.items():
    cards = split_section(written[1], split).all('figure', cls='card')
    assert len(cards) == min(count, 6)
    for card, example, expected in zip(cards, run[2][split], answers[split]):
      assert card.all('div', cls='id')[0].text == example.image_id
      assert card.all('p')[0].text == example.captions[0]
      items = card.all('li')
      assert len(items) == len(expected)
      for number, (item, answer) in enumerate(zip(items, expected), 1):
        assert item.all('b')[0].text == str(number)
        assert item.all('div')[0].children[0].text == answer.caption
        iou, hit = shown_iou(item)
        assert abs(iou - answer.iou) < 0.0051 and hit == (answer.iou >= 0.5)
        verdict = item.all('span', cls='class')[0].text
        right = answer.named == answer.category
        assert verdict == (f'{answer.category} ✓' if right else f'{answer.named} ✗ should be {answer.category}')
        hits, rights = hits + hit, rights + right
      check_boxes(card, example, expected)
  assert 3 <= hits < 12 and 3 <= rights < 12, 'the data was to hold both outcomes'


def check_boxes(card, example, expected):
  """Dashed are the true boxes, solid the found ones, each in the colour of its number."""
  rects = [r for r in card.all('rect', cls='over')]
  for dashed, boxes in ((True, [np.array(r.box) * 32 for r in example.regions]), (False, [a.found for a in expected])):
    drawn = [r.attributes for r in rects if ('dashed' in r.attributes['class'].split()) == dashed]
    drawn = sorted((a['stroke'], *(float(a[k]) for k in ('x', 'y', 'width', 'height'))) for a in drawn)
    want = sorted((page.color(i), *b[:2], *np.maximum(b[2:] - b[:2], 0)) for i, b in enumerate(boxes))
    assert [d[0] for d in drawn] == [w[0] for w in want]
    np.testing.assert_allclose([d[1:] for d in drawn], [w[1:] for w in want], atol=0.02)


def test_pictures_are_what_the_model_saw(run, written):
  import base64
  card = split_section(written[1], 'val').all('figure', cls='card')[2]
  data = base64.b64decode(card.all('image')[0].attributes['href'].partition('base64,')[2])
  np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))),
                                np.asarray(Image.open(io.BytesIO(run[2]['val'][2].image)).convert('RGB')))


def test_best_and_worst(written, answers):
  for split in IMAGES:
    section = split_section(written[1], split)
    every = sorted(a.iou for image in answers[split] for a in image)
    best, worst = ([shown_iou(f)[0] for f in strip.all('figure')] for strip in section.all('div', cls='strip'))
    np.testing.assert_allclose(best, every[::-1][:8], atol=0.0051)
    np.testing.assert_allclose(worst, every[:8], atol=0.0051)
    summary = section.all('p')[0].text
    hits = sum(iou >= 0.5 for iou in every)
    assert f'{hits} of {len(every)} phrases are found' in summary
    rights = sum(a.named == a.category for image in answers[split] for a in image)
    assert f'{rights} of {len(every)} regions are recognised' in summary


def test_the_picture_for_a_readme(run, answers, tmp_path):
  from cloc_jax import report
  out = report.picture(run[0], tmp_path / 'deep' / 'a.png', split='val', images=3)
  with Image.open(out) as image:
    pixels = np.asarray(image)
  assert pixels.shape == (320, 3 * 320 + 24, 4)
  for i, image in enumerate(answers['val'][:3]):
    tile = pixels[:, 332 * i:332 * i + 320, :3]
    for number, answer in enumerate(image[:8]):
      color = tuple(int(page.color(number)[k:k + 2], 16) for k in (1, 3, 5))
      assert (tile == color).all(-1).any()
  with pytest.raises(ValueError, match="'nope'"):
    report.picture(run[0], tmp_path / 'b.png', split='nope')


@pytest.mark.parametrize('encoder', ['roi_align', 'none'])
def test_models_that_cannot_do_it_all(encoder, drawn, tmp_path):
  from cloc_jax import report
  data = tmp_path / 'data'
  shutil.copytree(drawn[0], data)
  workdir, _ = build_run(tmp_path / 'run', data, captions=drawn[2].categories, region_encoder=encoder)
  out = tmp_path / 'elsewhere' / 'page.html'
  root = html_tree.parse(report.write(workdir, images=2, out=out).read_text(encoding='utf-8'))
  text = root.text
  assert 'No grounding here: the model has no box head.' in text and not root.all('span', cls='iou')
  assert ('No recognition here' in text) == (encoder == 'none') == (not root.all('span', cls='class'))
  assert 'has not been evaluated yet' in text and not root.all('table')
  cards = root.all('figure', cls='card')
  assert len(cards) == 4 and all(r.caption in cards[0].text for r in drawn[1]['val'][0].regions)
  assert len(cards[0].all('rect', cls='over')) == len(drawn[1]['val'][0].regions)  # the true ones
  assert len(cards[0].all('text')) == len(drawn[1]['val'][0].regions)  # and their numbers
  with pytest.raises(ValueError, match='no box head'):
    report.picture(workdir, tmp_path / 'a.png', split='val', images=64)
  # The data set goes away: the page says so, and keeps the rest.
  data.rename(tmp_path / 'moved')
  root = html_tree.parse(report.write(workdir).read_text(encoding='utf-8'))
  left_out, = [p.text for p in root.all('p') if p.text.startswith('Left out:')]
  assert str(data) in left_out and not root.all('figure', cls='card') and root.all('figure', cls='chart')


def test_what_is_missing_is_named(run, tmp_path):
  from cloc_jax import report
  with pytest.raises(FileNotFoundError, match='nowhere does not exist'):
    report.write(tmp_path / 'nowhere')
  with pytest.raises(FileNotFoundError, match='holds no checkpoint'):
    report.write(tmp_path)
  copy = tmp_path / 'copy'
  shutil.copytree(run[0], copy, ignore=shutil.ignore_patterns('report.html'))
  (copy / 'metrics.jsonl').unlink()
  with pytest.raises(FileNotFoundError, match='holds no metrics .*metrics.jsonl'):
    report.write(copy)
  with pytest.raises(ValueError, match='at least 1, got 0'):
    report.write(run[0], images=0)
  assert not (copy / 'report.html').exists()
