"""`cloc label`: images with alt-texts → a region-text data set; and looking at what it did."""
import os

SECTIONS = ('captioner', 'phrases', 'detector', 'engine', 'pools')


def add_verbs(verbs) -> None:
  """Adds `label`, and its own verbs `report` and `try`, to the verbs of `cloc`."""
  label = verbs.add_parser(
      'label', help='caption images and find regions in them (VESL)',
      description='Re-captions images, takes noun phrases from the captions, finds a box for each, and writes a data '
                  'set for `cloc train`. Interrupted, the same command goes on where it stopped. '
                  '`cloc label report DIR` and `cloc label try IMAGE` show what came of it.',
      epilog='Any value of the config can be changed: --config.detector.threshold=0.2')
  label.add_argument('--input', nargs='+', metavar='SOURCE',
                     help='folders, files or patterns: images (with .txt beside), .tar, .parquet, .jsonl, or a '
                          'prepared data set of TFDS; on a disk, or s3://…, gs://…, https://…')
  label.add_argument('--out', metavar='DIR', help='the data set to make, on a disk or in an object store')
  _add_stages(label)
  label.add_argument('--runner', choices=('local', 'ray'), default='local')
  label.add_argument('--ray-address', metavar='ADDRESS', help="of a running cluster: 'auto' or ray://HOST:10001; "
                     'default: start one on this machine')
  label.add_argument('--ray-cpus', type=int, metavar='N', help='of a cluster on this machine (default: all)')
  label.add_argument('--ray-object-store', type=float, metavar='GB', help='memory for shards on their way')
  label.add_argument('--shard-size', type=int, metavar='N', help='images a shard (default 1024)')
  label.add_argument('--max-error-share', type=float, metavar='X', help='stop when more images are lost (default 0.01)')
  label.add_argument('--retry-errors', action='store_true',
                     help='do again the shards that lost images to a captioner, a detector or a source')
  label.add_argument('--cache', metavar='DIR', help="keep captions there (default: 'captions.cache' beside --out)")
  label.add_argument('--no-cache', action='store_true', help='keep captions only in the data set')
  label.add_argument('--parquet', action='store_true', help='write Parquet files too, in OUT/parquet')
  label.add_argument('--name', default='vesl', help="the data set's (default %(default)s)")
  label.add_argument('--split', default='train', help='to write, and to read of a data set (default %(default)s)')
  label.add_argument('--overwrite', action='store_true', help='replace what is there')
  label.set_defaults(run=_run)
  verbs = label.add_subparsers(dest='label_verb', metavar='VERB')

  report = verbs.add_parser('report', help='write a page about a run, finished or not',
                            description='Figures, curves, what was lost and why, and boxes drawn on images.')
  report.add_argument('path', metavar='DIR', help='the --out of a run')
  report.add_argument('--out', metavar='FILE.html', help='default: label.html beside DIR')
  report.add_argument('--images', type=int, default=24, help='how many to draw (default %(default)s)')
  report.set_defaults(run=_report)

  single = verbs.add_parser('try', help='one image through all stages, showing every intermediate',
                            description='For tuning prompts and thresholds: prints and draws what each stage makes.')
  single.add_argument('image', metavar='IMAGE')
  single.add_argument('--alt-text', action='append', default=[], metavar='TEXT', help='default: the .txt beside it')
  single.add_argument('--out', default='try.html', metavar='FILE.html')
  _add_stages(single)
  single.set_defaults(run=_try)


def _add_stages(parser):
  parser.add_argument('--config', metavar='FILE.py[:ARGS]', help='e.g. configs/vesl_owlv2.py')
  parser.add_argument('--captioner', metavar='SPEC', help="e.g. hf:NAME, openai:URL, alt-text, or python:MODULE:CLASS")
  parser.add_argument('--phrases', metavar='SPEC', help="nltk (default), ngrams, spacy:MODEL, or python:MODULE:CLASS")
  parser.add_argument('--detector', metavar='SPEC', help='e.g. owlv2:NAME, hf:NAME, or python:MODULE:CLASS')


def _config(args):
  """The config's sections as dictionaries, with the flags put in."""
  from cloc_jax import config as config_lib
  if args.config:
    config = config_lib.override(config_lib.load(args.config, sections=SECTIONS), args.assignments)
  elif args.assignments:
    raise ValueError(f'--config.{args.assignments[0]}: changes a config; name it with --config FILE.py')
  else:
    config = {'captioner': {}, 'phrases': {'spec': 'nltk'}, 'detector': {}, 'engine': {}, 'pools': {}}
  config = config_lib.plain(config)
  for stage in ('captioner', 'phrases', 'detector'):
    spec = getattr(args, stage)
    # The settings of another kind of stage mean nothing to this one.
    if spec and spec.partition(':')[0] != config[stage].get('spec', '').partition(':')[0]:
      config[stage] = {'spec': spec}
    elif spec:
      config[stage]['spec'] = spec
    if not config[stage].get('spec'):
      raise ValueError(f'no {stage}: give --{stage} SPEC, or --config FILE.py')
  return config


def _run(args) -> int:
  if not args.input or not args.out:
    raise ValueError('expected --input SOURCE … and --out DIR (or a verb: report, try); see `cloc label --help`')
  import functools
  from cloc_jax import config as config_lib
  from cloc_jax.label import engine
  config = _config(args)
  settings = config['engine']
  for flag in ('shard_size', 'max_error_share'):
    if getattr(args, flag) is not None:
      settings[flag] = getattr(args, flag)
  share = settings.pop('max_error_share', 0.01)
  job = config_lib.call(functools.partial(
      engine.Job, inputs=tuple(args.input), out=args.out, name=args.name, split=args.split, parquet=args.parquet,
      **{stage: config[stage] for stage in engine.STAGES}), settings, name='engine')
  outcome = engine.run(
      job, runner=args.runner, pools=config['pools'], cache=_cache(args, config), max_error_share=share,
      retry_errors=args.retry_errors, overwrite=args.overwrite, progress=True,
      ray_options=dict(address=args.ray_address, num_cpus=args.ray_cpus,
                       object_store_bytes=args.ray_object_store and int(args.ray_object_store * 2**30)))
  print(f'{outcome.out}: ' + ('complete already, ' if outcome.already else '') + outcome.summary.text())
  print(f'`cloc label report {outcome.out}` shows it')
  return 0


def _cache(args, config):
  """Where captions are kept; alt-texts as they are cost nothing to read again."""
  if args.no_cache or config['captioner']['spec'] == 'alt-text':
    return None
  return args.cache or os.path.join(os.path.dirname(args.out.rstrip('/')), 'captions.cache')


def _report(args) -> int:
  from cloc_jax.label import report
  print(report.write(args.path, out=args.out, images=args.images))
  return 0


def _try(args) -> int:
  from cloc_jax.label import tryout
  found = tryout.run(args.image, alt_texts=args.alt_text, settings=_config(args))
  print(found.text())
  print(tryout.write_page(found, out=args.out))
  return 0
