"""Tokenizers: equal to slow, independent encoders; ends, pads, truncation; saved state; bad files name themselves."""
import gzip
import io
import json
import pickle
import subprocess
import sys
import unicodedata

from cloc_jax.data import tokenizer as tokenizer_lib
import numpy as np
import pytest
import sentencepiece
import tokenizers

CAPTIONS = ['a red circle', 'the small striped red circle', 'a blue star above a green tree', 'circle in red',
            'three objects: a red circle, a blue star and a green tree', "it's the 2nd big star", 'an ORANGE  mug'] * 3
TEXTS = ['a red circle', 'Red   Circle', "it's 42 stars!", '', 'ünïcödé 日本語 🙂 naïve', 'reddest circles;and-more...',
         'tab\tand\nline', 'x' * 50, "we'll they've don't"]
MERGES = ['r e', 're d</w>', 'c i', 'ci r', 'cir c', 'circ le</w>', 'l e</w>', 't h', 'th e</w>', 's t', 'st a',
          'sta r', 'star s</w>', 'a n', 'an d</w>', 'Ã ¼</w>', "' s</w>", '4 2</w>', '. .', '.. .</w>', 'x x', 'xx xx']


def write_merges(path, merges, header='"bpe_simple_vocab_16e6.txt#version: 0.2'):
  # 'circ le' must come after 'l e' for its parts to exist: order as a trainer would find them.
  ordered = sorted(merges, key=lambda m: len(m.replace('</w>', '')))
  path.write_bytes(gzip.compress('\n'.join([header, *ordered, '']).encode()))
  return [tuple(m.split()) for m in ordered]


# --- An independent, slow CLIP encoder, after the description in Radford et al. 2019 and 2021 ---


def slow_letters():
  keep = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b]
  table, extra = {}, 256
  for b in keep:
    table[b] = chr(b)
  for b in range(256):
    if b not in table:
      table[b] = chr(extra)
      extra += 1
  return table


def slow_words(text):
  words, i = [], 0
  kind = lambda c: ('space' if c.isspace() else 'L' if unicodedata.category(c)[0] == 'L' else
                    'N' if unicodedata.category(c)[0] == 'N' else 'other')
  while i < len(text):
    short = next((s for s in ("'re", "'ve", "'ll", "'s", "'t", "'m", "'d") if text.startswith(s, i)), None)
    if short:
      words.append(short)
      i += len(short)
      continue
    k = kind(text[i])
    j = i + 1
    while k in ('L', 'other') and j < len(text) and kind(text[j]) == k:
      j += 1
    if k != 'space':
      words.append(text[i:j])
    i = j
  return words


def slow_clip(text, merges):
  letters = slow_letters()
  vocab = [*letters.values()]
  vocab += [v + '</w>' for v in vocab] + [''.join(m) for m in merges] + ['<|startoftext|>', '<|endoftext|>']
  ids = [vocab.index('<|startoftext|>')]
  for word in slow_words(' '.join(text.lower().split())):
    symbols = [letters[b] for b in word.encode()]
    symbols[-1] += '</w>'
    while True:
      pairs = [(merges.index(p), i) for i, p in enumerate(zip(symbols, symbols[1:])) if p in merges]
      if not pairs:
        break
      _, i = min(pairs)
      symbols[i:i + 2] = [symbols[i] + symbols[i + 1]]
    ids += [vocab.index(s) for s in symbols]
  return ids + [vocab.index('<|endoftext|>')]


@pytest.fixture
def clip(tmp_path):
  path = tmp_path / 'bpe.txt.gz'
  merges = write_merges(path, MERGES)
  return tokenizer_lib.load(f'clip:{path}'), merges


def test_clip_equals_the_slow_loop(clip):
  tokenizer, merges = clip
  assert tokenizer.vocab_size == 512 + len(MERGES) + 2
  assert (tokenizer.bos_id, tokenizer.eos_id) == (tokenizer.vocab_size - 2, tokenizer.vocab_size - 1)
  tokens = tokenizer(TEXTS, length=80)
  assert tokens.ids.dtype == np.int32 and not tokens.truncated.any()
  for text, row in zip(TEXTS, tokens.ids):
    expected = slow_clip(text, merges)
    assert row.tolist() == expected + [0] * (80 - len(expected)), text
  merged = {n for text in TEXTS for n in slow_clip(text, merges) if 512 <= n < tokenizer.bos_id}
  assert len(merged) > 8  # the merges do take part


def test_clip_reads_hugging_face_folders_alike(clip, tmp_path):
  tokenizer, merges = clip
  vocab = json.loads(tokenizer.to_dict()['model'])['model']['vocab']
  (tmp_path / 'vocab.json').write_text(json.dumps(vocab))
  (tmp_path / 'merges.txt').write_text('#version: 0.2\n' + '\n'.join(map(' '.join, merges)) + '\n')
  other = tokenizer_lib.load(f'clip:{tmp_path}')
  assert (other(TEXTS, length=40).ids == tokenizer(TEXTS, length=40).ids).all()


def test_clip_unescapes_html_and_composes_accents(clip):
  tokenizer, _ = clip
  assert tokenizer.canonicalize(' Salt &amp;amp; Pepper\u00a0Cafe\u0301 ') == 'salt & pepper café'


@pytest.fixture(scope='module')
def piece_proto():
  out = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(CAPTIONS), model_writer=out, vocab_size=60, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
      hard_vocab_limit=False, minloglevel=2)
  return out.getvalue()


def test_sentencepiece_lowercases_and_ends(piece_proto, tmp_path):
  path = tmp_path / 't5.model'
  path.write_bytes(piece_proto)
  tokenizer = tokenizer_lib.load(f'sentencepiece:{path}')
  assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id) == (0, 1, None)
  reference = sentencepiece.SentencePieceProcessor(model_proto=piece_proto)
  for text, row in zip(TEXTS, tokenizer(TEXTS, length=128).ids):
    expected = [reference.piece_to_id(p) for p in reference.encode_as_pieces(text.lower())] + [1]
    assert row.tolist() == expected + [0] * (128 - len(expected))
  assert (tokenizer(['A RED circle'], length=9).ids == tokenizer(['a red circle'], length=9).ids).all()
  cased = tokenizer_lib.load(f'sentencepiece:{path}', lowercase=False)
  assert (cased(['A RED circle'], length=9).ids != cased(['a red circle'], length=9).ids).any()


def test_sentencepiece_without_a_padding_piece(tmp_path):
  out = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CAPTIONS), model_writer=out, vocab_size=60,
                                           hard_vocab_limit=False, minloglevel=2)
  (tmp_path / 'm.model').write_bytes(out.getvalue())
  tokenizer = tokenizer_lib.load(f'sentencepiece:{tmp_path / "m.model"}')
  assert tokenizer.pad_id == 0 and tokenizer.eos_id == 2


def word_level(template, special):
  words = ['[UNK]', 'a', 'red', 'circle', 'blue', 'star', *special]
  t = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token='[UNK]'))
  t.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  t.add_special_tokens(special)
  if template:
    t.post_processor = tokenizers.processors.TemplateProcessing(
        single=template, special_tokens=[(s, words.index(s)) for s in special])
  t.enable_truncation(3)
  t.enable_padding(length=7)
  return t, words


@pytest.mark.parametrize('template, special, start, end', [
    ('[CLS] $A [SEP]', ['[PAD]', '[CLS]', '[SEP]'], ['[CLS]'], '[SEP]'),
    ('$A </s>', ['<pad>', '</s>'], [], '</s>'),
    ('<bos> $A', ['<pad>', '<bos>', '<eos>'], ['<bos>'], '<eos>'),
    (None, ['<pad>', '<|endoftext|>'], [], '<|endoftext|>'),
])
def test_hugging_face_file_with_its_marks(tmp_path, template, special, start, end):
  original, words = word_level(template, special)
  original.save(str(tmp_path / 'tokenizer.json'))
  tokenizer = tokenizer_lib.load(f'hf:{tmp_path / "tokenizer.json"}')
  expected = [words.index(w) for w in [*start, 'a', 'red', '[UNK]', 'circle', 'star', end]]
  row = tokenizer(['A red xyz circle star'], length=10).ids[0].tolist()
  assert row[:len(expected)] == expected and set(row[len(expected):]) == {tokenizer.pad_id}
  assert tokenizer.vocab_size == len(words)


def test_an_end_mark_spelt_out_in_the_text_does_not_end_it(tmp_path):
  original, _ = word_level('$A </s>', ['<pad>', '</s>'])
  original.save(str(tmp_path / 'tokenizer.json'))
  trained = tokenizer_lib.train(CAPTIONS)
  for tokenizer in (tokenizer_lib.load(f'hf:{tmp_path / "tokenizer.json"}'), trained):
    row = tokenizer(['red </s> circle <eos> star'], length=40).ids[0]
    assert (row == tokenizer.eos_id).sum() == 1
    assert row[row.tolist().index(tokenizer.eos_id) + 1:].tolist().count(tokenizer.pad_id) > 10


@pytest.fixture(scope='module')
def trained():
  return tokenizer_lib.train(CAPTIONS, vocab_size=400)


def test_trained_words_are_single_ids_wherever_they_stand(trained):
  ids = trained(['red circle', 'circle red', 'a red circle'], length=6).ids
  red, circle = ids[0, :2]
  assert ids[1, :3].tolist() == [circle, red, trained.eos_id]
  assert ids[2, 1:4].tolist() == [red, circle, trained.eos_id]
  assert trained.vocab_size <= 400


def test_trained_falls_back_to_bytes_and_loses_nothing(trained):
  texts = ['ünïcödé', '日本語 🙂', 'zebra', '\x00\x7f', 'a\ud800b']
  tokens = trained(texts, length=64)
  backend = tokenizers.Tokenizer.from_str(trained.to_dict()['model'])
  for text, row in zip(texts, tokens.ids):
    body = row[:row.tolist().index(trained.eos_id)]
    assert backend.decode(body.tolist()).strip() == trained.canonicalize(text).replace('\ud800', '?')
  assert tokens.ids.max() < trained.vocab_size


def test_training_is_deterministic_across_order_and_processes(trained):
  assert tokenizer_lib.train(reversed(CAPTIONS), vocab_size=400).to_dict() == trained.to_dict()
  code = ('import json, sys; from cloc_jax.data import tokenizer as t; '
          'print(json.dumps(t.train(json.load(sys.stdin), vocab_size=400).to_dict()))')
  out = subprocess.run([sys.executable, '-c', code], input=json.dumps(CAPTIONS), capture_output=True, text=True,
                       check=True)
  assert json.loads(out.stdout) == trained.to_dict()


@pytest.fixture(params=['clip', 'sentencepiece', 'hf', 'trained'])
def each(request, tmp_path, piece_proto):
  if request.param == 'trained':
    return tokenizer_lib.train(CAPTIONS)
  path = tmp_path / 'file'
  if request.param == 'clip':
    write_merges(path, MERGES)
  elif request.param == 'sentencepiece':
    path.write_bytes(piece_proto)
  else:
    word_level('[CLS] $A [SEP]', ['[PAD]', '[CLS]', '[SEP]'])[0].save(str(path))
  return tokenizer_lib.load(f'{request.param}:{path}')


def test_every_row_ends_once_and_stays_in_the_vocabulary(each):
  for length in (2, 5, 16):
    tokens = each(TEXTS, length=length)
    whole = each(TEXTS, length=200)
    assert tokens.ids.shape == (len(TEXTS), length) and tokens.truncated.shape == (len(TEXTS),)
    assert tokens.ids.min() >= 0 and tokens.ids.max() < each.vocab_size and not whole.truncated.any()
    for short, long, cut in zip(tokens.ids, whole.ids, tokens.truncated):
      assert (short == each.eos_id).sum() == 1
      end, full = (row.tolist().index(each.eos_id) for row in (short, long))
      assert cut == (full >= length)
      assert end == min(full, length - 1)
      assert (short[:end] == long[:end]).all()
      assert (short[end + 1:] == each.pad_id).all()


def test_empty_text_and_empty_list(each):
  marks = [each.eos_id] if each.bos_id is None else [each.bos_id, each.eos_id]
  for text in ('', '  \n '):
    assert each([text], length=4).ids[0].tolist() == marks + [each.pad_id] * (4 - len(marks))
  assert each([], length=4).ids.shape == (0, 4)


def test_saved_state_is_json_and_self_contained(each, tmp_path):
  state = json.loads(json.dumps(each.to_dict()))
  (tmp_path / 'own.json').write_text(json.dumps(state))
  for other in (tokenizer_lib.Tokenizer.from_dict(state), tokenizer_lib.load(f'json:{tmp_path / "own.json"}'),
                pickle.loads(pickle.dumps(each))):
    assert (other(TEXTS, length=20).ids == each(TEXTS, length=20).ids).all()
    assert other.to_dict() == each.to_dict()
    assert other.canonicalize(' A  B ') == each.canonicalize(' A  B ') == 'a b'
    for key in ('name', 'vocab_size', 'pad_id', 'eos_id', 'bos_id'):
      assert getattr(other, key) == getattr(each, key)


def test_the_cache_changes_nothing(each, monkeypatch):
  monkeypatch.setattr(tokenizer_lib, '_CACHE_SIZE', 4)
  expected = [each([text], length=12).ids[0].tolist() for text in TEXTS]
  for _ in range(3):
    assert each(TEXTS + TEXTS[::-1], length=12).ids.tolist() == expected + expected[::-1]
    assert len(each._cache) <= max(4, len(TEXTS))
  short = each(TEXTS, length=3)
  assert short.truncated.any() and each(TEXTS, length=12).ids.tolist() == expected


def test_words_are_encoded_as_they_are_in_their_texts(each):
  """CLIP's and trained vocabularies keep words apart; what is not known to do so is encoded text by text."""
  rng = np.random.default_rng(0)
  letters = list("aeéñüst'’.,;-!&<>/0129日本🙂\u0301\u200b\ud800\u00ad") + ['red', 'circle', "it's", '<eos>', '<pad>']
  blanks = [' ', '  ', '\t', '\n', '\u00a0', '\u2003', '\u3000', '\x85', '\x1f']
  texts = list(TEXTS)
  for _ in range(300):
    parts = [(letters if rng.random() < 0.75 else blanks) for _ in range(rng.integers(0, 14))]
    texts.append(''.join(str(rng.choice(part)) for part in parts))
  whole = each._model.encode([tokenizer_lib._encodable(each.canonicalize(text)) for text in texts])
  ids = np.concatenate([each([text], length=80).ids for text in texts])
  start = 0 if each.bos_id is None else 1
  for text, want, row in zip(texts, whole, ids.tolist()):
    want = [n for n in want if n != each.eos_id]
    assert row[start:start + len(want) + 1] == [*want, each.eos_id], repr(text)


def test_wrong_calls(trained, clip):
  with pytest.raises(TypeError, match="single string 'red'"):
    trained('red', length=4)
  with pytest.raises(TypeError, match=r'texts\[1\].*NoneType'):
    trained(['red', None], length=4)
  with pytest.raises(TypeError, match=r'texts\[0\].*bytes'):
    trained([b'red'], length=4)
  with pytest.raises(ValueError, match='at least 2'):
    clip[0](['red'], length=1)
  with pytest.raises(ValueError, match='at least 258'):
    tokenizer_lib.train(CAPTIONS, vocab_size=100)
  with pytest.raises(ValueError, match='no text'):
    tokenizer_lib.train(['', ' '])
  with pytest.raises(TypeError, match='single one'):
    tokenizer_lib.train('a red circle')


@pytest.mark.parametrize('spec, message', [
    ('clop:/x', "did you mean 'clip:PATH'"), ('/some/file', 'sentencepiece:PATH'), ('hf:', 'hf:PATH'),
    ('hf:/no/such/folder/t.json', '/no/such/folder/t.json')])
def test_wrong_specs(spec, message):
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    tokenizer_lib.load(spec)


def test_a_misspelt_file_names_its_neighbour(tmp_path):
  (tmp_path / 'tokenizer.json').write_text('{}')
  with pytest.raises(FileNotFoundError, match='did you mean .*tokenizer.json'):
    tokenizer_lib.load(f'hf:{tmp_path / "tokeniser.json"}')


GOOD_GZIP = gzip.compress(b'#version\na b\n' * 50, mtime=0)


@pytest.mark.parametrize('kind, content, message', [
    ('clip', GOOD_GZIP[:-12], 'damaged or cut short'),
    ('clip', gzip.compress(b'#version: 0.2\na b\na b c\n', mtime=0), 'line 3: expected two symbols'),
    ('clip', gzip.compress(b'a b\nc d\n', mtime=0), '#version'),
    ('clip', b'\xff\xfe\x00', 'expected a text file'),
    ('clip', b'#version: 0.2\nab cd\n', 'do not fit the vocabulary'),
    ('sentencepiece', b'not a model', 'expected a SentencePiece'),
    ('sentencepiece', b'', 'expected a SentencePiece'),
    ('hf', b'{"version": "1.0"', 'tokenizer.json'),
    ('hf', b'\xff\xff', 'tokenizer.json'),
    ('json', b'[1, 2]', 'got list'),
    ('json', b'{"format": 1}', "lacks .*'kind'"),
    ('json', b'nonsense', 'saved by this project'),
])
def test_corrupt_files_are_named(tmp_path, kind, content, message):
  path = tmp_path / 'broken.file'
  path.write_bytes(content)
  with pytest.raises(ValueError, match=message) as e:
    tokenizer_lib.load(f'{kind}:{path}')
  assert str(path) in str(e.value)


def test_incomplete_clip_folders_are_named(tmp_path):
  (tmp_path / 'merges.txt').write_text('#version: 0.2\n')
  with pytest.raises(FileNotFoundError, match='vocab.json'):
    tokenizer_lib.load(f'clip:{tmp_path}')
  (tmp_path / 'vocab.json').write_text('{"a": 0}')
  with pytest.raises(ValueError, match='basic entries are missing'):
    tokenizer_lib.load(f'clip:{tmp_path}')


@pytest.mark.parametrize('change, message', [
    (dict(format=99), 'upgrade'), (dict(kind='magic'), "kind 'magic'"), (dict(model='{"a"'), 'cannot be read'),
    (dict(eos_id=10**6), 'outside its'), (dict(canonicalize=['rot13']), 'rot13')])
def test_damaged_state_says_what_is_wrong(trained, change, message):
  with pytest.raises(ValueError, match=message):
    tokenizer_lib.Tokenizer.from_dict(trained.to_dict() | change)


def test_a_damaged_embedded_model(piece_proto, tmp_path):
  (tmp_path / 'm.model').write_bytes(piece_proto)
  state = tokenizer_lib.load(f'sentencepiece:{tmp_path / "m.model"}').to_dict()
  for model in ('%%%', state['model'][:40]):
    with pytest.raises(ValueError, match='cannot be read'):
      tokenizer_lib.Tokenizer.from_dict(state | {'model': model})
