"""Makes data_memory.md: the memory of a process that makes batches for hours.

  nice python docs/results/data_memory.py [--minutes 120] [--turns] [--photos shared/coco_mini/val2017]

Records and batches are those of data_pipeline.py, mirrored and cropped. Two iterators, one that decodes exactly and one
that decodes fast, live as long as the process does, and give batches in turns. With --turns every iterator is closed
after some batches and another begun, with and without worker processes, as trainers do at restarts and evaluations.
Memory is that of the process and its workers (proportional set size). Time is processor time, so that a run may be
halted in between; what was read so far is written each minute, so that it may be stopped. Linux.
"""
import argparse
import itertools
import json
import pathlib
import sys
import tempfile

import data_pipeline
import numpy as np
import result_page

from cloc_jax.data import pipeline
from cloc_jax.data import schema
from cloc_jax.data import tokenizer
from cloc_jax.data import transforms

HERE = pathlib.Path(__file__).parent
QUARTERS = '| MB, first quarter | second | third | last | highest |'


def memory_mb() -> float:
  """Of this process and its children; pages that several share count once."""
  pids = ['self'] + [pid for file in pathlib.Path('/proc/self/task').glob('*/children')
                     for pid in file.read_text().split()]
  lines = (line for pid in pids for line in pathlib.Path(f'/proc/{pid}/smaps_rollup').read_text().splitlines())
  return sum(int(line.split()[1]) for line in lines if line.startswith('Pss:')) / 1024


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  result_page.add_photos(parser)
  parser.add_argument('--minutes', type=float, default=120, help='of processor time')
  parser.add_argument('--records', type=int, default=20_000)
  parser.add_argument('--turns', action='store_true', help='end each iterator after some batches')
  parser.add_argument('--batches', type=int, default=300, help='a turn')
  parser.add_argument('--workers', type=int, default=1, help='of every other turn')
  args = parser.parse_args()
  out = HERE / 'data_memory.json'
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'set'
    captions = []

    def records():
      for record in data_pipeline.examples(data_pipeline.photos(args.photos), args.records):
        captions.extend(record.captions if len(captions) < 5000 else ())
        yield record
    schema.write_dataset(path, meta=schema.DatasetMeta(name='photos'), splits={'train': records()})
    tokens = tokenizer.train(captions, vocab_size=1024)
    began, images = data_pipeline.processor_seconds(), 0
    part = 'turns' if args.turns else 'one'
    results = json.loads(out.read_text()) if out.exists() else {}
    results[part] = {'records': args.records, 'found': []}
    for found in (turns if args.turns else one)(path, tokens, args):
      images += found.pop('images')
      minutes = (data_pipeline.processor_seconds() - began) / 60
      results[part]['found'].append({'minutes': minutes, 'images': images, **found})
      print(json.dumps(results[part]['found'][-1]), flush=True)
      result_page.keep(out, results)
      result_page.write_table(HERE / 'data_memory.md', table(results))
      if minutes >= args.minutes:
        return 0


def batches_of(path, tokens, mode, **options):
  return iter(pipeline.train_dataset(
      path, tokenizer=tokens, batch_size=data_pipeline.BATCH, image_size=data_pipeline.SIDE, decode=mode, flip=True,
      crop=transforms.Crop(scale=(0.5, 1.0)), **options))


def one(path, tokens, args):
  """Endless: readings of two iterators that live on, about each minute of processor time."""
  iterators = [batches_of(path, tokens, mode) for mode in transforms.DECODE_MODES]
  while True:
    began, images = data_pipeline.processor_seconds(), 0
    while data_pipeline.processor_seconds() - began < 60:
      for batches in iterators:
        images += len(next(batches)['batch'].image)
    yield {'images': images, 'mb': memory_mb()}


def turns(path, tokens, args):
  """Endless: a reading at the end of each turn."""
  for turn, (mode, workers) in enumerate(itertools.cycle(itertools.product(transforms.DECODE_MODES, (0, args.workers)))):
    batches = batches_of(path, tokens, mode, num_workers=workers, seed=turn)
    images = sum(len(next(batches)['batch'].image) for _ in range(args.batches))
    memory = memory_mb()
    if workers:
      batches.close()
    yield {'images': images, 'mb': memory, 'decode': mode, 'workers': workers}


def table(results) -> str:
  lines = []
  for part, said in (('one', 'two iterators that live on'), ('turns', 'iterators that end and begin')):
    if part not in results:
      continue
    found = results[part]['found']
    cases = {}
    for f in found:
      name = 'exact and fast in turns' if part == 'one' else f'{f["decode"]}, {f["workers"] or "no"} workers'
      cases.setdefault(name, []).append(f['mb'])
    clock = results[part].get('time', 'processor time')
    lines += [f'{said.capitalize()}: {found[-1]["minutes"]:,.0f} minutes of {clock}, '
              f'{found[-1]["images"]:,} images of '
              f'{results[part]["records"]:,} records; medians over the quarters of the readings. Made by `python '
              f'docs/results/data_memory.py{" --turns" if part == "turns" else ""}`.', '',
              f'| | readings {QUARTERS}', '| --- | --- | --- | --- | --- | --- | --- |']
    for name, mb in cases.items():
      quarters = [f'{np.median(quarter):,.1f}' if len(quarter) else '' for quarter in np.array_split(mb, 4)]
      lines.append(f'| {name} | {len(mb)} | {" | ".join(quarters)} | {max(mb):,.1f} |')
    lines.append('')
  return '\n'.join(lines[:-1])


if __name__ == '__main__':
  sys.exit(main())
