"""Makes region_step.md: what regions add to a CLIP training step, on a CPU.

  GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python docs/results/region_step.py

Forward, backward and AdamW of this project's step as CLIP, and as CLOC with M = 4 regions an image. Every case is a
process of its own, for its memory's sake; between steps it times a matrix product, and steps are compared in units of that.
"""
import argparse
import json
import pathlib
import platform
import statistics
import subprocess
import sys

import cpu_step
import jax
import result_page

HERE = pathlib.Path(__file__).parent
# (image side, patch, width, depth, heads, batch), text tower (width, depth, heads)
SHAPES = {'B/16, 224 px': ((224, 16, 768, 12, 12, 4), (512, 12, 8)),
          'L/14, 336 px': ((336, 14, 1024, 24, 16, 2), (768, 12, 12))}
M, LENGTH = 4, 77
FORMS = ('CLIP', 'all', 'prompt')


def measure(name: str, form: str, *, rounds: int) -> dict:
  """Median time of a step over that of a 4096³ product beside it, and the step's FLOPs."""
  regions = {} if form == 'CLIP' else dict(region_encoder='prompter', regions=M, pool=form)
  run, work = cpu_step.ours(*SHAPES[name], length=LENGTH, **regions)
  run()
  units, seconds = [], []
  for _ in range(rounds):
    before = cpu_step.peak_rate()
    began = cpu_step.clock()
    run()
    seconds.append(cpu_step.clock() - began)
    units.append(seconds[-1] * (before + cpu_step.peak_rate()) / 2)
  return dict(time=statistics.median(units), seconds=statistics.median(seconds), flops=work)


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--case', nargs=2, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.case:
    print(json.dumps(measure(*args.case, rounds=args.rounds)))
    return 0
  results = {}
  for name in SHAPES:
    for form in FORMS:
      done = subprocess.run([sys.executable, __file__, '--rounds', str(args.rounds), '--case', name, form],
                            capture_output=True, text=True, check=True)
      results.setdefault(name, {})[form] = json.loads(done.stdout.splitlines()[-1])
      print(name, form, results[name][form], flush=True)
  write(results)
  return 0


def write(results) -> None:
  lines = ['| | time of a CLOC step over CLIP\'s | its FLOPs over CLIP\'s |', '| --- | --- | --- |']
  for name, found in results.items():
    for form, r in found.items():
      if form != 'CLIP':
        over = {k: r[k] / found['CLIP'][k] for k in r}
        lines.append(f'| {name}, pool="{form}" | {over["time"]:.2f} × | {over["flops"]:.2f} × |')
  note = (f'M = {M}, captions of {LENGTH} tokens, region texts of {cpu_step.REGION_LENGTH}, float32, {platform.machine()}, jax '
          f'{jax.__version__}. Made by `python docs/results/region_step.py`.')
  result_page.write_table(HERE / 'region_step.md', f'{note}\n\n' + '\n'.join(lines))
  (HERE / 'region_step.json').write_text(json.dumps(results, indent=1) + '\n')


if __name__ == '__main__':
  sys.exit(main())
