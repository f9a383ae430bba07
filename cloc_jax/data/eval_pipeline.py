"""Whole splits for evaluation: one pass in the order on disk, nothing drawn at random, the last batch padded."""
from collections.abc import Iterator
import dataclasses
import os

import grain
import numpy as np

from cloc_jax import geometry as geometry_lib
from cloc_jax.data import pipeline
from cloc_jax.data import prepare
from cloc_jax.data import sources
from cloc_jax.data import spec as spec_lib
from cloc_jax.data import transforms


@dataclasses.dataclass(frozen=True)
class EvalExample:
  """One image's ground truth. Unusable regions (without area, or with neither caption nor category) are out.

  captions: of the whole image, empty ones left out.
  geometry: how the image was put on the canvas; maps boxes there and back.
  boxes: (n, 4) float32, xyxy normalised to the canvas.
  region_captions, categories: n each; one of the two may be ''.
  error: why the image is masked; '' for a sound one. Of a record that cannot be read, at most the number of
    its boxes is known beside.
  unusable: how many regions are out.
  """
  image_id: str
  captions: tuple[str, ...]
  geometry: geometry_lib.Geometry
  boxes: np.ndarray
  region_captions: tuple[str, ...]
  categories: tuple[str, ...]
  error: str = ''
  unusable: int = 0


@dataclasses.dataclass(frozen=True)
class EvalBatch:
  """images: (B, H, W, 3) uint8; image_mask: (B,) bool, False where an image is unreadable, and for padding, which comes
  last; examples: one an image without the padding."""
  images: np.ndarray
  image_mask: np.ndarray
  examples: list[EvalExample]


def eval_batches(path: spec_lib.Data, *, split: str, batch_size: int, image_size: int, pad: str = 'center',
                 limit: int | None = None, process_index: int = 0, process_count: int = 1,
                 on_error: str = 'raise', num_threads: int | None = None) -> Iterator[EvalBatch]:
  """One pass over a split in its order, with nothing drawn at random. Several hosts take turns, example by example.

  The last batch is padded, and hosts that have fewer examples get wholly padded batches, so that all see equally many.

  Args:
    path, split, image_size, pad: as in pipeline.train_dataset.
    batch_size: of this host.
    limit: take the first so many examples alone.
    process_index, process_count: this host, of how many.
    on_error: a record or image that cannot be read stops the pass ('raise'), or is masked and says why ('mask').
    num_threads: that read and decode, two batches ahead; by default one for each core, 16 at most. The batches do not
      depend on it.

  Raises:
    transforms.ImageError, sources.RecordError: on an image that cannot be decoded, or a damaged record, unless
      `on_error` is 'mask': a score over some of the images would not be a score.
  """
  if on_error not in ('mask', 'raise'):
    raise ValueError(f"on_error: expected 'mask' or 'raise', got {on_error!r}")
  source = sources.open_source(path, split=split)
  total = len(source) if limit is None else min(limit, len(source))
  if on_error == 'mask':
    source = pipeline.Tolerant(source)
  examples = grain.MapDataset.source(source).slice(slice(process_index, total, process_count))
  count = -(-(-(-total // process_count)) // batch_size)  # batches on the host that has most examples
  if not len(examples):
    return iter([_collate_eval((), batch_size=batch_size, image_size=image_size)] * count)
  # Threads share images and not batches: a small split keeps them busy too. Decoding lets go of the interpreter.
  threads = min(16, os.cpu_count() or 1) if num_threads is None else num_threads
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * batch_size)
  prepared = examples.map(_PrepareEval(image_size=image_size, pad=pad, on_error=on_error)).to_iter_dataset(options)
  batches = prepared.batch(batch_size, batch_fn=_CollateEval(batch_size=batch_size, image_size=image_size))
  return _padded(batches, count=count, empty=_collate_eval((), batch_size=batch_size, image_size=image_size))


@dataclasses.dataclass(frozen=True)
class _PrepareEval(grain.transforms.Map):
  """schema.Example or prepare.Damaged → (canvas, or None if it is to be masked, EvalExample)."""
  image_size: int
  pad: str
  on_error: str

  def map(self, element):
    if isinstance(element, prepare.Damaged):
      return None, EvalExample(image_id='', captions=(), geometry=self._geometry(1, 1), error=element.error,
                               boxes=np.zeros((element.regions, 4), np.float32),
                               region_captions=('',) * element.regions, categories=('',) * element.regions)
    height, width, canvas, error = element.height, element.width, None, ''
    try:
      image = prepare.open_example(element, mode='exact')
      height, width = image.height, image.width
      geometry = self._geometry(height, width)
      canvas = image.on_canvas(geometry, pad_value=prepare.PAD_VALUE)
    except transforms.ImageError as reason:
      if self.on_error == 'raise':
        raise transforms.ImageError(f'{reason}; --allow-missing leaves such images out, and counts them') from reason
      error, geometry = str(reason), self._geometry(height, width)
    usable = prepare.usable_regions(element, or_category=True)
    return canvas, EvalExample(
        image_id=element.image_id, captions=tuple(prepare.usable_captions(element)), geometry=geometry,
        boxes=geometry_lib.normalized_boxes_to_canvas(geometry, usable.boxes),
        region_captions=tuple(caption if caption.strip() else '' for caption in usable.regions.captions),
        categories=tuple(usable.regions.categories), error=error,
        unusable=len(element.regions) - len(usable.regions))

  def _geometry(self, height, width):
    return geometry_lib.resize_with_pad(height=height, width=width, canvas=self.image_size, pad=self.pad)


@dataclasses.dataclass(frozen=True)
class _CollateEval:
  batch_size: int
  image_size: int

  def __call__(self, items):
    return _collate_eval(items, batch_size=self.batch_size, image_size=self.image_size)


def _collate_eval(items, *, batch_size, image_size):
  images = np.full((batch_size, image_size, image_size, 3), prepare.PAD_VALUE, np.uint8)
  mask = np.zeros(batch_size, bool)
  for i, (canvas, _) in enumerate(items):
    if canvas is not None:
      images[i], mask[i] = canvas, True
  return EvalBatch(images=images, image_mask=mask, examples=[e for _, e in items])


def _padded(batches, *, count, empty):
  """Yields the batches, then `empty` until there were `count`."""
  yielded = 0
  for batch in batches:
    yield batch
    yielded += 1
  for _ in range(count - yielded):
    yield empty
