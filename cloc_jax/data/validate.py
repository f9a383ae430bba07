"""Reads all of a data set and says what is wrong with it."""
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import hashlib
import json
import os
import time

import numpy as np

from cloc_jax import boxes as box_lib
from cloc_jax.data import coverage as coverage_lib
from cloc_jax.data import scan
from cloc_jax.data import sources
from cloc_jax.data import spec as spec_lib
from cloc_jax.data import transforms

EXAMPLES = 10  # how many of each kind are named; the rest are counted

# What is broken: training would mask it, drop it or stop, or an evaluation would not be one.
BROKEN = {
    'missing_files': 'files of a split that are not there',
    'corrupt_records': 'records that cannot be read',
    'undecodable_images': 'images that cannot be decoded',
    'size_mismatch': 'images of other proportions than their records say: boxes would not fit',
    'foreign_boxes': 'boxes that are not finite fractions: pixels perhaps',
    'inverted_boxes': 'boxes whose right is left of their left, or bottom above their top',
    'empty_boxes': 'boxes without area in their image',
    'duplicate_ids': 'ids that another record of the split has',
    'duplicate_images_across_splits': 'images that another split has too, byte by byte',
}
# What may be as it should.
NOTED = {
    'resized_images': 'images of another size than their records say, in the same proportions',
    'boxes_outside': 'boxes that stick out of their image, and are clipped to it',
    'duplicate_images': 'images that their own split has already, byte by byte',
    'empty_captions': 'captions without a word',
    'images_without_caption': 'images that have no caption with a word',
    'empty_region_captions': 'regions without a caption: not used',
    'images_without_regions': 'images that have no region',
    'absent_images': 'images of the index that are not there',
}


@dataclasses.dataclass
class Finding:
  """count: how often. examples: up to EXAMPLES of them, each naming split and record and saying what is wrong."""
  count: int = 0
  examples: list[str] = dataclasses.field(default_factory=list)

  def add(self, count: int, examples: Sequence[str]) -> None:
    self.count += count
    self.examples += examples[:EXAMPLES - len(self.examples)]


@dataclasses.dataclass
class Report:
  """What `validate` found. Every kind of BROKEN and NOTED has its finding, with count 0 where there is nothing.

  coverage: split → how much of the source is there; '' for all splits together.
  """
  path: str
  splits: dict[str, int]
  findings: dict[str, Finding]
  records: int
  regions: int
  seconds: float
  coverage: dict[str, str] = dataclasses.field(default_factory=dict)

  @property
  def ok(self) -> bool:
    """Whether nothing is broken."""
    return not any(self.findings[kind].count for kind in BROKEN)

  def to_json(self) -> str:
    return json.dumps(dataclasses.asdict(self) | {'ok': self.ok}, indent=1, ensure_ascii=False)

  def text(self) -> str:
    """A few lines for a terminal: what was read, and each kind that was found with its examples."""
    sizes = ', '.join(f'{split} {size:,}' for split, size in self.splits.items())
    lines = [f'{self.path}: {sizes}; {self.regions:,} regions; {self.records / max(self.seconds, 1e-9):,.0f} records/s']
    lines += [f'coverage, {split or "all splits"}: {said}' for split, said in self.coverage.items()]
    for title, kinds in (('broken', BROKEN), ('to note', NOTED)):
      for kind, meaning in kinds.items():
        finding = self.findings[kind]
        if finding.count:
          lines.append(f'{title}: {finding.count:,} {meaning}')
          lines += [f'  {example}' for example in finding.examples]
          if finding.count > len(finding.examples):
            lines.append(f'  … and {finding.count - len(finding.examples):,} more')
    return '\n'.join([*lines, 'nothing is broken' if self.ok else 'BROKEN: see above'])


def validate(path: spec_lib.Data, *, splits: Sequence[str] | None = None, workers: int = 0,
             index: Mapping[str, str | os.PathLike] | None = None,
             progress: Callable[[int, int], None] | None = None) -> Report:
  """Reads every record, decodes every image in full, and checks them against each other.

  Holds 24 bytes a record, whatever the size of the data set.

  Args:
    path: the data set, see sources.open_source.
    splits: their names; None for all.
    workers: processes; 0 for this one.
    index: split → a file that lists its images, see coverage.image_ids; '' for all splits read together. Without one
      the coverage is what the import has counted.
    progress: called with (records done, records in all).

  Raises:
    FileNotFoundError: no data set at `path`, or no such index.
    ValueError: no such split; or an index that is none.
  """
  began = time.monotonic()
  sizes = scan.split_sizes(path, splits)
  unknown = [split for split in index or () if split and split not in sizes]
  if unknown:
    raise ValueError(f'index: expected splits among {list(sizes)}, got {unknown[0]!r}')
  findings = {kind: Finding() for kind in (*BROKEN, *NOTED)}
  readable = {}
  for split in sizes:
    try:
      sources.open_source(path, split=split)
      readable[split] = sizes[split]
    except FileNotFoundError as error:
      findings['missing_files'].add(1, [str(error)])
  marks = {split: [] for split in readable}
  records = regions = 0
  for split, indices, found in scan.scan(path, splits=readable, visit=_visit, workers=workers, progress=progress):
    for kind, finding in found.findings.items():
      findings[kind].add(finding.count, finding.examples)
    marks[split].append(found.marks)
    records += len(indices)
    regions += found.regions
  if readable:
    _find_duplicates(path, {split: np.concatenate(parts) for split, parts in marks.items()}, findings)
  coverage = coverage_lib.of_import(sources.read_meta(path).extra) if not index else {}
  for split, file in (index or {}).items():
    ids = [part[:, 1] for name, parts in marks.items() if split in ('', name) for part in parts]
    found = coverage_lib.compare(file, present=np.concatenate([np.zeros(0, np.uint64), *ids]), split=split,
                                 examples=EXAMPLES)
    coverage[split] = found.text()
    findings['absent_images'].add(found.absent, found.examples)
  return Report(path=spec_lib.text(path), splits=sizes, findings=findings, records=records, regions=regions,
                seconds=time.monotonic() - began,
                coverage={split: said for split, said in coverage.items() if split in ('', *sizes)})


@dataclasses.dataclass
class _Piece:
  """What a range of records holds. marks: (records, 3) uint64: index, hash of the id, hash of the image."""
  findings: dict[str, Finding]
  marks: np.ndarray
  regions: int


def _visit(source, indices):
  findings, marks, regions = {}, [], 0

  def found(kind, what, count=1):
    findings.setdefault(kind, Finding()).add(count, [what])

  for index in indices:
    try:
      example = source[index]
    except sources.RecordError as error:
      found('corrupt_records', str(error))
      continue
    where = f'{source.split}, record {index} ({example.image_id!r})'
    marks.append((index, coverage_lib.id_hash(example.image_id), _hash(example.image)))
    regions += len(example.regions)
    _check_image(example, where, found)
    _check_boxes(example, where, found)
    _check_words(example, where, found)
  return _Piece(findings=findings, marks=np.array(marks, np.uint64).reshape(-1, 3), regions=regions)


def _hash(data):
  return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), 'big')


def _check_image(example, where, found):
  try:
    height, width = transforms.decode(example.image, where=where).shape[:2]
  except transforms.ImageError as error:
    found('undecodable_images', str(error))
    return
  if (height, width) != (example.height, example.width):
    fits = transforms.same_proportions((height, width), (example.height, example.width))
    found('resized_images' if fits else 'size_mismatch',
          f'{where}: the record says {example.height}×{example.width} (height × width), the image has {height}×{width}')


def _check_boxes(example, where, found):
  if not example.regions:
    found('images_without_regions', where)
    return
  boxes = np.array([region.box for region in example.regions], np.float32)
  if (boxes >= 0).all() and (boxes <= 1).all() and (boxes[:, 2:] > boxes[:, :2]).all():
    return  # the usual case, at once; NaN is none of these
  for i, region in enumerate(example.regions):
    try:
      box_lib.check_normalized(np.array([region.box]), where=f'{where}, region {i}')
    except ValueError as error:
      found('foreign_boxes', str(error))
      continue
    _, _, counts = box_lib.sanitize(np.array([region.box]))
    what = f'{where}, region {i}: {[round(float(v), 4) for v in region.box]}'
    for kind, name in (('inverted', 'inverted_boxes'), ('empty', 'empty_boxes'), ('clipped', 'boxes_outside')):
      if counts[kind]:
        found(name, what)


def _check_words(example, where, found):
  blank = sum(not caption.strip() for caption in example.captions)
  if blank:
    found('empty_captions', where, blank)
  if blank == len(example.captions):
    found('images_without_caption', where)
  for i, region in enumerate(example.regions):
    if not region.caption.strip():
      found('empty_region_captions', f'{where}, region {i}')


def _find_duplicates(path, marks, findings):
  def name(split, index):
    source = sources.open_source(path, split=split)
    return f'{split}, record {index} ({source[int(index)].image_id!r})'

  def repeated(hashes):
    """Positions of what came before, and where it came first."""
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[inverse] != np.arange(len(hashes)))
    return again, first[inverse[again]]

  for column, kind in ((1, 'duplicate_ids'), (2, 'duplicate_images')):
    for split, rows in marks.items():
      again, first = repeated(rows[:, column])
      findings[kind].add(len(again), [f'{name(split, rows[i, 0])} is also {name(split, rows[j, 0])}'
                                      for i, j in zip(again[:EXAMPLES], first[:EXAMPLES])])
  names = list(marks)
  seen = np.zeros((0, 3), np.uint64)  # (split, index, hash) of all splits before, each hash once
  for number, split in enumerate(names):
    rows = marks[split][np.unique(marks[split][:, 2], return_index=True)[1]]
    place = np.searchsorted(seen[:, 2], rows[:, 2])
    hit = np.flatnonzero(place < len(seen))
    hit = hit[seen[place[hit], 2] == rows[hit, 2]]
    findings['duplicate_images_across_splits'].add(len(hit), [
        f'{name(split, rows[i, 0])} is also {name(names[int(seen[place[i], 0])], seen[place[i], 1])}'
        for i in hit[:EXAMPLES]])
    own = np.column_stack([np.full(len(rows), number, np.uint64), rows[:, 0], rows[:, 2]])
    seen = np.concatenate([seen, np.delete(own, hit, 0)])
    seen = seen[np.argsort(seen[:, 2], kind='stable')]
