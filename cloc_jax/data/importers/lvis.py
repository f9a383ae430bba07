"""LVIS v1's annotation files → a region-text data set.

The layout is COCO's with these differences: images are COCO's, named by `coco_url` alone (LVIS's val split holds images
of train2017 too); a category has synonyms and a frequency (r, c, f); an image lists the categories that are certainly
absent and those that are not exhaustively boxed. Evaluation needs these, so `meta.extra` keeps them.
Source: Gupta, Dollár, Girshick, *LVIS: A Dataset for Large Vocabulary Instance Segmentation*, 2019; lvisdataset.org.
"""
import dataclasses
from typing import Any

from cloc_jax.data import schema
from cloc_jax.data.importers import coco
from cloc_jax.data.importers import engine
from cloc_jax.data.importers import json_stream


@dataclasses.dataclass
class Lvis(coco.Coco):
  """LVIS's importer: sources as for COCO, `images` being the folder that holds train2017 and val2017.

  Of a category's name underscores become spaces. extra['lvis'] holds `category_ids`, `frequencies`, `synonyms` and
  `synsets` in the order of the data set's categories, and `negative` and `not_exhaustive`: split → image_id → indices
  of categories.
  """
  name: str = 'lvis'
  description: str = 'LVIS v1: COCO images with boxes of 1 203 categories.'

  label = 'lvis'
  search = True

  def splits(self) -> dict[str, list[engine.Task]]:
    self._by_id: dict[int, dict] = {}
    self._images: dict[str, dict[str, dict]] = {'neg_category_ids': {}, 'not_exhaustive_category_ids': {}}
    return super().splits()

  def category_name(self, item: dict, *, where: str) -> str:
    return super().category_name(item, where=where).replace('_', ' ')

  def file_name(self, item: dict, *, where: str) -> str:
    url = str(json_stream.get(item, 'coco_url', where=where))
    return '/'.join(url.split('/')[-2:])

  def note_category(self, item: dict) -> None:
    self._by_id[item['id']] = item

  def note_image(self, item: dict, source: coco.CocoSource) -> None:
    for key, splits in self._images.items():
      found = json_stream.get(item, key, where=f'{source.boxes}: image {item["id"]}')
      if found:
        splits.setdefault(source.split, {})[str(item['id'])] = found

  def meta(self) -> schema.DatasetMeta:
    meta = super().meta()
    ids = sorted(self._by_id)
    index = {key: i for i, key in enumerate(ids)}
    extra: dict[str, Any] = {'category_ids': ids}
    for name, key in (('frequencies', 'frequency'), ('synonyms', 'synonyms'), ('synsets', 'synset')):
      extra[name] = [json_stream.get(self._by_id[i], key, where=f'{self.sources[0].boxes}: category {i}') for i in ids]
    for name, key in (('negative', 'neg_category_ids'), ('not_exhaustive', 'not_exhaustive_category_ids')):
      extra[name] = {split: {image: [index[i] for i in found if i in index] for image, found in images.items()}
                     for split, images in self._images[key].items()}
    return dataclasses.replace(meta, extra=meta.extra | {'lvis': extra})
