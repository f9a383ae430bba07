"""What the engine asks of its three stages, and what passes between them.

The stages never see files, shards or the cluster; the engine never sees a model. A stage is built once in every worker
process and lives there, so it need not be picklable itself. What a stage returns as an Exception loses that image, and
so does what it raises when it is asked about that image alone. ImportError and FileNotFoundError, such as weights that
are not there, stop the run, as does the same error for every image.
"""
from collections.abc import Sequence
import dataclasses
from typing import Protocol

import numpy as np


@dataclasses.dataclass(frozen=True)
class Picture:
  """A decoded image.

  image_id: the name of its record.
  image: (H, W, 3) uint8 RGB, upright (the file's orientation applied).
  alt_texts: the texts that came with it, in their order; may be empty.
  """
  image_id: str
  image: np.ndarray
  alt_texts: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Detection:
  """A box found for a query.

  box: xyxy as fractions of the original image, clipped to it and with area.
  phrase: index into the queries of its image.
  score: confidence, 0 to 1.
  """
  box: tuple[float, float, float, float]
  phrase: int
  score: float


class Captioner(Protocol):
  """Writes a new caption for each image.

  version: names model, prompt and settings; part of the caption cache's keys and of every record.
  """
  version: str

  def caption(self, pictures: Sequence[Picture]) -> list[str | Exception]:
    """One caption a picture, in order; an Exception where that picture alone failed."""


class PhraseExtractor(Protocol):
  """Takes the queries for the detector from an image's texts.

  version: names the method and its settings.
  """
  version: str

  def phrases(self, caption: str, alt_texts: Sequence[str]) -> list[str]:
    """Queries in the order in which the detector is to see them, none twice."""


class Detector(Protocol):
  """Finds boxes for the queries of each image.

  version: names model, resolution, threshold and the like.
  """
  version: str

  def detect(self, pictures: Sequence[Picture],
             queries: Sequence[Sequence[str]]) -> list[list[Detection] | Exception]:
    """Detections of each picture for its own queries, in order; an Exception where that picture alone failed."""
