"""`cloc eval` and `cloc eval-diff`."""
import contextlib
import os
import pathlib
import sys
import time


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
  what.add_argument('--data', metavar='PATH', help='a data set made by `cloc data`')
  what.add_argument('--imagefolder', metavar='DIR', help='zero-shot classification of images, one folder a class')
  evaluate.add_argument('--classes', metavar='FILE.json', help='of an image folder: {"classes": {FOLDER: NAME}, '
                        '"templates": ["a photo of a {}."]}; default: the folders\' names, that template')
  evaluate.add_argument('--split', action='append', metavar='NAME', help='may be repeated; default: all but train')
  evaluate.add_argument('--step', type=int, help='which checkpoint; default: the newest')
  evaluate.add_argument('--batch-size', type=int, default=64)
  evaluate.add_argument('--limit', type=int, help='the first so many images alone; so many, spread evenly, of an image '
                        'folder')
  evaluate.add_argument('--pool-limit', type=int, help='the first so many regions alone, for region retrieval')
  evaluate.add_argument('--region-embedding', choices=('model', 'prompter', 'roi', 'mask-pool', 'crop'),
                        help="model: its own region branch, a Prompter for one (default); roi, mask-pool: of its "
                             "patches (roi is the default for others' encoders); crop: cut every box out and encode it as an "
                             'image')
  evaluate.add_argument('--out', metavar='DIR', help='write SPLIT.json there; default: RUN/evals, or RUN/evals/DATA '
                        "for another data set than the run's own; evals/ENCODER/DATA for others' encoders")
  evaluate.add_argument('--dump', metavar='FILE.parquet', help='also write what was predicted of every region')
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
  from cloc_jax import compiler, encoders, evaluate, sharding
  compiler.keep_compiled()
  mesh = sharding.make_mesh() if jax.device_count() > 1 else None
  encoder = encoders.load(args.checkpoint or args.encoder, step=args.step, tokenizer=args.tokenizer, mesh=mesh)
  if args.imagefolder:
    return _eval_imagefolder(encoder, args)
  if args.classes:
    raise ValueError('--classes belongs to --imagefolder; a data set made by `cloc data` lists its own')
  encoder = encoders.with_regions(encoder, args.region_embedding)
  splits = evaluate.splits_to_evaluate(args.data, args.split)
  out = pathlib.Path(args.out) if args.out else _evals_folder(encoder, args)
  columns = {}
  with _dump(args, encoder) as dumped:
    for split in splits:
      columns[split] = _eval_split(encoder, args, split=split, out=out, dumped=dumped)
  if args.dump:
    print(f'{args.dump}: the predictions', file=sys.stderr)
  print(evaluate.table(columns))
  return 0


def _dump(args, encoder):
  """A context: the writer of the predictions, or None."""
  from cloc_jax import dump
  if not args.dump:
    return contextlib.nullcontext()
  return dump.Writer(args.dump, info={**encoder.info, 'data': os.path.abspath(args.data)})


def _eval_split(encoder, args, *, split, out, dumped):
  from cloc_jax import evaluate
  evaluation, predictions = evaluate.run_encoder(encoder, path=args.data, split=split, batch_size=args.batch_size,
                                                 limit=args.limit, pool_limit=args.pool_limit,
                                                 progress=_counter(split))
  path = evaluate.write(evaluation, out / f'{split}.json', **encoder.info, data=os.fspath(args.data), split=split,
                        limit=args.limit)
  if dumped is not None:
    evaluate.dump(dumped, predictions, encoder, path=args.data, split=split)
  print(f'\r{split}: {path}', file=sys.stderr)
  for what, why in evaluation.skipped.items():
    print(f'{split}: {what} not measured: {why}', file=sys.stderr)
  return evaluation.metrics


def _eval_imagefolder(encoder, args) -> int:
  from cloc_jax import evaluate
  for option in ('split', 'dump', 'region_embedding', 'pool_limit'):
    if getattr(args, option):
      raise ValueError(f'--{option.replace("_", "-")} does not apply to --imagefolder')
  name = pathlib.Path(args.imagefolder).resolve().name
  evaluation, about = evaluate.run_imagefolder(encoder, path=args.imagefolder, classes=args.classes, limit=args.limit,
                                               batch_size=args.batch_size, progress=_counter(name))
  folder = pathlib.Path(args.out) if args.out else _evals_folder(encoder, args)
  path = evaluate.write(evaluation, folder / f'{name}.json', **encoder.info, data=os.path.abspath(args.imagefolder),
                        limit=args.limit, **about)
  print(f'\r{name}: {path}', file=sys.stderr)
  if about['other_files']:
    print(f'{name}: {about["other_files"]} files are no images and were left out', file=sys.stderr)
  print(evaluate.table({name: evaluation.metrics}))
  return 0


def _eval_diff(args) -> int:
  from cloc_jax import eval_diff
  diff = eval_diff.compare(args.a, args.b)
  print(eval_diff.text(diff))
  if args.out:
    print(eval_diff.write_page(diff, args.out, images=args.images))
  return 0


def _evals_folder(encoder, args):
  """The run's own evaluations are what its report shows; anything else gets a folder of its own beside them."""
  info, how = encoder.info, encoder.info.get('region_embedding', 'model')
  data = pathlib.Path(args.data or args.imagefolder).resolve()
  if 'step' not in info:
    return pathlib.Path('evals') / '-'.join([*pathlib.PurePath(info['encoder'].partition(':')[2]).parts[-2:],
                                             data.name, *([how] if how != 'model' else [])])
  folder = pathlib.Path(info['encoder']).parent / 'evals'
  own = pathlib.Path(encoder.trained_on).resolve() == data
  if own and how == 'model' and args.limit is None and args.step is None:
    return folder
  return folder / '-'.join([data.name, f'step{info["step"]}', *([how] if how != 'model' else [])])


def _counter(what):
  began = time.monotonic()

  def show(done):
    if sys.stderr.isatty():
      print(f'\r{what}: {done} images, {done / max(time.monotonic() - began, 1e-9):.0f}/s', end='', file=sys.stderr)
  return show
