"""Makes detector.md: OWLv2's images a second by batch size, and what of the time is ours and not the model's.

  python docs/results/detector.py [--photos shared/coco_mini/val2017] [--batch-sizes 8 16 32 64] [--images 512]

OWLv2 L/14 at 448 pixels, its real shape with random weights (--tiny: two layers of width 64, to try the script), 12
phrases an image. The threshold is set so that about 12 boxes an image are kept, as many as the paper has. Wall time:
`detect` from decoded images to boxes, against the model's own calls on canvases that are ready, the device waited for.
The difference is what resizing, copying to the device, and boxes cost where the model does not hide it.
"""
import argparse
import itertools
import json
import os
import pathlib
import platform
import statistics
import sys
import tempfile
import time

import numpy as np
import result_page

from cloc_jax.data import clip_vocabulary, transforms
from cloc_jax.label import detectors, stages

HERE = pathlib.Path(__file__).parent
LARGE = dict(text=dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12),
             vision=dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                         image_size=1008, patch_size=14), projection=768)
TINY = dict(text=dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2),
            vision=dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                        image_size=1008, patch_size=14), projection=64)
WORDS = 'dog cat horse bus table chair street person window tree car boat plate bench cup clock bird kite'.split()
COLOURS = 'red green blue white black brown grey small large old wooden bright'.split()


def checkpoint(folder, shape):
  """Random weights in the shape of the model, and a tokenizer of bytes, with as many tokens a text at most."""
  import transformers
  letters = clip_vocabulary.byte_letters()
  tokens = [*letters, *(c + '</w>' for c in letters), clip_vocabulary.BOS, clip_vocabulary.EOS]
  transformers.CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], pad_token='!',
                             model_max_length=16).save_pretrained(folder)
  config = transformers.Owlv2Config(text_config=shape['text'], vision_config=shape['vision'],
                                    projection_dim=shape['projection'])
  transformers.Owlv2ForObjectDetection(config).save_pretrained(folder)
  (folder / 'preprocessor_config.json').write_text(json.dumps(dict(
      image_processor_type='Owlv2ImageProcessor', image_mean=[0.48145466, 0.4578275, 0.40821073],
      image_std=[0.26862954, 0.26130258, 0.27577711], size=dict(height=1008, width=1008))))


def pictures(folder, count):
  """Decoded photos, repeated if there are fewer; noise of 640 × 480 where there is no folder."""
  images = [transforms.decode(path.read_bytes(), where=path.name)
            for path in sorted(pathlib.Path(folder).glob('*.jpg'))[:count]] if folder else []
  rng = np.random.default_rng(0)
  images = images or [rng.integers(0, 256, (480, 640, 3), np.uint8) for _ in range(16)]
  return [stages.Picture(str(i), image) for i, image in enumerate(itertools.islice(itertools.cycle(images), count))]


def wait():
  import torch
  if torch.cuda.is_available():
    torch.cuda.synchronize()


def timed(function) -> float:
  wait()
  start = time.perf_counter()
  function()
  wait()
  return time.perf_counter() - start


def set_threshold(detector, images, queries, *, boxes):
  """So that about `boxes` an image are kept."""
  detector.threshold = 0.0
  scores = sorted((d.score for one in detector.detect(images, queries) for d in one), reverse=True)
  detector.threshold = scores[min(boxes * len(images), len(scores) - 1)]


def one_case(detector, images, queries) -> dict[str, float]:
  """Images a second of `detect` and of the model alone, and microseconds an image of what is ours, in one thread."""
  size = detector.batch_size
  kept = []
  whole = timed(lambda: kept.extend(detector.detect(images, queries)))
  failed = [one for one in kept if isinstance(one, Exception)]
  if failed:
    raise failed[0]
  few = images[:64]
  prepare = timed(lambda: [detector.prepare(p.image) for p in few]) / len(few)
  texts = dict(enumerate(queries))
  canvases = np.stack([detector.prepare(p.image)[0] for p in images[:size]])

  def model():
    encoded = detector.encode_texts(texts)
    for start in range(0, len(images), size):
      numbers = list(range(start, min(start + size, len(images))))
      detector.forward(canvases[:len(numbers)], numbers, encoded)
  alone = timed(model)
  return {'images/s': len(images) / whole, 'model alone, images/s': len(images) / alone,
          'ours, share': max(0.0, 1 - alone / whole), 'resizing, µs an image a thread': 1e6 * prepare,
          'boxes an image': statistics.mean(map(len, kept))}


def table(results) -> str:
  names = list(results['rounds'][0][str(results['batch_sizes'][0])])
  rows = ['| images a batch | ' + ' | '.join(names) + ' |', '| --- |' + ' --- |' * len(names)]
  for size in results['batch_sizes']:
    values = [statistics.median(r[str(size)][name] for r in results['rounds']) for name in names]
    rows.append(f'| {size} | ' + ' | '.join(
        f'{100 * v:.1f} %' if 'share' in n else f'{v:,.1f}' for n, v in zip(names, values)) + ' |')
  return '\n'.join([
      f'{results["model"]} at 448 pixels, random weights, {results["dtype"]}, {results["images"]:,} '
      f'{"photos" if results["photos"] else "images of noise"} already decoded; medians of {len(results["rounds"])} '
      f'rounds; torch {results["torch"]}, {results["device"]}. Made by `python docs/results/detector.py`.', '', *rows])


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  beside = HERE.parents[2] / 'shared' / 'coco_mini' / 'val2017'
  parser.add_argument('--photos', default=os.fspath(beside) if beside.is_dir() else None, metavar='DIR')
  parser.add_argument('--batch-sizes', type=int, nargs='+', default=[8, 16, 32, 64])
  parser.add_argument('--images', type=int, default=512)
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--threads', type=int, default=8)
  parser.add_argument('--tiny', action='store_true')
  args = parser.parse_args()
  import torch
  images = pictures(args.photos, args.images)
  rng = np.random.default_rng(0)
  queries = [[f'{c} {w}' for c, w in zip(rng.choice(COLOURS, 12), rng.choice(WORDS, 12))] for _ in images]
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    checkpoint(folder, TINY if args.tiny else LARGE)
    detector = detectors.make(f'owlv2:{folder}', image_size=448, threads=args.threads)
    set_threshold(detector, images[:8], queries[:8], boxes=12)
  rounds = []
  for number in range(args.rounds):
    found = {}
    for detector.batch_size in args.batch_sizes:
      detector.detect(images[:2 * detector.batch_size], queries[:2 * detector.batch_size])  # warm
      found[str(detector.batch_size)] = one_case(detector, images, queries)
      print(number, detector.batch_size, found[str(detector.batch_size)], flush=True)
    rounds.append(found)
  gpu = torch.cuda.is_available()
  results = {'model': 'a tiny OWLv2' if args.tiny else 'OWLv2 L/14', 'dtype': str(detector._dtype).split('.')[-1],
             'device': torch.cuda.get_device_name() if gpu else f'CPU, {platform.machine()}',
             'torch': torch.__version__, 'photos': bool(args.photos), 'images': len(images),
             'batch_sizes': args.batch_sizes, 'threads': args.threads, 'rounds': rounds}
  (HERE / 'detector.json').write_text(json.dumps(results, indent=1) + '\n')
  result_page.write_table(HERE / 'detector.md', table(results))


if __name__ == '__main__':
  sys.exit(main())
