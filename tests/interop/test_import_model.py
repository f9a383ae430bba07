"""Foreign folders and files imported into our models: embeddings and token ids as theirs, and clear refusals."""
import json
import os
import pickle
import shutil
import zipfile

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


def save(folder, state):
  folder.mkdir(exist_ok=True)
  safetensors.numpy.save_file(state, folder / 'model.safetensors')


@pytest.fixture(name='copy')
def copy_fixture(folders, tmp_path):
  """A copy of CLIP's folder and its arrays."""
  folder = tmp_path / 'copy'
  shutil.copytree(folders['clip'], folder)
  return folder, dict(weight_files.read(folder / 'model.safetensors'))


def test_damaged_and_alien_weights_are_named(copy, folders):
  folder, state = copy
  path, bias = folder / 'model.safetensors', 'text_model.encoder.layers.1.mlp.fc1.bias'
  fails = lambda match: pytest.raises(ValueError, match=match)
  with fails(r'! text_model.encoder.layers.1.mlp.fc1.bias: expected floating-point numbers, got int8'):
    save(folder, {**state, bias: np.zeros(80, np.int8)})
    initialize.import_model(f'hf:{folder}')
  with fails(r'model.safetensors: .*\n! text_model.encoder.layers.1.mlp.fc1.bias: 3 of 80 numbers are not finite'):
    save(folder, {**state, bias: np.where(np.arange(80) < 3, np.nan, 0).astype(np.float32)})
    initialize.import_model(f'hf:{folder}')
  with fails(r'! text_model.encoder.layers.1.mlp.fc1.bias: expected \(80,\), got \(79,\)'):
    save(folder, {**state, bias: np.zeros(79, np.float32)})
    initialize.import_model(f'hf:{folder}')
  with fails(r'- text_model.encoder.layers.1.mlp.fc1.bias\n\+ encoder.fc1.bias \(80,\)'):
    save(folder, {'encoder.fc1.bias' if k == bias else k: v for k, v in state.items()})
    initialize.import_model(f'hf:{folder}')
  with fails('model.safetensors: a damaged or cut safetensors file'):
    whole = path.read_bytes()
    path.write_bytes(whole[:-50])
    initialize.import_model(f'hf:{folder}')
  with fails(r'- vision_model.head.probe'):
    shutil.copy(folders['siglip'] / 'config.json', folder / 'config.json')
    save(folder, state)
    initialize.import_model(f'hf:{folder}', tokenizer=f'siglip:{folders["siglip"] / "spiece.model"}')


def test_half_precision_shards_and_what_is_skipped(copy):
  folder, state = copy
  want, _ = initialize.import_model(f'hf:{folder}')
  (folder / 'model.safetensors').unlink()
  half = {k: v.astype(ml_dtypes.bfloat16 if 'vision' in k else np.float16) for k, v in state.items()}
  half['text_model.embeddings.position_ids'] = np.arange(9)[None]
  half['text_filip_projection.weight'] = np.zeros((24, 32), np.float32)
  names = sorted(half)
  for i, part in enumerate((names[::2], names[1::2])):
    safetensors.numpy.save_file({k: half[k] for k in part}, folder / f'model-{i}.safetensors')
  index = {'weight_map': {k: f'model-{i % 2}.safetensors' for i, k in enumerate(names)}}
  (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
  got, report = initialize.import_model(f'hf:{folder}')
  for (path, x), y in zip(trees.flatten(got.params).items(), trees.flatten(want.params).values()):
    assert np.asarray(x).dtype == np.float32
    np.testing.assert_allclose(x, y, rtol=1e-2, atol=1e-2, err_msg=path)
  assert '(bfloat16, float16 → float32)' in report.summary()
  assert set(report.skipped) == {'text_model.embeddings.position_ids', 'text_filip_projection.weight'}
  (folder / 'model-1.safetensors').unlink()
  with pytest.raises(FileNotFoundError, match='model-1.safetensors: no such file'):
    initialize.import_model(f'hf:{folder}')


class Nested(torch.nn.Module):
  """Modules in modules, a transposed parameter, buffers of other kinds: what a TorchScript archive has to keep."""

  def __init__(self):
    super().__init__()
    self.visual = torch.nn.Linear(3, 2).half()
    self.proj = torch.nn.Parameter(torch.arange(12.).reshape(3, 4).T)
    self.register_buffer('vocab_size', torch.tensor(49408))
    self.sizes = [1, 2]

  def forward(self, x):
    return self.visual(x)


def test_torchs_files_are_read_and_nothing_in_them_is_run(tmp_path, monkeypatch):
  module = Nested()
  torch.jit.script(module).save(str(tmp_path / 'archive.pt'))
  with pytest.raises(Exception):
    torch.load(tmp_path / 'archive.pt', weights_only=True)
  found = weight_files.read(tmp_path / 'archive.pt')
  want = {k: v.numpy() for k, v in module.state_dict().items()}
  assert set(found) == set(want)
  for name, x in want.items():
    np.testing.assert_array_equal(found[name], x, strict=True)
  torch.save({'epoch': 3, 'state_dict': {f'module.{k}': v.bfloat16() for k, v in module.state_dict().items()}},
             tmp_path / 'epoch.pt')
  found = weight_files.read(tmp_path / 'epoch.pt')
  assert set(found) == set(want) and found['proj'].dtype == ml_dtypes.bfloat16
  np.testing.assert_array_equal(found['proj'].astype(np.float32), want['proj'])

  class Evil:
    def __reduce__(self):
      return os.mkdir, (str(tmp_path / 'ran'),)

  torch.save({'a': torch.ones(2), 'b': Evil()}, tmp_path / 'evil.pt')
  with pytest.raises(ValueError, match='evil.pt: cannot be read as plain weights'):
    weight_files.read(tmp_path / 'evil.pt')
  with zipfile.ZipFile(tmp_path / 'archive.pt') as old, zipfile.ZipFile(tmp_path / 'evil2.pt', 'w') as new:
    for name in old.namelist():
      new.writestr(name, pickle.dumps(Evil()) if name.endswith('/data.pkl') else old.read(name))
  with pytest.raises(ValueError, match='evil2.pt: its pickle names posix.mkdir'):
    weight_files.read(tmp_path / 'evil2.pt')
  assert not (tmp_path / 'ran').exists()
  (tmp_path / 'cut.pt').write_bytes((tmp_path / 'archive.pt').read_bytes()[:-100])
  with pytest.raises(ValueError, match='cut.pt: cannot be read'):
    weight_files.read(tmp_path / 'cut.pt')
  (tmp_path / 'cut.npz').write_bytes(b'PK\x03\x04 and no more')
  with pytest.raises(ValueError, match='cut.npz: a damaged or cut npz file'):
    weight_files.read(tmp_path / 'cut.npz')
  with pytest.raises(ValueError, match='expected weights with one of the suffixes'):
    (tmp_path / 'x.ckpt').write_bytes(b'')
    weight_files.read(tmp_path / 'x.ckpt')


def test_positions_are_resampled_as_open_clip_does():
  from cloc_jax.models import posemb
  table = np.random.default_rng(0).normal(size=(1, 50, 8)).astype(np.float32)
  for side in (4, 10):
    grid = torch.tensor(table[:, 1:].reshape(1, 7, 7, 8).transpose(0, 3, 1, 2))
    want = torch.nn.functional.interpolate(grid, (side, side), mode='bicubic', antialias=True, align_corners=False)
    want = np.concatenate([table[:, :1], want.numpy().transpose(0, 2, 3, 1).reshape(1, -1, 8)], 1)
    np.testing.assert_allclose(posemb.resample(table, patches=side**2 + 1), want, atol=2e-5)
  with pytest.raises(ValueError, match='expected a square grid'):
    posemb.resample(table, patches=16)


def test_openais_archive_is_an_encoder(folders, tmp_path):
  cloc, _ = initialize.import_model(f'hf:{folders["clip"]}')
  state = openai.from_jax(cloc.params)
  torch.save({k: torch.tensor(v) for k, v in state.items()}, tmp_path / 'ours.pt')
  for name in ('tokenizer.json', 'tokenizer_config.json'):
    shutil.copy(folders['clip'] / name, tmp_path / name)
  found = source.open_source(f'openai:{tmp_path / "ours.pt"}')
  assert found.spec.image['heads'] == 1  # by their rule of 64 a head
  assert (found.spec.image_size, found.spec.text_length, found.spec.embed_dim) == (32, 9, 24)
  again = openai.from_jax(found.convert(expected=None, parts='both').params)
  jax.tree.map(np.testing.assert_array_equal, again, state)
  only = found.convert(expected=None, parts='image')
  assert set(only.params) == {'img'} and set(only.skipped.values()) == {"init_parts is 'image'"}
  encoder = encoders.load(f'openai:{tmp_path / "ours.pt"}')
  assert encoder.image_size == 32 and encoder.fns.encode_text(['a red dog'], region=False).shape == (1, 24)
  (tmp_path / 'tokenizer.json').unlink()
  with pytest.raises(FileNotFoundError, match='no tokenizer beside it; give one with --tokenizer'):
    encoders.load(f'openai:{tmp_path / "ours.pt"}')
