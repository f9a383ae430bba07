"""The pipeline: batches hold what the records say, in an order that nothing but the seed decides."""
import collections
import dataclasses
import itertools
import logging

import grain
import numpy as np
from painted_pictures import COLORS
from painted_pictures import encode_png
from painted_pictures import painted_example
from painted_pictures import WordTokenizer
import pytest

from cloc_jax.batch import check_batch
from cloc_jax.data import eval_pipeline
from cloc_jax.data import pipeline
from cloc_jax.data import prepare
from cloc_jax.data import schema
from cloc_jax.data import transforms

COLOR_TOKENS = {WordTokenizer.token(name): np.array(color) for name, color in COLORS.items()}


def dataset(path, **options):
  options = dict(split='train', tokenizer=WordTokenizer(), batch_size=4, image_size=32, text_length=5,
                 region_text_length=3, regions_per_image=3, seed=0) | options
  return pipeline.train_dataset(path, **options)


def take(data, count=None):
  return list(itertools.islice(iter(data), count))


def pictures(items):
  """The numbers of the pictures in some batches, from their captions ('picture 7')."""
  return np.concatenate([item['batch'].text[:, 1] for item in items]) - 10


def assert_same(items, others):
  assert len(items) == len(others) > 0
  for item, other in zip(items, others):
    for name, value in vars(item['batch']).items():
      np.testing.assert_array_equal(value, getattr(other['batch'], name), err_msg=name)
    assert {k: int(v) for k, v in item['stats'].items()} == {k: int(v) for k, v in other['stats'].items()}


def test_batches_keep_the_contract(painted):
  item = take(dataset(painted), 1)[0]
  batch = item['batch']
  check_batch(batch)
  assert batch.image.shape == (4, 32, 32, 3) and batch.region_text.shape == (4, 3, 3) and batch.text.shape == (4, 5)
  assert set(item['stats']) == set(prepare.STATS)
  assert all(value.dtype == np.int64 and value.shape == () for value in item['stats'].values())


@pytest.mark.parametrize('flip', [False, True])
@pytest.mark.parametrize('pad', ['center', 'corner'])
def test_a_region_shows_what_its_caption_says(painted, flip, pad):
  seen = 0
  for item in take(dataset(painted, flip=flip, pad=pad, epochs=2, image_size=48)):
    batch = item['batch']
    for b, m in zip(*np.nonzero(batch.region_mask)):
      x0, y0, x1, y1 = batch.boxes[b, m] * 48
      inside = batch.image[b, int(np.ceil(y0)):int(y1), int(np.ceil(x0)):int(x1)].reshape(-1, 3)
      assert len(inside)
      # The median forgives the blurred border.
      np.testing.assert_allclose(np.median(inside, 0), COLOR_TOKENS[batch.region_text[b, m, 0]], atol=8)
      seen += 1
  assert seen > 100


def test_stats_count_what_is_there(painted):
  items = take(dataset(painted, epochs=1, batch_size=37, shuffle=False, text_length=3, region_text_length=2))
  stats, batch = items[0]['stats'], items[0]['batch']
  records = [painted_example(i) for i in range(37)]
  counts = [len(r.regions) for r in records]
  assert stats['examples'] == stats['captions'] == 37
  assert stats['regions_seen'] == sum(counts)
  assert stats['regions_kept'] == stats['region_captions'] == sum(min(n, 3) for n in counts) == batch.region_mask.sum()
  assert not any(stats[name] for name in ('truncated_captions', 'corrupt_images', 'empty_captions', 'boxes_dropped',
                                          'empty_region_captions', 'truncated_region_captions', 'flipped'))
  short = take(dataset(painted, epochs=1, batch_size=37, text_length=2, region_text_length=1))[0]['stats']
  assert short['truncated_captions'] == 37 and short['truncated_region_captions'] == stats['regions_kept']


def test_regions_are_drawn_without_replacement_and_anew_each_epoch(write):
  path = write([painted_example(i, regions=6) for i in range(8)])
  items = take(dataset(path, batch_size=8, epochs=40, shuffle=False))
  drawn = np.stack([item['batch'].region_text[..., 0] for item in items])  # epoch, picture, region
  assert all(len(set(row)) == 3 for row in drawn.reshape(-1, 3))
  # Each of the 6 is among the 3 drawn half of the time: 20 of 40 epochs, standard deviation 3.2.
  for picture in range(8):
    counts = collections.Counter(drawn[:, picture].reshape(-1).tolist())
    assert len(counts) == 6 and all(7 < count < 33 for count in counts.values())
  captions = np.stack([item['batch'].text[:, 0] for item in items])
  assert 80 < (captions == WordTokenizer.token('picture')).sum() < 240  # of 320, either of two captions


def test_epochs_are_whole_and_ordered_anew(painted):
  seen = pictures(take(dataset(painted, batch_size=37, epochs=3)))
  epochs = seen.reshape(3, 37)
  assert all(sorted(epoch) == list(range(37)) for epoch in epochs)
  assert (epochs[0] != epochs[1]).any() and (epochs[1] != epochs[2]).any()
  in_order = pictures(take(dataset(painted, batch_size=37, epochs=2, shuffle=False)))
  assert in_order.tolist() == list(range(37)) * 2


def test_batches_run_across_epochs(painted):
  items = take(dataset(painted, epochs=3))
  assert len(items) == 3 * 37 // 4
  counts = collections.Counter(pictures(items).tolist())
  assert sorted(counts) == list(range(37)) and sum(counts.values()) == 108 and max(counts.values()) == 3


def test_the_seed_decides(painted):
  first = take(dataset(painted), 5)
  assert_same(first, take(dataset(painted), 5))
  assert_same(first, take(dataset(painted, prefetch=0), 5))
  other = take(dataset(painted, seed=1), 5)
  assert (pictures(first) != pictures(other)).any()


@pytest.mark.parametrize('consumed', [0, 1, 11])
def test_resuming_gives_the_remaining_batches(painted, consumed):
  iterator = iter(dataset(painted, epochs=2, flip=True))
  for _ in range(consumed):
    next(iterator)
  state = iterator.get_state()
  rest = list(iterator)
  resumed = iter(dataset(painted, epochs=2, flip=True))
  resumed.set_state(state)
  assert_same(rest, list(resumed))
  assert len(rest) == 2 * 37 // 4 - consumed


def test_hosts_share_an_epoch(painted):
  shares = [pictures(take(dataset(painted, batch_size=3, epochs=6, process_index=i, process_count=2)))
            for i in range(2)]
  assert len(shares[0]) == len(shares[1]) == 37 * 6 // 6 * 3
  epoch = np.stack(shares, -1).reshape(-1)[:37]  # hosts take turns in one global order
  assert sorted(epoch) == list(range(37))


def test_the_number_of_hosts_changes_no_example(painted):
  def by_example(hosts, batch_size):
    found = {}
    for host in range(hosts):
      items = take(dataset(painted, batch_size=batch_size, epochs=1, flip=True, process_index=host,
                           process_count=hosts))
      for item in items:
        for row in zip(*vars(item['batch']).values()):
          found[int(row[2][1])] = row  # by the number in the caption
    return found
  alone, shared = by_example(1, 36), by_example(3, 12)
  assert sorted(alone) == sorted(shared) and len(alone) == 36
  for key, row in alone.items():
    for ours, theirs in zip(row, shared[key]):
      np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_worker_processes_change_nothing(painted):
  alone = take(dataset(painted, epochs=2, flip=True))
  iterator = iter(dataset(painted, epochs=2, flip=True, num_workers=2))
  first = [next(iterator) for _ in range(5)]
  state = iterator.get_state()
  assert_same(alone, first + list(iterator))
  iterator.close()
  resumed = iter(dataset(painted, epochs=2, flip=True, num_workers=2))
  resumed.set_state(state)
  assert_same(alone[5:], list(resumed))
  resumed.close()


def test_mirrored_images_are_mirrored_and_counted(write):
  path = write([painted_example(i, regions=6) for i in range(36)])  # six colours in a row: never symmetric
  straight, mirrored = (take(dataset(path, epochs=1, flip=flip)) for flip in (False, True))
  for item, other in zip(straight, mirrored):
    pairs = list(zip(item['batch'].image, other['batch'].image))
    same = [np.array_equal(a, b) for a, b in pairs]
    assert all(s or np.array_equal(a[:, ::-1], b) for s, (a, b) in zip(same, pairs))
    assert other['stats']['flipped'] == len(same) - sum(same)
  total = sum(item['stats']['flipped'] for item in mirrored)
  assert 6 < total < 30  # of 36
  assert not any(item['stats']['flipped'] for item in straight)


def test_captions_with_sides_are_not_mirrored(write):
  plain = painted_example(0, regions=1)
  caption = dataclasses.replace(plain, captions=('a picture left of nothing',))
  region = dataclasses.replace(
      plain, regions=(dataclasses.replace(plain.regions[0], caption='the right one'),))
  def flips(example):
    items = take(dataset(write([example] * 8, name=f'set{len(made)}'), batch_size=8, epochs=20, flip=True))
    made.append(1)
    return sum(int(item['stats']['flipped']) for item in items)
  made = []
  assert 50 < flips(plain) < 110  # of 160
  assert flips(caption) == flips(region) == 0


def test_a_truncated_image_is_masked_counted_and_named(write, caplog):
  sound = [painted_example(i) for i in range(3)]
  broken = dataclasses.replace(sound[1], image=sound[1].image[:-40], image_id='broken.jpg')
  path = write([sound[0], broken, sound[2]])
  with caplog.at_level(logging.WARNING, logger='cloc_jax.data'):
    item = take(dataset(path, batch_size=3, shuffle=False, epochs=1))[0]
  batch, stats = item['batch'], item['stats']
  assert batch.image_mask.tolist() == [True, False, True]
  assert not batch.region_mask[1].any() and batch.region_mask[[0, 2]].any(1).all()
  assert stats['corrupt_images'] == 1 and stats['examples'] == 3 and stats['captions'] == 2
  assert "record 'broken.jpg'" in caplog.text and 'truncated' in caplog.text
  with pytest.raises(transforms.ImageError, match='broken.jpg'):
    take(dataset(path, batch_size=3, epochs=1, on_error='raise'))


def test_an_image_that_is_turned_against_its_record_is_masked(write, caplog):
  image = encode_png(np.zeros((40, 80, 3), np.uint8))
  record = dataclasses.replace(painted_example(0), image=image, height=80, width=40)
  smaller = dataclasses.replace(painted_example(0), image=image, height=401, width=799)  # the same, but for rounding
  with caplog.at_level(logging.WARNING, logger='cloc_jax.data'):
    batch = take(dataset(write([record, smaller]), batch_size=2, shuffle=False), 1)[0]['batch']
  assert batch.image_mask.tolist() == [False, True]
  assert 'the record says 80×40' in caplog.text


def test_bad_boxes_are_dropped_and_counted(write):
  boxes = {'sound': (0.1, 0.1, 0.5, 0.5), 'out': (0.5, 0.5, 1.2, 0.9), 'inverted': (0.6, 0.1, 0.2, 0.5),
           'thin': (0.3, 0.1, 0.3, 0.5), 'away': (1.1, 0.1, 1.3, 0.5), ' ': (0.1, 0.1, 0.5, 0.5)}
  record = dataclasses.replace(
      painted_example(0), image=encode_png(np.zeros((50, 50, 3), np.uint8)), height=50, width=50,
      regions=tuple(schema.Region(box=box, caption=name) for name, box in boxes.items()))
  item = take(dataset(write([record]), batch_size=1, regions_per_image=6), 1)[0]
  batch, stats = item['batch'], item['stats']
  kept = {int(t): box for t, box in zip(batch.region_text[0, :, 0], batch.boxes[0].tolist()) if t > 1}
  assert set(kept) == {WordTokenizer.token('sound'), WordTokenizer.token('out')}
  np.testing.assert_allclose(kept[WordTokenizer.token('out')], [0.5, 0.5, 1, 0.9], atol=1e-6)
  assert batch.region_mask.sum() == 2
  assert {name: int(stats[name]) for name in ('regions_seen', 'boxes_dropped', 'boxes_clipped',
                                              'empty_region_captions')} == {
      'regions_seen': 2, 'boxes_dropped': 3, 'boxes_clipped': 1, 'empty_region_captions': 1}


def test_pixel_boxes_in_a_record_stop_the_run(write, monkeypatch):
  monkeypatch.setattr(schema, 'check_example', lambda example: None)  # a data set written by somebody else
  record = dataclasses.replace(
      painted_example(0), regions=(schema.Region(box=(3, 4, 30, 40), caption='red'),))
  with pytest.raises(ValueError, match="record 'picture-0'.*looks like pixels"):
    take(dataset(write([record]), batch_size=1), 1)


def test_records_without_regions_or_captions(write):
  full = painted_example(0)
  bare = dataclasses.replace(full, regions=())
  mute = dataclasses.replace(full, captions=())
  blank = dataclasses.replace(full, captions=('', 'picture 0', '  '))
  item = take(dataset(write([full, bare, mute, blank]), shuffle=False, epochs=1))[0]
  batch, stats = item['batch'], item['stats']
  assert batch.region_mask.any(1).tolist() == [True, False, True, True]
  assert batch.image_mask.tolist() == [True, True, False, True]
  assert stats['captions'] == 3 and stats['empty_captions'] == 1 + 2
  assert batch.text[3, 0] == WordTokenizer.token('picture')
  check_batch(batch)


def test_no_regions_asked_for(painted):
  item = take(dataset(painted, regions_per_image=0), 1)[0]
  check_batch(item['batch'])
  assert item['batch'].region_text.shape == (4, 0, 3) and item['stats']['regions_kept'] == 0


@pytest.mark.parametrize('options, message', [
    ({'batch_size': 38}, r"split 'train' has 37 examples, fewer than one batch of 38"),
    ({'batch_size': 10, 'process_count': 4}, r'fewer than one batch of 40 \(10 on each of 4 hosts\)'),
    ({'process_index': 2, 'process_count': 2}, 'process_index'), ({'batch_size': 0}, 'batch_size'),
    ({'on_error': 'ignore'}, "'mask' or 'raise'.*'ignore'"), ({'pad': 'middle'}, "'middle'"),
    ({'image_size': 0}, 'at least one pixel'), ({'split': 'vale'}, "did you mean 'val'"),
    ({'regions_per_image': -1}, 'regions_per_image')])
def test_bad_arguments_fail_at_once(painted, options, message):
  with pytest.raises(ValueError, match=message):
    dataset(painted, **options)


def test_eval_batches_are_one_pass_in_order(painted):
  batches = list(eval_pipeline.eval_batches(painted, split='train', batch_size=8, image_size=32))
  assert [b.image_mask.sum() for b in batches] == [8, 8, 8, 8, 5]
  assert all(b.images.shape == (8, 32, 32, 3) and b.images.dtype == np.uint8 for b in batches)
  examples = [e for b in batches for e in b.examples]
  assert [e.image_id for e in examples] == [f'picture-{i}' for i in range(37)]
  for example, want in zip(examples, map(painted_example, range(37))):
    assert example.captions == want.captions
    assert example.region_captions == example.categories == tuple(r.caption for r in want.regions)
    pixels = example.geometry.boxes_from_canvas(example.boxes)
    fractions = pixels / np.array([want.width, want.height, want.width, want.height])
    np.testing.assert_allclose(fractions, [r.box for r in want.regions], atol=1e-4)
  assert (batches[-1].images[5:] == 127).all() and batches[-1].image_mask.tolist() == [True] * 5 + [False] * 3


def test_eval_batches_are_as_many_on_every_host(painted):
  hosts = [list(eval_pipeline.eval_batches(painted, split='val', batch_size=1, image_size=16, process_index=i,
                                      process_count=2)) for i in range(2)]
  assert [len(batches) for batches in hosts] == [3, 3]
  assert [[e.image_id for b in batches for e in b.examples] for batches in hosts] == [
      ['picture-100', 'picture-102', 'picture-104'], ['picture-101', 'picture-103']]
  more = [list(eval_pipeline.eval_batches(painted, split='val', batch_size=2, image_size=16, limit=1, process_index=i,
                                     process_count=2)) for i in range(2)]
  assert [[int(b.image_mask.sum()) for b in batches] for batches in more] == [[1], [0]]


@pytest.mark.parametrize('threads', [0, 1, 7])
def test_eval_batches_do_not_depend_on_threads(painted, threads):
  def batches(**more):
    return list(eval_pipeline.eval_batches(painted, split='train', batch_size=5, image_size=32, **more))
  got, want = batches(num_threads=threads), batches()
  assert len(got) == len(want) == 8
  for a, b in zip(got, want):
    np.testing.assert_array_equal(a.images, b.images)
    np.testing.assert_array_equal(a.image_mask, b.image_mask)
    assert [e.image_id for e in a.examples] == [e.image_id for e in b.examples]


def test_eval_does_not_skip_images(write):
  record = painted_example(0)
  path = write([dataclasses.replace(record, image=record.image[:-30])])
  with pytest.raises(transforms.ImageError, match="record 'picture-0'"):
    list(eval_pipeline.eval_batches(path, split='train', batch_size=1, image_size=32))


def test_eval_leaves_unusable_regions_out(write):
  record = dataclasses.replace(painted_example(0), captions=('one', ''), regions=(
      schema.Region(box=(0.5, 0.1, 0.2, 0.9), caption='inverted'), schema.Region(box=(0, 0, 1, 1), caption=''),
      schema.Region(box=(0, 0, 1, 1), caption='all', category='thing')))
  batches = eval_pipeline.eval_batches(write([record]), split='train', batch_size=1, image_size=32)
  example = next(iter(batches)).examples[0]
  assert example.captions == ('one',) and example.region_captions == ('all',) and example.categories == ('thing',)
  assert example.boxes.shape == (1, 4) and example.boxes.dtype == np.float32


def test_order_and_draws_are_those_of_grain(painted):
  """Grain's own random_map takes an example through all steps before the next; what it draws is the same."""
  examples = pipeline.Examples([pipeline.Origin(painted, split='train', seed=3)], prepare=None)
  order = examples.order(0, shuffle=True).repeat(3)
  draws = pipeline.Draws(pipeline.Origin(painted, split='train', seed=3).draw_seed)
  ours = []
  for origin, place in order:
    rng = draws.at(place)
    ours.append((place % 37, rng.integers(5), rng.permutation(8).tolist(), rng.random()))
    assert origin == 0
  theirs = grain.MapDataset.range(37).seed(3).random_map(
      lambda i, rng: (i, rng.integers(5), rng.permutation(8).tolist(), rng.random())).shuffle().repeat(3)
  assert ours == list(theirs) and len(ours) == 111
  # A release of Grain without a way to ask for many is asked for one after another.
  class Listed:
    prepare = staticmethod(list)
  batches = [grain.MapDataset.source(pipeline.Batches(Listed, places, 4, list)) for places in (order, list(order))]
  assert list(batches[0]) == list(batches[1]) == list(order.batch(4, drop_remainder=True, batch_fn=list))
