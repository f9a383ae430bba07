"""What happened to an image on its way to the model, as one object that carries boxes, points and masks along.

Convention: a pixel covers [i, i+1), so an image of width W spans [0, W] and its first pixel's centre is 0.5. All
resizing in this project follows it (OpenCV's INTER_LINEAR and INTER_AREA, Pillow, and jax.image.resize do too).
"""
from collections.abc import Sequence
import dataclasses
import functools

import numpy as np

from cloc_jax import boxes as box_lib

PAD_MODES = ('center', 'corner')


@dataclasses.dataclass(frozen=True)
class Geometry:
  """An axis-aligned map from original pixels to the square canvas: canvas = original · scale + offset, then a flip.

  Boxes and points are of the original image, also where only a crop of it is on the canvas.

  height, width: of the original image, pixels.
  canvas: side of the square canvas, pixels.
  resized_height, resized_width: the extent of the image, or of its crop, on the canvas, pixels.
  top, left: where it was put on the canvas, pixels, before a flip.
  flipped: whether the whole canvas was mirrored left-right afterwards.
  crop: xyxy in whole original pixels of what was cut out, None for the whole image.
  """
  height: int
  width: int
  canvas: int
  resized_height: int
  resized_width: int
  top: int
  left: int
  flipped: bool = False
  crop: tuple[int, int, int, int] | None = None

  @property
  def window(self) -> tuple[int, int, int, int]:
    """What is on the canvas: xyxy in original pixels."""
    return (0, 0, self.width, self.height) if self.crop is None else self.crop

  @property
  def scale_xy(self) -> np.ndarray:
    x0, y0, x1, y1 = self.window
    return np.array([self.resized_width / (x1 - x0), self.resized_height / (y1 - y0)])

  @property
  def offset_xy(self) -> np.ndarray:
    return np.array([self.left, self.top], np.float64) - self.window[:2] * self.scale_xy

  def points_to_canvas(self, points: np.ndarray) -> np.ndarray:
    """(..., 2) xy in original pixels → (..., 2) xy normalised to the canvas."""
    out = (np.asarray(points, np.float64) * self.scale_xy + self.offset_xy) / self.canvas
    if self.flipped:
      out = np.stack([1 - out[..., 0], out[..., 1]], -1)
    return out

  def points_from_canvas(self, points: np.ndarray) -> np.ndarray:
    """The inverse of `points_to_canvas`."""
    points = np.asarray(points, np.float64)
    if self.flipped:
      points = np.stack([1 - points[..., 0], points[..., 1]], -1)
    return (points * self.canvas - self.offset_xy) / self.scale_xy

  def boxes_to_canvas(self, boxes: np.ndarray) -> np.ndarray:
    """(..., 4) xyxy in original pixels → (..., 4) xyxy normalised to the canvas, float32."""
    out = self._map_boxes(boxes, self.points_to_canvas)
    return out.astype(np.float32)

  def boxes_from_canvas(self, boxes: np.ndarray, *, clip: bool = True) -> np.ndarray:
    """(..., 4) xyxy normalised to the canvas → xyxy in original pixels, float32; `clip` keeps them in the image."""
    out = self._map_boxes(boxes, self.points_from_canvas)
    if clip:
      limit = np.array([self.width, self.height, self.width, self.height])
      out = np.clip(out, 0, limit)
    return out.astype(np.float32)

  def mask_to_canvas(self, mask: np.ndarray) -> np.ndarray:
    """(height, width) bool in original pixels → (canvas, canvas) bool, nearest neighbour; padding is False."""
    if mask.shape != (self.height, self.width):
      raise ValueError(f'mask: expected {self.height}×{self.width}, got {"×".join(map(str, mask.shape))}')
    x0, y0, x1, y1 = self.window
    rows = y0 + ((np.arange(self.resized_height) + 0.5) * (y1 - y0) / self.resized_height).astype(int)
    cols = x0 + ((np.arange(self.resized_width) + 0.5) * (x1 - x0) / self.resized_width).astype(int)
    out = np.zeros((self.canvas, self.canvas), bool)
    out[self.top:self.top + self.resized_height, self.left:self.left + self.resized_width] = mask[rows][:, cols]
    return out[:, ::-1] if self.flipped else out

  def crop_boxes(self, boxes: np.ndarray, *, min_visible: float) -> tuple[np.ndarray, np.ndarray]:
    """Cuts boxes, (n, 4) xyxy normalised to the original image and with an area, to what is on the canvas.

    Returns:
      The cut boxes (n, 4) float64, in the same units, and the indices of those of which a share of at least
      `min_visible` of the area, and more than nothing, is left.
    """
    boxes = np.asarray(boxes, np.float64)
    limits = np.array(self.window) / np.array([self.width, self.height] * 2)
    cut = np.concatenate([np.maximum(boxes[:, :2], limits[:2]), np.minimum(boxes[:, 2:], limits[2:])], -1)
    left = box_lib.area(cut)
    # Boxes are stored as float32: one that ends at the crop's border must not lose a trace of its area by rounding.
    return cut, np.flatnonzero((left > 0) & (left >= (min_visible - 1e-6) * box_lib.area(boxes)))

  def flip(self) -> 'Geometry':
    """The same geometry with the canvas mirrored once more."""
    return dataclasses.replace(self, flipped=not self.flipped)

  def _map_boxes(self, boxes, map_points):
    boxes = np.asarray(boxes, np.float64)
    corners = map_points(boxes.reshape(*boxes.shape[:-1], 2, 2))
    out = corners.reshape(boxes.shape)
    # A flip swaps left and right: put them back in order.
    return out[..., [2, 1, 0, 3]] if self.flipped else out


@functools.lru_cache(maxsize=4096)  # sizes come again and again
def resize_with_pad(*, height: int, width: int, canvas: int, pad: str = 'center',
                    crop: tuple[int, int, int, int] | None = None) -> Geometry:
  """The recipe's "resize with pad": the long side becomes `canvas`, the short side is padded (SPEC §4).

  Args:
    height, width: of the original image, pixels.
    canvas: side of the square the model sees, pixels.
    pad: 'center' puts the image in the middle, 'corner' at the top left.
    crop: xyxy in whole original pixels: this part takes the place of the image.

  Raises:
    ValueError: on an empty image, an unknown `pad`, or a crop that is empty or not in the image.
  """
  if height < 1 or width < 1 or canvas < 1:
    raise ValueError(f'image and canvas must have at least one pixel, got {height}×{width} onto {canvas}')
  if pad not in PAD_MODES:
    raise ValueError(f'pad: expected one of {PAD_MODES}, got {pad!r}')
  x0, y0, x1, y1 = crop or (0, 0, width, height)
  if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
    raise ValueError(f'crop: expected whole pixels of a {height}×{width} image (height × width), got {crop}')
  scale = canvas / max(y1 - y0, x1 - x0)
  new_h, new_w = max(1, round((y1 - y0) * scale)), max(1, round((x1 - x0) * scale))
  top, left = ((canvas - new_h) // 2, (canvas - new_w) // 2) if pad == 'center' else (0, 0)
  return Geometry(height=height, width=width, canvas=canvas, resized_height=new_h, resized_width=new_w,
                  top=top, left=left, crop=crop)


def normalized_boxes_to_canvas(geometry: Geometry, boxes: np.ndarray) -> np.ndarray:
  """(n, 4) xyxy normalised to the original image, as records store them → xyxy normalised to the canvas, float32."""
  return normalized_boxes_to_canvases([geometry], boxes, [0] * len(boxes))


def normalized_boxes_to_canvases(geometries: Sequence[Geometry | None], boxes: np.ndarray,
                                 which: Sequence[int]) -> np.ndarray:
  """As normalized_boxes_to_canvas for boxes of several images: `which` is (n,), the place of each box's geometry."""
  # Fractions of the original image are fractions of its place on the canvas. Every training example comes through here.
  table = np.array([(0,) * 12 if g is None else (
      *g.window, g.resized_width, g.resized_height, g.width, g.height, g.left, g.top, g.canvas, g.flipped)
                    for g in geometries], np.float64)[which]
  start, end, resized, size, corner = (table[:, i:i + 2] for i in range(0, 10, 2))
  canvas, flipped = table[:, 10:11], table[:, 11] > 0
  scale = resized / (end - start)
  extent, offset = np.tile(size * scale, 2), np.tile(corner - start * scale, 2)
  out = (np.asarray(boxes, np.float64) * extent + offset) / canvas
  if flipped.any():
    out[flipped] = box_lib.flip_horizontal(out[flipped])
  return out.astype(np.float32)
