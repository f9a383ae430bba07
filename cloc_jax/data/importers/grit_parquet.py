"""GRIT's Parquet files → a region-text data set. Three layouts, told apart by their columns:

- img2dataset's `--output_format=parquet`: a row an image that was asked for, with `jpg` (or `png`, `webp`: the encoding
  is the column's name) holding its bytes, none for a failed one, and `key`, `status`, `width`, `height`,
  `original_width`, `original_height` beside the columns that were saved;
- img2dataset's `--output_format=files`: the same without bytes, the image being SHARD/KEY.jpg beside SHARD.parquet;
- GRIT's own files (`coyo_0_snappy.parquet`: key, id, url, caption, width, height, noun_chunks, ref_exps, …), and images
  that were fetched in another way, called by a column; or with `image` in the row, as Hugging Face stores images.
Sources: github.com/rom1504/img2dataset (writer.py: ParquetSampleWriter, FilesSampleWriter; downloader.py: the columns);
huggingface.co/datasets/zzliang/GRIT (its card: the fields).
"""
from collections.abc import Iterator
import dataclasses
import os
from typing import Any

from cloc_jax.data import schema
from cloc_jax.data import storage
from cloc_jax.data.importers import counts as counts_lib
from cloc_jax.data.importers import engine
from cloc_jax.data.importers import grit
from cloc_jax.data.importers import json_stream
from cloc_jax.data.importers import parquet_file
from cloc_jax.data.importers import records
from cloc_jax.data.importers import rows as rows_lib

_ENCODINGS = ('jpg', 'png', 'webp')  # img2dataset's --encode_format


@dataclasses.dataclass(frozen=True)
class ParquetSource:
  """One split.

  split: its name.
  files: .parquet files.
  images: the folder of images, where rows have no bytes; None for the folder of each file.
  """
  split: str
  files: tuple[str | os.PathLike, ...]
  images: str | os.PathLike | None = None


@dataclasses.dataclass
class GritParquet(engine.Importer):
  """The importer; see grit.Grit for what becomes of phrases and of images that have lost their proportions.

  sources: one for each split.
  phrases: 'noun_chunks', 'ref_exps' or 'both'.
  image_path: where an image lies below the folder, with columns and the Parquet file's stem in braces: '{id}.jpg',
    '{file}/{key}.jpg'. Without an extension it is looked for with jpg, jpeg, png and webp. None: '{file}/{key}' for
    img2dataset's files, '{id}' for GRIT's own.
  name, trust_boxes, images_per_shard: see coco.Coco. A shard is at least one row group.
  """
  sources: tuple[ParquetSource, ...]
  phrases: str = 'both'
  image_path: str | None = None
  name: str = 'grit'
  trust_boxes: bool = False
  images_per_shard: int = 1024

  def __post_init__(self):
    self.sources = records.check_splits(self.sources)
    grit.check_choice(self.phrases)
    for source in self.sources:
      if source.images is not None:
        records.check_folder(source.images)

  def files(self) -> list[str | os.PathLike]:
    return [json_stream.check_file(path) for source in self.sources for path in source.files]

  def splits(self) -> dict[str, list[engine.Task]]:
    found = {}
    for source in self.sources:
      tasks = found[source.split] = []
      for path in map(json_stream.check_file, source.files):
        self._check_columns(path)
        folder = path.parent if source.images is None else storage.path(source.images)
        tasks += [engine.Task(f'{path.name}, rows {row} to {row + count - 1}', images=count,
                              payload=rows_lib.Piece(path, folder, begin, end, row))
                  for begin, end, row, count in parquet_file.cut(path, self.images_per_shard)]
    return found

  def read(self, task: engine.Task, report: counts_lib.Counts) -> Iterator[schema.Example]:
    piece = task.payload
    found = (record for number, row in parquet_file.read(piece.path, begin=piece.begin, end=piece.end, row=piece.row)
             if (record := self._record(row, number, piece, report)))
    yield from records.examples(found, report, where=str(piece.path), trust_boxes=self.trust_boxes)
    if not self.trust_boxes:
      grit.check_proportions(report, where=f'{piece.path}, {task.label}')

  def meta(self) -> schema.DatasetMeta:
    return schema.DatasetMeta(name=self.name, description=grit.Grit.description,
                              extra={'files': [storage.path(p).name for s in self.sources for p in s.files]})

  def _check_columns(self, path):
    have = parquet_file.columns(path)
    wanted = ['caption', *(key for key in ('noun_chunks', 'ref_exps') if self.phrases in ('both', key))]
    missing = [name for name in wanted if name not in have]
    if missing:
      raise ValueError(
          f"{path}: no columns {missing}; found {have}. img2dataset saves them with --caption_col caption "
          '--save_additional_columns \'["id","noun_chunks","ref_exps"]\'')

  def _record(self, row, number, piece, report):
    where = f'{piece.path}: row {number}'
    fetched = 'status' in row  # by img2dataset
    if fetched:
      image_id = f'{piece.path.stem}/{row.get("key")}'
    else:
      image_id = str(row['id']) if row.get('id') is not None else f'{piece.path.stem}-{number}'
    if fetched and row['status'] != 'success':
      report.dropped('images', str(row['status'] or 'no status').replace('_', ' '), image_id)
      lists = [row.get(key) or () for key in ('noun_chunks', 'ref_exps') if self.phrases in ('both', key)]
      records.lost(report, 'image lost', image_id=image_id, boxes=sum(map(len, lists)), captions=1)
      return None
    image = self._image(row, piece, where)
    height, width = ('original_height', 'original_width') if fetched else ('height', 'width')
    changed = isinstance(image, bytes) and grit.reshaped(image, (row.get(height), row.get(width)))
    return records.Record(
        image_id, image, captions=(str(row['caption']),) if row['caption'] is not None else (),
        phrases=tuple(grit.phrases_of(row, choice=self.phrases, where=where, changed=changed)))

  def _image(self, row: dict[str, Any], piece, where):
    """The image's bytes; or its path, if it is not there."""
    found = [row[name] for name in _ENCODINGS if row.get(name) is not None]
    if found:
      return found[0]
    if row.get('image') is not None:
      return rows_lib.image_of(row['image'], piece.folder, where)[0]
    path = self._path(row, piece, where)
    try:
      return path.read_bytes()
    except OSError:
      return path  # which is loaded again, and what is wrong with it counted or raised

  def _path(self, row, piece, where):
    template = self.image_path or ('{file}/{key}' if 'status' in row else '{id}')
    try:
      name = template.format(**{'file': piece.path.stem, **row})
    except (KeyError, IndexError, ValueError) as error:
      raise ValueError(f'{where}: the image path {template!r} asks for {error}; there are file and the columns '
                       f'{sorted(row)}') from None
    if storage.path(name).suffix:
      return storage.join(piece.folder, name)
    for extension in ('.jpg', '.jpeg', '.png', '.webp'):
      path = storage.join(piece.folder, name + extension)
      if path.is_file():
        return path
    return storage.join(piece.folder, f'{name}.jpg')
