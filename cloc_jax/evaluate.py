"""`cloc eval`, and the evaluations that training runs on schedule: one pass over a split, every metric."""
import dataclasses
import logging
import os
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from cloc_jax import dump as dump_lib
from cloc_jax import encoders, evaluators, hosts, inference
from cloc_jax.data import eval_pipeline, imagefolder, imagenet, scan, sources
from cloc_jax.data import proposals as proposals_lib
from cloc_jax.evaluators import average_precision, detection, suite, zeroshot
from cloc_jax.evaluators import coverage as coverage_lib

_log = logging.getLogger('cloc_jax.evaluate')

_TEXTS = 2048  # prompts encoded between two reports of progress
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
    ('grounding_supplied/acc_iou50', 'grounding among the supplied boxes, accuracy'),
    ('pointing_game/patch_acc', 'pointing game, best patch'),
    ('detection/ap', 'detection over the supplied boxes, AP'),
    ('detection/ap50', 'detection over the supplied boxes, AP50'),
    ('detection/ap_rare', 'detection over the supplied boxes, AP of rare classes'),
)
# (evaluator, direction) → the metric that counts the pool, and what is in it.
_POOLS = {
    ('region_retrieval', 'r2t'): ('distinct_texts', 'texts'),
    ('region_retrieval', 't2r'): ('pool', 'boxes'),
    ('image_text_retrieval', 'i2t'): ('captions', 'captions'),
    ('image_text_retrieval', 't2i'): ('images', 'images'),
}


def run(functions: inference.Functions, params, *, path: str | os.PathLike, split: str, batch_size: int = 64,
        limit: int | None = None, pool_limit: int | None = None, region_embedding: str = 'model',
        progress=None) -> tuple[evaluators.Evaluation, evaluators.Predictions | None]:
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
                limit: int | None = None, pool_limit: int | None = None, allow_missing: bool = False,
                proposals: str | os.PathLike | None = None,
                progress=None) -> tuple[evaluators.Evaluation, evaluators.Predictions | None]:
  """Evaluates any encoder on a split.

  Several hosts share the images, each with an encoder that needs no other host; all of them must call this. Every host
  gets the evaluation, and the first one the predictions; the figures are those of one host alone.

  Args:
    encoder: from encoders.load and encoders.with_regions.
    path, split: the data set.
    batch_size: images at a time on each host, rounded up to a multiple of the encoder's devices.
    limit: take the first so many images alone.
    pool_limit: take the first so many regions alone for region retrieval.
    allow_missing: leave out, and count, images that cannot be read.
    proposals: a file of boxes (data.proposals.read) for zero-shot detection and grounding, beside the other figures.
    progress: called with the number of images that this host has done.

  Raises:
    data.transforms.ImageError, data.sources.RecordError: naming what cannot be read, without `allow_missing`.
    hosts.HostError: if another host failed.
  """
  evaluation = detector = None
  with hosts.together():
    meta = sources.read_meta(path)
    batch_size = -(-batch_size // encoder.devices) * encoder.devices
    once = limit is None and not jax.process_index()  # what the import lost is counted by one host
    lost = coverage_lib.lost_in_import(meta, split) if once else (0, 0)
    counter = coverage_lib.Counter(lost_images=lost[0], lost_regions=lost[1])
    batches = counter(eval_pipeline.eval_batches(
        path, split=split, batch_size=batch_size, image_size=encoder.image_size, pad=encoder.pad, limit=limit,
        on_error='mask' if allow_missing else 'raise', process_index=jax.process_index(),
        process_count=jax.process_count()))
    fns = encoder.fns
    if proposals is not None:
      fns = detection.once(fns)
      proposed = proposals_lib.read(proposals)
      detector = _detector(fns, proposed, where=os.fspath(proposals), path=path, split=split, meta=meta)
      batches = detector.watch(fns, batches)
    predictions = evaluators.collect(fns, batches, progress=progress, allow_empty=jax.process_count() > 1)
  predictions = evaluators.gather(predictions)
  counters = hosts.gather(counter)
  found = hosts.gather(detector.share) if detector is not None else None
  with hosts.together():
    if predictions is not None:
      evaluation = evaluators.evaluate_all(predictions, fns=fns, meta=meta, pool_limit=pool_limit)
      evaluation = dataclasses.replace(evaluation, coverage=coverage_lib.total(counters))
      if found is not None:
        detector.take(found)
        predictions = dataclasses.replace(predictions, chosen_proposals=detector.chosen(predictions))
        _add_detections(evaluation, detector)
        _report_left_out(proposed, detector, where=os.fspath(proposals))
  evaluation = hosts.from_first(evaluation)
  if evaluation.coverage.unusable:
    _log.warning('%s: %d regions have no area, or no words; left out', split, evaluation.coverage.unusable)
  for what, why in evaluation.skipped.items():
    _log.info('%s: %s not measured: %s', split, what, why)
  return evaluation, predictions


def _detector(fns, proposed, *, where, path, split, meta) -> detection.Detection:
  """Refuses what would only show after an hour of encoding."""
  if fns.embed_regions is None:
    raise ValueError('proposals: this encoder embeds no regions; choose roi, mask-pool or crop')
  average_precision.check_installed()
  proposed.check(proposed.some_sizes(sources.open_source(path, split=split)), where=where)
  return detection.Detection(categories=meta.categories, encode_text=fns.encode_text, proposals=proposed.of,
                             truth=average_precision.truth_of(meta, split))


def _report_left_out(proposed, detector, *, where) -> None:
  for count, what in ((len(proposed.boxes) - detector.images_with_proposals,
                       'images have proposals but were not evaluated: not in the split, or left out of this run'),
                      (proposed.dropped, 'proposals have no area; left out')):
    if count:
      _log.warning('%s: %d %s', where, count, what)


def _add_detections(evaluation, detector) -> None:
  found = dict(detector.run())
  measured = {name.partition('/')[0] for name in found}
  evaluation.metrics.update(found)
  evaluation.protocols.update({name: p for name, p in detector.protocols.items() if name in measured})
  if 'detection' not in measured:
    evaluation.skipped['detection'] = 'the data set lists no categories'


def run_imagefolder(encoder: encoders.Encoder, *, path: str | os.PathLike, classes: str | os.PathLike | None = None,
                    task: str | None = None, labels: str | os.PathLike | None = None, allow_missing: bool = False,
                    batch_size: int = 64, limit: int | None = None, progress=None,
                    text_progress=None) -> tuple[evaluators.Evaluation, dict, zeroshot.Classified]:
  """Zero-shot classification of a folder with one folder a class; on several hosts as `run_encoder`.

  Args:
    encoder: from encoders.load.
    path, classes: as imagefolder.read_classes.
    task: one of imagenet.TASKS in place of `classes`; the folder must then hold what was published.
    labels: of a flat folder, as imagenet.find.
    allow_missing: leave out, and count, images that are missing or cannot be read.
    batch_size: images at a time on each host, rounded up to a multiple of the encoder's devices.
    limit: take so many images, spread evenly over the classes.
    progress: called with the number of images that this host has done.
    text_progress: called with the number of prompts done: ImageNet has 80 000.

  Returns:
    The evaluation; JSON values about it: per-class accuracy, templates, files that are no images; and what became of
    each image.
  """
  with hosts.together():
    if task is not None:
      if classes is not None:
        raise ValueError('classes: a task has its own; give one of the two')
      chosen = imagenet.read_task(task)
      listed, protocol = chosen.classes, chosen.protocol
      found = imagenet.find(path, chosen, labels=labels, allow_missing=allow_missing, limit=limit)
    else:
      if labels is not None:
        raise ValueError('labels: they belong to a task')
      listed, protocol = imagefolder.read_classes(path, classes, templates=zeroshot.DEFAULT_TEMPLATES), None
      found = imagefolder.find(path, listed, limit=limit)
    share = found.share(jax.process_index(), of=jax.process_count())
    encoded = _encode_folder(encoder, share, batch_size=batch_size, on_error='mask' if allow_missing else 'raise',
                             progress=progress)
  encoded, result = hosts.gather(encoded), None
  with hosts.together():
    if encoded is not None:
      z, valid = (_dealt_out(parts) for parts in zip(*encoded))
      result = _zeroshot(encoder, listed, found, z=z, valid=valid, protocol=protocol, text_progress=text_progress)
  return hosts.from_first(result)


def _encode_folder(encoder, found, *, batch_size, on_error, progress) -> tuple[np.ndarray, np.ndarray]:
  """(embeddings (n, E), whether each image could be read (n,)); of a masked image the row means nothing."""
  batch_size = -(-batch_size // encoder.devices) * encoder.devices
  z, valid, done = [], [], 0
  for images, kept in imagefolder.batches(found, batch_size=batch_size, image_size=encoder.image_size, pad=encoder.pad,
                                          on_error=on_error):
    z.append(np.asarray(encoder.fns.image_embedding(encoder.fns.encode_image(images)), np.float32))
    valid.append(kept)
    done += int(kept.sum())
    if progress is not None:
      progress(done)
  count = len(found.paths)
  return (np.concatenate(z)[:count], np.concatenate(valid)[:count]) if z else (np.zeros((0, 0), np.float32),
                                                                                np.zeros(0, bool))


def _dealt_out(parts) -> np.ndarray:
  """Rows that hosts had in turns → all of them in order. A host without rows knows no width."""
  some = next((part for part in parts if len(part)), parts[0])
  out = np.empty((sum(map(len, parts)), *some.shape[1:]), some.dtype)
  for host, part in enumerate(parts):
    if len(part):
      out[host::len(parts)] = part
  return out


def _zeroshot(encoder, listed, found, *, z, valid, protocol, text_progress):
  z_image, labels = z[valid], found.labels[valid]
  unreadable = [str(found.paths[i]) for i in np.flatnonzero(~valid)]
  encode_text = suite.encoded_once(_in_parts(encoder.fns.encode_text, text_progress))
  evaluator = evaluators.ZeroShot(class_names=listed.names, encode_text=encode_text, templates=listed.templates,
                                  prefix='zeroshot/')
  metrics = dict(evaluator.run(z_image=z_image, labels=labels))
  classified = evaluator.measure(z_image=z_image, labels=labels)
  per_class = evaluator.per_class(classified.rank, labels=labels)
  classified = dataclasses.replace(classified, images=tuple(str(found.paths[i]) for i in np.flatnonzero(valid)))
  coverage = evaluators.Coverage(images=len(labels), of_images=found.expected or len(found.paths),
                                 unreadable=tuple(unreadable[:coverage_lib.NAMED]))
  protocols = {'zeroshot': evaluator.protocol} | ({'task': protocol} if protocol else {})
  evaluation = evaluators.Evaluation(metrics=metrics, skipped={}, coverage=coverage, protocols=protocols)
  about = {'per_class': per_class, 'templates': list(listed.templates), 'other_files': found.other_files}
  return evaluation, about, classified


def _in_parts(encode_text, progress):
  """The same function, a few thousand texts at a time."""
  def wrapper(texts, *, region):
    z = []
    for start in range(0, len(texts), _TEXTS):
      z.append(np.asarray(encode_text(texts[start:start + _TEXTS], region=region), np.float32))
      if progress is not None:
        progress(min(start + _TEXTS, len(texts)))
    return np.concatenate(z)
  return wrapper


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


def table(columns: dict[str, dict[str, float]], coverage: dict[str, evaluators.Coverage] | None = None) -> str:
  """A Markdown table of the headline metrics: {column: metrics} → text, fractions in percent.

  Where `coverage` of a column says that something is missing, how much of how much stands beside each figure.
  """
  names = [(key, label) for key, label in HEADLINES if any(key in m for m in columns.values())]
  cell = lambda column, key: figure(columns[column], key, (coverage or {}).get(column))
  rows = [['metric, %', *columns]] + [[label, *(cell(c, key) for c in columns)] for key, label in names]
  return markdown(rows)


def figure(metrics: dict[str, float], key: str, coverage: evaluators.Coverage | None) -> str:
  """A figure in percent, with the coverage beside it where something is missing; '–' where it was not measured.

  Of a retrieval it says among how many: figures over pools of different sizes are not comparable.
  """
  if key not in metrics:
    return '–'
  evaluator, _, name = key.partition('/')
  of, what = _POOLS.get((evaluator, name.partition('_')[0]), ('', ''))
  pool = f' among {int(metrics[f"{evaluator}/{of}"]):,} {what}' if f'{evaluator}/{of}' in metrics else ''
  return f'{100 * metrics[key]:.1f}{"" if coverage is None else coverage.beside(key)}{pool}'


def markdown(rows: Sequence[Sequence[str]]) -> str:
  """Rows of cells, the first the head, as a Markdown table with aligned columns."""
  rows = [[cell.replace('|', '\\|') for cell in row] for row in rows]
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  lines = ['| ' + ' | '.join(c.ljust(w) for c, w in zip(row, widths)) + ' |' for row in rows]
  return '\n'.join([lines[0], '| ' + ' | '.join('-' * w for w in widths) + ' |', *lines[1:]])
