"""Visual Genome's region descriptions and objects → a region-text data set.

All files are lists with an item an image: `image_data.json` (image_id, url, width, height), `region_descriptions.json`
(id, regions: [{x, y, width, height, phrase}]) and `objects.json` (image_id, objects: [{x, y, w, h, names}]), boxes in
pixels. Older versions write id for image_id.
Sources: Krishna et al., *Visual Genome*, 2016; homes.cs.washington.edu/~ranjay/visualgenome/api_readme (layout).
"""
from collections.abc import Iterator
import dataclasses
import json
import os
import zlib

from cloc_jax.data import schema
from cloc_jax.data import storage
from cloc_jax.data.importers import counts as counts_lib
from cloc_jax.data.importers import engine
from cloc_jax.data.importers import images
from cloc_jax.data.importers import json_stream
from cloc_jax.data.importers import records


@dataclasses.dataclass(frozen=True)
class _Image:
  """An image and the packed entries of it: (list's name, index of its item in the file, bytes)."""
  image_id: str
  name: str
  size: tuple[int, int]
  packed: tuple[tuple[str, int, bytes], ...]


@dataclasses.dataclass
class VisualGenome(engine.Importer):
  """Visual Genome's importer; all images are in one split, as it has none of its own.

  Region descriptions have the source 'region', objects 'object' and their first name as caption and category. The
  names are an open vocabulary: meta.categories is empty.

  image_data, regions, objects: the files; `regions` or `objects` may be None.
  images: the folder that holds VG_100K and VG_100K_2, or all images.
  split: its name. name, trust_boxes, images_per_shard: see coco.Coco.
  """
  images: str | os.PathLike
  image_data: str | os.PathLike
  regions: str | os.PathLike | None = None
  objects: str | os.PathLike | None = None
  split: str = 'train'
  name: str = 'visual_genome'
  trust_boxes: bool = False
  images_per_shard: int = 1024

  def __post_init__(self):
    if self.regions is None and self.objects is None:
      raise ValueError('expected region descriptions, objects or both')
    records.check_folder(self.images)

  def files(self) -> list[str | os.PathLike]:
    return [json_stream.check_file(p) for p in (self.image_data, self.regions, self.objects) if p is not None]

  def splits(self) -> dict[str, list[engine.Task]]:
    self._counts = counts_lib.Counts()
    listed: dict[int, tuple[str, tuple[int, int]]] = {}
    for i, item in enumerate(json_stream.items(self.image_data, None)):
      where = f'{self.image_data}: [{i}]'
      key, url, height, width = _image_id(item, where), *(
          json_stream.get(item, k, where=where) for k in ('url', 'height', 'width'))
      if not all(isinstance(side, int) and side > 0 for side in (height, width)):
        raise ValueError(f'{where}: expected height and width in whole pixels, got {height!r} and {width!r}')
      if key in listed:
        self._counts.dropped('images', 'listed twice', f'{where}, id {key}')
      listed.setdefault(key, ('/'.join(str(url).split('/')[-2:]), (height, width)))
    packed = {key: [] for key in listed}
    for path, name in ((self.regions, 'regions'), (self.objects, 'objects')):
      for i, item in enumerate(json_stream.items(path, None) if path is not None else ()):
        where = f'{path}: [{i}]'
        key, entries = _image_id(item, where), json_stream.get(item, name, where=where)
        if key in packed:
          # A hundred thousand images with ninety entries each: packed they take a tenth of the memory.
          packed[key].append((name, i, zlib.compress(json.dumps(entries).encode(), 1)))
        else:
          self._counts.dropped('boxes', 'of an image not listed', where, len(entries))
    rows = [_Image(str(key), name, size, tuple(packed.pop(key))) for key, (name, size) in listed.items()]
    return {self.split: [
        engine.Task(f'images {i * self.images_per_shard} to {i * self.images_per_shard + len(piece) - 1}', piece,
                    images=len(piece)) for i, piece in enumerate(records.chunks(rows, self.images_per_shard))]}

  def counts(self) -> dict[str, counts_lib.Counts]:
    return {self.split: self._counts}

  def read(self, task: engine.Task, report: counts_lib.Counts) -> Iterator[schema.Example]:
    folder = storage.path(self.images)
    found = (records.Record(
        image.image_id, images.find_file(folder, image.name, search=True), size=image.size, convention='xywh pixels',
        phrases=tuple(self._phrases(image))) for image in task.payload)
    yield from records.examples(found, report, where=f'{self.name}, {task.label}', trust_boxes=self.trust_boxes)

  def meta(self) -> schema.DatasetMeta:
    return schema.DatasetMeta(
        name=self.name, description='Visual Genome: photos with described regions and named objects.',
        extra={'provenance': 'Visual Genome annotations (CC BY 4.0)',
               'files': [storage.path(path).name for path in self.files()]})

  def _phrases(self, image):
    for name, item, data in image.packed:
      path = self.regions if name == 'regions' else self.objects
      for i, entry in enumerate(json.loads(zlib.decompress(data))):
        where = f'{path}: [{item}], {name}[{i}]'
        sides = ('width', 'height') if name == 'regions' or 'width' in entry else ('w', 'h')
        box = [json_stream.get(entry, key, where=where) for key in ('x', 'y', *sides)]
        if name == 'regions':
          caption = json_stream.get(entry, 'phrase', where=where)
        else:
          caption = next(iter(json_stream.get(entry, 'names', where=where)), '')
        if not isinstance(caption, str):
          raise ValueError(f'{where}: expected a text, got {caption!r:.80}')
        yield records.Phrase(box, caption, f'{name}[{i}]', category=caption.strip() if name == 'objects' else '',
                             source=name.removesuffix('s'))


def _image_id(item, where):
  return item['image_id'] if isinstance(item, dict) and 'image_id' in item else json_stream.get(item, 'id', where=where)
