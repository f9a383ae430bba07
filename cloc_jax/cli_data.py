"""`cloc data …`: make, import and look at data sets."""
import contextlib
import json
import os
import pathlib
import sys

from cloc_jax import cli_import


def add_verbs(verbs) -> None:
  """Adds `data` to the verbs of `cloc`, with verbs of its own."""
  parser = verbs.add_parser('data', help='make, import and look at data sets',
                            description='Data sets are TFDS-readable ArrayRecord folders. inspect, validate, stats and '
                                        'mix also read other files as they are: coco:images=DIR,instances=FILE.json, '
                                        'jsonl:FILE.jsonl, webdataset:DIR/*.tar (docs/data.md).')
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

  copy = verbs.add_parser(
      'copy', help='copy a finished data set to or from a store',
      description='Copies a data set between folders and URLs (gs://, s3://, …), several files at a time; the same '
                  'command goes on where it was interrupted. Sizes are compared, and records counted on a disk.')
  copy.add_argument('source', metavar='SRC')
  copy.add_argument('target', metavar='DST', help='the data set itself, not the folder to put it in')
  _add_overwrite(copy)
  copy.set_defaults(run=_copy)

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
  inspect.add_argument('--crop', type=float, metavar='SHARE', help='random crops of at least this share of the area')
  inspect.set_defaults(run=_inspect)

  mix = verbs.add_parser(
      'mix', help='say what a mixture will do, before training on it',
      description='Size, weight, share of a batch, images with regions, epochs by source, and what is read twice; of a '
                  "config's data.mixture, or of sources named here.",
      epilog='--config.KEY=VALUE changes the experiment, as in `cloc train`.')
  mix.add_argument('config', nargs='?', metavar='FILE.py[:ARGS]')
  mix.add_argument('--source', nargs=3, action='append', metavar=('NAME', 'WEIGHT', 'DATASET'), help='may be repeated')
  mix.add_argument('--split', default='train', help='of each --source (default %(default)s)')
  mix.add_argument('--batch-size', type=int, help="default: the config's, or 256")
  mix.add_argument('--examples', type=int,
                   help="examples of the run; default: the config's, or until every source is read once")
  mix.add_argument('--json', metavar='FILE', help='write everything there')
  mix.set_defaults(run=_mix)

  validate = verbs.add_parser(
      'validate', help='read everything and say what is broken',
      description='Reads every record and decodes every image; exit status 1 if anything is broken.')
  validate.add_argument('--index', action='append', metavar='[SPLIT=]FILE',
                        help='lists the images that should be there: annotations, rows, CSV, or an id a line')
  stats = verbs.add_parser(
      'stats', help='count what a data set holds',
      description='Regions an image, lengths of captions, sizes of boxes and images, categories; decodes nothing.')
  stats.add_argument('--out', metavar='FILE.html', help='write a page with curves')
  for verb, run in ((validate, _validate), (stats, _stats)):
    verb.add_argument('path', metavar='DATASET')
    verb.add_argument('--split', action='append', metavar='NAME', help='may be repeated; default: all')
    verb.add_argument('--json', metavar='FILE', help='write everything there')
    verb.add_argument('--num-workers', type=int, default=os.cpu_count() or 1)
    verb.set_defaults(run=run)


def _add_overwrite(parser):
  parser.add_argument('--overwrite', action='store_true', help='replace what is there')


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


def _copy(args) -> int:
  from cloc_jax.data import copies, location
  try:
    with location.shown(args.source, args.target) as progress:
      done = copies.copy(args.source, args.target, overwrite=args.overwrite, progress=progress)
  except KeyboardInterrupt:
    print(f'interrupted; the same command goes on with what is in {args.target}', file=sys.stderr)
    return 130
  print(f'{args.target}: {done.files} files, {done.bytes / 2**20:,.1f} MiB'
        + (f'; {done.kept} of them were there' if done.kept else ''))
  return 0


def _inspect(args) -> int:
  from cloc_jax.data import inspect_html, transforms
  crop = None if args.crop is None else transforms.Crop(scale=(args.crop, 1.0))
  counts = inspect_html.write_gallery(args.path, split=args.split, out=args.out, count=args.count,
                                      image_size=args.image_size, regions_per_image=args.regions, seed=args.seed,
                                      flip=args.flip, crop=crop)
  print(json.dumps({k: int(v) for k, v in counts.items()}))
  print(args.out)
  return 0


def _mix(args) -> int:
  from cloc_jax.data import mix_report, mixture
  if bool(args.config) == bool(args.source):
    raise ValueError('expected a config file, or sources as --source NAME WEIGHT DATASET')
  batch_size, examples, seed = args.batch_size, args.examples, 0
  if args.config:
    from cloc_jax import config as config_lib
    from cloc_jax import train_options
    config = config_lib.override(config_lib.load(args.config), args.assignments)
    data = config_lib.call(train_options.DataOptions, config['data'], name='data')
    data.use_cache()
    options = config_lib.call(train_options.TrainOptions, config['train'], name='train')
    parts, seed, batch_size = data.parts(), options.seed, batch_size or data.batch_size
    size = None if data.mixture else mixture.sizes(parts)[0]
    examples = examples or batch_size * config_lib.duration(vars(options), 'total', batch_size=batch_size,
                                                            dataset_size=size)
  else:
    if args.assignments:
      raise ValueError('--config.KEY=VALUE needs a config file')
    names = [name for name, _, _ in args.source]
    if len(set(names)) != len(names):
      raise ValueError(f'two sources of the same name: {names}')
    parts = mixture.parts({name: {'path': path, 'weight': _number(weight, name), 'split': args.split}
                           for name, weight, path in args.source})
  found = mix_report.report(parts, batch_size=batch_size or 256, examples=examples, seed=seed)
  _write_json(args.json, found)
  print(found.text())
  return 0


def _number(text, name):
  try:
    return float(text)
  except ValueError:
    raise ValueError(f'--source {name}: expected a weight, got {text!r}') from None


def _validate(args) -> int:
  from cloc_jax.data import validate
  index = {}
  for text in args.index or ():
    split, equals, file = text.partition('=')
    index[split if equals else ''] = file if equals else text
  with _record_bar() as progress:
    report = validate.validate(args.path, splits=args.split, workers=args.num_workers, index=index, progress=progress)
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
