"""Flickr30k Entities → a region-text data set: captions, and their phrases with boxes.

`Sentences/ID.txt` has a caption a line with marked phrases, [/EN#chain/type phrase]; `Annotations/ID.xml` has objects
with chain names and a box (PASCAL VOC's: whole pixels from 1, both ends inclusive), or a scene or nobndbox flag. Splits
are lists of image ids: train.txt, val.txt, test.txt; `UNRELATED_CAPTIONS` lists captions of other images.
Sources: Plummer et al., *Flickr30k Entities*, 2015; github.com/BryanPlummer/flickr30k_entities (layout).
"""
from collections.abc import Iterator
import dataclasses
import os
import re
import xml.etree.ElementTree

from cloc_jax.data import schema
from cloc_jax.data import storage
from cloc_jax.data.importers import counts as counts_lib
from cloc_jax.data.importers import engine
from cloc_jax.data.importers import json_stream
from cloc_jax.data.importers import records

TYPES = ('people', 'clothing', 'bodyparts', 'animals', 'vehicles', 'instruments', 'scene', 'other')
_MARK = re.compile(r'\[/EN#(\d+)((?:/[^\s/\]]+)+)\s+([^\[\]]*?)\s*\]')  # chain, types, phrase


@dataclasses.dataclass
class Flickr30kEntities(engine.Importer):
  """The importer. A phrase with several boxes gives a region for each; the same phrase on the same box only one. A
  region's category is the first of its phrase's types.

  entities: the folder with Sentences and Annotations.
  images: the folder of ID.jpg.
  wanted: the splits.
  lists: the folder of train.txt, val.txt, test.txt and UNRELATED_CAPTIONS (optional); None for `entities`.
  name, trust_boxes, images_per_shard: see coco.Coco.
  """
  entities: str | os.PathLike
  images: str | os.PathLike
  wanted: tuple[str, ...] = ('train', 'val', 'test')
  lists: str | os.PathLike | None = None
  name: str = 'flickr30k_entities'
  trust_boxes: bool = False
  images_per_shard: int = 1024

  def __post_init__(self):
    records.check_folder(self.images)
    root = storage.path(self.entities)
    for name in ('Sentences', 'Annotations'):
      records.check_folder(root / name, what=name)

  def files(self) -> list[str | os.PathLike]:
    # The folders stand for tens of thousands of files: theirs change when files come and go.
    root = storage.path(self.entities)
    found = [root / 'Sentences', root / 'Annotations', *(json_stream.check_file(self._list(s)) for s in self.wanted)]
    return found + ([self._list('')] if self._list('').is_file() else [])

  def splits(self) -> dict[str, list[engine.Task]]:
    found = {}
    for split in self.wanted:
      ids = list(dict.fromkeys(json_stream.check_file(self._list(split)).read_text().split()))
      found[split] = [engine.Task(f'{split}, images {i * self.images_per_shard} on', piece, images=len(piece))
                      for i, piece in enumerate(records.chunks(ids, self.images_per_shard))]
    return found

  def read(self, task: engine.Task, report: counts_lib.Counts) -> Iterator[schema.Example]:
    unrelated = _read_unrelated(self._list(''))
    found = (self._record(image_id, unrelated, report) for image_id in task.payload)
    yield from records.examples(found, report, where=f'{self.entities}, {task.label}', trust_boxes=self.trust_boxes)

  def meta(self) -> schema.DatasetMeta:
    return schema.DatasetMeta(
        name=self.name, description='Flickr30k: photos with captions, whose phrases have boxes.', categories=TYPES,
        extra={'provenance': 'Flickr30k Entities annotations on Flickr30k images (non-commercial research)'})

  def _list(self, split):
    folder = storage.path(self.entities if self.lists is None else self.lists)
    return folder / (f'{split}.txt' if split else 'UNRELATED_CAPTIONS')

  def _record(self, image_id, unrelated, report):
    root = storage.path(self.entities)
    size, boxes, without = _read_boxes(root / 'Annotations' / f'{image_id}.xml')
    captions, phrases, named, seen = [], [], set(), set()
    for number, sentence in enumerate(_lines(root / 'Sentences' / f'{image_id}.txt', report), 1):
      at = f'sentence {number}'
      plain = _MARK.sub(r'\3', sentence)
      if (image_id, number) in unrelated:
        report.dropped('captions', 'unrelated to its image', f'image {image_id}, {at}')
        continue
      if '[/EN#' in plain:
        report.dropped('captions', 'broken marks', f'image {image_id}, {at}')
        continue
      captions.append(plain)
      for i, (chain, types, phrase) in enumerate(_MARK.findall(sentence)):
        name = f'{at}, phrase {i + 1}'
        named.add(chain)
        if chain not in boxes:
          reason = 'not visual' if chain == '0' else without.get(chain, 'not annotated')
          report.dropped('phrases', reason, f'image {image_id}, {name}')
        for box in boxes.get(chain, ()):
          phrases.append(records.Phrase(
              box, phrase, name, category=types.split('/')[1], source='entities',
              skip='phrase and box again' if (phrase, box) in seen else ''))
          seen.add((phrase, box))
    for chain in sorted(boxes.keys() - named):
      report.dropped('boxes', 'no phrase', f'image {image_id}, chain {chain}', len(boxes[chain]))
    return records.Record(
        image_id, storage.path(self.images) / f'{image_id}.jpg', captions=tuple(captions),
        phrases=tuple(phrases), size=size, convention='xyxy pixels')


def _lines(path, report):
  data = _read(path)
  try:
    text = data.decode()
  except UnicodeDecodeError:
    report.noted('captions', 'not UTF-8, read as Latin-1', path.name)
    text = data.decode('latin-1')
  return [line for line in text.split('\n') if line.strip()]


def _read(path):
  try:
    return path.read_bytes()
  except FileNotFoundError:
    raise FileNotFoundError(f'no such file: {path}, of an image that a split lists') from None


def _read_boxes(path):
  """(size (height, width), {chain: [box as continuous xyxy pixels]}, {chain: why it has none})."""
  data = _read(path)
  try:
    root = xml.etree.ElementTree.fromstring(data)
  except xml.etree.ElementTree.ParseError as error:
    raise ValueError(f'{path} is no XML, or cut off: {error}') from None
  size = tuple(_number(root, f'size/{side}', path) for side in ('height', 'width'))
  boxes: dict[str, list[tuple]] = {}
  without: dict[str, str] = {}
  for i, item in enumerate(root.findall('object')):
    chains = [name.text for name in item.findall('name')]
    where = f'{path}: object {i + 1}'
    if item.find('bndbox') is not None:
      left, top, right, bottom = (_number(item, f'bndbox/{side}', where) for side in ('xmin', 'ymin', 'xmax', 'ymax'))
      for chain in chains:
        boxes.setdefault(chain, []).append((left - 1, top - 1, right, bottom))
    else:
      scene = item.findtext('scene', '0').strip() == '1'
      without.update(dict.fromkeys(chains, 'a scene' if scene else 'no box'))
  return size, boxes, without


def _number(item, name, where):
  try:
    return int(item.findtext(name))
  except (TypeError, ValueError):
    raise ValueError(f'{where}: expected a whole number in {name}, got {item.findtext(name)!r}') from None


def _read_unrelated(path):
  """{(image id, sentence number from 1)}; none without the file."""
  if not path.is_file():
    return set()
  found = set()
  for number, line in enumerate(path.read_text().splitlines(), 1):
    if line.strip() and not line.startswith('#'):
      parts = line.split()
      if len(parts) != 2 or not parts[1].isdigit():
        raise ValueError(f'{path}: line {number}: expected an image id and the number of a sentence, got {line!r}')
      found.add((parts[0], int(parts[1])))
  return found
