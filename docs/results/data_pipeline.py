"""Makes data_pipeline.md: what an image costs on its way from disk to a batch, and what of it is decoding.

  python docs/results/data_pipeline.py [--photos shared/coco_mini/val2017] [--rounds 3]

Photos are brought to 500 pixels on the long side (JPEG, quality 90), or taken as they are, and stored with boxes,
captions and phrases, most of which occur once, so that the tokenizer's cache does not flatter. Costs are processor time,
not wall time: the machine may be shared. A bare loop is OpenCV's functions on images in memory, and nothing of this
project; so the files of records are in memory too, in the system's cache, when a measurement begins. Garbage is collected
as the commands of `cloc` have it. The first table is of one thread, whose batches take turns with batches of the bare loop; the second is of the
pipeline as it is used, with Grain's thread or worker processes (of the process and its workers), against the bare loop
before and after. Medians, and ratios within a round. Linux.
"""
import argparse
import gc
import io
import itertools
import json
import os
import pathlib
import platform
import statistics
import sys
import tempfile
import time

import cv2
import grain
import numpy as np
import PIL.Image
import result_page

from cloc_jax import cli
from cloc_jax import geometry as geometry_lib
from cloc_jax.data import pipeline, schema, sources, tokenizer, transforms

HERE = pathlib.Path(__file__).parent
SIDE, LONG_SIDE, BATCH = 224, 500, 64
WORDS = ('a the on of with small large red green old dog cat table chair street person bus near behind under holding '
         'standing sitting wooden bright two three window tree car boat plate').split()


def photos(folder, *, as_they_are=False) -> list[bytes]:
  """JPEGs of 500 pixels on the long side, or the files; smooth noise where there is no folder."""
  if as_they_are and folder:
    return [path.read_bytes() for path in sorted(pathlib.Path(folder).glob('*.jpg'))]
  images = []
  for path in sorted(pathlib.Path(folder).glob('*.jpg')) if folder else ():
    image = PIL.Image.open(path).convert('RGB')
    image.thumbnail((LONG_SIDE, LONG_SIDE))
    if max(image.size) == LONG_SIDE:
      images.append(image)
  rng = np.random.default_rng(0)
  while len(images) < 40:
    noise = rng.integers(0, 256, (48, 64, 3), np.uint8)
    images.append(PIL.Image.fromarray(noise).resize((LONG_SIDE, 375), PIL.Image.BICUBIC))
  out = []
  for image in images:
    data = io.BytesIO()
    image.save(data, 'JPEG', quality=90)
    out.append(data.getvalue())
  return out


def examples(jpegs, count):
  """`count` records: 5 captions of 11 words, and 1 to 14 regions whose phrases are a class name or 3 words."""
  rng = np.random.default_rng(0)
  say = lambda n: ' '.join(rng.choice(WORDS, n))
  for i in range(count):
    data = jpegs[i % len(jpegs)]
    width, height = PIL.Image.open(io.BytesIO(data)).size
    corners = np.sort(rng.random((rng.integers(1, 15), 2, 2)), 1).reshape(-1, 4).astype(np.float32)
    regions = tuple(schema.Region(box=tuple(map(float, box)), caption=say(1 if rng.random() < 0.5 else 3))
                    for box in corners)
    yield schema.Example(image=data, image_id=str(i), height=height, width=width,
                         captions=tuple(say(11) for _ in range(5)), regions=regions)


# --- Costs


def processor_seconds() -> float:
  """Of this process and its living children."""
  total = sum(os.times()[:2])
  for children in pathlib.Path('/proc/self/task').glob('*/children'):
    try:
      pids = children.read_text().split()
    except FileNotFoundError:  # a thread that has ended since
      continue
    for pid in pids:
      fields = pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
      total += (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')
  return total


def cost(run, count) -> float:
  """Microseconds of processor time an image."""
  began = processor_seconds()
  run()
  return (processor_seconds() - began) / count * 1e6


def pillow(data):
  image = PIL.Image.open(io.BytesIO(data)).convert('RGB')
  made = geometry_lib.resize_with_pad(height=image.height, width=image.width, canvas=SIDE)
  return np.asarray(image.resize((made.resized_width, made.resized_height), PIL.Image.BILINEAR))


def opencv_linear(data):
  image = cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
  made = geometry_lib.resize_with_pad(height=image.shape[0], width=image.shape[1], canvas=SIDE)
  return cv2.resize(image, (made.resized_width, made.resized_height), interpolation=cv2.INTER_LINEAR)


def opencv_exact(data):
  image = cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
  return on_canvas(image, cv2.INTER_AREA)


def opencv_reduced(data):
  """At half of its size at most: photos of 640 pixels or fewer are brought to 224."""
  image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_REDUCED_COLOR_2)
  return on_canvas(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), cv2.INTER_LINEAR)


def on_canvas(image, interpolation):
  made = geometry_lib.resize_with_pad(height=image.shape[0], width=image.shape[1], canvas=SIDE)
  canvas = np.full((SIDE, SIDE, 3), 127, np.uint8)
  canvas[made.top:made.top + made.resized_height, made.left:made.left + made.resized_width] = cv2.resize(
      image, (made.resized_width, made.resized_height), interpolation=interpolation)
  return canvas


def ours(mode):
  def decode(data):
    opened = transforms.open_image(data, where='', mode=mode)
    return opened.on_canvas(geometry_lib.resize_with_pad(height=opened.height, width=opened.width, canvas=SIDE))
  return decode


BARE = {'Pillow, bilinear': pillow, 'OpenCV, whole, linear': opencv_linear, 'exact: OpenCV, whole, area': opencv_exact,
        'fast: OpenCV, reduced, linear': opencv_reduced, "this project's decoding alone, exact": ours('exact'),
        "this project's decoding alone, fast": ours('fast')}
BARE_OF = {'exact': 'exact: OpenCV, whole, area', 'fast': 'fast: OpenCV, reduced, linear'}


def read_all(path) -> None:
  """So that all files are in the system's cache."""
  for file in pathlib.Path(path).iterdir():
    with open(file, 'rb') as stream:
      while stream.read(1 << 24):
        pass


def paired(path, tokens, jpegs, *, mode, batches) -> dict[str, float]:
  """Microseconds an image, of one thread: medians over batches of the bare loop and of the pipeline in turns."""
  read_all(path)
  made = iter(pipeline.train_dataset(path, split='train', tokenizer=tokens, batch_size=BATCH, image_size=SIDE,
                                     decode=mode, prefetch=0))
  few = list(itertools.islice(itertools.cycle(jpegs), BATCH))
  next(made)
  found = []
  for _ in range(batches):
    times = [time.thread_time()]
    for run in (lambda: [BARE[BARE_OF[mode]](data) for data in few], lambda: next(made)):
      run()
      times.append(time.thread_time())
    found.append(np.diff(times) / BATCH * 1e6)
  bare, ours_ = np.array(found).T
  return {'bare': float(np.median(bare)), 'pipeline': float(np.median(ours_)), 'over': float(np.median(ours_ / bare) - 1),
          'more': float(np.median(ours_ - bare)), 'quietest bare': float(bare.min()),
          'quietest pipeline': float(ours_.min())}


def pipeline_cost(path, tokens, *, mode, workers, count) -> float:
  """Of `count` images through train_dataset, after some batches to start up."""
  read_all(path)
  data = pipeline.train_dataset(path, split='train', tokenizer=tokens, batch_size=BATCH, image_size=SIDE, decode=mode,
                                num_workers=workers)
  batches = iter(data)
  for _ in range(2 + 4 * workers):  # workers have started, and buffers are full
    next(batches)

  def run():
    for _ in range(count // BATCH):
      next(batches)  # and let go, as a trainer does: fresh memory for each would cost more than all but decoding
  found = cost(run, count // BATCH * BATCH)
  if workers:
    batches.close()
  time.sleep(1)  # what still fills a buffer is not to be counted with the next case
  return found


def read_options_cost(path) -> dict[str, float]:
  """Of handing one small element on, without any decoding, by Grain's ReadOptions (threads, buffer)."""
  source = sources.RecordSource(path, split='train')
  found = {}
  for threads, buffer in ((0, 0), (1, 2), (2, 4), (16, 500)):
    data = grain.MapDataset.range(20_000).map(lambda i: i + len(source)).to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffer))
    found[f'{threads} threads, buffer {buffer}'] = cost(lambda: sum(1 for _ in data), 20_000)
  return found


def quality(jpegs) -> dict[str, float]:
  """PSNR of the fast canvas against the exact one, dB."""
  found = []
  for data in jpegs:
    exact, fast = (ours(mode)(data).astype(np.float64) for mode in ('exact', 'fast'))
    found.append(10 * np.log10(255**2 / max(np.mean((exact - fast)**2), 1e-9)))
  return {'mean': float(np.mean(found)), 'median': float(np.median(found)), 'min': min(found), 'images': len(found)}


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  result_page.add_photos(parser)
  parser.add_argument('--records', type=int, default=20_000, help="Grain's shuffle is slower below this")
  parser.add_argument('--batches', type=int, default=40, help='in turns, a round')
  parser.add_argument('--images', type=int, default=3200, help='of each case of the second table, a round')
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--workers', type=int, nargs='+', default=[0, 2])
  args = parser.parse_args()
  gc.set_threshold(*cli.GC_THRESHOLD)
  jpegs = photos(args.photos)
  with tempfile.TemporaryDirectory() as folder:
    path, whole = pathlib.Path(folder) / 'set', pathlib.Path(folder) / 'as_they_are'
    sets = {f'{LONG_SIDE} pixels': (path, jpegs, args.records)}
    if args.photos:
      sets['as they are'] = (whole, photos(args.photos, as_they_are=True), args.records // 4)
    captions = []
    for out, files, count in sets.values():
      def kept(records):
        for record in records:
          captions.extend(record.captions if len(captions) < 5000 else ())
          yield record
      schema.write_dataset(out, meta=schema.DatasetMeta(name='photos'), splits={'train': kept(examples(files, count))})
    tokens = tokenizer.train(captions, vocab_size=1024)
    turns = []
    for _ in range(args.rounds):
      turns.append({f'{name}, {mode}': paired(out, tokens, files, mode=mode, batches=args.batches)
                    for name, (out, files, _) in sets.items() for mode in transforms.DECODE_MODES})
      print(json.dumps(turns[-1]), flush=True)
    rounds = [one_round(path, tokens, jpegs, args) for _ in range(args.rounds)]
    results = {'machine': platform.machine(), 'opencv': cv2.__version__, 'grain': grain.__version__,
               'photos': bool(args.photos), 'bytes_an_image': float(np.mean([len(j) for j in jpegs])),
               'psnr': quality(jpegs), 'read_options_us': read_options_cost(path), 'turns': turns,
               'rounds': rounds}
  (HERE / 'data_pipeline.json').write_text(json.dumps(results, indent=1) + '\n')
  result_page.write_table(HERE / 'data_pipeline.md', table(results))


def one_round(path, tokens, jpegs, args):
  found = {}
  few = jpegs * (300 // len(jpegs) + 1)
  for name, decode in BARE.items():
    found[name] = cost(lambda: [decode(data) for data in few], len(few))
    print(f'{name}: {found[name]:.0f} µs', flush=True)
  for mode, workers in itertools.product(transforms.DECODE_MODES, args.workers):
    name = f'pipeline, {mode}, {workers or "no"} workers'
    before = cost(lambda: [BARE[BARE_OF[mode]](data) for data in few], len(few))
    found[name] = pipeline_cost(path, tokens, mode=mode, workers=workers, count=args.images)
    after = cost(lambda: [BARE[BARE_OF[mode]](data) for data in few], len(few))
    found[f'{name}: over the bare loop'] = found[name] / ((before + after) / 2) - 1
    print(f'{name}: {found[name]:.0f} µs, {100 * found[f"{name}: over the bare loop"]:.0f} % over', flush=True)
  return found


def table(results) -> str:
  median = lambda name: statistics.median(r[name] for r in results['rounds'])
  exact = BARE_OF['exact']
  rows = ['| | images/s a core | µs an image | against the exact bare loop | over its own bare loop |',
          '| --- | --- | --- | --- | --- |']
  for name in results['rounds'][0]:
    if name.endswith('bare loop'):
      continue
    ratio = statistics.median(r[exact] / r[name] for r in results['rounds'])
    over = f'{name}: over the bare loop'
    over = f'{100 * median(over):+.0f} %' if over in results['rounds'][0] else ''
    rows.append(f'| {name} | {1e6 / median(name):,.0f} | {median(name):,.0f} | {ratio:.2f}× | {over} |')
  in_turns = ['| one thread, in turns | bare: µs an image | pipeline: µs | images/s a core | more: µs | over the bare loop |',
              '| --- | --- | --- | --- | --- | --- |']
  for name in results['turns'][0]:
    mid = {key: statistics.median(turn[name][key] for turn in results['turns']) for key in results['turns'][0][name]}
    in_turns.append(f'| {name} | {mid["bare"]:,.0f} | {mid["pipeline"]:,.0f} | {1e6 / mid["pipeline"]:,.0f} | '
                    f'{mid["more"]:,.0f} | {100 * mid["over"]:+.0f} % |')
  psnr = results['psnr']
  kind = 'photos' if results['photos'] else 'generated images'
  options = ', '.join(f'{name}: {value:.0f}' for name, value in results['read_options_us'].items())
  return '\n'.join([
      f'JPEG {kind} of 500 pixels on the long side ({results["bytes_an_image"] / 1000:.0f} kB) → {SIDE}, batches of '
      f'{BATCH}; medians of {len(results["rounds"])} rounds; OpenCV {results["opencv"]}, Grain {results["grain"]}, '
      f'{results["machine"]}. Made by `python docs/results/data_pipeline.py`.', '', *in_turns, '', *rows, '',
      f'The fast canvas against the exact one: PSNR {psnr["mean"]:.1f} dB on average, median {psnr["median"]:.1f}, '
      f'lowest {psnr["min"]:.1f}, over {psnr["images"]} images.', '',
      f"Grain's cost of handing on an element that costs nothing, µs: {options}."])


if __name__ == '__main__':
  sys.exit(main())
