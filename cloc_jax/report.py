"""A run as one HTML page: what was trained, how it went, what it scores, and what it finds on images."""
import dataclasses
import html
import json
import os
import pathlib
import statistics
from typing import Any

from cloc_jax import boxes as box_lib
from cloc_jax import charts, checkpoint, evaluate, inference, metrics, outcomes, page, sheet, trees
from cloc_jax import config as config_lib
from cloc_jax.data import location, mixture, sources, spec
from cloc_jax.evaluators.grounding import IOU_THRESHOLD

_SEARCHED = 200  # images of a split among which the best and worst regions are looked for
_EXTREMES = 8

# Section → metric → (title, {how to draw it}).
_CURVES: dict[str, dict[str, tuple[str, dict[str, bool]]]] = {
    'Losses': {
        'loss': ('total', {'log': True}),
        'loss_image_text': ('image–text contrast', {'log': True}),
        'loss_region_text': ('region–text contrast', {'log': True}),
        'loss_grounding': ('grounding', {'log': True})},
    'Optimisation': {
        'learning_rate': ('learning rate', {}),
        'grad_norm': ('gradient norm', {'log': True}),
        'param_norm': ('parameter norm', {}),
        'logit_scale': ('logit scale', {}),
        'region_logit_scale': ('logit scale of regions', {}),
        'filtered_pairs': ('region pairs filtered', {'percent': True}),
        'lambda': ('λ of the region losses', {}),
        'regions_per_image': ('regions an image', {})},
    'Speed': {
        'images_per_second': ('images a second', {}),
        'data_wait_share': ('waiting for data', {'percent': True}),
        'mfu': ('share of peak FLOP/s', {'percent': True})},
    'Data': {
        'data/truncated_captions': ('captions cut off', {'percent': True}),
        'data/truncated_region_captions': ('region captions cut off', {'percent': True}),
        'data/corrupt_images': ('unreadable images', {}),
        'data/corrupt_records': ('unreadable records', {}),
        'data/boxes_dropped': ('boxes dropped', {}),
        'data/empty_captions': ('empty captions', {}),
        'data/regions_seen_per_image': ('regions in a record', {})},
}
# The clock, and what says the same as images a second.
_NOT_DRAWN = {'time', 'step_seconds', 'flops_per_second'}
_COUNTS = (('image_text_retrieval/images', 'images'), ('region_recognition/boxes', 'boxes with a class'),
           ('region_retrieval/pool', 'regions with a text'), ('grounding/phrases', 'phrases grounded'))

_STYLE = charts.STYLE + """
section > p { margin-bottom: 12px; }
tr.count td, tr.count th { color: var(--soft); font-size: 13px; }
details { margin: 8px 0; }
summary { cursor: pointer; color: var(--soft); }
.config { columns: 270px; column-gap: 28px; }
.config div { break-inside: avoid; padding-bottom: 14px; }
.config h3 { margin: 6px 0 4px; }
.config dl { display: grid; grid-template-columns: max-content 1fr; gap: 1px 14px; margin: 0; font-size: 13px; }
.config dt { color: var(--soft); }
.config dd { margin: 0; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 520px), 1fr)); gap: 18px; }
.card { display: grid; grid-template-columns: minmax(180px, 46%) 1fr; align-items: start; }
.card figcaption { max-height: 560px; overflow-y: auto; }
.card li { margin-bottom: 9px; line-height: 1.35; }
.card li > div { min-width: 0; }
.verdict { display: flex; flex-wrap: wrap; gap: 0 12px; font-size: 12.5px; color: var(--soft);
           font-variant-numeric: tabular-nums; }
.strip { display: grid; grid-template-columns: repeat(auto-fill, minmax(138px, 1fr)); gap: 12px; margin-bottom: 18px; }
.strip figcaption { padding: 8px 10px 10px; font-size: 13px; line-height: 1.35; }
@media (max-width: 520px) { .card { grid-template-columns: 1fr; } }
"""


@dataclasses.dataclass(frozen=True)
class _Run:
  """cloc: the newest checkpoint. history: metrics.jsonl. evaluations: split → content of its JSON file."""
  workdir: pathlib.Path
  cloc: inference.Cloc
  history: dict[int, dict[str, Any]]
  evaluations: dict[str, dict[str, Any]]

  @property
  def config(self) -> dict[str, Any]:
    return self.cloc.info['config']

  @property
  def data_path(self) -> str:
    """Where the images of the evaluations are."""
    return self.config['evals'].get('path') or self.config['data'].get('path')

  @property
  def trained_on(self) -> str:
    """For people."""
    data = self.config['data']
    if data.get('mixture'):
      return f'a mixture: {mixture.describe(mixture.parts(data["mixture"]))}'
    return f'{spec.text(data["path"])}, split {data.get("split", "train")}'


def _load(workdir):
  cloc = inference.load(workdir)
  cache = cloc.info['config']['data'].get('cache')
  if cache:  # the images of a data set in a store are in the copy that the run read
    location.use_cache(cache)
  return cloc


def write(workdir: str | os.PathLike, *, out: str | os.PathLike | None = None, images: int = 12) -> pathlib.Path:
  """Writes the page. It needs no other file and no network.

  Args:
    workdir: a run's folder, finished or not.
    out: the file to write; WORKDIR/report.html by default.
    images: how many images of each evaluated split to show.

  Returns:
    The path of the page.

  Raises:
    FileNotFoundError: naming what is missing, where the folder has no checkpoint or no metrics. Without evaluations
      or without the data set, the page says so in their place.
  """
  if images < 1:
    raise ValueError(f'images: expected at least 1, got {images}')
  run = _read(workdir)
  title = run.workdir.resolve().name
  body = '\n'.join([_head(run, title), _scores(run), _curves(run), *_pictures(run, images)])
  out = run.workdir / 'report.html' if out is None else pathlib.Path(out)
  out.parent.mkdir(parents=True, exist_ok=True)
  temporary = out.with_name(f'{out.name}.{os.getpid()}.tmp')
  temporary.write_text(page.document(title=title, body=body, style=_STYLE), encoding='utf-8')
  temporary.replace(out)
  return out


def picture(workdir: str | os.PathLike, out: str | os.PathLike, *, split: str, images: int = 8) -> pathlib.Path:
  """Draws the first images of a split, each region's caption where the model sees it, as one PNG file.

  Args:
    workdir: a run's folder.
    out: the file to write.
    split: of the data set that the run was evaluated on.
    images: how many.

  Returns:
    The path of the picture.

  Raises:
    FileNotFoundError: without a checkpoint or the data set.
    ValueError: on an unknown split, or a model without a box head.
  """
  cloc = _load(workdir)
  path = _Run(pathlib.Path(workdir), cloc, {}, {}).data_path
  evaluate.splits_to_evaluate(path, [split])
  outcome = outcomes.measure(cloc, path=path, split=split, limit=images)
  if 'grounding' in outcome.missing:
    raise ValueError(f'{workdir}: there are no boxes to draw: {outcome.missing["grounding"]}')
  tiles = []
  for image in outcome.images:
    shown = [r for r in image.regions if r.found is not None]
    tiles.append(sheet.Tile(image=image.canvas, boxes=tuple(r.found for r in shown),
                            labels=tuple(r.caption for r in shown)))
  out = pathlib.Path(out)
  out.parent.mkdir(parents=True, exist_ok=True)
  sheet.draw(tiles).save(out)
  return out


def _read(workdir) -> _Run:
  workdir = pathlib.Path(workdir)
  checkpoint.find(workdir)  # its message says what is missing
  if not (workdir / 'metrics.jsonl').is_file():
    raise FileNotFoundError(f'{workdir} holds no metrics (expected {workdir / "metrics.jsonl"}): expected the folder '
                            'of a run, as given to `cloc train`')
  evaluations = {}
  cloc = _load(workdir)
  for path in sorted((workdir / 'evals').glob('*.json')):
    found = json.loads(path.read_text(encoding='utf-8'))
    evaluations[found.get('split', path.stem)] = found
  run = _Run(workdir=workdir, cloc=cloc, history=metrics.read(workdir), evaluations=evaluations)
  return dataclasses.replace(run, evaluations={s: evaluations[s] for s in _in_order(run, evaluations)})


def _in_order(run, splits) -> list[str]:
  """Splits as the data set lists them, then those that it does not know."""
  try:
    known = list(sources.read_meta(run.data_path).splits) if run.data_path is not None else []
  except FileNotFoundError:
    known = []
  return sorted(splits, key=lambda split: known.index(split) if split in known else len(known))


def _head(run: _Run, title: str) -> str:
  data, model, info = run.config['data'], run.config['model'], run.cloc.info
  last = max([info['step'], *run.history])
  total = _total_steps(run.config)
  speeds = [row['images_per_second'] for row in run.history.values() if row.get('images_per_second')]
  facts = {
      'steps' if total else 'steps, of an unknown total': f'{last:,} of {total:,}' if total else last,
      'images seen': last * data['batch_size'],
      'parameters': trees.count(run.cloc.params),
      'images a second, median': charts.number(statistics.median(speeds)) if speeds else '–',
      'state': 'finished' if total and last >= total else 'not finished'}
  encoder = {'prompter': 'Prompter with a box head', 'roi_align': 'RoI-Align', 'none': 'no region branch'}
  towers = (f'Image tower {model["image"]["variant"]} at {data["image_size"]} px, text tower '
            f'{model["text"]["variant"]}, {encoder[run.cloc.functions.model.region_encoder]}. Batch of '
            f'{data["batch_size"]:,}. Trained on {run.trained_on}.')
  behind = '' if info['step'] == last else f' The metrics go on to step {last:,}.'
  sections = ''.join(
      f'<div><h3>{html.escape(name)}</h3><dl>' + ''.join(
          f'<dt>{html.escape(key)}</dt><dd>{html.escape(value)}</dd>' for key, value in _flat(section)) + '</dl></div>'
      for name, section in run.config.items())
  return (f'<header>\n<h1>{html.escape(title)}</h1>\n<p>{html.escape(towers)}</p>\n'
          f'<p class="soft">Pictures and answers below are of the checkpoint at step {info["step"]:,}.{behind}</p>\n'
          f'{page.facts(facts)}\n<details><summary>Configuration</summary>'
          f'<div class="config">{sections}</div></details>\n</header>')


def _total_steps(config) -> int | None:
  """None where the length is in epochs of a data set that is gone."""
  data = config['data']
  try:
    size = sources.read_meta(data['path']).splits.get(data.get('split', 'train')) if data.get('path') else None
  except FileNotFoundError:
    size = None
  try:
    return config_lib.duration(config['train'], 'total', batch_size=data['batch_size'], dataset_size=size)
  except ValueError:
    return None


def _flat(section, prefix=''):
  """(dotted key, text) of every value of a config section."""
  for key, value in section.items():
    if isinstance(value, dict) and value:
      yield from _flat(value, f'{prefix}{key}.')
    else:
      yield f'{prefix}{key}', value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _scores(run: _Run) -> str:
  found = run.evaluations
  if not found:
    return ('<section><h2>Scores</h2><p>This run has not been evaluated yet: '
            f'{html.escape(str(run.workdir / "evals"))} holds no results.</p></section>')
  used = lambda rows: [(key, label) for key, label in rows if any(key in e['metrics'] for e in found.values())]
  row = lambda label, cells, kind='': (f'<tr{kind}><th scope="row">{html.escape(label)}</th>'
                                       + ''.join(f'<td>{cell}</td>' for cell in cells) + '</tr>')
  cells = lambda key, write: [write(e['metrics'][key]) if key in e['metrics'] else '–' for e in found.values()]
  rows = [row(label, cells(key, lambda v: f'{100 * v:.1f}')) for key, label in used(evaluate.HEADLINES)]
  rows += [row(label, cells(key, lambda v: f'{v:,.0f}'), ' class="count"') for key, label in used(_COUNTS)]
  steps = [f'{e["step"]:,}' if 'step' in e else '–' for e in found.values()]
  rows.append(row('at step', steps, ' class="count"'))
  head = ''.join(f'<th scope="col">{html.escape(split)}</th>' for split in found)
  skipped = ''.join(f'<li>{html.escape(split)}: no {html.escape(what)}, because {html.escape(why)}</li>'
                    for split, e in found.items() for what, why in e.get('skipped', {}).items())
  names = sorted({key for e in found.values() for key in e['metrics']})
  exact = lambda v: f'{v:,}' if isinstance(v, int) else f'{v:.4f}'
  everything = ''.join(row(key, cells(key, exact)) for key in names)
  protocols = ', '.join(sorted({p for e in found.values() for p in e.get('protocols', {}).values()}))
  return (
      '<section><h2>Scores</h2><div class="scroll"><table class="scores"><thead><tr><th>in percent</th>'
      f'{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
      + (f'<p>Not measured:</p><ol class="skipped">{skipped}</ol>' if skipped else '')
      + '<details><summary>All metrics</summary><div class="scroll"><table><thead><tr><th></th>'
      f'{head}</tr></thead><tbody>{everything}</tbody></table></div>'
      f'<p class="soft">Protocols: {html.escape(protocols)}.</p></details></section>')


def _curves(run: _Run) -> str:
  names = {name for row in run.history.values() for name in row} - _NOT_DRAWN
  if not run.config['model'].get('separate_temperature'):
    names.discard('region_logit_scale')  # it is the same parameter
  known = {name for group in _CURVES.values() for name in group}
  others = {name: (name.replace('_', ' '), {}) for name in sorted(names - known) if not name.startswith('eval/')}
  parts, still = [], []
  for group, wanted in {**_CURVES, 'Other': others}.items():
    drawn = []
    for name, (title, how) in wanted.items():
      steps, values = _series(run.history, name)
      if name not in names or not values:
        continue
      if len(set(values)) == 1 and len(values) > 1:
        still.append(f'{title} {charts.number(values[0])}')
      else:
        drawn.append(charts.chart(title, {'': (steps, values)}, **how))
    if drawn:
      parts.append(f'<h3>{group}</h3><div class="charts">{"".join(drawn)}</div>')
  if still:
    parts.append(f'<p class="soft">The same at every step: {html.escape(", ".join(still))}.</p>')
  return f'<section><h2>Curves</h2>{"".join(parts)}{_evaluation_curves(run)}</section>'


def _evaluation_curves(run: _Run) -> str:
  drawn = []
  times = sorted({step for step, row in run.history.items() if any(name.startswith('eval/') for name in row)})
  names = {name for row in run.history.values() for name in row if name.startswith('eval/')}
  splits = _in_order(run, sorted({name.split('/')[1] for name in names}))
  for key, label in evaluate.HEADLINES:
    series = {split: _series(run.history, f'eval/{split}/{key}') for split in splits}
    series = {split: points for split, points in series.items() if points[0]}
    if series:
      drawn.append(charts.chart(label, series, percent=True))
  if not drawn:
    return ''
  if len(times) == 1:
    return f'<p class="soft">Evaluated once, at step {times[0]:,}: the table above has the scores.</p>'
  return f'<h3>Evaluations</h3><div class="charts">{"".join(drawn)}</div>'


def _series(history, name):
  """(steps, values) where a metric was written and finite."""
  found = [(step, row[name]) for step, row in history.items() if row.get(name) is not None]
  return [step for step, _ in found], [value for _, value in found]


def _pictures(run: _Run, images: int) -> list[str]:
  if run.data_path is None:
    return ['<section><h2>Pictures</h2><p>Left out: the run names no data set to evaluate on.</p></section>']
  try:
    splits = evaluate.splits_to_evaluate(run.data_path, run.config['evals'].get('splits'))
  except (FileNotFoundError, ValueError) as reason:
    return [f'<section><h2>Pictures</h2><p>Left out: {html.escape(str(reason))}</p></section>']
  return [_split(run, split, images) for split in splits]


def _split(run: _Run, split: str, images: int) -> str:
  outcome = outcomes.measure(run.cloc, path=run.data_path, split=split, limit=max(images, _SEARCHED))
  shown = outcome.images[:images]
  parts = [f'<p>The first {len(shown)} images. Dashed: the true box of each phrase.'
           + ('' if 'grounding' in outcome.missing else ' Solid, in the same colour: where the model sees the phrase.')
           + f' {_summary(outcome)}</p>']
  parts += [f'<p class="soft">No {what} here: {html.escape(why)}.</p>' for what, why in outcome.missing.items()]
  parts.append('<div class="cards">' + '\n'.join(map(_card, shown)) + '</div>')
  ranked = sorted(outcome.grounded, key=lambda pair: -pair[1].iou)
  for name, pairs in (('Best', ranked[:_EXTREMES]), ('Worst', ranked[:-_EXTREMES - 1:-1])):
    if pairs:
      parts.append(f'<h3>{name} grounded of {len(ranked):,} phrases in {len(outcome.images):,} images</h3>'
                   f'<div class="strip">{"".join(_extreme(*pair) for pair in pairs)}</div>')
  return f'<section class="split"><h2>Pictures: {html.escape(split)}</h2>{"".join(parts)}</section>'


def _summary(outcome) -> str:
  parts = []
  if outcome.grounded:
    hits = sum(region.iou >= IOU_THRESHOLD for _, region in outcome.grounded)
    parts.append(f'{hits:,} of {len(outcome.grounded):,} phrases are found at IoU ≥ {IOU_THRESHOLD}')
  if outcome.recognized:
    hits = sum(r.right for r in outcome.recognized)
    parts.append(f'{hits:,} of {len(outcome.recognized):,} regions are recognised')
  return f'Of the first {len(outcome.images):,} images, {" and ".join(parts)}.' if parts else ''


def _card(image) -> str:
  side = image.canvas.shape[0]
  large_first = sorted(image.regions, key=lambda r: -float(box_lib.area(r.box)))  # small ones are not painted over
  truth = ''.join(page.box(r.box, index=r.index, side=side, dashed=True, number=r.found is None) for r in large_first)
  found = ''.join(page.box(r.found, index=r.index, side=side) for r in large_first if r.found is not None)
  rows = ''.join(
      f'<li>{page.chip(r.index)}<div>{page.words(r.caption)}<div class="verdict">{_iou(r)}{_class(r)}</div></div></li>'
      for r in image.regions) or '<li class="soft">No regions.</li>'
  caption = page.paragraph(image.captions[0]) if image.captions else ''
  return (f'<figure class="card">{page.picture(image.canvas, truth + found)}<figcaption>{caption}<ol>{rows}</ol>'
          f'<div class="id">{html.escape(image.image_id)}</div></figcaption></figure>')


def _extreme(image, region) -> str:
  side = image.canvas.shape[0]
  boxes = page.box(region.box, index=region.index, side=side, dashed=True, number=False)
  boxes += page.box(region.found, index=region.index, side=side, number=False)
  return (f'<figure>{page.picture(image.canvas, boxes)}<figcaption>{page.words(region.caption)}'
          f'<div class="verdict">{_iou(region)}</div></figcaption></figure>')


def _iou(region) -> str:
  if region.iou is None:
    return ''
  hit = region.iou >= IOU_THRESHOLD
  return f'<span class="iou {"good" if hit else "bad"}">IoU {region.iou:.2f} {"✓" if hit else "✗"}</span>'


def _class(region) -> str:
  if region.recognized is None:
    return ''
  if region.right:
    return f'<span class="class good">{page.words(region.category)} ✓</span>'
  if region.recognized == region.category:
    return f'<span class="class bad">{page.words(region.category)} ✗, tied with another</span>'
  return (f'<span class="class"><span class="bad">{page.words(region.recognized)} ✗</span> '
          f'should be {page.words(region.category)}</span>')
