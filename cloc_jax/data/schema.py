"""What a region-text record is, and how it lies on disk.

On disk a data set is an ordinary TFDS folder of ArrayRecord files: `tfds.builder_from_directory(path)` reads it
without this project, and `tfds.data_source` decodes its images. It is written here without TensorFlow: a record is a
`tf.train.Example` message, built directly because TFDS's generic encoder is about twenty times slower.
"""
from collections.abc import Callable, Iterable, Sequence
import dataclasses
import json
import os
import pathlib
import re
import shutil
from typing import Any

from array_record.python import array_record_module
import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from cloc_jax import boxes as box_lib
from cloc_jax.data import copies
from cloc_jax.data import location
from cloc_jax.data import storage

FORMAT = 1  # of the folder as a whole; raised when an older reader would misread it.
VERSION = '1.0.0'  # the data set's own version, as TFDS asks for one.
_META_KEY = 'cloc_jax'
_META_FILE = 'metadata.json'  # TFDS's own file for a builder's metadata: a copy of the folder carries it.
INFO_FILE = copies.INFO_FILE
_PROGRESS_EVERY = 256


@dataclasses.dataclass(frozen=True)
class Region:
  """A phrase and the box it speaks of.

  box: xyxy as fractions of the original image.
  caption: the phrase.
  category: class name, '' where there is none.
  score: confidence of whatever found the box; 1 for people's labels.
  source: where the phrase came from ('coco', 'caption', 'alt-text', …), '' where that is not known.
  """
  box: tuple[float, float, float, float]
  caption: str
  category: str = ''
  score: float = 1.0
  source: str = ''


@dataclasses.dataclass(frozen=True)
class Example:
  """One image with its captions and regions, as stored; of a record that was read, `regions` is a Regions.

  image: the encoded file's bytes (JPEG, PNG, or whatever else OpenCV or Pillow decodes).
  image_id: a name that is unique within its split.
  height, width: of the decoded, upright image, pixels.
  captions: of the whole image; training draws one at random.
  regions: may be empty.
  made_by: the programs that wrote captions and regions, with their settings, one text each; empty for people's work.
    Stored only in data sets that were written with it (see write_info).
  """
  image: bytes
  image_id: str
  height: int
  width: int
  captions: tuple[str, ...]
  regions: Sequence[Region] = ()
  made_by: tuple[str, ...] = ()


class Regions(Sequence):
  """Regions as columns, equal to the tuple of them: a Region is made when one is asked for.

  Training draws a few of an image's regions, and objects for all would cost more than the rest of a record's reading.

  boxes: (n, 4) float32 xyxy, fractions of the original image. captions, categories, scores, sources: n each.
  """
  __slots__ = ('boxes', 'captions', 'categories', 'scores', 'sources')

  def __init__(self, *, boxes: np.ndarray, captions: Sequence[str], categories: Sequence[str],
               scores: Sequence[float], sources: Sequence[str]):
    self.boxes, self.captions, self.categories, self.scores, self.sources = boxes, captions, categories, scores, sources

  @classmethod
  def of(cls, regions: Sequence[Region]) -> 'Regions':
    """The same regions as columns."""
    if isinstance(regions, cls):
      return regions
    return cls(boxes=np.array([r.box for r in regions], np.float32).reshape(-1, 4),
               captions=[r.caption for r in regions], categories=[r.category for r in regions],
               scores=[r.score for r in regions], sources=[r.source for r in regions])

  def take(self, indices: Iterable[int]) -> 'Regions':
    """Some of them, in the order of `indices`."""
    indices = indices.tolist() if isinstance(indices, np.ndarray) else list(indices)
    texts = ([values[i] for i in indices] for values in (self.captions, self.categories, self.scores, self.sources))
    return Regions(boxes=self.boxes[indices], **dict(zip(('captions', 'categories', 'scores', 'sources'), texts)))

  def __len__(self) -> int:
    return len(self.captions)

  def __getitem__(self, index):
    """One Region, or a tuple of them for a slice."""
    if isinstance(index, slice):
      return tuple(self[i] for i in range(*index.indices(len(self))))
    return Region(box=tuple(self.boxes[index].tolist()), caption=self.captions[index],
                  category=self.categories[index], score=self.scores[index], source=self.sources[index])

  def __eq__(self, other) -> bool:
    return tuple(self) == tuple(other) if isinstance(other, (Regions, tuple)) else NotImplemented

  def __hash__(self) -> int:
    return hash(tuple(self))

  def __repr__(self) -> str:
    return f'Regions({tuple(self)})'


@dataclasses.dataclass(frozen=True)
class DatasetMeta:
  """What a data set says of itself.

  name: letters, digits and underscores; part of the file names.
  description: a few sentences for people.
  categories: all class names, in the order that region recognition reports them.
  unseen_categories: those of `categories` that the training split never shows.
  extra: anything JSON can hold: counts, provenance, licence.
  splits: split name → number of examples. Filled in when a data set is read; ignored when one is written.
  """
  name: str
  description: str = ''
  categories: tuple[str, ...] = ()
  unseen_categories: tuple[str, ...] = ()
  extra: dict[str, Any] = dataclasses.field(default_factory=dict)
  splits: dict[str, int] = dataclasses.field(default_factory=dict)


def features(*, made_by: bool = False) -> tfds.features.FeaturesDict:
  """The TFDS features of a data set; reading them needs no code of this project. See Example for `made_by`."""
  f = tfds.features
  return f.FeaturesDict({
      'image': f.Image(shape=(None, None, 3), doc='encoded image file'),
      'image_id': f.Text(),
      'height': f.Scalar(np.int32),
      'width': f.Scalar(np.int32),
      'captions': f.Sequence(f.Text()),
      'regions': f.Sequence({
          'box': f.Tensor(shape=(4,), dtype=np.float32, doc='xyxy, fractions of the original image'),
          'caption': f.Text(),
          'category': f.Text(),
          'score': f.Scalar(np.float32),
          'source': f.Text(),
      }),
  } | ({'made_by': f.Sequence(f.Text())} if made_by else {}))


def encode(example: Example) -> bytes:
  """An Example → the bytes of one record.

  Raises:
    ValueError, TypeError: naming the record and the field, if the example breaks the contract of its docstring.
  """
  check_example(example)
  message = tf_example_pb2.Example()
  feature = message.features.feature
  feature['image'].bytes_list.value.append(example.image)
  feature['image_id'].bytes_list.value.append(example.image_id.encode())
  feature['height'].int64_list.value.append(example.height)
  feature['width'].int64_list.value.append(example.width)
  feature['captions'].bytes_list.value.extend(c.encode() for c in example.captions)
  regions = example.regions
  feature['regions/box'].float_list.value.extend(x for r in regions for x in r.box)
  feature['regions/caption'].bytes_list.value.extend(r.caption.encode() for r in regions)
  feature['regions/category'].bytes_list.value.extend(r.category.encode() for r in regions)
  feature['regions/score'].float_list.value.extend(r.score for r in regions)
  feature['regions/source'].bytes_list.value.extend(r.source.encode() for r in regions)
  if example.made_by:
    feature['made_by'].bytes_list.value.extend(text.encode() for text in example.made_by)
  # Touching an empty list does not set it; TFDS's reader wants every feature present.
  for name in ('captions', 'regions/caption', 'regions/category', 'regions/source'):
    feature[name].bytes_list.SetInParent()
  for name in ('regions/box', 'regions/score'):
    feature[name].float_list.SetInParent()
  return message.SerializeToString(deterministic=True)  # maps would else be in another order in every process


def decode(record: bytes, *, where: str) -> Example:
  """The bytes of one record → an Example; `where` names the record in errors.

  Raises:
    ValueError: if the record lacks a field or its region fields disagree in length.
  """
  feature = tf_example_pb2.Example.FromString(record).features.feature
  try:
    image, image_id = feature['image'].bytes_list.value[0], feature['image_id'].bytes_list.value[0].decode()
    height, width = feature['height'].int64_list.value[0], feature['width'].int64_list.value[0]
  except IndexError:
    filled = sorted(name for name, value in feature.items() if value.WhichOneof('kind'))
    missing = [name for name in ('image', 'image_id', 'height', 'width') if name not in filled]
    raise ValueError(f'{where}: the record has no {", ".join(map(repr, missing))}; it has {filled}') from None
  texts = {name: list(map(bytes.decode, feature['regions/' + name].bytes_list.value))
           for name in ('caption', 'category', 'source')}
  boxes = np.array(feature['regions/box'].float_list.value[:], np.float32)  # of a list: twice as quick
  scores = feature['regions/score'].float_list.value[:]
  count = len(texts['caption'])
  if not len(boxes) / 4 == len(scores) == len(texts['category']) == len(texts['source']) == count:
    lengths = {'box': len(boxes) / 4, 'score': len(scores), **{name: len(values) for name, values in texts.items()}}
    raise ValueError(f'{where}: region fields of unequal length: {lengths}')
  regions = Regions(boxes=boxes.reshape(count, 4), captions=texts['caption'], categories=texts['category'],
                    scores=scores, sources=texts['source'])
  return Example(
      image=image, image_id=image_id, height=height, width=width,
      captions=tuple(map(bytes.decode, feature['captions'].bytes_list.value)),
      regions=regions,
      made_by=tuple(map(bytes.decode, feature['made_by'].bytes_list.value)) if 'made_by' in feature else ())


def check_example(example: Example) -> None:
  """Raises ValueError or TypeError, naming the record and the field, if an example cannot be stored.

  Boxes without area or reaching out of the image are stored as they are: readers count and drop or clip them.
  """
  where = f'record {example.image_id!r}'
  if not isinstance(example.image, bytes):
    raise TypeError(f'{where}: image must be encoded bytes, got {type(example.image).__name__}')
  if not example.image:
    raise ValueError(f'{where}: the image has no bytes')
  if not isinstance(example.image_id, str) or not example.image_id:
    raise TypeError(f'{where}: image_id must be a string that is not empty')
  for name in ('height', 'width'):
    value = getattr(example, name)
    if not isinstance(value, (int, np.integer)) or value < 1:
      raise ValueError(f'{where}: {name} must be a positive whole number of pixels, got {value!r}')
  for name in ('captions', 'made_by'):
    texts = getattr(example, name)
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
      raise TypeError(f'{where}: {name} must be a tuple of strings, got {texts!r}')
  for i, region in enumerate(example.regions):
    if not isinstance(region, Region):
      raise TypeError(f'{where}, region {i}: expected a Region, got {type(region).__name__}')
    if len(region.box) != 4:
      raise ValueError(f'{where}, region {i}: a box is four numbers (xyxy), got {region.box!r}')
    for name in ('caption', 'category', 'source'):
      if not isinstance(getattr(region, name), str):
        raise TypeError(f'{where}, region {i}: {name} must be a string, got {getattr(region, name)!r}')
  if example.regions:
    box_lib.check_normalized(np.array([r.box for r in example.regions]), where=where)


def write_dataset(out_dir: str | os.PathLike, *, meta: DatasetMeta, splits: dict[str, Iterable[Example]],
                  overwrite: bool = False, num_shards: int | None = None, shard_bytes: int = 256 * 2**20,
                  progress: Callable[[str, int], None] | None = None) -> dict[str, int]:
  """Writes a data set; examples are streamed, their order is kept, and nothing but a complete folder appears.

  Args:
    out_dir: the folder to make. It appears by a rename once everything in it is written.
    meta: see DatasetMeta.
    splits: split name → its examples; read once each, in turn.
    overwrite: replace `out_dir` where it holds a data set already.
    num_shards: files a split, of equal length give or take one; needs splits with a length, such as lists. By default
      a new file is begun whenever one reaches `shard_bytes`.
    shard_bytes: see `num_shards`.
    progress: called with (split, examples written) now and then, and at the end of each split.

  Returns:
    Split name → number of examples written.

  Raises:
    FileExistsError: if `out_dir` is in the way.
    ValueError, TypeError: on a bad name, a split without examples, or an example that cannot be stored.
  """
  if storage.is_url(out_dir):
    raise ValueError(f'{out_dir}: data sets are written to a disk; `cloc data copy` copies them to a store')
  out = pathlib.Path(out_dir).expanduser().absolute()
  check_names(meta=meta, splits=splits)
  check_target(out, overwrite=overwrite)
  out.parent.mkdir(parents=True, exist_ok=True)
  scratch = out.parent / f'.{out.name}.{os.getpid()}.incomplete'
  shutil.rmtree(scratch, ignore_errors=True)  # left by a killed process that had the same id
  scratch.mkdir()
  try:
    infos = [
        _write_split(scratch, name=meta.name, split=split, examples=examples, num_shards=num_shards,
                     shard_bytes=shard_bytes, progress=progress) for split, examples in splits.items()]
    write_info(scratch, meta=meta, infos=infos)
    swap_in(scratch, out)
  finally:
    shutil.rmtree(scratch, ignore_errors=True)
  return {info.name: info.num_examples for info in infos}


def read_meta(path: str | os.PathLike) -> DatasetMeta:
  """Reads what a data set says of itself; touches no record.

  Raises:
    FileNotFoundError: if `path` is not a data set, naming what is near it.
    ValueError: if the folder was written by a newer, incompatible version.
  """
  root = location.check_dataset_dir(path)
  info = json.loads((root / INFO_FILE).read_text())
  meta_path = root / _META_FILE
  stored = json.loads(meta_path.read_text()).get(_META_KEY, {}) if meta_path.exists() else {}
  if stored.get('format', FORMAT) > FORMAT:
    raise ValueError(f'{root}: written in format {stored["format"]}, this version reads up to {FORMAT}; upgrade it')
  splits = {s['name']: sum(map(int, s.get('shardLengths', ()))) for s in info.get('splits', ())}
  return DatasetMeta(
      name=info['name'], description=info.get('description', ''), categories=tuple(stored.get('categories', ())),
      unseen_categories=tuple(stored.get('unseen_categories', ())), extra=stored.get('extra', {}), splits=splits)


def check_names(*, meta: DatasetMeta, splits: Iterable[str]) -> None:
  """Raises ValueError if a name of the data set or of a split would not do in its files' names."""
  if not re.fullmatch(r'[A-Za-z]\w*', meta.name):
    raise ValueError(f'data set name {meta.name!r}: use letters, digits and underscores, a letter first')
  if not splits:
    raise ValueError(f'data set {meta.name!r}: no splits given')
  for split in splits:
    # TFDS reads 'all' as the union of all splits.
    if not re.fullmatch(r'[A-Za-z]\w*', split) or split == 'all':
      raise ValueError(f"split name {split!r}: use letters, digits and underscores, a letter first, and not 'all'")


def check_target(out: pathlib.Path, *, overwrite: bool) -> None:
  """Raises FileExistsError if `out` holds anything that a data set must not replace."""
  if not out.exists() or (out.is_dir() and not any(out.iterdir())):
    return
  if not (out / INFO_FILE).exists():
    raise FileExistsError(f'{out} exists and is not a data set; it will not be replaced: choose another folder')
  if not overwrite:
    raise FileExistsError(f'{out} holds a data set already; pass overwrite=True to replace it')


def _write_split(root, *, name, split, examples, num_shards, shard_bytes, progress):
  """Writes one split's shards into `root` and returns its tfds.core.SplitInfo."""
  if num_shards is not None and not hasattr(examples, '__len__'):
    raise ValueError(f'split {split!r}: num_shards needs examples with a length, got {type(examples).__name__}; '
                     'leave num_shards out and shards are cut by size')
  lengths, sizes, writer = [], [], None
  written = 0
  try:
    for example in examples:
      record = encode(example)
      if num_shards:
        full = written * num_shards // len(examples) != len(lengths) - 1
      else:
        full = not lengths or sizes[-1] + len(record) > shard_bytes
      if full:
        if writer is not None:
          writer.close()
        writer = shard_writer(root / f'{split}.{len(lengths)}')
        lengths.append(0)
        sizes.append(0)
      writer.write(record)
      lengths[-1] += 1
      sizes[-1] += len(record)
      written += 1
      if progress and written % _PROGRESS_EVERY == 0:
        progress(split, written)
  finally:
    if writer is not None:
      writer.close()
  if progress and written:
    progress(split, written)
  return finish_split(root, name=name, split=split, num_bytes=sum(sizes),
                      shards=[(root / f'{split}.{i}', length) for i, length in enumerate(lengths)])


def shard_writer(path: str | os.PathLike) -> array_record_module.ArrayRecordWriter:
  """A writer of one shard; every record can be read alone.

  Uncompressed: encoded images do not get smaller (a quarter of a percent), and trying costs most of the writing.
  """
  return array_record_module.ArrayRecordWriter(os.fspath(path), 'group_size:1,uncompressed')


def finish_split(root: pathlib.Path, *, name: str, split: str, shards: Sequence[tuple[pathlib.Path, int]],
                 num_bytes: int, move: Callable[[pathlib.Path, pathlib.Path], Any] = pathlib.Path.rename,
                 ) -> tfds.core.SplitInfo:
  """Gives a split's whole shards, [(file, records)] in order, their final names in `root`.

  The names carry the number of shards, which is known only when all are written. `move` takes a shard's file and its
  final path; shards in an object store, for one, are not renamed as files are.

  Raises:
    ValueError: if there are no shards.
  """
  if not shards:
    raise ValueError(f'split {split!r} of data set {name!r} has no examples: a data set without images is of no use')
  template = tfds.core.ShardedFileTemplate(
      data_dir=root, dataset_name=name, split=split, filetype_suffix='array_record')
  for index, (path, _) in enumerate(shards):
    move(path, pathlib.Path(template.sharded_filepath(shard_index=index, num_shards=len(shards))))
  return tfds.core.SplitInfo(name=split, shard_lengths=[length for _, length in shards], num_bytes=num_bytes,
                             filename_template=template)


def write_info(root: pathlib.Path, *, meta: DatasetMeta, infos: Sequence[tfds.core.SplitInfo],
               made_by: bool = False) -> None:
  """Writes what makes a folder of named shards a data set; `made_by` says that every record has that field."""
  extra = {'format': FORMAT, 'categories': list(meta.categories),
           'unseen_categories': list(meta.unseen_categories), 'extra': meta.extra}
  tfds.folder_dataset.write_metadata(
      data_dir=root, features=features(made_by=made_by), split_infos=infos, version=VERSION, check_data=False,
      description=meta.description, disable_shuffling=True, metadata=tfds.core.MetadataDict({_META_KEY: extra}))


def swap_in(scratch: pathlib.Path, out: pathlib.Path) -> None:
  """Puts `scratch` at `out`; the old folder is removed only after the new one has its place."""
  retired = out.parent / f'.{out.name}.{os.getpid()}.old'
  if out.exists():
    out.rename(retired)
  scratch.rename(out)
  shutil.rmtree(retired, ignore_errors=True)
