"""The path of the data from a data set on disk to host batches, in Grain.

Everything random about an example (its caption, its regions, whether it is mirrored) is drawn from the seed, the epoch
and the example's index in its split, and the order of examples is one global order that hosts take turns in. So the
batches of a run do not depend on the number of worker processes, and the examples of a global batch do not depend on
the number of hosts.
"""
from collections.abc import Iterator, Sequence
import dataclasses
import logging
import os

from absl import flags
import grain
import numpy as np

from cloc_jax import boxes as box_lib
from cloc_jax import geometry as geometry_lib
from cloc_jax.batch import Batch
from cloc_jax.data import schema
from cloc_jax.data import sources
from cloc_jax.data import transforms

_log = logging.getLogger('cloc_jax.data')

STATS = ('examples', 'regions_seen', 'regions_kept', 'captions', 'truncated_captions', 'region_captions',
         'truncated_region_captions', 'corrupt_records', 'corrupt_images', 'empty_captions', 'empty_region_captions',
         'boxes_dropped', 'boxes_clipped', 'flipped')

_FULL_CANVAS = (0.0, 0.0, 1.0, 1.0)
_PAD_VALUE = 127


@dataclasses.dataclass(frozen=True)
class Prepared:
  """One example after the random transforms, still with its words; m ≤ regions_per_image.

  image: (S, S, 3) uint8.
  image_ok: False if the image could not be decoded; there are no regions then.
  caption: '' if the record has none.
  boxes: (m, 4) float32, xyxy normalised to the canvas.
  regions: the m regions as stored, in the order of `boxes`.
  counts: what was found, by the names in STATS.
  """
  image: np.ndarray
  image_id: str
  image_ok: bool
  caption: str
  boxes: np.ndarray
  regions: tuple[schema.Region, ...]
  counts: dict[str, int]


@dataclasses.dataclass(frozen=True)
class EvalExample:
  """One image's ground truth. Unusable regions (no area, no caption) are out.

  captions: of the whole image, empty ones left out.
  geometry: how the image was put on the canvas; maps boxes there and back.
  boxes: (n, 4) float32, xyxy normalised to the canvas.
  region_captions, categories: n each; a category may be ''.
  """
  image_id: str
  captions: tuple[str, ...]
  geometry: geometry_lib.Geometry
  boxes: np.ndarray
  region_captions: tuple[str, ...]
  categories: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class EvalBatch:
  """images: (B, H, W, 3) uint8; image_mask: (B,) bool, False for padding, which comes last; examples: the real ones."""
  images: np.ndarray
  image_mask: np.ndarray
  examples: list[EvalExample]


def train_dataset(path: str | os.PathLike, *, split: str, tokenizer, batch_size: int, image_size: int,
                  text_length: int = 77, region_text_length: int = 16, regions_per_image: int = 4, seed: int = 0,
                  epochs: int | None = None, flip: bool = False, pad: str = 'center', num_workers: int = 0,
                  process_index: int = 0, process_count: int = 1, shuffle: bool = True, on_error: str = 'mask',
                  decode: str = 'exact', skip_examples: int = 0) -> grain.IterDataset:
  """Batches for training, endless or for some epochs.

  Epochs follow each other without a seam: a batch may hold the end of one and the start of the next, and then perhaps
  an image twice. What does not fill a last global batch is left out.

  Args:
    path: the data set's folder.
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
    skip_examples: start behind so many examples of the global order, over all hosts. Since an example depends on its
      index alone, this number is the whole state of the pipeline: a run resumes exactly from it, on any number of
      hosts and workers.

  Returns:
    An iterable of dict(batch=Batch of NumPy arrays, stats=dict of int64 scalars by the names in STATS). Its iterator
    has Grain's get_state and set_state, which resume it exactly under the same arguments. With worker processes, call
    the iterator's `close` when done, else Python complains at exit of shared memory that is still open.

  Raises:
    FileNotFoundError: no data set at `path`.
    ValueError: no such split, too few examples for one batch, or an argument out of range.
  """
  examples = prepared_dataset(
      path, split=split, image_size=image_size, regions_per_image=regions_per_image, seed=seed, flip=flip, pad=pad,
      shuffle=shuffle, on_error=on_error, decode=decode)
  size, global_batch = len(examples), batch_size * process_count
  if batch_size < 1 or not 0 <= process_index < process_count:
    raise ValueError(f'expected batch_size ≥ 1 and 0 ≤ process_index < process_count, got {batch_size}, '
                     f'{process_index} and {process_count}')
  if skip_examples < 0:
    raise ValueError(f'skip_examples: expected 0 or more, got {skip_examples}')
  if size < global_batch:
    raise ValueError(f'{path}: split {split!r} has {size} examples, fewer than one batch of {global_batch} '
                     f'({batch_size} on each of {process_count} hosts)')
  # Cut at whole global batches, else hosts would end after unequal numbers of batches and wait for each other.
  end = None if epochs is None else epochs * size // global_batch * global_batch
  batches = examples.repeat(epochs).slice(slice(skip_examples + process_index, end, process_count)).batch(
      batch_size, drop_remainder=True,
      batch_fn=Collate(tokenizer, text_length=text_length, region_text_length=region_text_length,
                       regions_per_image=regions_per_image))
  # One thread keeps two batches ready; more would only fight with the trainer for the interpreter.
  options = grain.ReadOptions(num_threads=0 if num_workers else 1, prefetch_buffer_size=0 if num_workers else 2)
  dataset = batches.to_iter_dataset(options)
  if num_workers:
    if not flags.FLAGS.is_parsed():  # Grain hands its flags to the workers, also where no absl app has read any.
      flags.FLAGS.mark_as_parsed()
    dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2))
  return dataset


def prepared_dataset(path: str | os.PathLike, *, split: str, image_size: int, regions_per_image: int = 4,
                     seed: int = 0, flip: bool = False, pad: str = 'center', shuffle: bool = True,
                     on_error: str = 'mask', decode: str = 'exact') -> grain.MapDataset:
  """The examples of `train_dataset` before they are tokenised and batched: a MapDataset of Prepared."""
  source = sources.RecordSource(path, split=split)
  if on_error == 'mask':
    source = _Tolerant(source)
  prepare = Prepare(image_size=image_size, regions_per_image=regions_per_image, flip=flip, pad=pad, on_error=on_error,
                    decode=decode)
  # Before the shuffle, the index that seeds a draw is epoch · size + record.
  dataset = grain.MapDataset.source(source).seed(seed).random_map(prepare)
  return dataset.shuffle() if shuffle else dataset


def eval_batches(path: str | os.PathLike, *, split: str, batch_size: int, image_size: int, pad: str = 'center',
                 limit: int | None = None, process_index: int = 0, process_count: int = 1) -> Iterator[EvalBatch]:
  """One pass over a split in its order, with nothing drawn at random. Several hosts take turns, example by example.

  The last batch is padded, and hosts that have fewer examples get wholly padded batches, so that all see equally many.

  Args:
    path, split, image_size, pad: as in `train_dataset`.
    batch_size: of this host.
    limit: take the first so many examples alone.
    process_index, process_count: this host, of how many.

  Raises:
    transforms.ImageError: on an image that cannot be decoded: a score over some of the images would not be a score.
  """
  source = sources.RecordSource(path, split=split)
  total = len(source) if limit is None else min(limit, len(source))
  examples = grain.MapDataset.source(source).slice(slice(process_index, total, process_count))
  count = -(-(-(-total // process_count)) // batch_size)  # batches on the host that has most examples
  if not len(examples):
    return iter([_collate_eval((), batch_size=batch_size, image_size=image_size)] * count)
  batches = examples.map(_PrepareEval(image_size=image_size, pad=pad)).batch(
      batch_size, batch_fn=_CollateEval(batch_size=batch_size, image_size=image_size))
  return _padded(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)), count=count,
                 empty=_collate_eval((), batch_size=batch_size, image_size=image_size))


@dataclasses.dataclass(frozen=True)
class Damaged:
  """Stands for a record that could not be read; error: why, naming the record."""
  error: str


class _Tolerant:
  """A source that gives Damaged where a record cannot be read. A run of weeks does not end at a flipped bit."""

  def __init__(self, source):
    self._source = source

  def __len__(self):
    return len(self._source)

  def __getitem__(self, index):
    try:
      return self._source[index]
    except sources.RecordError as error:
      return Damaged(str(error))

  def __repr__(self):
    return repr(self._source)


@dataclasses.dataclass(frozen=True)
class Prepare(grain.transforms.RandomMap):
  """schema.Example → Prepared; see `train_dataset` for the fields."""
  image_size: int
  regions_per_image: int
  flip: bool = False
  pad: str = 'center'
  on_error: str = 'mask'
  decode: str = 'exact'

  def __post_init__(self):
    transforms.check_decode_mode(self.decode)
    if self.on_error not in ('mask', 'raise'):
      raise ValueError(f"on_error: expected 'mask' or 'raise', got {self.on_error!r}")
    if self.regions_per_image < 0:
      raise ValueError(f'regions_per_image: expected 0 or more, got {self.regions_per_image}')
    # Fails on a bad size or padding mode here, not in a worker process.
    geometry_lib.resize_with_pad(height=1, width=1, canvas=self.image_size, pad=self.pad)

  def random_map(self, element: schema.Example | Damaged, rng: np.random.Generator) -> Prepared:
    """Draws a caption, regions and a flip; decodes, resizes and pads."""
    if isinstance(element, Damaged):
      _log.warning('%s; the example is masked', element.error)
      return self._masked(image_id='', count='corrupt_records')
    try:
      return self._prepare(element, rng)
    except transforms.ImageError as error:
      if self.on_error == 'raise':
        raise
      _log.warning('%s; the example is masked', error)
      return self._masked(image_id=element.image_id, count='corrupt_images')

  def _prepare(self, example, rng):
    image = _open(example, mode=self.decode)
    geometry = geometry_lib.resize_with_pad(
        height=image.height, width=image.width, canvas=self.image_size, pad=self.pad)
    captions = _usable_captions(example)
    usable = usable_regions(example)
    counts = dict(usable.counts, examples=1, regions_seen=len(usable.regions),
                  empty_captions=max(len(example.captions) - len(captions), int(not captions)))
    caption = captions[rng.integers(len(captions))] if captions else ''
    drawn = rng.permutation(len(usable.regions))[:self.regions_per_image]
    regions = tuple(usable.regions[i] for i in drawn)
    wants_flip = rng.random() < 0.5
    if self.flip and wants_flip and not any(map(transforms.mentions_sides, (caption, *(r.caption for r in regions)))):
      geometry = geometry.flip()
      counts['flipped'] = 1
    counts['regions_kept'] = len(regions)
    return Prepared(
        image=image.on_canvas(geometry, pad_value=_PAD_VALUE), image_id=example.image_id,
        image_ok=True, caption=caption, regions=regions, counts=counts,
        boxes=geometry_lib.normalized_boxes_to_canvas(geometry, usable.boxes[drawn]))

  def _masked(self, *, image_id, count):
    return Prepared(
        image=np.full((self.image_size, self.image_size, 3), _PAD_VALUE, np.uint8), image_id=image_id, image_ok=False,
        caption='', boxes=np.zeros((0, 4), np.float32), regions=(), counts={'examples': 1, count: 1})


class Collate:
  """A list of Prepared → dict(batch=…, stats=…); tokenises a whole batch at once."""

  def __init__(self, tokenizer, *, text_length: int, region_text_length: int, regions_per_image: int):
    self._tokenizer = tokenizer
    self._text_length, self._region_text_length = text_length, region_text_length
    self._regions_per_image = regions_per_image

  def __call__(self, examples: Sequence[Prepared]) -> dict:
    size, regions = len(examples), self._regions_per_image
    tokens = self._tokenizer([e.caption for e in examples], length=self._text_length)
    boxes = np.tile(np.array(_FULL_CANVAS, np.float32), (size, regions, 1))
    region_mask = np.zeros((size, regions), bool)
    phrases = [''] * (size * regions)
    for i, example in enumerate(examples):
      count = len(example.regions)
      boxes[i, :count] = example.boxes
      region_mask[i, :count] = True
      phrases[i * regions:i * regions + count] = [r.caption for r in example.regions]
    region_tokens = self._tokenizer(phrases, length=self._region_text_length)
    has_caption = np.array([bool(e.caption) for e in examples])
    batch = Batch(
        image=np.stack([e.image for e in examples]),
        image_mask=has_caption & np.array([e.image_ok for e in examples]), text=tokens.ids, boxes=boxes,
        region_text=region_tokens.ids.reshape(size, regions, self._region_text_length), region_mask=region_mask)
    stats = {name: sum(e.counts.get(name, 0) for e in examples) for name in STATS}
    stats |= {
        'captions': has_caption.sum(),
        'truncated_captions': (tokens.truncated & has_caption).sum(),
        'region_captions': region_mask.sum(),
        'truncated_region_captions': (region_tokens.truncated & region_mask.reshape(-1)).sum()}
    return {'batch': batch, 'stats': {name: np.int64(value) for name, value in stats.items()}}


@dataclasses.dataclass(frozen=True)
class UsableRegions:
  """boxes: (n, 4) float32 xyxy, fractions of the original image, clipped to it; regions: n; counts: of the others."""
  boxes: np.ndarray
  regions: list[schema.Region]
  counts: dict[str, int]


def usable_regions(example: schema.Example) -> UsableRegions:
  """Leaves out regions without area or caption, and counts them.

  Raises:
    ValueError: naming the record, if its boxes are not normalised xyxy.
  """
  if not example.regions:
    return UsableRegions(boxes=np.zeros((0, 4), np.float32), regions=[], counts={})
  boxes = np.array([r.box for r in example.regions], np.float32)
  counts, keep = {}, np.ones(len(boxes), bool)
  if boxes.min() >= 0 and boxes.max() <= 1 and (boxes[:, 2:] > boxes[:, :2]).all():
    if all(r.caption and not r.caption.isspace() for r in example.regions):
      return UsableRegions(boxes=boxes, regions=list(example.regions), counts={})  # the usual case, at once
  else:
    box_lib.check_normalized(boxes, where=f'record {example.image_id!r}')
    boxes, keep, found = box_lib.sanitize(boxes)
    counts = {'boxes_dropped': found['inverted'] + found['empty'], 'boxes_clipped': found['clipped']}
  worded = np.array([bool(r.caption.strip()) for r in example.regions])
  counts['empty_region_captions'] = int((keep & ~worded).sum())
  kept = np.flatnonzero(keep & worded)
  return UsableRegions(boxes=boxes[kept], regions=[example.regions[i] for i in kept], counts=counts)


@dataclasses.dataclass(frozen=True)
class _PrepareEval(grain.transforms.Map):
  """schema.Example → (canvas, EvalExample)."""
  image_size: int
  pad: str

  def map(self, element):
    image = _open(element, mode='exact')
    geometry = geometry_lib.resize_with_pad(
        height=image.height, width=image.width, canvas=self.image_size, pad=self.pad)
    usable = usable_regions(element)
    return image.on_canvas(geometry, pad_value=_PAD_VALUE), EvalExample(
        image_id=element.image_id, captions=tuple(_usable_captions(element)), geometry=geometry,
        boxes=geometry_lib.normalized_boxes_to_canvas(geometry, usable.boxes),
        region_captions=tuple(r.caption for r in usable.regions),
        categories=tuple(r.category for r in usable.regions))


@dataclasses.dataclass(frozen=True)
class _CollateEval:
  batch_size: int
  image_size: int

  def __call__(self, items):
    return _collate_eval(items, batch_size=self.batch_size, image_size=self.image_size)


def _collate_eval(items, *, batch_size, image_size):
  images = np.full((batch_size, image_size, image_size, 3), _PAD_VALUE, np.uint8)
  for i, (canvas, _) in enumerate(items):
    images[i] = canvas
  return EvalBatch(images=images, image_mask=np.arange(batch_size) < len(items), examples=[e for _, e in items])


def _padded(batches, *, count, empty):
  """Yields the batches, then `empty` until there were `count`."""
  yielded = 0
  for batch in batches:
    yield batch
    yielded += 1
  for _ in range(count - yielded):
    yield empty


def _open(example, *, mode):
  """Opens the image and checks that it has the proportions that its boxes were drawn in."""
  where = f'record {example.image_id!r}'
  image = transforms.open_image(example.image, where=where, mode=mode)
  height, width = image.height, image.width
  # A resized copy is fine, since boxes are fractions; a turned one is not.
  if not transforms.same_proportions((height, width), (example.height, example.width)):
    raise transforms.ImageError(f'{where}: the record says {example.height}×{example.width} (height × width), '
                                f'the image has {height}×{width}: its boxes would not fit')
  return image


def _usable_captions(example):
  return [caption for caption in example.captions if caption.strip()]
