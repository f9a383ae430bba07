"""Makes distinct_texts.md: how many of a chip's region texts are distinct, and what encoding each once could save.

  python docs/results/distinct_texts.py --captions captions_val2017.json --instances instances_val2017.json

Phrases are cut from captions at words that name no thing (articles, prepositions, common verbs), which stands in for
noun phrases; category names are those of the boxes. A batch draws M = 4 a image, as training does.
"""
import argparse
import collections
import json
import pathlib
import re
import sys

import numpy as np
import result_page

from cloc_jax.models import cloc, flops

HERE = pathlib.Path(__file__).parent
M, LENGTH, REGION_LENGTH = 4, 77, 16
IMAGES = (8, 32, 128)
MODELS = {'B/16, 224 px': (dict(variant='B/16'), dict(variant='B'), 512, 224),
          'L/14, 336 px': (dict(variant='L/14'), dict(variant='L'), 768, 336)}
_BREAKS = re.compile(r"[^a-z' ]+|\b(?:a|an|the|some|his|her|their|its|of|on|in|at|with|and|or|to|from|by|for|near|next|under|over|"
                     r'behind|front|top|up|down|into|while|as|that|who|which|is|are|was|be|being|it|he|she|they|there|'
                     r'sitting|standing|holding|walking|riding|eating|looking|wearing|playing|lying|laying|has|have|having)\b')


def phrases(captions: list[str]) -> list[str]:
  pieces = (piece.strip() for caption in captions for piece in _BREAKS.split(caption.lower()))
  return list(dict.fromkeys(p for p in pieces if p))[:20]


def distinct(texts_of_images: list[list[str]], images: int, *, draws: int = 200) -> float:
  """Mean share of distinct texts in a batch."""
  rng = np.random.default_rng(0)
  shares = []
  for _ in range(draws):
    batch = []
    for i in rng.choice(len(texts_of_images), images, replace=images > len(texts_of_images)):
      texts = texts_of_images[i]
      batch += [texts[j] for j in rng.choice(len(texts), min(M, len(texts)), replace=False)]
    shares.append(len(set(batch)) / len(batch))
  return float(np.mean(shares))


def region_text_share(image, text, embed_dim, side) -> float:
  """Of a training step's FLOPs, at the paper's batch."""
  model = cloc.Cloc(image=image, text=text | dict(vocab_size=32_100), embed_dim=embed_dim)
  work = flops.step_flops(model, image_size=side, text_length=LENGTH, region_text_length=REGION_LENGTH, regions=M,
                          batch_size=32_768)
  return work.region_text / work.forward


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--captions', nargs='+', required=True)
  parser.add_argument('--instances', nargs='+', required=True)
  args = parser.parse_args()
  captions, names = collections.defaultdict(list), collections.defaultdict(list)
  for path in args.captions:
    for a in json.loads(pathlib.Path(path).read_text())['annotations']:
      captions[a['image_id']].append(a['caption'])
  for path in args.instances:
    found = json.loads(pathlib.Path(path).read_text())
    categories = {c['id']: c['name'] for c in found['categories']}
    for a in found['annotations']:
      names[a['image_id']].append(categories[a['category_id']])
  kinds = {'phrases of captions': [p for p in map(phrases, captions.values()) if p], 'category names': list(names.values())}
  shares = {name: region_text_share(*settings) for name, settings in MODELS.items()}
  lines = ['| region texts | images a chip | distinct | ' + ' | '.join(f'saved of a step, {n}' for n in shares) + ' |',
           '| --- | --- | --- | ' + ' | '.join('---' for _ in shares) + ' |']
  for kind, texts in kinds.items():
    for images in IMAGES:
      share = distinct(texts, images)
      saved = ' | '.join(f'{100 * (1 - share) * s:.1f} %' for s in shares.values())
      lines.append(f'| {kind} | {images} | {100 * share:.0f} % | {saved} |')
  note = (f'{len(captions)} images with captions, {len(names)} with boxes; M = {M}. "Saved" is an upper bound in FLOPs: finding '
          'the distinct texts, and the room kept for the worst batch, are left out. Region texts are '
          + ', '.join(f'{100 * s:.1f} % of a step at {n}' for n, s in shares.items())
          + '. Made by `python docs/results/distinct_texts.py`.')
  result_page.write_table(HERE / 'distinct_texts.md', f'{note}\n\n' + '\n'.join(lines))
  return 0


if __name__ == '__main__':
  sys.exit(main())
