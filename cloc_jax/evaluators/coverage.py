"""How much of the data an evaluation is of: what was unreadable, and what the import had left out before."""
import dataclasses
from collections.abc import Sequence

NAMED = 10  # unreadable images that are named; all are counted
_OF_IMAGES = ('zeroshot/', 'image_text_retrieval/')  # evaluators whose figures are of whole images


@dataclasses.dataclass(frozen=True)
class Coverage:
  """images of of_images, and regions of of_regions, were evaluated. unreadable: the first of the others, and why.

  Of a damaged record of a data set on disk nobody knows how many regions it had: it counts as an image alone.
  unusable: regions without an area, or without any words; of_regions leaves them out.
  """
  images: int
  of_images: int
  regions: int = 0
  of_regions: int = 0
  unreadable: tuple[str, ...] = ()
  unusable: int = 0

  @property
  def complete(self) -> bool:
    return self.images == self.of_images and self.regions == self.of_regions

  @property
  def left_out(self) -> tuple[str, ...]:
    """What was not evaluated, for people: the named, and how many more there are."""
    more = self.of_images - self.images - len(self.unreadable)
    others = (f'{more:,} {"more " if self.unreadable else ""}images, not named',) if more > 0 else ()
    regions = (f'{self.unusable:,} regions without an area or without words',) if self.unusable else ()
    return (*self.unreadable, *others, *regions)

  def beside(self, metric: str) -> str:
    """What stands beside a figure of that name: ' (98 of 100 images)'; '' where nothing is missing."""
    if metric.startswith(_OF_IMAGES) or self.regions == self.of_regions:
      done, of, what = self.images, self.of_images, 'images'
    else:
      done, of, what = self.regions, self.of_regions, 'regions'
    return '' if done == of else f' ({done:,} of {of:,} {what})'

  def __str__(self):
    regions = f', {self.regions:,} of {self.of_regions:,} regions' if self.of_regions else ''
    return f'{self.images:,} of {self.of_images:,} images{regions}'


def total(counters: Sequence['Counter']) -> Coverage:
  """Of hosts that took turns, image by image; those that are named are the first of the data, as on one host alone."""
  count = lambda name: sum(getattr(counter.coverage, name) for counter in counters)
  named = sorted((place, host, why) for host, counter in enumerate(counters) for place, why in counter.unreadable)
  return Coverage(images=count('images'), of_images=count('of_images'), regions=count('regions'),
                  of_regions=count('of_regions'), unreadable=tuple(why for _, _, why in named[:NAMED]),
                  unusable=count('unusable'))


class Counter:
  """Counts batches as they pass by on their way to `collect`.

  Args:
    lost_images, lost_regions: left out before: what an import could not read.
  """

  def __init__(self, *, lost_images: int = 0, lost_regions: int = 0):
    self._images, self._regions = [0, lost_images], [0, lost_regions]  # evaluated, not
    self._seen = self._unusable = 0
    self.unreadable: list[tuple[int, str]] = []  # (place among this host's images, why) of the first

  def __call__(self, batches):
    for batch in batches:
      for example, valid in zip(batch.examples, batch.image_mask):
        self._images[not valid] += 1
        self._regions[not valid] += len(example.boxes)
        self._unusable += example.unusable
        if not valid and len(self.unreadable) < NAMED:
          self.unreadable.append((self._seen, example.error))
        self._seen += 1
      yield batch

  @property
  def coverage(self) -> Coverage:
    """So far."""
    return Coverage(images=self._images[0], of_images=sum(self._images), regions=self._regions[0],
                    of_regions=sum(self._regions), unreadable=tuple(why for _, why in self.unreadable),
                    unusable=self._unusable)


def lost_in_import(meta, split: str) -> tuple[int, int]:
  """(images, boxes) that the importer of a data set left out of a split because it could not read the image."""
  counts = meta.extra.get('counts', {}).get(split, {})
  dropped = lambda what, of: sum(found['count'] for reason, found in counts.get(what, {}).get('dropped', {}).items()
                                 if of(reason))
  return dropped('images', lambda reason: reason != 'listed twice'), dropped('boxes', lambda r: r == 'image lost')
