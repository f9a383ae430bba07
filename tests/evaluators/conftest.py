"""Small hand-made predictions, shared by the evaluators' tests."""
import numpy as np
import pytest

from cloc_jax.evaluators import Predictions
from cloc_jax.geometry import resize_with_pad


def unit(z):
  z = np.asarray(z, np.float32)
  return z / np.linalg.norm(z, axis=-1, keepdims=True)


def make_predictions(*, images=1, z_image=None, captions=(), caption_image=(), z_caption=None, region_image=(),
                     boxes=None, region_captions=None, categories=None, z_region=None, z_region_text=None,
                     pred_boxes=None, points=None, geometry=None):
  """Predictions with defaults for whatever a test does not look at."""
  k = len(region_image)
  geometry = geometry or [resize_with_pad(height=100, width=100, canvas=100)] * images
  return Predictions(
      image_ids=tuple(f'im{i}' for i in range(images)),
      z_image=np.eye(images, 8, dtype=np.float32) if z_image is None else z_image,
      geometry=tuple(geometry),
      captions=tuple(captions),
      caption_image=np.asarray(caption_image, np.int64),
      z_caption=np.zeros((len(captions), 8), np.float32) if z_caption is None else z_caption,
      boxes=np.tile(np.float32([0, 0, 1, 1]), (k, 1)) if boxes is None else np.asarray(boxes, np.float32),
      region_image=np.asarray(region_image, np.int64),
      region_captions=tuple(region_captions or [''] * k),
      categories=tuple(categories or [''] * k),
      z_region=z_region,
      z_region_text=np.zeros((k, 8), np.float32) if z_region_text is None else z_region_text,
      pred_boxes=None if pred_boxes is None else np.asarray(pred_boxes, np.float32),
      pred_scores=None if pred_boxes is None else np.ones(k, np.float32),
      points=None if points is None else np.asarray(points, np.float32))


@pytest.fixture(name='make_predictions')
def _make_predictions():
  return make_predictions


@pytest.fixture(name='unit')
def _unit():
  return unit
