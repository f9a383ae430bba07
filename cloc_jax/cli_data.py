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
                            description='Data sets are TFDS-readable ArrayRecord folders.')
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
