"""`cloc eval`, and the evaluations that training runs on schedule: one pass over a split, every metric."""
import logging
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from cloc_jax import dump as dump_lib
from cloc_jax import encoders, evaluators, inference
from cloc_jax.data import eval_pipeline, imagefolder, scan, sources
from cloc_jax.evaluators import suite, zeroshot

_log = logging.getLogger('cloc_jax.evaluate')

# What a person looks at first; the JSON file holds everything.
HEADLINES = (
    ('zeroshot/top1', 'zero-shot classification, top-1'),
    ('zeroshot/macc', 'zero-shot classification, mean per class'),
    ('region_recognition/top1', 'region recognition, top-1'),
    ('region_recognition/macc', 'region recognition, mAcc'),
    ('region_retrieval/r2t_r1', 'region → text, R@1'),
    ('region_retrieval/r2t_r10', 'region → text, R@10'),
    ('region_retrieval/t2r_distinct_r10', 'text → region, R@10'),
    ('image_text_retrieval/i2t_r1', 'image → text, R@1'),
    ('image_text_retrieval/t2i_r1', 'text → image, R@1'),
    ('grounding/acc_iou50', 'grounding, accuracy at IoU 0.5'),
    ('grounding/mean_iou', 'grounding, mean IoU'),
    ('grounding_proposals/acc_iou50', "grounding among the image's boxes, accuracy"),
    ('pointing_game/patch_acc', 'pointing game, best patch'),
)


def run(functions: inference.Functions, params, *, path: str | os.PathLike, split: str, batch_size: int = 64,
        limit: int | None = None, pool_limit: int | None = None, region_embedding: str = 'model',
        progress=None) -> tuple[evaluators.Evaluation, evaluators.Predictions]:
  """Evaluates parameters on a split.

  Args:
    functions, params: the model.
    region_embedding: one of encoders.REGION_EMBEDDINGS; 'model' is the model's own region branch.
    path, split, batch_size, limit, pool_limit, progress: as in `run_encoder`.

  Raises:
    ValueError: on an unknown `region_embedding`; and what the data and the evaluators raise.
  """
  encoder = encoders.with_regions(encoders.of_functions(functions, params), region_embedding)
  return run_encoder(encoder, path=path, split=split, batch_size=batch_size, limit=limit, pool_limit=pool_limit,
                     progress=progress)


def run_encoder(encoder: encoders.Encoder, *, path: str | os.PathLike, split: str, batch_size: int = 64,
                limit: int | None = None, pool_limit: int | None = None,
                progress=None) -> tuple[evaluators.Evaluation, evaluators.Predictions]:
  """Evaluates any encoder on a split.

  Args:
    encoder: from encoders.load and encoders.with_regions.
    path, split: the data set.
    batch_size: images at a time, rounded up to a multiple of the encoder's devices.
    limit: take the first so many images alone.
    pool_limit: take the first so many regions alone for region retrieval.
    progress: called with the number of images done.
  """
  meta = sources.read_meta(path)
  batch_size = -(-batch_size // encoder.devices) * encoder.devices
  batches = eval_pipeline.eval_batches(path, split=split, batch_size=batch_size, image_size=encoder.image_size,
                                  pad=encoder.pad, limit=limit)
  predictions = evaluators.collect(encoder.fns, batches, progress=progress)
  evaluation = evaluators.evaluate_all(predictions, fns=encoder.fns, meta=meta, pool_limit=pool_limit)
  for what, why in evaluation.skipped.items():
    _log.info('%s: %s not measured: %s', split, what, why)
  return evaluation, predictions


def run_imagefolder(encoder: encoders.Encoder, *, path: str | os.PathLike, classes: str | os.PathLike | None = None,
                    batch_size: int = 64, limit: int | None = None,
                    progress=None) -> tuple[evaluators.Evaluation, dict]:
  """Zero-shot classification of a folder with one folder a class.

  Args:
    encoder: from encoders.load.
    path, classes: as imagefolder.read_classes.
    batch_size: images at a time, rounded up to a multiple of the encoder's devices.
    limit: take so many images, spread evenly over the classes.
    progress: called with the number of images done.

  Returns:
    The evaluation, and JSON values about it: per-class accuracy, templates, files that are no images.
  """
  listed = imagefolder.read_classes(path, classes, templates=zeroshot.DEFAULT_TEMPLATES)
  found = imagefolder.find(path, listed, limit=limit)
  batch_size = -(-batch_size // encoder.devices) * encoder.devices
  z, done = [], 0
  for images, count in imagefolder.batches(found, batch_size=batch_size, image_size=encoder.image_size,
                                           pad=encoder.pad):
    z.append(np.asarray(encoder.fns.image_embedding(encoder.fns.encode_image(images)), np.float32)[:count])
    done += count
    if progress is not None:
      progress(done)
  z_image = np.concatenate(z)
  evaluator = evaluators.ZeroShot(class_names=listed.names, encode_text=suite.encoded_once(encoder.fns.encode_text),
                                  templates=listed.templates, prefix='zeroshot/')
  metrics = dict(evaluator.run(z_image=z_image, labels=found.labels))
  per_class = evaluator.per_class(evaluator.ranks(z_image=z_image, labels=found.labels), labels=found.labels)
  evaluation = evaluators.Evaluation(metrics=metrics, skipped={}, protocols={'zeroshot': evaluator.protocol})
  return evaluation, {'per_class': per_class, 'templates': list(listed.templates), 'other_files': found.other_files}


def dump(writer: dump_lib.Writer, predictions: evaluators.Predictions, encoder: encoders.Encoder, *,
         path: str | os.PathLike, split: str) -> None:
  """Adds a split's predictions to a dump."""
  writer.write(predictions, split=split, encode_text=encoder.fns.encode_text,
               categories=sources.read_meta(path).categories)


def splits_to_evaluate(path: str | os.PathLike, splits: Sequence[str] | None) -> list[str]:
  """The asked-for splits, or all but 'train'.

  Raises:
    ValueError: naming the valid ones, on a split that the data set lacks.
  """
  known = list(scan.split_sizes(path, splits))
  return list(splits) if splits is not None else [s for s in known if s != 'train'] or known


def write(evaluation: evaluators.Evaluation, path: str | os.PathLike, **extra) -> pathlib.Path:
  """Writes the JSON file of an evaluation, making its folder."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  evaluation.to_json(path, extra=extra)
  return path


def table(columns: dict[str, dict[str, float]]) -> str:
  """A Markdown table of the headline metrics: {column: metrics} → text, fractions in percent."""
  names = [(key, label) for key, label in HEADLINES if any(key in m for m in columns.values())]
  cell = lambda metrics, key: f'{100 * metrics[key]:.1f}' if key in metrics else '–'
  rows = [['metric, %', *columns], ['---'] * (1 + len(columns))]
  rows += [[label, *(cell(m, key) for m in columns.values())] for key, label in names]
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  lines = ['| ' + ' | '.join(c.ljust(w) for c, w in zip(row, widths)) + ' |' for row in rows]
  lines[1] = '| ' + ' | '.join('-' * w for w in widths) + ' |'
  return '\n'.join(lines)

