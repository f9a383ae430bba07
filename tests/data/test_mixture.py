"""Mixtures: the shares, the epochs by source, and that nothing but the place of an example decides it."""
import collections
import dataclasses
import itertools
import json

import numpy as np
from painted_pictures import painted_example
from painted_pictures import WordTokenizer
import pytest

from cloc_jax import cli
from cloc_jax.data import mix_report
from cloc_jax.data import mixture
from cloc_jax.data import pipeline
from cloc_jax.data import prepare
from cloc_jax.data import schema

W = mixture.WINDOW
# Numbers of the pictures of each source, by which they are known in a batch.
NUMBERS = {'boxes': range(0, 13), 'pairs': range(100, 129), 'few': range(200, 205)}


@pytest.fixture(name='paths', scope='module')
def paths_fixture(tmp_path_factory):
  """Three data sets; 'pairs' has no regions, and its captions are 'alt N' and 'long N'."""
  root = tmp_path_factory.mktemp('mixture')
  for name, numbers in NUMBERS.items():
    examples = [painted_example(i, regions=2) for i in numbers]
    if name == 'pairs':
      examples = [dataclasses.replace(e, regions=(), captions=(f'alt {i}', f'long {i}'))
                  for i, e in zip(numbers, examples)]
    categories = ('red', 'blue') if name == 'boxes' else ('red', 'cyan', 'pink') if name == 'few' else ()
    schema.write_dataset(root / name, meta=schema.DatasetMeta(name=name, categories=categories),
                         splits={'train': examples})
  return {name: str(root / name) for name in NUMBERS}


def parts(paths, **weights):
  return mixture.parts({name: {'path': paths[name], 'weight': weight} for name, weight in weights.items()})


def dataset(of, **options):
  options = dict(tokenizer=WordTokenizer(), batch_size=8, image_size=16, text_length=4, region_text_length=3,
                 regions_per_image=2, seed=3) | options
  return pipeline.train_dataset(mixture=of, **options)


def take(data, count):
  return list(itertools.islice(iter(data), count))


def numbers(items):
  return np.concatenate([item['batch'].text[:, 1] for item in items]) - 10


def assert_same(items, others):
  assert len(items) == len(others) > 0
  for item, other in zip(items, others):
    for name, value in vars(item['batch']).items():
      np.testing.assert_array_equal(value, getattr(other['batch'], name), err_msg=name)
    assert item['stats'] == other['stats']


@pytest.mark.parametrize('weights', [(1,), (1, 1), (3, 1), (0.1, 0.7, 0.2), (1, 1e-3, 5, 2.5), (1e-9, 1)])
def test_the_schedule_keeps_to_the_shares_and_counts_without_gaps(weights):
  of = [mixture.Part(str(i), '', weight=w) for i, w in enumerate(weights)]
  schedule = mixture.Schedule(of, seed=5)
  shares = np.array(weights) / sum(weights)
  found = [schedule[k] for k in range(6 * W)]
  counts = np.zeros(len(weights), int)
  for k, (part, index) in enumerate(found):
    if k % 97 == 0 or k % W in (0, 1, W - 1):
      assert schedule.seen(k).tolist() == counts.tolist()
    assert index == counts[part]  # each source's examples follow each other
    counts[part] += 1
    if (k + 1) % W == 0:
      assert np.abs(counts - shares * (k + 1)).max() < len(weights)
  far = 10**12 + 17
  np.testing.assert_allclose(schedule.seen(far) / far, shares, atol=2e-6)
  part, index = schedule[far]
  assert schedule.seen(far + 1)[part] == index + 1 == schedule.seen(far)[part] + 1
  if len(weights) > 1 and min(shares) > 0.2:
    orders = {tuple(p for p, _ in found[w * W:(w + 1) * W]) for w in range(6)}
    assert len(orders) == 6  # no pattern that hosts could fall in step with
    assert [p for p, _ in found[:W]] != [mixture.Schedule(of, seed=6)[k][0] for k in range(W)]


def test_epochs_of_each_source_are_whole(paths):
  of = parts(paths, boxes=2, pairs=1, few=1)
  seen = numbers(take(dataset(of), 64))  # 512 examples
  for name, share in zip(NUMBERS, (0.5, 0.25, 0.25)):
    own = [n for n in seen if n in NUMBERS[name]]
    assert abs(len(own) - share * 512) <= 3
    size = len(NUMBERS[name])
    epochs = [own[i:i + size] for i in range(0, len(own) - size + 1, size)]
    assert all(sorted(epoch) == list(NUMBERS[name]) for epoch in epochs) and len(epochs) > 3
    assert any(epoch != epochs[0] for epoch in epochs)
  metrics = mixture.Seen(of, seed=3).metrics(512)
  counted = collections.Counter(name for n in seen for name in NUMBERS if n in NUMBERS[name])
  assert {name: metrics[f'data/images/{name}'] for name in NUMBERS} == counted
  assert metrics['data/epoch/few'] == counted['few'] / 5


def test_the_order_of_a_config_does_not_matter(paths):
  assert_same(take(dataset(parts(paths, boxes=1, pairs=2)), 3), take(dataset(parts(paths, pairs=2, boxes=1)), 3))


def test_hosts_share_one_order(paths):
  of = parts(paths, boxes=1, pairs=1)
  alone = take(dataset(of, batch_size=12, flip=True), 4)
  for hosts in (2, 3):
    shares = [take(dataset(of, batch_size=12 // hosts, process_index=i, process_count=hosts, flip=True), 4)
              for i in range(hosts)]
    for step, whole in enumerate(alone):
      for name, value in vars(whole['batch']).items():
        for host in range(hosts):
          np.testing.assert_array_equal(value[host::hosts], getattr(shares[host][step]['batch'], name), err_msg=name)
    assert all(len({n in NUMBERS['boxes'] for n in numbers(share)}) == 2 for share in shares)


@pytest.mark.parametrize('consumed', [1, 19])
def test_resuming_from_the_number_of_examples(paths, consumed):
  of = parts(paths, boxes=5, pairs=2, few=1)
  whole = take(dataset(of, flip=True), consumed + 4)
  assert_same(whole[consumed:], take(dataset(of, flip=True, skip_examples=8 * consumed), 4))
  halves = take(dataset(of, flip=True, skip_examples=8 * consumed, batch_size=4, process_index=1, process_count=2), 4)
  np.testing.assert_array_equal(numbers(whole[consumed:]).reshape(-1, 2)[:, 1], numbers(halves))


@pytest.mark.slow
def test_worker_processes_change_nothing(paths):
  of = parts(paths, boxes=5, pairs=2, few=1)
  alone = take(dataset(of, flip=True), 9)
  iterator = iter(dataset(of, flip=True, num_workers=2))
  assert_same(alone, list(itertools.islice(iterator, 9)))
  iterator.close()


def test_a_source_does_not_depend_on_the_others(paths):
  own = lambda items: [row for item in items for row in zip(*vars(item['batch']).values())
                       if row[2][1] - 10 in NUMBERS['boxes']]
  two, three = (own(take(dataset(of, flip=True), 12)) for of in (
      parts(paths, boxes=1, pairs=1), parts(paths, few=0.2, boxes=3, pairs=1)))
  assert min(len(two), len(three)) > 30
  for a, b in zip(two, three):
    for x, y in zip(a, b):
      np.testing.assert_array_equal(x, y)


def test_images_without_regions_stand_beside_those_with(paths):
  items = take(dataset(parts(paths, boxes=1, pairs=3)), 64)
  has = np.concatenate([item['batch'].region_mask.any(1) for item in items])
  np.testing.assert_array_equal(has, [n in NUMBERS['boxes'] for n in numbers(items)])
  assert 0.24 < has.mean() < 0.26 and all(item['batch'].image_mask.all() for item in items)


@pytest.mark.parametrize('choice, expected', [
    ('first', {'alt': 1.0}), ('last', {'long': 1.0}), ('random', {'alt': 0.5, 'long': 0.5}),
    ((0.2, 0.8), {'alt': 0.2, 'long': 0.8}), ((0, 1), {'long': 1.0}), ((1.0,), {'alt': 1.0})])
def test_which_caption_is_drawn(paths, choice, expected):
  of = mixture.parts({'pairs': {'path': paths['pairs'], 'captions': choice}})
  items = take(dataset(of), 50)
  words = collections.Counter(int(t) for item in items for t in item['batch'].text[:, 0])
  for word, share in expected.items():
    count = words.pop(WordTokenizer.token(word))
    assert abs(count / 400 - share) < 4 * (share * (1 - share) / 400) ** 0.5 + 1e-9
  assert not words and not any(item['stats']['other_captions'] for item in items)


def test_captions_without_a_weight_are_drawn_only_for_want_of_others():
  draw = lambda captions, choice: {prepare._draw_caption(captions, choice, np.random.default_rng(i)) for i in range(60)}
  assert draw(('a', ' '), (0, 1)) == {('a', 1)}
  assert draw(('a', 'b', 'c'), (1, 0)) == {('a', 0)}
  assert draw((' ', 'b', 'c'), (1,)) == {('b', 1), ('c', 1)}
  assert draw(('', 'b', 'c'), (0.5, 0.2, 0.3)) == {('b', 0), ('c', 0)}
  assert draw((), (1,)) == draw((' ',), 'last') == {('', 0)}
  assert draw((' ', 'b', 'c', ''), 'first') == {('b', 0)} and draw((' ', 'b', 'c', ''), 'last') == {('c', 0)}


def test_a_failing_source_is_masked_and_delays_nothing_else(paths, tmp_path, caplog):
  lines = [json.dumps({'image': f'{i}.png', 'caption': f'picture {i}'}) for i in range(300, 308)]
  for i in range(300, 308):
    (tmp_path / f'{i}.png').write_bytes(painted_example(i).image)
  (tmp_path / 'rows.jsonl').write_text('\n'.join(lines))
  of = mixture.parts({'boxes': paths['boxes'], 'rows': f'jsonl:{tmp_path}/rows.jsonl'})
  whole = take(dataset(of), 6)
  data = dataset(of)
  for i in range(300, 308):
    (tmp_path / f'{i}.png').unlink()  # the source goes away while it is read
  found = take(data, 6)
  lost = sum(int(item['stats']['corrupt_records']) for item in found)
  assert lost == sum(300 <= n for n in numbers(whole)) > 10 and '.png is missing' in caplog.text
  for a, b in zip(whole, found):
    keep = b['batch'].image_mask
    np.testing.assert_array_equal(keep, a['batch'].text[:, 1] - 10 < 300)
    np.testing.assert_array_equal(a['batch'].image[keep], b['batch'].image[keep])


@pytest.mark.parametrize('change, error, message', [
    ({'boxes': {'weight': -1}}, ValueError, 'mixture: boxes: weight must be a number, 0 or more, got -1'),
    ({'boxes': {'weight': float('nan')}}, ValueError, 'boxes: weight'), ({'boxes': {'weight': '1'}}, ValueError, "'1'"),
    ({'boxes': {'weight': 0}, 'few': {'weight': 0}}, ValueError, 'no part has a weight above 0'),
    ({'boxes': {'weights': 1}}, TypeError, r"expected 'path' and perhaps \['split', 'weight', 'captions'\]"),
    ({'boxes': {'captions': 'alt'}}, ValueError, "boxes: captions: expected 'random', 'first', 'last' or weights"),
    ({'boxes': {'captions': (0, 0)}}, ValueError, 'not all 0'),
    ({'boxes': {'split': 'tain'}}, ValueError, "mixture: boxes: .*did you mean 'train'"),
    ({'boxes': {'path': '/no/where'}}, FileNotFoundError, 'mixture: boxes: no data set at /no/where'),
    ({'few': {'weight': 9}}, ValueError, 'few has 5 examples, fewer than the 7 that its weight 9')])
def test_unusable_mixtures_are_named(paths, change, error, message):
  given = {name: {'path': paths[name]} | change.get(name, {}) for name in ('boxes', 'few')}
  with pytest.raises(error, match=message):
    dataset(mixture.parts(given))


def test_a_weight_of_zero_leaves_a_source_out(paths):
  found = mixture.parts({'boxes': paths['boxes'], 'gone': {'path': '/no', 'weight': 0}})
  assert [part.name for part in found] == ['boxes']
  with pytest.raises(ValueError, match="name without spaces"):
    mixture.parts({'a/b': paths['boxes']})
  with pytest.raises(ValueError, match='no epochs of its own'):
    dataset(parts(paths, boxes=1), epochs=1)
  with pytest.raises(ValueError, match='either a data set or a mixture'):
    dataset((), batch_size=1)


def test_the_report_says_what_will_happen(paths, capsys, tmp_path):
  of = parts(paths, boxes=1, pairs=2, few=1) + (mixture.Part('again', paths['boxes'], weight=1.0),)
  found = mix_report.report(of, batch_size=10, examples=50, seed=3)
  drawn = numbers(take(dataset(of, batch_size=10), 5))
  assert sum(p.seen for p in found.parts) == 50
  assert {p.name: p.seen for p in found.parts if p.name in ('pairs', 'few')} == {
      name: sum(int(n) in NUMBERS[name] for n in drawn) for name in ('pairs', 'few')}
  assert [p.share for p in found.parts] == pytest.approx([0.2, 0.2, 0.4, 0.2])
  assert [p.with_regions for p in found.parts] == [1, 1, 0, 1] and found.with_regions == pytest.approx(0.6)
  notes = '\n'.join(found.notes)
  few, pairs = found.parts[1:3]
  assert f'few: each image is read {few.seen // 5} ' in notes and few.epochs == few.seen / 5
  assert f'pairs: {29 - pairs.seen} of its images are not read' in notes
  assert 'boxes and again read the same data' in notes and 'boxes has 2 categories and few 3, 1 of them' in notes
  # The verb.
  arguments = ['data', 'mix', '--source', 'b', '1', paths['boxes'], '--source', 'p', '3', paths['pairs'],
               '--batch-size', '8', '--json', str(tmp_path / 'mix.json')]
  assert cli.main(arguments) == 0
  assert '75.0 %' in capsys.readouterr().out
  written = json.loads((tmp_path / 'mix.json').read_text())
  assert written['examples'] == 52  # 13 at a quarter
  assert cli.main([*arguments, '--source', 'b', '1', paths['few']]) == 2
  assert 'two sources of the same name' in capsys.readouterr().err


def test_the_report_of_a_config(paths, capsys, tmp_path):
  config = tmp_path / 'config.py'
  config.write_text(f'''import ml_collections
def get_config():
  c = ml_collections.ConfigDict({{name: {{}} for name in ('model', 'loss', 'optim', 'mesh', 'evals', 'checkpoint')}})
  c.data = dict(batch_size=8, image_size=16, mixture=dict(boxes=dict(path={paths["boxes"]!r}, weight=1.0),
                                                          pairs=dict(path={paths["pairs"]!r}, weight=1.0)))
  c.train = dict(total_steps=4)
  return c
''')
  assert cli.main(['data', 'mix', str(config), '--config.data.mixture.pairs.weight=3']) == 0
  out = capsys.readouterr().out
  assert '75.0 %' in out and '32' in out
