"""Pictures as sprites: glyphs of a colour-emoji font, and a folder of RGBA pictures. See sprites.py for the interface.

A picture brings its own colours, so color and texture are '' and its name is its category. The unseen categories are
therefore names that training never mentions.
"""
import functools
import pathlib
import struct
import unicodedata
import zlib

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cloc_jax.data import sprites

_STRIKE = 109       # the one size of bitmap colour fonts (CBDT); scalable ones render at any
_MOST_SIDE = 256    # pictures are kept at this long side at most
_FAINT = 8          # alpha under this is not part of the picture


def held_out(names) -> frozenset[int]:
  """Indices of the unseen names: those of low hash, so that a new name moves no other; two of four at least."""
  order = sorted(range(len(names)), key=lambda i: (zlib.crc32(names[i].encode()), names[i]))
  low = sum(zlib.crc32(name.encode()) < sprites.UNSEEN_SHARE * 2**32 for name in names)
  return frozenset(order[:max(low, min(2, len(names) // 2))])


class PictureSprites(sprites.SpriteSource):
  """Named pictures. Subclasses say how to read one."""

  def __init__(self, names):
    super().__init__()
    self.concepts = tuple(sprites.Concept(name, '', name, i) for i, name in enumerate(names))
    self.unseen = held_out(names)

  def picture(self, concept):
    """uint8 RGBA (h, w, 4), cropped to what is visible."""
    raise NotImplementedError

  def palette(self, concept, jitter):
    """The identity, a little lighter or darker in each channel."""
    return np.diag(0.94 + 0.1 * np.float32(jitter))

  def render(self, concept, texture, pixels, variant):
    rgba = self.picture(concept).astype(np.float32)
    alpha = rgba[..., 3:] / 255
    planes = np.concatenate([rgba[..., :3] * alpha, alpha], -1)  # premultiplied, so that edges keep their colour
    units = sprites.hash_units('picture', concept.name, pixels, variant)
    planes = _turn(planes, degrees=20 * units[0] - 10, stretch=0.9 + 0.2 * units[1])
    frame = sprites.frame_of(planes.shape[:2], pixels, units)
    filtering = cv2.INTER_AREA if frame.height < planes.shape[0] else cv2.INTER_LINEAR
    planes = cv2.resize(planes, (frame.width, frame.height), interpolation=filtering)
    canvas = frame.place(planes)
    x, y, w, h = cv2.boundingRect((canvas[..., 3] > _FAINT / 255).astype(np.uint8))
    small = frame.shrink(canvas)
    return sprites.sprite_from_layers(small[..., :3], small[..., 3], frame.box(x, y, x + w, y + h))


def _turn(planes, *, degrees, stretch):
  """Turns and widens (h, w, 4), and crops to what is visible."""
  h, w = planes.shape[:2]
  side = int(1.2 * np.hypot(h, w)) + 2
  matrix = cv2.getRotationMatrix2D((w / 2, h / 2), degrees, 1)
  matrix[:, 2] += [side / 2 - w / 2, side / 2 - h / 2]
  matrix[0] = matrix[0] * stretch + [0, 0, side / 2 * (1 - stretch)]
  turned = cv2.warpAffine(planes, matrix, (side, side))
  return _crop(turned, turned[..., 3] * 255)


def _crop(picture, alpha):
  x, y, w, h = cv2.boundingRect((alpha > _FAINT).astype(np.uint8))
  return picture[y:y + h, x:x + w]


# --- A folder ---


@functools.lru_cache(maxsize=256)
def _read_picture(path: str):
  try:
    with Image.open(path) as image:
      image.thumbnail((_MOST_SIDE, _MOST_SIDE))
      rgba = np.asarray(image.convert('RGBA'))
  except OSError as e:
    raise ValueError(f'{path}: expected a PNG picture, but it does not decode: {e}') from e
  rgba = _crop(rgba, rgba[..., 3])
  if not rgba.size:
    raise ValueError(f'{path}: the picture is wholly transparent')
  return rgba


class FolderSprites(PictureSprites):
  """Every *.png of a folder; the stem is the name, with '_' and '-' as spaces, in lower case.

  Raises:
    FileNotFoundError: no such folder. ValueError: no pictures, two of the same name, or one that does not decode.
  """

  def __init__(self, folder: str):
    root = pathlib.Path(folder)
    if not root.is_dir():
      raise FileNotFoundError(f'{folder}: expected a folder of PNG pictures; there is no such folder')
    self._files = {}
    for path in sorted(p for p in root.iterdir() if p.suffix.lower() == '.png'):
      name = ' '.join(path.stem.replace('_', ' ').replace('-', ' ').lower().split())
      if name in self._files:
        raise ValueError(f'{path} and {self._files[name]}: both are named {name!r}')
      _read_picture(str(path))  # a picture that does not decode should fail now, not after an hour of drawing
      self._files[name] = str(path)
    if not self._files:
      raise ValueError(f'{folder}: expected *.png files, found none')
    super().__init__(sorted(self._files))

  def picture(self, concept):
    return _read_picture(self._files[concept.name])


# --- An emoji font ---


def _mapped_characters(path: str) -> list[int]:
  """The code points that a font maps to a glyph: its `cmap` table, format 12 (OpenType specification 1.9, 'cmap')."""
  data = pathlib.Path(path).read_bytes()
  try:
    tables = (struct.unpack('>4sLLL', data[12 + 16 * i:28 + 16 * i]) for i in range(struct.unpack('>H', data[4:6])[0]))
    start = next(offset for tag, _, offset, _ in tables if tag == b'cmap')
    for i in range(struct.unpack('>H', data[start + 2:start + 4])[0]):
      table = start + struct.unpack('>L', data[start + 8 + 8 * i:start + 12 + 8 * i])[0]
      if struct.unpack('>H', data[table:table + 2])[0] != 12:
        continue
      groups = struct.unpack('>L', data[table + 12:table + 16])[0]
      found = struct.unpack(f'>{3 * groups}L', data[table + 16:table + 16 + 12 * groups])
      return [c for first, last in zip(found[::3], found[1::3]) for c in range(first, min(last, 0x10FFFF) + 1)]
  except (struct.error, StopIteration) as e:
    raise ValueError(f'{path}: expected a TrueType or OpenType font, but its cmap table cannot be read') from e
  raise ValueError(f'{path}: the font maps no characters beyond the basic plane, so it holds no emoji')


@functools.lru_cache(maxsize=4)
def _font(path: str):
  try:
    return ImageFont.truetype(path, _STRIKE, layout_engine=ImageFont.Layout.BASIC)
  except OSError as e:
    raise ValueError(f'{path}: FreeType cannot open this font at size {_STRIKE}: {e}') from e


@functools.lru_cache(maxsize=2048)
def _read_glyph(path: str, character: str):
  """uint8 RGBA, cropped; None if the font draws nothing, or only black ink, for this character."""
  image = Image.new('RGBA', (2 * _STRIKE, 2 * _STRIKE))
  ImageDraw.Draw(image).text((_STRIKE // 4, _STRIKE // 4), character, font=_font(path), embedded_color=True)
  rgba = np.asarray(image)
  rgba = _crop(rgba, rgba[..., 3])
  return np.ascontiguousarray(rgba) if rgba.size and rgba[..., :3].any() else None


class EmojiSprites(PictureSprites):
  """Every single-code-point symbol of a colour-emoji font that draws something, by its Unicode name in lower case.

  Which names exist depends on the font and, a little, on the Unicode version of this Python.

  Raises:
    FileNotFoundError: no such file. ValueError: not a font, or one without colour pictures.
  """

  def __init__(self, path: str):
    if not pathlib.Path(path).is_file():
      raise FileNotFoundError(f'{path}: expected a colour-emoji font; there is no such file')
    self._path, self._characters = path, {}
    for code in _mapped_characters(path):
      character = chr(code)
      name = unicodedata.name(character, '').lower()
      # Letters, digits and invisible joiners are mapped too; regional indicators are halves of flags.
      if unicodedata.category(character) != 'So' or not name or name.startswith('regional indicator'):
        continue
      if _read_glyph(path, character) is not None:
        self._characters[name] = character
    if not self._characters:
      raise ValueError(f'{path}: no colour pictures found in this font')
    super().__init__(sorted(self._characters))

  def picture(self, concept):
    return _read_glyph(self._path, self._characters[concept.name])
