"""The processor and tokenizer of exported folders against the training pipeline: pixels, boxes and ids."""
import html
import importlib.util
import io
import json
import pathlib

import numpy as np
import PIL.Image
import pytest

transformers = pytest.importorskip('transformers')
pytest.importorskip('torch')

from cloc_jax import geometry as geometry_lib  # noqa: E402
from cloc_jax import interop  # noqa: E402
from cloc_jax.data import clip_vocabulary, tokenizer as tokenizer_lib, transforms  # noqa: E402
from cloc_jax.interop import tokenizer_json  # noqa: E402


@pytest.fixture(name='processing', scope='module')
def processing_fixture():
  path = pathlib.Path(interop.__file__).parent / 'torch_model' / 'processing_cloc.py'
  spec = importlib.util.spec_from_file_location('processing_cloc', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_pixels_of_photos_are_those_of_training(processing, coco_mini):
  files = sorted((coco_mini / 'val2017').glob('*.jpg'))[:8]
  for i, path in enumerate(files):
    data = path.read_bytes()
    ours, theirs = transforms.decode(data, where=path.name), processing.to_rgb(PIL.Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(ours, theirs)
    for canvas in (72, 224, 336, 320, 800)[i % 2::2]:
      want, _ = transforms.prepare_image(ours, image_size=canvas)
      np.testing.assert_array_equal(processing.resize_with_pad(theirs, canvas), want)


@pytest.mark.parametrize('pad', geometry_lib.PAD_MODES)
def test_pixels_and_boxes_of_any_size(processing, pad):
  rng = np.random.default_rng(0)
  for _ in range(80):
    (height, width), canvas = rng.integers(1, 160, 2), int(rng.integers(2, 200))
    image = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    want, geometry = transforms.prepare_image(image, image_size=canvas, pad=pad)
    np.testing.assert_array_equal(processing.resize_with_pad(image, canvas, pad), want, err_msg=str(geometry))
    boxes = np.sort(rng.random((5, 2, 2)), 1).reshape(5, 4) * [width, height, width, height]
    size = (int(height), int(width))
    on_canvas = processing.boxes_to_canvas(boxes, size, canvas, pad)
    np.testing.assert_array_equal(on_canvas, geometry.boxes_to_canvas(boxes))
    back = processing.boxes_from_canvas(on_canvas, size, canvas, pad)
    np.testing.assert_allclose(back, boxes, atol=1e-4 * width + 1e-4)
    outside = rng.random((5, 4)) * 1.4 - 0.2
    np.testing.assert_allclose(processing.boxes_from_canvas(outside, size, canvas, pad),
                               geometry.boxes_from_canvas(outside), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize('factor', [2, 3, 4])
def test_whole_factors(processing, factor):
  image = np.random.default_rng(0).integers(0, 256, (24 * factor, 16 * factor, 3)).astype(np.uint8)
  want, _ = transforms.prepare_image(image, image_size=24)
  np.testing.assert_array_equal(processing.resize_with_pad(image, 24), want)


@pytest.mark.parametrize('mode', ['L', 'LA', 'P', 'RGBA', 'CMYK', 'I;16', '1'])
def test_modes_of_pillow_become_rgb_alike(processing, mode):
  pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3)).astype(np.uint8)
  image = PIL.Image.fromarray(pixels)
  image = PIL.Image.fromarray(pixels[..., 0].astype(np.uint16) * 200) if mode == 'I;16' else image.convert(mode)
  np.testing.assert_array_equal(processing.to_rgb(image), transforms.as_rgb(image))


def test_exif_orientation_is_applied(processing):
  image, out = PIL.Image.fromarray(np.arange(60, dtype=np.uint8).reshape(4, 5, 3)), io.BytesIO()
  exif = PIL.Image.Exif()
  exif[0x0112] = 6
  image.save(out, 'PNG', exif=exif)
  turned = processing.to_rgb(PIL.Image.open(out))
  assert turned.shape == (5, 4, 3)
  np.testing.assert_array_equal(turned, transforms.as_rgb(PIL.Image.open(out)))


# --- Tokenizers ---

TEXTS = ['a small dog', 'Two  DOGS &amp; a\tcat!', "it's 25 o'clock", 'naïve café', 'ΟΔΟΣ ΣΑΣ', 'İ x\x1cy\u00a0z',
         '日本の猫', '🙂', '', ' ', 'dog ' * 30, '½ ﬁne Å', 'a\u0301b']
SPELT = ['<pad> dog', 'a </s> dog', '<eos>dog', 'a<|endoftext|>dog', 'dog! dog!']


def _clip(folder):
  letters = clip_vocabulary.byte_letters()
  merges = [('d', 'o'), ('do', 'g</w>'), ('c', 'a'), ('ca', 't</w>'), ('t', 'w')]
  tokens = [*letters, *(c + '</w>' for c in letters), *(a + b for a, b in merges), clip_vocabulary.BOS,
            clip_vocabulary.EOS]
  (folder / 'vocab.json').write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
  (folder / 'merges.txt').write_text('#version: 0.2\n' + '\n'.join(' '.join(m) for m in merges))
  return tokenizer_lib.load(f'clip:{folder}')


def _pieces(folder, model_type, **options):
  import sentencepiece
  out = io.BytesIO()
  captions = [f'a {size} {color} {thing} and two dogs, {color}!' for size in ('small', 'large')
              for color in ('red', 'green', 'blue') for thing in ('cat', 'square', 'dog on a mat')]
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(captions * 20), model_writer=out, vocab_size=60 if 'byte_fallback' not in options else 320,
      model_type=model_type, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2, hard_vocab_limit=False, **options)
  (folder / 'm.model').write_bytes(out.getvalue())
  return tokenizer_lib.load(f'sentencepiece:{folder / "m.model"}')


def _word_level(folder):
  import tokenizers
  vocabulary = {'<pad>': 0, '<s>': 1, '</s>': 2, '<unk>': 3, 'dog': 4, 'a': 5, 'cat': 6}
  fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token='<unk>'))
  fast.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  fast.post_processor = tokenizers.processors.TemplateProcessing(
      single='<s> $A </s>', special_tokens=[('<s>', 1), ('</s>', 2)])
  fast.save(str(folder / 't.json'))
  return tokenizer_lib.load(f'hf:{folder / "t.json"}')


KINDS = {
    'trained': lambda folder: tokenizer_lib.train(['a small dog and two cats'] * 3, vocab_size=280),
    'clip': _clip,
    'unigram': lambda folder: _pieces(folder, 'unigram'),
    'unigram with bytes': lambda folder: _pieces(folder, 'unigram', byte_fallback=True,
                                                 normalization_rule_name='identity'),
    'bpe': lambda folder: _pieces(folder, 'bpe'),
    'bpe with bytes': lambda folder: _pieces(folder, 'bpe', byte_fallback=True, normalization_rule_name='identity'),
    'word level': _word_level,
}


@pytest.mark.parametrize('kind', KINDS)
def test_ids_are_ours(kind, tmp_path, processing):
  tokenizer = KINDS[kind](tmp_path)
  folder = tmp_path / 'out'
  folder.mkdir()
  tokenizer_json.write(tokenizer, folder, length=16, pads_matter=True)
  loaded = transformers.AutoTokenizer.from_pretrained(folder)
  texts = [html.unescape(text) for text in TEXTS]
  want = tokenizer(texts, length=16).ids
  got = loaded(texts, padding='max_length', truncation=True, return_tensors='np')['input_ids']
  np.testing.assert_array_equal(got, want)
  assert len(np.unique(want)) > 5 and loaded.model_max_length == 16
  # The processor is exact also on marks that are spelt out, and on HTML entities.
  processor = processing.ClocProcessor(processing.ClocImageProcessor(), loaded, text_length=16, region_text_length=5,
                                       unescape_html='html' in tokenizer.steps)
  texts = TEXTS + (SPELT if kind in ('trained', 'clip') else SPELT[-1:])
  np.testing.assert_array_equal(processor(text=texts)['input_ids'], tokenizer(texts, length=16).ids)
  np.testing.assert_array_equal(processor(text=texts, region=True)['input_ids'], tokenizer(texts, length=5).ids)


def test_clip_class_pads_with_the_end_mark(tmp_path):
  tokenizer = _clip(tmp_path)
  folder = tmp_path / 'out'
  folder.mkdir()
  tokenizer_json.write(tokenizer, folder, length=16, pads_matter=False, clip_class=True)
  loaded = transformers.AutoTokenizer.from_pretrained(folder)
  assert type(loaded).__name__.startswith('CLIPTokenizer')
  texts = ['a small dog!', 'Two cats', "it's"]
  want = tokenizer(texts, length=16).ids
  after = np.cumsum(want == tokenizer.eos_id, 1) > 0
  got = loaded(texts, padding='max_length', truncation=True, return_tensors='np')['input_ids']
  np.testing.assert_array_equal(got, np.where(after, tokenizer.eos_id, want))


def test_a_sentencepiece_model_of_words_is_refused(tmp_path):
  import sentencepiece
  out = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(['a dog and a cat'] * 9), model_writer=out,
                                           vocab_size=7, model_type='word', minloglevel=2)
  (tmp_path / 'm.model').write_bytes(out.getvalue())
  with pytest.raises(ValueError, match='of type 3; expected 1'):
    tokenizer_json.convert(tokenizer_lib.load(f'sentencepiece:{tmp_path / "m.model"}'))
