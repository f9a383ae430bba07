"""A JPEG's header, and its decoding at a half, a quarter or an eighth of its size, which costs less than all of it.

Each 8×8 block is turned into 4×4, 2×2 or 1×1 pixels straight from its low frequencies (libjpeg's DCT scaling), so that
an image that is to be shrunk anyway is never made in full. Markers: ITU-T T.81, annex B; orientation: EXIF 2.32, 4.6.4.
"""
import dataclasses

import cv2
import numpy as np

# Frame headers: SOF0 … SOF15 without DHT, JPG and DAC, which share the range.
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_COMMON_FRAMES = (0xC0, 0xC1, 0xC2)  # Huffman-coded: baseline, extended, progressive
_APP1, _EXIF, _ORIENTATION = 0xE1, b'Exif\0\0', 0x0112
_REDUCED = {1: cv2.IMREAD_COLOR_RGB, 2: cv2.IMREAD_REDUCED_GRAYSCALE_2 | cv2.IMREAD_COLOR_RGB,
            4: cv2.IMREAD_REDUCED_GRAYSCALE_4 | cv2.IMREAD_COLOR_RGB,
            8: cv2.IMREAD_REDUCED_GRAYSCALE_8 | cv2.IMREAD_COLOR_RGB}


@dataclasses.dataclass(frozen=True)
class Header:
  """What stands before the pixels.

  height, width: as stored, before the orientation is applied, pixels.
  channels: 1 grey, 3 colour, 4 CMYK.
  common: 8 bits a channel, Huffman-coded, grey or colour: what OpenCV decodes as Pillow does.
  orientation: EXIF's, 1 to 8.
  """
  height: int
  width: int
  channels: int
  common: bool
  orientation: int

  @property
  def upright(self) -> tuple[int, int]:
    """(height, width) after the orientation is applied."""
    return (self.width, self.height) if self.orientation >= 5 else (self.height, self.width)


def read_header(data: bytes) -> Header | None:
  """The header of a JPEG file; None if there is no whole one."""
  at, exif = 2, None
  while at + 10 <= len(data) and data[at] == 0xFF:
    marker = data[at + 1]
    if marker == 0xFF:  # fill byte
      at += 1
      continue
    if marker in _FRAMES:
      bits, channels = data[at + 4], data[at + 9]
      height, width = (int.from_bytes(data[i:i + 2], 'big') for i in (at + 5, at + 7))
      return Header(height=height, width=width, channels=channels,
                    # The height may come behind the pixels, and is 0 here then.
                    common=marker in _COMMON_FRAMES and bits == 8 and channels in (1, 3) and height * width > 0,
                    orientation=_orientation(exif) if exif else 1)
    end = at + 2 + int.from_bytes(data[at + 2:at + 4], 'big')
    if marker == _APP1 and exif is None and data.startswith(_EXIF, at + 4):
      exif = data[at + 4 + len(_EXIF):end]
    at = end
  return None


def decode_reduced(data: bytes, header: Header, *, height: int, width: int,
                   crop: tuple[int, int, int, int] | None = None, out: np.ndarray | None = None) -> np.ndarray | None:
  """Decodes and resizes to (height, width, 3) uint8 RGB, upright; None if OpenCV does not decode it.

  At least as many pixels are decoded as are asked for, and fewer than twice as many a side (down to an eighth of the
  image), which a linear filter then brings to size. Pixels keep their places to a fraction of an output pixel.

  Args:
    data, header: the file.
    height, width: of the result.
    crop: xyxy in whole pixels of the upright image: only this part is the result.
    out: a place for the result, of its shape, that is used where that spares a copy; look at what is returned.
  """
  turned = header.orientation >= 5
  rows, cols = (width, height) if turned else (height, width)
  x0, y0, x1, y1 = (0, 0, header.width, header.height) if crop is None else _stored(crop, header)
  reduce = next((n for n in (8, 4, 2) if y1 - y0 >= n * rows and x1 - x0 >= n * cols), 1)
  try:
    image = cv2.imdecode(np.frombuffer(data, np.uint8), _REDUCED[reduce] | cv2.IMREAD_IGNORE_ORIENTATION)
  except cv2.error:
    return None
  if image is None or image.shape[:2] != (-(-header.height // reduce), -(-header.width // reduce)):
    return None
  # The last row and column may stand for less than a whole block: the scale is that of the image, not of the array.
  fy, fx = rows * reduce / (y1 - y0), cols * reduce / (x1 - x0)
  if crop is not None:
    image = _cut(image, at=(x0 / reduce, y0 / reduce), scale=(fx, fy), rows=rows, cols=cols)
  elif (fy, fx) != (1, 1):
    linear = min(fy, fx) > 0.5 or max(fy, fx) > 1
    image = cv2.resize(image, None, dst=out if header.orientation == 1 else None, fx=fx, fy=fy,
                       interpolation=cv2.INTER_LINEAR if linear else cv2.INTER_AREA)
  # Rounding may have made a row or a column too many.
  return orient(image if image.shape[:2] == (rows, cols) else image[:rows, :cols], header.orientation)


def _cut(image, *, at, scale, rows, cols):
  """The part of an image that begins at `at` (x, y; pixels, not whole), scaled to (rows, cols) by `scale` (x, y)."""
  shrink = tuple(max(1, int(1 / f)) for f in scale)
  # Whole pixels around the part, so that what is far away costs nothing, and what is near has its neighbours.
  left, top = (max(0, int(v) - 2 * n) for v, n in zip(at, shrink))
  image = image[top:int(at[1] + rows / scale[1]) + 1 + 2 * shrink[1],
                left:int(at[0] + cols / scale[0]) + 1 + 2 * shrink[0]]
  (x, y), (fx, fy) = (at[0] - left, at[1] - top), scale
  if shrink != (1, 1):  # by whole numbers first, averaging, so that a linear filter leaves no pixel out
    image = cv2.resize(cv2.copyMakeBorder(image, 0, -image.shape[0] % shrink[1], 0, -image.shape[1] % shrink[0],
                                          cv2.BORDER_REPLICATE), None, fx=1 / shrink[0], fy=1 / shrink[1],
                       interpolation=cv2.INTER_AREA)
    x, y, fx, fy = x / shrink[0], y / shrink[1], fx * shrink[0], fy * shrink[1]
  # Where in the image the centre of output pixel (0, 0) is, in OpenCV's terms, whose centres are whole numbers.
  back = np.array([[1 / fx, 0, x + 0.5 / fx - 0.5], [0, 1 / fy, y + 0.5 / fy - 0.5]])
  return cv2.warpAffine(image, back, (cols, rows), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
                        borderMode=cv2.BORDER_REPLICATE)


# Which sides `orient` mirrors, after the transposition where there is one: OpenCV's axis, 1 is left and right.
_MIRRORED = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}


def _stored(box, header):
  """A box (xyxy) of the upright image in the pixels of the stored one."""
  x0, y0, x1, y1 = box
  height, width = header.upright
  axis = _MIRRORED.get(header.orientation)
  if axis in (1, -1):
    x0, x1 = width - x1, width - x0
  if axis in (0, -1):
    y0, y1 = height - y1, height - y0
  return (y0, x0, y1, x1) if header.orientation >= 5 else (x0, y0, x1, y1)


def orient(image: np.ndarray, orientation: int) -> np.ndarray:
  """Turns and mirrors a stored image (H, W, 3) as its EXIF orientation, 1 to 8, says."""
  if orientation >= 5:
    image = cv2.transpose(image)
  axis = _MIRRORED.get(orientation)
  return image if axis is None else cv2.flip(image, axis)


def _orientation(tiff):
  """The orientation in an EXIF block; 1 where it has none, or none that is valid."""
  order = {b'II': 'little', b'MM': 'big'}.get(tiff[:2])
  if order is None:
    return 1
  number = lambda at, size: int.from_bytes(tiff[at:at + size], order)
  start = number(4, 4)
  for entry in range(start + 2, min(start + 2 + 12 * number(start, 2), len(tiff) - 11), 12):
    if number(entry, 2) == _ORIENTATION:
      value = number(entry + 8, 2)
      return value if 1 <= value <= 8 else 1
  return 1
