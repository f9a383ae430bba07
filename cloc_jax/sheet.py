"""A grid of pictures with labelled boxes, as one image for a README or a slide."""
from collections.abc import Sequence
import dataclasses

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from cloc_jax import page

_TILE = 320  # pixels that a small image is enlarged to, about
_SMALL = 160  # up to this side by a whole factor, so that what the model saw stays recognisable
_GAP = 12
_FONT_SIZE = 14
_PADDING = (5, 2)  # of a label, pixels across and down
_WIDEST = 0.62  # of the tile; longer labels are broken into lines
_LINE = 17  # pixels from one line of a label to the next


@dataclasses.dataclass(frozen=True)
class Tile:
  """image: (S, S, 3) uint8. boxes: (4,) each, xyxy as fractions of the image. labels: a text for each box."""
  image: np.ndarray
  boxes: Sequence[np.ndarray]
  labels: Sequence[str]


def draw(tiles: Sequence[Tile], *, columns: int = 4, background: str | None = None) -> Image.Image:
  """Draws tiles in rows; images are enlarged until labels have room on them.

  Args:
    tiles: all with images of one size.
    columns: tiles in a row.
    background: colour between them; None is transparent, for pages of any colour.

  Raises:
    ValueError: without tiles, or with images of several sizes, or labels that are not one a box.
  """
  sizes = {tile.image.shape for tile in tiles}
  if len(sizes) != 1:
    raise ValueError(f'tiles: expected at least one, all of one size, got {sorted(sizes)}')
  columns = min(columns, len(tiles))
  drawn = [_tile(tile) for tile in tiles]
  width, height = drawn[0].size
  rows = -(-len(drawn) // columns)
  # No margin around: the page that shows the picture has its own.
  size = (columns * (width + _GAP) - _GAP, rows * (height + _GAP) - _GAP)
  grid = Image.new('RGBA', size, (0, 0, 0, 0)) if background is None else Image.new('RGB', size, background)
  for i, one in enumerate(drawn):
    grid.paste(one, (i % columns * (width + _GAP), i // columns * (height + _GAP)))
  return grid


def _tile(tile: Tile) -> Image.Image:
  if len(tile.boxes) != len(tile.labels):
    raise ValueError(f'tile: expected one label a box, got {len(tile.labels)} for {len(tile.boxes)}')
  scale = _TILE / max(tile.image.shape[:2])
  scale = max(1, round(scale) if _SMALL * scale >= _TILE else scale)
  height, width = (round(n * scale) for n in tile.image.shape[:2])
  image = Image.fromarray(tile.image).resize((width, height), Image.Resampling.LANCZOS)
  pen = ImageDraw.Draw(image)
  extent = np.array([width, height, width, height], np.float64) - 1
  corners = [np.clip(np.asarray(box, np.float64), 0, 1) * extent for box in tile.boxes]
  # A box head may put right before left; such a box is a line, as for IoU it has no area.
  corners = [np.concatenate([c[:2], np.maximum(c[:2], c[2:])]) for c in corners]
  large_first = sorted(range(len(corners)), key=lambda i: -np.prod(corners[i][2:] - corners[i][:2]))
  for i in large_first:
    x0, y0, x1, y1 = (round(v) for v in corners[i])
    pen.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline='#202020', width=5)
    pen.rectangle((x0, y0, x1, y1), outline=page.color(i), width=3)
  placed: list[np.ndarray] = []
  for i in large_first[::-1]:  # a small box has the fewest places for its label
    text = _lines(pen, tile.labels[i], most=_WIDEST * width)
    size = _size(pen, text)
    place = _place(corners[i], size, extent, placed, [c for j, c in enumerate(corners) if j != i])
    placed.append(place)
    _label(pen, text, place, background=page.color(i))
  return image


def _font():
  return ImageFont.load_default(_FONT_SIZE)  # Pillow's own, so that a picture is the same on every machine


def _lines(pen, label: str, *, most: float) -> list[str]:
  """The label broken at spaces into lines of at most `most` pixels; a longer word keeps a line of its own."""
  lines = ['']
  for word in label.split():
    longer = f'{lines[-1]} {word}'.strip()
    if lines[-1] and pen.textlength(longer, font=_font()) > most:
      lines.append(word)
    else:
      lines[-1] = longer
  return lines


def _size(pen, lines) -> np.ndarray:
  width = max(pen.textlength(line, font=_font()) for line in lines)
  return np.array([width + 2 * _PADDING[0], len(lines) * _LINE + 2 * _PADDING[1]])


def _place(box, size, extent, placed, others) -> np.ndarray:
  """xyxy of a label: at an edge of its box, where it hides least of other labels, boxes and edges."""
  x0, y0, x1, y1 = box
  w, h = size
  room = np.maximum(extent[2:] - size, 0)
  # Where boxes lie on each other, the steps away from the edges find a free place.
  rows = [*(y0 - h * (1 + k) for k in (0, 1, 2)), *(y1 + h * k for k in (0, 1, 2)), *(y0 + h * k for k in (0, 1, 2)),
          *(y1 - h * (1 + k) for k in (0, 1, 2))]
  best, lowest = None, np.inf
  for y in rows:
    for x in (x0, x1 - w, (x0 + x1 - w) / 2):
      corner = np.clip([x, y], 0, room)
      label = np.concatenate([corner, corner + size])
      gap = max(y0 - label[3], label[1] - y1, 0)  # a label away from its box is hard to match with it
      cost = (20 * sum(_overlap(label, p) for p in placed) + sum(_overlap(label, o) for o in others)
              + 0.5 * _overlap(label, box) + 2 * np.abs(corner - [x, y]).sum() + 40 * gap)
      if cost < lowest:
        best, lowest = label, cost
  return best


def _overlap(a, b) -> float:
  return float(np.prod(np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None)))


def _label(pen, lines, place, *, background):
  pen.rounded_rectangle([round(float(v)) for v in place], radius=4, fill=background, outline='#202020')
  light = np.dot(ImageColor.getrgb(background), (0.299, 0.587, 0.114)) < 110
  for i, line in enumerate(lines):
    pen.text((place[0] + _PADDING[0], place[1] + _PADDING[1] + i * _LINE), line, font=_font(),
             fill='#ffffff' if light else '#000000')
