"""`cloc data import FORMAT`: the flags of every format, and the importer they make."""
import os
import sys


def add_verbs(verbs) -> None:
  """Adds `import` with a verb for each format, and the older name of COCO's, to the verbs of `cloc data`."""
  formats = verbs.add_parser(
      'import', help='other formats → a data set',
      description='Reads a published format and writes a data set. Interrupted, the same command goes on where it '
                  'stopped. Everything left out or changed is counted, printed and stored.',
  ).add_subparsers(dest='format', required=True, metavar='FORMAT')
  _coco(formats.add_parser('coco', help="COCO's instances or panoptic boxes, and captions",
                           description='Repeat --split --images --instances --captions for several splits, in order.'))
  _lvis(formats.add_parser('lvis', help="LVIS v1's boxes on COCO's images",
                           description='Repeat --split --images --annotations for several splits, in order. Category '
                                       'frequencies and negative sets are kept for evaluation.'))
  _objects365(formats.add_parser('objects365', help="Objects365 v2's boxes",
                                 description='Repeat --split --images --annotations for several splits, in order.'))
  _open_images(formats.add_parser('open-images', help="Open Images V7's boxes, and Localized Narratives as captions",
                                  description='Repeat --split --images --boxes for several splits, in order.'))
  _rows(formats.add_parser('rows', help='JSONL or Parquet files with one image a row',
                           description='A row has image (a path or bytes), and optionally image_id, caption or '
                                       'captions, regions [{box, caption, category, score}], height, width. Repeat '
                                       '--split --rows for several splits, in order.'))
  _webdataset(formats.add_parser('webdataset', help='tars of image–text pairs, without regions',
                                 description='Repeat --split --tars for several splits, in order.'))
  _grit(formats.add_parser('grit', help="GRIT's noun chunks and referring expressions, from tars or Parquet files",
                           description='Repeat --split and --tars (or --parquet) for several splits, in order. Images '
                                       'must have kept their proportions: img2dataset --resize_mode=keep_ratio.'))
  _visual_genome(formats.add_parser('visual-genome', help="Visual Genome's region descriptions and objects"))
  _refcoco(formats.add_parser('refcoco', help="RefCOCO's, RefCOCO+'s and RefCOCOg's pickles, or re-packs of them",
                              description='One region a sentence. Numbers that are not the published ones are noted.'))
  _flickr30k_entities(formats.add_parser(
      'flickr30k-entities', help="Flickr30k's captions, and Flickr30k Entities' phrases with boxes"))
  _karpathy(formats.add_parser(
      'karpathy', help="Karpathy's splits of COCO and Flickr30k: retrieval by the usual protocol",
      description='Images and their first five captions, from dataset_coco.json, dataset_flickr30k.json or '
                  'dataset_flickr8k.json.'))
  _tfds(formats.add_parser('tfds', help='whatever tfds.load knows, through a map of its features',
                           description='Reads what `tfds build` has prepared; TensorFlow is not needed. Repeat --split '
                                       'for several, --field for each feature that is called other than usual.'))
  _coco(verbs.add_parser('import-coco', help='the same as `import coco`'))


def _add_common(parser, *, name=None):
  parser.add_argument('--out', required=True, metavar='DIR', help='the data set to make; gs://… too, with --work')
  parser.add_argument('--work', metavar='DIR', help='where shards wait until they are copied to gs://… or s3://…')
  if name is not None:
    parser.add_argument('--name', default=name, help="the data set's own name (default %(default)s)")
  parser.add_argument('--workers', type=int, default=os.cpu_count() or 1,
                      help='processes; what is written does not depend on it (default %(default)s)')
  parser.add_argument('--allow-missing', action='store_true',
                      help='go on without any number of missing or unreadable images; they are counted')
  parser.add_argument('--max-error-share', type=float, default=0.01, metavar='SHARE',
                      help='how many of the images may be missing or unreadable all the same (default %(default)s)')
  parser.add_argument('--overwrite', action='store_true', help='replace what is there')


def _add_trust_boxes(parser):
  parser.add_argument('--trust-boxes', action='store_true',
                      help='do not ask whether the boxes look like what the format promises')


def _run(args, importer) -> int:
  from cloc_jax.data import storage
  from cloc_jax.data.importers import counts, engine, upload
  settings = dict(out=args.out, workers=args.workers, overwrite=args.overwrite, allow_missing=args.allow_missing,
                  max_error_share=args.max_error_share, progress=True)
  try:
    if storage.is_url(args.out):
      found = upload.run(importer, work=args.work, **settings)
    else:
      found = engine.run(importer, **settings)
  except KeyboardInterrupt:
    done = f'what is in {args.work}' if storage.is_url(args.out) else f'{args.out}.incomplete'
    print(f'interrupted; the same command goes on with {done}', file=sys.stderr)
    return 130
  print(counts.table(found))
  print(args.out)
  return 0


def _per_split(args, *names) -> list[dict]:
  """Repeated flags → one dict a split. Flags that are not given at all are None for every split."""
  splits = args.split or ['train']
  given = {name: getattr(args, name) or [None] * len(splits) for name in names}
  if any(len(values) != len(splits) for values in given.values()):
    counts = ', '.join(f'--{name.replace("_", "-")} ({len(values)})' for name, values in given.items())
    raise ValueError(f'expected as many --split ({len(splits)}) as {counts}')
  return [dict(split=split, **{name: values[i] for name, values in given.items()}) for i, split in enumerate(splits)]


def _coco(parser):
  parser.add_argument('--split', action='append', metavar='NAME', help='default: train')
  parser.add_argument('--images', action='append', required=True, metavar='DIR')
  boxes = parser.add_mutually_exclusive_group()
  boxes.add_argument('--instances', action='append', metavar='FILE.json')
  boxes.add_argument('--panoptic', action='append', metavar='FILE.json', help='boxes of panoptic segments instead')
  parser.add_argument('--captions', action='append', metavar='FILE.json', help='alone: images without regions')
  parser.add_argument('--stuff', action='store_true', help='with --panoptic: boxes around stuff (sky, grass) too')
  _add_trust_boxes(parser)
  _add_common(parser, name='coco')

  def run(args):
    from cloc_jax.data.importers import coco
    sources = [coco.CocoSource(**flags) for flags in _per_split(args, 'images', 'instances', 'panoptic', 'captions')]
    return _run(args, coco.Coco(tuple(sources), name=args.name, stuff=args.stuff, trust_boxes=args.trust_boxes))
  parser.set_defaults(run=run)


def _lvis(parser):
  _coco_layout(parser, 'lvis', 'Lvis', images='the folder of train2017 and val2017', captions=True)


def _objects365(parser):
  _coco_layout(parser, 'objects365', 'Objects365', images='the folder of patch0, patch1, …', captions=False)


def _coco_layout(parser, module, kind, *, images, captions):
  """A format in COCO's layout whose importer is importers.MODULE.KIND."""
  parser.add_argument('--split', action='append', metavar='NAME', help='default: train')
  parser.add_argument('--images', action='append', required=True, metavar='DIR', help=images)
  parser.add_argument('--annotations', action='append', required=True, metavar='FILE.json')
  if captions:
    parser.add_argument('--captions', action='append', metavar='FILE.json', help="COCO's, for the same images")
  _add_trust_boxes(parser)
  _add_common(parser, name=module)

  def run(args):
    import importlib
    from cloc_jax.data.importers import coco
    sources = [coco.CocoSource(split=flags['split'], images=flags['images'], instances=flags['annotations'],
                               captions=flags.get('captions'))
               for flags in _per_split(args, 'images', 'annotations', *(['captions'] if captions else []))]
    importer = getattr(importlib.import_module(f'cloc_jax.data.importers.{module}'), kind)
    return _run(args, importer(tuple(sources), name=args.name, trust_boxes=args.trust_boxes))
  parser.set_defaults(run=run)


def _open_images(parser):
  parser.add_argument('--split', action='append', metavar='NAME', help='default: train')
  parser.add_argument('--images', action='append', required=True, metavar='DIR')
  parser.add_argument('--boxes', action='append', required=True, metavar='FILE.csv', help='…-annotations-bbox.csv')
  parser.add_argument('--narratives', action='append', metavar='FILES',
                      help='…_localized_narratives….jsonl; several with a comma between')
  parser.add_argument('--classes', required=True, metavar='FILE.csv', help='…-class-descriptions-boxable.csv')
  _add_trust_boxes(parser)
  _add_common(parser, name='open_images')

  def run(args):
    from cloc_jax.data.importers import open_images
    sources = []
    for flags in _per_split(args, 'images', 'boxes', 'narratives'):
      files = flags.pop('narratives')
      sources.append(open_images.OpenImagesSource(**flags, narratives=tuple(files.split(',')) if files else ()))
    return _run(args, open_images.OpenImages(tuple(sources), classes=args.classes, name=args.name,
                                             trust_boxes=args.trust_boxes))
  parser.set_defaults(run=run)


def _rows(parser):
  parser.add_argument('--split', action='append', metavar='NAME', help='default: train')
  parser.add_argument('--rows', action='append', required=True, metavar='FILES',
                      help='.jsonl or .parquet; several with a comma between; * and ? are filled in')
  parser.add_argument('--images', action='append', metavar='DIR',
                      help="where images' paths start (default: each file's folder)")
  parser.add_argument('--boxes', default='xyxy normalised', metavar='CONVENTION',
                      help="'xyxy normalised' (default), 'xywh pixels', 'yxyx 0-1000', …")
  _add_trust_boxes(parser)
  _add_common(parser, name='rows')

  def run(args):
    from cloc_jax.data.importers import rows
    sources = [rows.RowsSource(split=flags['split'], files=_files(flags['rows']), images=flags['images'])
               for flags in _per_split(args, 'rows', 'images')]
    return _run(args, rows.Rows(tuple(sources), boxes=args.boxes, name=args.name, trust_boxes=args.trust_boxes))
  parser.set_defaults(run=run)


def _webdataset(parser):
  _tars(parser)
  parser.add_argument('--caption-key', action='append', metavar='KEY',
                      help='of the json members, beside txt (default: caption); may be repeated')
  _add_common(parser, name='webdataset')

  def run(args):
    from cloc_jax.data.importers import webdataset
    sources = [webdataset.TarsSource(flags['split'], _files(flags['tars'])) for flags in _per_split(args, 'tars')]
    return _run(args, webdataset.WebDataset(tuple(sources), name=args.name,
                                            caption_keys=tuple(args.caption_key or ['caption'])))
  parser.set_defaults(run=run)


def _grit(parser):
  parser.add_argument('--split', action='append', metavar='NAME', help='default: train')
  files = parser.add_mutually_exclusive_group(required=True)
  files.add_argument('--tars', action='append', metavar='FILES',
                     help='several with a comma between; * and ? are filled in')
  files.add_argument('--parquet', action='append', metavar='FILES', help='the same, of .parquet files')
  parser.add_argument('--images', action='append', metavar='DIR',
                      help="with --parquet: where images lie that are not in it (default: each file's folder)")
  parser.add_argument('--image-path', metavar='TEMPLATE',
                      help="of an image below that folder (default: '{file}/{key}' if img2dataset wrote it, or '{id}')")
  parser.add_argument('--phrases', choices=['both', 'noun_chunks', 'ref_exps'], default='both',
                      help='which become regions (default %(default)s)')
  _add_trust_boxes(parser)
  _add_common(parser, name='grit')

  def run(args):
    from cloc_jax.data.importers import grit, grit_parquet
    if args.parquet:
      sources = [grit_parquet.ParquetSource(flags['split'], _files(flags['parquet']), flags['images'])
                 for flags in _per_split(args, 'parquet', 'images')]
      return _run(args, grit_parquet.GritParquet(tuple(sources), name=args.name, phrases=args.phrases,
                                                 image_path=args.image_path, trust_boxes=args.trust_boxes))
    sources = [grit.TarsSource(flags['split'], _files(flags['tars'])) for flags in _per_split(args, 'tars')]
    return _run(args, grit.Grit(tuple(sources), name=args.name, phrases=args.phrases, trust_boxes=args.trust_boxes))
  parser.set_defaults(run=run)


def _visual_genome(parser):
  parser.add_argument('--split', default='train', metavar='NAME', help='what the one split is called (%(default)s)')
  parser.add_argument('--images', required=True, metavar='DIR', help='holds VG_100K and VG_100K_2, or all images')
  parser.add_argument('--image-data', required=True, metavar='FILE.json', help='image_data.json')
  parser.add_argument('--regions', metavar='FILE.json', help='region_descriptions.json')
  parser.add_argument('--objects', metavar='FILE.json', help='objects.json')
  _add_trust_boxes(parser)
  _add_common(parser, name='visual_genome')

  def run(args):
    from cloc_jax.data.importers import visual_genome
    return _run(args, visual_genome.VisualGenome(
        args.images, args.image_data, regions=args.regions, objects=args.objects, split=args.split, name=args.name,
        trust_boxes=args.trust_boxes))
  parser.set_defaults(run=run)


def _refcoco(parser):
  files = parser.add_mutually_exclusive_group(required=True)
  files.add_argument('--refs', metavar='FILE.p', help='refs(unc).p, refs(umd).p, refs(google).p')
  files.add_argument('--repack', action='append', metavar='FILES',
                     help="MDETR's, UNINEXT's or SeqTR's JSON, or Hugging Face's Parquet; repeat --split --repack")
  parser.add_argument('--instances', metavar='FILE.json', help='with --refs: instances.json beside it')
  parser.add_argument('--images', metavar='DIR', help="COCO's train2014; not needed for Parquet files that hold images")
  parser.add_argument('--split', action='append', metavar='NAME',
                      help='default: with --refs all there are, with --repack train; may be repeated')
  _add_trust_boxes(parser)
  _add_common(parser, name='refcoco')

  def run(args):
    from cloc_jax.data.importers import refcoco, refcoco_repacks
    if args.repack:
      sources = [refcoco_repacks.RepackSource(flags['split'], _files(flags['repack']))
                 for flags in _per_split(args, 'repack')]
      return _run(args, refcoco_repacks.RefCocoRepack(tuple(sources), images=args.images, name=args.name,
                                                      trust_boxes=args.trust_boxes))
    if not args.instances or not args.images:
      raise ValueError('--refs needs --instances and --images')
    return _run(args, refcoco.RefCoco(args.refs, args.instances, args.images, wanted=tuple(args.split or ()),
                                      name=args.name, trust_boxes=args.trust_boxes))
  parser.set_defaults(run=run)


def _flickr30k_entities(parser):
  parser.add_argument('--entities', required=True, metavar='DIR', help='holds Sentences and Annotations')
  parser.add_argument('--images', required=True, metavar='DIR', help='flickr30k-images')
  parser.add_argument('--lists', metavar='DIR', help='train.txt, val.txt, test.txt, UNRELATED_CAPTIONS '
                                                     '(default: as --entities)')
  parser.add_argument('--split', action='append', metavar='NAME', help='default: train, val and test')
  _add_trust_boxes(parser)
  _add_common(parser, name='flickr30k_entities')

  def run(args):
    from cloc_jax.data.importers import flickr30k_entities
    return _run(args, flickr30k_entities.Flickr30kEntities(
        args.entities, args.images, wanted=tuple(args.split or ('train', 'val', 'test')), lists=args.lists,
        name=args.name, trust_boxes=args.trust_boxes))
  parser.set_defaults(run=run)


def _karpathy(parser):
  parser.add_argument('--annotations', required=True, metavar='FILE.json',
                      help='dataset_coco.json, dataset_flickr30k.json, dataset_flickr8k.json')
  parser.add_argument('--images', required=True, metavar='DIR', help="holds COCO's train2014 and val2014 (or 2017), or "
                                                                     'all images')
  parser.add_argument('--split', action='append', metavar='NAME', help='default: all there are; may be repeated')
  parser.add_argument('--captions-per-image', type=int, default=5, metavar='N',
                      help='the first so many (default %(default)s, as published figures have it); 0 for all')
  _add_common(parser, name='karpathy')

  def run(args):
    from cloc_jax.data.importers import karpathy
    return _run(args, karpathy.Karpathy(args.annotations, args.images, wanted=tuple(args.split or ()),
                                        captions_per_image=args.captions_per_image, name=args.name))
  parser.set_defaults(run=run)


def _tfds(parser):
  parser.add_argument('--name', required=True, metavar='NAME[/CONFIG][:VERSION]', help='coco/2017; or its folder')
  parser.add_argument('--data-dir', metavar='DIR', help='default: TFDS_DATA_DIR, or ~/tensorflow_datasets')
  parser.add_argument('--split', action='append', metavar='[NAME=]SPLIT',
                      help="TFDS's splits and slices, 'small=train[:1000]' too (default: train)")
  parser.add_argument('--field', action='append', metavar='ROLE=FEATURE', default=[],
                      help='image, image_id, boxes, category, phrases, crowd or captions = objects/bbox, …')
  parser.add_argument('--boxes', metavar='CONVENTION', help="'yxyx normalised', …; default: what the feature says")
  parser.add_argument('--classes', metavar='FILE.csv', help="names for labels that are codes, as Open Images'")
  parser.add_argument('--as', dest='name_as', metavar='NAME', help="the new data set's name (default: made of --name)")
  _add_trust_boxes(parser)
  _add_common(parser)

  def run(args):
    import re
    from cloc_jax.data.importers import tfds_named
    wanted = [split.partition('=')[::2] if '=' in split else (split, split) for split in args.split or ['train']]
    name = args.name_as or re.sub(r'\W+', '_', args.name.partition(':')[0]).strip('_')
    return _run(args, tfds_named.Tfds(
        args.name, data_dir=args.data_dir, wanted=tuple(wanted), fields=tuple(_pair(text) for text in args.field),
        boxes=args.boxes, classes=args.classes, name=name, trust_boxes=args.trust_boxes))
  parser.set_defaults(run=run)


def _pair(text):
  role, _, feature = text.partition('=')
  if not feature:
    raise ValueError(f'--field: expected ROLE=FEATURE, got {text!r}')
  return role, feature


def _tars(parser):
  parser.add_argument('--split', action='append', metavar='NAME', help='default: train')
  parser.add_argument('--tars', action='append', required=True, metavar='FILES',
                      help='several with a comma between; * and ? are filled in')


def _files(text):
  from cloc_jax.data.importers import records
  return records.list_files(text)
