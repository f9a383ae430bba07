"""Makes eval_speed.md: embedding the boxes of images as `cloc eval` does, and the naive ways.

  GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python docs/results/eval_speed.py

A CLOC B/16 at 224 px with random weights; boxes are random too. All ways embed boxes of the same canvases, turn by turn
in one process; what they are compared by is the ratio within a turn. Texts, which cost all of them the same, are left
out. Every measurement is kept at once in eval_speed.json: the same command goes on after the last one (--again: begins
anew), and --table writes the table of what there is.
"""
import argparse
import dataclasses
import json
import pathlib
import platform
import statistics
import sys
import time

import jax
import numpy as np
import result_page

from cloc_jax import config as config_lib
from cloc_jax import evaluators, geometry, inference, train
from cloc_jax.data import eval_pipeline, tokenizer
from cloc_jax.evaluators import pooled

HERE = pathlib.Path(__file__).parent
CONFIG = HERE.parents[1] / 'configs' / 'cloc_b16.py'
BOXES = (1, 7, 36)
OURS = 'the image once, prompter'
AGAIN = 'the image again for every box'
POOLED = {how: f'the image once, {how}' for how in pooled.POOLINGS}
CUT = 'every box cut out and encoded'
WAYS = (OURS, *POOLED.values(), AGAIN, CUT)


def load(spec: str, dtype: str):
  """(inference.Functions, random parameters) of an experiment."""
  config = config_lib.load(spec)
  config.model.dtype = dtype
  tokens = tokenizer.train(['a thing'], vocab_size=300)
  model = inference.build_model(config, tokenizer=tokens)
  data = config_lib.call(train.DataOptions, config['data'], name='data')
  batch = dataclasses.replace(data, batch_size=1).abstract_batch()
  params = model.init(jax.random.key(0), jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), batch))['params']
  return inference.Functions(model, tokenizer=tokens, preprocessing=inference.Preprocessing(
      image_size=data.image_size, pad=data.pad, text_length=data.text_length,
      region_text_length=data.region_text_length)), params


def batches(*, images: int, batch: int, boxes: int, side: int) -> list[eval_pipeline.EvalBatch]:
  """Noise, with one caption an image and `boxes` boxes, each of its own phrase."""
  rng = np.random.default_rng(0)
  whole = geometry.resize_with_pad(height=side, width=side, canvas=side)
  out = []
  for start in range(0, images, batch):
    examples = []
    for i in range(start, min(start + batch, images)):
      low = rng.uniform(0, 0.6, (boxes, 2))
      examples.append(eval_pipeline.EvalExample(
          image_id=str(i), captions=(f'picture {i}',), geometry=whole, categories=('',) * boxes,
          boxes=np.concatenate([low, low + rng.uniform(0.1, 0.4, (boxes, 2))], 1).astype(np.float32),
          region_captions=tuple(f'thing {i} {j}' for j in range(boxes))))
    out.append(eval_pipeline.EvalBatch(images=rng.integers(0, 256, (batch, side, side, 3)).astype(np.uint8),
                                       image_mask=np.arange(batch) < len(examples), examples=examples))
  return out


def again_for_every_box(fns, given) -> np.ndarray:
  """(boxes, E): a batch of images is encoded as often as its images have boxes; the same number each."""
  out = []
  for batch in given:
    boxes = np.zeros((len(batch.images), len(batch.examples[0].boxes), 4), np.float32) + np.float32([0, 0, 1, 1])
    for row, example in enumerate(batch.examples):
      boxes[row] = example.boxes
    z = [np.asarray(fns.embed_regions(fns.encode_image(batch.images), boxes[:, i:i + 1]))
         for i in range(boxes.shape[1])]
    out.append(np.concatenate(z, 1)[:len(batch.examples)].reshape(-1, z[0].shape[-1]))
  return np.concatenate(out)


def ways(functions, params):
  """way → a function of batches, which returns the embeddings of their boxes."""
  fns = functions.encoder_fns(params)
  width = functions.model.embed_dim
  fns = dataclasses.replace(fns, ground=None, encode_text=lambda texts, *, region: np.full(
      (len(texts), width), width**-0.5, np.float32))
  # Patches serve the pooling alone here: nobody points.
  collected = lambda fns: lambda given: evaluators.collect(dataclasses.replace(fns, embed_patches=None), given).z_region
  return {OURS: collected(fns), AGAIN: lambda given: again_for_every_box(fns, given),
          CUT: collected(evaluators.crop_regions(fns, functions.preprocessing.image_size)),
          **{name: collected(evaluators.pooled_regions(fns, how)) for how, name in POOLED.items()}}


def measure(made, seconds: dict[str, list[float]], *, boxes: int, settings: dict):
  """Adds to way → seconds of each round what is missing of `rounds`, and yields after each."""
  if all(len(seconds.get(name, ())) >= settings['rounds'] for name in WAYS):
    return
  given = batches(images=settings['images'], batch=settings['batch'], boxes=boxes, side=settings['side'])
  found = {name: made[name](given[:1]) for name in WAYS}  # compiles, too
  # These two are the same thing, computed twice.
  np.testing.assert_allclose(found[AGAIN], found[OURS], atol=2e-2)
  for turn in range(settings['rounds']):
    for name in WAYS:
      if len(seconds.setdefault(name, [])) <= turn:
        began = time.perf_counter()
        made[name](given)
        seconds[name].append(time.perf_counter() - began)
        print(f'{boxes} boxes, round {turn + 1} of {settings["rounds"]}, {name}: '
              f'{settings["images"] / seconds[name][-1]:.2f} images/s', flush=True)
        yield


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--config', default=str(CONFIG), metavar='FILE.py[:ARGS]')
  parser.add_argument('--dtype', default='float32' if jax.default_backend() == 'cpu' else 'bfloat16')
  parser.add_argument('--images', type=int, default=8)
  parser.add_argument('--batch', type=int, default=4)
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--boxes', type=int, nargs='+', default=list(BOXES))
  parser.add_argument('--again', action='store_true', help='forget what was measured before')
  parser.add_argument('--table', action='store_true', help='only write the table of what was measured')
  parser.add_argument('--out', type=pathlib.Path, default=HERE, metavar='DIR')
  args = parser.parse_args()
  file, page = args.out / 'eval_speed.json', args.out / 'eval_speed.md'
  if args.table:
    result_page.write_table(page, table(json.loads(file.read_text())))
    return 0
  functions, params = load(args.config, args.dtype)
  settings = {'device': f'{jax.device_count()} × {jax.devices()[0].device_kind}', 'machine': platform.machine(),
              'jax': jax.__version__, 'config': pathlib.Path(args.config.partition(':')[0]).name, 'dtype': args.dtype,
              'side': functions.preprocessing.image_size, 'images': args.images, 'batch': args.batch}
  results = result_page.begun(file, settings, again=args.again)
  cases, made = results.setdefault('seconds', {}), ways(functions, params)
  for boxes in args.boxes:
    for _ in measure(made, cases.setdefault(str(boxes), {}), boxes=boxes, settings=settings | {'rounds': args.rounds}):
      result_page.keep(file, results)
    result_page.write_table(page, table(results))
  return 0


def table(results) -> str:
  """Of what there is: a way without a measurement is left out."""
  lines = ['| boxes an image | encoded | images/s | boxes/s | time, in units of the first | rounds |',
           '| --- | --- | --- | --- | --- | --- |']
  for boxes, seconds in sorted(results['seconds'].items(), key=lambda case: int(case[0])):
    for way in WAYS:
      if seconds.get(way):
        rate = results['images'] / statistics.median(seconds[way])
        ratio = statistics.median(a / b for a, b in zip(seconds[way], seconds[OURS]))
        lines.append(f'| {boxes} | {way} | {rate:,.2f} | {rate * int(boxes):,.1f} | {ratio:.2f} × '
                     f'| {len(seconds[way])} |')
  return '\n'.join([f'{results["config"]} at {results["side"]} px, {results["dtype"]}, {results["device"]} '
                    f'({results["machine"]}), jax {results["jax"]}; {results["images"]} images in batches of '
                    f'{results["batch"]}; medians over the rounds. Made by `python docs/results/eval_speed.py`.', '',
                    *lines])


if __name__ == '__main__':
  sys.exit(main())
