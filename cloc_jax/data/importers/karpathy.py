"""Karpathy's splits of COCO, Flickr30k and Flickr8k → a data set of images with captions, for image–text retrieval.

`dataset_coco.json`, `dataset_flickr30k.json`, `dataset_flickr8k.json`: {dataset, images: [{filename, filepath (COCO
alone), cocoid (COCO alone), imgid, split, sentids, sentences: [{raw, tokens, imgid, sentid}]}]}. COCO's have a split
more, restval: images of val2014 that most people train on too (train+restval).
Sources: Karpathy, Fei-Fei, *Deep Visual-Semantic Alignments for Generating Image Descriptions*, 2015 (the splits, and
their sizes); github.com/karpathy/neuraltalk, imagernn/data_provider.py at 2c99eac (layout). Five captions an image:
Faghri et al., *VSE++*, 2018.
"""
from collections.abc import Iterator
import dataclasses
import os
import re

from cloc_jax.data import schema
from cloc_jax.data import storage
from cloc_jax.data.importers import counts as counts_lib
from cloc_jax.data.importers import engine
from cloc_jax.data.importers import images
from cloc_jax.data.importers import json_stream
from cloc_jax.data.importers import records

IMAGES = {  # data set → split → how many images were published
    'coco': {'train': 82783, 'restval': 30504, 'val': 5000, 'test': 5000},
    'flickr30k': {'train': 29000, 'val': 1014, 'test': 1000},
    'flickr8k': {'train': 6000, 'val': 1000, 'test': 1000}}
_ORDER = ('train', 'restval', 'val', 'test')


@dataclasses.dataclass
class Karpathy(engine.Importer):
  """The importer. Numbers of images that are not the published ones are noted.

  annotations: dataset_coco.json, dataset_flickr30k.json, ….
  images: the folder of train2014 and val2014, or of all images. COCO's are also found as 2017's release has them,
    in train2017 and val2017: they are the same files.
  wanted: splits to import; empty for all there are.
  captions_per_image: the first so many of each image; 0 for all. COCO's test split has 25 010 for 5 000 images.
  name, images_per_shard: see coco.Coco.
  """
  annotations: str | os.PathLike
  images: str | os.PathLike
  wanted: tuple[str, ...] = ()
  captions_per_image: int = 5
  name: str = 'karpathy'
  images_per_shard: int = 1024

  def __post_init__(self):
    records.check_folder(self.images)
    if self.captions_per_image < 0:
      raise ValueError(f'captions_per_image: expected a number, or 0 for all, got {self.captions_per_image}')

  def files(self) -> list[str | os.PathLike]:
    return [json_stream.check_file(self.annotations)]

  def splits(self) -> dict[str, list[engine.Task]]:
    by_split: dict[str, list] = {}
    seen, splits, self._counts = set(), set(), {}
    for i, item in enumerate(json_stream.items(self.annotations, 'images')):
      where = f'{self.annotations}: images[{i}]'
      name, split, sentences = (json_stream.get(item, key, where=where) for key in ('filename', 'split', 'sentences'))
      if not isinstance(name, str) or not isinstance(split, str) or not isinstance(sentences, list):
        raise ValueError(f"{where}: expected 'filename' and 'split' as texts and 'sentences' as a list, got {name!r}, "
                         f'{split!r} and {sentences!r:.80}')
      image_id = str(item.get('cocoid', os.path.splitext(name)[0]))
      if image_id in seen:
        raise ValueError(f'{where}: image {image_id!r} was there before')
      seen.add(image_id)
      splits.add(split)
      captions = tuple(str(json_stream.get(text, 'raw', where=f'{where}: sentences[{j}]'))
                       for j, text in enumerate(sentences))
      if not self.wanted or split in self.wanted:
        by_split.setdefault(split, []).append((image_id, '/'.join([*filter(None, [item.get('filepath')]), name]),
                                               captions))
    missing = [split for split in self.wanted if split not in by_split]
    if missing:
      raise ValueError(f'{self.annotations}: no images of split {missing[0]!r}; it has {sorted(splits)}')
    self._data_set = str(json_stream.value(self.annotations, 'dataset', ''))
    found = {}
    for split in [s for s in (*_ORDER, *sorted(by_split.keys() - set(_ORDER))) if s in by_split]:
      rows, report = by_split[split], self._counts.setdefault(split, counts_lib.Counts())
      published = IMAGES.get(self._data_set, {}).get(split)
      if published not in (None, len(rows)):
        report.noted('images', 'not the published number', f'{split}: {len(rows):,} images; published: {published:,}')
      found[split] = [engine.Task(f'{split}, images {i * self.images_per_shard} on', piece, images=len(piece))
                      for i, piece in enumerate(records.chunks(rows, self.images_per_shard))]
    return found

  def counts(self) -> dict[str, counts_lib.Counts]:
    return self._counts

  def read(self, task: engine.Task, report: counts_lib.Counts) -> Iterator[schema.Example]:
    found = (self._record(*row, report) for row in task.payload)
    yield from records.examples(found, report, where=f'{self.annotations}, {task.label}')

  def meta(self) -> schema.DatasetMeta:
    return schema.DatasetMeta(
        name=self.name, description="Photos with several captions each, in Karpathy's splits.",
        extra={'provenance': f"Karpathy's splits of {self._data_set or 'an unnamed data set'}",
               'captions_per_image': self.captions_per_image,
               'files': [storage.path(self.annotations).name],
               'sha256': {storage.path(self.annotations).name: storage.sha256(self.annotations)}})

  def _record(self, image_id, name, captions, report):
    most = self.captions_per_image
    if most:
      usable = [text for text in captions if text.strip()]
      if len(usable) < most:
        report.noted('images', f'fewer than {most} captions', f'image {image_id}')
      blank = len(captions) - len(usable)
      report.dropped('captions', 'blank', f'image {image_id}', blank)
      report.dropped('captions', f'beyond the first {most}', f'image {image_id}', max(0, len(usable) - most))
      captions = tuple(usable[:most])
    return records.Record(image_id, _find(self.images, name), captions=captions)


def _find(folder, name) -> storage.Path:
  """An image as the archives of 2014, the ones of 2017, or neither have put it; the first place if it is nowhere."""
  path = images.find_file(folder, name, search=True)
  of_2014 = re.fullmatch(r'(?:.*/)?COCO_(?:train|val)2014_(\d{12}\.jpg)', name)
  if of_2014 and not path.is_file():
    for year in ('train2017', 'val2017'):
      later = images.find_file(folder, f'{year}/{of_2014[1]}', search=True)
      if later.is_file():
        return later
  return path
