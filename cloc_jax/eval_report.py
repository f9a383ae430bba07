"""`cloc eval --report`: an evaluation as one HTML page that stands alone, or as Markdown."""
import dataclasses
import html
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from cloc_jax import charts, confusion, evaluate, evaluators, findings, page, published

_PAIRS = 15  # confused pairs in the table
_COMPARED = ('in percent', 'data', 'here', 'published', 'same protocol')
_CLASSES = 12  # best and worst classes

_STYLE = charts.STYLE + confusion.STYLE + """
table { font-size: 14px; }
td.text { max-width: 52ch; }
.columns { display: flex; flex-wrap: wrap; gap: 8px 48px; }
.columns td, .columns th { white-space: nowrap; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 520px), 1fr)); gap: 0 36px; }
.strip { display: grid; grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); gap: 16px; }
.strip figcaption { padding: 10px 12px 12px; font-size: 13.5px; line-height: 1.35; }
.strip figcaption p { margin: 0 0 5px; }
.scores { display: grid; grid-template-columns: 1fr auto; gap: 0 10px; font-size: 12.5px; color: var(--soft);
          font-variant-numeric: tabular-nums; }
.scores .own { color: var(--good); }
.bar { display: inline-block; height: 9px; border-radius: 2px; background: var(--good); vertical-align: middle; }
.asked { display: grid; grid-template-columns: 180px 1fr; gap: 16px; padding: 14px 0;
         border-bottom: 1px solid var(--line); align-items: start; }
.row { display: grid; grid-template-columns: repeat(4, minmax(0, 170px)); gap: 10px; }
.row figure.right { border: 2px solid var(--good); }
.row figcaption { padding: 5px 8px; font-size: 12px; color: var(--soft); }
.asked figure { border-radius: 8px; }
.asked li { padding: 3px 0; line-height: 1.35; }
.asked li > span:first-child { flex: none; white-space: nowrap; }
@media (max-width: 620px) { .asked { grid-template-columns: 1fr; } .row { grid-template-columns: repeat(2, 1fr); } }
"""


@dataclasses.dataclass(frozen=True)
class Part:
  """One split, or one folder.

  data, categories: as published.rows takes them. found: examples; None for a report of figures alone.
  pictures: image id → (canvas, geometry). missing: why there are none.
  """
  name: str
  evaluation: evaluators.Evaluation
  data: str = ''
  categories: Sequence[str] = ()
  found: findings.Findings | None = None
  pictures: dict = dataclasses.field(default_factory=dict)
  missing: str = ''


def write(parts: Sequence[Part], out: str | os.PathLike, *, info: dict, data: str) -> pathlib.Path:
  """Writes a page (.html) or a table (.md).

  Args:
    parts: what was evaluated.
    info: of the encoder.
    data: what it was evaluated on, for people.

  Raises:
    ValueError: on another ending.
  """
  out = check_name(out)
  text = _markdown(parts, info, data) if out.suffix == '.md' else _page(parts, info, data)
  out.parent.mkdir(parents=True, exist_ok=True)
  temporary = out.with_name(f'{out.name}.{os.getpid()}.tmp')
  temporary.write_text(text, encoding='utf-8')
  temporary.replace(out)
  return out


def check_name(out: str | os.PathLike) -> pathlib.Path:
  """The path. Raises ValueError if it is neither a page nor Markdown."""
  out = pathlib.Path(out)
  if out.suffix not in ('.html', '.md'):
    raise ValueError(f'--report: expected a file that ends in .html or .md, got {str(out)!r}')
  return out


def _facts(info) -> dict:
  """What is worth knowing of an encoder, in words."""
  names = {'encoder': 'encoder', 'step': 'step', 'region_embedding': 'regions embedded by', 'image_size': 'image size',
           'preprocessing': 'pre-processing'}
  return {label: info[key] for key, label in names.items() if info.get(key) is not None}


def _label(metric) -> str:
  return dict(evaluate.HEADLINES).get(metric, metric.replace('/', ', ').replace('_', ' '))


def _protocols(parts) -> str:
  return ', '.join(sorted({p for part in parts for p in part.evaluation.protocols.values()}))


def _left_out(part) -> tuple[str, ...]:
  return part.evaluation.coverage.left_out if part.evaluation.coverage is not None else ()


def _notes(parts) -> str:
  return ' '.join(dict.fromkeys(note for part in parts for note in part.evaluation.notes))


def _compared(parts, info):
  """(part, published.Row) of all parts."""
  return [(part, row) for part in parts
          for row in published.rows(
              part.evaluation, data=part.data, info=info, split=part.name, categories=part.categories)]


def _comparison(compared):
  return [[_label(row.metric), part.name,
           evaluate.figure(part.evaluation.metrics, row.metric, part.evaluation.coverage), row.text, row.verdict]
          for part, row in compared]


def _markdown(parts, info, data) -> str:
  lines = [f'# Evaluation of {info.get("encoder", "an encoder")}', '', f'On {data}.', '']
  lines += [f'- {label}: {value}' for label, value in _facts(info).items() if label != 'encoder']
  lines += [f'- {part.name}{said}' for part in parts if part.evaluation.coverage is not None
            for said in (f': {part.evaluation.coverage}', *(f', left out: {what}' for what in _left_out(part)))]
  lines += ['', evaluate.table({p.name: p.evaluation.metrics for p in parts},
                               {p.name: p.evaluation.coverage for p in parts}), '']
  lines += [f'Protocols: {_protocols(parts)}. {_notes(parts)}'.rstrip(), '']
  lines += [f'- {part.name}: {what} not measured: {why}' for part in parts
            for what, why in part.evaluation.skipped.items()]
  lines += ['', '## Beside published figures', '']
  compared = _compared(parts, info)
  if compared:
    lines += [evaluate.markdown([list(_COMPARED), *_comparison(compared)]), '']
    lines += [f'- {source}' for source in dict.fromkeys(row.source for _, row in compared)]
  else:
    lines.append('Nothing is published of these metrics on this data.')
  return '\n'.join(lines).rstrip() + '\n'


def _page(parts, info, data) -> str:
  title = f'Evaluation of {info.get("encoder", "an encoder")}'
  said = ''.join(f'<p class="soft">{html.escape(label)}: {html.escape(str(value))}</p>'
                 for label, value in _facts(info).items() if label != 'encoder')
  counts = {}
  for part in parts:
    if part.evaluation.coverage is not None:
      counts[f'images of {part.name}'] = part.evaluation.coverage.images
      if part.evaluation.coverage.regions:
        counts[f'regions of {part.name}'] = part.evaluation.coverage.regions
  body = [f'<header><h1>{html.escape(title)}</h1><p>On {html.escape(data)}.</p>{said}{page.facts(counts)}</header>',
          _figures(parts), _beside_published(parts, info)]
  body += [_examples(part) for part in parts if part.found is not None]
  return page.document(title=title, body='\n'.join(body), style=_STYLE)


def _table(head, rows, *, text=()) -> str:
  """Cells are escaped here; columns in `text` are aligned to the left."""
  def cell(tag, i, value):
    kind, said = (' class=text', page.words(str(value))) if i in text else ('', html.escape(str(value)))
    return f'<{tag}{kind}>{said}</{tag}>'
  line = lambda tag, row: '<tr>' + ''.join(cell(tag, i, v) for i, v in enumerate(row)) + '</tr>'
  return (f'<div class="scroll"><table><thead>{line("th", head)}</thead>'
          f'<tbody>{"".join(line("td", row) for row in rows)}</tbody></table></div>')


def _figures(parts) -> str:
  keys = [(key, label) for key, label in evaluate.HEADLINES if any(key in p.evaluation.metrics for p in parts)]
  rows = [[label, *(evaluate.figure(p.evaluation.metrics, key, p.evaluation.coverage) for p in parts)]
          for key, label in keys]
  exact = lambda v: '–' if v is None else f'{v:,}' if isinstance(v, int) else f'{v:.4f}'
  names = sorted({name for p in parts for name in p.evaluation.metrics})
  everything = _table(['', *(p.name for p in parts)],
                      [[name, *(exact(p.evaluation.metrics.get(name)) for p in parts)] for name in names])
  skipped = ''.join(f'<li>{html.escape(f"{p.name}: no {what}: {why}")}</li>' for p in parts
                    for what, why in p.evaluation.skipped.items())
  left_out = ''.join(f'<li class="bad">{html.escape(f"{p.name}, left out: {what}")}</li>' for p in parts
                     for what in _left_out(p))
  return (f'<section><h2>Figures</h2>{_table(["in percent", *(p.name for p in parts)], rows)}'
          + (f'<ol>{left_out}</ol>' if left_out else '') + (f'<ol class="soft">{skipped}</ol>' if skipped else '')
          + f'<details><summary>All metrics</summary>{everything}</details>'
          f'<p class="soft">Protocols: {html.escape(_protocols(parts))}. A tie counts as wrong. {_notes(parts)}</p>'
          '</section>')


def _beside_published(parts, info) -> str:
  compared = _compared(parts, info)
  if not compared:
    return ('<section><h2>Beside published figures</h2><p class="soft">Nothing is published of these metrics on this '
            'data.</p></section>')
  sources = ''.join(f'<li>{html.escape(s)}</li>' for s in dict.fromkeys(r.source for _, r in compared))
  return ('<section><h2>Beside published figures</h2>'
          + _table(_COMPARED, _comparison(compared), text=(1, 3, 4))
          + f'<ol class="soft">{sources}</ol></section>')


def _examples(part) -> str:
  found, parts = part.found, [f'<section><h2>Examples: {html.escape(part.name)}</h2>']
  if part.missing:
    parts.append(f'<p class="bad">No pictures: {html.escape(part.missing)}</p>')
  if any(r.box is not None for some in found.regions.values() for r in some):
    parts.append('<p class="soft">Dashed: the true box. Solid: the box that was found. Beside a class stands its '
                 'cosine; the true class is green.</p>')
  for heading, regions in found.regions.items():
    if regions:
      parts.append(f'<h3>{html.escape(heading)}</h3><div class="strip">'
                   + ''.join(_region(r, part.pictures.get(r.image)) for r in regions) + '</div>')
  if found.confusion is not None:
    parts.append(_confusion(found.confusion))
  for kind, heading in (('i2t', 'Captions for an image'), ('t2i', 'Images for a caption')):
    if found.retrieval.get(kind):
      ask = _image_asks if kind == 'i2t' else _caption_asks
      answers = ''.join(ask(answer, part.pictures) for answer in found.retrieval[kind])
      parts.append(f'<h3>{heading}</h3><div class="{"pairs" if kind == "i2t" else ""}">{answers}</div>')
  return ''.join(parts) + '</section>'


def _region(region, drawn) -> str:
  picture = ''
  if drawn is not None:
    canvas, geometry = drawn
    side = canvas.shape[0]
    place = lambda box: geometry.boxes_to_canvas(np.asarray(box))
    overlay = ''
    if region.box is not None:
      overlay += page.box(place(region.box), index=0, side=side, dashed=region.found is not None, number=False)
    if region.found is not None:
      overlay += page.box(place(region.found), index=0, side=side, number=False)
    picture = page.picture(canvas, overlay)
  kind, sign = ('good', '✓') if region.right else ('bad', '✗')
  mark = f'<span class="{kind}">{page.words(region.says)} {sign}</span>'
  if region.scores and not region.right:
    mark += f' <span class="soft">should be {page.words(region.title)}</span>'
  title = '' if region.scores else page.paragraph(region.title)
  scores = ''.join(f'<span{" class=own" if name == region.title else ""}>{page.words(name)}</span>'
                   f'<span{" class=own" if name == region.title else ""}>{score:.2f}</span>'
                   for name, score in region.scores)
  return (f'<figure>{picture}<figcaption>{title}<p>{mark}</p><div class="scores">{scores}</div>'
          f'<div class="id">{html.escape(region.image)}</div></figcaption></figure>')


def _confusion(found) -> str:
  classes = found.by_class()
  best = [c for c in classes[:_CLASSES] if c[1]]
  # Of classes that are never right the largest is the worst.
  rest = classes[len(best):]
  worst = sorted(rest, key=lambda c: (c[1] / c[2], -c[2]))[:_CLASSES]
  pairs = _table(['most confused', 'taken for', 'how often', 'share of the class'],
                 [[a, b, f'{n:,}', f'{100 * share:.0f} %'] for a, b, n, share in found.pairs(_PAIRS)], text=(0, 1))
  named = (('best classes', best), ('worst classes', worst))
  tables = ''.join(f'<div>{t}</div>' for t in [pairs, *(_accuracy(name, rows) for name, rows in named if rows)])
  if len(found.classes) <= confusion.MOST_DRAWN:
    matrix = ('<p class="soft">A row is a class, a column what it was taken for; the darker, the larger the share of '
              f'the row.</p>{confusion.svg(found)}')
  else:
    matrix = f'<p class="soft">{len(found.classes):,} classes are too many to draw as a matrix.</p>'
  return f'<h3>Confusion</h3><div class="columns">{tables}</div>{matrix}'


def _accuracy(name, rows) -> str:
  lines = ''.join(
      f'<tr><td>{page.words(c)}</td><td>{right:,} of {total:,}</td><td class="text">'
      f'<span class="bar" style="width:{120 * right / total:.0f}px"></span> {100 * right / total:.0f} %</td></tr>'
      for c, right, total in rows)
  return (f'<div class="scroll"><table><thead><tr><th>{name}</th><th>right</th><th></th></tr></thead>'
          f'<tbody>{lines}</tbody></table></div>')


def _image_asks(answer, drawn) -> str:
  shown = html.escape(answer.query)
  if answer.query in drawn:
    shown = f'<figure>{page.picture(drawn[answer.query][0])}</figure>'
  lines = ''.join(f'<li><span class="{"good" if right else "soft"}">{"✓" if right else "✗"} {score:.2f}</span> '
                  f'<span>{page.words(text)}</span></li>' for text, score, right in answer.answers)
  return f'<div class="asked"><div>{shown}</div><ol>{lines}</ol></div>'


def _caption_asks(answer, drawn) -> str:
  tiles = ''.join(
      f'<figure class="{"right" if right else ""}">{page.picture(drawn[name][0]) if name in drawn else ""}<figcaption>'
      f'<span class="{"good" if right else "soft"}">{"✓" if right else "✗"}</span> {score:.2f} · {html.escape(name)}'
      '</figcaption></figure>' for name, score, right in answer.answers)
  return f'<div class="asked"><div dir="auto">{html.escape(answer.query)}</div><div class="row">{tiles}</div></div>'
