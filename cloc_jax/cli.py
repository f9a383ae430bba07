"""`cloc`: the verbs a user types. Each imports what it needs when it runs, so that --help is quick."""
import argparse
import contextlib
import json
import logging
import os
import pathlib
import sys
import time

from cloc_jax import cli_import

# Errors that the user can mend: shown as one line, without a traceback (--debug shows it).
_USER_ERRORS = (ValueError, TypeError, KeyError, FileNotFoundError, FileExistsError, PermissionError,
                ModuleNotFoundError)


def main(argv=None) -> int:
  """Runs a verb; returns the exit status."""
  argv = list(sys.argv[1:] if argv is None else argv)
  from cloc_jax import config as config_lib
  assignments, others = config_lib.split_overrides(argv)
  args = _parser().parse_args(others)
  if assignments and args.verb not in ('train', 'plan'):
    _parser().error('--config.KEY=VALUE belongs to `cloc train` and `cloc plan`')
  args.assignments = assignments
  logging.basicConfig(level=logging.DEBUG if args.debug else logging.WARNING, format='%(levelname)s %(message)s')
  # Orbax reports every save at a level that drowns what a person wants to read.
  logging.getLogger('absl').setLevel(logging.DEBUG if args.debug else logging.ERROR)
  try:
    return args.run(args) or 0
  except Exception as error:
    if args.debug or not _is_for_user(error):
      raise
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    print(f'cloc {args.verb}: {message}', file=sys.stderr)
    return 2


def _is_for_user(error) -> bool:
  from cloc_jax.checkpoint import CheckpointError
  return isinstance(error, (*_USER_ERRORS, CheckpointError, FloatingPointError))


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
      prog='cloc', description='Contrastive localized language-image pre-training: make data, plan, train, evaluate.',
      epilog='`cloc VERB --help` explains a verb.')
  parser.add_argument('--debug', action='store_true', help='show tracebacks and the logs of the libraries')
  verbs = parser.add_subparsers(dest='verb', required=True, metavar='VERB')

  train = verbs.add_parser(
      'train', help='train an experiment, or resume it',
      description='Trains the experiment of a config file. Run the same command again to resume after a stop.',
      epilog='Any value of the config can be changed: --config.optim.learning_rate=1e-3 --config.data.path=DIR. '
             'Unknown keys and wrong types fail at once.')
  train.add_argument('--config', required=True, metavar='FILE.py[:ARGS]', help='e.g. configs/scenes_local.py')
  train.add_argument('--workdir', required=True, metavar='DIR', help='checkpoints, metrics and evaluations go here')
  train.add_argument('--report', action='store_true', help='write WORKDIR/report.html at the end')
  train.add_argument('--coordinator', metavar='HOST:PORT', help='several hosts: address of process 0 (TPU pods and '
                     'SLURM find it by themselves with --coordinator=auto)')
  train.add_argument('--num-processes', type=int, help='several hosts: how many processes')
  train.add_argument('--process-id', type=int, help='several hosts: which one this is')
  train.set_defaults(run=_train)

  evaluate = verbs.add_parser(
      'eval', help='evaluate a checkpoint, or any other encoder, on a data set',
      description='Encodes a split once and computes every metric that its annotations allow.')
  which = evaluate.add_mutually_exclusive_group(required=True)
  which.add_argument('--checkpoint', metavar='DIR', help="a run's folder, or one step of it")
  which.add_argument('--encoder', metavar='SPEC', help='hf:DIR or hf:OWNER/NAME: a CLIP, SigLIP or SigLIP 2 of Hugging '
                     'Face; or a checkpoint of ours')
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

  plan = verbs.add_parser(
      'plan', help='will an experiment fit on given hardware, and how fast will it go?',
      description='Compiles the real training step for the chips you name, without having one, and says what it needs: '
                  'memory a chip, FLOPs, messages, a roofline of the step time, days and chip-hours.',
      epilog="The TPU compiler comes with pip install 'cloc_jax[tpu]'; without it, and for GPUs, figures are estimated "
             'from shapes. --config.KEY=VALUE changes the experiment, as in `cloc train`.')
  plan.add_argument('--config', required=True, metavar='FILE.py[:ARGS]', help='e.g. configs/cloc_l14.py')
  plan.add_argument('--topology', required=True, metavar='CHIP:SHAPE',
                    help='v5p:8x8x16, v5e:16x16, v6e:16x16, v5p:4x4x4*2 (two slices), gpu:8xh200')
  plan.add_argument('--estimate', action='store_true', help='do not compile (seconds instead of minutes)')
  plan.add_argument('--what-if', action='store_true', help='also with other M, batch, remat and FSDP (one compilation each)')
  plan.add_argument('--fit', action='store_true', help='choose train.micro_batches: the fewest that fit the memory')
  plan.add_argument('--json', metavar='FILE', help='write the figures there')
  plan.set_defaults(run=_plan)

  report = verbs.add_parser('report', help='write an HTML page about a run, with pictures',
                            description='Curves, tables, and found boxes drawn on images that the run evaluated on.')
  report.add_argument('--workdir', required=True, metavar='DIR')
  report.add_argument('--out', metavar='FILE', help='default: WORKDIR/report.html')
  report.add_argument('--images', type=int, default=12, help='how many images of each split to draw')
  report.set_defaults(run=_report)

  _add_data_verbs(verbs.add_parser('data', help='make, import and look at data sets',
                                   description='Data sets are TFDS-readable ArrayRecord folders.'))
  return parser


def _add_data_verbs(parser):
  verbs = parser.add_subparsers(dest='data_verb', required=True, metavar='VERB')
  scenes = verbs.add_parser('scenes', help='draw the embedded data set',
                            description='Draws images of coloured, textured shapes (or emoji, or your own pictures) '
                                        'with boxes and captions; splits train, val, and unseen pairs.')
  scenes.add_argument('--out', required=True, metavar='DIR')
  scenes.add_argument('--train', type=int, default=40_000, help='images of the split (default %(default)s)')
  scenes.add_argument('--val', type=int, default=1000, help='default %(default)s')
  scenes.add_argument('--unseen', type=int, default=1000, help='default %(default)s')
  scenes.add_argument('--size', type=int, default=64, help='side, pixels (default %(default)s)')
  scenes.add_argument('--seed', type=int, default=0)
  scenes.add_argument('--sprites', default='shapes', metavar='SPEC', help='shapes, emoji:FONT.ttf or folder:DIR')
  scenes.add_argument('--preset', choices=('full', 'local'), default='full',
                      help='local: fewer kinds and less clutter, for a model trained in minutes')
  scenes.add_argument('--encoding', choices=('jpeg', 'png'), default='jpeg')
  scenes.add_argument('--num-workers', type=int, default=os.cpu_count() or 1)
  _add_overwrite(scenes)
  scenes.set_defaults(run=_scenes)

  cli_import.add_verbs(verbs)

  inspect = verbs.add_parser('inspect', help='draw examples as the model sees them',
                             description='An HTML gallery with boxes and captions drawn after the training transforms.')
  inspect.add_argument('path', metavar='DATASET')
  inspect.add_argument('--split', default='train')
  inspect.add_argument('--out', default='inspect.html', metavar='FILE')
  inspect.add_argument('--count', type=int, default=24)
  inspect.add_argument('--image-size', type=int, default=224)
  inspect.add_argument('--regions', type=int, default=8, help='regions drawn an image')
  inspect.add_argument('--seed', type=int, default=0)
  inspect.add_argument('--flip', action='store_true')
  inspect.set_defaults(run=_inspect)

  validate = verbs.add_parser(
      'validate', help='read everything and say what is broken',
      description='Reads every record and decodes every image; exit status 1 if anything is broken.')
  stats = verbs.add_parser(
      'stats', help='count what a data set holds',
      description='Regions an image, lengths of captions, sizes of boxes and images, categories; images are not decoded.')
  stats.add_argument('--out', metavar='FILE.html', help='write a page with curves')
  for verb, run in ((validate, _validate), (stats, _stats)):
    verb.add_argument('path', metavar='DATASET')
    verb.add_argument('--split', action='append', metavar='NAME', help='may be repeated; default: all')
    verb.add_argument('--json', metavar='FILE', help='write everything there')
    verb.add_argument('--num-workers', type=int, default=os.cpu_count() or 1)
    verb.set_defaults(run=run)


def _add_overwrite(parser):
  parser.add_argument('--overwrite', action='store_true', help='replace what is there')


def _train(args) -> int:
  from cloc_jax import config as config_lib
  config = config_lib.override(config_lib.load(args.config), args.assignments)
  import jax
  if args.coordinator:
    _join_hosts(args)
  from cloc_jax import compiler, evaluate, train
  config.lock()
  compiler.keep_compiled()
  result = train.train(config, workdir=args.workdir)
  if jax.process_index():
    return 0
  if result.status == 'interrupted':
    return 0
  if result.status == 'already_done':
    print(f'{result.workdir}: all {result.total_steps} steps are done')
  report = None
  if args.report:
    from cloc_jax import report as report_lib
    report = report_lib.write(result.workdir)
  if any(result.evaluations.values()):
    print('\n' + evaluate.table(result.evaluations) + '\n')
  places = {'checkpoints': result.workdir / 'checkpoints', 'metrics': result.workdir / 'metrics.jsonl',
            'evaluations': result.workdir / 'evals', 'TensorBoard': result.workdir / 'tensorboard', 'report': report}
  for name, path in places.items():
    if path:
      print(f'{name:<12} {path}')
  return 0


def _join_hosts(args):
  import jax
  if args.coordinator == 'auto':
    jax.distributed.initialize()
    return
  if args.num_processes is None or args.process_id is None:
    raise ValueError('--coordinator needs --num-processes and --process-id (or --coordinator=auto)')
  if jax.config.jax_platforms == 'cpu' or os.environ.get('JAX_PLATFORMS') == 'cpu':
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id)


def _plan(args) -> int:
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')  # a plan needs shapes and a compiler, not the accelerator
  from cloc_jax import plan, plan_text
  began = time.monotonic()
  plans = plan.run(args.config, assignments=args.assignments, topology=args.topology, estimate=args.estimate,
                   what_if=args.what_if, choose=args.fit)
  print(plan_text.render(plans, seconds=time.monotonic() - began))
  if args.json:
    pathlib.Path(args.json).write_text(plan_text.to_json(plans) + '\n')
  return 0 if plans[0].memory.fits else 1


def _eval(args) -> int:
  import jax
  from cloc_jax import compiler, encoders, evaluate, sharding
  compiler.keep_compiled()
  mesh = sharding.make_mesh() if jax.device_count() > 1 else None
  encoder = encoders.load(args.checkpoint or args.encoder, step=args.step, mesh=mesh)
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
  import contextlib
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


def _report(args) -> int:
  from cloc_jax import report
  print(report.write(args.workdir, out=args.out, images=args.images))
  return 0


def _scenes(args) -> int:
  from cloc_jax.data import scenes
  import tqdm
  spec = scenes.PRESETS[args.preset]
  with tqdm.tqdm(total=args.train + args.val + args.unseen, unit='image', disable=not sys.stderr.isatty()) as bar:
    counts = scenes.write_scenes(
        args.out, num_train=args.train, num_val=args.val, num_unseen=args.unseen, size=args.size, seed=args.seed,
        sprites=None if args.sprites == 'shapes' else args.sprites, spec=spec, encoding=args.encoding,
        num_workers=args.num_workers, overwrite=args.overwrite, progress=lambda split, written: bar.update(1))
  print(f'{args.out}: {json.dumps(counts)}')
  return 0


def _inspect(args) -> int:
  from cloc_jax.data import inspect_html
  counts = inspect_html.write_gallery(args.path, split=args.split, out=args.out, count=args.count,
                                      image_size=args.image_size, regions_per_image=args.regions, seed=args.seed,
                                      flip=args.flip)
  print(json.dumps({k: int(v) for k, v in counts.items()}))
  print(args.out)
  return 0


def _validate(args) -> int:
  from cloc_jax.data import validate
  with _record_bar() as progress:
    report = validate.validate(args.path, splits=args.split, workers=args.num_workers, progress=progress)
  _write_json(args.json, report)
  print(report.text())
  return 0 if report.ok else 1


def _stats(args) -> int:
  from cloc_jax.data import stats
  with _record_bar() as progress:
    found = stats.collect(args.path, splits=args.split, workers=args.num_workers, progress=progress)
  _write_json(args.json, found)
  print(found.text())
  if args.out:
    stats.write_page(found, out=args.out)
    print(args.out)
  return 0


@contextlib.contextmanager
def _record_bar():
  import tqdm
  with tqdm.tqdm(unit='record', disable=not sys.stderr.isatty()) as bar:
    def progress(done, total):
      bar.total = total
      bar.update(done - bar.n)
    yield progress


def _write_json(path, found):
  if path:
    pathlib.Path(path).write_text(found.to_json() + '\n', encoding='utf-8')


if __name__ == '__main__':
  sys.exit(main())
