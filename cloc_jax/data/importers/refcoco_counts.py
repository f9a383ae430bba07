"""How many references, images and sentences RefCOCO, RefCOCO+ and RefCOCOg have, by who split them.

Sources: references and images from the table of TFDS's ref_coco (tensorflow_datasets/datasets/ref_coco/README.md);
sentences of RefCOCO from FlagEval's description of it
(flageval.baai.ac.cn/docs, visual grounding), in sum the 142 210 of Yu et al., 2016. `test` of the Google splits of
RefCOCOg was never published.
"""
from collections.abc import Iterator, Mapping
import dataclasses
import re

from cloc_jax.data import storage
from cloc_jax.data.importers import counts as counts_lib

PUBLISHED = {  # data set → who split it → split → references, images, sentences (None: not known)
    'refcoco': {
        'unc': {'train': (42404, 16994, 120624), 'val': (3811, 1500, 10834), 'testA': (1975, 750, 5657),
                'testB': (1810, 750, 5095)},
        'google': {'train': (40000, 19213, None), 'val': (5000, 4559, None), 'test': (5000, 4527, None)}},
    'refcoco+': {
        'unc': {'train': (42278, 16992, None), 'val': (3805, 1500, None), 'testA': (1975, 750, None),
                'testB': (1798, 750, None)}},
    'refcocog': {
        'google': {'train': (44822, 24698, None), 'val': (5000, 4650, None)},
        'umd': {'train': (42226, 21899, None), 'val': (2573, 1300, None), 'test': (5023, 2600, None)}}}
_WHAT = ('references', 'images', 'sentences')


@dataclasses.dataclass
class Tally:
  """What a split of a source holds."""
  references: set = dataclasses.field(default_factory=set)
  images: set = dataclasses.field(default_factory=set)
  sentences: int = 0

  def numbers(self) -> tuple[int, int, int]:
    return len(self.references), len(self.images), self.sentences


def check(found: Mapping[str, Tally], report: Mapping[str, counts_lib.Counts], *, name: str,
          path: storage.Path) -> None:
  """Notes in a split's report where its numbers are not the published ones: a file is damaged, or somebody's selection.

  Args:
    found, report: by split.
    name: of the data set to be: 'refcoco_plus'. The name of the file's folder comes first, if it is one of theirs.
    path: the file; 'refs(unc).p' tells who split it.
  """
  for split, message in differences({split: tally.numbers() for split, tally in found.items()},
                                    known=data_set(name, path), split_by=_split_by(path)):
    report[split].noted('references', 'not the published number', f'{split}: {message}')


def differences(found: Mapping[str, tuple[int, int, int]], *, known: str | None,
                split_by: str | None) -> Iterator[tuple[str, str]]:
  """Yields (split, what differs) where a split's numbers fit none of the data set's published ones.

  Args:
    found: split → references, images, sentences.
    known: a key of PUBLISHED; nothing is compared for None.
    split_by: 'unc', 'google', 'umd'; None to compare with all.
  """
  for split, numbers in found.items():
    published = {by: splits[_usual(split)] for by, splits in PUBLISHED.get(known, {}).items()
                 if split_by in (None, by) and _usual(split) in splits}
    if published and not any(_fits(numbers, wanted) for wanted in published.values()):
      yield split, f'{_text(numbers)}; published: ' + ', '.join(
          f'{_text(wanted)} ({known} {by})' for by, wanted in published.items())


def _fits(numbers, wanted):
  return all(there is None or here == there for here, there in zip(numbers, wanted))


def _text(numbers):
  return ', '.join(f'{number:,} {what}' for number, what in zip(numbers, _WHAT) if number is not None)


def _usual(split):
  return 'val' if split == 'validation' else split


def data_set(name: str, path: storage.Path) -> str | None:
  """A key of PUBLISHED, by the name of the file's folder, or by that of the data set to be; None if neither tells."""
  return _data_set(path.parent.name) or _data_set(name)


def _data_set(name):
  found = re.match(r'refcoco(_?plus|\+|g)?', name.lower())
  if not found:
    return None
  return {None: 'refcoco', 'g': 'refcocog'}.get(found.group(1), 'refcoco+')


def _split_by(path):
  found = re.search(r'\b(unc|google|umd)\b', path.name.replace('_', ' '))
  return found.group(1) if found else None
