"""One pass over a data set: everything the evaluators need of a model, each image and each text encoded once."""
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from cloc_jax.evaluators import points as points_lib
from cloc_jax.geometry import Geometry

# Regions per image are padded up to one of these, so that a jitted function meets a handful of shapes and no more;
# images with more regions than the last take several calls.
REGION_BUCKETS = (4, 8, 16, 32, 64)
# bfloat16 embeddings are off unit length by up to about 0.4 %.
_UNIT_SLACK = 0.02


@dataclasses.dataclass(frozen=True)
class EncoderFns:
  """What an evaluator may ask of a model. Arrays may be NumPy or JAX, on any device; embeddings are L2-normalised.

  encode_image: (B, H, W, 3) uint8 → a handle, any pytree; the costly call, made once an image.
  image_embedding: handle → (B, E).
  embed_regions: handle, boxes (B, M, 4) float32 xyxy normalised to the canvas → (B, M, E); None without regions.
  encode_text: texts, `region` → (n, E); `region=True` tokenises at the short length of region captions. Called with
    any number of texts: batching and padding to a static size is its own business.
  ground: handle, z_text (B, M, E) → (boxes (B, M, 4) xyxy normalised to the canvas, scores (B, M)); None without a
    box head.
  embed_patches: handle → (B, h, w, E), the grid of patches over the canvas, projected to the joint space, and not
    normalised; None where the model has no such thing.
  """
  encode_image: Callable[[np.ndarray], Any]
  image_embedding: Callable[[Any], Any]
  embed_regions: Callable[[Any, np.ndarray], Any] | None
  encode_text: Callable[..., Any]
  ground: Callable[[Any, np.ndarray], tuple[Any, Any]] | None
  embed_patches: Callable[[Any], Any] | None = None


@dataclasses.dataclass(frozen=True)
class Predictions:
  """What a model said of n images with c captions and k regions, in the order of the data; host NumPy.

  image_ids: n names.
  z_image: (n, E) float32.
  geometry: n Geometry, original image ↔ canvas.
  captions: c whole-image captions.
  caption_image: (c,) int64, the image that each caption belongs to.
  z_caption: (c, E) float32.
  boxes: (k, 4) float32 xyxy, normalised to the canvas.
  region_image: (k,) int64, the image that each region belongs to.
  region_captions: k texts, '' where a region has none.
  categories: k class names, '' where unknown.
  z_region: (k, E) float32; None where the model does not embed regions.
  z_region_text: (k, E) float32, the embeddings of `region_captions`.
  pred_boxes: (k, 4) float32 xyxy normalised to the canvas, where the model grounds each region's caption; None
    without a box head.
  pred_scores: (k,) float32; None without a box head.
  points: (k, 2) float32 xy, normalised to the canvas: the centre of the patch on the image that is most like each
    region's caption; None without patch embeddings.
  chosen_proposals: (k, 4) float32 xyxy, pixels of the original images: of proposals from a file, the one that is most
    like each region's caption, NaN where there is none; None without such a file.
  masked_images: how many images of the batches were masked out (unreadable, or padding with a record of its own).
  image_position: (n,) int64, the place of each image among all images of the batches, masked ones included; None where
    nobody asks.
  """
  image_ids: tuple[str, ...]
  z_image: np.ndarray
  geometry: tuple[Geometry, ...]
  captions: tuple[str, ...]
  caption_image: np.ndarray
  z_caption: np.ndarray
  boxes: np.ndarray
  region_image: np.ndarray
  region_captions: tuple[str, ...]
  categories: tuple[str, ...]
  z_region: np.ndarray | None
  z_region_text: np.ndarray
  pred_boxes: np.ndarray | None = None
  pred_scores: np.ndarray | None = None
  points: np.ndarray | None = None
  chosen_proposals: np.ndarray | None = None
  masked_images: int = 0
  image_position: np.ndarray | None = None

  @property
  def first_region(self) -> np.ndarray:
    """(n,) int64, where each image's regions begin."""
    return np.searchsorted(self.region_image, np.arange(len(self.image_ids)))

  def __post_init__(self):
    """Raises ValueError, naming the field, if the lengths do not agree."""
    groups = (
        (len(self.image_ids), ('z_image', 'geometry', 'image_position')),
        (len(self.captions), ('caption_image', 'z_caption')),
        (len(self.boxes), ('region_image', 'region_captions', 'categories', 'z_region', 'z_region_text',
                           'pred_boxes', 'pred_scores', 'points')))
    for count, names in groups:
      for name in names:
        value = getattr(self, name)
        if value is not None and len(value) != count:
          raise ValueError(f'predictions.{name}: expected {count} entries, got {len(value)}')

  def in_pixels(self, boxes: np.ndarray, *, image: np.ndarray) -> np.ndarray:
    """Boxes (p, 4) normalised to the canvas → pixels of each one's own image, `image` (p,), cut at its edge."""
    out = np.empty_like(boxes)
    order = np.argsort(image, kind='stable')
    images, starts = np.unique(image[order], return_index=True)
    for number, rows in zip(images, np.split(order, starts[1:])):
      out[rows] = self.geometry[number].boxes_from_canvas(boxes[rows])
    return out


def collect(fns: EncoderFns, batches: Iterable, *, progress: Callable[[int], None] | None = None,
            allow_empty: bool = False) -> Predictions:
  """Encodes a data set: one pass over `batches`, each image encoded once, each distinct text encoded once.

  Texts are gathered and encoded together at the end; with `fns.ground` or `fns.embed_patches`, which are compared with
  them beside the image, each batch's region captions that were not met before are encoded with the batch.

  How often the functions are called depends on the regions and texts. So with several hosts, each with a share of the
  images, the functions must not wait for other hosts; `gather` then puts the shares together.

  Args:
    fns: the model.
    batches: as data.eval_pipeline.eval_batches yields: objects with `images` (B, H, W, 3) uint8, `image_mask` (B,)
      bool and `examples`, a list in the order of the images. It may be shorter than B, or hold None, where an image is
      padding. Masked images are left out, and counted if they have an example.
    progress: called after each batch with the number of images encoded so far.
    allow_empty: no image at all is no error, but gives empty predictions, with embeddings of width 0.

  Raises:
    ValueError: if there is no image; if an example contradicts itself; or if a function returns the wrong shape,
      NaN, or embeddings that are not of unit length. Names the images of the batch.
  """
  examples, z_image, z_region, pred_boxes, pred_scores, points, positions = [], [], [], [], [], [], []
  region_texts = _Texts(fns.encode_text, region=True)
  seen = 0
  for batch in batches:
    kept, rows = _valid_examples(batch)
    present = [e is not None for e in batch.examples]
    positions.append(seen + np.cumsum([0, *present], dtype=np.int64)[rows])
    seen += sum(present)
    if not kept:
      continue
    where = f'images {kept[0].image_id!r} to {kept[-1].image_id!r}'
    b = len(batch.images)
    handle = fns.encode_image(batch.images)
    z = _embeddings(fns.image_embedding(handle), lead=(b,), rows=rows, what='image_embedding', where=where)
    z_image.append(z)
    slots = _Slots(kept, rows=rows, batch_size=b)
    if fns.embed_regions is not None:
      z_region.append(_embed_regions(fns, handle, slots, width=z.shape[-1], where=where))
    if fns.ground is not None or fns.embed_patches is not None:
      z_text = region_texts.lookup(slots.captions, width=z.shape[-1])
    if fns.embed_patches is not None:
      points.append(_points(fns, handle, slots, z_text=z_text, geometry=[e.geometry for e in kept], rows=rows))
    if fns.ground is not None:
      found_boxes, found_scores = _ground(fns, handle, slots, z_text=z_text, where=where)
      pred_boxes.append(found_boxes)
      pred_scores.append(found_scores)
    examples += kept
    if progress is not None:
      progress(len(examples))
  if not examples and not allow_empty:
    raise ValueError(f'nothing to evaluate: the batches hold no valid image ({seen} masked)')
  width = z_image[0].shape[-1] if examples else 0
  captions = [c for e in examples for c in e.captions]
  region_captions = [c for e in examples for c in e.region_captions]
  numbers = np.arange(len(examples))
  return Predictions(
      image_ids=tuple(e.image_id for e in examples),
      z_image=_joined(z_image, width),
      geometry=tuple(e.geometry for e in examples),
      captions=tuple(captions),
      caption_image=np.repeat(numbers, [len(e.captions) for e in examples]),
      z_caption=_Texts(fns.encode_text, region=False).lookup(captions, width=width),
      boxes=_joined([_boxes(e) for e in examples], 4),
      region_image=np.repeat(numbers, [len(e.boxes) for e in examples]),
      region_captions=tuple(region_captions),
      categories=tuple(c for e in examples for c in e.categories),
      z_region=None if fns.embed_regions is None else _joined(z_region, width),
      z_region_text=region_texts.lookup(region_captions, width=width),
      pred_boxes=None if fns.ground is None else _joined(pred_boxes, 4),
      pred_scores=None if fns.ground is None else _joined(pred_scores),
      points=None if fns.embed_patches is None else _joined(points, 2),
      masked_images=seen - len(examples),
      image_position=np.concatenate([np.zeros(0, np.int64), *positions]))


def _joined(parts: list, *tail: int) -> np.ndarray:
  """One float32 array of many (n, *tail), which are let go: of a million regions they take gigabytes."""
  out = np.concatenate([np.zeros((0, *tail), np.float32), *parts])
  parts.clear()
  return out


class _Texts:
  """Embeddings by text; a text is encoded the first time it is asked for."""

  def __init__(self, encode_text, *, region: bool):
    self._encode_text = encode_text
    self._region = region
    self._z: dict[str, np.ndarray] = {}

  def lookup(self, texts: Sequence[str], *, width: int) -> np.ndarray:
    """(n, width) float32."""
    new = [t for t in dict.fromkeys(texts) if t not in self._z]
    if new:
      z = _embeddings(self._encode_text(new, region=self._region), lead=(len(new),), what='encode_text',
                      where=f'texts {new[0]!r} to {new[-1]!r}', width=width)
      self._z.update(zip(new, z))
    return np.stack([self._z[t] for t in texts]) if len(texts) else np.zeros((0, width), np.float32)


class _Slots:
  """Where each region of a batch goes in the padded (B, M, …) arrays that the functions take."""

  def __init__(self, examples, *, rows: np.ndarray, batch_size: int):
    counts = [len(e.boxes) for e in examples]
    self.captions = [c for e in examples for c in e.region_captions]
    self.boxes = np.concatenate([_boxes(e) for e in examples])
    self.row = np.repeat(rows, counts)
    self._column = np.concatenate([np.arange(c) for c in counts])
    self.batch_size = batch_size
    # Padding repeats a box of the same image: never degenerate, and free for a function that caches by box.
    self._fill = np.tile(np.float32([0, 0, 1, 1]), (batch_size, 1))
    for row, e in zip(rows, examples):
      if len(e.boxes):
        self._fill[row] = _boxes(e)[0]

  def __len__(self):
    return len(self.row)

  def calls(self):
    """Yields (regions, row, column, M): which regions take part in a call, their places, and its padded width."""
    most = int(self._column.max()) + 1 if len(self) else 0
    for start in range(0, most, REGION_BUCKETS[-1]):
      width = next(m for m in REGION_BUCKETS if m >= min(most - start, REGION_BUCKETS[-1]))
      regions = np.flatnonzero((self._column >= start) & (self._column < start + width))
      yield regions, self.row[regions], self._column[regions] - start, width

  def padded_boxes(self, regions, row, column, m) -> np.ndarray:
    """(B, m, 4) float32."""
    out = np.repeat(self._fill[:, None], m, 1)
    out[row, column] = self.boxes[regions]
    return out

  def padded_text(self, z_text, regions, row, column, m) -> np.ndarray:
    """(k, E) → (B, m, E) float32; padding is of unit length, as every text embedding is."""
    width = z_text.shape[-1]
    out = np.full((self.batch_size, m, width), width ** -0.5, np.float32)
    out[row, column] = z_text[regions]
    return out


def _embed_regions(fns, handle, slots: _Slots, *, width: int, where: str) -> np.ndarray:
  out = np.zeros((len(slots), width), np.float32)
  for regions, row, column, m in slots.calls():
    z = fns.embed_regions(handle, slots.padded_boxes(regions, row, column, m))
    out[regions] = _embeddings(z, lead=(slots.batch_size, m), rows=(row, column), what='embed_regions', where=where,
                               width=width)
  return out


def _ground(fns, handle, slots: _Slots, *, z_text, where: str) -> tuple[np.ndarray, np.ndarray]:
  boxes, scores = np.zeros((len(slots), 4), np.float32), np.zeros(len(slots), np.float32)
  for regions, row, column, m in slots.calls():
    found = fns.ground(handle, slots.padded_text(z_text, regions, row, column, m))
    for out, value, tail in zip((boxes, scores), found, ((4,), ())):
      value = np.asarray(value, np.float32)
      want = (slots.batch_size, m) + tail
      if value.shape != want:
        raise ValueError(f'ground, {where}: expected shape {want}, got {value.shape}')
      out[regions] = value[row, column]
    if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
      raise ValueError(f'ground, {where}: boxes or scores hold NaN or infinity')
  return boxes, scores


def _points(fns, handle, slots: _Slots, *, z_text, geometry, rows) -> np.ndarray:
  out = np.zeros((len(slots), 2), np.float32)
  if not len(slots):
    return out
  patches = fns.embed_patches(handle)
  on_image = np.ones(patches.shape[:3], bool)
  for row, g in zip(rows, geometry):
    on_image[row] = points_lib.on_image(g, grid=patches.shape[1:3])
  for regions, row, column, m in slots.calls():
    found = points_lib.most_similar(patches, slots.padded_text(z_text, regions, row, column, m), on_image)
    out[regions] = np.asarray(found)[row, column]
  return out


def _embeddings(value, *, lead, what: str, where: str, rows=..., width: int | None = None) -> np.ndarray:
  """Checks (*lead, E) embeddings and returns those at `rows`, float32."""
  z = np.asarray(value, np.float32)
  if z.shape[:-1] != tuple(lead) or (width is not None and z.shape[-1] != width):
    dims = ', '.join(map(str, lead))
    raise ValueError(f'{what}, {where}: expected shape ({dims}, {width or "E"}), got {z.shape}')
  # Only what is kept is checked: what a model makes of padding is nobody's concern.
  z = z[rows]
  length = np.linalg.norm(z, axis=-1)
  if not np.isfinite(length).all():
    raise ValueError(f'{what}, {where}: embeddings hold NaN or infinity')
  if (np.abs(length - 1) > _UNIT_SLACK).any():
    worst = float(length.flat[np.abs(length - 1).argmax()])
    raise ValueError(f'{what}, {where}: expected L2-normalised embeddings, got one of length {worst:.4g}')
  return z


def _valid_examples(batch) -> tuple[list, np.ndarray]:
  mask = np.asarray(batch.image_mask, bool)
  if mask.shape != (len(batch.images),) or len(batch.examples) > len(mask):
    raise ValueError(f'eval batch: expected one mask entry an image and at most as many examples, got '
                     f'{len(batch.images)} images, mask {mask.shape}, {len(batch.examples)} examples')
  have = np.array([e is not None for e in batch.examples] + [False] * (len(mask) - len(batch.examples)), bool)
  if (mask & ~have).any():
    raise ValueError(f'eval batch: image {int(np.argmax(mask & ~have))} is valid, but has no example')
  rows = np.flatnonzero(mask)
  kept = [batch.examples[i] for i in rows]
  for e in kept:
    if not len(e.boxes) == len(e.region_captions) == len(e.categories):
      raise ValueError(f'image {e.image_id!r}: expected as many boxes as region captions and categories, got '
                       f'{len(e.boxes)}, {len(e.region_captions)} and {len(e.categories)}')
  return kept, rows


def _boxes(example) -> np.ndarray:
  return np.asarray(example.boxes, np.float32).reshape(-1, 4)
