"""The path of the data from a data set on disk to host batches, in Grain.

Everything random about an example (its caption, its regions, whether it is mirrored) is drawn from the seed, the epoch
and the example's index in its split, and the order of examples is one global order that hosts take turns in. So the
batches of a run do not depend on the number of worker processes, and the examples of a global batch do not depend on
the number of hosts.
"""
from collections.abc import Callable, Sequence

from absl import flags
import grain
import numpy as np

from cloc_jax.batch import Batch
from cloc_jax.data import mixture as mixture_lib
from cloc_jax.data import prepare as prepare_lib
from cloc_jax.data import sources
from cloc_jax.data import spec as spec_lib
from cloc_jax.data import transforms

_FULL_CANVAS = (0.0, 0.0, 1.0, 1.0)


def train_dataset(path: spec_lib.Data | None = None, *, split: str = 'train', tokenizer, batch_size: int,
                  image_size: int, text_length: int = 77, region_text_length: int = 16, regions_per_image: int = 4,
                  seed: int = 0, epochs: int | None = None, flip: bool = False, pad: str = 'center',
                  num_workers: int = 0, process_index: int = 0, process_count: int = 1, shuffle: bool = True,
                  on_error: str = 'mask', decode: str = 'exact', captions: str | Sequence[float] = 'random',
                  crop: transforms.Crop | None = None, mixture: Sequence[mixture_lib.Part] = (),
                  skip_examples: int = 0) -> grain.IterDataset:
  """Batches for training, endless or for some epochs.

  Epochs follow each other without a seam: a batch may hold the end of one and the start of the next, and then perhaps
  an image twice. What does not fill a last global batch is left out.

  Args:
    path: the data set, see sources.open_source.
    split: its split.
    tokenizer: a data.tokenizer.Tokenizer, or anything called as `tokenizer(texts, length=n)` that returns an object
      with `ids` (len(texts), n) and `truncated` (len(texts),).
    batch_size: of this host.
    image_size: side of the canvas, pixels.
    text_length, region_text_length: L and Lr, tokens.
    regions_per_image: M; that many regions of an image are drawn anew each epoch, without replacement.
    seed: of the order and of all draws.
    epochs: passes over the split; None for no end.
    flip: mirror half of the examples, but none whose caption or drawn regions speak of left or right.
    pad: see geometry.resize_with_pad.
    num_workers: processes that prepare batches; 0 for a thread of this one.
    process_index, process_count: this host, of how many.
    shuffle: False keeps the order on disk.
    on_error: a record that cannot be read or an image that cannot be decoded is masked, counted and logged ('mask'),
      or stops the run ('raise').
    decode: 'exact' or 'fast', see transforms.open_image.
    captions: which of an image's captions is drawn, see prepare.check_captions.
    crop: random crops; None for whole images.
    mixture: parts in place of `path`, each with its own split and captions. A mixture has no end: a part that is
      through begins anew, in another order and with other draws.
    skip_examples: start behind so many examples of the global order, over all hosts. Since an example depends on its
      index alone, this number is the whole state of the pipeline: a run resumes exactly from it, on any number of
      hosts and workers.

  Returns:
    An iterable of dict(batch=Batch of NumPy arrays, stats=dict of int64 scalars by the names in prepare.STATS). Its
    iterator has Grain's get_state and set_state, which resume it exactly under the same arguments. With worker
    processes, call the iterator's `close` when done, else Python complains at exit of shared memory still open.

  Raises:
    FileNotFoundError: no data set at `path`.
    ValueError: no such split, too few examples for one batch, or an argument out of range.
  """
  if batch_size < 1 or not 0 <= process_index < process_count:
    raise ValueError(f'expected batch_size ≥ 1 and 0 ≤ process_index < process_count, got {batch_size}, '
                     f'{process_index} and {process_count}')
  if skip_examples < 0:
    raise ValueError(f'skip_examples: expected 0 or more, got {skip_examples}')
  if (path is None) == (not mixture):
    raise ValueError('expected either a data set or a mixture')
  global_batch, end = batch_size * process_count, None
  draws = dict(image_size=image_size, regions_per_image=regions_per_image, flip=flip, pad=pad, shuffle=shuffle,
               on_error=on_error, decode=decode, crop=crop)
  if mixture:
    if epochs is not None:
      raise ValueError('a mixture has no epochs of its own: its parts have, each its own')
    examples = _mixed(mixture, seed=seed, global_batch=global_batch, **draws)
  else:
    examples = prepared_dataset(path, split=split, seed=seed, captions=captions, **draws)
    size = len(examples)
    if size < global_batch:
      raise ValueError(f'{path}: split {split!r} has {size} examples, fewer than one batch of {global_batch} '
                       f'({batch_size} on each of {process_count} hosts)')
    # Cut at whole global batches, else hosts would end after unequal numbers of batches and wait for each other.
    end = None if epochs is None else epochs * size // global_batch * global_batch
    examples = examples.repeat(epochs)
  collate = Collate(tokenizer, image_size=image_size, text_length=text_length, region_text_length=region_text_length,
                    regions_per_image=regions_per_image, on_error=on_error)
  batches = grain.MapDataset.source(
      Batches(examples.slice(slice(skip_examples + process_index, end, process_count)), batch_size, collate))
  # One thread keeps two batches ready; more would only fight with the trainer for the interpreter.
  options = grain.ReadOptions(num_threads=0 if num_workers else 1, prefetch_buffer_size=0 if num_workers else 2)
  dataset = batches.to_iter_dataset(options)
  if num_workers:
    if not flags.FLAGS.is_parsed():  # Grain hands its flags to the workers, also where no absl app has read any.
      flags.FLAGS.mark_as_parsed()
    dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2))
  return dataset


def prepared_dataset(path: spec_lib.Data, *, split: str, image_size: int, regions_per_image: int = 4, seed: int = 0,
                     flip: bool = False, pad: str = 'center', shuffle: bool = True, on_error: str = 'mask',
                     decode: str = 'exact', captions: str | Sequence[float] = 'random',
                     crop: transforms.Crop | None = None) -> grain.MapDataset:
  """The examples of `train_dataset` before they are painted, tokenised and batched: a MapDataset of prepare.Prepared."""
  source = sources.open_source(path, split=split)
  if on_error == 'mask':
    source = Tolerant(source)
  prepare = prepare_lib.Prepare(image_size=image_size, regions_per_image=regions_per_image, flip=flip, pad=pad,
                                on_error=on_error, decode=decode, captions=captions, crop=crop)
  # Before the shuffle, the index that seeds a draw is epoch · size + record.
  dataset = grain.MapDataset.source(source).seed(seed).random_map(prepare)
  return dataset.shuffle() if shuffle else dataset


def _mixed(parts, *, seed, global_batch, **draws):
  """The prepared examples of a mixture, without end."""
  mixture_lib.check_batch(parts, mixture_lib.sizes(parts), batch_size=global_batch)
  each = [prepared_dataset(part.path, split=part.split, captions=part.captions,
                           seed=mixture_lib.seed_of(part, seed), **draws) for part in parts]
  return grain.MapDataset.select_from_datasets([part.repeat(None) for part in each],
                                               mixture_lib.Schedule(parts, seed=seed))


class Tolerant:
  """A source that gives Damaged where a record cannot be read. A run of weeks does not end at a flipped bit."""

  def __init__(self, source):
    self._source = source

  def __len__(self):
    return len(self._source)

  def __getitem__(self, index):
    try:
      return self._source[index]
    except sources.RecordError as error:
      return prepare_lib.Damaged(str(error), regions=error.regions)

  def __repr__(self):
    return repr(self._source)


class Batches:
  """A MapDataset's elements by the batch: all are read, then all are prepared, then they go through `collate`.

  As grain.MapDataset.batch, which leaves out what does not fill a batch too, but takes each element through all steps
  before the next; an eighth of an image's cost was in what that throws out of the processor's caches.
  """

  def __init__(self, elements: grain.MapDataset, batch_size: int, collate: Callable[[Sequence], dict]):
    self._elements, self._batch_size, self._collate = elements, batch_size, collate

  def __len__(self) -> int:
    return len(self._elements) // self._batch_size

  def __getitem__(self, index) -> dict:
    places = range(index * self._batch_size, (index + 1) * self._batch_size)
    # Grain's own way to ask for many, which is not in its interface yet.
    many = getattr(self._elements, '_getitems', None)
    return self._collate([self._elements[i] for i in places] if many is None else many(list(places)))


class Collate:
  """A list of prepare.Prepared → dict(batch=…, stats=…); paints into one array, and tokenises a whole batch at once."""

  def __init__(self, tokenizer, *, image_size: int, text_length: int, region_text_length: int, regions_per_image: int,
               on_error: str = 'mask'):
    self._tokenizer = tokenizer
    self._text_length, self._region_text_length = text_length, region_text_length
    self._image_size, self._regions_per_image, self._on_error = image_size, regions_per_image, on_error

  def __call__(self, examples: Sequence[prepare_lib.Prepared]) -> dict:
    size, regions = len(examples), self._regions_per_image
    images = np.empty((size, self._image_size, self._image_size, 3), np.uint8)
    examples = [prepare_lib.paint(e, out, on_error=self._on_error) for e, out in zip(examples, images)]
    tokens = self._tokenizer([e.caption for e in examples], length=self._text_length)
    boxes = np.tile(np.array(_FULL_CANVAS, np.float32), (size, regions, 1))
    region_mask = np.zeros((size, regions), bool)
    phrases = [''] * (size * regions)
    for i, example in enumerate(examples):
      count = len(example.regions)
      boxes[i, :count] = example.boxes
      region_mask[i, :count] = True
      phrases[i * regions:i * regions + count] = example.regions.captions
    region_tokens = self._tokenizer(phrases, length=self._region_text_length)
    has_caption = np.array([bool(e.caption) for e in examples])
    batch = Batch(
        image=images, image_mask=has_caption & np.array([e.image is not None for e in examples]), text=tokens.ids,
        boxes=boxes,
        region_text=region_tokens.ids.reshape(size, regions, self._region_text_length), region_mask=region_mask)
    stats = dict.fromkeys(prepare_lib.STATS, 0)
    for example in examples:
      for name, count in example.counts.items():
        stats[name] += count
    stats |= {
        'captions': has_caption.sum(),
        'truncated_captions': (tokens.truncated & has_caption).sum(),
        'region_captions': region_mask.sum(),
        'truncated_region_captions': (region_tokens.truncated & region_mask.reshape(-1)).sum()}
    return {'batch': batch, 'stats': {name: np.int64(value) for name, value in stats.items()}}
