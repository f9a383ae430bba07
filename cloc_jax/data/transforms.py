"""From encoded bytes to the square canvas; the boxes go through the same geometry as the pixels."""
import dataclasses
import io
import os
import re

import cv2
import numpy as np
import PIL.Image
import PIL.ImageOps

from cloc_jax import geometry as geometry_lib
from cloc_jax.data import jpeg

# Worker processes are the unit of parallelism here: OpenCV's own threads would fight with them, and with the trainer.
cv2.setNumThreads(0)
# What OpenCV cannot read goes to Pillow, and then becomes an error that names the record; OpenCV's own lines name nothing.
if 'OPENCV_LOG_LEVEL' not in os.environ:
  (cv2.setLogLevel if hasattr(cv2, 'setLogLevel') else cv2.utils.logging.setLogLevel)(0)  # OpenCV 4, and 5

_JPEG_START, _JPEG_END = b'\xff\xd8', b'\xff\xd9'
_PNG_START, _PNG_END = b'\x89PNG', b'IEND\xaeB`\x82'
_GIF_START = b'GIF8'
DECODE_MODES = ('exact', 'fast')
_SIDES = re.compile(r'\b(left|right)(s|most|ward|wards|hand|handed)?\b', re.IGNORECASE)


class ImageError(ValueError):
  """An image that cannot be decoded in full; the message names the record."""


def decode(data: bytes, *, where: str) -> np.ndarray:
  """Decodes an image file to upright RGB.

  The EXIF orientation is applied; grey, palette and CMYK images become RGB; an alpha channel is dropped; of an
  animation the first frame is taken; 16-bit channels are scaled to 8.

  Args:
    data: the file's bytes.
    where: names the image in errors.

  Returns:
    (H, W, 3) uint8.

  Raises:
    ImageError: if the bytes are no image, or end before the image does.
  """
  if _is_whole(data):
    image = _decode_opencv(data)
    if image is not None:
      return image
  return _decode_pillow(data, where=where)


class Opened:
  """An image file whose upright size is known, and whose pixels come when they are asked for; made by `open_image`.

  height, width: upright, pixels.
  decoded: whether the pixels are in memory already: only a JPEG's size is known without them.
  """

  def __init__(self, data: bytes, *, where: str, mode: str):
    self._data, self._where, self._mode = data, where, mode
    self._pixels = None
    self._header = jpeg.read_header(data) if data.startswith(_JPEG_START) and data.endswith(_JPEG_END) else None
    if self._header is not None and self._header.common:
      self.height, self.width = self._header.upright
    else:
      self._pixels = decode(data, where=where)
      self.height, self.width = self._pixels.shape[:2]

  @property
  def decoded(self) -> bool:
    return self._pixels is not None

  def on_canvas(self, geometry: geometry_lib.Geometry, *, pad_value: int = 127,
                out: np.ndarray | None = None) -> np.ndarray:
    """(S, S, 3) uint8, written to `out` where that is given: see `resize_with_pad`.

    Raises:
      ImageError: if the image turns out to be damaged; `out` is as it was then.
    """
    _check_size((self.height, self.width), geometry)
    if not self.decoded:
      if self._mode == 'fast':
        out = _canvas(geometry) if out is None else out
        image = jpeg.decode_reduced(
            self._data, self._header, height=geometry.resized_height, width=geometry.resized_width, crop=geometry.crop,
            out=None if geometry.flipped else _place(out, geometry))
        if image is not None:
          return _pad(image, geometry, pad_value, out)
        # OpenCV does not take it. Perhaps Pillow does, or knows what is wrong.
      pixels = decode(self._data, where=self._where)
      if pixels.shape[:2] != (self.height, self.width):
        raise ImageError(f'{self._where}: the header says {self.height}×{self.width} (height × width), the image has '
                         f'{pixels.shape[0]}×{pixels.shape[1]}')
      return resize_with_pad(pixels, geometry, pad_value=pad_value, out=out)
    return resize_with_pad(self._pixels, geometry, pad_value=pad_value, out=out)


@dataclasses.dataclass(frozen=True)
class Crop:
  """Random crops for training.

  scale: range of the crop's area, as a share of the image's.
  aspect: range of its width over its height, log-uniform; where an image is too long or too flat for a crop of the
    drawn area, the nearest that fits. None keeps the image's own.
  min_visible: regions of which a smaller share of the area is left are not drawn from.
  """
  scale: tuple[float, float]
  aspect: tuple[float, float] | None = (3 / 4, 4 / 3)
  min_visible: float = 0.5

  def __post_init__(self):
    for name, limits, most in (('scale', self.scale, 1), ('aspect', self.aspect, float('inf'))):
      if limits is None and name == 'aspect':
        continue
      if not isinstance(limits, (tuple, list)) or len(limits) != 2 or not 0 < limits[0] <= limits[1] <= most:
        raise ValueError(f'crop: {name}: expected (least, most) above 0' + (' and at most 1' if most == 1 else '')
                         + f', got {limits!r}')
    if not 0 <= self.min_visible <= 1:
      raise ValueError(f'crop: min_visible: expected a share in [0, 1], got {self.min_visible!r}')

  def draw(self, rng: np.random.Generator, *, height: int, width: int) -> tuple[int, int, int, int]:
    """xyxy in whole pixels of an image of `height` × `width`."""
    share = rng.uniform(*self.scale)
    own = width / height
    least, most = own * share, own / share  # beyond, a side would be longer than the image's
    wanted = (own, own) if self.aspect is None else self.aspect
    aspect = np.exp(rng.uniform(*np.log(np.clip(wanted, least, most))))
    w = min(width, max(1, round((share * width * height * aspect) ** 0.5)))
    h = min(height, max(1, round((share * width * height / aspect) ** 0.5)))
    x0, y0 = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    return x0, y0, x0 + w, y0 + h


def open_image(data: bytes, *, where: str, mode: str = 'exact') -> Opened:
  """Opens an image file for a canvas that is chosen once its size is known.

  Args:
    data: the file's bytes.
    where: names the image in errors.
    mode: 'exact' decodes every pixel and shrinks by averaging. 'fast' decodes a JPEG at a reduced size close to the
      canvas and goes on linearly: about twice as fast, and 37 dB (PSNR) from exact on photos (docs/results). Other
      formats are decoded exactly in both.

  Raises:
    ImageError: as `decode`; damage behind a JPEG's header shows later, in `Opened.on_canvas`.
    ValueError: on an unknown mode.
  """
  check_decode_mode(mode)
  return Opened(data, where=where, mode=mode)


def check_decode_mode(mode: str) -> None:
  """Raises ValueError unless `mode` is one of DECODE_MODES."""
  if mode not in DECODE_MODES:
    raise ValueError(f'decode: expected one of {DECODE_MODES}, got {mode!r}')


def resize_with_pad(image: np.ndarray, geometry: geometry_lib.Geometry, *, pad_value: int = 127,
                    out: np.ndarray | None = None) -> np.ndarray:
  """Puts an image on its canvas: crop, resize, pad and flip, as `geometry` says.

  Args:
    image: (H, W, 3) uint8, of the size that the geometry was made for.
    geometry: from geometry.resize_with_pad, flipped or not.
    pad_value: grey level of the padding.
    out: where to put it; None for a new array.

  Returns:
    (S, S, 3) uint8, S = geometry.canvas; `out`, or C-contiguous.

  Raises:
    ValueError: if the image is not of the geometry's size.
  """
  _check_size(image.shape[:2], geometry)
  height, width = geometry.resized_height, geometry.resized_width
  if geometry.crop is not None:
    x0, y0, x1, y1 = geometry.crop
    image = image[y0:y1, x0:x1]
  out = _canvas(geometry) if out is None else out
  if (height, width) != image.shape[:2]:
    # Averaging over the covered area is the only filter of OpenCV's that does not alias when it shrinks.
    shrinks = height <= image.shape[0] and width <= image.shape[1]
    image = cv2.resize(image, (width, height), dst=None if geometry.flipped else _place(out, geometry),
                       interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
  return _pad(image, geometry, pad_value, out)


def _check_size(size, geometry):
  if size != (geometry.height, geometry.width):
    raise ValueError(f'the geometry is of a {geometry.height}×{geometry.width} image, got {size[0]}×{size[1]}')


def _pad(image, geometry, pad_value, out):
  """A resized image on its canvas `out`, mirrored where the geometry says so; it may be in its place already."""
  place = _place(out, geometry)
  if not np.may_share_memory(image, place):
    # Several times as quick as a copy of a view with a negative stride.
    place[...] = cv2.flip(image, 1) if geometry.flipped else image
  top, left, height, width = geometry.top, _left(geometry), geometry.resized_height, geometry.resized_width
  for border in (out[:top], out[top + height:], out[top:top + height, :left], out[top:top + height, left + width:]):
    if border.size:
      border[...] = pad_value
  return out


def _canvas(geometry):
  return np.empty((geometry.canvas, geometry.canvas, 3), np.uint8)


def _place(canvas, geometry):
  """Where on its canvas the image is, a view."""
  top, left = geometry.top, _left(geometry)
  return canvas[top:top + geometry.resized_height, left:left + geometry.resized_width]


def _left(geometry):
  return geometry.canvas - geometry.left - geometry.resized_width if geometry.flipped else geometry.left


def prepare_image(image, *, image_size: int, pad: str = 'center') -> tuple[np.ndarray, geometry_lib.Geometry]:
  """An image as users have it → the canvas that the model sees; training and inference both go through here.

  Args:
    image: a PIL image, or an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of uint8.
    image_size: side of the canvas, pixels.
    pad: see geometry.resize_with_pad.

  Returns:
    The canvas, (image_size, image_size, 3) uint8, and the geometry that maps boxes onto it and back.

  Raises:
    TypeError, ValueError: if the image is neither of these.
  """
  image = as_rgb(image)
  geometry = geometry_lib.resize_with_pad(height=image.shape[0], width=image.shape[1], canvas=image_size, pad=pad)
  return resize_with_pad(image, geometry), geometry


def as_rgb(image) -> np.ndarray:
  """A PIL image or a uint8 array, grey or with alpha → (H, W, 3) uint8, upright."""
  if isinstance(image, PIL.Image.Image):
    return _pillow_to_rgb(image)
  image = np.asarray(image)
  if image.dtype != np.uint8:
    hint = '; scale [0, 1] floats by 255 first' if np.issubdtype(image.dtype, np.floating) else ''
    raise TypeError(f'image: expected uint8 pixels, got {image.dtype}{hint}')
  if image.ndim == 2:
    image = image[..., None]
  if image.ndim != 3 or image.shape[-1] not in (1, 3, 4) or 0 in image.shape:
    raise ValueError(f'image: expected (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), got {image.shape}')
  return np.ascontiguousarray(np.repeat(image, 3, -1) if image.shape[-1] == 1 else image[..., :3])


def same_proportions(size: tuple[int, int], other: tuple[int, int]) -> bool:
  """Whether an image of one (height, width) may be a resized copy of the other; a pixel of rounding each."""
  return abs(size[0] / other[0] - size[1] / other[1]) <= 1 / other[0] + 1 / other[1]


def mentions_sides(text: str) -> bool:
  """Whether a caption speaks of left or right, so that mirroring the image would make it false."""
  return _SIDES.search(text) is not None


def _is_whole(data):
  """Whether OpenCV may be asked for this file; False only means that Pillow has to look closer.

  Older versions of OpenCV hand back a truncated JPEG with grey rows and no word. A file cut short lacks its end
  marker; whole files with something appended lack it at the end too, and are left to Pillow's strict reading.
  """
  if data.startswith(_JPEG_START):
    header = jpeg.read_header(data)
    # Four channels are CMYK, which OpenCV converts badly.
    return data.endswith(_JPEG_END) and not (header and header.channels == 4)
  if data.startswith(_PNG_START):
    return data.endswith(_PNG_END)
  return not data.startswith(_GIF_START)


def _decode_opencv(data):
  try:
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)  # applies the EXIF orientation
  except cv2.error:  # too many pixels, for one
    return None


def _decode_pillow(data, *, where):
  try:
    with PIL.Image.open(io.BytesIO(data)) as image:
      image.load()  # raises on a truncated file
      return _pillow_to_rgb(image)
  except PIL.UnidentifiedImageError as error:
    start = f'the file begins with {data[:8]!r}' if data else 'the file is empty'
    raise ImageError(f'{where}: not an image: {start}') from error
  except (OSError, SyntaxError, ValueError, EOFError, PIL.Image.DecompressionBombError) as error:
    raise ImageError(f'{where}: the image cannot be decoded: {error}') from error


def _pillow_to_rgb(image):
  image = PIL.ImageOps.exif_transpose(image)
  if image.mode.startswith('I;16') or image.mode == 'I':  # 16-bit grey, which convert() would clip instead of scale
    return np.repeat((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)[..., None], 3, -1)
  return np.asarray(image.convert('RGB'))
