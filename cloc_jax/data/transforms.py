"""From encoded bytes to the square canvas; the boxes go through the same geometry as the pixels."""
import io
import re

import cv2
import numpy as np
import PIL.Image
import PIL.ImageOps

from cloc_jax import geometry as geometry_lib

# Worker processes are the unit of parallelism here: OpenCV's own threads would fight with them, and with the trainer.
cv2.setNumThreads(0)

_JPEG_START, _JPEG_END = b'\xff\xd8', b'\xff\xd9'
_PNG_START, _PNG_END = b'\x89PNG', b'IEND\xaeB`\x82'
_GIF_START = b'GIF8'
# JPEG markers of a frame header: SOF0 … SOF15 without DHT, JPG and DAC, which share the range.
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
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


def resize_with_pad(image: np.ndarray, geometry: geometry_lib.Geometry, *, pad_value: int = 127) -> np.ndarray:
  """Puts an image on its canvas: resize, pad and flip, as `geometry` says.

  Args:
    image: (H, W, 3) uint8, of the size that the geometry was made for.
    geometry: from geometry.resize_with_pad, flipped or not.
    pad_value: grey level of the padding.

  Returns:
    (S, S, 3) uint8, S = geometry.canvas; C-contiguous.

  Raises:
    ValueError: if the image is not of the geometry's size.
  """
  if image.shape[:2] != (geometry.height, geometry.width):
    raise ValueError(f'the geometry is of a {geometry.height}×{geometry.width} image, '
                     f'got {image.shape[0]}×{image.shape[1]}')
  height, width, side = geometry.resized_height, geometry.resized_width, geometry.canvas
  if (height, width) != image.shape[:2]:
    # Averaging over the covered area is the only filter of OpenCV's that does not alias when it shrinks.
    shrinks = height <= image.shape[0] and width <= image.shape[1]
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
  if (height, width) == (side, side):
    canvas = image
  else:
    canvas = np.full((side, side, 3), pad_value, np.uint8)
    canvas[geometry.top:geometry.top + height, geometry.left:geometry.left + width] = image
  # Several times as quick as a copy of a view with a negative stride.
  return cv2.flip(canvas, 1) if geometry.flipped else np.ascontiguousarray(canvas)


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


def mentions_sides(text: str) -> bool:
  """Whether a caption speaks of left or right, so that mirroring the image would make it false."""
  return _SIDES.search(text) is not None


def _is_whole(data):
  """Whether OpenCV may be asked for this file; False only means that Pillow has to look closer.

  Older versions of OpenCV hand back a truncated JPEG with grey rows and no word. A file cut short lacks its end
  marker; whole files with something appended lack it at the end too, and are left to Pillow's strict reading.
  """
  if data.startswith(_JPEG_START):
    return data.endswith(_JPEG_END) and _jpeg_channels(data) != 4
  if data.startswith(_PNG_START):
    return data.endswith(_PNG_END)
  return not data.startswith(_GIF_START)


def _jpeg_channels(data):
  """Channels in the frame header, 0 if there is none before the pixels. Four mean CMYK, which OpenCV converts badly."""
  at = 2
  while at + 9 < len(data) and data[at] == 0xFF:
    marker = data[at + 1]
    if marker in _JPEG_FRAMES:
      return data[at + 9]
    if marker == 0xFF:  # fill byte
      at += 1
      continue
    at += 2 + int.from_bytes(data[at + 2:at + 4], 'big')
  return 0


def _decode_opencv(data):
  try:
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)  # applies the EXIF orientation
  except cv2.error:  # too many pixels, for one
    return None
  return None if image is None else cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)


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
