"""Shares of hosts that take turns, put together: what one host alone would have collected, to the bit."""
import dataclasses

import numpy as np
import pytest
from test_eval_collect import Batch
from test_eval_collect import FakeModel
from test_eval_collect import example

from cloc_jax import evaluators


def batches(numbers, *, size, masked=()):
  """Images by their numbers, in batches of `size`; an image in `masked` has a record, but cannot be read."""
  numbers = list(numbers)
  for start in range(0, max(len(numbers), 1), size):
    some = numbers[start:start + size]
    images = np.full((size, 8, 8, 3), 255, np.uint8)
    mask = np.zeros(size, bool)
    for i, number in enumerate(some):
      images[i], mask[i] = number, number not in masked
    yield Batch(images=images, image_mask=mask, examples=[example(n, regions=n * 7 % 6) for n in some])


def shares(hosts, *, total, masked=(), **changes):
  """Each host with a model of its own, and batches of another size."""
  return [evaluators.collect(FakeModel().fns(**changes), batches(range(h, total, hosts), size=2 + h, masked=masked),
                             allow_empty=hosts > 1) for h in range(hosts)]


def assert_equal(got, want):
  for field in dataclasses.fields(want):
    a, b = getattr(got, field.name), getattr(want, field.name)
    if isinstance(b, np.ndarray):
      assert a.dtype == b.dtype, field.name
      np.testing.assert_array_equal(a, b, err_msg=field.name)
    else:
      assert a == b, field.name


@pytest.mark.parametrize('hosts', [2, 3, 7])
@pytest.mark.parametrize('masked', [(), (0, 4, 5)])
def test_merged_shares_are_one_pass(hosts, masked):
  alone, = shares(1, total=11, masked=masked)
  assert len(alone.image_ids) == 11 - len(masked) and len(alone.boxes) > 15 and alone.masked_images == len(masked)
  assert alone.image_position.tolist() == [i for i in range(11) if i not in masked]
  assert_equal(evaluators.merge(shares(hosts, total=11, masked=masked)), alone)


def test_more_hosts_than_images():
  alone, = shares(1, total=2)
  assert_equal(evaluators.merge(shares(5, total=2)), alone)
  with pytest.raises(ValueError, match=r'no valid image \(2 masked\)'):
    evaluators.merge(shares(3, total=2, masked=(0, 1)))


def test_what_a_model_lacks_is_lacking_in_the_whole():
  got = evaluators.merge(shares(3, total=8, ground=None, embed_regions=None))
  assert got.z_region is None and got.pred_boxes is None and got.points is None and len(got.z_region_text) > 10


def test_equal_texts_of_different_hosts_are_exactly_equal():
  """Two hosts may round one text differently; as a tie it must still count."""
  first, second = shares(2, total=8)
  second = dataclasses.replace(second, z_region_text=second.z_region_text + 1e-3, z_caption=second.z_caption + 1e-3)
  got = evaluators.merge([first, second])
  for texts, z in ((got.captions, got.z_caption), (got.region_captions, got.z_region_text)):
    assert len(set(texts)) < len(texts)
    assert len({(text, row.tobytes()) for text, row in zip(texts, z)}) == len(set(texts))


def test_hosts_that_read_different_data_are_found_out():
  first, second = shares(2, total=8)
  longer = evaluators.collect(FakeModel().fns(), batches(range(1, 12, 2), size=2))
  with pytest.raises(ValueError, match=r'do not read the same data: they had \[4, 6\] images'):
    evaluators.merge([first, longer])
  with pytest.raises(ValueError, match=r'\[4, 5\]'):
    evaluators.merge([second, evaluators.collect(FakeModel().fns(), batches(range(5), size=5))])


def test_one_host_keeps_what_it_has():
  alone, = shares(1, total=3)
  assert evaluators.gather(alone) is not None and evaluators.merge([alone]) is alone
  with pytest.raises(ValueError, match='nothing to evaluate'):
    evaluators.collect(FakeModel().fns(), [])
