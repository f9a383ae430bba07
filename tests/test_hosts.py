"""What hosts say to each other, with threads for hosts; tests/test_multiprocess.py has real ones."""
import dataclasses
import json
import threading

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from data.painted_pictures import COLORS, painted_example
from PIL import Image
from test_eval_supplied_boxes import encoder
from test_evaluate import color_encoder

from cloc_jax import evaluate, hosts
from cloc_jax.data import schema, transforms
from cloc_jax.evaluators import coverage

COUNT = 3


@pytest.fixture(name='on_hosts')
def on_hosts_fixture(monkeypatch):
  """on_hosts(function of the host's number) → what each returned or raised."""
  here, slots = threading.local(), [None] * COUNT
  barrier = threading.Barrier(COUNT, timeout=60)

  def allgather(value):
    slots[here.index] = np.array(value)
    barrier.wait()
    found = np.stack(slots)  # as the real one: only equal shapes go together
    barrier.wait()
    return found

  monkeypatch.setattr(multihost_utils, 'process_allgather', allgather)
  monkeypatch.setattr(jax, 'process_count', lambda: COUNT)
  monkeypatch.setattr(jax, 'process_index', lambda: here.index)

  def run(function):
    out = [None] * COUNT

    def host(index):
      here.index = index
      try:
        out[index] = function(index)
      except ValueError as error:
        out[index] = error

    threads = [threading.Thread(target=host, args=(i,)) for i in range(COUNT)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    return out

  return run


@pytest.mark.parametrize('block', [3, 1000, 1 << 26])
def test_values_of_any_size_arrive_in_order(on_hosts, monkeypatch, block):
  monkeypatch.setattr(hosts, '_BLOCK', block)
  value = lambda i: {'host': i, 'text': 'größe' * i, 'z': np.arange(7 * i, dtype=np.float32)}
  first, *others = on_hosts(lambda i: hosts.gather(value(i)))
  assert others == [None, None] and [v['host'] for v in first] == [0, 1, 2]
  for i, got in enumerate(first):
    assert got['text'] == value(i)['text']
    np.testing.assert_array_equal(got['z'], value(i)['z'])
  assert on_hosts(lambda i: hosts.from_first([i, 'x' * 50])) == [[0, 'x' * 50]] * COUNT


def test_one_failure_fails_all(on_hosts):
  def work(index):
    with hosts.together():
      if index == 1:
        raise KeyError('nothing there')
      return index

  class Broken(ValueError):
    pass

  def break_down(index):
    try:
      return work(index)
    except KeyError as error:
      raise Broken('itself') from error

  first, second, third = on_hosts(break_down)
  assert isinstance(second, Broken)
  for error in (first, third):
    assert isinstance(error, hosts.HostError) and "host 1 of 3 failed: KeyError: 'nothing there'" in str(error)


def test_what_all_manage_is_returned(on_hosts):
  def work(index):
    with hosts.together():
      return index

  assert on_hosts(work) == [0, 1, 2]


def test_one_host_alone_asks_nobody(monkeypatch):
  monkeypatch.setattr(multihost_utils, 'process_allgather', lambda value: pytest.fail('nobody is there'))
  assert hosts.gather('x') == ['x'] and hosts.from_first('x') == 'x'
  with pytest.raises(ZeroDivisionError), hosts.together():
    1 / 0


def alone(function):
  """What one host alone gets."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, 'process_count', lambda: 1)
    patch.setattr(jax, 'process_index', lambda: 0)
    return function(COUNT)


@pytest.mark.parametrize('images', [2, 10])
def test_an_image_folder_is_shared(on_hosts, tmp_path, images):
  """Of two images the third host has none."""
  colors = {'red': (250, 0, 0), 'green': (0, 250, 0), 'blue': (0, 0, 250)}
  rng = np.random.default_rng(0)
  for name in colors:
    (tmp_path / name).mkdir()
  for i in range(images):
    shown = colors[str(rng.choice(list(colors)))]
    Image.new('RGB', (8, 8), shown).save(tmp_path / list(colors)[i % 3] / f'{i}.png')
  done = [[] for _ in range(COUNT)]
  run = lambda i: evaluate.run_imagefolder(color_encoder(), path=tmp_path, batch_size=2, progress=done[i].append)
  found = on_hosts(run)
  done.append([])
  evaluation, about, _ = alone(run)
  assert 0 < evaluation.metrics['zeroshot/top1'] < 1 and evaluation.metrics['zeroshot/images'] == images
  for got in found:
    assert dataclasses.asdict(got[0]) == dataclasses.asdict(evaluation) and got[1] == about
  assert [d[-1] if d else 0 for d in done] == [len(range(i, images, COUNT)) for i in range(COUNT)] + [images]


def test_supplied_boxes_and_missing_images_are_shared(on_hosts, tmp_path):
  """Of seven pictures three cannot be read, two of them the third host's only ones; figures are those of one host."""
  pytest.importorskip('faster_coco_eval')
  examples = [painted_example(i) for i in range(7)]
  rng = np.random.default_rng(0)
  rows = []
  for e in examples:
    for region in e.regions:
      x0, y0, x1, y1 = np.array(region.box) * [e.width, e.height, e.width, e.height]
      x0, y0 = np.array([x0, y0]) + rng.uniform(0, 6, 2)  # some meet the truth by more than a half, others do not
      rows.append({'image_id': e.image_id, 'bbox': [x0, y0, x1 - x0, y1 - y0], 'score': float(rng.random())})
  (tmp_path / 'p.json').write_text(json.dumps(rows))
  for i in (1, 2, 5):
    examples[i] = dataclasses.replace(examples[i], image=examples[i].image[:40])
  meta = schema.DatasetMeta(name='painted', categories=tuple(COLORS))
  schema.write_dataset(tmp_path / 'set', meta=meta, splits={'val': examples})

  def run(_, **options):
    return evaluate.run_encoder(encoder(), path=tmp_path / 'set', split='val', batch_size=2,
                                proposals=tmp_path / 'p.json', **options)

  want, predictions = alone(lambda i: run(i, allow_missing=True))
  found = on_hosts(lambda i: run(i, allow_missing=True))
  assert 0 < want.metrics['detection/ap50'] < 1 and want.coverage.images == 4 and want.coverage.of_images == 7
  for got, _ in found:
    assert got.metrics == want.metrics and got.protocols == want.protocols and got.skipped == want.skipped
    assert got.coverage == want.coverage
  assert found[0][1].image_ids == predictions.image_ids and [p for _, p in found[1:]] == [None, None]
  # Without leave, all hosts stop: those that met a broken image with its error, the first with the word of another.
  first, second, third = on_hosts(run)
  assert isinstance(first, hosts.HostError) and 'host 1 of 3 failed: ImageError' in str(first)
  assert all(isinstance(error, transforms.ImageError) for error in (second, third))


@pytest.mark.parametrize('named', [2, 10])
def test_unreadable_images_are_named_as_one_host_names_them(on_hosts, tmp_path, monkeypatch, named):
  monkeypatch.setattr(coverage, 'NAMED', named)
  examples = [painted_example(i) for i in range(12)]
  broken = (1, 3, 4, 7, 9, 10)  # the second host's are 1, 4, 7 and 10
  for i in broken:
    examples[i] = dataclasses.replace(examples[i], image=examples[i].image[:40])
  schema.write_dataset(tmp_path / 'set', meta=schema.DatasetMeta(name='painted', categories=tuple(COLORS)),
                       splits={'val': examples})
  run = lambda _: evaluate.run_encoder(encoder(), path=tmp_path / 'set', split='val', batch_size=2, allow_missing=True)
  want = alone(run)[0].coverage
  assert [why.split("'")[1] for why in want.unreadable] == [f'picture-{i}' for i in broken[:named]]
  assert want.left_out == want.unreadable + (('4 more images, not named',) if named == 2 else ())
  assert [got.coverage for got, _ in on_hosts(run)] == [want] * COUNT


def test_a_broken_file_of_an_image_folder_is_shared(on_hosts, tmp_path):
  for i, color in enumerate([(250, 0, 0), (0, 250, 0), (250, 0, 0), (0, 250, 0), (0, 250, 0)]):
    name = tmp_path / ['red', 'green'][i % 2] / f'{i}.png'
    name.parent.mkdir(exist_ok=True)
    Image.new('RGB', (8, 8), color).save(name)
  (tmp_path / 'green' / '3.png').write_bytes(b'no image')
  run = lambda i: evaluate.run_imagefolder(color_encoder(), path=tmp_path, batch_size=2, allow_missing=True)
  want, about, classified = alone(run)
  assert want.metrics['zeroshot/images'] == 4 == want.coverage.images and want.coverage.of_images == 5
  for got in on_hosts(run):
    assert dataclasses.asdict(got[0]) == dataclasses.asdict(want) and got[1] == about
    assert got[2].images == classified.images and len(got[2].images) == 4
