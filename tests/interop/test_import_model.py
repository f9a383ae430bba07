"""Foreign folders and files imported into our models: embeddings, token ids and pixels as theirs, and clear refusals."""
import json
import shutil

import jax
import numpy as np
import pytest

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

import foreign_models as foreign  # noqa: E402
import ml_dtypes  # noqa: E402
import safetensors.numpy  # noqa: E402

import cloc_jax  # noqa: E402
from cloc_jax import encoders, initialize, trees  # noqa: E402
from cloc_jax.data import clip_vocabulary  # noqa: E402
from cloc_jax.interop import huggingface, openai, source, weight_files  # noqa: E402

TEXTS = ['a red dog', 'Blue  CAT', 'a red dog on a blue cat and a red cat and a dog', 'zebra', '']
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
FAMILIES = ('clip', 'siglip', 'siglip2')


@pytest.fixture(name='folders', scope='module')
def folders_fixture(tmp_path_factory):
  """family → a folder as transformers writes it, with a word-level tokenizer ."""
  out = {}
  for family in FAMILIES:
    folder = tmp_path_factory.mktemp(family)
    foreign.model(family, **(dict(eos=2) if family == 'clip' else {})).save_pretrained(folder)
    config = json.loads((folder / 'config.json').read_text())
    if family == 'clip':  # the end token's id is the largest, which is what the sign 2 stands for
      config['text_config']['eos_token_id'] = 2
    (folder / 'config.json').write_text(json.dumps(config))
    TOKENIZERS[family](folder)
    (folder / 'preprocessor_config.json').write_text(json.dumps(dict(image_mean=MEAN, image_std=STD)))
    out[family] = folder
  return out


LETTERS = 'abcdefghijklmnopqrstuvwxyz'
WORDS = 'red dog blue cat on and'.split()


def clip_tokenizer(folder):
  """CLIP's own, with the letters of all bytes and a few words; the end token has the largest id."""
  letters = clip_vocabulary.byte_letters()
  merges = [('r', 'e'), ('re', 'd</w>'), ('c', 'a'), ('ca', 't</w>')]
  tokens = [*letters, *(c + '</w>' for c in letters), *(a + b for a, b in merges)]
  tokens += [f'unused {i}' for i in range(foreign.VOCABULARY - 2 - len(tokens))] + ['<|startoftext|>', '<|endoftext|>']
  transformers.CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=merges).save_pretrained(folder)


def siglip_tokenizer(folder):
  """SigLIP's: a SentencePiece model, as T5 has, trained on a few words."""
  import sentencepiece
  texts = folder / 'texts.txt'
  texts.write_text('\n'.join([*TEXTS, ' '.join(WORDS), ' '.join(LETTERS)] * 20).lower())
  sentencepiece.SentencePieceTrainer.train(
      input=str(texts), model_prefix=str(folder / 'spiece'), vocab_size=40, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
      minloglevel=2, hard_vocab_limit=False)
  transformers.SiglipTokenizer(str(folder / 'spiece.model')).save_pretrained(folder)


def siglip2_tokenizer(folder):
  """SigLIP 2's: Gemma's BPE with an end token, padded with 0 on the right."""
  vocabulary = {token: i for i, token in enumerate(['<pad>', '<eos>', '<bos>', '<unk>', '<mask>', '▁', *LETTERS])}
  merges = [('r', 'e'), ('re', 'd'), ('▁', 'd')]
  vocabulary |= {a + b: len(vocabulary) + i for i, (a, b) in enumerate(merges)}
  transformers.Siglip2Tokenizer(vocab=vocabulary, merges=merges, add_bos_token=False, add_eos_token=True,
                                padding_side='right').save_pretrained(folder)


TOKENIZERS = {'clip': clip_tokenizer, 'siglip': siglip_tokenizer, 'siglip2': siglip2_tokenizer}


@pytest.mark.parametrize('family', FAMILIES)
def test_an_imported_folder_embeds_as_transformers_does(folders, family, tmp_path):
  theirs = huggingface.load(folders[family], device='cpu')
  cloc, report = initialize.import_model(f'hf:{folders[family]}')
  images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
  want = theirs.encode_image(images)
  got = cloc.encode_image(list(images))
  np.testing.assert_allclose(got.z, want.z, atol=1e-5)
  np.testing.assert_allclose(got.embedding.tokens[:2], want.tokens, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(cloc.functions.embed_patches(cloc.params, got.embedding)[:2],
                             theirs.embed_patches(want), rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(cloc.encode_text(TEXTS), theirs.encode_text(TEXTS), atol=1e-5)
  np.testing.assert_allclose(cloc.encode_text(TEXTS, region=True), theirs.encode_text(TEXTS), atol=1e-5)
  assert not report.fresh and not report.resized and len(report.loaded) == len(foreign.state(theirs.model))
  initialize.save(cloc, tmp_path / 'ours')
  again = cloc_jax.load(tmp_path / 'ours')
  np.testing.assert_array_equal(again.encode_image(list(images)).z, got.z)
  np.testing.assert_array_equal(again.encode_text(TEXTS), cloc.encode_text(TEXTS))
  assert again.info['imported']['from'] == f'hf:{folders[family]}'
  with pytest.raises(FileExistsError, match='holds checkpoints already'):
    initialize.save(cloc, tmp_path / 'ours')


@pytest.mark.parametrize('family', FAMILIES)
def test_token_ids_are_exactly_theirs(folders, family):
  theirs = transformers.AutoTokenizer.from_pretrained(folders[family])
  ours = source.open_source(f'hf:{folders[family]}').tokenizer
  rng = np.random.default_rng(0)
  alphabet = list(LETTERS + LETTERS.upper() + '     \n\t.,!_é&;')
  texts = [*TEXTS, 'Zwei  RED\tdogs!', *(''.join(rng.choice(alphabet, rng.integers(1, 30))) for _ in range(200))]
  want = [theirs(text, padding='max_length', truncation=True, max_length=9)['input_ids']
          for text in (texts if family == 'clip' else [t.lower() for t in texts])]
  got = ours(texts, length=9)
  assert got.truncated.any() and not got.truncated.all()
  np.testing.assert_array_equal(got.ids, want)
