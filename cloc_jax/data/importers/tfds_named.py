"""Any data set that `tfds.load` knows → a region-text data set, through a map of its features. Without TensorFlow.

Read is what `tfds build` has prepared, DATA_DIR/NAME[/CONFIG]/VERSION, by its own features.json: the code of the data
set is not run. Records are tf.train.Example messages under flat names ('objects/bbox'), in ArrayRecord or TFRecord
files; a list of lists is stored as NAME/ragged_flat_values and NAME/ragged_row_lengths_0. An image's encoded bytes are
taken as they are.
Sources: tensorflow_datasets' core/example_serializer.py and core/utils/shard_utils.py (layout), object_detection/,
datasets/ and vision_language/ (features of coco, coco_captions, voc, lvis, open_images_v4, ref_coco, gref, …);
tensorflow/core/lib/io/record_writer.h (TFRecord).
"""
from collections.abc import Iterator, Sequence
import dataclasses
import difflib
import functools
import os
import re
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from cloc_jax import box_conventions
from cloc_jax.data import schema
from cloc_jax.data import storage
from cloc_jax.data.importers import counts as counts_lib
from cloc_jax.data.importers import engine
from cloc_jax.data.importers import open_images
from cloc_jax.data.importers import record_files
from cloc_jax.data.importers import records

ROLES = ('image', 'image_id', 'boxes', 'category', 'phrases', 'crowd', 'captions')
# What a role is taken from where nothing is said, if there is such a feature and it is of the right kind.
_USUAL = {
    'image': ('image',),
    'image_id': ('image/id', 'image_id', 'image/filename', 'filename', 'id'),
    'boxes': ('objects/bbox', 'bobjects/bbox', 'panoptic_objects/bbox'),
    'captions': ('captions/text', 'captions', 'caption')}
_BESIDE_BOXES = {'category': ('label', 'type'), 'phrases': ('refexp/raw',), 'crowd': ('is_crowd', 'is_group_of')}
_BOX_FORMATS = {'REL_YXYX': 'yxyx normalised', 'REL_XYXY': 'xyxy normalised', 'YXYX': 'yxyx pixels',
                'XYXY': 'xyxy pixels', 'XYWH': 'xywh pixels'}
_IMAGE_ENDING = re.compile(r'\.(jpe?g|png|webp|bmp|gif)$', re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class _Field:
  """A feature by its flat name. rank: how many lists are around each value."""
  name: str
  feature: tfds.features.FeatureConnector
  rank: int


@dataclasses.dataclass(frozen=True)
class _Piece:
  """Records `skip` to `skip + take` of a file; `first` is the place of the first in its split."""
  path: str
  skip: int
  take: int
  first: int
  split: str


@dataclasses.dataclass
class Tfds(engine.Importer):
  """The importer.

  A region's caption is its phrase, several phrases give several regions, and without phrases its category's name, in
  lower case and with spaces for underscores. Boxes whose `crowd` is true are left out.

  dataset: 'coco/2017', 'voc/2012:4.0.0'; or the folder of one version.
  data_dir: where `tfds build` put it; None for TFDS_DATA_DIR, or ~/tensorflow_datasets.
  wanted: splits: (name in the data set to be, split of TFDS: 'train', 'train[:1000]', 'train+val').
  fields: (role, feature) pairs; roles are ROLES, captions may be there several times. Those not said are guessed from
    the usual names.
  boxes: their convention, one of box_conventions.CONVENTIONS; None for what a BBoxFeature says of itself.
  classes: a CSV file (label, name) for labels that are codes, as Open Images'.
  with_boxes: False for images and texts alone, whatever boxes there are.
  name, trust_boxes: see coco.Coco. A shard of the source becomes a shard.
  """
  dataset: str
  data_dir: str | os.PathLike | None = None
  wanted: tuple[tuple[str, str], ...] = (('train', 'train'),)
  fields: tuple[tuple[str, str], ...] = ()
  boxes: str | None = None
  classes: str | os.PathLike | None = None
  name: str = 'tfds'
  trust_boxes: bool = False
  with_boxes: bool = True

  def __post_init__(self):
    if self.boxes is not None and self.boxes not in box_conventions.CONVENTIONS:
      raise ValueError(f'unknown box convention {self.boxes!r}; known are {list(box_conventions.CONVENTIONS)}')
    for role, _ in self.fields:
      if role not in ROLES:
        near = difflib.get_close_matches(role, ROLES, n=1)
        hint = f'; did you mean {near[0]!r}?' if near else ''
        raise ValueError(f'unknown field {role!r}; known are {list(ROLES)}{hint}')
    self._folder = os.fspath(find_version(self.dataset, self.data_dir))
    self._source = _builder(self._folder).name
    self._fields = choose(_builder(self._folder).info.features, self.fields, where=self._folder,
                          with_boxes=self.with_boxes)
    self._convention = self._convention_of(self._fields)

  @property
  def gathers_categories(self) -> bool:
    """Where categories are texts, nobody lists them beforehand."""
    return self._names() is None

  def files(self) -> list[str | os.PathLike]:
    found = [os.fspath(storage.path(self._folder) / schema.INFO_FILE)]
    return found + sorted({piece.path for tasks in self._pieces().values() for piece in tasks}) + (
        [self.classes] if self.classes is not None else [])

  def splits(self) -> dict[str, list[engine.Task]]:
    return {name: [engine.Task(f'{os.path.basename(p.path)}, records {p.skip} to {p.skip + p.take - 1}', p,
                               images=p.take) for p in pieces] for name, pieces in self._pieces().items()}

  def read(self, task: engine.Task, report: counts_lib.Counts) -> Iterator[schema.Example]:
    piece, names = task.payload, self._names()
    found = (self._record(data, piece, piece.skip + i, piece.first + i, names)
             for i, data in enumerate(record_files.read(piece.path, skip=piece.skip, take=piece.take)))
    yield from records.examples(found, report, where=piece.path, trust_boxes=self.trust_boxes)

  def meta(self) -> schema.DatasetMeta:
    builder = _builder(self._folder)
    chosen = {role: [field.name for field in fields] for role, fields in self._fields.items()}
    return schema.DatasetMeta(
        name=self.name, description=builder.info.description or '', categories=tuple(self._names() or ()),
        extra={'provenance': f'tfds {builder.info.full_name}', 'fields': chosen, 'boxes': self._convention})

  def _pieces(self):
    info, found = _builder(self._folder).info, {}
    for name, split in self.wanted:
      try:
        instructions = info.splits[split].file_instructions
      except (KeyError, ValueError) as error:
        raise ValueError(f'{self._folder} has no split {split!r}; it has {sorted(info.splits)} ({error})') from None
      first, found[name] = 0, []
      for item in instructions:
        take = item.examples_in_shard - item.skip if item.take < 0 else item.take
        found[name].append(_Piece(os.fspath(item.filename), item.skip, take, first, name))
        first += take
    return found

  def _convention_of(self, found):
    if self.boxes is not None or 'boxes' not in found:
      return self.boxes
    kind = getattr(found['boxes'][0].feature, 'bbox_format', None)
    if kind is None or kind.name not in _BOX_FORMATS:
      raise ValueError(f"{self._folder}: {found['boxes'][0].name} does not say how its boxes are written: expected "
                       f"--boxes, one of {list(box_conventions.CONVENTIONS)}")
    return _BOX_FORMATS[kind.name]

  def _names(self) -> list[str] | None:
    """Class names in the order of their numbers; None where categories are texts, or there are none."""
    feature = self._fields['category'][0].feature if 'category' in self._fields else None
    if not isinstance(feature, tfds.features.ClassLabel):
      return None
    names = list(feature.names)
    if self.classes is not None:
      known = open_images.read_class_names(self.classes)
      missing = [name for name in names if name not in known]
      if missing:
        raise ValueError(f'{self.classes}: no names for {len(missing)} labels, {missing[0]!r} for instance')
      names = [known[name] for name in names]
    elif names and all(name.startswith('/m/') for name in names):
      raise ValueError(f'{self._folder}: labels are codes such as {names[0]!r}: expected --classes '
                       '…-class-descriptions-boxable.csv, which names them')
    return [_plain(name) for name in names]

  def _record(self, data, piece, place, number, names):
    where = f'{piece.path}: record {place}'
    try:
      feature = tf_example_pb2.Example.FromString(data).features.feature
    except Exception as error:  # protobuf's own
      raise ValueError(f'{where} is damaged: {error}') from None
    values = {role: [_values(feature, field, where) for field in fields] for role, fields in self._fields.items()}
    image_id = values.get('image_id', [None])[0]
    image_id = f'{piece.split}-{number}' if image_id is None else _IMAGE_ENDING.sub('', str(image_id))
    captions = [text for value in values.get('captions', ()) for text in ([value] if isinstance(value, str) else value)]
    image = values['image'][0]
    if not isinstance(image, bytes):
      raise ValueError(f'{where}: no image under {self._fields["image"][0].name!r}')
    return records.Record(image_id, image, captions=tuple(captions), phrases=tuple(self._phrases(values, where, names)),
                          convention=self._convention or 'xyxy normalised')

  def _phrases(self, values, where, names):
    boxes = values.get('boxes', [[]])[0]
    columns = {role: values[role][0] for role in ('category', 'phrases', 'crowd') if role in values}
    for role, column in columns.items():
      if len(column) != len(boxes):
        raise ValueError(f'{where}: {len(boxes)} boxes, but {len(column)} of {self._fields[role][0].name!r}')
    for i, box in enumerate(boxes):
      category = columns['category'][i] if 'category' in columns else ''
      if names is not None:
        category = names[category] if 0 <= category < len(names) else ''
      texts = columns['phrases'][i] if 'phrases' in columns else category
      skip = 'crowd' if 'crowd' in columns and columns['crowd'][i] == 1 else ''
      for text in [texts] if isinstance(texts, str) else texts:
        yield records.Phrase(box, text, f'box {i}', category=category, source=self._source, skip=skip)


def find_version(dataset: str | os.PathLike, data_dir: str | os.PathLike | None) -> storage.Path:
  """The folder of a prepared version: `dataset` itself, or the newest of DATA_DIR/NAME[/CONFIG].

  Raises:
    FileNotFoundError: saying what there is, and how it is prepared.
  """
  if (storage.path(dataset) / schema.INFO_FILE).exists():
    return storage.path(dataset)
  root = storage.path(data_dir or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets')
  name, _, version = os.fspath(dataset).partition(':')
  folder = root.joinpath(*name.split('/'))
  prepared = sorted((path.parent for path in folder.glob(f'*/{schema.INFO_FILE}')),
                    key=lambda path: [int(part) if part.isdigit() else -1 for part in path.name.split('.')])
  if version:
    prepared = [path for path in prepared if path.name == version]
  if prepared:
    return prepared[-1]
  deeper = sorted(os.fspath(path.parent.parent.name) for path in folder.glob(f'*/*/{schema.INFO_FILE}'))
  hint = f'; it has the configs {sorted(set(deeper))}: expected {name}/CONFIG' if deeper else (
      f'. Prepare it where TensorFlow is: tfds build {dataset} --data_dir={root} --file_format=array_record')
  raise FileNotFoundError(f'{dataset} is not prepared in {root}{hint}')


def choose(features: tfds.features.FeaturesDict, said: Sequence[tuple[str, str]], *,
           where: str, with_boxes: bool = True) -> dict[str, list[_Field]]:
  """Role → its features: those said, and the usual ones for other roles.

  Raises:
    ValueError: naming `where`, for a feature that is not there or of another kind, and where one is missing.
  """
  found: dict[str, list[_Field]] = {}
  for role, name in said:
    found.setdefault(role, []).append(_said(features, role, name, where))
  several = [role for role, fields in found.items() if len(fields) > 1 and role != 'captions']
  if several:
    raise ValueError(f'field {several[0]!r} is there twice')
  for role, names in _USUAL.items():
    if role == 'boxes' and not with_boxes:
      continue
    _add_usual(found, features, role, names)
  if 'image' not in found:
    raise ValueError(f'{where}: no feature image: expected --field image=…; its features: {_spelt(features)}')
  if 'boxes' in found:
    beside = found['boxes'][0].name.rpartition('/')[0]
    for role, names in _BESIDE_BOXES.items():
      _add_usual(found, features, role, [f'{beside}/{name}' for name in names])
    if not found.keys() & {'category', 'phrases'}:
      raise ValueError(f'{where}: boxes without names: expected --field category=… or --field phrases=…; '
                       f'its features: {_spelt(features)}')
  return found


def _add_usual(found, features, role, names):
  usual = [field for name in names if (field := _find(features, name)) and not _complaint(role, field)]
  if role not in found and usual:
    found[role] = usual[:1]


def _said(features, role, name, where):
  field = _find(features, name)
  if field is None:
    near = difflib.get_close_matches(name, _leaves(features), n=1)
    raise ValueError(f'{where} has no feature {name!r}' + (f'; did you mean {near[0]!r}?' if near else '')
                     + f'; its features: {_spelt(features)}')
  wrong = _complaint(role, field)
  if wrong:
    raise ValueError(f'{where}: {role}={name}: expected {wrong}, got {type(field.feature).__name__}'
                     + ' in a list' * field.rank)
  return field


@functools.lru_cache(maxsize=4)
def _builder(folder):
  builder = tfds.builder_from_directory(folder)
  kind = builder.info.file_format
  if kind is None or kind.value not in record_files.FORMATS:
    raise ValueError(
        f'{folder} is written as {kind.value if kind else "nothing known"}; read are {list(record_files.FORMATS)}: '
        f'tfds convert_format --dataset_version_dir={folder} --out_file_format=array_record, where TensorFlow is')
  return builder


def _find(features, name) -> _Field | None:
  """The feature under a flat name; names of features may have '/' in them themselves ('image/id')."""
  def walk(feature, rest, rank):
    while isinstance(feature, tfds.features.Sequence):
      feature, rank = feature.feature, rank + 1
    if not rest:
      return None if isinstance(feature, tfds.features.FeaturesDict) else _Field(name, feature, rank)
    if not isinstance(feature, tfds.features.FeaturesDict):
      return None
    for key in feature:
      if rest == key or rest.startswith(f'{key}/'):
        found = walk(feature[key], rest[len(key) + 1:], rank)
        if found is not None:
          return found
    return None
  return walk(features, name, 0)


def _leaves(feature, prefix='') -> list[str]:
  """All flat names."""
  while isinstance(feature, tfds.features.Sequence):
    feature = feature.feature
  if not isinstance(feature, tfds.features.FeaturesDict):
    return [prefix]
  return [leaf for key in feature for leaf in _leaves(feature[key], f'{prefix}/{key}' if prefix else key)]


def _spelt(features):
  return ', '.join(f'{name} ({type(_find(features, name).feature).__name__})' for name in sorted(_leaves(features)))


def _complaint(role, field) -> str:
  """What is expected of a role's feature, '' if it is that."""
  f, feature = tfds.features, field.feature
  text = isinstance(feature, f.Text) or (feature.np_dtype == np.object_ and not isinstance(feature, f.Image))
  named = isinstance(feature, f.ClassLabel) and _has_names(feature)
  number = np.issubdtype(feature.np_dtype, np.integer) or feature.np_dtype == np.bool_
  if role == 'image':
    return '' if isinstance(feature, f.Image) and field.rank == 0 else 'an Image'
  if role == 'image_id':
    return '' if (text or number and feature.shape == ()) and field.rank == 0 else 'a text or a whole number'
  if role == 'boxes':
    return '' if feature.shape == (4,) and field.rank == 1 else 'a list of boxes (four numbers)'
  if role == 'category':
    return '' if (text or named) and field.rank == 1 else 'a list of ClassLabels with names, or of texts'
  if role == 'phrases':
    return '' if text and field.rank in (1, 2) else 'a list of texts, or of lists of them'
  if role == 'crowd':
    return '' if number and feature.shape == () and field.rank == 1 else 'a list of yes and no'
  return '' if text and field.rank <= 1 else 'a text or a list of texts'


def _has_names(feature):
  return feature.names != [str(i) for i in range(feature.num_classes)]  # as TFDS spells those it has no names for


def _values(feature, field, where) -> Any:
  """A field's value in a record: a number, text or bytes; a list of them; a list of lists."""
  if field.rank < 2:
    found = _flat(feature, field.name, field)
    return found if field.rank else (found[0] if found else None)
  flat = _flat(feature, f'{field.name}/ragged_flat_values', field)
  lengths = list(feature[f'{field.name}/ragged_row_lengths_0'].int64_list.value)
  if sum(lengths) != len(flat):
    raise ValueError(f'{where}: {field.name!r} has {len(flat)} values, but rows of {sum(lengths)}')
  ends = np.cumsum([0, *lengths]).tolist()
  return [flat[begin:end] for begin, end in zip(ends, ends[1:])]


def _flat(feature, key, field) -> Sequence[Any]:
  stored = feature[key]
  kind = stored.WhichOneof('kind')
  found = list(getattr(stored, kind).value) if kind else []
  if field.feature.shape == (4,):
    return [found[i:i + 4] for i in range(0, len(found), 4)]
  if kind == 'bytes_list' and not isinstance(field.feature, tfds.features.Image):
    return [value.decode('utf-8', errors='replace') for value in found]
  return found


def _plain(name):
  return name.replace('_', ' ').lower()
