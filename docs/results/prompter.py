"""Makes prompter.md: what the Prompter costs as computed here and as written down literally, forward and backward.

  GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python docs/results/prompter.py

At the shapes of B/16 at 224 px and L/14 at 336 px, M = 4 boxes and M = 4 phrases an image: loss and gradients by the
layer's parameters, the image tokens and the prompts. FLOPs by formula (models/flops.py), temporaries as the compiler
planned them, time as the median of turns taken in one process. Read times as ratios.
"""
import argparse
import json
import pathlib
import platform
import statistics
import sys
import time

import jax
import numpy as np
import result_page

from cloc_jax import compiler
from cloc_jax.models import flops, prompter

HERE = pathlib.Path(__file__).parent
# name: (image side, patch, width D, joint width E, images at a time)
SHAPES = {'B/16, 224 px': (224, 16, 768, 512, 8), 'L/14, 336 px': (336, 14, 1024, 768, 2)}
PROMPTS = {'boxes': 2, 'phrases': 1}  # tokens of each
M = 4
FORMS = (('literal', 'all'), ('shared', 'all'), ('literal', 'prompt'), ('shared', 'prompt'))


def work(form: str, pool: str, *, patches: int, width: int, out_dim: int) -> float:
  """FLOPs an image, forward and backward, of all prompts."""
  common = dict(patches=patches, width=width, out_dim=out_dim, prompts=M, pool=pool, shared=form == 'shared')
  return 3 * sum(flops.prompter(tokens=p, state=i == 0, **common) for i, p in enumerate(PROMPTS.values()))


def function(form: str, pool: str, *, patches: int, width: int, images: int):
  """(compiled loss and gradients, its arguments)."""
  model = prompter.Prompter(width=width, out_dim=512, pool=pool, chunk=1)
  rng = np.random.default_rng(0)
  tokens = rng.normal(size=(images, patches, width)).astype(np.float32)
  prompts = [rng.normal(size=(images, M, p, width)).astype(np.float32) for p in PROMPTS.values()]
  grid = round(patches**0.5)

  def touch(module, tokens):
    state = module.image_state(tokens)
    boxes = module(state, module.box_tokens(np.zeros((images, M, 4), np.float32), grid=grid))
    return boxes + module(state, module.text_tokens(np.zeros((images, M, 512), np.float32)))

  params = model.init(jax.random.key(0), tokens[:, :patches], method=touch)['params']
  params = jax.tree.map(lambda x: x + 0.02 * rng.normal(size=x.shape).astype(np.float32), params)

  def loss(params, tokens, prompts):
    block = model.apply({'params': params}, method='block_params')
    if form == 'literal':
      out = [prompter.literal_block(block, tokens, p, pool=pool) for p in prompts]
    else:
      state = prompter.image_state(block, tokens, pool=pool)
      out = [prompter.shared_block(block, state, p, pool=pool, chunk=1) for p in prompts]
    return sum((x * x).sum() for x in out)

  arguments = params, tokens, prompts
  return jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(*arguments).compile(compiler.options()), arguments


def measure(name: str, *, rounds: int) -> dict:
  side, patch, width, out_dim, images = SHAPES[name]
  patches = (side // patch)**2
  compiled = {form: function(*form, patches=patches, width=width, images=images) for form in FORMS}
  values, seconds = {}, {form: [] for form in FORMS}
  for turn in range(rounds + 1):
    for form, (run, arguments) in compiled.items():
      began = time.perf_counter()
      values[form] = jax.block_until_ready(run(*arguments))
      if turn:
        seconds[form].append(time.perf_counter() - began)
  for pool in prompter.POOLS:  # a fast form of something else would be no result
    np.testing.assert_allclose(values['shared', pool][0], values['literal', pool][0], rtol=1e-3)
  return {' '.join(form): dict(
      gflops=work(*form, patches=patches, width=width, out_dim=out_dim) / 1e9,
      temporaries_mb=compiled[form][0].memory_analysis().temp_size_in_bytes / 2**20 / images,
      ms=1e3 * statistics.median(seconds[form]) / images) for form in FORMS}


def write(results: dict) -> None:
  lines = ['| | | GFLOPs an image | temporaries, MB an image | ms an image | faster than literal |',
           '| --- | --- | --- | --- | --- | --- |']
  for name, found in results.items():
    for form, pool in FORMS:
      r, literal = found[f'{form} {pool}'], found[f'literal {pool}']
      lines.append(f'| {name} | pool="{pool}", {form} | {r["gflops"]:.1f} | {r["temporaries_mb"]:.0f} | {r["ms"]:.0f} | '
                   f'{literal["ms"] / r["ms"]:.1f} × |')
  note = (f'Float32, M = {M} boxes and {M} phrases an image, loss and gradients, {platform.machine()}, jax '
          f'{jax.__version__}. Made by `python docs/results/prompter.py`.')
  result_page.write_table(HERE / 'prompter.md', f'{note}\n\n' + '\n'.join(lines))
  (HERE / 'prompter.json').write_text(json.dumps(results, indent=1) + '\n')


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--rounds', type=int, default=5)
  args = parser.parse_args()
  results = {}
  for name in SHAPES:
    results[name] = measure(name, rounds=args.rounds)
    print(name, json.dumps(results[name], indent=1), flush=True)
  write(results)
  return 0


if __name__ == '__main__':
  sys.exit(main())
