"""A labelling run as one HTML page: how fast, what was found, what was lost, the paper's figures, and pictures."""
from collections.abc import Iterator, Sequence
import dataclasses
import html
import itertools
import json
import os
import pathlib
from typing import Any

import numpy as np

from cloc_jax import charts
from cloc_jax import geometry as geometry_lib
from cloc_jax import page
from cloc_jax.data import schema
from cloc_jax.data import sources
from cloc_jax.data import stats
from cloc_jax.data import storage
from cloc_jax.data import transforms
from cloc_jax.label import folders
from cloc_jax.label import summary as summary_lib
from cloc_jax.label import writer

# Paper, Table 1: images, regions an image, tokens of an image's text and of a region's.
PAPER = {
    'VESL, WiT': ('300 M', '11.6', '44.9', '2.1'), 'VESL, 2 B': ('2 B', '11.5', '35.9', '2.1'),
    'n-grams of the alt-text': ('300 M', '5.1', '17.1', '3.9'), 'Flickr30k Entities': ('32 K', '8.7', '–', '–'),
    'RefCOCO, RefCOCO+, RefCOCOg': ('20–27 K', '2.1–2.5', '–', '3.5–8.4'),
    'Visual Genome': ('108 K', '38.0', '–', '–'), 'GRIT, released': ('17 M', '1.8', '–', '4.6')}
_CURVES = {'regions_per_image': 'regions an image', 'queries_per_image': 'queries an image',
           'caption_words': 'words a caption', 'alt_text_words': 'words an alt-text',
           'region_words': 'words a region text', 'score_percent': 'score of a region, %'}
_SIDE = 448  # of a drawn image, pixels
_SHOWN_FAILURES = 30
_SHOWN_PHRASES = 60
STYLE = charts.STYLE + """
th { color: var(--soft); font-size: 13px; }
table.text :is(td, th) { text-align: left; overflow-wrap: anywhere; }
tr.ours td { font-weight: 650; }
.columns { columns: 240px; column-gap: 28px; font-size: 14px; }
.columns div { display: flex; justify-content: space-between; gap: 12px; break-inside: avoid; }
.columns span:last-child { color: var(--soft); font-variant-numeric: tabular-nums; }
"""


@dataclasses.dataclass(frozen=True)
class Run:
  """What is known of a run. busy_seconds: for how long some shard was worked on. shards: its record files."""
  path: str
  finished: bool
  summary: summary_lib.Summary
  versions: dict[str, str]
  busy_seconds: float
  failures: list[dict[str, str]]
  shards: list[str]


def load(path: str | os.PathLike) -> Run:
  """Reads a finished data set, or what there is of an unfinished one.

  Raises:
    FileNotFoundError: `path` was not made by `cloc label`.
  """
  path = os.fspath(path).rstrip('/')
  done = folders.Folder(path)
  label = done.read('label.json')
  if label is not None:
    found = json.loads(label)
    lines = (done.read('errors.jsonl') or b'').splitlines()[:_SHOWN_FAILURES]
    shards = sorted(done.place(name) for name, _ in done.names() if f'{writer.SHARD}-' in name)
    return Run(path, True, summary_lib.Summary.from_json(found['summary']), found['versions'], found['busy_seconds'],
               [json.loads(line) for line in lines], shards)
  folder = folders.Folder(path if path.endswith('.incomplete') else f'{path}.incomplete')
  total, versions, spans, failures, shards = summary_lib.Summary(), {}, [], [], []
  for note in writer.notes(folder):
    total.merge(summary_lib.Summary.from_json(note['summary']))
    versions |= note['versions']
    spans.append((note['began'], note['ended']))
    failures += note['failures'][:max(0, _SHOWN_FAILURES - len(failures))]
    if note['records']:
      shards.append(folder.place(note['name'] + writer.SHARD))
  if not spans:
    raise FileNotFoundError(f'{path}: no run of `cloc label` (no label.json there), none under way in {folder.path}')
  return Run(path, False, total, versions, writer.busy_seconds(spans), failures, shards)


def write(path: str | os.PathLike, *, out: str | os.PathLike | None = None, images: int = 24) -> pathlib.Path:
  """Writes the page and returns its path.

  Args:
    path: the --out of a run, finished or not.
    out: the file; by default NAME.label.html beside `path`, or in the working directory for an object store.
    images: how many to draw, from the beginnings of shards spread over the whole.

  Raises:
    FileNotFoundError: see load.
  """
  run = load(path)
  name = run.path.rpartition('/')[2]
  if out is None:
    out = f'{name}.label.html' if storage.is_url(run.path) else pathlib.Path(run.path).parent / f'{name}.label.html'
  body = [_head(run, name), _speed(run), _beside_paper(run), _figures(run), _lost(run), _phrases(run),
          _gallery(run, images)]
  out = pathlib.Path(out)
  out.parent.mkdir(parents=True, exist_ok=True)
  out.write_text(page.document(title=f'{name} · labels', body='\n'.join(body), style=STYLE), encoding='utf-8')
  return out


def mean(histogram: dict[int, int]) -> float | None:
  """Of a histogram; None of an empty one."""
  return stats.summary(histogram).get('mean')


def figure(example: schema.Example) -> str:
  """A card: the image with its boxes, the new caption, the alt-texts, and each region's phrase and score."""
  image = transforms.decode(example.image, where=example.image_id)
  canvas, geometry = transforms.prepare_image(image, image_size=_SIDE)
  boxes = geometry_lib.normalized_boxes_to_canvas(geometry, np.array([r.box for r in example.regions]).reshape(-1, 4))
  large_first = sorted(range(len(boxes)), key=lambda i: -np.prod(boxes[i][2:] - boxes[i][:2]))
  drawn = ''.join(page.box(boxes[i], index=i, side=_SIDE) for i in large_first)
  caption, *alt_texts = example.captions
  labels = ''.join(
      f'<li>{page.chip(i)}<span>{page.words(region.caption)} <span class="soft">{region.score:.2f}'
      + (f', {html.escape(region.source)}' if region.source != 'caption' else '') + '</span></span></li>'
      for i, region in enumerate(example.regions))
  texts = page.paragraph(caption) + ''.join(page.paragraph(text, cls='soft') for text in alt_texts)
  return (f'<figure>{page.picture(canvas, drawn)}<figcaption>{texts}<ol>{labels}</ol>'
          f'<div class="id">{html.escape(example.image_id)}</div></figcaption></figure>')


def table(rows: Sequence[Sequence[Any]], *, head: Sequence[str], ours: int | None = None, text: bool = False) -> str:
  """Rows as HTML; the row number `ours` stands out."""
  cells = lambda row, tag: ''.join(f'<{tag}>{html.escape(str(value))}</{tag}>' for value in row)
  lines = ''.join(f'<tr{" class=ours" if i == ours else ""}>{cells(row, "td")}</tr>' for i, row in enumerate(rows))
  return f'<table{" class=text" if text else ""}><tr>{cells(head, "th")}</tr>{lines}</table>'


def _head(run, name):
  counts = run.summary.counts
  rate = counts['images'] / run.busy_seconds if run.busy_seconds else 0.0
  facts = {'images': counts['images'], 'written': counts['written'], 'lost': counts['images'] - counts['written'],
           'regions': counts['regions'], 'regions an image': f'{_ratio(counts, "regions", "written"):.1f}',
           'images a second': charts.number(rate), 'captions from the cache': counts['captions_cached']}
  state = '' if run.finished else '<p class="bad">Not finished: these are the shards that are complete so far.</p>'
  stages = ''.join(f'<p class="soft">{html.escape(stage)}: {html.escape(version)}</p>'
                   for stage, version in run.versions.items())
  return (f'<header>\n<h1>{html.escape(name)}</h1>\n<p class="soft">{html.escape(run.path)}</p>\n{state}{stages}\n'
          f'{page.facts(facts)}\n</header>')


def _speed(run):
  seconds, models = run.summary.seconds, run.summary.models
  total, images = sum(seconds.values()), max(run.summary.counts['images'], 1)
  rows = [(stage, f'{1000 * spent / images:.2f}', f'{1000 * models.get(stage, 0) / images:.2f}',
           f'{100 * spent / total:.1f} %') for stage, spent in seconds.items()]
  ours = total - sum(models.values())
  return (f'<section>\n<h2>Time</h2>\n<p>{_duration(run.busy_seconds)} with shards under way. All workers together '
          f'spent {_duration(total)}; {100 * ours / max(total, 1e-9):.1f} % of it outside the models.</p>\n'
          + table(rows, head=('stage', 'ms an image', 'of it in the model', 'share of all')) + '</section>')


def _beside_paper(run):
  found = (mean(run.summary.histograms[name]) for name in ('regions_per_image', 'caption_words', 'region_words'))
  ours = (f'{run.summary.counts["written"]:,}', *('–' if value is None else f'{value:.1f}' for value in found))
  rows = [(name, *row) for name, row in {'this run (words)': ours, **PAPER}.items()]
  return ('<section>\n<h2>Beside the paper</h2>\n'
          + table(rows, head=('data set', 'images', 'regions an image', 'length of the caption', 'of a region text'),
                  ours=0)
          + '<p class="soft">The paper (Table 1) counts tokens, this page words; an English word is 1.2 to 1.5 '
          'tokens.</p></section>')


def _figures(run):
  found = [stats.chart(title, run.summary.histograms[name]) for name, title in _CURVES.items()
           if run.summary.histograms[name]]
  return f'<section>\n<h2>What was made</h2>\n<div class="charts">{"".join(found)}</div></section>'


def _lost(run):
  counts, errors = run.summary.counts, run.summary.tables['errors']
  share = lambda count, of: f'{100 * count / max(of, 1):.2f} %'
  rows = [(f'image lost: {stage}', f'{count:,}', share(count, counts['images']))
          for stage, count in errors.most_common()]
  rows += [(f'image without {what}', f'{counts[name]:,}', share(counts[name], counts['written']))
           for what, name in (('a query', 'without_queries'), ('a region', 'without_regions'),
                              ('an alt-text', 'without_alt_text'))]
  nothing = counts['queries'] - counts['queries_found']
  rows.append(('query that found no box', f'{nothing:,}', share(nothing, counts['queries'])))
  listed = ''
  if run.failures:
    listed = ('<p>The first of those that were lost (all are in errors.jsonl):</p>'
              + table([(f['id'], f['stage'], f['message'][:300]) for f in run.failures],
                      head=('image', 'stage', 'what was wrong'), text=True))
  return ('<section>\n<h2>What was dropped, and why</h2>\n' + table(rows, head=('', 'how many', 'share')) + listed
          + '</section>')


def _phrases(run):
  rows = ''.join(f'<div><span>{page.words(text)}</span><span>{count:,}</span></div>'
                 for text, count in run.summary.tables['phrases'].most_common(_SHOWN_PHRASES))
  from_where = ', '.join(f'{name} {count:,}' for name, count in run.summary.tables['sources'].most_common())
  return (f'<section>\n<h2>Most frequent region texts</h2>\n<p class="soft">Regions by the text their phrase is from: '
          f'{html.escape(from_where or "none")}.</p><div class="columns">{rows}</div></section>')


def _gallery(run, images):
  cards = ''.join(map(figure, _spread(run.shards, images)))
  return f'<section>\n<h2>Images</h2>\n<div class="grid">{cards}</div></section>' if cards else ''


def _spread(shards, images) -> Iterator[schema.Example]:
  """The first examples of shards that lie evenly over all."""
  chosen = [shards[i * len(shards) // min(images, len(shards))] for i in range(min(images, len(shards)))]
  for i, shard in enumerate(chosen):
    count = images // len(chosen) + (i < images % len(chosen))
    with storage.local_copy(shard) as path:
      yield from itertools.islice(sources.read_shard(path), count)


def _ratio(counts, over, under):
  return counts[over] / max(counts[under], 1)


def _duration(seconds):
  if seconds < 120:
    return f'{seconds:.1f} s'
  return f'{seconds / 60:.0f} min' if seconds < 7200 else f'{seconds / 3600:.1f} h'
