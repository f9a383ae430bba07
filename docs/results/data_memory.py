"""Makes data_memory.md: the memory of a process that makes batches for hours.

  nice python docs/results/data_memory.py [--minutes 120] [--photos shared/coco_mini/val2017]

Records and batches are those of data_pipeline.py. Fast and exact decoding, mirrored and cropped, with and without
worker processes take turns, each with an iterator of its own that is closed afterwards, as trainers do at restarts and
evaluations. Memory is that of the process and its workers (proportional set size), read at the end of each turn. What
was read so far is written after every turn, so that a run may be stopped. Linux.
"""
import argparse
import itertools
import json
import pathlib
import sys
import tempfile
import time

import data_pipeline
import numpy as np
import result_page

from cloc_jax.data import pipeline
from cloc_jax.data import schema
from cloc_jax.data import tokenizer
from cloc_jax.data import transforms

HERE = pathlib.Path(__file__).parent


def memory_mb() -> float:
  """Of this process and its children; pages that several share count once."""
  pids = ['self'] + [pid for file in pathlib.Path('/proc/self/task').glob('*/children')
                     for pid in file.read_text().split()]
  lines = (line for pid in pids for line in pathlib.Path(f'/proc/{pid}/smaps_rollup').read_text().splitlines())
  return sum(int(line.split()[1]) for line in lines if line.startswith('Pss:')) / 1024


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  result_page.add_photos(parser)
  parser.add_argument('--minutes', type=float, default=120)
  parser.add_argument('--batches', type=int, default=300, help='a turn')
  parser.add_argument('--workers', type=int, default=1)
  args = parser.parse_args()
  jpegs = data_pipeline.photos(args.photos)
  turns = list(itertools.product(transforms.DECODE_MODES, (0, args.workers)))
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'set'
    records = list(data_pipeline.examples(jpegs, 2000))
    schema.write_dataset(path, meta=schema.DatasetMeta(name='photos'), splits={'train': records})
    tokens = tokenizer.train((c for r in records for c in r.captions), vocab_size=1024)
    del records
    found, began, images = [], time.monotonic(), 0
    for turn in itertools.count():
      mode, workers = turns[turn % len(turns)]
      batches = iter(pipeline.train_dataset(
          path, tokenizer=tokens, batch_size=data_pipeline.BATCH, image_size=data_pipeline.SIDE, decode=mode, flip=True,
          crop=transforms.Crop(scale=(0.5, 1.0)), num_workers=workers, seed=turn))
      for _ in range(args.batches):
        images += len(next(batches)['batch'].image)
      memory = memory_mb()
      if workers:
        batches.close()
      found.append({'minutes': (time.monotonic() - began) / 60, 'images': images, 'decode': mode, 'workers': workers,
                    'mb': memory})
      print(json.dumps(found[-1]), flush=True)
      (HERE / 'data_memory.json').write_text(json.dumps(found, indent=1) + '\n')
      result_page.write_table(HERE / 'data_memory.md', table(found, args))
      if found[-1]['minutes'] >= args.minutes:
        return 0


def table(found, args) -> str:
  rows = ['| | turns | MB, first quarter | second | third | last | highest |', '| --- | --- | --- | --- | --- | --- | --- |']
  for mode, workers in dict.fromkeys((f['decode'], f['workers']) for f in found):
    mb = [f['mb'] for f in found if (f['decode'], f['workers']) == (mode, workers)]
    quarters = [f'{np.median(part):,.0f}' if len(part) else '' for part in np.array_split(mb, 4)]
    rows.append(f'| {mode}, {workers or "no"} workers | {len(mb)} | {" | ".join(quarters)} | {max(mb):,.0f} |')
  return '\n'.join([
      f'{found[-1]["minutes"]:,.0f} minutes, {found[-1]["images"]:,} images, {args.batches} batches of '
      f'{data_pipeline.BATCH} a turn; medians over the quarters of the time. Made by `python docs/results/data_memory.py`.',
      '', *rows])


if __name__ == '__main__':
  sys.exit(main())
