"""What the stages do to one output shard. The same objects run in this process and in Ray's tasks and actors.

A shard carries its images as files, not as pixels: decoded they are ten times larger, and moving them from stage to
stage costs more than decoding them again. Pixels are made ahead, on threads, while the stage's model works.
"""
from collections.abc import Callable, Iterator, Sequence
import concurrent.futures
import dataclasses
import itertools
import math
import os
import re
import time
from typing import Any

from cloc_jax.data import schema
from cloc_jax.data import storage
from cloc_jax.data import transforms
from cloc_jax.label import cache as cache_lib
from cloc_jax.label import inputs
from cloc_jax.label import stages
from cloc_jax.label import summary as summary_lib


@dataclasses.dataclass
class Item:
  """One image on its way. example: as it was read, with the alt-texts as captions; the rest fills up by and by."""
  example: schema.Example
  caption: str = ''
  queries: tuple[str, ...] = ()
  detections: tuple[stages.Detection, ...] = ()


@dataclasses.dataclass(frozen=True)
class Failure:
  """What went wrong with one image, or, for stage 'source', with the rest of an input file."""
  id: str
  stage: str
  message: str


@dataclasses.dataclass
class Shard:
  """One output shard on its way: what is read, done and lost so far.

  unit, part: its place: the part-th shard of the unit-th unit. last: the unit ends with it. source: names what it was
  cut from. items: the images that are still sound. versions: stage → version. began: by the clock.
  """
  unit: int
  part: int
  source: str
  last: bool = False
  items: list[Item] = dataclasses.field(default_factory=list)
  failures: list[Failure] = dataclasses.field(default_factory=list)
  versions: dict[str, str] = dataclasses.field(default_factory=dict)
  summary: summary_lib.Summary = dataclasses.field(default_factory=summary_lib.Summary)
  began: float = 0.0

  @property
  def name(self) -> str:
    """Of its files; sorted names are in the order of the input."""
    return f'{self.unit:06}-{self.part:05}'

  def fail(self, item: Item, stage: str, error: Any) -> None:
    """Takes an image out and says why."""
    message = f'{type(error).__name__}: {error}' if isinstance(error, Exception) else str(error)
    self.failures.append(Failure(item.example.image_id, stage, message[:2000]))
    self.items = [other for other in self.items if other is not item]


def read(unit: inputs.Unit, index: int, *, shard_size: int, text_keys: Sequence[str],
         done: frozenset[int] = frozenset()) -> Iterator[Shard]:
  """Cuts a unit into shards of `shard_size` images, the last with what is left; those in `done` are passed over."""
  report, seen, lost = inputs.Report(), set(), 0
  examples = inputs.read(unit, report, text_keys=text_keys)
  ahead: schema.Example | None = None
  for part in itertools.count():
    shard = Shard(unit=index, part=part, source=f'{unit.paths[0]} to {unit.paths[-1]}, part {part} of {shard_size}',
                  began=time.time())
    began, doubles = time.perf_counter(), []
    try:
      while ahead is not None or (ahead := next(examples, None)) is not None:
        if len(shard.items) == shard_size:
          break
        if ahead.image_id in seen:
          doubles.append(ahead.image_id)
        else:
          seen.add(ahead.image_id)
          shard.items.append(Item(ahead))
        ahead = None
    except storage.StorageError:  # says nothing of the unit: the run ends, and goes on from what is done
      raise
    except (ValueError, OSError) as error:
      ahead = None
      shard.failures.append(Failure(unit.label, 'source', f'what follows is lost: {error}'))
    shard.last = ahead is None
    shard.failures += [Failure(name, 'read', reason) for name, reason in report.ids[lost:]]
    shard.failures += [Failure(name, 'read', 'an image of this id came before') for name in doubles]
    lost = len(report.ids)
    shard.summary.counts['images'] = len(shard.items) + sum(f.stage == 'read' for f in shard.failures)
    shard.summary.seconds['read'] += time.perf_counter() - began
    if part not in done:
      yield shard
    if shard.last:
      return


class Decode:
  """Takes out the images that cannot be decoded in full, before anything is paid for them."""

  def __init__(self, *, threads: int = 1):
    self._threads = threads

  def __call__(self, shard: Shard) -> Shard:
    with _timed(shard, 'decode'):
      for item, size in _ahead(_size, shard.items, chunk=len(shard.items), threads=self._threads):
        if isinstance(size, Exception):
          shard.fail(item, 'decode', size)
        else:
          item.example = dataclasses.replace(item.example, height=size[0], width=size[1])
    return shard


class Caption:
  """Gives every image a new caption, from the cache where it has one."""

  def __init__(self, make: Callable[[], stages.Captioner], *, chunk: int, threads: int = 2, cache: str | None = None):
    self._captioner = make()
    self._chunk, self._threads = chunk, threads
    self._cache = cache and cache_lib.CaptionCache(cache, version=self._captioner.version)

  def __call__(self, shard: Shard) -> Shard:
    shard.versions['captioner'] = self._captioner.version
    with _timed(shard, 'caption'):
      items = list(shard.items)
      keys = [cache_lib.key(item.example) for item in items] if self._cache else []
      known = self._cache.load(shard.source) if self._cache else {}
      todo = []
      for place, item in enumerate(items):
        if self._cache and keys[place] in known:
          item.caption = known[keys[place]]
          shard.summary.counts['captions_cached'] += 1
        else:
          todo.append(place)
      for places, pictures in _chunks(items, todo, chunk=self._chunk, threads=self._threads):
        with _timed(shard, 'caption', model=True):
          answers = _ask(lambda *columns: self._captioner.caption(*columns), pictures)
        fresh = {}
        for place, caption in zip(places, answers):
          if not isinstance(caption, Exception) and not isinstance(caption, str):
            caption = TypeError(f'the captioner gave a {type(caption).__name__}, not a text')
          if isinstance(caption, Exception):
            shard.fail(items[place], 'caption', caption)
          else:
            items[place].caption = caption.strip()
            if self._cache and items[place].caption:
              fresh[keys[place]] = items[place].caption
        if self._cache:
          self._cache.add(shard.source, fresh)
      for item in items:
        if not item.caption and any(item is other for other in shard.items):
          shard.fail(item, 'caption', 'empty caption')
      if self._cache:
        self._cache.merge(shard.source)
    return shard


class Phrases:
  """Takes the detector's queries from the texts."""

  def __init__(self, make: Callable[[], stages.PhraseExtractor]):
    self._extractor = make()

  def __call__(self, shard: Shard) -> Shard:
    shard.versions['phrases'] = self._extractor.version
    with _timed(shard, 'phrases'), _timed(shard, 'phrases', model=True):
      for item in list(shard.items):
        try:
          item.queries = tuple(self._extractor.phrases(item.caption, item.example.captions))
        except Exception as error:  # one odd text is not to end a run
          shard.fail(item, 'phrases', error)
    return shard


class Detect:
  """Finds a box for the queries of every image that has some."""

  def __init__(self, make: Callable[[], stages.Detector], *, chunk: int, threads: int = 2):
    self._detector = make()
    self._chunk, self._threads = chunk, threads

  def __call__(self, shard: Shard) -> Shard:
    shard.versions['detector'] = self._detector.version
    with _timed(shard, 'detect'):
      items = list(shard.items)
      todo = [place for place, item in enumerate(items) if item.queries]
      for places, pictures in _chunks(items, todo, chunk=self._chunk, threads=self._threads):
        with _timed(shard, 'detect', model=True):
          answers = _ask(self._detector.detect, pictures, [items[place].queries for place in places])
        for place, found in zip(places, answers):
          item = items[place]
          try:
            if isinstance(found, Exception):
              raise found
            for detection in found:
              _check_detection(detection, queries=len(item.queries))
            item.detections = tuple(found)
          except Exception as error:  # the detector's own, of whatever type
            shard.fail(item, 'detect', error)
    return shard


def examples(shard: Shard) -> Iterator[schema.Example]:
  """The records of a shard that went through all stages; they are counted in its summary.

  `captions` is the new caption and then the alt-texts. A region's source is 'caption' or 'alt-text', see phrase_source.
  """
  made_by = tuple(f'{stage} {shard.versions[stage]}' for stage in ('captioner', 'phrases', 'detector'))
  for item in shard.items:
    alt_texts = item.example.captions
    regions = tuple(
        schema.Region(box=tuple(map(float, found.box)), caption=item.queries[found.phrase], score=float(found.score),
                      source=phrase_source(item.queries[found.phrase], item.caption, alt_texts))
        for found in item.detections)
    example = dataclasses.replace(
        item.example, captions=tuple(dict.fromkeys((item.caption, *alt_texts))), regions=regions, made_by=made_by)
    shard.summary.add_example(example, alt_texts=alt_texts, queries=len(item.queries))
    yield example


def phrase_source(phrase: str, caption: str, alt_texts: Sequence[str]) -> str:
  """'caption' if its words stand there in their order (generic ones between them may have been left out), or
  'alt-text' where the caption is an alt-text itself or only an alt-text has them."""
  if caption not in alt_texts and _has_words(caption, phrase):
    return 'caption'
  return 'alt-text' if caption in alt_texts or any(_has_words(text, phrase) for text in alt_texts) else 'caption'


def _has_words(text, phrase):
  words = iter(re.findall(r'\w+', text.lower()))
  return all(word in words for word in re.findall(r'\w+', phrase.lower()))


# --- asking models


_NOT_THERE = (ImportError, FileNotFoundError)  # weights or a library: no image's fault, and the next fares no better
_ALIKE = 3  # images that fail one by one in the same way as all together: the stage is broken, not they


def _ask(call: Callable[..., Sequence], *columns: Sequence) -> list:
  """The model's answers to a chunk. Where it fails as a whole, each image is asked about alone.

  Raises:
    What `call` raises, where no image is to blame.
  """
  count = len(columns[0])
  try:
    answers = call(*columns)
  except _NOT_THERE:
    raise
  except Exception as error:
    if count == 1:
      return [error]
    answers = []
    for row in zip(*columns):
      answers += _ask(call, *([value] for value in row))
      alike = [repr(answer) == repr(error) for answer in answers]
      if len(alike) == _ALIKE and all(alike):
        raise
    return answers
  if len(answers) != count:
    raise ValueError(f'expected {count} answers to {count} images, got {len(answers)}')
  return list(answers)


def _check_detection(found, *, queries):
  x0, y0, x1, y1 = found.box
  if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
    raise ValueError(f'the detector gave a box without area or out of the image: {tuple(found.box)}')
  if not 0 <= found.phrase < queries:
    raise ValueError(f'the detector gave query {found.phrase} of {queries}')
  if not (math.isfinite(found.score) and 0 <= found.score <= 1):
    raise ValueError(f'the detector gave the score {found.score}')


# --- pixels


def _chunks(items, places, *, chunk, threads):
  """Yields (places, their pictures), `chunk` at a time; the next chunk is decoded while the caller has this one."""
  rows = _ahead(picture, [items[place] for place in places], chunk=chunk, threads=threads)
  for start in range(0, len(places), chunk):
    yield places[start:start + chunk], [made for _, made in itertools.islice(rows, chunk)]


def _ahead(make, items, *, chunk, threads):
  """Yields (item, make(item)) in order, made on threads a chunk ahead of the caller."""
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    ready = []
    for start in range(0, len(items) + chunk, chunk) if items else ():
      ready, now = [(item, pool.submit(make, item)) for item in items[start:start + chunk]], ready
      for item, future in now:
        yield item, future.result()


def picture(item: Item) -> stages.Picture:
  """Decodes an image."""
  example = item.example
  return stages.Picture(image_id=example.image_id, image=transforms.decode(example.image, where=example.image_id),
                        alt_texts=example.captions)


def _size(item):
  """(height, width), or what is wrong with the image."""
  try:
    return transforms.decode(item.example.image, where=item.example.image_id).shape[:2]
  except Exception as error:  # whatever a decoder makes of broken bytes
    return error


class _timed:
  """Adds the time of a block to a stage's seconds, or to those of its model."""

  def __init__(self, shard, stage, *, model=False):
    self._times, self._stage = (shard.summary.models if model else shard.summary.seconds), stage

  def __enter__(self):
    self._began = time.perf_counter()

  def __exit__(self, *_):
    self._times[self._stage] += time.perf_counter() - self._began


def all_threads() -> int:
  """How many threads a process may use that has the machine to itself."""
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
