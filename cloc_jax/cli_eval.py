"""`cloc eval` and `cloc eval-diff`."""
import contextlib
import dataclasses
import os
import pathlib
import sys
import time

from cloc_jax import cli_hosts


_SECONDS_BETWEEN_LINES = 30  # of progress, where there is no terminal


def add_verbs(verbs) -> None:
  """Adds both to the verbs of `cloc`."""
  evaluate = verbs.add_parser(
      'eval', help='evaluate a checkpoint, or any other encoder, on a data set',
      description='Encodes a split once and computes every metric that its annotations allow.')
  which = evaluate.add_mutually_exclusive_group(required=True)
  which.add_argument('--checkpoint', metavar='DIR', help="a run's folder, or one step of it")
  which.add_argument('--encoder', metavar='SPEC', help='hf:DIR or hf:OWNER/NAME: a CLIP, SigLIP or SigLIP 2 of Hugging '
                     'Face; open_clip:FILE, openai:FILE or big_vision:FILE; or a checkpoint of ours')
  evaluate.add_argument('--tokenizer', metavar='KIND:PATH', help='of an open_clip, openai or big_vision encoder '
                        'without one beside it: clip:, siglip:, sentencepiece: or hf:')
  what = evaluate.add_mutually_exclusive_group(required=True)
  what.add_argument('--data', metavar='PATH', help='a data set made by `cloc data`, or files as they are: '
                    'coco:images=DIR,instances=FILE.json, jsonl:FILE.jsonl, webdataset:DIR/*.tar (docs/data.md)')
  what.add_argument('--imagefolder', metavar='DIR', action='append', help='zero-shot classification of images, one '
                    'folder a class; may be repeated')
  evaluate.add_argument('--classes', metavar='FILE.json', action='append', help='of an image folder: {"classes": '
                        '{FOLDER: NAME}, "templates": ["a photo of a {}."]}; default: the folders\' names, that '
                        'template. Of several folders: one each, in their order')
  evaluate.add_argument('--task', choices=('imagenet', 'imagenet-v2', 'imagenet-a', 'imagenet-r', 'imagenet-sketch'),
                        help="of an image folder: ImageNet's classes, with CLIP's names and 80 templates")
  evaluate.add_argument('--labels', metavar='FILE', help="with --task imagenet, of the validation archive's flat "
                        'folder: LOC_val_solution.csv, or lines «FILE WNID»')
  evaluate.add_argument('--proposals', metavar='FILE', help="boxes of a detector, for zero-shot detection (AP) and "
                        "grounding: COCO's results as JSON, or NPZ with image_id, bbox (xywh, pixels) and score")
  evaluate.add_argument('--allow-missing', action='store_true', help='leave out images that are missing or unreadable, '
                        'and print beside every figure how many of how many it is of')
  evaluate.add_argument('--split', action='append', metavar='NAME', help='may be repeated; default: all but train')
  evaluate.add_argument('--step', type=int, help='which checkpoint; default: the newest')
  evaluate.add_argument('--batch-size', type=int, default=64)
  evaluate.add_argument('--limit', type=int, help='the first so many images alone; so many, spread evenly, of an image '
                        'folder')
  evaluate.add_argument('--pool-limit', type=int, help='the first so many boxes alone, for region retrieval')
  evaluate.add_argument('--region-embedding', choices=('model', 'prompter', 'roi', 'mask-pool', 'crop'),
                        help="model: its own region branch, a Prompter for one (default); roi, mask-pool: of its "
                             "patches (roi is the default for others' encoders); crop: cut every box out and encode it "
                             'as an image')
  evaluate.add_argument('--out', metavar='DIR', help='write SPLIT.json there; default: RUN/evals, or RUN/evals/DATA '
                        "for another data set than the run's own; evals/ENCODER/DATA for others' encoders")
  evaluate.add_argument('--dump', metavar='FILE.parquet', help='also write what was predicted of every region')
  evaluate.add_argument('--report', metavar='FILE', action='append', default=[], help='also write a page (.html) with '
                        'examples, confusions and published figures, or the figures as Markdown (.md); may be repeated')
  cli_hosts.add_arguments(evaluate)
  evaluate.set_defaults(run=_eval)

  diff = verbs.add_parser('eval-diff', help='compare the dumps of two evaluations: which boxes flipped',
                          description='Says which regions one encoder has right and the other wrong, by class.')
  diff.add_argument('a', metavar='A.parquet', help='written by `cloc eval --dump`')
  diff.add_argument('b', metavar='B.parquet')
  diff.add_argument('--out', metavar='FILE.html', help='also write a page with pictures of some')
  diff.add_argument('--images', type=int, default=24, help='pictures of each kind')
  diff.set_defaults(run=_eval_diff)


def _eval(args) -> int:
  import jax
  cli_hosts.join(args)
  from cloc_jax import compiler, encoders, eval_report, evaluate, hosts, sharding
  from cloc_jax.data import spec
  for report in args.report:
    eval_report.check_name(report)
  compiler.keep_compiled()
  # Several hosts share the images, and need nothing of each other while they encode them.
  mesh = sharding.make_mesh(devices=jax.local_devices()) if jax.local_device_count() > 1 else None
  with hosts.together():
    encoder = encoders.load(args.checkpoint or args.encoder, step=args.step, tokenizer=args.tokenizer, mesh=mesh)
  if args.imagefolder:
    return _eval_imagefolders(encoder, args)
  for option in ('classes', 'task', 'labels'):
    if getattr(args, option):
      raise ValueError(f'--{option} belongs to --imagefolder; a data set made by `cloc data` lists its own classes')
  encoder = encoders.with_regions(encoder, args.region_embedding)
  with hosts.together():
    splits = evaluate.splits_to_evaluate(args.data, args.split)
    writer = _dump(args, encoder)
  out = pathlib.Path(args.out) if args.out else _evals_folder(encoder, args, data=args.data)
  parts = []
  with writer as dumped:
    for split in splits:
      parts.append(_eval_split(encoder, args, split=split, out=out, dumped=dumped))
  if jax.process_index():
    return 0
  if args.dump:
    print(f'{args.dump}: the predictions', file=sys.stderr)
  _print_and_report(parts, encoder, args, data=spec.absolute(args.data))
  return 0


def _dump(args, encoder):
  """A context: the writer of the predictions, or None."""
  import jax
  from cloc_jax import dump
  from cloc_jax.data import spec
  if not args.dump or jax.process_index():
    return contextlib.nullcontext()
  return dump.Writer(args.dump, info={**encoder.info, 'data': spec.absolute(args.data), **_proposals(args)})


def _proposals(args) -> dict[str, str]:
  return {'proposals': os.path.abspath(args.proposals)} if args.proposals else {}


def _eval_split(encoder, args, *, split, out, dumped):
  from cloc_jax import eval_report, evaluate, findings, hosts, pictures, published
  from cloc_jax.data import scan, sources
  with hosts.together():
    size = scan.split_sizes(args.data, [split])[split]
  evaluation, predictions = evaluate.run_encoder(encoder, path=args.data, split=split, batch_size=args.batch_size,
                                                 limit=args.limit, pool_limit=args.pool_limit,
                                                 allow_missing=args.allow_missing, proposals=args.proposals,
                                                 progress=_counter(split, total=min(size, args.limit or size)))
  with hosts.together():
    if predictions is None:  # the first host writes
      return None
    path = evaluate.write(evaluation, out / f'{split}.json', **encoder.info, data=os.fspath(args.data), split=split,
                          limit=args.limit, **_proposals(args))
    if dumped is not None:
      evaluate.dump(dumped, predictions, encoder, path=args.data, split=split)
  print(f'\r{split}: {path}', file=sys.stderr)
  for what, why in evaluation.skipped.items():
    print(f'{split}: {what} not measured: {why}', file=sys.stderr)
  _say_coverage(split, evaluation.coverage)
  meta = sources.read_meta(args.data)
  part = eval_report.Part(split, evaluation, data=published.data_of(meta), categories=meta.categories)
  if not any(report.endswith('.html') for report in args.report):
    return part
  found = findings.choose(predictions, categories=meta.categories, encode_text=encoder.fns.encode_text)
  drawn, missing = pictures.of_data_set(args.data, {(split, image) for image in found.images})
  return dataclasses.replace(part, found=found, pictures={image: p for (_, image), p in drawn.items()}, missing=missing)


def _eval_imagefolders(encoder, args) -> int:
  import jax
  from cloc_jax import hosts
  from cloc_jax.data import imagefolder
  for option in ('split', 'dump', 'region_embedding', 'pool_limit', 'proposals'):
    if getattr(args, option):
      raise ValueError(f'--{option.replace("_", "-")} does not apply to --imagefolder')
  folders, classes = args.imagefolder, args.classes or [None] * len(args.imagefolder)
  if len(classes) != len(folders):
    raise ValueError(f'--classes: expected none, or one for each of {len(folders)} image folders, got {len(classes)}')
  if len(folders) > 1 and (args.task or args.labels):
    raise ValueError('--task and --labels are of one --imagefolder')
  names = _names(folders)
  if not args.task:  # a wrong one shows now, not when the others are through
    with hosts.together():
      for folder, listed in zip(folders, classes):
        imagefolder.read_classes(folder, listed, templates=())
  parts = [_eval_imagefolder(encoder, args, folder, name=name, classes=listed)
           for folder, name, listed in zip(folders, names, classes)]
  if not jax.process_index():
    _print_and_report(parts, encoder, args, data=', '.join(map(os.path.abspath, folders)))
  return 0


def _names(folders) -> list[str]:
  """The folders' names, with as many of those above them as it takes to tell them apart."""
  paths = [pathlib.Path(folder).resolve() for folder in folders]
  if len(set(paths)) < len(paths):
    raise ValueError(f'--imagefolder: a folder is there twice: {", ".join(folders)}')
  for depth in range(1, max(len(path.parts) for path in paths) + 1):
    names = ['-'.join(path.parts[-depth:]).lstrip('/') for path in paths]
    if len(set(names)) == len(names):
      break
  return names


def _eval_imagefolder(encoder, args, images, *, name, classes):
  """One folder's eval_report.Part, on the first host."""
  import jax
  from cloc_jax import eval_report, evaluate, findings, pictures
  from cloc_jax.data import imagenet
  total, prompts = None, None
  if args.task:
    task = imagenet.read_task(args.task)
    total = min(task.images, args.limit or task.images)
    prompts = len(task.classes.names) * len(task.classes.templates)
  evaluation, about, classified = evaluate.run_imagefolder(
      encoder, path=images, classes=classes, task=args.task, labels=args.labels, limit=args.limit,
      allow_missing=args.allow_missing, batch_size=args.batch_size, progress=_counter(name, total=total),
      text_progress=_counter(name, what='prompts', total=prompts))
  if jax.process_index():
    return None
  folder = pathlib.Path(args.out) if args.out else _evals_folder(encoder, args, data=images, name=name)
  path = evaluate.write(evaluation, folder / f'{name}.json', **encoder.info, data=os.path.abspath(images),
                        limit=args.limit, **about)
  print(f'\r{name}: {path}', file=sys.stderr)
  if about['other_files']:
    print(f'{name}: {about["other_files"]} files are no images, or in no class folder, and were left out',
          file=sys.stderr)
  _say_coverage(name, evaluation.coverage)
  part = eval_report.Part(name, evaluation, data=args.task or '')
  if any(report.endswith('.html') for report in args.report):
    found = findings.of_folder(classified)
    part = dataclasses.replace(part, found=found, pictures=pictures.of_files(found.images))
  return part


def _print_and_report(parts, encoder, args, *, data) -> None:
  from cloc_jax import eval_report, evaluate
  for report in args.report:
    print(f'{eval_report.write(parts, report, info=encoder.info, data=data)}: the report', file=sys.stderr)
  print(evaluate.table({p.name: p.evaluation.metrics for p in parts}, {p.name: p.evaluation.coverage for p in parts}))


def _say_coverage(name, coverage) -> None:
  if not coverage.complete:
    print(f'{name}: measured on {coverage}', file=sys.stderr)
  for why in coverage.unreadable:
    print(f'{name}: left out: {why}', file=sys.stderr)


def _eval_diff(args) -> int:
  from cloc_jax import eval_diff
  diff = eval_diff.compare(args.a, args.b)
  print(eval_diff.text(diff))
  if args.out:
    print(eval_diff.write_page(diff, args.out, images=args.images))
  return 0


def _evals_folder(encoder, args, *, data, name=None):
  """The run's own evaluations are what its report shows; anything else gets a folder of its own beside them."""
  from cloc_jax.data import spec
  info, how = encoder.info, encoder.info.get('region_embedding', 'model')
  name = name or spec.short_name(data)
  if 'step' not in info:
    return pathlib.Path('evals') / '-'.join([*pathlib.PurePath(info['encoder'].partition(':')[2]).parts[-2:],
                                             name, *([how] if how != 'model' else [])])
  folder = pathlib.Path(info['encoder']).parent / 'evals'
  own = bool(encoder.trained_on) and spec.absolute(encoder.trained_on) == spec.absolute(data)
  if own and how == 'model' and args.limit is None and args.step is None:
    return folder
  return folder / '-'.join([name, f'step{info["step"]}', *([how] if how != 'model' else [])])


def _counter(name, what='images', *, total=None):
  """Shows how many of `total` are done, how fast, and when it ends: in place on a terminal, else now and then."""
  import jax
  first: list = []  # when the first were done, and how many: what came before is another thing's time
  hosts = jax.process_count()
  each = '' if hosts == 1 else f' on each of {hosts} hosts'
  said = time.monotonic()

  def show(done):
    nonlocal said
    now = time.monotonic()
    first[:] = first or [now, done]
    if jax.process_index() or not (sys.stderr.isatty() or now - said > _SECONDS_BETWEEN_LINES):
      return
    said, line = now, f'{name}: {done:,}' + (f' of {-(-total // hosts):,}' if total else '') + f' {what}{each}'
    rate = (done - first[1]) / (now - first[0]) if now > first[0] else 0
    if rate:
      line += f', {rate:.0f}/s' if rate >= 10 else f', {rate:.2g}/s'
      left = max(0, -(-total // hosts) - done) / rate if total else 0
      line += f', {left / 60:.0f} min left' if left >= 90 else f', {left:.0f} s left' if total else ''
    if sys.stderr.isatty():
      print(f'\r{line}\x1b[K', end='', file=sys.stderr)
    else:
      print(line, file=sys.stderr)
  return show
