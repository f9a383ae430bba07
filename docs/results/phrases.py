"""Makes phrases.md: captions a second on one core, for each way to take queries from texts.

  python docs/results/phrases.py [--annotations shared/coco_mini/annotations] [--captions 2000] [--rounds 5]

Four COCO captions in a row are about as long as the paper's (36 tokens); random sentences where there is no folder.
Processor time, not wall time. Every round measures all cases one after another; the table has the medians.
"""
import argparse
import itertools
import json
import os
import pathlib
import platform
import random
import statistics
import sys
import time

import nltk
from nltk.tag.perceptron import PerceptronTagger
import result_page

from cloc_jax.label import phrases, tagger

HERE = pathlib.Path(__file__).parent
WORDS = ('a the on of with small large red green old dog cat table chair street person bus near behind under holding '
         'standing sitting wooden bright two three window tree car boat plate').split()
OURS, THEIRS = 'noun phrases', "noun phrases, NLTK's own tagger and parser"


def captions(folder, count) -> list[str]:
  """`count` captions of four sentences, repeated if there are fewer."""
  rng = random.Random(0)
  sentences = [' '.join(rng.choices(WORDS, k=10)) + '.' for _ in range(4000)]
  if folder:
    sentences = [a['caption'].strip().rstrip('.') + '.' for path in sorted(pathlib.Path(folder).glob('*caption*.json'))
                 for a in json.loads(path.read_text())['annotations']]
  long = [' '.join(group) for group in zip(*[iter(sentences)] * 4)]
  return list(itertools.islice(itertools.cycle(long), count))


def cases():
  """Name → function of a caption."""
  own = PerceptronTagger(load=False)
  own.model.weights, own.tagdict, classes = tagger.read_weights()
  own.classes = own.model.classes = set(classes)
  parser = nltk.RegexpParser('NP: {<DT>?<JJ.*>*<NN.*>+}')

  def by_nltk(caption):
    tree = parser.parse(own.tag(phrases.tokenize(caption.lower())) or [('.', '.')])
    return [' '.join(w for w, _ in t.leaves()) for t in tree.subtrees(lambda t: t.label() == 'NP')]

  nouns, grams = phrases.make('nltk'), phrases.make('ngrams')
  return {OURS: lambda c: nouns.phrases(c, ()), '– splitting into words': lambda c: phrases.tokenize(c.lower()),
          THEIRS: by_nltk, 'n-grams of the alt-text': lambda c: grams.phrases('', (c,))}


def one_round(texts) -> dict[str, float]:
  found = {}
  for name, function in cases().items():
    function(texts[0])  # what is read once a process
    start = time.process_time()
    for text in texts:
      function(text)
    found[name] = len(texts) / (time.process_time() - start)
    print(f'{name}: {found[name]:,.0f} captions/s', flush=True)
  return found


def table(results) -> str:
  median = {name: statistics.median(r[name] for r in results['rounds']) for name in results['rounds'][0]}
  rows = ['| | captions/s a core | µs a caption |', '| --- | --- | --- |',
          *(f'| {name} | {rate:,.0f} | {1e6 / rate:,.0f} |' for name, rate in median.items())]
  return '\n'.join([
      f'{results["captions"]:,} captions of {results["words"]:.0f} words and punctuation marks '
      f'({"COCO" if results["coco"] else "random sentences"}), {results["phrases"]:.1f} phrases each; medians of '
      f'{len(results["rounds"])} rounds; Python {results["python"]}, NLTK {results["nltk"]}, {results["machine"]}. '
      'Made by `python docs/results/phrases.py`.', '', *rows])


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  beside = HERE.parents[2] / 'shared' / 'coco_mini' / 'annotations'
  parser.add_argument('--annotations', default=os.fspath(beside) if beside.is_dir() else None, metavar='DIR')
  parser.add_argument('--captions', type=int, default=2000)
  parser.add_argument('--rounds', type=int, default=5)
  args = parser.parse_args()
  texts = captions(args.annotations, args.captions)
  extractor = phrases.make('nltk')
  results = {'machine': platform.machine(), 'python': platform.python_version(), 'nltk': nltk.__version__,
             'coco': bool(args.annotations), 'captions': len(texts),
             'words': statistics.mean(len(phrases.tokenize(text)) for text in texts),
             'phrases': statistics.mean(len(extractor.phrases(text, ())) for text in texts),
             'rounds': [one_round(texts) for _ in range(args.rounds)]}
  (HERE / 'phrases.json').write_text(json.dumps(results, indent=1) + '\n')
  result_page.write_table(HERE / 'phrases.md', table(results))


if __name__ == '__main__':
  sys.exit(main())
