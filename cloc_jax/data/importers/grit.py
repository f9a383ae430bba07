"""GRIT → a region-text data set, from the archives that img2dataset writes. Its Parquet files: see grit_parquet.

A sample is KEY.jpg (.png, .webp), KEY.txt (the caption) and KEY.json, which holds `caption`, other saved columns, and
`original_width` and `original_height`. Under `noun_chunks` and `ref_exps`: [start, end, x1, y1, x2, y2, score], a range
of the caption's characters and a box in fractions of the image.
Sources: Peng et al., *Kosmos-2: Grounding Multimodal Large Language Models to the World*, 2023; the layout and the
command that downloads images are in github.com/microsoft/unilm/tree/master/kosmos-2 and in the data set's card,
huggingface.co/datasets/zzliang/GRIT; members: github.com/rom1504/img2dataset (downloader.py, writer.py, resizer.py).
"""
from collections.abc import Iterable
from collections.abc import Iterator
import dataclasses

from cloc_jax.data import schema
from cloc_jax.data import storage
from cloc_jax.data.importers import counts as counts_lib
from cloc_jax.data.importers import images
from cloc_jax.data.importers import json_stream
from cloc_jax.data.importers import records
from cloc_jax.data.importers import webdataset

TarsSource = webdataset.TarsSource

_LISTS = {'noun_chunks': 'noun chunk', 'ref_exps': 'referring expression'}  # key → Region.source
_RESHAPED = 'image padded, cropped or turned'
_MIN_IMAGES = 20  # fewer say nothing of an archive


@dataclasses.dataclass
class Grit(webdataset.WebDataset):
  """GRIT's importer. Images must have kept their proportions: img2dataset's `--resize_mode` keep_ratio,
  keep_ratio_largest or no.

  Boxes of an image whose proportions are not those of `original_width` and `original_height` are dropped, as they fit
  no more; an archive where most are such is an error. A referring expression that is only its noun chunk again, as GRIT
  writes those without an expansion, is dropped too.

  phrases: 'noun_chunks', 'ref_exps' or 'both'.
  sources, trust_boxes: see webdataset.WebDataset and coco.Coco.
  """
  name: str = 'grit'
  phrases: str = 'both'

  description = 'GRIT: web images with captions, whose phrases have boxes found by a model.'

  def __post_init__(self):
    super().__post_init__()
    check_choice(self.phrases)

  def examples(self, found: Iterable[webdataset.Sample], path: storage.Path,
               report: counts_lib.Counts) -> Iterator[schema.Example]:
    yield from super().examples(found, path, report)
    if not self.trust_boxes:
      check_proportions(report, where=str(path))

  def record(self, sample: webdataset.Sample, content: dict, image: bytes, image_id: str, where: str,
             report: counts_lib.Counts) -> records.Record:
    found = super().record(sample, content, image, image_id, where, report)
    if 'json' not in sample.parts:
      raise ValueError(f'{where}: no json with noun_chunks and ref_exps; found {sorted(sample.parts)}')
    original = content.get('original_height'), content.get('original_width')
    return dataclasses.replace(found, phrases=tuple(phrases_of(
        content, choice=self.phrases, where=f'{where}.json', changed=reshaped(image, original))))


def check_choice(phrases: str) -> None:
  """Raises ValueError unless `phrases` is 'noun_chunks', 'ref_exps' or 'both'."""
  if phrases not in ('both', *_LISTS):
    raise ValueError(f"phrases must be 'noun_chunks', 'ref_exps' or 'both', got {phrases!r}")


def phrases_of(content: dict, *, choice: str, where: str, changed: bool) -> Iterator[records.Phrase]:
  """The phrases of a sample's json or row.

  Args:
    content: holds `caption`, and the lists that are asked for.
    choice: see Grit.phrases.
    where: names it in errors.
    changed: whether the image has lost its proportions: no phrase is wanted then.

  Raises:
    ValueError: a list is missing, or an entry is not as GRIT writes it.
  """
  caption, seen = str(json_stream.get(content, 'caption', where=where)), set()
  for key, source in _LISTS.items():
    if choice not in ('both', key):
      continue
    entries = json_stream.get(content, key, where=where)
    if not isinstance(entries, list):
      raise ValueError(f'{where}: {key!r} must be a list (was it saved by --save_additional_columns?), '
                       f'got {entries!r:.80}')
    for i, entry in enumerate(entries):
      try:
        start, end, *box, score = entry
        start, end, score = int(start), int(end), float(score)
      except (TypeError, ValueError):
        raise ValueError(f'{where}: {key}[{i}]: expected [start, end, x1, y1, x2, y2, score], '
                         f'got {entry!r:.80}') from None
      span, skip = (start, end, repr(box)), _RESHAPED if changed else ''
      if not 0 <= start < end <= len(caption):
        skip = 'span outside of the caption'
      elif key == 'ref_exps' and span in seen:
        skip = 'noun chunk again'
      seen.add(span)
      yield records.Phrase(box, caption[start:end] if start >= 0 else '', f'{key}[{i}]', score=score, source=source,
                           skip=skip)


def reshaped(image: bytes, original: tuple[int | None, int | None]) -> bool:
  """Whether an image's proportions differ from its original's (height, width) by more than rounding of its sides.

  False where the original is not known, as with img2dataset's --disable_all_reencoding.
  """
  if not all(isinstance(side, int) and side > 0 for side in original):
    return False
  size = images.check_image(image, counts_lib.Counts(), name='')  # counted where the image is loaded
  if size is None:
    return False
  scale = max(size) / max(original)
  return any(abs(side - scale * whole) > 1.5 for side, whole in zip(size, original))


def check_proportions(report: counts_lib.Counts, *, where: str) -> None:
  """Raises ValueError if the images of most of a task's boxes have lost their proportions."""
  lost = report.of('boxes', 'dropped', _RESHAPED)
  if report.of('images') >= _MIN_IMAGES and lost > report.of('boxes') / 2:
    raise ValueError(f'{where}: the images of {lost} of {report.of("boxes")} boxes have lost their proportions, so '
                     'that the boxes do not fit: download them with img2dataset --resize_mode=keep_ratio, or import '
                     'the others with --trust-boxes')
