"""What the detectors share: batches, images prepared while the model works, one image's error kept to that image."""
import concurrent.futures
import itertools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from cloc_jax.label import checkpoints, detections, stages


class BatchedDetector(checkpoints.Lazy):
  """Base of the detectors. A subclass says how images and texts reach its model: see the methods at the end.

  Args:
    name: a folder, or OWNER/NAME on the hub. kind: its model type.
    threshold: boxes must be more confident than this; the default is the paper's.
    nms: see detections.select; off by default, these models are trained to predict an object once.
    batch_size: images at once. threads: that prepare images while the model works.
    device, dtype: by default an accelerator and bfloat16 if there is one, else the CPU and float32.
    template: what a phrase is put into, such as 'a photo of a {}'.
    revision: of a repository on the hub.
    settings: the subclass's own, for the version.

  Raises:
    ValueError: on a value out of range. FileNotFoundError: if the folder is not there.
  """

  def __init__(self, name: str, *, kind: str, threshold: float = 0.1, nms: float | None = None, batch_size: int = 8,
               threads: int = 4, device: str | None = None, dtype: str | None = None, template: str = '{}',
               revision: str | None = None, settings: dict | None = None):
    for key, value in dict(threshold=threshold, nms=nms).items():
      if value is not None and not 0 <= value <= 1:
        raise ValueError(f'detector: {key}: expected a number from 0 to 1, got {value}')
    for key, value in dict(batch_size=batch_size, threads=threads).items():
      if value < 1:
        raise ValueError(f'detector: {key}: expected at least 1, got {value}')
    if template.count('{}') != 1:
      raise ValueError(f"detector: template: expected one '{{}}' for the phrase, got {template!r}")
    name = os.path.expanduser(name)
    self.name, self.kind, self.revision = name, kind, revision
    self.threshold, self.nms, self.batch_size, self.threads = threshold, nms, batch_size, threads
    self.device, self.dtype, self.template = device, dtype, template
    self.version = checkpoints.version(
        f'{kind}:{checkpoints.identify(name, revision=revision)}', **(settings or {}), threshold=threshold, nms=nms,
        dtype=dtype, template=None if template == '{}' else template)

  def detect(self, pictures: Sequence[stages.Picture],
             queries: Sequence[Sequence[str]]) -> list[list[stages.Detection] | Exception]:
    """Detections of each picture for its own queries, the most confident first; no queries, no detections.

    Each box has the phrase that fits it best. OWL encodes a distinct phrase once a call, so long lists of pictures
    are cheaper than short ones.

    Raises:
      FileNotFoundError, ValueError, ImportError: if the model cannot be loaded; that concerns all pictures.
    """
    if len(pictures) != len(queries):
      raise ValueError(f'detect: expected queries for each of {len(pictures)} pictures, got {len(queries)} lists')
    self.open()
    results: list[Any] = [[] for _ in pictures]
    asked = []
    for i, (picture, phrases) in enumerate(zip(pictures, queries)):
      image = picture.image
      if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or not image.size:
        results[i] = ValueError(f'{picture.image_id}: expected (H, W, 3) uint8 pixels, got {image.shape} {image.dtype}')
      elif phrases:
        asked.append(i)
    # No half characters: tokenizers refuse them, and with them a whole batch.
    texts = {i: [self.template.replace('{}', q.encode('utf-8', 'replace').decode()) for q in queries[i]] for i in asked}
    encoded = self.encode_texts(texts)
    chunks = self._chunks(asked, pictures)
    with concurrent.futures.ThreadPoolExecutor(self.threads) as pool:
      submit = lambda chunk: [(i, pool.submit(self.prepare, pictures[i].image)) for i in chunk]
      ahead = submit(chunks[0]) if chunks else []
      for number in range(len(chunks)):
        now, ahead = ahead, submit(chunks[number + 1]) if number + 1 < len(chunks) else []
        ready = []
        for i, future in now:
          if error := future.exception():
            results[i] = error
          else:
            ready.append((i, *future.result()))
        found = checkpoints.each_alone(lambda jobs: self._predict(jobs, encoded), ready)
        for (i, _, extent), raw in zip(ready, found):
          # Boxes are chosen while the model works on the next images.
          results[i] = raw if isinstance(raw, Exception) else pool.submit(
              detections.select, *raw, extent=extent, height=pictures[i].image.shape[0],
              width=pictures[i].image.shape[1], threshold=self.threshold, nms=self.nms)
    for i, result in enumerate(results):
      if isinstance(result, concurrent.futures.Future):
        results[i] = result.exception() or result.result()
    return results

  def _chunks(self, asked, pictures):
    """Lists of up to batch_size indices whose pictures have the same shape once prepared."""
    shape = {i: self.prepared_shape(*pictures[i].image.shape[:2]) for i in asked}
    out = []
    for _, same in itertools.groupby(sorted(asked, key=shape.get), key=shape.get):
      same = list(same)
      out += [same[k:k + self.batch_size] for k in range(0, len(same), self.batch_size)]
    return out

  def _predict(self, jobs, encoded):
    return self.forward(np.stack([canvas for _, canvas, _ in jobs]), [i for i, *_ in jobs], encoded) if jobs else []

  def prepared_shape(self, height: int, width: int) -> tuple[int, int]:
    """Shape of a prepared image; only images of one shape share a batch, so none is padded for another's sake."""
    raise NotImplementedError

  def prepare(self, image: np.ndarray) -> tuple[np.ndarray, tuple[float, float]]:
    """(H, W, 3) uint8 → the canvas (h, w, 3) uint8 and which part is image: see detections.select. In a thread."""
    raise NotImplementedError

  def encode_texts(self, texts: dict[int, list[str]]) -> Any:
    """Whatever `forward` needs of all pictures' texts."""
    raise NotImplementedError

  def forward(self, canvases: np.ndarray, numbers: list[int], encoded: Any) -> list[tuple[np.ndarray, ...]]:
    """A picture's boxes (n, 4) as fractions of the canvas, centre and size; scores (n,); each one's best text (n,)."""
    raise NotImplementedError
