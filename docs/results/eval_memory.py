"""Makes eval_memory.md: what the evaluators hold beside the embeddings, and how long they take, at the sizes of LVIS.

  python docs/results/eval_memory.py

Random embeddings of 512 numbers. Every case runs in a process of its own (Linux): its memory is the operating system's
peak while it runs, less what it held just before, which is mostly the embeddings. Times are of the machine's cores.
"""
import argparse
import json
import pathlib
import platform
import subprocess
import sys
import time

import numpy as np
import result_page
from losses import forget_peak
from losses import memory_mb

from cloc_jax import evaluators, geometry

HERE = pathlib.Path(__file__).parent
WIDTH = 512
# kind: regions, distinct texts (or classes)
CASES = (('recognition', 36_000, 80), ('recognition', 244_000, 1203), ('retrieval', 100_000, 30_000),
         ('retrieval', 1_000_000, 2_000))


def unit(rng, count, start=None):
  """(count, WIDTH) random directions, or some near `start`; in place, since a copy would be the peak."""
  z = rng.standard_normal((count, WIDTH), np.float32)
  if start is not None:
    for i in range(0, count, 10_000):
      z[i:i + 10_000] += 20 * start[i:i + 10_000]
  for i in range(0, count, 10_000):
    z[i:i + 10_000] /= np.linalg.norm(z[i:i + 10_000], axis=1, keepdims=True)
  return z


def predictions(regions: int, texts: int):
  """Regions near one text each, seven an image."""
  rng = np.random.default_rng(0)
  z_text, label = unit(rng, texts), rng.integers(0, texts, regions)
  z_region_text = z_text[label]
  images = -(-regions // 7)
  corners = np.sort(rng.random((regions, 2, 2), np.float32), 1).reshape(-1, 4)
  names = tuple(f'thing {i}' for i in range(texts))
  made = evaluators.Predictions(
      image_ids=tuple(map(str, range(images))), z_image=np.zeros((images, 1), np.float32),
      geometry=(geometry.resize_with_pad(height=480, width=640, canvas=224),) * images, captions=(),
      caption_image=np.zeros(0, np.int64), z_caption=np.zeros((0, 1), np.float32), boxes=corners,
      region_image=np.arange(regions) // 7, region_captions=tuple(names[i] for i in label),
      categories=tuple(names[i] for i in label), z_region=unit(rng, regions, z_region_text),
      z_region_text=z_region_text)
  return made, names, z_text


def measure(kind: str, regions: int, texts: int) -> dict:
  """Megabytes held before, the peak above them, seconds, and a figure, which shows that something was measured."""
  made, names, z_text = predictions(regions, texts)
  if kind == 'recognition':
    evaluator = evaluators.RegionRecognition(categories=names, encode_text=lambda texts, *, region: z_text)
  else:
    evaluator = evaluators.RegionRetrieval()
  held = memory_mb('VmRSS')
  forget_peak()
  began = time.perf_counter()
  found = dict(evaluator.run(made))
  seconds = time.perf_counter() - began
  return {'kind': kind, 'regions': regions, 'texts': texts, 'held_mb': held, 'peak_mb': memory_mb('VmHWM') - held,
          'seconds': seconds, 'figure': found['top1' if kind == 'recognition' else 'r2t_r1']}


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--cases', default=','.join(f'{k}:{r}x{t}' for k, r, t in CASES), metavar='KIND:REGIONSxTEXTS,…')
  parser.add_argument('--one', metavar='KIND:REGIONSxTEXTS', help=argparse.SUPPRESS)
  parser.add_argument('--out', type=pathlib.Path, default=HERE, metavar='DIR')
  args = parser.parse_args()
  if args.one:
    kind, _, sizes = args.one.partition(':')
    print(json.dumps(measure(kind, *map(int, sizes.split('x')))))
    return 0
  rows = []
  for case in args.cases.split(','):
    done = subprocess.run([sys.executable, __file__, '--one', case], stdout=subprocess.PIPE, text=True, check=True)
    rows.append(json.loads(done.stdout.splitlines()[-1]))
    print(rows[-1], flush=True)
  results = {'machine': platform.machine(), 'numpy': np.__version__, 'cases': rows}
  (args.out / 'eval_memory.json').write_text(json.dumps(results, indent=1) + '\n')
  result_page.write_table(args.out / 'eval_memory.md', table(results))
  return 0


def table(results) -> str:
  lines = ['| evaluator | regions | classes or texts | all similarities, MB | held before, MB | peak above it, MB | s |',
           '| --- | --- | --- | --- | --- | --- | --- |']
  for r in results['cases']:
    similarities = 4 * r['regions'] * r['texts'] / 2**20
    lines.append(f'| region {r["kind"]} | {r["regions"]:,} | {r["texts"]:,} | {similarities:,.0f} '
                 f'| {r["held_mb"]:,.0f} | {r["peak_mb"]:,.0f} | {r["seconds"]:.1f} |')
  note = f'Embeddings of {WIDTH} numbers, NumPy {results["numpy"]}, {results["machine"]}.'
  return '\n'.join([f'{note} Made by `python docs/results/eval_memory.py`.', '', *lines])


if __name__ == '__main__':
  sys.exit(main())
