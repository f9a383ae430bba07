"""WebDataset archives of image–text pairs → a data set without regions.

An archive is a tar whose files of one sample stand together and share the name up to the first dot of its last part:
000000012.jpg, 000000012.txt, 000000012.json. Each archive is read once as a stream, and is one task.
Sources: github.com/webdataset/webdataset (layout); github.com/rom1504/img2dataset (its txt and json members).
"""
from collections.abc import Iterable
from collections.abc import Iterator
import dataclasses
import json
import lzma
import os
import tarfile
from typing import Any
import zlib

from cloc_jax.data import schema
from cloc_jax.data import storage
from cloc_jax.data.importers import counts as counts_lib
from cloc_jax.data.importers import engine
from cloc_jax.data.importers import json_stream
from cloc_jax.data.importers import records

IMAGES = ('jpg', 'jpeg', 'png', 'webp')


@dataclasses.dataclass(frozen=True)
class TarsSource:
  """One split: its name, and its archives (.tar, also compressed)."""
  split: str
  tars: tuple[str | os.PathLike, ...]


@dataclasses.dataclass(frozen=True)
class Sample:
  """What an archive holds under one key: {extension in lower case: bytes}."""
  key: str
  parts: dict[str, bytes]


@dataclasses.dataclass
class WebDataset(engine.Importer):
  """The importer of archives. An image's captions are its txt, and the json's texts under `caption_keys`.

  An archive that is cut off is an error that names it. What is done stays, and the import goes on when that archive has
  been fetched again.

  sources: one for each split.
  caption_keys: of the json member, those that may be missing; a text or a list of texts each.
  name: see schema.DatasetMeta.
  """
  sources: tuple[TarsSource, ...]
  caption_keys: tuple[str, ...] = ('caption',)
  name: str = 'webdataset'
  trust_boxes: bool = False

  description = 'Image–text pairs from WebDataset archives.'

  def __post_init__(self):
    self.sources = records.check_splits(self.sources)

  def arguments(self) -> dict[str, Any]:
    found = super().arguments()
    del found['sources']  # tasks are labelled with their archive and its state, so that one that changes is read again
    return found

  def files(self) -> list[str | os.PathLike]:
    return []

  def splits(self) -> dict[str, list[engine.Task]]:
    found = {}
    for source in self.sources:
      paths = [json_stream.check_file(path) for path in source.tars]
      if len({path.name for path in paths}) != len(paths):
        raise ValueError(f'split {source.split!r}: two archives of the same name, which images are called by')
      found[source.split] = [
          engine.Task(f'{path} ({storage.state(path)})', payload=path) for path in paths]
    return found

  def read(self, task: engine.Task, report: counts_lib.Counts) -> Iterator[schema.Example]:
    yield from self.examples(samples(task.payload), task.payload, report)

  def examples(self, found: Iterable[Sample], path: storage.Path,
               report: counts_lib.Counts) -> Iterator[schema.Example]:
    """The examples of an archive's samples."""
    whole = (record for sample in found if (record := self._record(sample, path, report)))
    yield from records.examples(whole, report, where=str(path), trust_boxes=self.trust_boxes)

  def meta(self) -> schema.DatasetMeta:
    return schema.DatasetMeta(name=self.name, description=self.description,
                              extra={'archives': {source.split: len(source.tars) for source in self.sources}})

  def used(self) -> set[str]:
    """Extensions that are read."""
    return {*IMAGES, 'txt', 'json'}

  def record(self, sample: Sample, content: dict, image: bytes, image_id: str, where: str,
             report: counts_lib.Counts) -> records.Record:
    """A sample with an image as a record; `content` is its json, {} without one."""
    return records.Record(image_id, image, captions=self._captions(sample, content, where))

  def _record(self, sample, path, report):
    where = f'{path}: {sample.key}'
    image_id = f'{path.name.split(".")[0]}/{sample.key}'
    content = {}
    if 'json' in sample.parts:
      try:
        content = json.loads(sample.parts['json'])
      except ValueError as error:
        raise ValueError(f'{where}.json is no JSON: {error}') from None
      if not isinstance(content, dict):
        raise ValueError(f'{where}.json: expected an object, got a {type(content).__name__}')
    for extension in sample.parts.keys() - self.used():
      report.noted('files', f'.{extension} not read', f'{sample.key}.{extension}')
    found = [sample.parts[extension] for extension in IMAGES if extension in sample.parts]
    if len(found) > 1:
      raise ValueError(f'{where}: more than one image: {sorted(sample.parts)}')
    if not found:
      report.dropped('images', 'not in the archive', image_id)
      records.lost(report, 'image lost', image_id=image_id, boxes=0,
                   captions=len(self._captions(sample, content, where)))
      return None
    return self.record(sample, content, found[0], image_id, where, report)

  def _captions(self, sample, content, where):
    found = []
    if 'txt' in sample.parts:
      try:
        found.append(sample.parts['txt'].decode('utf-8-sig'))
      except UnicodeDecodeError as error:
        raise ValueError(f'{where}.txt is not UTF-8: {error}') from None
    for key in self.caption_keys:
      value = content.get(key)
      value = [] if value is None else value if isinstance(value, list) else [value]
      if not all(isinstance(text, str) for text in value):
        raise ValueError(f'{where}.json: {key!r} must be a text or a list of texts, got {value!r:.80}')
      found += value
    return tuple({text.strip(): text for text in found}.values())  # img2dataset writes the caption into txt and json


@dataclasses.dataclass(frozen=True)
class Member:
  """A file in an archive that is not compressed: bytes begin to begin + size of the archive are its content."""
  key: str
  extension: str
  begin: int
  size: int


def samples(path: storage.Path) -> Iterator[Sample]:
  """Yields an archive's samples, in their order.

  Raises:
    ValueError: naming the archive and the last file before the place where it is cut off or damaged; or a key whose
      files do not stand together.
  """
  sample = None
  for key, extension, _, content in _members(path, headers_only=False):
    if sample is None or key != sample.key:
      if sample is not None:
        yield sample
      sample = Sample(key, {})
    sample.parts[extension] = content
  if sample is not None:
    yield sample


def members(path: storage.Path) -> Iterator[Member]:
  """Yields an archive's files, in their order; only the headers are read.

  Raises:
    ValueError: as samples, and for a compressed archive, which can only be read from its beginning.
  """
  with storage.open_binary(path) as file:
    if file.read(6).startswith((b'\x1f\x8b', b'BZh', b'\xfd7zXZ\0', b'\x28\xb5\x2f\xfd')):
      raise ValueError(f'{path} is compressed, so that it can only be read from its beginning: decompress it, or '
                       'import it with `cloc data import webdataset`')
  for key, extension, member, _ in _members(path, headers_only=True):
    if member.issparse():
      raise ValueError(f'{path}: {member.name} is stored with holes, which is not supported here: import the archive')
    yield Member(key, extension, member.offset_data, member.size)


def _members(path, *, headers_only):
  """Yields (key, extension in lower case, tarfile's member, its content if wanted); checks what `samples` promises."""
  key, extensions, seen, last = None, set(), set(), 'its beginning'
  try:
    with storage.open_binary(path) as file, tarfile.open(fileobj=file, mode='r:' if headers_only else 'r|*',
                                                         tarinfo=_Header) as tar:
      tar.ended = False
      for member in tar:
        if not member.isfile():
          continue
        folder, _, name = member.name.removeprefix('./').rpartition('/')
        stem, _, extension = name.partition('.')
        name = f'{folder}/{stem}' if folder else stem
        if name != key:
          if name in seen:
            raise ValueError(f'{path}: the files of {name} do not stand together')
          seen.add(name)
          key, extensions = name, set()
        extension = extension.lower()
        if extension in extensions:
          raise ValueError(f'{path}: {member.name} is there twice')
        extensions.add(extension)
        content = b'' if headers_only else tar.extractfile(member).read()
        last = member.name
        yield key, extension, member, content
      if not tar.ended:
        raise ValueError(f'{path} is cut off or damaged after {last}; fetch it again')
  except storage.StorageError:  # says nothing of the archive
    raise
  except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
    raise ValueError(f'{path} is cut off or damaged, in or after {last}: {error}; fetch it again') from error


class _Header(tarfile.TarInfo):
  """Notes the zeros that end an archive: without them tarfile takes a cut between two members for its end."""

  @classmethod
  def fromtarfile(cls, tarfile_):
    try:
      return super().fromtarfile(tarfile_)
    except tarfile.EOFHeaderError:
      tarfile_.ended = True
      raise
