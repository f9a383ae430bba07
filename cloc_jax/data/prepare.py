"""One record → what a batch needs of it: the random choices, the pixels, and the boxes that move with them."""
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
         'boxes_dropped', 'boxes_clipped', 'flipped')

PAD_VALUE = 127


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
class Damaged:
  """Stands for a record that could not be read; error: why, naming the record."""
  error: str


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
    image = open_example(example, mode=self.decode)
    geometry = geometry_lib.resize_with_pad(
        height=image.height, width=image.width, canvas=self.image_size, pad=self.pad)
    captions = usable_captions(example)
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
        image=image.on_canvas(geometry, pad_value=PAD_VALUE), image_id=example.image_id,
        image_ok=True, caption=caption, regions=regions, counts=counts,
        boxes=geometry_lib.normalized_boxes_to_canvas(geometry, usable.boxes[drawn]))

  def _masked(self, *, image_id, count):
    return Prepared(
        image=np.full((self.image_size, self.image_size, 3), PAD_VALUE, np.uint8), image_id=image_id, image_ok=False,
        caption='', boxes=np.zeros((0, 4), np.float32), regions=(), counts={'examples': 1, count: 1})


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


def usable_captions(example: schema.Example) -> list[str]:
  """Those that are not blank."""
  return [caption for caption in example.captions if caption.strip()]
