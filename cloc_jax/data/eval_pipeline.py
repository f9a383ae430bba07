"""Whole splits for evaluation: one pass in the order on disk, nothing drawn at random, the last batch padded."""
from collections.abc import Iterator
import dataclasses

import grain
import numpy as np

from cloc_jax import geometry as geometry_lib
from cloc_jax.data import prepare
from cloc_jax.data import sources
from cloc_jax.data import spec as spec_lib


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


def eval_batches(path: spec_lib.Data, *, split: str, batch_size: int, image_size: int, pad: str = 'center',
                 limit: int | None = None, process_index: int = 0, process_count: int = 1) -> Iterator[EvalBatch]:
  """One pass over a split in its order, with nothing drawn at random. Several hosts take turns, example by example.

  The last batch is padded, and hosts that have fewer examples get wholly padded batches, so that all see equally many.

  Args:
    path, split, image_size, pad: as in pipeline.train_dataset.
    batch_size: of this host.
    limit: take the first so many examples alone.
    process_index, process_count: this host, of how many.

  Raises:
    transforms.ImageError: on an image that cannot be decoded: a score over some of the images would not be a score.
  """
  source = sources.open_source(path, split=split)
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
class _PrepareEval(grain.transforms.Map):
  """schema.Example → (canvas, EvalExample)."""
  image_size: int
  pad: str

  def map(self, element):
    image = prepare.open_example(element, mode='exact')
    geometry = geometry_lib.resize_with_pad(
        height=image.height, width=image.width, canvas=self.image_size, pad=self.pad)
    usable = prepare.usable_regions(element)
    return image.on_canvas(geometry, pad_value=prepare.PAD_VALUE), EvalExample(
        image_id=element.image_id, captions=tuple(prepare.usable_captions(element)), geometry=geometry,
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
  images = np.full((batch_size, image_size, image_size, 3), prepare.PAD_VALUE, np.uint8)
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
