"""One record → what a batch needs of it: the random choices, the boxes that move with the pixels, then the pixels.

Pixels come last, when all that is small is done for a whole batch: decoding one image empties the processor's caches.
"""
from collections.abc import Iterable, Sequence
import dataclasses
import logging

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
_FULL_CANVAS = (0.0, 0.0, 1.0, 1.0)
_NO_REGIONS = schema.Regions.of(())
_COLUMN = {name: i for i, name in enumerate(STATS)}
_DRAWN = [_COLUMN[name] for name in ('examples', 'regions_seen', 'regions_kept', 'empty_captions', 'other_captions',
                                     'flipped', 'cropped', 'regions_cropped_out')]


class PreparedBatch:
  """Examples after the random draws, still with their words, and as a rule without their pixels.

  B examples, M = regions_per_image. Those that cannot be read have no image, no caption and no regions.

  images: B; what `paint` makes the canvases of, None where there is none.
  geometries: B; how each is put on its canvas, None where there is no image.
  image_ids, captions: B; '' for none.
  boxes: (B, M, 4) float32, xyxy normalised to the canvas; the whole canvas where there is no region.
  region_mask: (B, M) bool.
  counts: (B, len(STATS)) int64: what was found in each, by the names in STATS.
  """

  def __init__(self, size: int, regions_per_image: int):
    self.images: list[transforms.Opened | np.ndarray | None] = [None] * size
    self.geometries: list[geometry_lib.Geometry | None] = [None] * size
    self.image_ids, self.captions = [''] * size, [''] * size
    self.boxes = np.empty((size, regions_per_image, 4), np.float32)
    self.boxes[:] = _FULL_CANVAS
    self.region_mask = np.zeros((size, regions_per_image), bool)
    self.counts = np.zeros((size, len(STATS)), np.int64)
    self._regions, self._drawn = [_NO_REGIONS] * size, [()] * size

  def __len__(self) -> int:
    return len(self.images)

  def regions(self, i: int) -> schema.Regions:
    """The regions drawn of an example, in the order of its boxes; a box is as stored."""
    return self._regions[i].take(self._drawn[i])

  def region_captions(self) -> list[str]:
    """B·M; '' where there is no region."""
    padding = [''] * self.region_mask.shape[1]
    out = []
    for regions, drawn in zip(self._regions, self._drawn):
      captions = regions.captions
      out += [captions[i] for i in drawn]
      out += padding[len(drawn):]
    return out

  def count(self, name: str) -> np.ndarray:
    """(B,) of one of STATS."""
    return self.counts[:, _COLUMN[name]]

  def paint(self, out: np.ndarray, *, on_error: str) -> None:
    """Decodes, resizes and pads each image into `out`, (B, S, S, 3) uint8; grey where there is none.

    An example whose image turns out to be damaged is masked.

    Raises:
      transforms.ImageError: naming the record, if an image cannot be decoded and `on_error` is 'raise'.
    """
    for i, (image, canvas) in enumerate(zip(self.images, out)):
      if isinstance(image, transforms.Opened):
        try:
          image.on_canvas(self.geometries[i], pad_value=PAD_VALUE, out=canvas)
        except transforms.ImageError as error:
          canvas[...] = PAD_VALUE
          self._give_up(i, error, on_error=on_error)
      else:
        canvas[...] = PAD_VALUE if image is None else image

  def _give_up(self, i, error, *, on_error):
    if on_error == 'raise':
      raise error
    _log.warning('%s; the example is masked', error)
    self._mask(i, 'corrupt_images')

  def _mask(self, i, reason):
    """Takes everything from example i but its name, and counts why."""
    self.images[i] = self.geometries[i] = None
    self.captions[i] = ''
    self.boxes[i], self.region_mask[i] = _FULL_CANVAS, False
    self._regions[i], self._drawn[i] = _NO_REGIONS, ()
    self.counts[i] = 0
    self.counts[i, [_COLUMN['examples'], _COLUMN[reason]]] = 1


@dataclasses.dataclass(frozen=True)
class Damaged:
  """Stands for a record that could not be read; error: why, naming the record; regions: how many it is known to have."""
  error: str
  regions: int = 0


@dataclasses.dataclass(frozen=True)
class Prepare:
  """Some schema.Examples → PreparedBatch; see `train_dataset` for the fields.

  A batch at a time: what can be done for all regions of a batch in one go costs a tenth of the same image by image.
  """
  image_size: int
  regions_per_image: int
  flip: bool = False
  pad: str = 'center'
  on_error: str = 'mask'
  decode: str = 'exact'
  crop: transforms.Crop | None = None

  def __post_init__(self):
    transforms.check_decode_mode(self.decode)
    if self.on_error not in ('mask', 'raise'):
      raise ValueError(f"on_error: expected 'mask' or 'raise', got {self.on_error!r}")
    if self.regions_per_image < 0:
      raise ValueError(f'regions_per_image: expected 0 or more, got {self.regions_per_image}')
    # Fails on a bad size or padding mode here, not in a worker process.
    geometry_lib.resize_with_pad(height=1, width=1, canvas=self.image_size, pad=self.pad)

  def __call__(self, elements: Sequence[schema.Example | Damaged], *, rngs: Iterable[np.random.Generator],
               captions: Sequence[str | Sequence[float]]) -> PreparedBatch:
    """Draws a crop, a caption, regions and a flip for each.

    Args:
      elements: the records.
      rngs: one for each, of which every draw is made before the next is taken: it may be the same object, set anew.
      captions: one choice for each, see check_captions.
    """
    out = PreparedBatch(len(elements), self.regions_per_image)
    whole = [i for i, element in enumerate(elements) if not isinstance(element, Damaged)]
    usable = dict(zip(whole, usable_regions_of([elements[i] for i in whole])))
    rows, boxes, counts = [], [], []
    for i, (element, rng) in enumerate(zip(elements, rngs)):
      if i not in usable:
        _log.warning('%s; the example is masked', element.error)
        out._mask(i, 'corrupt_records')
        continue
      out.image_ids[i] = element.image_id
      try:
        image = open_example(element, mode=self.decode)
      except transforms.ImageError as error:
        out._give_up(i, error, on_error=self.on_error)
        continue
      own, found = self._draw(out, i, image, element, usable[i], rng, captions[i])
      rows.append(i)
      boxes.append(own)
      counts.append(found)
    if rows:
      out.counts[np.ix_(rows, _DRAWN)] += counts
      out.region_mask[rows] = np.arange(self.regions_per_image) < np.array([len(own) for own in boxes])[:, None]
      out.boxes[out.region_mask] = geometry_lib.normalized_boxes_to_canvases(
          out.geometries, np.concatenate(boxes), out.region_mask.nonzero()[0])
    return out

  def _draw(self, out, i, image, example, usable, rng, choice):
    """Fills the words, the image and its geometry of row i.

    Returns:
      The boxes drawn, in fractions of the original image, and the counts of _DRAWN.
    """
    boxes, seen = usable.boxes, len(usable.regions)
    window = None if self.crop is None else self.crop.draw(rng, height=image.height, width=image.width)
    geometry = geometry_lib.resize_with_pad(
        height=image.height, width=image.width, canvas=self.image_size, pad=self.pad, crop=window)
    visible = None
    if window is not None:
      boxes, visible = geometry.crop_boxes(boxes, min_visible=self.crop.min_visible)
    caption, other = _draw_caption(example.captions, choice, rng)
    left = seen if visible is None else len(visible)
    drawn = rng.permutation(left)[:self.regions_per_image]
    drawn = drawn if visible is None else visible[drawn]
    kept = drawn.tolist()
    flips = rng.random() < 0.5 and self.flip and not any(
        map(transforms.mentions_sides, (caption, *[usable.regions.captions[k] for k in kept])))
    if flips:
      geometry = geometry.flip()
    # What is decoded already goes to its canvas now: a batch of whole images might be gigabytes.
    out.images[i] = image.on_canvas(geometry, pad_value=PAD_VALUE) if image.decoded else image
    out.geometries[i], out.captions[i] = geometry, caption
    out._regions[i], out._drawn[i] = usable.regions, kept
    for name, number in usable.counts.items():
      out.counts[i, _COLUMN[name]] = number
    empty = sum(not c.strip() for c in example.captions) if example.captions else 1
    return boxes[drawn], (1, seen, len(kept), empty, other, flips, window is not None, seen - left)


@dataclasses.dataclass(frozen=True)
class UsableRegions:
  """boxes: (n, 4) float32 xyxy, fractions of the original image, clipped to it; regions: n; counts: of the others."""
  boxes: np.ndarray
  regions: schema.Regions
  counts: dict[str, int]


def usable_regions(example: schema.Example, *, or_category: bool = False) -> UsableRegions:
  """Leaves out regions without area or caption, and counts them.

  Args:
    example: the record.
    or_category: a region without a caption stays if it has a category.

  Raises:
    ValueError: naming the record, if its boxes are not normalised xyxy.
  """
  regions = schema.Regions.of(example.regions)
  if not len(regions) or _sound(regions.boxes, regions.captions):
    return UsableRegions(boxes=regions.boxes, regions=regions, counts={})
  box_lib.check_normalized(regions.boxes, where=f'record {example.image_id!r}')
  boxes, keep, found = box_lib.sanitize(regions.boxes)
  counts = {'boxes_dropped': found['inverted'] + found['empty'], 'boxes_clipped': found['clipped']}
  worded = np.array([bool(caption.strip() or (or_category and category.strip()))
                     for caption, category in zip(regions.captions, regions.categories)])
  counts['empty_region_captions'] = int((keep & ~worded).sum())
  kept = np.flatnonzero(keep & worded)
  return UsableRegions(boxes=boxes[kept], regions=regions.take(kept), counts=counts)


def usable_regions_of(examples: Sequence[schema.Example]) -> list[UsableRegions]:
  """`usable_regions` of each; of many at once, since as a rule there is nothing to leave out in any of them."""
  regions = [schema.Regions.of(example.regions) for example in examples]
  captions = [caption for each in regions for caption in each.captions]
  if not captions or _sound(np.concatenate([each.boxes for each in regions]), captions):
    return [UsableRegions(boxes=each.boxes, regions=each, counts={}) for each in regions]
  return [usable_regions(example) for example in examples]


def _sound(boxes, captions):
  """Whether every box lies inside, has an area, and has words."""
  return bool(boxes.min() >= 0 and boxes.max() <= 1 and (boxes[:, 2:] > boxes[:, :2]).all()
              and all(captions) and not any(map(str.isspace, captions)))


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
