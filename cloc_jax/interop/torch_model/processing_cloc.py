"""What CLOC's model takes: images resized and padded to a square canvas, boxes moved with the pixels, token ids.

Needs NumPy and Pillow (and torch for tensors). The pixels are those of the training pipeline, which resizes with
OpenCV: by averaging over the covered area where an image shrinks, linearly in fixed point where it grows.
A pixel covers [i, i + 1): an image of width W spans 0 … W.
"""
import html

import numpy as np
import PIL.Image
import PIL.ImageOps
import transformers
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ProcessorMixin

WHOLE_CANVAS = (0.0, 0.0, 1.0, 1.0)


def geometry(height, width, canvas, pad):
  """Where an image of (height, width) comes to lie: (resized height, resized width, top, left), canvas pixels."""
  scale = canvas / max(height, width)
  rows, cols = max(1, round(height * scale)), max(1, round(width * scale))
  top, left = ((canvas - rows) // 2, (canvas - cols) // 2) if pad == 'center' else (0, 0)
  return rows, cols, top, left


def boxes_to_canvas(boxes, size, canvas, pad='center'):
  """(…, 4) xyxy in pixels of an image of size (height, width) → xyxy normalised to the canvas, float32."""
  scale, offset = _map(size, canvas, pad)
  return ((np.asarray(boxes, np.float64) * scale + offset) / canvas).astype(np.float32)


def boxes_from_canvas(boxes, size, canvas, pad='center'):
  """The inverse of `boxes_to_canvas`, cut at the image's border."""
  scale, offset = _map(size, canvas, pad)
  height, width = size
  out = (np.asarray(boxes, np.float64) * canvas - offset) / scale
  return np.clip(out, 0, [width, height, width, height]).astype(np.float32)


def _map(size, canvas, pad):
  rows, cols, top, left = geometry(*size, canvas, pad)
  return np.array([cols / size[1], rows / size[0]] * 2), np.array([left, top] * 2, np.float64)


def to_rgb(image):
  """A PIL image, or uint8 pixels (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) → (H, W, 3) uint8, upright."""
  if isinstance(image, PIL.Image.Image):
    image = PIL.ImageOps.exif_transpose(image)
    if image.mode.startswith('I;16') or image.mode == 'I':  # 16-bit grey, which convert() would clip
      return np.repeat((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)[..., None], 3, -1)
    return np.asarray(image.convert('RGB'))
  image = np.asarray(image)
  if image.dtype != np.uint8:
    raise TypeError(f'image: expected a PIL image or uint8 pixels, got {image.dtype}')
  if image.ndim == 2:
    image = image[..., None]
  if image.ndim != 3 or image.shape[-1] not in (1, 3, 4) or 0 in image.shape:
    raise ValueError(f'image: expected (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), got {image.shape}')
  return np.repeat(image, 3, -1) if image.shape[-1] == 1 else image[..., :3]


def resize_with_pad(image, canvas, pad='center', pad_value=127):
  """(H, W, 3) uint8 → (canvas, canvas, 3) uint8: the long side becomes `canvas`, the rest is grey."""
  height, width = image.shape[:2]
  rows, cols, top, left = geometry(height, width, canvas, pad)
  if (rows, cols) != (height, width):
    image = _shrink(image, rows, cols) if rows <= height and cols <= width else _grow(image, rows, cols)
  out = np.full((canvas, canvas, 3), pad_value, np.uint8)
  out[top:top + rows, left:left + cols] = image
  return out


def _scale(size, new):
  return 1.0 / (new / size)  # as OpenCV computes it, rounding and all


def _shrink(image, rows, cols):
  """OpenCV's INTER_AREA: each new pixel is the mean of the area that it covers."""
  height, width = image.shape[:2]
  sy, sx = _scale(height, rows), _scale(width, cols)
  if sy == round(sy) and sx == round(sx):
    return _shrink_blocks(image, rows, cols, round(sy), round(sx))
  index, weight = _area_taps(width, cols, sx)
  across = np.zeros((height, cols, 3), np.float32)
  for i, w in zip(index, weight):
    across += image[:, i] * w[None, :, None]
  index, weight = _area_taps(height, rows, sy)
  out = np.zeros((rows, cols, 3), np.float32)
  for i, w in zip(index, weight):
    out += across[i] * w[:, None, None]
  return np.clip(np.rint(out), 0, 255).astype(np.uint8)


def _shrink_blocks(image, rows, cols, sy, sx):
  blocks = image[:rows * sy, :cols * sx].reshape(rows, sy, cols, sx, 3).astype(np.int64).sum((1, 3))
  if (sy, sx) == (2, 2):
    return ((blocks + 2) >> 2).astype(np.uint8)
  return np.rint(blocks.astype(np.float32) * np.float32(1 / (sy * sx))).astype(np.uint8)


def _area_taps(size, new, scale):
  """Of each new pixel: the old ones under it, one after another, and their shares. Two arrays (taps, new)."""
  start = np.arange(new) * scale
  end = start + scale
  cell = np.minimum(scale, size - start)
  last = np.minimum(np.floor(end).astype(int), size - 1)
  first = np.minimum(np.ceil(start).astype(int), last)
  at = first[None] - 1 + np.arange(int((last - first).max()) + 2)[:, None]
  share = np.where((at >= first) & (at < last), 1.0, 0.0)
  share = np.where((at == first - 1) & (first - start > 1e-3), first - start, share)
  share = np.where((at == last) & (end - last > 1e-3), np.minimum(np.minimum(end - last, 1.0), cell), share)
  return np.clip(at, 0, size - 1), (share / cell).astype(np.float32)


def _grow(image, rows, cols):
  """OpenCV's INTER_LINEAR for bytes: bilinear in fixed point, 11 bits a weight."""
  height, width = image.shape[:2]
  low, high, w0, w1 = _linear_taps(width, cols, clamp=True)
  image = image.astype(np.int32)
  across = image[:, low] * w0[None, :, None] + image[:, high] * w1[None, :, None]
  low, high, w0, w1 = _linear_taps(height, rows, clamp=False)
  top = (w0[:, None, None] * (across[low] >> 4)) >> 16
  bottom = (w1[:, None, None] * (across[high] >> 4)) >> 16
  return np.clip((top + bottom + 2) >> 2, 0, 255).astype(np.uint8)


def _linear_taps(size, new, clamp):
  at = ((np.arange(new) + 0.5) * _scale(size, new) - 0.5).astype(np.float32)
  low = np.floor(at).astype(int)
  part = at - low.astype(np.float32)
  if clamp:
    part = np.where((low < 0) | (low >= size - 1), np.float32(0), part)
  w0, w1 = (np.rint(w * np.float32(2048)).astype(np.int32) for w in (np.float32(1) - part, part))
  return np.clip(low, 0, size - 1), np.clip(low + 1, 0, size - 1), w0, w1


class ClocImageProcessor(BaseImageProcessor):
  """Images of any size → pixel_values (B, 3, S, S) float32 and original_sizes (B, 2) as (height, width).

  image_size: side S of the canvas. pad: 'center' or 'corner'. image_mean, image_std: of pixels in 0 … 1.
  """
  model_input_names = ['pixel_values']

  def __init__(self, image_size=224, pad='center', image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5),
               pad_value=127, **kwargs):
    super().__init__(**kwargs)
    self.image_size, self.pad, self.pad_value = image_size, pad, pad_value
    self.image_mean, self.image_std = list(image_mean), list(image_std)

  def canvas(self, image):
    """One image → (S, S, 3) uint8."""
    return resize_with_pad(to_rgb(image), self.image_size, self.pad, self.pad_value)

  def preprocess(self, images, return_tensors='pt', **kwargs):
    """A PIL image, an array, or a list of them → BatchFeature."""
    if kwargs:
      raise TypeError(f'ClocImageProcessor: unknown options {sorted(kwargs)}; its settings are fixed when it is made')
    images = images if isinstance(images, (list, tuple)) or getattr(images, 'ndim', 0) == 4 else [images]
    pixels = [to_rgb(image) for image in images]
    canvases = np.stack([resize_with_pad(p, self.image_size, self.pad, self.pad_value) for p in pixels])
    mean, std = (np.asarray(v, np.float32) * np.float32(255) for v in (self.image_mean, self.image_std))
    values = ((canvases.astype(np.float32) - mean) / std).transpose(0, 3, 1, 2)
    return BatchFeature({'pixel_values': np.ascontiguousarray(values),
                         'original_sizes': np.array([p.shape[:2] for p in pixels])}, tensor_type=return_tensors)

  def boxes_to_canvas(self, boxes, size):
    """(…, 4) xyxy in pixels of an image of size (height, width) → normalised to the canvas, NumPy float32."""
    return boxes_to_canvas(boxes, size, self.image_size, self.pad)

  def boxes_from_canvas(self, boxes, size):
    """What the model found, (…, 4) → pixels of an image of size (height, width), cut at its border; NumPy float32."""
    if hasattr(boxes, 'detach'):
      boxes = boxes.detach().float().cpu().numpy()
    return boxes_from_canvas(boxes, [int(n) for n in size], self.image_size, self.pad)


class ClocProcessor(ProcessorMixin):
  """Images, their boxes and texts → what ClocModel takes.

  text_length, region_text_length: tokens of captions, and of phrases that are compared with regions, as in training.
  unescape_html: whether '&amp;' and such are resolved first.
  """
  if int(transformers.__version__.split('.')[0]) < 5:
    attributes = ['image_processor', 'tokenizer']
    image_processor_class, tokenizer_class = 'AutoImageProcessor', 'AutoTokenizer'

  def __init__(self, image_processor=None, tokenizer=None, text_length=77, region_text_length=16, unescape_html=False,
               **kwargs):
    self.text_length, self.region_text_length = text_length, region_text_length
    self.unescape_html = unescape_html
    super().__init__(image_processor, tokenizer, **kwargs)

  def __call__(self, images=None, text=None, boxes=None, region=False, return_tensors='pt'):
    """Prepares any of the three.

    Args:
      images: a PIL image or uint8 array, or a list of B of them.
      text: a text or a list of T.
      boxes: xyxy in pixels of the original image: (n, 4) for one image, else a list of B such. Cut at the border;
        images with fewer get the whole canvas as further ones, and box_mask (B, M) says which are real.
      region: whether the texts are phrases, to be compared with regions, or captions of whole images.
      return_tensors: 'pt' or 'np'.

    Returns:
      BatchFeature with pixel_values (B, 3, S, S), original_sizes (B, 2), boxes (B, M, 4), box_mask, input_ids (T, L).
    """
    out = {}
    if images is not None:
      out.update(self.image_processor(images, return_tensors='np'))
    if boxes is not None:
      if images is None:
        raise ValueError('boxes: expected together with the images that they are of')
      single = not isinstance(images, (list, tuple)) and getattr(images, 'ndim', 0) != 4
      out['boxes'], out['box_mask'] = self._boxes([boxes] if single else list(boxes), out['original_sizes'])
    if text is not None:
      out['input_ids'] = self.encode(text, self.region_text_length if region else self.text_length)
    return BatchFeature(out, tensor_type=return_tensors)

  def encode(self, texts, length):
    """Texts → (T, length) int64: [start mark,] the text's own tokens, the end mark, padding; a long text is cut and
    keeps its end mark."""
    texts = [texts] if isinstance(texts, str) else list(texts)
    tokenizer = self.tokenizer
    if self.unescape_html:
      texts = [html.unescape(html.unescape(text)) for text in texts]
    texts = [text.encode('utf-8', 'replace').decode() for text in texts]  # no encoder takes lone surrogates
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end = tokenizer.eos_token_id
    ids = np.full((len(texts), length), tokenizer.pad_token_id, np.int64)
    encoded = tokenizer(texts, add_special_tokens=False, padding=False, truncation=False,
                        verbose=False)['input_ids'] if texts else []
    for row, body in zip(ids, encoded):
      own = [*start, *(n for n in body if n != end), end]  # a text that spells the end mark out must not end there
      row[:len(own)] = own[:length]
      if len(own) > length:
        row[-1] = end
    return ids

  def boxes_from_canvas(self, boxes, size):
    """See ClocImageProcessor.boxes_from_canvas."""
    return self.image_processor.boxes_from_canvas(boxes, size)

  def _boxes(self, per_image, sizes):
    if len(per_image) != len(sizes):
      raise ValueError(f'boxes: expected one list for each of {len(sizes)} images, got {len(per_image)}')
    per_image = [np.asarray(own, np.float32).reshape(-1, 4) for own in per_image]
    count = max(map(len, per_image))
    boxes = np.tile(np.float32(WHOLE_CANVAS), (len(sizes), count, 1))
    mask = np.zeros((len(sizes), count), bool)
    for i, (own, (height, width)) in enumerate(zip(per_image, sizes)):
      inside = np.clip(own, 0, np.float32([width, height, width, height]))
      bad = ~np.isfinite(own).all(-1) | (inside[:, 2:] <= inside[:, :2]).any(-1)
      if bad.any():
        raise ValueError(f'boxes of image {i}: {own[bad][0].tolist()} has no area inside the image of {width}×{height} '
                         'pixels; expected xyxy with left < right and top < bottom')
      boxes[i, :len(own)] = self.image_processor.boxes_to_canvas(inside, (height, width))
      mask[i, :len(own)] = True
    return boxes, mask
