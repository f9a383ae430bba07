"""RefCOCO, RefCOCO+ and RefCOCOg as others have packed them anew → a region-text data set. Told apart by their keys:

- MDETR: `finetune_refcoco_train.json` in COCO's layout, an image and an annotation for each sentence: images
  {file_name, height, width, id, original_id, caption, …}, annotations {image_id, category_id, bbox, original_id, …}.
  github.com/ashkamath/mdetr, scripts/fine-tuning/refexp_coco_format.py at ea09acc.
- UNINEXT: `instances_train.json`, the same for each reference: images {file_name, height, width, id, expressions}, one
  category 'object'. github.com/MasterBin-IIAU/UNINEXT, conversion/convert_ref2coco.py at 5ab0386.
- SeqTR: `instances.json`, {split: [{image_id, bbox, expressions, height, width, …}]}.
  github.com/seanzhuh/SeqTR, seqtr/datasets/base.py and pipelines/loading.py at 445e732.
- lmms-lab/RefCOCO, RefCOCOplus, RefCOCOg: rows {question_id, image, question, answer, segmentation, bbox, iscrowd,
  file_name}. Columns: its card on huggingface.co; boxes: github.com/EvolvingLMMs-Lab/lmms-eval, tasks/refcoco/utils.py.
- jxu124/refcoco, refcocoplus, refcocog: rows with image_path, and COCO's own entries as texts, raw_anns and
  raw_image_info. Its card on huggingface.co. Boxes are taken from raw_anns: what `bbox` means is said nowhere.
- moondream/refcoco-m: rows {image, image_id, file_name, samples: [{id, category, sentences, bbox, …}]}; its card.

All boxes are COCO's, xywh in pixels.
"""
from collections.abc import Iterator
import dataclasses
import json
import os
import re
from typing import Any

from cloc_jax.data import schema
from cloc_jax.data import storage
from cloc_jax.data.importers import counts as counts_lib
from cloc_jax.data.importers import engine
from cloc_jax.data.importers import images
from cloc_jax.data.importers import json_stream
from cloc_jax.data.importers import parquet_file
from cloc_jax.data.importers import records
from cloc_jax.data.importers import refcoco_counts
from cloc_jax.data.importers import rows as rows_lib

_SPLITS = ('train', 'val', 'test', 'testA', 'testB')
_ROWS = {  # layout → the columns that are read
    'lmms-lab': ('image', 'answer', 'bbox', 'file_name'),
    'jxu124': ('image_path', 'raw_anns', 'raw_image_info', 'sentences'),
    'refcoco-m': ('image', 'image_id', 'samples')}
_EXPECTED = (
    "MDETR's and UNINEXT's JSON have 'images' (with 'caption' or 'expressions') and 'annotations'; SeqTR's a list for "
    'each split; Parquet and JSONL rows ' + '; or '.join(f'{list(keys)} ({name})' for name, keys in _ROWS.items()))


@dataclasses.dataclass(frozen=True)
class RepackSource:
  """One split.

  split: its name; one of its own in SeqTR's file.
  files: .json, .jsonl or .parquet files.
  """
  split: str
  files: tuple[str | os.PathLike, ...]


@dataclasses.dataclass
class _Image:
  """name: a file below the folder of images; None where the row has bytes, which is then `row` of `path`."""
  image_id: str
  name: str | None
  size: tuple[int, int] | None = None
  path: storage.Path | None = None
  row: int = 0
  phrases: list[records.Phrase] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class _Piece:
  """Images whose bytes are in row groups begin to end of a Parquet file, of which `row` is the first row; by row."""
  path: storage.Path
  begin: int
  end: int
  row: int
  images: dict[int, _Image]


@dataclasses.dataclass
class RefCocoRepack(engine.Importer):
  """The importer: one record an image, one region a sentence. An image that is in several rows is taken from the first.

  sources: one for each split.
  images: the folder of COCO_train2014_….jpg; None where the rows hold the images.
  name, trust_boxes, images_per_shard: see refcoco.RefCoco.
  """
  sources: tuple[RepackSource, ...]
  images: str | os.PathLike | None = None
  name: str = 'refcoco'
  trust_boxes: bool = False
  images_per_shard: int = 1024

  def __post_init__(self):
    self.sources = records.check_splits(self.sources)
    if self.images is not None:
      records.check_folder(self.images)

  def files(self) -> list[str | os.PathLike]:
    return [json_stream.check_file(path) for source in self.sources for path in source.files]

  def splits(self) -> dict[str, list[engine.Task]]:
    self._counts = {source.split: counts_lib.Counts() for source in self.sources}
    found = {}
    for source in self.sources:
      tally, listed = refcoco_counts.Tally(), {}
      for path in map(json_stream.check_file, source.files):
        for image, reference, phrases in _references(path, source.split, self.name):
          kept = listed.setdefault(image.image_id, image)
          kept.phrases += phrases
          tally.references.add(reference)
          tally.images.add(image.image_id)
          tally.sentences += len(phrases)
      refcoco_counts.check({source.split: tally}, self._counts, name=self.name, path=storage.path(source.files[0]))
      found[source.split] = self._tasks(source, list(listed.values()))
    return found

  def counts(self) -> dict[str, counts_lib.Counts]:
    return self._counts

  def read(self, task: engine.Task, report: counts_lib.Counts) -> Iterator[schema.Example]:
    piece = task.payload
    found = self._rows(piece) if isinstance(piece, _Piece) else map(self._record, piece)
    yield from records.examples(found, report, where=task.label, trust_boxes=self.trust_boxes)

  def meta(self) -> schema.DatasetMeta:
    return schema.DatasetMeta(
        name=self.name, description='Referring expressions for objects in COCO images.',
        extra={'provenance': 'RefCOCO annotations on COCO images, packed anew',
               'data_set': refcoco_counts.data_set(self.name, storage.path(self.sources[0].files[0])),
               'files': [path.name for path in self.files()]})

  def _tasks(self, source, listed):
    named = [image for image in listed if image.name is not None]
    if named and self.images is None:
      raise ValueError(f'{source.files[0]} has no images in it: expected their folder (--images train2014)')
    size = self.images_per_shard
    tasks = [engine.Task(f'{source.split}, images {i * size} on', piece, images=len(piece))
             for i, piece in enumerate(records.chunks(named, size))]
    inside: dict[Any, dict[int, _Image]] = {}
    for image in listed:
      if image.name is None:
        inside.setdefault(image.path, {})[image.row] = image
    for path, by_row in inside.items():
      pieces = parquet_file.cut(path, size) if path.suffix == '.parquet' else [(0, 0, 0, max(by_row) + 1)]
      for begin, end, row, count in pieces:
        mine = {number: by_row[number] for number in range(row, row + count) if number in by_row}
        if mine:
          tasks.append(engine.Task(f'{path}, rows {row} to {row + count - 1}', images=len(mine),
                                   payload=_Piece(path, begin, end, row, mine)))
    return tasks

  def _record(self, image):
    path = images.find_file(self.images, image.name, search=True)
    return records.Record(image.image_id, path, size=image.size, phrases=tuple(image.phrases),
                          convention='xywh pixels')

  def _rows(self, piece):
    for number, row in _rows(piece.path, piece.begin, piece.end, piece.row, ('image',)):
      image = piece.images.get(number)
      if image is not None:
        data, _ = rows_lib.image_of(row['image'], piece.path.parent, f'{piece.path}: row {number}')
        yield records.Record(image.image_id, data, size=image.size, phrases=tuple(image.phrases),
                             convention='xywh pixels')


def _references(path, split, source) -> Iterator[tuple[_Image, Any, list[records.Phrase]]]:
  """Yields (image, what tells the reference from others, its phrases), whatever the layout."""
  if path.suffix in ('.parquet', '.jsonl'):
    yield from _of_rows(path, source)
    return
  keys = []
  for key in json_stream.keys(path):
    keys.append(key)
    if key in ('images', 'annotations'):
      yield from _of_coco(path, source)
      return
    if key in _SPLITS:
      yield from _of_seqtr(path, split, source)
      return
  raise ValueError(f'{path}: its keys {keys} are of no layout that is known. {_EXPECTED}')


def _of_coco(path, source):
  """MDETR's and UNINEXT's."""
  categories = {json_stream.get(item, 'id', where=f'{path}: categories[{i}]'): str(item.get('name', ''))
                for i, item in enumerate(json_stream.items(path, 'categories'))}
  if set(categories.values()) == {'object'}:
    categories = {}
  listed = {}
  for i, item in enumerate(json_stream.items(path, 'images')):
    where = f'{path}: images[{i}]'
    key, name, height, width = (json_stream.get(item, k, where=where) for k in ('id', 'file_name', 'height', 'width'))
    texts = [item['caption']] if 'caption' in item else item.get('expressions')
    listed[key] = _image(str(name), item.get('original_id'), (height, width)), _texts(texts, where, item)
  for i, item in enumerate(json_stream.items(path, 'annotations')):
    where = f'{path}: annotations[{i}]'
    key, box = (json_stream.get(item, k, where=where) for k in ('image_id', 'bbox'))
    if key not in listed:
      raise ValueError(f"{where}: image_id {key!r} is not among the file's images")
    image, texts = listed[key]
    category = categories.get(item.get('category_id'), '')
    yield (dataclasses.replace(image, phrases=[]), item.get('original_id', item.get('id')),
           _phrases(texts, box, f'annotations[{i}]', category, source))


def _of_seqtr(path, split, source):
  for i, item in enumerate(json_stream.items(path, split)):
    where = f'{path}: {split}[{i}]'
    key, box, height, width, texts = (
        json_stream.get(item, k, where=where) for k in ('image_id', 'bbox', 'height', 'width', 'expressions'))
    if 'coco' not in str(item.get('data_source', 'coco')):
      raise ValueError(f"{where}: expected COCO's images, got data_source {item['data_source']!r}")
    image = _image(f'COCO_train2014_{int(key):012}.jpg', key, (height, width))
    yield image, i, _phrases(_texts(texts, where, item), box, f'{split}[{i}]', '', source)


def _of_rows(path, source):
  have = parquet_file.columns(path) if path.suffix == '.parquet' else next(_rows(path, 0, None, 0, None), (0, {}))[1]
  layout = next((name for name, wanted in _ROWS.items() if set(wanted) <= set(have)), None)
  if layout is None:
    raise ValueError(f'{path}: its columns {sorted(have)} are of no layout that is known. {_EXPECTED}')
  columns = [name for name in _ROWS[layout] if name != 'image']
  for number, row in _rows(path, 0, None, 0, columns):
    where = f'{path}: row {number}'
    if layout == 'lmms-lab':
      image = _image(str(row['file_name']), None, None)
      yield (dataclasses.replace(image, name=None, path=path, row=number), (path.name, number),
             _phrases(_texts(row['answer'], where, row), row['bbox'], f'row {number}', '', source))
    elif layout == 'jxu124':
      annotation, info = (_parsed(row, key, where) for key in ('raw_anns', 'raw_image_info'))
      size = tuple(json_stream.get(info, key, where=f'{where}: raw_image_info') for key in ('height', 'width'))
      texts = [str(json_stream.get(item, 'sent', where=f'{where}: sentences')) for item in row['sentences'] or ()]
      box = json_stream.get(annotation, 'bbox', where=f'{where}: raw_anns')
      yield (_image(os.path.basename(str(row['image_path'])), None, size), (path.name, number),
             _phrases(texts, box, f'row {number}', '', source))
    else:
      image = _Image(str(row['image_id']), None, None, path, number)
      for j, sample in enumerate(row['samples'] or ()):
        at = f'{where}: samples[{j}]'
        texts, box = (json_stream.get(sample, key, where=at) for key in ('sentences', 'bbox'))
        yield image, (number, j), _phrases(_texts(texts, at, sample), box, f'row {number}, samples[{j}]',
                                           str(sample.get('category') or ''), source)


def _rows(path, begin, end, row, wanted):
  """(number, row); JSONL is read whole by whoever reads it, line after line."""
  if path.suffix == '.parquet':
    yield from parquet_file.read(path, begin=begin, end=end, row=row, wanted=wanted)
    return
  with path.open('r', encoding='utf-8') as file:
    for number, line in enumerate(file):
      try:
        yield number, json.loads(line)
      except ValueError as error:
        raise ValueError(f'{path}: row {number} is no JSON (is the file cut off?): {error}') from None


def _image(name, key, size):
  """An image by its file's name, which also tells its id: COCO_train2014_000000581857_16.jpg is of image 581857."""
  found = re.fullmatch(r'(COCO_train2014_0*(\d+))(_\d+)?(\.jpg)?', os.path.basename(name))
  if key is None:
    key = found.group(2) if found else os.path.splitext(os.path.basename(name))[0]
  return _Image(str(key), f'{found.group(1)}.jpg' if found else name, size)


def _phrases(texts, box, name, category, source):
  return [records.Phrase(box, text, f'{name}, sentence {j}', category=category, source=source)
          for j, text in enumerate(texts)]


def _texts(value, where, item):
  if isinstance(value, (list, tuple)) and all(isinstance(text, str) for text in value):
    return value
  raise ValueError(f"{where}: expected the sentences, a list of texts under 'caption', 'expressions', 'answer' or "
                   f"'sentences'; got {value!r:.80} among the keys {sorted(item)}")


def _parsed(row, key, where):
  try:
    return json.loads(row[key])
  except (TypeError, ValueError):
    raise ValueError(f'{where}: {key!r} must be a JSON text, got {row[key]!r:.80}') from None
