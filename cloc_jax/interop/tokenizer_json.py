"""Our tokenizers as Hugging Face's files: tokenizer.json and tokenizer_config.json, with the canonical form inside.

What a tokenizer.json cannot hold: HTML entities ('&amp;') are not resolved, which our CLIP tokenizer does first; and a
text that spells out the end mark keeps it. The processor of an hf-cloc folder does both.
"""
import base64
import json
import pathlib
import struct

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

from cloc_jax.data import tokenizer as tokenizer_lib

# Python's str.split() also cuts at the four information separators.
_SPACES = '[\\s\x1c-\x1f\x85]+'
_FINAL_SIGMA = r'(?<=\p{L})Σ(?!\p{L})'  # str.lower() looks at the neighbours of this letter, tokenizers' does not
_STEPS = {
    'html': [],
    'nfc': [normalizers.NFC()],
    'lower': [normalizers.Replace(Regex(_FINAL_SIGMA), 'ς'), normalizers.Lowercase()],
    'spaces': [normalizers.Replace(Regex(_SPACES), ' '), normalizers.Strip()],
}
_SPACE = '▁'  # SentencePiece's sign for one
_UNIGRAM, _BPE = 1, 2
_NORMAL, _UNKNOWN, _USER_DEFINED = 1, 2, 4


def convert(tokenizer: tokenizer_lib.Tokenizer) -> tokenizers.Tokenizer:
  """The same tokenizer for the `tokenizers` library: canonical form, vocabulary, start and end marks.

  Raises:
    ValueError: for a SentencePiece model that is neither unigram nor BPE.
  """
  state = tokenizer.to_dict()
  if state['kind'] == 'tokenizers':
    out = tokenizers.Tokenizer.from_str(state['model'])
  else:
    out = _from_sentencepiece(base64.b64decode(state['model']))
  steps = [part for step in tokenizer.steps for part in _STEPS[step]]
  out.normalizer = normalizers.Sequence(steps + ([out.normalizer] if out.normalizer is not None else []))
  marks = [(out.id_to_token(i), i) for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None]
  names = [name for name, _ in marks]
  single = [*names[:-1], '$A', names[-1]]
  out.post_processor = processors.TemplateProcessing(single=single, pair=[*single, '$B', names[-1]],
                                                     special_tokens=marks)
  if out.decoder is None and state['name'] == 'clip':
    out.decoder = decoders.ByteLevel()
  return out


def write(tokenizer: tokenizer_lib.Tokenizer, folder: pathlib.Path, *, length: int, pads_matter: bool,
          clip_class: bool = False) -> None:
  """Writes the files that AutoTokenizer reads.

  Args:
    tokenizer: ours. folder: where to.
    length: the longest text, tokens.
    pads_matter: whether the text tower sees the padding. Where it does not, a tokenizer that pads with a word (CLIP's
      original pads with 0, which is '!') gets the end mark instead, as in Hugging Face's CLIP folders.
    clip_class: call it CLIPTokenizer where it is CLIP's, with the two files that older versions of that class read.
  """
  out = convert(tokenizer)
  (folder / 'tokenizer.json').write_text(out.to_str(pretty=True), encoding='utf-8')
  is_clip = tokenizer.name == 'clip'
  pad_id = tokenizer.eos_id if is_clip and not pads_matter else tokenizer.pad_id
  settings = {
      'tokenizer_class': 'CLIPTokenizer' if is_clip and clip_class else 'PreTrainedTokenizerFast',
      'model_max_length': length, 'padding_side': 'right', 'truncation_side': 'right',
      'clean_up_tokenization_spaces': False, 'model_input_names': ['input_ids', 'attention_mask'],
      'eos_token': out.id_to_token(tokenizer.eos_id), 'pad_token': out.id_to_token(pad_id)}
  if tokenizer.bos_id is not None:
    settings['bos_token'] = out.id_to_token(tokenizer.bos_id)
  if tokenizer.name in ('clip', 'sentencepiece') and not clip_class:
    # Marks that a text spells out are words to these two; and where '!' pads, every one would be read as padding.
    settings['split_special_tokens'] = True
  if is_clip:
    settings['unk_token'] = settings['eos_token']
    if clip_class:
      _write_clip_files(out, folder)
  _write_json(folder / 'tokenizer_config.json', settings)


def _write_clip_files(converted, folder):
  model = json.loads(converted.to_str())['model']
  _write_json(folder / 'vocab.json', model['vocab'])
  merges = [' '.join(pair) if isinstance(pair, list) else pair for pair in model['merges']]
  (folder / 'merges.txt').write_text('\n'.join(['#version: 0.2', *merges]) + '\n', encoding='utf-8')


def _write_json(path, value):
  path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')


# --- SentencePiece ---


def _from_sentencepiece(proto):
  """A SentencePiece model file (sentencepiece_model.proto) as a `tokenizers.Tokenizer`."""
  fields = _fields(proto)
  pieces = [_fields(piece) for number, piece in fields if number == 1]
  trainer, normalizer = (dict(_fields(next((v for n, v in fields if n == number), b''))) for number in (2, 3))
  names, scores, kinds = [], [], []
  for piece in map(dict, pieces):
    names.append(piece[1].decode())
    scores.append(struct.unpack('<f', piece.get(2, b'\0\0\0\0'))[0])
    kinds.append(piece.get(3, _NORMAL))
  unk = kinds.index(_UNKNOWN)
  kind, fallback = trainer.get(3, _UNIGRAM), bool(trainer.get(35, 0))
  prefix, collapse = bool(normalizer.get(3, 1)), bool(normalizer.get(4, 1))
  steps = []
  if normalizer.get(2):
    steps.append(normalizers.Precompiled(normalizer[2]))
  if collapse:
    steps += [normalizers.Strip(), normalizers.Replace(Regex(' {2,}'), ' ')]
  if kind == _UNIGRAM:
    out = tokenizers.Tokenizer(models.Unigram(list(zip(names, scores)), unk_id=unk, byte_fallback=fallback))
    out.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme='always' if prefix else 'never',
                                                 split=False)
  elif kind == _BPE:
    ids = {name: i for i, name in enumerate(names)}
    out = tokenizers.Tokenizer(models.BPE(ids, _merges(names, scores, kinds), unk_token=names[unk], fuse_unk=True,
                                          byte_fallback=fallback))
    steps += [normalizers.Prepend(_SPACE)] if prefix else []
    steps.append(normalizers.Replace(' ', _SPACE))
  else:
    raise ValueError(f'this SentencePiece model is of type {kind}; expected {_UNIGRAM} (unigram) or {_BPE} (BPE)')
  if steps:
    out.normalizer = normalizers.Sequence(steps)
  out.decoder = decoders.Metaspace(replacement=_SPACE, prepend_scheme='always' if prefix else 'never')
  out.add_tokens([tokenizers.AddedToken(name, normalized=False) for name, kind in zip(names, kinds)
                  if kind == _USER_DEFINED])
  return out


def _merges(names, scores, kinds):
  """Pairs in the order in which SentencePiece joins them: by the score of what they make."""
  score = {name: s for name, s, kind in zip(names, scores, kinds) if kind in (_NORMAL, _USER_DEFINED)}
  rank = {name: i for i, name in enumerate(names)}
  found = []
  for name, value in score.items():
    pairs = [(name[:i], name[i:]) for i in range(1, len(name)) if name[:i] in score and name[i:] in score]
    found += [(value, *pair) for pair in sorted(pairs, key=lambda pair: (rank[pair[0]], rank[pair[1]]))]
  return [(left, right) for _, left, right in sorted(found, key=lambda x: -x[0])]


def _fields(data):
  """[(number, value)] of a protobuf message: ints, and bytes for everything else."""
  out, at = [], 0

  def varint():
    nonlocal at
    value = shift = 0
    while True:
      byte = data[at]
      at += 1
      value |= (byte & 0x7f) << shift
      shift += 7
      if byte < 0x80:
        return value

  while at < len(data):
    tag = varint()
    wire = tag & 7
    if wire == 0:
      value = varint()
    else:
      size = {1: 8, 5: 4}.get(wire)
      size = varint() if size is None else size
      value = data[at:at + size]
      at += size
    out.append((tag >> 3, value))
  return out

