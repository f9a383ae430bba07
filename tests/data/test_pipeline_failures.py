"""The pipeline where things are not as they should be: damaged files, slow records, more workers or hosts than data."""
import dataclasses
import itertools
import logging
import pathlib
import time

import numpy as np
from painted_pictures import encode_png
from painted_pictures import painted_example
from painted_pictures import WordTokenizer
import psutil
import pytest

from cloc_jax.data import eval_pipeline
from cloc_jax.data import pipeline
from cloc_jax.data import schema
from cloc_jax.data import sources


def dataset(path, **options):
  options = dict(split='train', tokenizer=WordTokenizer(), batch_size=4, image_size=32, text_length=5,
                 region_text_length=3, regions_per_image=3, seed=0) | options
  return pipeline.train_dataset(path, **options)


def numbers(items):
  """The numbers of the pictures in some batches, -1 for masked ones."""
  return [int(text[1]) - 10 if ok else -1 for item in items
          for text, ok in zip(item['batch'].text, item['batch'].image_mask)]


def flip_a_bit(path):
  """Damages one record somewhere in the middle of a data set of one shard; returns its index."""
  shard, = pathlib.Path(path).glob('*.array_record-*')
  data = bytearray(shard.read_bytes())
  # Its header is kept by the reader; what stands in the middle is some record's.
  data[len(data) // 3] ^= 0x10
  shard.write_bytes(data)
  source, damaged = sources.RecordSource(path, split='train'), []
  for index in range(len(source)):
    try:
      source[index]
    except sources.RecordError:
      damaged.append(index)
  index, = damaged
  return index


def test_a_damaged_record_is_masked_counted_and_named(write, caplog):
  noise = np.random.default_rng(0).integers(0, 256, (12, 60, 60, 3), np.uint8)  # not compressible
  path = write([dataclasses.replace(painted_example(i), image=encode_png(noise[i]), height=60, width=60)
                for i in range(12)])
  bad = flip_a_bit(path)
  with pytest.raises(sources.RecordError, match=rf"split 'train', record {bad}: .*hash mismatch"):
    sources.RecordSource(path, split='train')[bad]
  with caplog.at_level(logging.WARNING, logger='cloc_jax.data'):
    items = list(dataset(path, shuffle=False, epochs=2))
  assert numbers(items) == [-1 if i == bad else i for i in range(12)] * 2
  assert [int(item['stats']['corrupt_records']) for item in items] == [int(i == bad // 4) for i in range(3)] * 2
  assert sum(int(item['stats']['examples']) for item in items) == 24
  assert caplog.text.count(f'record {bad}: ') == 2 and 'masked' in caplog.text
  with pytest.raises(sources.RecordError, match=f'record {bad}: '):
    list(dataset(path, shuffle=False, epochs=1, on_error='raise'))
  with pytest.raises(sources.RecordError, match=f'record {bad}: '):  # an evaluation leaves nothing out
    list(eval_pipeline.eval_batches(path, split='train', batch_size=4, image_size=16))


def test_a_record_that_is_no_message(write, monkeypatch):
  path = write([painted_example(i) for i in range(4)])
  source = sources.RecordSource(path, split='train')
  monkeypatch.setattr(source, '_records', [b'\xff\xfe\xfd', b'', source._records[2], source._records[3]])
  for index in (0, 1):
    with pytest.raises(sources.RecordError, match=f'record {index}: '):
      source[index]
  assert source[2].image_id == 'picture-2'
  with pytest.raises(IndexError, match='record 4: the split has 4'):
    source[4]


def test_missing_shards_are_named_before_anything_is_read(tmp_path):
  path = tmp_path / 'set'
  splits = {'train': [painted_example(i) for i in range(8)], 'val': [painted_example(9)]}
  schema.write_dataset(path, meta=schema.DatasetMeta(name='toy'), splits=splits, shard_bytes=1000)
  shards = sorted(path.glob('toy-train*'))
  assert len(shards) > 3
  shards[1].unlink()
  with pytest.raises(FileNotFoundError, match=f"split 'train' lacks 1 of its files: {shards[1].name}"):
    dataset(path)
  assert len(sources.RecordSource(path, split='val')) == 1  # other splits do not suffer


def test_a_truncated_shard_masks_its_own_records(tmp_path, caplog):
  path = tmp_path / 'set'
  schema.write_dataset(path, meta=schema.DatasetMeta(name='toy'), num_shards=3,
                       splits={'train': [painted_example(i) for i in range(12)]})
  shard = sorted(path.glob('toy-train*'))[1]
  shard.write_bytes(shard.read_bytes()[:-500])
  with caplog.at_level(logging.WARNING, logger='cloc_jax.data'):
    items = list(dataset(path, shuffle=False, epochs=1))
  assert f'record 4: {shard} is cut off or damaged: 0 records are left, of which 4 are asked for' in caplog.text
  assert numbers(items) == [0, 1, 2, 3, -1, -1, -1, -1, 8, 9, 10, 11]
  assert sum(int(item['stats']['corrupt_records']) for item in items) == 4


def test_fewer_records_than_hosts(write):
  path = write([painted_example(i) for i in range(3)])
  with pytest.raises(ValueError, match=r'3 examples, fewer than one batch of 8 \(1 on each of 8 hosts\)'):
    dataset(path, batch_size=1, process_count=8)
  hosts = [list(eval_pipeline.eval_batches(path, split='train', batch_size=2, image_size=16, process_index=i,
                                      process_count=8)) for i in range(8)]
  assert [len(batches) for batches in hosts] == [1] * 8  # all wait for each other equally often
  found = [e.image_id for batches in hosts for batch in batches for e in batch.examples]
  assert found == ['picture-0', 'picture-1', 'picture-2']


@pytest.mark.slow
def test_more_workers_than_shards_and_batches(write):
  path = write([painted_example(i) for i in range(9)])  # one shard, two batches and a rest
  alone = list(dataset(path, epochs=1))
  iterator = iter(dataset(path, epochs=1, num_workers=4))
  found = list(iterator)
  iterator.close()
  assert len(found) == len(alone) == 2
  for item, other in zip(found, alone):
    np.testing.assert_array_equal(item['batch'].image, other['batch'].image)
    np.testing.assert_array_equal(item['batch'].region_text, other['batch'].region_text)


@pytest.mark.slow
def test_an_error_in_a_worker_reaches_the_trainer(write):
  records = [painted_example(i) for i in range(8)]
  records[5] = dataclasses.replace(records[5], image=records[5].image[:-40], image_id='broken.png')
  iterator = iter(dataset(write(records), epochs=1, on_error='raise', shuffle=False, num_workers=2))
  with pytest.raises(Exception, match='broken.png'):
    list(iterator)
  iterator.close()


class SlowTokenizer(WordTokenizer):
  """Takes its time with one batch."""

  def __call__(self, texts, *, length):
    if any('picture 5' in text or 'painting 5' in text for text in texts):
      time.sleep(0.4)
    return super().__call__(texts, length=length)


def test_a_slow_record_delays_and_reorders_nothing(write):
  path = write([painted_example(i) for i in range(24)])
  quick = numbers(dataset(path, epochs=2))
  slow = numbers(dataset(path, epochs=2, tokenizer=SlowTokenizer()))
  assert slow == quick


@pytest.mark.slow
def test_memory_stays_flat(write):
  """Some thousand batches hold no more than some hundred: nothing of a batch is kept."""
  path = write([painted_example(i) for i in range(64)])
  items = iter(dataset(path, image_size=64))
  held = []
  for _ in range(3):
    for _ in itertools.islice(items, 500):
      pass
    held.append(psutil.Process().memory_info().rss / 2**20)
  # A batch has 50 kB: were one in five kept, it would be 5 MB a third.
  assert held[2] - held[1] < 4, held
