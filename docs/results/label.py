"""Makes label.md: what the labelling engine costs beside its models, and its memory over a run ten times longer.

  python docs/results/label.py [--photos shared/coco_mini/val2017] [--images 384] [--rounds 3] [--large 6]

Three parts: the engine alone (scripted stages that take no time), in this process and on Ray, short and ten times
longer; all stages for real with tiny models (LLaVA of width 32, NLTK, OWLv2 of width 64 at 448 px); and with --large N
the detector at its real size, L/14 with random weights, on N photos: what is ours against its time. Photos are repeated
under new names until there are enough. Every run is a process of its own, whose peak memory is that of its whole tree
(the driver alone beside it). Wall times want a quiet machine: without --large about four minutes on two cores.
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
  """One run, in this process; prints its figures as JSON. cpu: seconds of all threads of it; without Ray's workers."""
  from cloc_jax.label import engine, report
  job = engine.Job(inputs=(settings['input'],), out=settings['out'], shard_size=settings['shard_size'],
                   chunk=settings['chunk'], **settings['stages'])
  began, cpu = time.perf_counter(), time.process_time()
  engine.run(job, runner=settings['runner'], ray_options=settings['ray'] if settings['runner'] == 'ray' else None)
  wall, cpu = time.perf_counter() - began, time.process_time() - cpu
  found = report.load(settings['out']).summary
  print(json.dumps({'wall': wall, 'cpu': cpu, 'images': found.counts['written'], 'seconds': dict(found.seconds),
                    'models': dict(found.models)}))


def measure(settings):
  """A run in a child process: its figures, and the peak memory (MiB, proportional set size) of driver and tree."""
  shutil.rmtree(settings['out'], ignore_errors=True)
  command = [sys.executable, os.path.abspath(__file__), '--run', json.dumps(settings)]
  child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
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


def middle(rounds, value):
  return statistics.median(map(value, rounds))


def ours(run):
  """Seconds outside captioner and detector; the phrases are ours."""
  return sum(run['seconds'].values()) - run['models'].get('caption', 0) - run['models'].get('detect', 0)


def engine_table(found):
  """The engine alone, as Markdown."""
  lines = ['| scripted stages | images/s | CPU, ms an image | driver, MiB | all processes, MiB |',
           '| --- |' + ' ---: |' * 4]
  for name, rounds in found.items():
    cpu = f'{middle(rounds, lambda r: 1000 * r["cpu"] / r["images"]):.1f}' if 'in one process' in name else '–'
    lines.append(f'| {name} | {middle(rounds, lambda r: r["images"] / r["wall"]):.1f} | {cpu} | '
                 f'{middle(rounds, lambda r: r["peak"]["driver"]):.0f} | '
                 f'{middle(rounds, lambda r: r["peak"]["tree"]):.0f} |')
  return '\n'.join(lines)


def steady(short, long):
  """(images a second without what a run costs once, that in seconds): from a short and a long run."""
  (wall, images), (longer, more) = ((middle(r, lambda x: x['wall']), r[0]['images']) for r in (short, long))
  rate = (more - images) / max(longer - wall, 1e-9)
  return rate, wall - images / rate


def stage_table(scripted, tiny):
  """Each stage alone: of the engine with scripted models, and with tiny ones."""
  lines = ['| stage | scripted, ms an image | images/s alone | tiny models, ms an image | of it in the model |',
           '| --- |' + ' ---: |' * 4]
  each = lambda rounds, part, stage: middle(rounds, lambda r: 1000 * r[part].get(stage, 0) / r['images'])
  for stage in STAGES:
    spent = each(scripted, 'seconds', stage)
    lines.append(f'| {stage} | {spent:.2f} | {1000 / spent if spent else 0:,.0f} | '
                 f'{each(tiny, "seconds", stage):.2f} | {each(tiny, "models", stage):.2f} |')
  whole = lambda rounds: middle(rounds, lambda r: 1000 * sum(r['seconds'].values()) / r['images'])
  lines.append(f'| all, one after another | {whole(scripted):.2f} | {1000 / whole(scripted):,.0f} | '
               f'{whole(tiny):.2f} | {middle(tiny, lambda r: 1000 * sum(r["models"].values()) / r["images"]):.2f} |')
  return '\n'.join(lines)


def measure_large(args, photos, folder):
  """Seconds an image of OWLv2 L/14: of the model alone, of all that `detect` does, and of resizing on one thread."""
  import detector
  from cloc_jax.label import detectors
  folder.mkdir()
  detector.checkpoint(folder, detector.LARGE)
  model = detectors.make(f'owlv2:{folder}', image_size=448, threads=2, batch_size=min(args.large, 2))
  images = detector.pictures(photos, args.large)
  queries = [['a red dog', 'a tree', 'two windows', 'a cup'] * 3 for _ in images]
  queries = [[f'{text} {i}' for i, text in enumerate(own)] for own in queries]
  detector.set_threshold(model, images[:1], queries[:1], boxes=12)  # also warms it
  found = detector.one_case(model, images, queries)
  return {'model': 1 / found['model alone, images/s'], 'detect': 1 / found['images/s'],
          'resize': found['resizing, µs an image a thread'] / 1e6}


def large_text(large, scripted, tiny):
  cpu = middle(scripted, lambda r: r['cpu'] / r['images'])
  phrases = middle(tiny, lambda r: r['seconds']['phrases'] / r['images'])
  spent = cpu + phrases + large['resize']
  return (f'OWLv2 L/14 at 448 px on this CPU, random weights, 12 queries: {1000 * large["model"]:,.0f} ms an image in '
          f'the model, {1000 * large["detect"]:,.0f} ms in all of `detect`. Ours (reading, checking, decoding for each '
          f'stage, writing: {1000 * cpu:.1f} ms of CPU; phrases: {1000 * phrases:.1f} ms; resizing to 448 px: '
          f'{1000 * large["resize"]:.1f} ms) is {1000 * spent:.1f} ms of one core: '
          f'{100 * spent / large["model"]:.2f} % of it. `label_cost.py --cpu-ms` asks for those milliseconds.')


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  result_page.add_photos(parser)
  parser.add_argument('--images', type=int, default=384)
  parser.add_argument('--model-images', type=int, default=48, help='for the tiny models')
  parser.add_argument('--shard-size', type=int, default=32)
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--times', type=int, default=10, help='how much longer the long runs are; they run once')
  parser.add_argument('--cpus', type=int, default=os.cpu_count())
  parser.add_argument('--large', type=int, default=0, metavar='N', help='photos for OWLv2 L/14, about 10 s each')
  parser.add_argument('--out', default=str(HERE / 'label.json'))
  parser.add_argument('--run', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.run:
    run_here(json.loads(args.run))
    return
  scripted = {stage: {'spec': SCRIPTED + stage.capitalize()} for stage in ('captioner', 'phrases', 'detector')}
  with tempfile.TemporaryDirectory() as scratch:
    scratch = pathlib.Path(scratch)
    photos = {'short': make_photos(scratch / 'short', args.photos, args.images),
              'long': make_photos(scratch / 'long', args.photos, args.times * args.images),
              'few': make_photos(scratch / 'few', args.photos, args.model_images)}
    tiny = tiny_stages(scratch)

    def go(name, length, runner, stages):
      found = measure(dict(input=str(photos[length]), out=str(scratch / 'out'), shard_size=args.shard_size, chunk=32,
                           runner=runner, stages=stages, ray=dict(num_cpus=args.cpus, object_store_bytes=512 * 2**20)))
      print(f'{name}: {found["wall"]:.1f} s', file=sys.stderr)
      return found
    names = {('short', 'local'): f'in one process, {args.images:,} images',
             ('short', 'ray'): f'on Ray, {args.images:,} images',
             ('long', 'local'): f'in one process, {args.times * args.images:,} images',
             ('long', 'ray'): f'on Ray, {args.times * args.images:,} images'}
    alone = {name: [] for name in names.values()}
    models = []
    for number in range(args.rounds):
      for (length, runner), name in names.items():
        if length == 'short' or not number:
          alone[name].append(go(name, length, runner, scripted))
      models.append(go('tiny models', 'few', 'local', tiny))
    large = measure_large(args, args.photos, scratch / 'large') if args.large else None
  import ray
  about = {'machine': f'{args.cpus} CPUs, {platform.machine()}', 'python': platform.python_version(),
           'ray': ray.__version__, 'shard_size': args.shard_size, 'rounds': args.rounds,
           'model_images': args.model_images}
  pathlib.Path(args.out).write_text(json.dumps({'about': about, 'scripted': alone, 'tiny': models, 'large': large},
                                               indent=1) + '\n')
  first = alone[names['short', 'local']]
  share = middle(models, lambda r: 100 * ours(r) / sum(r['seconds'].values()))
  parts = [f'{about["machine"]}, Python {about["python"]}, Ray {about["ray"]}; shards of {args.shard_size}; medians of '
           f'{args.rounds} rounds, long runs once; {"photos" if args.photos else "images of noise"}. Made by '
           '`python docs/results/label.py`.', engine_table(alone),
           'From the difference of long and short runs: ' + '; '.join(
               '{} {:.0f} images/s after {:.0f} s at the start'.format(word, *steady(*(
                   alone[names[length, runner]] for length in ('short', 'long'))))
               for runner, word in (('local', 'in one process'), ('ray', 'on Ray'))) + '.', stage_table(first, models),
           f'With tiny models on {args.model_images} photos {share:.1f} % of the time is outside captioner and '
           'detector (their loading is in it). Where pixels are made ahead on threads, a stage counts what it waits for them.']
  if large:
    parts.append(large_text(large, first, models))
  body = '\n\n'.join(parts)
  print(body)
  result_page.write_table(pathlib.Path(args.out).with_suffix('.md'), body)


def tiny_stages(scratch):
  """Settings of the stages with models of random weights: those of the tests, and OWLv2 of width 64 at 448 px."""
  import detector
  sys.path.insert(0, os.fspath(HERE.parents[1] / 'tests'))
  import tiny_models
  (scratch / 'owl').mkdir()
  detector.checkpoint(scratch / 'owl', detector.TINY)
  return {'captioner': {'spec': f'hf:{tiny_models.llava(scratch / "llava")}', 'max_new_tokens': 24},
          'phrases': {'spec': 'nltk'}, 'detector': {'spec': f'owlv2:{scratch / "owl"}', 'image_size': 448}}


if __name__ == '__main__':
  main()
