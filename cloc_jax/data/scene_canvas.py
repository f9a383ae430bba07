"""The canvas under scenes.py: backgrounds, strokes, pasting with counted visibility, noise. Used by scenes.py alone."""
import dataclasses
import functools

import cv2
import numpy as np

from cloc_jax.data import sprites


@functools.lru_cache(maxsize=4)
def _noise_bank(side):
  """Unit noise (side, side, 3) float32, mostly grey: crops of it are a hundred times cheaper than fresh numbers."""
  rng = np.random.default_rng(side)
  noise = rng.standard_normal((side, side, 1)) * 0.85 + rng.standard_normal((side, side, 3)) * 0.5
  return noise.clip(-2.5, 2.5).astype(np.float32)


def background(dice, rng, size, spec):
  """uint8 (size, size, 3): dull colours, so that the objects' own stand out, with faint strokes."""
  style = dice.pick(spec.backgrounds)
  grey = dice.between(70, 195)
  base = np.float32([grey + dice.between(-22, 22) for _ in range(3)])
  if style == 'flat':
    image = np.empty((size, size, 3), np.uint8)
    image[:] = base.clip(45, 215).round()
  else:
    cells = 2 if style == 'gradient' else 4 + dice.below(3)
    grid = base + (rng.random((cells, cells, 3), np.float32) - 0.5) * np.float32(dice.between(30, 85))
    grid = grid.clip(45, 215)
    image = cv2.convertScaleAbs(cv2.resize(grid, (size, size), interpolation=cv2.INTER_LINEAR))
  for _ in range(dice.below(spec.clutter + 1)):
    _stroke(dice, image, size, spec.clutter_contrast)
  return image


def _stroke(dice, image, size, contrast):
  """One faint line, scribble, arc or speck, a little lighter or darker than the place where it stands."""
  x, y = dice.below(size), dice.below(size)
  shift = dice.between(0.35, 1) * contrast * (1 if dice.unit() < 0.5 else -1)
  color = [min(230.0, max(25.0, float(c) + shift + dice.between(-10, 10))) for c in image[y, x]]
  form, reach = dice.below(4), 0.3 * size
  width = 1 if size < 96 else max(1, round(size / 80))
  if form == 0:
    end = (x + round(dice.between(-2, 2) * reach), y + round(dice.between(-2, 2) * reach))
    cv2.line(image, (x, y), end, color, width, cv2.LINE_AA)
  elif form == 1:
    points = [(x, y)]
    for _ in range(4):
      x, y = x + round(dice.between(-0.5, 0.5) * reach), y + round(dice.between(-0.5, 0.5) * reach)
      points.append((x, y))
    cv2.polylines(image, [np.array(points, np.int32)], False, color, width, cv2.LINE_AA)
  elif form == 2:
    radii = (1 + round(dice.unit() * reach), 1 + round(dice.unit() * reach))
    start = 360 * dice.unit()
    end = start + dice.between(60, 200)
    cv2.ellipse(image, (x, y), radii, 180 * dice.unit(), start, end, color, width, cv2.LINE_AA)
  else:
    cv2.circle(image, (x, y), max(1, round(dice.between(0.01, 0.03) * size)), color, -1, cv2.LINE_AA)


@dataclasses.dataclass
class Placed:
  """An object on the canvas, while the scene is being laid out. Pixels, and still the whole box."""
  concept: sprites.Concept
  texture: str
  size_word: str
  box: tuple[float, float, float, float]
  area: int
  visible: int


def _iou(a, b):
  w = min(a[2], b[2]) - max(a[0], b[0])
  h = min(a[3], b[3]) - max(a[1], b[1])
  if w <= 0 or h <= 0:
    return 0.0
  return w * h / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h)


class Canvas:
  """Float pixels, and which object owns each of them: so visibility is counted, not guessed from boxes."""

  def __init__(self, image):
    self.pixels = image.astype(np.float32)
    self.size = image.shape[0]
    self.owner = np.zeros(image.shape[:2], np.uint8)
    self.placed: list[Placed] = []

  def try_place(self, sprite, x, y, spec):
    """The crop (canvas slice, sprite slice) if the sprite may stand with its corner at (x, y), else None."""
    h, w = sprite.solid.shape
    box = (sprite.box[0] + x, sprite.box[1] + y, sprite.box[2] + x, sprite.box[3] + y)
    touching = False
    for other in self.placed:
      overlap = _iou(box, other.box)
      if overlap > spec.max_iou:
        return None
      touching = touching or overlap > 0
    top, left, bottom, right = max(y, 0), max(x, 0), min(y + h, self.size), min(x + w, self.size)
    there = (slice(top, bottom), slice(left, right))
    here = (slice(top - y, bottom - y), slice(left - x, right - x))
    solid = sprite.solid[here]
    inside = sprite.area if solid.size == sprite.solid.size else int(solid.sum())
    if inside < spec.min_visible * sprite.area:
      return None
    if touching:
      covered = np.bincount(self.owner[there][solid], minlength=len(self.placed) + 1).tolist()
      if any(o.visible - c < spec.min_visible * o.area for o, c in zip(self.placed, covered[1:])):
        return None
      for o, c in zip(self.placed, covered[1:]):
        o.visible -= c
    return there, here, box, inside

  def paste(self, sprite, found, palette, concept, texture, size_word):
    there, here, box, inside = found
    colored = cv2.transform(sprite.layers, palette.T)  # layers @ palette; NumPy would do it row by row
    tile = self.pixels[there]
    tile *= sprite.keep[here]
    tile += colored[here]
    self.placed.append(Placed(concept, texture, size_word, box, sprite.area, inside))
    self.owner[there][sprite.solid[here]] = len(self.placed)

  def finish(self, dice, spec):
    """Noise and brightness; uint8 (size, size, 3)."""
    deviation = dice.unit() * spec.noise
    if deviation:
      bank = _noise_bank(256 if self.size <= 128 else 2 * self.size)
      top, left = dice.below(len(bank) - self.size), dice.below(len(bank) - self.size)
      self.pixels += bank[top:top + self.size, left:left + self.size] * np.float32(deviation)
    gain = 1 + dice.between(-spec.brightness, spec.brightness)
    np.maximum(self.pixels, 0, out=self.pixels)
    return cv2.convertScaleAbs(self.pixels, alpha=gain)  # rounds and saturates
