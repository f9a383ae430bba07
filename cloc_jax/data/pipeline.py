"""The path of the data from a data set on disk to host batches, in Grain.

Everything random about an example (its caption, its regions, whether it is mirrored) is drawn from the seed, the epoch
and the example's index in its split, and the order of examples is one global order that hosts take turns in. So the
batches of a run do not depend on the number of worker processes, and the examples of a global batch do not depend on
the number of hosts.
"""
from collections.abc import Callable, Sequence
import dataclasses

from absl import flags
import grain
import numpy as np

from cloc_jax.batch import Batch
from cloc_jax.data import mixture as mixture_lib
from cloc_jax.data import prepare as prepare_lib
from cloc_jax.data import sources
from cloc_jax.data import spec as spec_lib
from cloc_jax.data import transforms


def train_dataset(path: spec_lib.Data | None = None, *, split: str = 'train', tokenizer, batch_size: int,
                  image_size: int, text_length: int = 77, region_text_length: int = 16, regions_per_image: int = 4,
                  seed: int = 0, epochs: int | None = None, flip: bool = False, pad: str = 'center',
                  num_workers: int = 0, process_index: int = 0, process_count: int = 1, shuffle: bool = True,
                  on_error: str = 'mask', decode: str = 'exact', captions: str | Sequence[float] = 'random',
                  crop: transforms.Crop | None = None, mixture: Sequence[mixture_lib.Part] = (),
                  skip_examples: int = 0, prefetch: int = 2) -> grain.IterDataset:
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
    prefetch: batches kept ready, by the thread or by each worker process (one at least); without workers 0 prepares a
      batch when it is asked for.

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
  if skip_examples < 0 or prefetch < 0:
    raise ValueError(f'skip_examples, prefetch: expected 0 or more, got {skip_examples} and {prefetch}')
  if (path is None) == (not mixture):
    raise ValueError('expected either a data set or a mixture')
  global_batch, end = batch_size * process_count, None
  prepare = prepare_lib.Prepare(image_size=image_size, regions_per_image=regions_per_image, flip=flip, pad=pad,
                                on_error=on_error, decode=decode, crop=crop)
  if mixture:
    if epochs is not None:
      raise ValueError('a mixture has no epochs of its own: its parts have, each its own')
    mixture_lib.check_batch(mixture, mixture_lib.sizes(mixture), batch_size=global_batch)
    examples = Examples([Origin(part.path, split=part.split, seed=mixture_lib.seed_of(part, seed),
                                captions=part.captions, on_error=on_error) for part in mixture], prepare)
    order = grain.MapDataset.select_from_datasets(
        [examples.order(i, shuffle=shuffle).repeat(None) for i in range(len(mixture))],
        mixture_lib.Schedule(mixture, seed=seed))
  else:
    examples = Examples([Origin(path, split=split, seed=seed, captions=captions, on_error=on_error)], prepare)
    order = examples.order(0, shuffle=shuffle)
    size = len(order)
    if size < global_batch:
      raise ValueError(f'{path}: split {split!r} has {size} examples, fewer than one batch of {global_batch} '
                       f'({batch_size} on each of {process_count} hosts)')
    # Cut at whole global batches, else hosts would end after unequal numbers of batches and wait for each other.
    end = None if epochs is None else epochs * size // global_batch * global_batch
    order = order.repeat(epochs)
  collate = Collate(tokenizer, image_size=image_size, text_length=text_length, region_text_length=region_text_length,
                    on_error=on_error)
  batches = grain.MapDataset.source(
      Batches(examples, order.slice(slice(skip_examples + process_index, end, process_count)), batch_size, collate))
  # More than one thread would only fight with the trainer for the interpreter.
  ahead = 0 if num_workers else prefetch
  options = grain.ReadOptions(num_threads=min(ahead, 1), prefetch_buffer_size=ahead)
  dataset = batches.to_iter_dataset(options)
  if num_workers:
    if not flags.FLAGS.is_parsed():  # Grain hands its flags to the workers, also where no absl app has read any.
      flags.FLAGS.mark_as_parsed()
    dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(
        num_workers=num_workers, per_worker_buffer_size=max(prefetch, 1)))
  return dataset


class Origin:
  """Where examples come from: a split's records, and what is drawn for each.

  path, split: see sources.open_source. seed, captions, on_error: see train_dataset.
  """

  def __init__(self, path: spec_lib.Data, *, split: str, seed: int, captions: str | Sequence[float] = 'random',
               on_error: str = 'mask'):
    prepare_lib.check_captions(captions, where='captions')
    source = sources.open_source(path, split=split)
    self.source = Tolerant(source) if on_error == 'mask' else source
    self.size, self.captions = len(source), captions
    # Apart from each other, else the order would have to do with what is drawn.
    self.draw_seed, self.order_seed = (
        int(np.random.SeedSequence([seed, use]).generate_state(1)[0]) for use in (1, 2))


class Examples:
  """The examples of one origin or several, each known by its place: (origin, epoch · records + record)."""

  def __init__(self, origins: Sequence[Origin], prepare: prepare_lib.Prepare):
    self._origins, self._prepare = origins, prepare

  def order(self, origin: int, *, shuffle: bool) -> grain.MapDataset:
    """The places of an origin's examples; every epoch of it in another order."""
    # What Grain's graph carries is the order alone: records and pixels go by the batch, see Batches.
    places = grain.MapDataset.range(self._origins[origin].size).map_with_index(_Place(origin))
    return places.shuffle(seed=self._origins[origin].order_seed) if shuffle else places

  def prepare(self, places: Sequence[tuple[int, int]]) -> prepare_lib.PreparedBatch:
    """Reads and prepares the examples at some places, all that is drawn being decided by the place."""
    origins = self._origins
    elements = [origins[origin].source[index % origins[origin].size] for origin, index in places]
    draws = [Draws(origin.draw_seed) for origin in origins]
    return self._prepare(elements, rngs=(draws[origin].at(index) for origin, index in places),
                         captions=[origins[origin].captions for origin, _ in places])


@dataclasses.dataclass(frozen=True)
class _Place(grain.transforms.MapWithIndex):
  origin: int

  def map_with_index(self, index, element):
    return self.origin, index


class Draws:
  """Random numbers by place: a generator that begins anew, elsewhere in its sequence, for each example."""

  def __init__(self, seed: int):
    self._bits = np.random.Philox(seed)
    self._state, self._generator = self._bits.state, np.random.Generator(self._bits)

  def at(self, index: int) -> np.random.Generator:
    """The generator, always the same object, at the beginning of example `index`'s own sequence."""
    # The counter has 256 bits: the highest 64 are the example's number, which leaves 2¹⁹² blocks to each.
    self._state['state']['counter'][3] = index
    self._bits.state = self._state
    return self._generator


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
  """Examples by the batch, as a source for Grain: all are read, then all are prepared, then they go through `collate`.

  As grain.MapDataset.batch, what does not fill a batch is left out; but that takes each example through all steps
  before the next, and what decoding an image throws out of the processor's caches was an eighth of the cost.
  """

  def __init__(self, examples: Examples, places: grain.MapDataset, batch_size: int,
               collate: Callable[[prepare_lib.PreparedBatch], dict]):
    self._examples, self._places, self._batch_size, self._collate = examples, places, batch_size, collate

  def __len__(self) -> int:
    return len(self._places) // self._batch_size

  def __getitem__(self, index) -> dict:
    wanted = range(index * self._batch_size, (index + 1) * self._batch_size)
    # Grain's own way to ask for many, three times as quick, which is not in its interface yet.
    many = getattr(self._places, '_getitems', None)
    return self._collate(self._examples.prepare([self._places[i] for i in wanted] if many is None else many(wanted)))


class Collate:
  """A prepare.PreparedBatch → dict(batch=…, stats=…): pixels and tokens."""

  def __init__(self, tokenizer, *, image_size: int, text_length: int, region_text_length: int, on_error: str = 'mask'):
    self._tokenizer = tokenizer
    self._text_length, self._region_text_length = text_length, region_text_length
    self._image_size, self._on_error = image_size, on_error

  def __call__(self, examples: prepare_lib.PreparedBatch) -> dict:
    images = np.empty((len(examples), self._image_size, self._image_size, 3), np.uint8)
    examples.paint(images, on_error=self._on_error)
    tokens = self._tokenizer(examples.captions, length=self._text_length)
    region_mask = examples.region_mask
    region_tokens = self._tokenizer(examples.region_captions(), length=self._region_text_length)
    has_caption = np.array([bool(caption) for caption in examples.captions])
    batch = Batch(
        image=images, image_mask=has_caption & np.array([image is not None for image in examples.images]),
        text=tokens.ids, boxes=examples.boxes,
        region_text=region_tokens.ids.reshape(*region_mask.shape, self._region_text_length), region_mask=region_mask)
    stats = dict(zip(prepare_lib.STATS, examples.counts.sum(0)))
    stats |= {
        'captions': has_caption.sum(),
        'truncated_captions': (tokens.truncated & has_caption).sum(),
        'region_captions': region_mask.sum(),
        'truncated_region_captions': (region_tokens.truncated & region_mask.reshape(-1)).sum()}
    return {'batch': batch, 'stats': {name: np.int64(value) for name, value in stats.items()}}
