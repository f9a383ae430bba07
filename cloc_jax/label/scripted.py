"""Stages without models, whose answers follow from the image's id: to try a cluster and its settings before paying for
models, and to test the engine against answers that are known. `--captioner python:cloc_jax.label.scripted:Captioner`.
"""
from collections.abc import Sequence
import hashlib
import time

import numpy as np

from cloc_jax.label import stages

THINGS = ('a red car', 'the tall tree', 'dog', 'two old windows', 'a bicycle', 'grass', 'the blue sky', 'person')


def _draw(image_id, purpose):
  digest = hashlib.sha256(f'{purpose} {image_id}'.encode()).digest()
  return np.random.default_rng(np.frombuffer(digest, np.uint32))


class Captioner:
  """Names three things, chosen by the image's id, and the size of the picture.

  seconds: time to take for each image, as a model would. fail: ids that end with it are refused.
  """

  def __init__(self, *, seconds: float = 0.0, fail: str | None = None):
    self.version = 'scripted captioner 1'
    self._seconds, self._fail = seconds, fail

  def caption(self, pictures: Sequence[stages.Picture]) -> list[str | Exception]:
    time.sleep(self._seconds * len(pictures))
    return [self._caption(picture) for picture in pictures]

  def _caption(self, picture):
    if self._fail and picture.image_id.endswith(self._fail):
      return RuntimeError('refused as the script says')
    height, width = picture.image.shape[:2]
    chosen = _draw(picture.image_id, 'caption').choice(THINGS, 3, replace=False)
    return f'A picture of {width} by {height} with {chosen[0]}, {chosen[1]} and {chosen[2]}.'


class Phrases:
  """The things of a caption, in its order, without their articles."""

  def __init__(self):
    self.version = 'scripted phrases 1'

  def phrases(self, caption: str, alt_texts: Sequence[str]) -> list[str]:
    found = sorted((caption.find(thing), thing) for thing in THINGS if thing in caption)
    return [thing.removeprefix('a ').removeprefix('the ') for _, thing in found]


class Detector:
  """For every query but the last of each three a box, chosen by the image's id and the query; scores above `threshold`.

  seconds: see Captioner.
  """

  def __init__(self, *, threshold: float = 0.1, seconds: float = 0.0):
    self.version = f'scripted detector 1, threshold {threshold}'
    self._threshold, self._seconds = threshold, seconds

  def detect(self, pictures: Sequence[stages.Picture],
             queries: Sequence[Sequence[str]]) -> list[list[stages.Detection] | Exception]:
    time.sleep(self._seconds * len(pictures))
    return [self._detect(picture.image_id, asked) for picture, asked in zip(pictures, queries, strict=True)]

  def _detect(self, image_id, queries):
    found = []
    for index, query in enumerate(queries):
      draw = _draw(image_id, query)
      x0, y0 = draw.uniform(0, 0.6, 2).round(4)
      width, height = draw.uniform(0.1, 0.4, 2).round(4)
      score = round(draw.uniform(0, 1), 4)
      if index % 3 < 2 and score > self._threshold:
        box = (x0, y0, min(x0 + width, 1), min(y0 + height, 1))
        found.append(stages.Detection(box=tuple(map(float, box)), phrase=index, score=score))
    return found
