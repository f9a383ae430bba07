"""The README.md of an exported folder: what the model is, how to load it, what it was measured at."""
import json
import pathlib

from cloc_jax import evaluate
from cloc_jax.interop.exported import Source, Target

_TEXT = '''---
tags: [cloc, clip, vision-language, region-embedding]
{front}---

# {title}

A CLOC model (Contrastive Localized Language-Image Pre-Training, arXiv 2410.02746), exported as `{target}` from step
{step} of a run of cloc_jax. {what}

## Use

{use}

## What it is

| | |
| --- | --- |
{facts}

Data, as the run's config names it: `{data}` (split `{split}`), {examples:,} examples seen.

## Measured

{metrics}

## Parity

{verdict} Compared with the model it was exported from, on {probe}, by {how}.
Relative differences are to an output's largest value; the tolerance is {tolerance:g}. The figures are also in
`parity.json`.

{parity}

## The run's config

```json
{config}
```
'''


def render(cloc, source: Source, *, target: Target, parity: str, probe: str, tolerance: float, passed: bool) -> str:
  """The card as Markdown. parity: the table of differences. cloc: the loaded checkpoint (inference.Cloc)."""
  info, model, v = cloc.info, source.model, source.image.sizes()
  config = info['config']
  grid = source.image_size // v.patch
  regions = {'prompter': 'Prompter and box head', 'roi_align': 'RoI-Align', 'none': 'none: whole images alone'}
  facts = {
      'image tower': f'{v.depth} layers of width {v.width}, {v.heads} heads, patches of {v.patch} pixels; pooled by '
                     f'{source.image.pool!r}',
      'images': f'{source.image_size} × {source.image_size} pixels ({grid} × {grid} patches), resized to fit and '
                f'padded ({source.pad}) with grey; mean {list(model.image_mean)}, standard deviation {list(model.image_std)}',
      'text tower': '{1} layers of width {0}, {2} heads'.format(*source.text.sizes()),
      'tokenizer': f'{source.tokenizer.name}, {source.tokenizer.vocab_size} ids; captions of {source.text_length} '
                   f'tokens, phrases of {source.region_text_length}',
      'joint width': str(model.embed_dim), 'region branch': regions[model.region_encoder]}
  towers_only = target.name in ('hf-clip', 'hf-siglip', 'open-clip', 'big-vision')
  what = 'This format holds the two towers; the region branch is not in it.' if towers_only else \
      'Towers and region branch are in it.'
  front = 'library_name: transformers\n' if target.name.startswith('hf-') else ''
  run = pathlib.Path(info['path']).parent
  return _TEXT.format(
      front=front, title=f'CLOC {v.width}/{v.patch} at {source.image_size} px', target=target.name, step=info['step'],
      what=what, use=target.use.replace('{size}', str(source.image_size)),
      facts='\n'.join(f'| {name} | {value} |' for name, value in facts.items()), data=config['data'].get('path'),
      split=config['data'].get('split'), examples=info.get('examples_seen', 0), metrics=_metrics(run),
      verdict='Passed.' if passed else '**Failed: do not use this folder.**', probe=probe, how=target.how,
      tolerance=tolerance, parity=parity, config=json.dumps(config, indent=2, default=str))


def _metrics(run: pathlib.Path) -> str:
  """A table of the run's own evaluations."""
  columns, steps = {}, set()
  for path in sorted((run / 'evals').glob('*.json')):
    try:
      content = json.loads(path.read_text(encoding='utf-8'))
      columns[path.stem] = content['metrics']
      steps.add(content.get('step'))
    except (ValueError, KeyError, TypeError):
      continue  # another kind of file
  if not any(columns.values()):
    return 'The run holds no evaluation.'
  when = f'At step {steps.pop()}' if len(steps) == 1 and None not in steps else 'At the steps that their files name'
  return f"{when}, by the run's own evaluations (`cloc eval`).\n\n{evaluate.table(columns)}"
