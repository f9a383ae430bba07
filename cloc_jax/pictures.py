"""Images of a data set by their ids, on the canvas that pages draw on."""
import os
import pathlib

import numpy as np

from cloc_jax.data import sources, transforms
from cloc_jax.geometry import Geometry


def of_data_set(path: str | os.PathLike, wanted: set[tuple[str, str]], *,
                image_size: int = 336) -> tuple[dict[tuple[str, str], tuple[np.ndarray, Geometry]], str]:
  """({(split, image id): (canvas, geometry)} of the (split, image id) wanted, '' or why there are none)."""
  out = {}
  try:
    for split in sorted({split for split, _ in wanted}):
      left = {image_id for s, image_id in wanted if s == split}
      source = sources.open_source(path, split=split)
      for i in range(len(source)):
        if not left:
          break
        try:
          example = source[i]
        except sources.RecordError:
          continue
        if example.image_id in left:
          image = transforms.decode(example.image, where=example.image_id)
          out[split, example.image_id] = transforms.prepare_image(image, image_size=image_size)
          left.remove(example.image_id)
  except (FileNotFoundError, ValueError) as error:
    return {}, str(error)
  return out, ''


def of_files(paths, *, image_size: int = 336) -> dict[str, tuple[np.ndarray, Geometry]]:
  """{path: (canvas, geometry)}; a file that is gone or broken is not there."""
  out = {}
  for path in paths:
    try:
      image = transforms.decode(pathlib.Path(path).read_bytes(), where=path)
    except (OSError, transforms.ImageError):
      continue
    out[path] = transforms.prepare_image(image, image_size=image_size)
  return out
