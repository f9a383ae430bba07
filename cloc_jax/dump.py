"""Predictions region by region in a Parquet file, for `cloc eval --dump`: what one encoder said of every box.

One row a region, in the order of the data; columns whose evaluator had nothing to measure are null:
  split, image_id, region        the region's number within its image, from 0, among those that are evaluated
  x0, y0, x1, y1                 the box, pixels of the original image
  caption, category
  top_classes, top_scores        the five most similar classes and their cosines, best first
  rank                           how many other classes are at least as similar as the right one; 0 is right
  found_x0 … found_y1, iou       where the box head sees the caption, pixels; IoU with the box
  chosen_iou                     IoU of the image's box that is most similar to the caption
  supplied_x0 … supplied_y1,     the proposal (`--proposals`) that is most similar to the caption, pixels; its IoU with
  supplied_iou                   the box, 0 where the image has no proposals
The schema's metadata holds, under 'cloc_jax', JSON: what was evaluated, and on which data set.
"""
import json
import os
import pathlib

import numpy as np

from cloc_jax import boxes as box_lib
from cloc_jax import evaluators
from cloc_jax.evaluators import ranking

_KEY = b'cloc_jax'
FORMAT = 1
_LATER = ('supplied_x0', 'supplied_y0', 'supplied_x1', 'supplied_y1', 'supplied_iou')  # older files lack them
_ROWS = 100_000  # of a row group: what is held as Python objects at once


class Writer:
  """Writes the rows of one split after another; the file appears when it is closed without an error.

  Args:
    path: the file.
    info: JSON values about encoder and data set.

  Raises:
    ModuleNotFoundError: without pyarrow, saying what to install.
  """

  def __init__(self, path: str | os.PathLike, *, info: dict):
    self._pa, self._parquet = _arrow()
    self.path = pathlib.Path(path)
    self.path.parent.mkdir(parents=True, exist_ok=True)
    self._temporary = self.path.with_name(f'.{self.path.name}.{os.getpid()}.incomplete')
    self._schema = _schema(self._pa).with_metadata({_KEY: json.dumps({'format': FORMAT, **info}).encode()})
    self._file = self._parquet.ParquetWriter(self._temporary, self._schema)

  def __enter__(self):
    return self

  def __exit__(self, kind, error, trace):
    self._file.close()
    if kind is None:
      os.replace(self._temporary, self.path)
    else:
      self._temporary.unlink(missing_ok=True)

  def write(self, predictions: evaluators.Predictions, *, split: str, encode_text, categories) -> None:
    """Adds the regions of a split; `encode_text` and `categories` as RegionRecognition takes them."""
    count = len(predictions.boxes)
    boxes = predictions.in_pixels(predictions.boxes, image=predictions.region_image)
    columns = {
        'split': [split] * count, 'image_id': [predictions.image_ids[i] for i in predictions.region_image],
        'region': np.arange(count) - predictions.first_region[predictions.region_image], 'caption': list(predictions.region_captions),
        'category': list(predictions.categories),
        **{name: boxes[:, i] for i, name in enumerate(('x0', 'y0', 'x1', 'y1'))}}
    columns |= {name: [None] * count for name in self._schema.names if name not in columns}
    recognition = categories and _measured(
        evaluators.RegionRecognition(categories=categories, encode_text=encode_text), predictions)
    if recognition:
      for row, region in enumerate(recognition.region):
        columns['top_classes'][region] = [recognition.categories[c] for c in recognition.top[row]]
        columns['top_scores'][region] = recognition.top_scores[row]
        columns['rank'][region] = int(recognition.rank[row])
    grounding = _measured(evaluators.Grounding(), predictions)
    if grounding:
      for row, region in enumerate(grounding.region):
        columns['iou'][region] = float(grounding.iou[row])
        for name, value in zip(('found_x0', 'found_y0', 'found_x1', 'found_y1'), grounding.pred_boxes[row]):
          columns[name][region] = float(value)
    chosen = _measured(evaluators.ProposalGrounding(), predictions)
    if chosen:
      for row, region in enumerate(chosen.region):
        columns['chosen_iou'][region] = float(chosen.iou[row])
    if predictions.chosen_proposals is not None:
      found = predictions.chosen_proposals
      iou = np.nan_to_num(box_lib.iou(found, boxes))
      for region in np.flatnonzero([bool(ranking.canonical(c)) for c in predictions.region_captions]):
        columns['supplied_iou'][region] = float(iou[region])
        if not np.isnan(found[region]).any():
          for name, value in zip(_LATER, found[region]):
            columns[name][region] = float(value)
    for start in range(0, count, _ROWS):
      part = {name: values[start:start + _ROWS] for name, values in columns.items()}
      self._file.write_table(self._pa.table(part, schema=self._schema))


def read(path: str | os.PathLike) -> tuple[dict[str, list], dict]:
  """(column → values, info) of a dump.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: naming the file, if it is no dump of ours, or of a newer format.
  """
  pa, parquet = _arrow()
  if not os.path.isfile(path):
    raise FileNotFoundError(f'{path}: no such file; `cloc eval --dump FILE.parquet` writes one')
  try:
    table = parquet.read_table(path)
  except pa.ArrowInvalid as error:
    raise ValueError(f'{path}: not a Parquet file: {error}') from error
  info = json.loads((table.schema.metadata or {}).get(_KEY, b'{}'))
  missing = sorted(set(_schema(pa).names) - set(table.column_names) - set(_LATER))
  if not info or missing:
    raise ValueError(f'{path}: not a dump of `cloc eval --dump`: it lacks {missing or "our metadata"}')
  if info['format'] > FORMAT:
    raise ValueError(f'{path}: format {info["format"]}; this version reads up to {FORMAT}')
  return {name: [None] * len(table) for name in _LATER} | table.to_pydict(), info


def _measured(evaluator, predictions):
  try:
    return evaluator.measure(predictions)
  except evaluators.NothingToMeasure:
    return None


def _schema(pa):
  number = pa.float32()
  return pa.schema([
      ('split', pa.string()), ('image_id', pa.string()), ('region', pa.int32()),
      ('x0', number), ('y0', number), ('x1', number), ('y1', number), ('caption', pa.string()),
      ('category', pa.string()), ('top_classes', pa.list_(pa.string())), ('top_scores', pa.list_(number)),
      ('rank', pa.int32()), ('found_x0', number), ('found_y0', number), ('found_x1', number), ('found_y1', number),
      ('iou', number), ('chosen_iou', number), *((name, number) for name in _LATER)])


def _arrow():
  try:
    import pyarrow
    import pyarrow.parquet
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError("dumps of predictions need pyarrow: pip install 'cloc_jax[parquet]'") from error
  return pyarrow, pyarrow.parquet
