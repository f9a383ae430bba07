"""Files of many kinds with a bright rectangle on a dark ground, and where that rectangle is found in pixels."""
import io

import numpy as np
import PIL.Image

# What turns an upright image into the one that is stored under an EXIF orientation (EXIF 2.32, 4.6.4, table 6).
_STORED = {1: lambda x: x, 2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1],
           5: lambda x: x.swapaxes(0, 1), 6: lambda x: x[:, ::-1].swapaxes(0, 1),
           7: lambda x: x[::-1, ::-1].swapaxes(0, 1), 8: lambda x: x[::-1].swapaxes(0, 1)}
DARK, BRIGHT = (127, 127, 127), (250, 240, 230)  # the dark is that of the padding

KINDS = ('png', 'jpeg', 'jpeg420', 'progressive', 'grey jpeg', 'cmyk jpeg', 'grey png', 'palette png', 'alpha png',
         'gif', 'animated gif', 'animated webp', 'apng', *(f'jpeg turned {i}' for i in range(2, 9)), 'png turned 6')


def marked(height, width, box):
  """(height, width, 3) uint8, DARK with BRIGHT pixels in `box` (whole numbers, xyxy)."""
  image = np.empty((height, width, 3), np.uint8)
  image[:] = DARK
  x0, y0, x1, y1 = box
  image[y0:y1, x0:x1] = BRIGHT
  return image


def encode(image, kind):
  """An upright (H, W, 3) picture as a file of one of KINDS."""
  words = kind.split()
  orientation = int(words[-1]) if 'turned' in words else 1
  picture = PIL.Image.fromarray(np.ascontiguousarray(_STORED[orientation](image)))
  options = {}
  if orientation > 1:
    options['exif'] = PIL.Image.Exif()
    options['exif'][0x0112] = orientation
  if 'jpeg' in kind or kind == 'progressive':
    options |= dict(quality=95, subsampling=2 if kind == 'jpeg420' else 0, progressive=kind == 'progressive')
  if 'animated' in words or kind == 'apng':
    later = [PIL.Image.fromarray(np.full_like(image, grey)) for grey in (0, 255)]
    options |= dict(save_all=True, append_images=later, duration=50)
  if words[-1] == 'webp':
    options['lossless'] = True
  mode = {'grey': 'L', 'cmyk': 'CMYK', 'alpha': 'RGBA'}.get(words[0])
  if words[0] in ('palette', 'gif'):
    picture = picture.quantize(8)
  out = io.BytesIO()
  kinds = {'png': 'PNG', 'apng': 'PNG', 'gif': 'GIF', 'webp': 'WEBP'}
  name = next((kinds[w] for w in words if w in kinds), 'JPEG')
  (picture.convert(mode) if mode else picture).save(out, name, **options)
  return out.getvalue()


def find(canvas, box):
  """Where the bright rectangle that should be at `box` (xyxy, pixels of the canvas) really is: xyxy, to subpixels.

  Each side is where the mean over the middle of the expected rectangle crosses the half between dark and bright,
  between pixel centres; or the canvas's or the picture's border, if it is bright up to there.
  """
  light = (canvas[..., 1].astype(np.float64) - DARK[1]) / (BRIGHT[1] - DARK[1])
  x0, y0, x1, y1 = box
  rows = slice(int(y0 + (y1 - y0) * 0.3), max(int(y0 + (y1 - y0) * 0.7), int(y0 + (y1 - y0) * 0.3) + 1))
  cols = slice(int(x0 + (x1 - x0) * 0.3), max(int(x0 + (x1 - x0) * 0.7), int(x0 + (x1 - x0) * 0.3) + 1))
  left, right = _span(light[rows].mean(0), (x0 + x1) / 2)
  top, bottom = _span(light[:, cols].mean(1), (y0 + y1) / 2)
  return np.array([left, top, right, bottom])


def _span(profile, middle):
  """The stretch around `middle` where the profile is above a half."""
  start = min(int(middle), len(profile) - 1)
  if profile[start] <= 0.5:
    return np.nan, np.nan
  return len(profile) - _crossing(profile[::-1], len(profile) - 1 - start), _crossing(profile, start)


def _crossing(profile, start):
  below = np.flatnonzero(profile[start:] <= 0.5)
  if not len(below):
    return len(profile)
  at = start + below[0]
  return at - 0.5 + (profile[at - 1] - 0.5) / (profile[at - 1] - profile[at])
