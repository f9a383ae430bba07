"""Sprites: the things that can stand in a scene. Three sources behind one small interface.

  shapes          20 drawn kinds × 10 colours × 4 textures (the default). Categories are 'red circle', …
  shapes:10x8     the same of 10 kinds (the most distinct) and 8 colours.
  emoji:FONT.ttf  every single-code-point picture of a colour-emoji font, named by its Unicode name: over a thousand
                  concepts (Noto Color Emoji has about 1 350).
  folder:DIR      every RGBA PNG file of a folder, named by the file's stem ('fire_engine.png' → 'fire engine').

Each source holds some categories out of training ('unseen'), always the same ones whatever the seed. For shapes these
are kind–colour *pairs*: every kind and every colour is trained on, only the combination is new. Pictures have no colour
word (color is '', the category is the name), so there the unseen categories are names never trained on at all: a test
of open vocabulary, which a model trained on scenes alone cannot pass. The two figures must not be compared.

A sprite is three layers of weights and a palette: painted = layers (h, w, 3) @ palette (3, 3), so that one cached shape
serves every shade; a picture carries its own colours in `layers`, and its palette is close to the identity.
"""
import dataclasses
import difflib
import functools
import hashlib
import math
import re
import struct

import cv2
import numpy as np

COLORS = {
    'red': (214, 32, 38), 'orange': (245, 136, 22), 'yellow': (250, 222, 40), 'green': (44, 160, 52),
    'cyan': (40, 205, 215), 'blue': (36, 78, 214), 'purple': (130, 44, 180), 'pink': (250, 136, 190),
    'white': (246, 246, 246), 'black': (30, 30, 32),
}
TEXTURES = ('solid', 'striped', 'dotted', 'checkered')
UNSEEN_SHARE = 0.15
_BASE = 256       # side of the canvas on which a shape is drawn before it is scaled
_SUPER = 4        # supersampling: edges are smooth and boxes exact to 1/4 pixel
_VARIANTS = 4     # rotations, aspects, mirrorings and sub-pixel places per kind, size and texture
_CACHE_BYTES = 96 * 2**20


@dataclasses.dataclass(frozen=True)
class Concept:
  """One category: `name` is the kind ('circle'), `color` a word or '', `category` what evaluation calls it."""
  name: str
  color: str
  category: str
  index: int


@dataclasses.dataclass(frozen=True)
class Sprite:
  """A concept at one size, ready to paste: tile = tile · keep + layers @ palette.

  layers (h, w, 3) float32 weights; keep (h, w, 1) float32, 1 − coverage; solid (h, w) bool, coverage over a half;
  box, the exact extent (left, top, right, bottom) in pixels of the sprite; area, the number of solid pixels.
  """
  layers: np.ndarray
  keep: np.ndarray
  solid: np.ndarray
  box: tuple[float, float, float, float]
  area: int


def sprite_from_layers(layers, coverage, box):
  """`layers` and `coverage` (h, w[, 3]) float32 → Sprite."""
  coverage = np.minimum(coverage, 1)  # rounding may add up to a little more
  solid = coverage > 0.5
  return Sprite(np.ascontiguousarray(layers, np.float32), np.ascontiguousarray(1 - coverage, np.float32)[..., None],
                solid, box, int(solid.sum()))


@dataclasses.dataclass(frozen=True)
class Frame:
  """Where a sprite stands on its supersampled canvas. Sides and corners are in supersampled pixels."""
  height: int
  width: int
  top: int
  left: int

  def place(self, planes):
    """Puts (height, width[, c]) on the canvas, whose sides are whole pixels."""
    rows, columns = -(-(self.top + self.height) // _SUPER), -(-(self.left + self.width) // _SUPER)
    canvas = np.zeros((rows * _SUPER, columns * _SUPER, *planes.shape[2:]), planes.dtype)
    canvas[self.top:self.top + self.height, self.left:self.left + self.width] = planes
    return canvas

  def shrink(self, canvas):
    """Averages the canvas down to pixels."""
    return cv2.resize(canvas, (canvas.shape[1] // _SUPER, canvas.shape[0] // _SUPER), interpolation=cv2.INTER_AREA)

  def box(self, *corners):
    return tuple(n / _SUPER for n in corners)


def frame_of(shape, pixels: int, units) -> Frame:
  """The frame of a sprite of proportions `shape` (h, w) whose long side is about `pixels`; `units` as of hash_units."""
  scale = (pixels - 0.5 * units[6]) * _SUPER / max(shape)
  height, width = (max(_SUPER, round(n * scale)) for n in shape)
  return Frame(height, width, top=int(units[4] * _SUPER), left=int(units[5] * _SUPER))


class SpriteSource:
  """What a source offers. Subclasses fill `concepts`, `unseen` (indices), `textures`, and draw.

  `render` must be a pure function of its arguments: scenes are reproducible only then.
  """
  concepts: tuple[Concept, ...]
  unseen: frozenset[int]
  textures: tuple[str, ...] = ('',)

  def __init__(self):
    self._cache, self._cached_bytes = {}, 0

  def __getstate__(self):
    return self.__dict__ | {'_cache': {}, '_cached_bytes': 0}

  def render(self, concept: Concept, texture: str, pixels: int, variant: int) -> Sprite:
    """Draws a sprite whose box's long side is about `pixels`; `variant` is in [0, num_variants)."""
    raise NotImplementedError

  def palette(self, concept: Concept, jitter: tuple[float, float, float]) -> np.ndarray:
    """(3, 3) float32, row i is the RGB (0–255) of layer i; `jitter` are three numbers in [0, 1)."""
    raise NotImplementedError

  num_variants = _VARIANTS

  @functools.cached_property
  def categories(self) -> tuple[str, ...]:
    return tuple(c.category for c in self.concepts)

  @functools.cached_property
  def unseen_categories(self) -> tuple[str, ...]:
    return tuple(c.category for c in self.concepts if c.index in self.unseen)

  def select(self, split: str) -> tuple[Concept, ...]:
    """The concepts of 'seen', 'unseen' or 'all'."""
    if split == 'all':
      return self.concepts
    if split not in ('seen', 'unseen'):
      raise ValueError(f"split: expected 'seen', 'unseen' or 'all', got {split!r}")
    return tuple(c for c in self.concepts if (c.index in self.unseen) == (split == 'unseen'))

  def sprite(self, concept: Concept, texture: str, pixels: int, variant: int) -> Sprite:
    """`render`, remembered."""
    key = (concept.name, texture, pixels, variant)
    found = self._cache.get(key)
    if found is None:
      found = self.render(concept, texture, pixels, variant)
      if self._cached_bytes > _CACHE_BYTES:  # starting over is simpler than eviction, and rare
        self._cache, self._cached_bytes = {}, 0
      self._cache[key] = found
      self._cached_bytes += found.layers.nbytes + found.keep.nbytes + found.solid.nbytes
    return found


# --- Drawn shapes. Coordinates in [-1, 1], y downwards; later strokes draw over (1) or cut out (0) earlier ones. ---


def _regular(n, radius=1.0, inner=None, turn=-90.0):
  """Vertices of a regular polygon, or of a star if `inner` is a radius."""
  count = n if inner is None else 2 * n
  angles = np.deg2rad(turn + 360 * np.arange(count) / count)
  radii = np.where(np.arange(count) % 2, radius if inner is None else inner, radius)
  return np.stack([radii * np.cos(angles), radii * np.sin(angles)], -1)


def _heart():
  t = np.linspace(0, 2 * np.pi, 80)
  x, y = 16 * np.sin(t)**3, 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
  return np.stack([x / 16, -(y + 2.5) / 15], -1)


def _turned(points, degrees):
  c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
  return np.asarray(points) @ np.array([[c, s], [-s, c]])


_BAR = [(-1, -.3), (1, -.3), (1, .3), (-1, .3)]
_STROKES = {
    'circle': [(1, 'disc', (0, 0, 1))],
    'square': [(1, 'poly', [(-.9, -.9), (.9, -.9), (.9, .9), (-.9, .9)])],
    'triangle': [(1, 'poly', [(0, -.95), (1, .85), (-1, .85)])],
    'star': [(1, 'poly', _regular(5, 1.05, .44))],
    'heart': [(1, 'poly', _heart())],
    'cross': [(1, 'poly', _turned(_BAR, 45)), (1, 'poly', _turned(_BAR, -45))],
    'plus': [(1, 'poly', _BAR), (1, 'poly', _turned(_BAR, 90))],
    'ring': [(1, 'disc', (0, 0, 1)), (0, 'disc', (0, 0, .5))],
    'moon': [(1, 'disc', (0, 0, 1)), (0, 'disc', (.52, -.12, .82))],
    'arrow': [(1, 'poly', [(-1, -.3), (.05, -.3), (.05, -.82), (1, 0), (.05, .82), (.05, .3), (-1, .3)])],
    'diamond': [(1, 'poly', [(0, -1.05), (.72, 0), (0, 1.05), (-.72, 0)])],
    'house': [(1, 'poly', [(0, -1), (1, -.1), (.72, -.1), (.72, .95), (-.72, .95), (-.72, -.1), (-1, -.1)]),
              (0, 'poly', [(-.22, .95), (-.22, .3), (.22, .3), (.22, .95)])],
    'tree': [(1, 'poly', [(0, -1.05), (.62, -.3), (.34, -.3), (.86, .5), (-.86, .5), (-.34, -.3), (-.62, -.3)]),
             (1, 'poly', [(-.2, .5), (.2, .5), (.2, 1), (-.2, 1)])],
    'drop': [(1, 'disc', (0, .35, .65)), (1, 'poly', [(0, -1.05), (.59, .08), (-.59, .08)])],
    'bolt': [(1, 'poly', [(.1, -1.05), (-.7, .2), (-.1, .2), (-.3, 1.05), (.7, -.3), (.1, -.3), (.55, -1.05)])],
    'flower': [(1, 'disc', (.62 * math.sin(a), -.62 * math.cos(a), .4)) for a in np.arange(5) * 2 * math.pi / 5]
              + [(1, 'disc', (0, 0, .5)), (0, 'disc', (0, 0, .2))],
    'key': [(1, 'disc', (-.5, 0, .55)), (0, 'disc', (-.5, 0, .22)),
            (1, 'poly', [(0, -.2), (1, -.2), (1, .2), (0, .2)]),
            (1, 'poly', [(.68, 0), (1, 0), (1, .62), (.68, .62)]),
            (1, 'poly', [(.18, 0), (.46, 0), (.46, .5), (.18, .5)])],
    'mug': [(1, 'disc', (.5, 0, .5)), (0, 'disc', (.5, 0, .24)),
            (1, 'poly', [(-.85, -.85), (.5, -.85), (.5, .85), (-.85, .85)])],
    'fish': [(1, 'ellipse', (-.22, 0, .78, .52)), (1, 'poly', [(.3, 0), (1, -.6), (1, .6)]),
             (0, 'disc', (-.62, -.1, .11))],
    'hourglass': [(1, 'poly', [(-.78, -1), (.78, -1), (.12, 0), (.78, 1), (-.78, 1), (-.12, 0)])],
}
KINDS = tuple(_STROKES)
_ANY_DIRECTION = ('arrow', 'key')


def hash_units(*key):
  """Eight numbers in [0, 1) that depend on the key alone: stable across runs, machines and Python versions."""
  digest = hashlib.blake2b(repr(key).encode(), digest_size=32).digest()
  return [n / 2**32 for n in struct.unpack('<8I', digest)]


@functools.lru_cache(maxsize=256)
def _shape_mask(kind, variant):
  """The shape at full resolution, turned, squeezed and perhaps mirrored: uint8 0/255, cropped to its extent."""
  scale, middle = 0.36 * _BASE, _BASE // 2
  mask = np.zeros((_BASE, _BASE), np.uint8)
  to_pixels = lambda points: np.round(np.asarray(points) * scale + middle).astype(np.int32)
  for ink, form, numbers in _STROKES[kind]:
    if form == 'poly':
      cv2.fillPoly(mask, [to_pixels(numbers)], 255 * ink)
    else:
      x, y, rx, ry = (*numbers, numbers[-1])[:4]
      axes = (round(rx * scale), round(ry * scale))
      cv2.ellipse(mask, tuple(to_pixels((x, y)).tolist()), axes, 0, 0, 360, 255 * ink, -1)
  turn, squeeze, mirror, quarter, *_ = hash_units('shape', kind, variant)
  degrees = 24 * turn - 12 + (90 * int(4 * quarter) if kind in _ANY_DIRECTION else 0)
  matrix = cv2.getRotationMatrix2D((middle, middle), degrees, 1)
  stretch = 1 + 0.2 * (squeeze - 0.5)  # width over height, 0.9 … 1.1: a circle stays a circle to the eye
  matrix[0] = matrix[0] * stretch + [0, 0, middle * (1 - stretch)]
  mask = cv2.threshold(cv2.warpAffine(mask, matrix, (_BASE, _BASE)), 127, 255, cv2.THRESH_BINARY)[1]
  if mirror < 0.5:
    mask = mask[:, ::-1]
  x, y, w, h = cv2.boundingRect(np.ascontiguousarray(mask))
  return np.ascontiguousarray(mask[y:y + h, x:x + w])


def _texture_mask(texture, height, width, pixels, units):
  """Where the second colour goes, bool (height, width) on the supersampled grid of an object of `pixels` pixels."""
  if texture == 'solid':
    return np.zeros((height, width), bool)
  angle = math.radians(60 * units[0] - 30) + (math.pi / 2 if units[1] < 0.5 else 0)
  xs = np.arange(width, dtype=np.float32)[None] / _SUPER
  ys = np.arange(height, dtype=np.float32)[:, None] / _SUPER
  u = xs * math.cos(angle) + ys * math.sin(angle) + 10 * units[2] + 1000  # positive, so that truncation is floor
  if texture == 'striped':
    return _fraction(u, max(4.0, 0.25 * pixels)) < 0.45
  v = ys * math.cos(angle) - xs * math.sin(angle) + 10 * units[3] + 1000
  if texture == 'dotted':
    period = max(3.8, 0.25 * pixels)
    return (_fraction(u, period) - 0.5)**2 + (_fraction(v, period) - 0.5)**2 < 0.3**2
  if texture == 'checkered':
    period = 2 * max(2.4, 0.17 * pixels)
    return (_fraction(u, period) < 0.5) ^ (_fraction(v, period) < 0.5)
  raise ValueError(f'texture: expected one of {list(TEXTURES)}, got {texture!r}')


def _fraction(values, period):
  """How far into its period each value is, in [0, 1)."""
  turns = values / np.float32(period)
  return turns - turns.astype(np.int32)


def _palette_of(color):
  """Body, texture and outline colours: the outline darker than the body, lighter only around black."""
  body = np.asarray(COLORS[color], np.float32)
  if color == 'black':
    return np.stack([body, body + 125, body + 165])
  return np.stack([body, 0.4 * body, 0.3 * body]).clip(20, 245)


_PALETTES = {color: _palette_of(color) for color in COLORS}


# The kinds that are hardest to confuse at a dozen pixels, for data sets of fewer kinds.
_DISTINCT = ('circle', 'square', 'triangle', 'star', 'ring', 'heart', 'cross', 'moon', 'arrow', 'tree')


class ShapeSprites(SpriteSource):
  """Drawn shapes: layer 0 is the body, layer 1 the texture, layer 2 the outline.

  kinds, colors: how many of each; fewer kinds take the most distinct ones.
  """
  textures = TEXTURES

  def __init__(self, *, kinds: int = len(KINDS), colors: int = len(COLORS)):
    super().__init__()
    if not (2 <= kinds <= len(KINDS) and 2 <= colors <= len(COLORS)):
      raise ValueError(f'sprites: expected 2 to {len(KINDS)} kinds and 2 to {len(COLORS)} colors, '
                       f'got {kinds} and {colors}')
    ordered = KINDS if kinds == len(KINDS) else (*_DISTINCT, *(k for k in KINDS if k not in _DISTINCT))[:kinds]
    names = tuple(COLORS)[:colors]
    self.concepts = tuple(Concept(kind, color, f'{color} {kind}', i * colors + j)
                          for i, kind in enumerate(ordered) for j, color in enumerate(names))
    # One pair of every kind and two of every colour on a diagonal, then a second diagonal for half of the kinds:
    # 15 % in all, 3 per colour, 1 or 2 per kind, so that no kind and no colour is missing from training.
    held_out = lambda i, j: (j - i) % colors == 0 or (2 * i < kinds and (j - i) % colors == 3)
    self.unseen = frozenset(c.index for c in self.concepts if held_out(*divmod(c.index, colors)))

  def palette(self, concept, jitter):
    shift = np.asarray(jitter, np.float32)
    shift -= 0.5
    shift *= 22
    return _PALETTES[concept.color] + shift

  def render(self, concept, texture, pixels, variant):
    base = _shape_mask(concept.name, variant)
    units = hash_units('place', concept.name, texture, pixels, variant)
    frame = frame_of(base.shape, pixels, units)
    small = cv2.resize(base, (frame.width, frame.height), interpolation=cv2.INTER_NEAREST_EXACT)
    mask = frame.place(small)
    edge = 2 * round(max(0.55, 0.035 * pixels) * _SUPER) + 1
    inside = cv2.erode(mask, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (edge, edge)), borderValue=0,
                       borderType=cv2.BORDER_CONSTANT) > 0
    second = inside & _texture_mask(texture, *mask.shape, pixels, units)
    planes = cv2.merge([np.uint8(255) * p for p in (inside & ~second, second, (mask > 0) & ~inside)])
    layers = frame.shrink(planes).astype(np.float32) / 255
    x, y, w, h = cv2.boundingRect(mask)
    return sprite_from_layers(layers, layers.sum(-1), frame.box(x, y, x + w, y + h))


@functools.lru_cache(maxsize=8)
def load_sprites(spec: str) -> SpriteSource:
  """'shapes', 'shapes:KINDSxCOLORS', 'emoji:FONT.ttf' or 'folder:DIR' → the source.

  Raises:
    ValueError: an unknown kind of source, or a file that is not what it should be.
    FileNotFoundError: the font or folder is not there.
  """
  if spec == 'shapes':
    return ShapeSprites()
  kind, colon, path = spec.partition(':')
  counts = re.fullmatch(r'shapes:(\d+)x(\d+)', spec)
  if counts:
    return ShapeSprites(kinds=int(counts[1]), colors=int(counts[2]))
  if kind not in ('emoji', 'folder') or not colon or not path:
    near = difflib.get_close_matches(kind, ('shapes', 'emoji', 'folder'), n=1, cutoff=0.4)
    hint = f'; did you mean {near[0]!r}?' if near else ''
    raise ValueError(f"sprites: expected 'shapes', 'emoji:FONT.ttf' or 'folder:DIR', got {spec!r}{hint}")
  from cloc_jax.data import sprite_pictures  # Pillow's font machinery is not needed for shapes
  return sprite_pictures.EmojiSprites(path) if kind == 'emoji' else sprite_pictures.FolderSprites(path)
