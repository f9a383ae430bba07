"""One image through all stages, with every intermediate kept: for tuning prompts and thresholds."""
from collections.abc import Mapping, Sequence
import dataclasses
import html
import os
import pathlib
import time
from typing import Any

from cloc_jax import page
from cloc_jax.data import schema
from cloc_jax.data import transforms
from cloc_jax.label import engine
from cloc_jax.label import report
from cloc_jax.label import stages
from cloc_jax.label import work


@dataclasses.dataclass(frozen=True)
class Trial:
  """What each stage made. seconds: of each stage; the first image also pays for loading the model."""
  example: schema.Example
  alt_texts: tuple[str, ...]
  caption: str
  queries: tuple[str, ...]
  detections: tuple[stages.Detection, ...]
  versions: dict[str, str]
  seconds: dict[str, float]

  def text(self) -> str:
    """All of it for a terminal."""
    lines = [f'{self.example.image_id}: {self.example.width}×{self.example.height}']
    lines += [f'alt-text  {text}' for text in self.alt_texts]
    lines += ['', f'caption ({self.seconds["caption"]:.2f} s with loading, {self.versions["captioner"]})',
              f'  {self.caption}', '', f'phrases ({1000 * self.seconds["phrases"]:.1f} ms, {self.versions["phrases"]})']
    lines += [f'  {i + 1:>2} {query}{self._best(i)}' for i, query in enumerate(self.queries)] or ['  none']
    lines += ['', f'detections ({self.seconds["detect"]:.2f} s with loading, {self.versions["detector"]})']
    for found in sorted(self.detections, key=lambda d: -d.score):
      x0, y0, x1, y1 = found.box
      size = self.example.width, self.example.height
      lines.append(f'  {found.score:.3f}  {self.queries[found.phrase]:<30}  {x0 * size[0]:.0f},{y0 * size[1]:.0f} to '
                   f'{x1 * size[0]:.0f},{y1 * size[1]:.0f}')
    return '\n'.join(lines if self.detections else [*lines, '  none'])

  def _best(self, query):
    scores = [found.score for found in self.detections if found.phrase == query]
    return f'  ({len(scores)} found, best {max(scores):.2f})' if scores else '  (not found)'


def run(path: str | os.PathLike, *, alt_texts: Sequence[str] = (), settings: Mapping[str, Mapping[str, Any]]) -> Trial:
  """Takes an image file through the stages.

  Args:
    path: an image.
    alt_texts: its texts; without, those of the .txt beside it, if there is one.
    settings: stage → {'spec': …} and its settings, see engine.build_stage.

  Raises:
    FileNotFoundError, transforms.ImageError: there is no such image.
    What the stages raise.
  """
  path = pathlib.Path(path)
  data = path.read_bytes()
  pixels = transforms.decode(data, where=str(path))
  beside = path.with_suffix('.txt')
  if not alt_texts and beside.is_file():
    alt_texts = [line.strip() for line in beside.read_text(encoding='utf-8-sig').splitlines() if line.strip()]
  alt_texts = tuple(dict.fromkeys(alt_texts))
  picture = stages.Picture(image_id=path.name, image=pixels, alt_texts=alt_texts)
  built = {stage: engine.build_stage(stage, settings[stage]) for stage in engine.STAGES}
  seconds = {}

  def timed(name, call):
    began = time.perf_counter()
    answer = call()
    seconds[name] = time.perf_counter() - began
    if isinstance(answer, Exception):
      raise answer
    return answer
  caption = timed('caption', lambda: built['captioner'].caption([picture])[0])
  queries = tuple(timed('phrases', lambda: built['phrases'].phrases(caption, alt_texts)))
  detections = tuple(timed('detect', lambda: built['detector'].detect([picture], [queries])[0])) if queries else ()
  seconds.setdefault('detect', 0.0)
  shard = work.Shard(unit=0, part=0, source=str(path), versions={s: built[s].version for s in engine.STAGES})
  example = schema.Example(image=data, image_id=path.name, height=pixels.shape[0], width=pixels.shape[1],
                           captions=alt_texts)
  shard.items.append(work.Item(example, caption=caption, queries=queries, detections=detections))
  record, = work.examples(shard)
  return Trial(example=record, alt_texts=alt_texts, caption=caption, queries=queries, detections=detections,
               versions=shard.versions, seconds=seconds)


def write_page(trial: Trial, *, out: str | os.PathLike) -> pathlib.Path:
  """Writes the image with its boxes, and what every stage made, as one HTML file."""
  rows = []
  for index, query in enumerate(trial.queries):
    found = sorted((d.score for d in trial.detections if d.phrase == index), reverse=True)
    rows.append((query, len(found), ', '.join(f'{score:.2f}' for score in found) or '–'))
  steps = [('Caption', trial.versions['captioner'], trial.seconds['caption'], page.paragraph(trial.caption)),
           ('Phrases, and what the detector found for them',
            f'{trial.versions["phrases"]}; {trial.versions["detector"]}',
            trial.seconds['phrases'] + trial.seconds['detect'],
            report.table(rows, head=('query', 'boxes', 'scores')) if rows else '<p>None.</p>')]
  alt = ''.join(f'<p class="soft">alt-text: {page.words(text)}</p>' for text in trial.alt_texts)
  body = (f'<header><h1>{html.escape(trial.example.image_id)}</h1>{alt}</header>'
          f'<div class="trial"><div>{report.figure(trial.example)}</div><div>'
          + ''.join(f'<h2>{html.escape(name)}</h2><p class="soft">{html.escape(version)} · {seconds:.2f} s, loading '
                    f'included</p>{made}'
                    for name, version, seconds, made in steps) + '</div></div>')
  style = report.STYLE + ('.trial { display: grid; grid-template-columns: minmax(300px, 600px) 1fr; gap: 28px; }'
                          '.trial h2:first-child { margin-top: 0; }'
                          '@media (max-width: 800px) { .trial { grid-template-columns: 1fr; } }')
  out = pathlib.Path(out)
  out.parent.mkdir(parents=True, exist_ok=True)
  out.write_text(page.document(title=f'{trial.example.image_id} · try', body=body, style=style), encoding='utf-8')
  return out
