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
_REDUCED = {1: cv2.IMREAD_COLOR, 2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4,
            8: cv2.IMREAD_REDUCED_COLOR_8}


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


def decode_reduced(data: bytes, header: Header, *, height: int, width: int) -> np.ndarray | None:
  """Decodes and resizes to (height, width, 3) uint8 RGB, upright; None if OpenCV does not decode it.

  At least as many pixels are decoded as are asked for, and fewer than twice as many a side (down to an eighth of the
  image), which a linear filter then brings to size. Pixels keep their places to a fraction of an output pixel.
  """
  turned = header.orientation >= 5
  rows, cols = (width, height) if turned else (height, width)
  reduce = next((n for n in (8, 4, 2) if header.height >= n * rows and header.width >= n * cols), 1)
  try:
    image = cv2.imdecode(np.frombuffer(data, np.uint8), _REDUCED[reduce] | cv2.IMREAD_IGNORE_ORIENTATION)
  except cv2.error:
    return None
  if image is None or image.shape[:2] != (-(-header.height // reduce), -(-header.width // reduce)):
    return None
  # The last row and column may stand for less than a whole block: the scale is that of the image, not of the array.
  fy, fx = rows * reduce / header.height, cols * reduce / header.width
  if (fy, fx) != (1, 1):
    linear = min(fy, fx) > 0.5 or max(fy, fx) > 1
    image = cv2.resize(image, None, fx=fx, fy=fy, interpolation=cv2.INTER_LINEAR if linear else cv2.INTER_AREA)
  return orient(cv2.cvtColor(image[:rows, :cols], cv2.COLOR_BGR2RGB), header.orientation)


def orient(image: np.ndarray, orientation: int) -> np.ndarray:
  """Turns and mirrors a stored image (H, W, 3) as its EXIF orientation, 1 to 8, says."""
  if orientation >= 5:
    image = cv2.transpose(image)
  # Which sides are mirrored, after the transposition where there is one.
  axis = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}.get(orientation)
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
