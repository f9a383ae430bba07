"""What a data set holds, in figures: regions an image, lengths of texts, sizes of boxes and images, categories."""
import collections
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import html
import json
import os
import pathlib

import numpy as np

from cloc_jax import charts
from cloc_jax import page
from cloc_jax.data import scan
from cloc_jax.data import sources
from cloc_jax.data import spec as spec_lib
from cloc_jax.data.importers import counts as counts_lib

# What is counted by value, and how it is called on the page.
MEASURES = {
    'regions_per_image': 'regions an image',
    'captions_per_image': 'captions an image',
    'caption_words': 'words a caption',
    'region_caption_words': 'words a region caption',
    'box_side_percent': 'side of a box (√area, % of the image)',
    'image_height': 'height of an image, pixels',
    'image_width': 'width of an image, pixels',
}
_SHOWN_CATEGORIES = 60
_STYLE = """
table { margin: 0; }
th, td { padding: 2px 18px 2px 0; }
.columns { columns: 300px; column-gap: 28px; }
"""


@dataclasses.dataclass
class SplitStats:
  """One split. Histograms are value → how often, by the names in MEASURES; values are whole numbers.

  images, regions, captions: how many; captions and regions without a word are in.
  image_bytes: of the encoded images.
  corrupt_records: could not be read, and are in no other figure.
  categories, sources: of the regions; '' where a region has none.
  outcomes: of files that are read as they are, what an import would count; empty for a data set.
  """
  images: int = 0
  regions: int = 0
  captions: int = 0
  image_bytes: int = 0
  corrupt_records: int = 0
  histograms: dict[str, collections.Counter] = dataclasses.field(
      default_factory=lambda: {name: collections.Counter() for name in MEASURES})
  categories: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  sources: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  outcomes: counts_lib.Counts = dataclasses.field(default_factory=counts_lib.Counts)

  def add(self, other: 'SplitStats') -> None:
    """Adds the figures of more records."""
    for name in ('images', 'regions', 'captions', 'image_bytes', 'corrupt_records'):
      setattr(self, name, getattr(self, name) + getattr(other, name))
    for name, histogram in other.histograms.items():
      self.histograms[name].update(histogram)
    self.categories.update(other.categories)
    self.sources.update(other.sources)
    self.outcomes.merge(other.outcomes)


@dataclasses.dataclass
class Stats:
  """path: the data set; splits: name → its figures."""
  path: str
  name: str
  splits: dict[str, SplitStats]

  def to_json(self) -> str:
    """Everything, and the mean and quantiles of each histogram."""
    out = {'path': self.path, 'name': self.name, 'splits': {}}
    for split, found in self.splits.items():
      out['splits'][split] = vars(found) | {
          'outcomes': found.outcomes.to_json(),
          'categories': dict(found.categories.most_common()),
          'histograms': {name: {str(k): v for k, v in sorted(h.items())} for name, h in found.histograms.items()},
          'summaries': {name: summary(h) for name, h in found.histograms.items()}}
    return json.dumps(out, indent=1, ensure_ascii=False)

  def text(self) -> str:
    """A few lines for a terminal."""
    lines = []
    for split, found in self.splits.items():
      lines.append(f'{split}: {found.images:,} images ({found.image_bytes / 2**20:,.0f} MB), {found.regions:,} regions '
                   f'of {len(set(found.categories) - {""}):,} categories, {found.captions:,} captions'
                   + (f', {found.corrupt_records:,} CORRUPT RECORDS' if found.corrupt_records else ''))
      for name, meaning in MEASURES.items():
        if found.histograms[name]:
          s = summary(found.histograms[name])
          lines.append(f'  {meaning}: mean {s["mean"]:.1f}, 5 % {s["p5"]}, median {s["p50"]}, 95 % {s["p95"]}, '
                       f'most {s["max"]}')
    outcomes = {split: found.outcomes for split, found in self.splits.items() if found.outcomes.rows()}
    return '\n'.join([*lines, *([counts_lib.table(outcomes)] if outcomes else [])])


def collect(path: spec_lib.Data, *, splits: Sequence[str] | None = None, workers: int = 0,
            progress: Callable[[int, int], None] | None = None) -> Stats:
  """Counts over every record; images are not decoded.

  Args:
    path: the data set, see sources.open_source.
    splits: their names; None for all.
    workers: processes; 0 for this one.
    progress: called with (records done, records in all).

  Raises:
    FileNotFoundError: no data set at `path`, or files of it are missing.
    ValueError: no such split.
  """
  sizes = scan.split_sizes(path, splits)
  meta = sources.read_meta(path)
  out = {split: SplitStats() for split in sizes}
  for split, _, found in scan.scan(path, splits=sizes, visit=_visit, workers=workers, progress=progress):
    out[split].add(found)
  if spec_lib.parse(path) is not None:  # what was left out before there were records
    for split, found in out.items():
      found.outcomes.merge(counts_lib.Counts.from_json(meta.extra['counts'].get(split, {})))
  return Stats(path=spec_lib.text(path), name=meta.name, splits=out)


def summary(histogram: Mapping[int, int]) -> dict[str, float]:
  """Mean, quantiles (p5, p50, p95: the least value that so many percent do not exceed), max; empty without values."""
  if not histogram:
    return {}
  values = np.array(sorted(histogram))
  counts = np.array([histogram[int(v)] for v in values])
  share = counts.cumsum() / counts.sum()
  quantile = lambda q: int(values[np.searchsorted(share, q - 1e-12)])
  return {'mean': float((values * counts).sum() / counts.sum()), 'p5': quantile(0.05), 'p50': quantile(0.5),
          'p95': quantile(0.95), 'max': int(values[-1])}


def _visit(source, indices):
  found = SplitStats()
  count = lambda name, value: found.histograms[name].update((value,))
  for index in indices:
    try:
      example = source.read(index, found.outcomes) if hasattr(source, 'read') else source[index]
    except sources.RecordError:
      found.corrupt_records += 1
      continue
    found.images += 1
    found.image_bytes += len(example.image)
    found.regions += len(example.regions)
    found.captions += len(example.captions)
    count('regions_per_image', len(example.regions))
    count('captions_per_image', len(example.captions))
    count('image_height', example.height)
    count('image_width', example.width)
    found.histograms['caption_words'].update(len(caption.split()) for caption in example.captions)
    found.histograms['region_caption_words'].update(len(r.caption.split()) for r in example.regions)
    found.categories.update(r.category for r in example.regions)
    found.sources.update(r.source for r in example.regions)
    for region in example.regions:
      x0, y0, x1, y1 = region.box
      count('box_side_percent', round(100 * max((x1 - x0), 0)**0.5 * max((y1 - y0), 0)**0.5))
  return found


# --- The page


def write_page(stats: Stats, *, out: str | os.PathLike) -> None:
  """Writes figures, curves and the most frequent categories as one HTML file that needs no other."""
  body = [f'<header>\n<h1>{html.escape(stats.name)}</h1>\n<p class="soft">{html.escape(stats.path)}</p>\n</header>']
  for split, found in stats.splits.items():
    facts = {'images': found.images, 'regions': found.regions, 'captions': found.captions,
             'categories': len(set(found.categories) - {''}), 'MB of images': round(found.image_bytes / 2**20)}
    if found.corrupt_records:
      facts['corrupt records'] = found.corrupt_records
    figures = [chart(meaning, found.histograms[name]) for name, meaning in MEASURES.items() if found.histograms[name]]
    body.append(f'<section>\n<h2>{html.escape(split)}</h2>\n{page.facts(facts)}\n<div class="charts">'
                + '\n'.join(figures) + f'</div>\n{_categories(found)}</section>')
  out = pathlib.Path(out)
  out.parent.mkdir(parents=True, exist_ok=True)
  out.write_text(page.document(title=f'{stats.name} · statistics', body='\n'.join(body), style=charts.STYLE + _STYLE),
                 encoding='utf-8')


def chart(title: str, histogram: Mapping[int, int]) -> str:
  """Shares by value. Wide ranges are counted in equal steps, so that a curve does not jump between neighbours."""
  low, high = min(histogram), max(histogram)
  step = max(1, -(-(high - low + 1) // 50))
  starts = range(low, high + 1, step)
  shares = np.zeros(len(starts))
  for value, count in histogram.items():
    shares[(value - low) // step] += count
  middles = [start + (step - 1) / 2 for start in starts]
  return charts.chart(title, {'': (middles, shares / shares.sum())}, percent=True,
                      head=f'median {charts.number(summary(histogram)["p50"])}')


def _categories(found):
  named = [(name, count) for name, count in found.categories.most_common() if name]
  if not named:
    return ''
  rows = ''.join(f'<tr><td>{html.escape(name)}</td><td>{count:,}</td><td>{100 * count / found.regions:.1f} %</td></tr>'
                 for name, count in named[:_SHOWN_CATEGORIES])
  rest = len(named) - _SHOWN_CATEGORIES
  note = f'<p class="soft">… and {rest:,} more categories</p>' if rest > 0 else ''
  return (f'<div class="columns"><table><thead><tr><th>category</th><th>regions</th><th>share</th></tr></thead>{rows}'
          f'</table></div>{note}\n')
