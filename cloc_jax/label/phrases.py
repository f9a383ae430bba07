"""From an image's texts to the queries of the detector (SPEC §5.2), without any download.

  make('nltk')                   noun phrases of the caption: the paper's rule
  make('spacy:en_core_web_sm')   spaCy's noun chunks of the caption, filtered alike
  make('ngrams')                 the baseline: word n-grams of the alt-texts
"""
from collections.abc import Iterable, Sequence
import functools
import re

from cloc_jax.label import tagger, words

_CHUNK = re.compile('D?J*N+')  # {<DT>?<JJ.*>*<NN.*>+}, one letter a tag
# Lines without a full stop are sentences of their own: captioners write lists.
_LINE_END = re.compile(r'(?<![.!?:;,\s])[^\S\n]*\n\s*')
_FULL_STOP = re.compile(r'(?<=[^.\s])\.(?=["\'”’)\]]*\s)')
# A full stop behind one of these, or behind a single letter, ends no sentence.
_ABBREVIATION = re.compile(r'(?:^|[\s("\'])(?:mr|mrs|ms|dr|prof|st|mt|ft|no|vs|etc|jr|sr|inc|ltd|approx|e\.g|i\.e|'
                           r'(?:[^\W\d_]\.)*[^\W\d_])$')
_REACH = 12  # characters before a full stop that can be an abbreviation
_LONGEST_TEXT = 20_000  # characters; no caption is longer, but web pages pasted into an alt-text are


def make(spec: str, **config):
  """The extractor that `spec` names; `config` goes to it.

  Raises:
    ValueError: on an unknown spec. TypeError: on an unknown setting.
  """
  kind, _, rest = spec.partition(':')
  if kind == 'nltk' and not rest:
    return NounPhrases(**config)
  if kind == 'spacy' and rest:
    return SpacyChunks(rest, **config)
  if kind == 'ngrams' and not rest:
    return NGrams(**config)
  raise ValueError(f"phrases: expected 'nltk', 'spacy:MODEL' or 'ngrams', got {spec!r}")


class NounPhrases:
  """The paper's phrases: lower-cased, generic words dropped, tagged, chunked; the first `limit` different ones.

  The first ones are kept because captions name the main things first. A line break ends a sentence too. A word
  without a letter or digit (a bullet, an emoji) is part of no phrase, whatever its tag.
  """

  def __init__(self, *, limit: int = 20, tagger_folder: str | None = None):
    self._limit, self._folder = _checked(limit), tagger_folder
    # Read here already, so that what is not installed is said before anything is labelled.
    _word_tokenizer()
    tagger.load(self._folder)
    self.version = f'nltk-noun-phrases-1 limit={limit}'

  def phrases(self, caption: str, alt_texts: Sequence[str]) -> list[str]:
    """Noun phrases of the caption; alt-texts are not looked at."""
    del alt_texts
    tokens = [token for token in tokenize(caption.lower()) if token not in words.GENERIC]
    chunks = chunk(tokens, tagger.load(self._folder).tag(tokens))
    return _first(chunks, self._limit)


class SpacyChunks:
  """spaCy's noun chunks of the caption, with the same words dropped."""

  def __init__(self, model: str, *, limit: int = 20):
    self._model, self._limit = model, _checked(limit)
    _spacy_pipeline(model)
    self.version = f'spacy:{model} limit={limit}'

  def phrases(self, caption: str, alt_texts: Sequence[str]) -> list[str]:
    """Noun chunks of the caption; alt-texts are not looked at."""
    del alt_texts
    doc = _spacy_pipeline(self._model)(' '.join(caption.lower().split()))
    chunks = ([t.text for t in span if not t.is_space and t.text not in words.GENERIC] for span in doc.noun_chunks)
    return _first(chunks, self._limit)


class NGrams:
  """Queries as OWLv2's self-training takes them from alt-texts (SPEC §5 "– VESL").

  All word n-grams of up to 10 words, by their first word and then by length, the first 300 of an image; generic words
  are dropped first, and n-grams of stop words alone left out: Minderer et al. 2023 (arXiv 2306.09683), appendix A.2.
  Unlike there a query is asked once where words repeat, and several alt-texts share the 300.
  """

  def __init__(self, *, limit: int = 300, longest: int = 10):
    if longest < 1:
      raise ValueError(f'phrases: longest: expected at least one word, got {longest}')
    self._limit, self._longest = _checked(limit), longest
    self.version = f'ngrams-1 limit={limit} longest={longest}'

  def phrases(self, caption: str, alt_texts: Sequence[str]) -> list[str]:
    """n-grams of the alt-texts, or of the caption where an image has none."""
    return _first(self._grams([text for text in alt_texts if text.strip()] or [caption]), self._limit)

  def _grams(self, texts):
    for text in texts:
      tokens = [token for token in text.lower().split() if token not in words.GENERIC]
      for start in range(len(tokens)):
        for stop in range(start + 1, min(start + self._longest, len(tokens)) + 1):
          yield tokens[start:stop]


def tokenize(text: str) -> list[str]:
  """Text → words and punctuation, as nltk.word_tokenize, with sentences ended by rules instead of Punkt's data.

  What lies behind the first 20 000 characters is not read.
  """
  text = _LINE_END.sub(' .\n', text[:_LONGEST_TEXT].strip())
  # The tokenizer parts a full stop from its word only at the very end of a text.
  text = _FULL_STOP.sub(lambda m: '.' if _ABBREVIATION.search(text[max(0, m.start() - _REACH):m.start()]) else ' .',
                        text)
  return _word_tokenizer().tokenize(text)


def chunk(tokens: Sequence[str], tags: Sequence[str]) -> list[list[str]]:
  """The words of each noun phrase {<DT>?<JJ.*>*<NN.*>+}, in order."""
  letters = ''.join(map(_letter, tokens, tags))
  return [list(tokens[m.start():m.end()]) for m in _CHUNK.finditer(letters)]


def _letter(token, tag):
  if tag == 'DT':
    return 'D'
  if tag[:2] in ('JJ', 'NN') and (token[0].isalnum() or any(map(str.isalnum, token))):
    return tag[0]
  return ' '


def _first(chunks: Iterable[list[str]], limit: int) -> list[str]:
  """The first `limit` different phrases that are more than stop words."""
  found = {}
  for chunk_words in chunks:
    if not words.STOP.issuperset(chunk_words):
      found.setdefault(' '.join(chunk_words))
      if len(found) == limit:
        break
  return list(found)


def _checked(limit):
  if limit < 1:
    raise ValueError(f'phrases: limit: expected at least one phrase an image, got {limit}')
  return limit


@functools.cache
def _word_tokenizer():
  try:
    from nltk.tokenize import NLTKWordTokenizer
  except ImportError as error:
    raise ImportError("noun phrases need NLTK: pip install 'cloc_jax[label]'") from error
  return NLTKWordTokenizer()


@functools.cache
def _spacy_pipeline(model):
  try:
    import spacy
  except ImportError as error:
    raise ImportError(f"phrases 'spacy:{model}' need spaCy: pip install spacy") from error
  try:
    return spacy.load(model, exclude=['ner', 'lemmatizer'])
  except OSError as error:
    raise FileNotFoundError(
        f"phrases 'spacy:{model}': spaCy has no such model here. Install it where there is a network "
        f"(python -m spacy download {model}), or give a model's folder: spacy:FOLDER") from error
