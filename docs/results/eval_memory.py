"""Makes eval_memory.md: what the evaluators hold beside the embeddings, and how long they take, at the sizes of LVIS.

  python docs/results/eval_memory.py

Random embeddings of 512 numbers. Every case runs in a process of its own (Linux): its memory is the operating system's
peak while it runs, less what it held just before, which is mostly the embeddings. Times are of the machine's cores.
A million regions against a million texts are hours: there only the first queries of either side ask, each the whole
pool. What is held is the same but for lists of indices (some tens of MB); the time of all is computed from the rate,
which does not depend on the query. Every case is kept at once in eval_memory.json: the same command goes on after the
last one (--again: begins anew).
"""
import argparse
import json
import os
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
from cloc_jax.evaluators import ranking

HERE = pathlib.Path(__file__).parent
WIDTH = 512
# kind: regions, distinct texts (or classes), queries of either side that ask (0: all)
CASES = ('recognition:36000x80', 'recognition:244000x1203', 'retrieval:100000x30000', 'retrieval:1000000x2000',
         'retrieval:1000000x1000000x32768')


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
  if texts == regions:
    label = np.arange(regions)  # each has a text of its own
  z_region_text = z_text if texts == regions else z_text[label]
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


def first_ask(queries: int, more: list[float]):
  """ranking.ranks of the first so many queries, whose answers stand for all; 0: all ask.

  Seconds that the others would take are added to `more`.
  """
  whole = ranking.ranks

  def ranks(z_query, *, z_pool, query, item):
    asked = min(queries, len(z_query)) if queries else len(z_query)
    some = np.asarray(query) < asked
    began = time.perf_counter()
    found = whole(z_query[:asked], z_pool=z_pool, query=query[some], item=item[some])
    more.append((time.perf_counter() - began) * (len(z_query) / asked - 1))
    return np.resize(found, len(z_query))
  return ranks


def measure(kind: str, regions: int, texts: int, queries: int = 0) -> dict:
  """Megabytes held before, the peak above them, seconds, and a figure, which shows that something was measured.

  all_seconds: of a retrieval in which all ask; computed where only the first `queries` did.
  """
  made, names, z_text = predictions(regions, texts)
  if kind == 'recognition':
    evaluator = evaluators.RegionRecognition(categories=names, encode_text=lambda texts, *, region: z_text)
  else:
    evaluator = evaluators.RegionRetrieval()
  more: list[float] = []
  ranking.ranks = first_ask(queries, more)
  held = memory_mb('VmRSS')
  forget_peak()
  began = time.perf_counter()
  found = dict(evaluator.run(made))
  seconds = time.perf_counter() - began
  return {'kind': kind, 'regions': regions, 'texts': texts, 'queries': queries, 'held_mb': held,
          'peak_mb': memory_mb('VmHWM') - held, 'seconds': seconds,
          'all_seconds': seconds + sum(more),
          'figure': found['top1' if kind == 'recognition' else 'r2t_r1']}


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--cases', nargs='+', default=list(CASES), metavar='KIND:REGIONSxTEXTS[xQUERIES]')
  parser.add_argument('--one', help=argparse.SUPPRESS)
  parser.add_argument('--again', action='store_true', help='forget what was measured before')
  parser.add_argument('--out', type=pathlib.Path, default=HERE, metavar='DIR')
  args = parser.parse_args()
  if args.one:
    kind, _, sizes = args.one.partition(':')
    print(json.dumps(measure(kind, *map(int, sizes.split('x')))))
    return 0
  file = args.out / 'eval_memory.json'
  results = result_page.begun(file, {'machine': platform.machine(), 'cores': len(os.sched_getaffinity(0)),
                                     'numpy': np.__version__}, again=args.again)
  cases = results.setdefault('cases', {})
  for number, case in enumerate(args.cases, 1):
    print(f'{number} of {len(args.cases)}, {case}: {"kept" if case in cases else "runs"}', flush=True)
    if case not in cases:
      done = subprocess.run([sys.executable, __file__, '--one', case], stdout=subprocess.PIPE, text=True, check=True)
      cases[case] = json.loads(done.stdout.splitlines()[-1])
      print(cases[case], flush=True)
      result_page.keep(file, results)
    result_page.write_table(args.out / 'eval_memory.md', table(results))
  return 0


def table(results) -> str:
  lines = ['| evaluator | regions | classes or texts | all similarities, MB | held before, MB | peak above it, MB | s |',
           '| --- | --- | --- | --- | --- | --- | --- |']
  for r in results['cases'].values():
    similarities = 4 * r['regions'] * r['texts'] / 2**20
    time_of = f'{r["seconds"]:.1f}' if not r['queries'] else (
        f'{r["seconds"]:.1f} for the first {r["queries"]:,} queries of either side; all, computed from that rate: '
        f'{r["all_seconds"] / 3600:.1f} h')
    lines.append(f'| region {r["kind"]} | {r["regions"]:,} | {r["texts"]:,} | {similarities:,.0f} '
                 f'| {r["held_mb"]:,.0f} | {r["peak_mb"]:,.0f} | {time_of} |')
  note = f'Embeddings of {WIDTH} numbers, NumPy {results["numpy"]}, {results["machine"]}, {results["cores"]} cores.'
  return '\n'.join([f'{note} Made by `python docs/results/eval_memory.py`.', '', *lines])


if __name__ == '__main__':
  sys.exit(main())
