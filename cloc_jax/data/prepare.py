"""One record → what a batch needs of it: the random choices, the boxes that move with the pixels, then the pixels.

Pixels come last, when all that is small is done for a whole batch: decoding one image empties the processor's caches.
"""
from collections.abc import Sequence
import dataclasses
import logging

import grain
import numpy as np

from cloc_jax import boxes as box_lib
from cloc_jax import geometry as geometry_lib
from cloc_jax.data import schema
from cloc_jax.data import transforms

_log = logging.getLogger('cloc_jax.data')

STATS = ('examples', 'regions_seen', 'regions_kept', 'captions', 'truncated_captions', 'region_captions',
         'truncated_region_captions', 'corrupt_records', 'corrupt_images', 'empty_captions', 'empty_region_captions',
         'boxes_dropped', 'boxes_clipped', 'flipped', 'other_captions', 'cropped', 'regions_cropped_out')

PAD_VALUE = 127


@dataclasses.dataclass(frozen=True)
class Prepared:
  """One example after the random draws, still with its words, and as a rule without its pixels; m ≤ regions_per_image.

  image: what `paint` makes the canvas of; None where there is none, and then there are no regions.
  geometry: how it is put on the canvas.
  caption: '' if the record has none.
  boxes: (m, 4) float32, xyxy normalised to the canvas.
  regions: the m regions as stored, in the order of `boxes`.
  counts: what was found, by the names in STATS.
  """
  image: transforms.Opened | np.ndarray | None
  geometry: geometry_lib.Geometry | None
  image_id: str
  caption: str
  boxes: np.ndarray
  regions: schema.Regions
  counts: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Damaged:
  """Stands for a record that could not be read; error: why, naming the record; regions: how many it is known to have."""
  error: str
  regions: int = 0


@dataclasses.dataclass(frozen=True)
class Prepare(grain.transforms.RandomMap):
  """schema.Example → Prepared; see `train_dataset` for the fields."""
  image_size: int
  regions_per_image: int
  flip: bool = False
  pad: str = 'center'
  on_error: str = 'mask'
  decode: str = 'exact'
  captions: str | Sequence[float] = 'random'
  crop: transforms.Crop | None = None

  def __post_init__(self):
    check_captions(self.captions, where='captions')
    transforms.check_decode_mode(self.decode)
    if self.on_error not in ('mask', 'raise'):
      raise ValueError(f"on_error: expected 'mask' or 'raise', got {self.on_error!r}")
    if self.regions_per_image < 0:
      raise ValueError(f'regions_per_image: expected 0 or more, got {self.regions_per_image}')
    # Fails on a bad size or padding mode here, not in a worker process.
    geometry_lib.resize_with_pad(height=1, width=1, canvas=self.image_size, pad=self.pad)

  def random_map(self, element: schema.Example | Damaged, rng: np.random.Generator) -> Prepared:
    """Draws a crop, a caption, regions and a flip."""
    if isinstance(element, Damaged):
      _log.warning('%s; the example is masked', element.error)
      return _masked(image_id='', count='corrupt_records')
    try:
      return self._prepare(element, rng)
    except transforms.ImageError as error:
      return _given_up(element.image_id, error, on_error=self.on_error)

  def _prepare(self, example, rng):
    image = open_example(example, mode=self.decode)
    window = None if self.crop is None else self.crop.draw(rng, height=image.height, width=image.width)
    geometry = geometry_lib.resize_with_pad(
        height=image.height, width=image.width, canvas=self.image_size, pad=self.pad, crop=window)
    usable = usable_regions(example)
    boxes, visible = usable.boxes, np.arange(len(usable.regions))
    counts = dict(usable.counts, examples=1, regions_seen=len(usable.regions),
                  empty_captions=max(sum(not c.strip() for c in example.captions), int(not example.captions)))
    if window is not None:
      boxes, visible = geometry.crop_boxes(boxes, min_visible=self.crop.min_visible)
      counts |= {'cropped': 1, 'regions_cropped_out': len(usable.regions) - len(visible)}
    caption, other = _draw_caption(example.captions, self.captions, rng)
    drawn = visible[rng.permutation(len(visible))[:self.regions_per_image]]
    regions = usable.regions.take(drawn)
    wants_flip = rng.random() < 0.5
    if self.flip and wants_flip and not any(map(transforms.mentions_sides, (caption, *regions.captions))):
      geometry = geometry.flip()
      counts['flipped'] = 1
    counts |= {'regions_kept': len(regions), 'other_captions': other}
    if image.decoded:  # a batch of them, whole, might be gigabytes
      image = image.on_canvas(geometry, pad_value=PAD_VALUE)
    return Prepared(
        image=image, geometry=geometry, image_id=example.image_id, caption=caption, regions=regions, counts=counts,
        boxes=geometry_lib.normalized_boxes_to_canvas(geometry, boxes[drawn]))


def paint(example: Prepared, out: np.ndarray, *, on_error: str) -> Prepared:
  """Decodes, resizes and pads into `out`, (S, S, 3) uint8; grey where there is no image.

  Returns:
    The example, or what stands in its place if its image cannot be decoded and `on_error` is 'mask'.

  Raises:
    transforms.ImageError: naming the record, if its image cannot be decoded and `on_error` is 'raise'.
  """
  try:
    if isinstance(example.image, transforms.Opened):
      example.image.on_canvas(example.geometry, pad_value=PAD_VALUE, out=out)
    else:
      out[...] = PAD_VALUE if example.image is None else example.image
    return example
  except transforms.ImageError as error:
    out[...] = PAD_VALUE
    return _given_up(example.image_id, error, on_error=on_error)


def _given_up(image_id, error, *, on_error):
  if on_error == 'raise':
    raise error
  _log.warning('%s; the example is masked', error)
  return _masked(image_id=image_id, count='corrupt_images')


def _masked(*, image_id, count):
  return Prepared(image=None, geometry=None, image_id=image_id, caption='', boxes=np.zeros((0, 4), np.float32),
                  regions=schema.Regions.of(()), counts={'examples': 1, count: 1})


@dataclasses.dataclass(frozen=True)
class UsableRegions:
  """boxes: (n, 4) float32 xyxy, fractions of the original image, clipped to it; regions: n; counts: of the others."""
  boxes: np.ndarray
  regions: schema.Regions
  counts: dict[str, int]


def usable_regions(example: schema.Example) -> UsableRegions:
  """Leaves out regions without area or caption, and counts them.

  Raises:
    ValueError: naming the record, if its boxes are not normalised xyxy.
  """
  regions = schema.Regions.of(example.regions)
  boxes, captions = regions.boxes, regions.captions
  if not captions:
    return UsableRegions(boxes=boxes, regions=regions, counts={})
  counts, keep = {}, np.ones(len(boxes), bool)
  if boxes.min() >= 0 and boxes.max() <= 1 and (boxes[:, 2:] > boxes[:, :2]).all():
    if all(captions) and not any(map(str.isspace, captions)):
      return UsableRegions(boxes=boxes, regions=regions, counts={})  # the usual case, at once
  else:
    box_lib.check_normalized(boxes, where=f'record {example.image_id!r}')
    boxes, keep, found = box_lib.sanitize(boxes)
    counts = {'boxes_dropped': found['inverted'] + found['empty'], 'boxes_clipped': found['clipped']}
  worded = np.array([bool(caption.strip()) for caption in captions])
  counts['empty_region_captions'] = int((keep & ~worded).sum())
  kept = np.flatnonzero(keep & worded)
  return UsableRegions(boxes=boxes[kept], regions=regions.take(kept), counts=counts)


def open_example(example: schema.Example, *, mode: str) -> transforms.Opened:
  """Opens the image (transforms.open_image) and checks that it has the proportions that its boxes were drawn in.

  Raises:
    transforms.ImageError: naming the record, if it cannot be decoded or has others.
  """
  where = f'record {example.image_id!r}'
  image = transforms.open_image(example.image, where=where, mode=mode)
  height, width = image.height, image.width
  # A resized copy is fine, since boxes are fractions; a turned one is not.
  if not transforms.same_proportions((height, width), (example.height, example.width)):
    raise transforms.ImageError(f'{where}: the record says {example.height}×{example.width} (height × width), '
                                f'the image has {height}×{width}: its boxes would not fit')
  return image


def check_captions(choice: str | Sequence[float], *, where: str) -> None:
  """Raises ValueError unless `choice` says which of an image's captions is drawn.

  'random': any, all alike. 'first', 'last': that one. Weights: (0.3, 0.7) draws the first of the record's captions with
  0.3 and the second with 0.7, of those that are there and not blank; if there are only captions without a weight, one
  of them is drawn and counted ('other_captions').
  """
  if isinstance(choice, str):
    if choice not in ('random', 'first', 'last'):
      raise ValueError(f"{where}: expected 'random', 'first', 'last' or weights, got {choice!r}")
    return
  try:
    weights = np.array(choice, np.float64)
  except (TypeError, ValueError):
    weights = np.zeros(0)
  if weights.ndim != 1 or not weights.size or not np.isfinite(weights).all() or weights.min() < 0 or not weights.max():
    raise ValueError(f"{where}: expected 'random', 'first', 'last' or weights, 0 or more and not all 0, got {choice!r}")


def _draw_caption(captions, choice, rng):
  """(the caption or '', 1 if it is one without a weight)."""
  found = [i for i, caption in enumerate(captions) if caption.strip()]
  if not found:
    return '', 0
  if isinstance(choice, str):
    at = rng.integers(len(found))  # drawn in any case, so that regions and flips do not depend on the choice
    return captions[found[{'random': at, 'first': 0, 'last': -1}[choice]]], 0
  weights = np.array([choice[i] if i < len(choice) else 0.0 for i in found])
  other = int(not weights.any())
  ends = np.cumsum(weights + other)
  return captions[found[int(np.searchsorted(ends, rng.random() * ends[-1], side='right'))]], other


def usable_captions(example: schema.Example) -> list[str]:
  """Those that are not blank."""
  return [caption for caption in example.captions if caption.strip()]
