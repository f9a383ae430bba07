"""What hosts say to each other, with threads for hosts; tests/test_multiprocess.py has real ones."""
import dataclasses
import threading

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from PIL import Image
from test_evaluate import color_encoder

from cloc_jax import evaluate, hosts

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
  with pytest.MonkeyPatch.context() as alone:
    alone.setattr(jax, 'process_count', lambda: 1)
    alone.setattr(jax, 'process_index', lambda: 0)
    done.append([])
    evaluation, about = run(COUNT)
  assert 0 < evaluation.metrics['zeroshot/top1'] < 1 and evaluation.metrics['zeroshot/images'] == images
  for got in found:
    assert dataclasses.asdict(got[0]) == dataclasses.asdict(evaluation) and got[1] == about
  assert [d[-1] if d else 0 for d in done] == [len(range(i, images, COUNT)) for i in range(COUNT)] + [images]
