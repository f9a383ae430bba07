"""Regions by crop and re-encode: the baseline for a model that embeds whole images alone."""
import dataclasses
from typing import Any, NamedTuple

import numpy as np

from cloc_jax.evaluators.collect import EncoderFns


class CropHandle(NamedTuple):
  """The encoded images, and the pixels to cut regions out of: (B, H, W, 3) uint8."""
  encoded: Any
  images: np.ndarray


def crop_regions(fns: EncoderFns, image_size: int) -> EncoderFns:
  """The same model, with regions embedded by cutting them out of the canvas and encoding each as an image.

  A box is widened to whole pixels, at least one, and nothing around it is seen; the crop is resized with padding to
  the model's input, as any image is. It costs one run of the image encoder for each distinct box, in batches of the
  size of the images' batch. The crop is taken from the canvas, not from the original file: what was lost in the first
  resize stays lost, as it is for every other way of embedding a region. Grounding is not offered.

  Args:
    fns: the model; its `embed_regions` and `ground` are not used.
    image_size: side of the square images that `fns.encode_image` takes, pixels.
  """
  def encode_image(images):
    return CropHandle(encoded=fns.encode_image(images), images=np.asarray(images))

  def embed_regions(handle, boxes):
    b, m = np.shape(boxes)[:2]
    corners = _pixel_corners(np.asarray(boxes, np.float64), height=handle.images.shape[1],
                             width=handle.images.shape[2])
    keys = np.concatenate([np.repeat(np.arange(b), m)[:, None], corners.reshape(-1, 4)], 1)
    # Padding repeats boxes, and so do annotators: each distinct crop is encoded once.
    distinct, back = np.unique(keys, axis=0, return_inverse=True)
    crops = [_crop(handle.images[i], (x0, y0, x1, y1), image_size=image_size) for i, x0, y0, x1, y1 in distinct]
    z = []
    for start in range(0, len(crops), b):
      some = crops[start:start + b]
      # A last, short batch is filled up: the encoder is compiled for one size.
      images = np.stack(some + [np.zeros_like(some[0])] * (b - len(some)))
      z.append(np.asarray(fns.image_embedding(fns.encode_image(images)), np.float32)[:len(some)])
    return np.concatenate(z)[back.reshape(-1)].reshape(b, m, -1)

  return dataclasses.replace(fns, encode_image=encode_image, embed_regions=embed_regions, ground=None,
                             image_embedding=lambda handle: fns.image_embedding(handle.encoded),
                             embed_patches=None if fns.embed_patches is None else
                             lambda handle: fns.embed_patches(handle.encoded))


def _pixel_corners(boxes, *, height: int, width: int) -> np.ndarray:
  """(..., 4) xyxy normalised → (..., 4) int64 pixels, rounded outwards, at least one pixel, inside the image."""
  size = np.array([width, height])
  # float32 boxes that mean a whole pixel may lie a hair beside it: that must not add a row of another object.
  low = np.floor(boxes[..., :2] * size + 1e-3).astype(np.int64)
  high = np.ceil(boxes[..., 2:] * size - 1e-3).astype(np.int64)
  low = np.clip(low, 0, size - 1)
  high = np.clip(np.maximum(high, low + 1), 1, size)
  return np.concatenate([low, high], -1)


def _crop(image, corners, *, image_size: int) -> np.ndarray:
  # Imported here, because it brings OpenCV, which nothing else in the evaluators needs.
  from cloc_jax.data import transforms
  x0, y0, x1, y1 = corners
  canvas, _ = transforms.prepare_image(np.ascontiguousarray(image[y0:y1, x0:x1]), image_size=image_size, pad='center')
  return canvas
