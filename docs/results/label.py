"""Makes label.md: what the labelling engine costs beside its models, and its memory over a long run.

  python docs/results/label.py [--photos shared/coco_mini/val2017] [--images 2048] [--rounds 3]
    [--captioner SPEC --detector SPEC --phrases SPEC --model-seconds 0.0]

Without specs the stages are scripted and take --model-seconds an image, so that what is measured is the engine. Photos
are repeated under new names until there are enough. Every run is a process of its own, whose peak memory is that of its
whole tree (the driver alone beside it). Wall times want a quiet machine.
"""
import argparse
import json
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np
from PIL import Image
import result_page

HERE = pathlib.Path(__file__).parent
SCRIPTED = 'python:cloc_jax.label.scripted:'
STAGES = ('read', 'decode', 'caption', 'phrases', 'detect', 'write')


def make_photos(folder, source, count):
  """`count` image files, linked to those of `source`; smooth noise where there is none."""
  folder.mkdir()
  found = sorted(pathlib.Path(source).glob('*.jpg')) if source else []
  if not found:
    rng = np.random.default_rng(0)
    for i in range(16):
      path = folder.parent / f'noise{i}.jpg'
      noise = Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8)).resize((640, 480), Image.Resampling.BICUBIC)
      noise.save(path, quality=90)
      found.append(path)
  for i in range(count):
    (folder / f'{i:07}.jpg').symlink_to(found[i % len(found)].absolute())
  return folder


def run_here(settings):
  """One run, in this process; prints its figures as JSON."""
  from cloc_jax.label import engine, report
  job = engine.Job(inputs=(settings['input'],), out=settings['out'], shard_size=settings['shard_size'],
                   **settings['stages'])
  began = time.perf_counter()
  engine.run(job, runner=settings['runner'], pools=settings['pools'],
             ray_options=settings['ray'] if settings['runner'] == 'ray' else None)
  wall = time.perf_counter() - began
  found = report.load(settings['out']).summary
  print(json.dumps({'wall': wall, 'images': found.counts['written'], 'seconds': dict(found.seconds),
                    'models': dict(found.models)}))


def measure(settings):
  """A run in a child process: its figures, and the peak memory (MiB, proportional set size) of driver and tree."""
  shutil.rmtree(settings['out'], ignore_errors=True)
  child = subprocess.Popen([sys.executable, __file__, '--run', json.dumps(settings)], stdout=subprocess.PIPE, text=True)
  peak = {'driver': 0.0, 'tree': 0.0}

  def watch():
    while child.poll() is None:
      sizes = {pid: size for pid in tree(child.pid) if (size := memory(pid))}
      peak['driver'] = max(peak['driver'], sizes.get(child.pid, 0))
      peak['tree'] = max(peak['tree'], sum(sizes.values()))
      time.sleep(0.5)
  watcher = threading.Thread(target=watch)
  watcher.start()
  said, _ = child.communicate()
  watcher.join()
  if child.returncode:
    raise RuntimeError(f'the run ended with {child.returncode}')
  return json.loads(said.splitlines()[-1]) | {'peak': peak}


def tree(root):
  """A process and all below it."""
  parents = {}
  for folder in pathlib.Path('/proc').iterdir():
    if folder.name.isdigit():
      try:
        parents[int(folder.name)] = int((folder / 'stat').read_text().rpartition(')')[2].split()[1])
      except OSError:
        pass
  found = {root}
  while more := {pid for pid, parent in parents.items() if parent in found} - found:
    found |= more
  return found


def memory(pid):
  """MiB of a process; pages that are shared count for each of their users in part."""
  try:
    lines = pathlib.Path(f'/proc/{pid}/smaps_rollup').read_text().splitlines()
  except OSError:
    return 0.0
  return next((int(line.split()[1]) / 1024 for line in lines if line.startswith('Pss:')), 0.0)


def table(found, cases):
  """The runs as Markdown."""
  lines = ['| run | images/s | ' + ' | '.join(f'{stage}, ms' for stage in STAGES)
           + ' | outside models | driver, MiB | all, MiB |',
           '| --- |' + ' ---: |' * (len(STAGES) + 4)]
  for name in cases:
    rounds = found[name]
    middle = lambda value: statistics.median(map(value, rounds))
    spent = [middle(lambda r, s=stage: 1000 * r['seconds'].get(s, 0) / r['images']) for stage in STAGES]
    ours = middle(lambda r: 1 - sum(r['models'].values()) / sum(r['seconds'].values()))
    lines.append(f'| {name} | {middle(lambda r: r["images"] / r["wall"]):.1f} | '
                 + ' | '.join(f'{ms:.2f}' for ms in spent) + f' | {100 * ours:.1f} % | '
                 f'{middle(lambda r: r["peak"]["driver"]):.0f} | {middle(lambda r: r["peak"]["tree"]):.0f} |')
  return '\n'.join(lines)


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--photos')
  parser.add_argument('--images', type=int, default=2048)
  parser.add_argument('--shard-size', type=int, default=64)
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--times', type=int, default=10, help='how much longer the long runs are')
  parser.add_argument('--cpus', type=int, default=os.cpu_count())
  parser.add_argument('--model-seconds', type=float, default=0.0)
  for stage in ('captioner', 'phrases', 'detector'):
    parser.add_argument(f'--{stage}', default=SCRIPTED + stage.capitalize())
  parser.add_argument('--out', default=str(HERE / 'label.json'))
  parser.add_argument('--run', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.run:
    run_here(json.loads(args.run))
    return
  stages = {}
  for stage in ('captioner', 'phrases', 'detector'):
    stages[stage] = {'spec': getattr(args, stage)}
    if stage != 'phrases' and stages[stage]['spec'].startswith(SCRIPTED):
      stages[stage]['seconds'] = args.model_seconds
  with tempfile.TemporaryDirectory() as scratch:
    scratch = pathlib.Path(scratch)
    photos = {'short': make_photos(scratch / 'short', args.photos, args.images),
              'long': make_photos(scratch / 'long', args.photos, args.times * args.images)}
    cases = {f'{runner}, {args.images * (args.times if length == "long" else 1):,} images': (runner, length)
             for length in ('short', 'long') for runner in ('local', 'ray')}
    found = {name: [] for name in cases}
    for number in range(args.rounds):
      for name, (runner, length) in cases.items():
        found[name].append(measure(dict(
            input=str(photos[length]), out=str(scratch / 'out'), shard_size=args.shard_size, runner=runner,
            stages=stages, pools={}, ray=dict(num_cpus=args.cpus, object_store_bytes=512 * 2**20))))
        print(f'round {number + 1}: {name}: {found[name][-1]["wall"]:.1f} s', file=sys.stderr)
  import ray
  about = {'machine': f'{args.cpus} CPUs, {platform.machine()}', 'python': platform.python_version(),
           'ray': ray.__version__, 'images': args.images, 'shard_size': args.shard_size, 'rounds': args.rounds, 'stages': stages}
  pathlib.Path(args.out).write_text(json.dumps({'about': about, 'runs': found}, indent=1) + '\n')
  body = table(found, cases)
  print(body)
  result_page.write_table(pathlib.Path(args.out).with_suffix('.md'), (
      f'{about["machine"]}, Python {about["python"]}, Ray {about["ray"]}; shards of {args.shard_size}; medians of '
      f'{args.rounds} rounds. Stages: {", ".join(s["spec"] for s in stages.values())}, {args.model_seconds} s an image '
      f'in each scripted model. Milliseconds are of all workers together, an image; where pixels are made ahead on '
      f'threads, the stage counts what it waits for them.\n\n{body}'))


if __name__ == '__main__':
  main()
