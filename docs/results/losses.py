"""Makes losses.md: time and memory of the contrastive losses by N, dense and in tiles, forward and backward.

  python docs/results/losses.py --sizes 8192,16384,32768,65536

Every case runs in a process of its own (Linux): its memory is the operating system's peak while it runs, less what it
held just before. Dense cases that would need more than --memory-limit are not started. Read times as ratios.
"""
import argparse
import json
import pathlib
import platform
import statistics
import subprocess
import sys
import time

import result_page

HERE = pathlib.Path(__file__).parent
# (column, loss, form, with the text filter)
CASES = (('dense', 'softmax', 'dense', False), ('tiles', 'softmax', 'tiles', False),
         ('dense, filter', 'softmax', 'dense', True), ('tiles, filter', 'softmax', 'tiles', True),
         ('sigmoid dense', 'sigmoid', 'dense', False), ('sigmoid tiles', 'sigmoid', 'tiles', False))
# Bytes per pair that a dense form was seen to hold at its peak.
_DENSE_BYTES = 16
_FLOPS = {('softmax', False): 8, ('softmax', True): 12, ('sigmoid', False): 6, ('sigmoid', True): 8}


def memory_mb(field: str) -> float:
  """'VmRSS', what this process holds now, or 'VmHWM', the most it held since `forget_peak`."""
  line = next(x for x in pathlib.Path('/proc/self/status').read_text().splitlines() if x.startswith(field))
  return int(line.split()[1]) / 1024


def forget_peak() -> None:
  pathlib.Path('/proc/self/clear_refs').write_text('5')


def measure(*, loss: str, form: str, filtered: bool, n: int, width: int, tile: int, repeats: int) -> dict:
  """Seconds of one value and gradient, the memory it added, and the rate of a large matrix product just before."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from cloc_jax.losses import contrastive, tiles
  rng = np.random.default_rng(0)
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  a, text = (jnp.asarray(unit(rng.standard_normal((n, width), np.float32))) for _ in range(2))
  options = dict(logit_scale=1 / 0.07, logit_bias=-10.0, filter_threshold=0.9 if filtered else None)
  if form == 'tiles':
    function = contrastive.CONTRASTS[loss]
    options['tiling'] = tiles.Tiling.make(tile=tile)
  else:
    function = contrastive.DENSE[loss]
  step = jax.jit(jax.value_and_grad(lambda a, text: function(a, text, **options).loss, (0, 1))).lower(a, text).compile()
  matrix = jnp.ones((4096, 4096))
  product = jax.jit(lambda x: x @ x).lower(matrix).compile()
  products = []
  for _ in range(4):
    began = time.perf_counter()
    product(matrix).block_until_ready()
    products.append(time.perf_counter() - began)
  peak_rate = 2 * 4096**3 / statistics.median(products[1:])
  del matrix
  forget_peak()
  before = memory_mb('VmRSS')
  seconds = []
  for _ in range(repeats + 1):
    began = time.perf_counter()
    jax.block_until_ready(step(a, text))
    seconds.append(time.perf_counter() - began)
  seconds = statistics.median(seconds[1:])
  rate = _FLOPS[loss, filtered] * width * n**2 / seconds
  return {'seconds': seconds, 'extra_mb': memory_mb('VmHWM') - before,
          'planned_mb': step.memory_analysis().temp_size_in_bytes / 2**20, 'of_peak_matmul': rate / peak_rate}


def run_case(case: dict) -> dict | None:
  done = subprocess.run([sys.executable, __file__, '--case', json.dumps(case)], capture_output=True, text=True,
                        check=False)
  if done.returncode:
    print(f'{case}: exit {done.returncode}: {done.stderr[-300:]}', file=sys.stderr)
    return None
  return json.loads(done.stdout.splitlines()[-1])


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--sizes', default='8192,16384,32768')
  parser.add_argument('--width', type=int, default=512)
  parser.add_argument('--tile', type=int, default=1024)
  parser.add_argument('--repeats', type=int, default=3)
  parser.add_argument('--memory-limit', type=float, default=12, metavar='GB')
  parser.add_argument('--case', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.case:
    print(json.dumps(measure(**json.loads(args.case))))
    return 0
  results = {}
  for n in map(int, args.sizes.split(',')):
    for label, loss, form, filtered in CASES:
      if form == 'dense' and _DENSE_BYTES * n**2 > args.memory_limit * 2**30:
        continue
      repeats = max(1, min(args.repeats, 30_000 // n))
      found = run_case(dict(loss=loss, form=form, filtered=filtered, n=n, width=args.width, tile=args.tile,
                            repeats=repeats))
      results.setdefault(n, {})[label] = found
      print(n, label, found, flush=True)
  write(results, args)
  return 0


def write(results, args) -> None:
  def cell(found, label):
    if label not in found:
      return '–'
    r = found[label]
    return f'{r["seconds"]:.2f} s · {r["extra_mb"]:,.0f} MB · {100 * r["of_peak_matmul"]:.0f} %' if r else 'failed'

  labels = [label for label, *_ in CASES]
  rows = ['| N | ' + ' | '.join(labels) + ' |', '| ' + ' | '.join(['---'] * (len(labels) + 1)) + ' |']
  rows += [f'| {n:,} | ' + ' | '.join(cell(found, label) for label in labels) + ' |'
           for n, found in results.items()]
  import jax
  note = (f'D = {args.width}, float32, tiles of {args.tile}, loss and gradients: seconds, memory beyond the inputs and '
          'the program, and the share of the rate of a 4096³ matrix product measured just before in the same process. '
          f'Made by `python docs/results/losses.py --sizes {args.sizes}` on {platform.machine()}, '
          f'jax {jax.__version__}. "–": not run, it would have needed more than {args.memory_limit:.0f} GB.')
  result_page.write_table(HERE / 'losses.md', f'{note}\n\n' + '\n'.join(rows))
  (HERE / 'losses.json').write_text(json.dumps(results, indent=1) + '\n')


if __name__ == '__main__':
  sys.exit(main())
