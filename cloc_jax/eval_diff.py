"""`cloc eval-diff`: which boxes two evaluations judge differently, by class, and a page with pictures of some."""
import collections
import dataclasses
import html
import os
import pathlib

import numpy as np

from cloc_jax import dump, page, pictures
from cloc_jax.evaluators.grounding import IOU_THRESHOLD

# What a box can be right in → (column, when a value of it is right).
JUDGEMENTS = {
    'recognition': ('rank', lambda rank: rank == 0),
    'grounding': ('iou', lambda iou: iou >= IOU_THRESHOLD),
    'grounding_proposals': ('chosen_iou', lambda iou: iou >= IOU_THRESHOLD),
    'grounding_supplied': ('supplied_iou', lambda iou: iou >= IOU_THRESHOLD),
}
# Those whose answer is a box of its own → how its columns begin, and who gives it.
_ANSWERS = {'grounding': ('found', 'where B’s box head sees the phrase'),
            'grounding_supplied': ('supplied', 'the proposal that B takes')}
_TITLES = {'recognition': 'Recognition', 'grounding': 'Grounding by the box head',
           'grounding_proposals': "Grounding among the image's own boxes",
           'grounding_supplied': 'Grounding among the supplied boxes'}
_CLASSES = 12  # in a table of the page
_BOX_SLACK = 0.5  # pixels between two dumps' boxes: encoders differ in their canvases, and so in rounding


@dataclasses.dataclass(frozen=True)
class Flip:
  """A region judged differently: its rows in the two dumps; `better` if B is right and A was wrong."""
  a: dict
  b: dict
  better: bool


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Of one judgement: regions that both judge, how many each has right, and the flips in the order of A."""
  both: int
  right_a: int
  right_b: int
  flips: tuple[Flip, ...]

  @property
  def by_class(self) -> dict[str, tuple[int, int]]:
    """Class (or '' where a region has none) → (right → wrong, wrong → right); most flips first."""
    worse, better = (collections.Counter(f.a['category'] for f in self.flips if f.better == b) for b in (False, True))
    return {c: (worse[c], better[c]) for c in sorted(worse | better, key=lambda c: (-worse[c] - better[c], c))}


@dataclasses.dataclass(frozen=True)
class Diff:
  """comparisons: by judgement, of those that both dumps made. only_a, only_b: regions that one dump alone has."""
  comparisons: dict[str, Comparison]
  regions: int
  only_a: int
  only_b: int
  info_a: dict
  info_b: dict


def compare(a: str | os.PathLike, b: str | os.PathLike) -> Diff:
  """Joins two dumps by split, image and region.

  Raises:
    FileNotFoundError, ValueError: as dump.read; and if no region is in both, or a region has other boxes or categories
      in the two: they are not of the same data.
  """
  (columns_a, info_a), (columns_b, info_b) = dump.read(a), dump.read(b)
  rows_a, rows_b = _rows(columns_a), _rows(columns_b)
  shared = [key for key in rows_a if key in rows_b]
  if not shared:
    raise ValueError(f'{a} and {b}: no region is in both; the first is of {_of(rows_a)}, the second of {_of(rows_b)}')
  for key in shared:
    _check_same(key, rows_a[key], rows_b[key], where=f'{a} and {b}')
  comparisons = {}
  for name, (column, right) in JUDGEMENTS.items():
    pairs = [(rows_a[k], rows_b[k]) for k in shared if rows_a[k][column] is not None and rows_b[k][column] is not None]
    if pairs:
      judged = [(bool(right(x[column])), bool(right(y[column]))) for x, y in pairs]
      comparisons[name] = Comparison(
          both=len(pairs), right_a=sum(x for x, _ in judged), right_b=sum(y for _, y in judged),
          flips=tuple(Flip(x, y, better=was_b) for (x, y), (was_a, was_b) in zip(pairs, judged) if was_a != was_b))
  return Diff(comparisons=comparisons, regions=len(shared), only_a=len(rows_a) - len(shared),
              only_b=len(rows_b) - len(shared), info_a=info_a, info_b=info_b)


def text(diff: Diff, *, classes: int = 20) -> str:
  """The comparison as lines for a terminal, with the classes that flipped most."""
  lines = [f'{diff.regions:,} regions in both' + ''.join(
      f'; {n:,} in {name} alone' for name, n in (('A', diff.only_a), ('B', diff.only_b)) if n)]
  proposals = [info.get('proposals', 'none named') for info in (diff.info_a, diff.info_b)]
  if 'grounding_supplied' in diff.comparisons and proposals[0] != proposals[1]:
    lines.append(f'A and B chose from other proposals: {", ".join(proposals)}')
  for name, found in diff.comparisons.items():
    worse = sum(not f.better for f in found.flips)
    lines += ['', f'{name}: {100 * found.right_a / found.both:.1f} % → {100 * found.right_b / found.both:.1f} % of '
              f'{found.both:,}; right → wrong {worse:,}, wrong → right {len(found.flips) - worse:,}']
    rows = list(found.by_class.items())
    width = max([len('class'), *(len(c or '(none)') for c, _ in rows[:classes])])
    if rows:
      lines.append(f'  {"class":<{width}}  right → wrong  wrong → right')
    lines += [f'  {c or "(none)":<{width}}  {w:>13,}  {b:>13,}' for c, (w, b) in rows[:classes]]
    if len(rows) > classes:
      lines.append(f'  … and {len(rows) - classes:,} classes more')
  return '\n'.join(lines)


def write_page(diff: Diff, out: str | os.PathLike, *, images: int = 24, image_size: int = 336) -> pathlib.Path:
  """An HTML page with up to `images` flips of each judgement and direction, drawn on the images of the data set.

  Where the data set is gone, the page says so and has no pictures.
  """
  name = lambda info: html.escape(f'{info.get("encoder", "?")} ({info.get("region_embedding", "?")})')
  shown = {(judgement, better): [f for f in found.flips if f.better == better][:images]
           for judgement, found in diff.comparisons.items() for better in (False, True)}
  wanted = {(f.a['split'], f.a['image_id']) for flips in shown.values() for f in flips}
  drawn, missing = pictures.of_data_set(diff.info_a['data'], wanted, image_size=image_size)
  body = [f'<h1>What changed</h1><p>A: {name(diff.info_a)}<br>B: {name(diff.info_b)}</p>'
          f'<p class="soft">{html.escape(text(diff).splitlines()[0])}.</p>']
  if missing:
    body.append(f'<p class="bad">No pictures: {html.escape(missing)}</p>')
  for judgement, found in diff.comparisons.items():
    body.append(f'<h2>{html.escape(_TITLES[judgement])}</h2>{_summary(found)}')
    if judgement in _ANSWERS:
      body.append(f'<p class="soft">Dashed: the true box. Solid: {_ANSWERS[judgement][1]}.</p>')
    for better in (False, True):
      flips, total = shown[judgement, better], sum(f.better == better for f in found.flips)
      if total:
        which = 'wrong → right' if better else 'right → wrong'
        body.append(f'<h3>{which}: {len(flips):,} of {total:,}</h3>'
                    f'<div class="grid">{"".join(_card(f, drawn, judgement) for f in flips)}</div>')
  path = pathlib.Path(out)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(page.document(title='What changed', body='\n'.join(body), style='table { font-size: 14px; }'),
                  encoding='utf-8')
  return path


def _summary(found) -> str:
  """The figures of a comparison and the classes that flipped most."""
  worse = sum(not f.better for f in found.flips)
  rows = list(found.by_class.items())
  lines = ''.join(f'<tr><td>{page.words(c or "(none)")}</td><td>{w:,}</td><td>{b:,}</td></tr>'
                  for c, (w, b) in rows[:_CLASSES])
  more = f'<p class="soft">… and {len(rows) - _CLASSES:,} classes more</p>' if len(rows) > _CLASSES else ''
  head = '<tr><th>class</th><th>right → wrong</th><th>wrong → right</th></tr>'
  table = f'<table><thead>{head}</thead><tbody>{lines}</tbody></table>{more}' if rows else ''
  return (f'<p>{100 * found.right_a / found.both:.1f} % → {100 * found.right_b / found.both:.1f} % of {found.both:,}; '
          f'<span class="bad">right → wrong {worse:,}</span>, '
          f'<span class="good">wrong → right {len(found.flips) - worse:,}</span></p>{table}')


def _rows(columns) -> dict[tuple, dict]:
  names = list(columns)
  rows = (dict(zip(names, values)) for values in zip(*columns.values()))
  return {(row['split'], row['image_id'], row['region']): row for row in rows}


def _of(rows) -> str:
  return 'no region' if not rows else f'split {next(iter(rows))[0]!r}, image {next(iter(rows))[1]!r} and so on'


def _check_same(key, a, b, *, where):
  boxes = [np.array([row[n] for n in ('x0', 'y0', 'x1', 'y1')]) for row in (a, b)]
  if np.abs(boxes[0] - boxes[1]).max() > _BOX_SLACK or a['category'] != b['category']:
    raise ValueError(f'{where}: not of the same data: region {key[2]} of image {key[1]!r} is {a["category"]!r} at '
                     f'{boxes[0].round(1).tolist()} and {b["category"]!r} at {boxes[1].round(1).tolist()}')


def _card(flip, drawn, judgement) -> str:
  a, b = flip.a, flip.b
  picture = ''
  if (a['split'], a['image_id']) in drawn:
    canvas, geometry = drawn[a['split'], a['image_id']]
    side = canvas.shape[0]
    place = lambda row, names: geometry.boxes_to_canvas(np.array([row[n] for n in names]))
    corners = ('x0', 'y0', 'x1', 'y1')
    overlay = page.box(place(a, corners), index=0, side=side, dashed=judgement in _ANSWERS, number=False)
    if judgement in _ANSWERS:
      answer = [f'{_ANSWERS[judgement][0]}_{corner}' for corner in corners]
      if b[answer[0]] is not None:  # an image may have no proposals
        overlay += page.box(place(b, answer), index=0, side=side, number=False)
    picture = page.picture(canvas, overlay)
  if judgement == 'recognition':
    said = ' → '.join(f'{page.words(row["top_classes"][0])} ({row["top_scores"][0]:.2f})'
                      for row in (a, b))
  else:
    said = ' → '.join(f'IoU {row[JUDGEMENTS[judgement][0]]:.2f}' for row in (a, b))
  return (f'<figure>{picture}<figcaption>{page.paragraph(a["caption"])}'
          f'<p class="{"good" if flip.better else "bad"}">{said}</p>'
          f'<div class="id">{page.words(a["category"])} · {html.escape(a["image_id"])}, region {a["region"]}</div>'
          '</figcaption></figure>')
