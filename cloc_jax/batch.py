"""The contract between data, model and losses: what a batch holds, and what the model returns.

Dims glossary, used everywhere in this project:
  B images a batch · M regions an image · K = B·M regions · L caption tokens · Lr region-caption tokens
  N patches · D tower width · E joint embedding width · H, W, C pixels · P tokens a prompt
Masks are True where an entry is valid.
"""
import dataclasses
from typing import Any

import jax
import numpy as np

Array = Any  # numpy on the host, jax.Array on devices


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
  """One batch of images, captions and regions; the same fields on the host and on the devices.

  image: (B, H, W, C) uint8; normalised on the device.
  image_mask: (B,) bool; False for padding examples, unreadable images and images without a caption.
  text: (B, L) int32 caption tokens.
  boxes: (B, M, 4) float32, xyxy, normalised to the padded square canvas.
  region_text: (B, M, Lr) int32 region-caption tokens.
  region_mask: (B, M) bool.
  """
  image: Array
  image_mask: Array
  text: Array
  boxes: Array
  region_text: Array
  region_mask: Array

  @property
  def size(self) -> int:
    """B, the number of images, padding included."""
    return self.image.shape[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outputs:
  """What the joint model computes from a Batch; all float32. A loss needs nothing else of the model.

  z_image, z_text: (B, E), L2-normalised.
  z_region, z_region_text: (B, M, E), L2-normalised; None where the model has no region branch.
  pred_boxes: (B, M, 4) boxes in (0, 1) that the region texts were grounded to; None without a box head.
  logit_scale, logit_bias: scalars of the image-text loss; the bias is used by the sigmoid loss alone.
  region_logit_scale, region_logit_bias: the same of the region-text loss (shared with the former by default).
  """
  z_image: Array
  z_text: Array
  z_region: Array | None
  z_region_text: Array | None
  pred_boxes: Array | None
  logit_scale: Array
  logit_bias: Array
  region_logit_scale: Array
  region_logit_bias: Array


def check_batch(batch: Batch) -> None:
  """Raises ValueError, naming the field, if shapes or dtypes break the contract above. Host-side and cheap."""
  b = batch.image.shape[0]
  m = batch.boxes.shape[1] if np.ndim(batch.boxes) == 3 else -1
  expected = {
      'image': ((b, None, None, 3), np.uint8),
      'image_mask': ((b,), np.bool_),
      'text': ((b, None), np.int32),
      'boxes': ((b, m, 4), np.float32),
      'region_text': ((b, m, None), np.int32),
      'region_mask': ((b, m), np.bool_),
  }
  for name, (shape, dtype) in expected.items():
    value = getattr(batch, name)
    fits = len(value.shape) == len(shape) and all(want in (None, got) for want, got in zip(shape, value.shape))
    if not fits or value.dtype != dtype:
      want = '×'.join('any' if s is None else str(s) for s in shape)
      raise ValueError(f'batch field {name!r}: expected {want} {np.dtype(dtype).name}, '
                       f'got {"×".join(map(str, value.shape))} {value.dtype}')


def abstract_batch(*, batch_size: int, image_size: int, text_length: int, regions: int,
                   region_text_length: int) -> Batch:
  """A Batch of jax.ShapeDtypeStruct, for shape evaluation and ahead-of-time compilation."""
  s = jax.ShapeDtypeStruct
  return Batch(
      image=s((batch_size, image_size, image_size, 3), np.uint8),
      image_mask=s((batch_size,), np.bool_),
      text=s((batch_size, text_length), np.int32),
      boxes=s((batch_size, regions, 4), np.float32),
      region_text=s((batch_size, regions, region_text_length), np.int32),
      region_mask=s((batch_size, regions), np.bool_))
