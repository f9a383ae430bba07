"""Text → token ids: CLIP's BPE, SentencePiece models, Hugging Face tokenizer.json files, vocabularies trained here.

Whatever its origin, a Tokenizer first brings the text into one canonical form, then encodes, appends the end token
(the text tower may pool there, at its *first* occurrence, so it never occurs within the text), and pads. All of it,
the canonical form included, is in `to_dict()`: a checkpoint that carries it needs no other file, and text preparation
cannot drift between training and use.
"""
import base64
from collections.abc import Iterable, Sequence
import dataclasses
import difflib
import html
import itertools
import json
import pathlib
import string
import unicodedata

import numpy as np
import sentencepiece
import tokenizers
from tokenizers import decoders
from tokenizers import models
from tokenizers import pre_tokenizers
from tokenizers import trainers

from cloc_jax.data import clip_vocabulary

_FORMAT = 1
_CACHE_SIZE = 2**16
_CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_PAD, _EOS = '<pad>', '<eos>'
_EOS_NAMES = ('<|endoftext|>', '</s>', '<eos>', '[SEP]', '<|im_end|>', '[EOS]')
_BOS_NAMES = ('<|startoftext|>', '<s>', '<bos>', '[CLS]', '[BOS]')
_PAD_NAMES = ('<pad>', '[PAD]', '<|pad|>')

_NO_PUNCTUATION = str.maketrans('', '', string.punctuation)
_BY_WORD = ('clip', 'trained')

_STEPS = {
    'html': lambda text: html.unescape(html.unescape(text)),  # web captions are often escaped twice
    'nfc': lambda text: unicodedata.normalize('NFC', text),
    'lower': str.lower,
    'underscores': lambda text: text.replace('_', ' '),
    'punctuation': lambda text: text.translate(_NO_PUNCTUATION),  # ASCII's is removed
    'spaces': lambda text: ' '.join(text.split()),
}


@dataclasses.dataclass(frozen=True)
class Tokens:
  """`ids` int32 (n, length); `truncated` bool (n,), True where the text did not fit."""
  ids: np.ndarray
  truncated: np.ndarray


class _HuggingFaceModel:
  """A `tokenizers.Tokenizer`, used without its own special-token templates, truncation and padding."""
  kind = 'tokenizers'

  def __init__(self, tokenizer):
    self._tokenizer = tokenizer
    tokenizer.no_truncation()
    tokenizer.no_padding()
    self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

  def encode(self, texts):
    return [e.ids for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

  def state(self):
    return self._tokenizer.to_str()

  @classmethod
  def from_state(cls, state):
    return cls(tokenizers.Tokenizer.from_str(state))


class _SentencePieceModel:
  kind = 'sentencepiece'

  def __init__(self, proto: bytes):
    self._proto = proto
    self.processor = sentencepiece.SentencePieceProcessor()
    self.processor.LoadFromSerializedProto(proto)
    self.vocab_size = self.processor.get_piece_size()

  def encode(self, texts):
    return self.processor.encode(texts, out_type=int, num_threads=1)

  def state(self):
    return base64.b64encode(self._proto).decode()

  @classmethod
  def from_state(cls, state):
    return cls(base64.b64decode(state, validate=True))


_MODELS = {model.kind: model for model in (_HuggingFaceModel, _SentencePieceModel)}


class Tokenizer:
  """Encodes texts; made by `load`, `train` or `from_dict`. Picklable.

  Attributes:
    name: where it came from: 'clip', 'sentencepiece', 'siglip', 'hf' or 'trained'.
    vocab_size: every id is below it; the text tower's embedding has this many rows.
    pad_id, eos_id: ints. bos_id: int, or None where texts begin without a mark.
    steps: the canonicalisation, in order; of 'html', 'nfc', 'lower', 'underscores', 'punctuation', 'spaces'.
  """

  def __init__(self, model, *, name: str, pad_id: int, eos_id: int, bos_id: int | None, steps: Sequence[str]):
    self._setup(model, name, pad_id, eos_id, bos_id, tuple(steps))

  def _setup(self, model, name, pad_id, eos_id, bos_id, steps):
    self._model, self.name, self.steps = model, name, steps
    self.vocab_size, self.pad_id, self.eos_id, self.bos_id = model.vocab_size, pad_id, eos_id, bos_id
    for key in ('pad_id', 'eos_id', 'bos_id'):
      value = getattr(self, key)
      if not (value is None and key == 'bos_id') and not 0 <= value < self.vocab_size:
        raise ValueError(f'{name} tokenizer: {key} is {value}, outside its {self.vocab_size} ids')
    unknown = [step for step in steps if step not in _STEPS]
    if unknown:
      raise ValueError(f'{name} tokenizer: unknown canonicalisation {unknown}; this version knows {list(_STEPS)}')
    self._steps = [_STEPS[step] for step in steps]
    self._cache = {}
    # In these two, what a word becomes does not depend on its neighbours: new captions of known words cost little.
    self._words = {} if name in _BY_WORD and steps[-1:] == ('spaces',) else None

  def __repr__(self):
    return f'Tokenizer(name={self.name!r}, vocab_size={self.vocab_size})'

  def canonicalize(self, text: str) -> str:
    """The form in which `text` is encoded; equal forms give equal ids."""
    for step in self._steps:
      text = step(text)
    return text

  def __call__(self, texts: Sequence[str], *, length: int) -> Tokens:
    """Encodes `texts` to `length` ids each: [bos,] the text's own, eos, then pads. A truncated text keeps its eos.

    Raises:
      TypeError: `texts` is one string, or holds something that is not a string.
      ValueError: `length` leaves no room for the marks.
    """
    if isinstance(texts, str):
      raise TypeError(f'texts: expected a sequence of strings, got the single string {texts!r}; put it into a list')
    least = 1 if self.bos_id is None else 2
    if length < least:
      raise ValueError(f'length: expected at least {least}, the {self.name} tokenizer\'s own marks, got {length}')
    ids = np.full((len(texts), length), self.pad_id, np.int32)
    truncated = np.zeros(len(texts), bool)
    for i, row in enumerate(self._rows(texts)):
      if len(row) > length:
        ids[i] = row[:length]
        ids[i, -1] = self.eos_id
        truncated[i] = True
      else:
        ids[i, :len(row)] = row
    return Tokens(ids, truncated)

  def _rows(self, texts):
    """Ids with marks, whole, one array per text. The same phrases come again and again, hence the cache."""
    cache = self._cache
    try:
      missing = [text for text in dict.fromkeys(texts) if text not in cache]
      canonical = [self.canonicalize(text) for text in missing]
    except (TypeError, AttributeError):
      bad = next((i for i, text in enumerate(texts) if not isinstance(text, str)), None)
      if bad is None:
        raise
      raise TypeError(f'texts[{bad}]: expected a string, got {type(texts[bad]).__name__} {texts[bad]!r}') from None
    if not missing:
      return [cache[text] for text in texts]
    start = [] if self.bos_id is None else [self.bos_id]
    fresh = {}
    for text, body in zip(missing, self._encode(
        [text if text.isascii() else _encodable(text) for text in canonical])):
      if self.eos_id in body:  # only a caption that spells the mark out; pooling must not stop there
        body = [n for n in body if n != self.eos_id]
      fresh[text] = np.array([*start, *body, self.eos_id], np.int32)
    rows = [fresh[text] if text in fresh else cache[text] for text in texts]
    if len(cache) + len(fresh) > _CACHE_SIZE:
      cache = self._cache = {}
    cache.update(fresh)
    return rows

  def _encode(self, texts):
    """Ids of canonical texts, without marks."""
    if self._words is None:
      return self._model.encode(texts)
    everything = '\0'.join(texts)
    if _PAD in everything or _EOS in everything:  # a mark that is spelt out cuts a text where no space is
      return self._model.encode(texts)
    split = [text.split(' ') for text in texts]
    words = dict.fromkeys(itertools.chain.from_iterable(split))
    missing = [word for word in words if word not in self._words]
    if missing:
      if len(self._words) + len(missing) > _CACHE_SIZE:
        missing, self._words = list(words), {}
      self._words.update(zip(missing, self._model.encode(missing)))
    known = self._words
    return [[n for word in words for n in known[word]] for words in split]

  def to_dict(self) -> dict:
    """Everything, as JSON-able values: the vocabulary is inside (in base64 where it is binary)."""
    return {'format': _FORMAT, 'kind': self._model.kind, 'name': self.name, 'pad_id': self.pad_id,
            'eos_id': self.eos_id, 'bos_id': self.bos_id, 'canonicalize': list(self.steps),
            'model': self._model.state()}

  @classmethod
  def from_dict(cls, state: dict) -> 'Tokenizer':
    """The inverse of `to_dict`.

    Raises:
      ValueError: a key is missing, the format is newer than this version, or the vocabulary inside is damaged.
    """
    if not isinstance(state, dict):
      raise ValueError(f'expected the dict that Tokenizer.to_dict returns, got {type(state).__name__}')
    missing = sorted({'format', 'kind', 'name', 'pad_id', 'eos_id', 'bos_id', 'canonicalize', 'model'} - set(state))
    if missing:
      raise ValueError(f'a saved tokenizer lacks {missing}; it has {sorted(state)}')
    if state['format'] > _FORMAT:
      raise ValueError(f'a tokenizer saved in format {state["format"]}; this version reads up to {_FORMAT}; upgrade it')
    if state['kind'] not in _MODELS:
      raise ValueError(f'a saved tokenizer of kind {state["kind"]!r}; expected one of {sorted(_MODELS)}')
    try:
      model = _MODELS[state['kind']].from_state(state['model'])
    except Exception as e:  # `tokenizers` raises bare Exception, `sentencepiece` RuntimeError
      raise ValueError(f'the vocabulary inside a saved {state["name"]} tokenizer cannot be read: {e}') from e
    return cls(model, name=state['name'], pad_id=state['pad_id'], eos_id=state['eos_id'], bos_id=state['bos_id'],
               steps=state['canonicalize'])

  def __getstate__(self):
    return self.to_dict()

  def __setstate__(self, state):
    self.__dict__.update(Tokenizer.from_dict(state).__dict__)


def _encodable(text):
  """Text with lone surrogates (from broken JSON escapes) replaced: no encoder takes them."""
  return text.encode('utf-8', 'replace').decode()


# --- Loading ---


def load(spec: str, *, lowercase: bool = True) -> Tokenizer:
  """Loads a tokenizer from files.

  Args:
    spec: 'clip:PATH' (OpenAI's bpe_simple_vocab_16e6.txt.gz, or a folder with vocab.json and merges.txt),
      'sentencepiece:PATH' (a .model file, such as T5's or Gemma's), 'hf:PATH' (a tokenizer.json), or 'json:PATH' (what
      `to_dict` returned, written as JSON), 'siglip:PATH' (a .model file as SigLIP reads it: without punctuation, and
      padded with its end token).
    lowercase: whether the text is lower-cased first, as CLIP, SigLIP and CLOC do. 'json' brings its own choice.

  Raises:
    ValueError: an unknown kind, or a file that is not what it should be; the message names it.
    FileNotFoundError: the file is not there; the message names it.
  """
  kind, colon, name = spec.partition(':')
  if kind not in _LOADERS or not colon or not name:
    near = difflib.get_close_matches(kind, _LOADERS, n=1, cutoff=0.4)
    hint = f'; did you mean {near[0] + ":PATH"!r}?' if near else ''
    raise ValueError(f'tokenizer: expected one of {[k + ":PATH" for k in _LOADERS]}, got {spec!r}{hint}')
  path = pathlib.Path(name).expanduser()
  if not path.exists():
    raise FileNotFoundError(f'tokenizer {spec!r}: there is no file {path}{_nearest_file(path)}')
  try:
    return _LOADERS[kind](path, ['lower'] if lowercase else [])
  except OSError as e:
    if isinstance(e, FileNotFoundError):
      raise
    raise ValueError(f'tokenizer {spec!r}: {path} cannot be read: {e}') from e


def _nearest_file(path):
  if not path.parent.is_dir():
    return f', nor a folder {path.parent}'
  near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
  return f'; did you mean {path.parent / near[0]}?' if near else ''


def _load_clip(path, lower):
  # OpenAI's code also repairs mojibake (ftfy); we do not. It pads with 0, which is '!': harmless after the end token.
  return load_clip(path, steps=['html', 'nfc', *lower, 'spaces'])


def load_clip(path: pathlib.Path, *, steps: Sequence[str], pad: str | None = None) -> Tokenizer:
  """CLIP's BPE from OpenAI's merges file, or from a folder with vocab.json and merges.txt.

  pad: the token that texts are padded with; OpenAI's code takes id 0.

  Raises:
    ValueError, FileNotFoundError: naming the file.
  """
  vocab, merges = clip_vocabulary.read(path)
  try:
    model = models.BPE(vocab=vocab, merges=merges, end_of_word_suffix='</w>')
  except Exception as e:  # `tokenizers` has no exception type of its own
    raise ValueError(f'{path}: the merges do not fit the vocabulary: {e}') from e
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
      pre_tokenizers.Split(tokenizers.Regex(_CLIP_WORDS), behavior='removed', invert=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
  return Tokenizer(_HuggingFaceModel(tokenizer), name='clip', pad_id=vocab.get(pad, 0), steps=steps,
                   eos_id=vocab[clip_vocabulary.EOS], bos_id=vocab[clip_vocabulary.BOS])


def _load_sentencepiece(path, lower):
  try:
    model = _SentencePieceModel(path.read_bytes())
    processor = model.processor
    pad, eos = processor.pad_id(), processor.eos_id()
  except RuntimeError as e:
    raise ValueError(f'{path}: expected a SentencePiece .model file, but it does not parse') from e
  if eos < 0:
    raise ValueError(f'{path}: this SentencePiece model has no end-of-sentence piece, which the text tower needs')
  # T5 and Gemma pad with 0; models without a padding piece have the unknown piece there. Neither begins with a mark.
  return Tokenizer(model, name='sentencepiece', pad_id=pad if pad >= 0 else processor.unk_id(), eos_id=eos, bos_id=None,
                   steps=[*lower, 'spaces'])


def _load_siglip(path, lower):
  tokenizer = _load_sentencepiece(path, lower)
  return Tokenizer(tokenizer._model, name='siglip', pad_id=tokenizer.eos_id, eos_id=tokenizer.eos_id, bos_id=None,
                   steps=[*lower, 'punctuation', 'spaces'])


def _load_hugging_face(path, lower):
  return load_hugging_face(path, steps=[*lower, 'spaces'])


def load_hugging_face(path: pathlib.Path, *, steps: Sequence[str], pad: str | None = None,
                      bos: bool | None = None) -> Tokenizer:
  """A tokenizer.json, with the file's own normalisation behind `steps`.

  pad: the token that texts are padded with, and bos: whether texts begin with a mark, where something else than the
    file knows it.

  Raises:
    ValueError: when the file does not parse, or has no end token.
  """
  try:
    tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding='utf-8'))
  except Exception as e:  # `tokenizers` has no exception type of its own
    raise ValueError(f'{path}: expected a Hugging Face tokenizer.json, but it does not parse: {e}') from e
  pad_id = None if pad is None else tokenizer.token_to_id(pad)
  if pad_id is None:
    pad_id = (tokenizer.padding or {}).get('pad_id')
  model = _HuggingFaceModel(tokenizer)
  named = lambda names: next((i for i in map(tokenizer.token_to_id, names) if i is not None), None)
  # The file's own template knows its marks best: [CLS] … [SEP], … </s>, <bos> … .
  marks = tokenizer.encode('', add_special_tokens=True).ids
  first_is_bos = len(marks) > 1 or (len(marks) == 1 and tokenizer.id_to_token(marks[0]) in _BOS_NAMES)
  bos_id = marks[0] if first_is_bos and bos is not False else None
  eos_id = marks[-1] if len(marks) > first_is_bos else named(_EOS_NAMES)
  if eos_id is None:
    raise ValueError(f'{path}: no end-of-text token found; looked for a template that appends one and for {_EOS_NAMES}')
  if pad_id is None:
    pad_id = named(_PAD_NAMES)
  return Tokenizer(model, name='hf', pad_id=0 if pad_id is None else pad_id, eos_id=eos_id, bos_id=bos_id, steps=steps)


def _load_own(path, lower):
  del lower  # part of what was saved
  try:
    return Tokenizer.from_dict(json.loads(path.read_text(encoding='utf-8')))
  except ValueError as e:  # what is not JSON, and what is not UTF-8, raises kinds of ValueError too
    raise ValueError(f'{path}: expected a tokenizer saved by this project: {e}') from e


_LOADERS = {'clip': _load_clip, 'sentencepiece': _load_sentencepiece, 'siglip': _load_siglip, 'hf': _load_hugging_face,
            'json': _load_own}


# --- Training ---


def train(captions: Iterable[str], *, vocab_size: int = 4096, lowercase: bool = True) -> Tokenizer:
  """Learns a byte-level BPE vocabulary from captions: frequent words become one id, unknown ones fall apart into bytes.

  Deterministic: the same captions, in any order, give the same ids.

  Args:
    captions: any number of texts; read once.
    vocab_size: the most ids, at least 258 (256 bytes and two marks). Fewer come out where the captions hold no more.
    lowercase: whether texts are lower-cased first; saved with the tokenizer.

  Raises:
    ValueError: `vocab_size` is too small, or there is no text at all.
    TypeError: `captions` is one string.
  """
  if isinstance(captions, str):
    raise TypeError('captions: expected many strings, got a single one')
  if vocab_size < 258:
    raise ValueError(f'vocab_size: expected at least 258 (256 bytes and two marks), got {vocab_size}')
  steps = ['nfc', *(['lower'] if lowercase else []), 'spaces']
  texts = []
  for caption in captions:
    for step in steps:
      caption = _STEPS[step](caption)
    if caption:
      texts.append(_encodable(caption))
  if not texts:
    raise ValueError('captions: there is no text to learn a vocabulary from')
  tokenizer = tokenizers.Tokenizer(models.BPE())
  # A space before the first word too: a word is the same id at the start of a caption as within it.
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[_PAD, _EOS], show_progress=False,
                                initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
  tokenizer.train_from_iterator(texts, trainer)
  return Tokenizer(_HuggingFaceModel(tokenizer), name='trained', pad_id=0, eos_id=1, bos_id=None, steps=steps)
