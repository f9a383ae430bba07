"""Foreign encoders against transformers itself, on tiny models of random weights."""
import json

import numpy as np
import pytest

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

from cloc_jax import encoders  # noqa: E402
from cloc_jax.interop import huggingface  # noqa: E402

TEXTS = ['a red dog', 'Blue cat', 'a red dog on a blue cat and a red cat', 'zebra']
WORDS = 'a red dog blue cat on and'.split()
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


def clip_config():
  return transformers.CLIPConfig(
      text_config=dict(SIZES, vocab_size=40, max_position_embeddings=9, eos_token_id=2, bos_token_id=1),
      vision_config=dict(SIZES, image_size=32, patch_size=8), projection_dim=24)


def siglip_config():
  return transformers.SiglipConfig(
      text_config=dict(SIZES, vocab_size=40, max_position_embeddings=9, projection_size=32),
      vision_config=dict(SIZES, image_size=35, patch_size=8))  # three pixels are covered by no patch


def siglip2_config():
  return transformers.Siglip2Config(
      text_config=dict(SIZES, vocab_size=40, max_position_embeddings=9, projection_size=32),
      vision_config=dict(SIZES, num_patches=16, patch_size=8))


CONFIGS = {'clip': clip_config, 'siglip': siglip_config, 'siglip2': siglip2_config}


def write_tokenizer(folder):
  import tokenizers
  vocabulary = {'<pad>': 0, '<s>': 1, '</s>': 2, '<unk>': 3, **{w: i + 4 for i, w in enumerate(WORDS)}}
  fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token='<unk>'))
  fast.normalizer = tokenizers.normalizers.Lowercase()
  fast.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  fast.post_processor = tokenizers.processors.TemplateProcessing(
      single='<s> $A </s>', special_tokens=[('<s>', 1), ('</s>', 2)])
  transformers.PreTrainedTokenizerFast(
      tokenizer_object=fast, pad_token='<pad>', eos_token='</s>', bos_token='<s>', unk_token='<unk>'
  ).save_pretrained(folder)


def write_model(folder, model_type):
  torch.manual_seed(0)
  model = transformers.AutoModel.from_config(CONFIGS[model_type]())
  with torch.no_grad():  # transformers starts at values so small that a missing norm would hardly show
    for p in model.parameters():
      p.copy_(0.3 * torch.randn(p.shape))
  model.save_pretrained(folder)
  write_tokenizer(folder)
  settings = dict(image_mean=MEAN, image_std=STD, do_rescale=True, rescale_factor=1 / 255, size={'shortest_edge': 32})
  (folder / 'preprocessor_config.json').write_text(json.dumps(settings))
  return model.eval()


@pytest.fixture(name='models', scope='module')
def models_fixture(tmp_path_factory):
  """model_type → (folder, transformers' own model)."""
  out = {}
  for model_type in CONFIGS:
    folder = tmp_path_factory.mktemp(model_type)
    out[model_type] = folder, write_model(folder, model_type)
  return out


def canvases(encoder, count=3):
  return np.random.default_rng(0).integers(0, 256, (count, encoder.image_size, encoder.image_size, 3)).astype(np.uint8)


def features(found):
  """transformers 5 wraps what transformers 4 returned bare."""
  return found if isinstance(found, torch.Tensor) else found.pooler_output


def unit(z):
  z = z.detach().numpy()
  return z / np.linalg.norm(z, axis=-1, keepdims=True)


def pixel_inputs(model_type, images):
  """The keywords of get_image_features, built with NumPy, image by image."""
  x = (images / 255 - np.float64(MEAN)) / np.float64(STD)
  if model_type != 'siglip2':
    return dict(pixel_values=torch.tensor(x.transpose(0, 3, 1, 2), dtype=torch.float32))
  from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches
  patches = np.stack([convert_image_to_patches(image.transpose(2, 0, 1), 8) for image in x])
  return dict(pixel_values=torch.tensor(patches, dtype=torch.float32), spatial_shapes=torch.full((len(x), 2), 4),
              pixel_attention_mask=torch.ones(patches.shape[:2], dtype=torch.long))


@pytest.mark.parametrize('model_type', CONFIGS)
def test_images_and_texts_as_transformers_embeds_them(models, model_type):
  folder, model = models[model_type]
  encoder = huggingface.load(folder, device='cpu')
  assert (encoder.image_size, encoder.grid) == (32, 4)
  images = canvases(encoder)
  with torch.no_grad():
    want = unit(features(model.get_image_features(**pixel_inputs(model_type, images))))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    padding = dict(padding=True) if model_type == 'clip' else dict(padding='max_length', return_attention_mask=False)
    ids = tokenizer(TEXTS, truncation=True, max_length=9, return_tensors='pt', return_token_type_ids=False, **padding)
    want_text = unit(features(model.get_text_features(**ids)))
  np.testing.assert_allclose(encoder.encode_image(images).z, want, atol=1e-5)
  got = encoder.encode_text(TEXTS)
  np.testing.assert_allclose(got, want_text, atol=1e-5)
  assert np.abs(got[0] - got[1]).max() > 0.01, 'the texts differ enough for the comparison to mean something'
  # More than one batch, and the same whatever stands beside a text.
  np.testing.assert_allclose(encoder.encode_text(TEXTS * 20)[-4:], want_text, atol=1e-5)
  assert encoder.encode_image(images).z.dtype == np.float32


def test_patches_of_clip_are_normed_and_projected(models):
  folder, model = models['clip']
  encoder = huggingface.load(folder, device='cpu')
  images = canvases(encoder)
  got = encoder.embed_patches(encoder.encode_image(images))
  with torch.no_grad():
    hidden = model.vision_model(**pixel_inputs('clip', images)).last_hidden_state.numpy().astype(np.float64)
  norm = model.vision_model.post_layernorm
  gain, bias, kernel = (p.detach().numpy() for p in (norm.weight, norm.bias, model.visual_projection.weight))
  for row, column in ((0, 0), (1, 3), (3, 2)):
    x = hidden[:, 1 + 4 * row + column]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + norm.eps)
    np.testing.assert_allclose(got[:, row, column], (x * gain + bias) @ kernel.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('model_type', ['siglip', 'siglip2'])
def test_patches_of_siglip_are_what_its_head_pools_from_one_token(models, model_type):
  folder, model = models[model_type]
  encoder = huggingface.load(folder, device='cpu')
  images = canvases(encoder)
  got = encoder.embed_patches(encoder.encode_image(images))
  head = model.vision_model.head
  with torch.no_grad():
    hidden = model.vision_model(**pixel_inputs(model_type, images)).last_hidden_state
    d = hidden.shape[-1]
    # Softmax over one token is 1: what is left of attention is its value and output projection.
    value = hidden @ head.attention.in_proj_weight[2 * d:].T + head.attention.in_proj_bias[2 * d:]
    x = head.attention.out_proj(value)
    want = (x + head.mlp(head.layernorm(x))).numpy()
  np.testing.assert_allclose(got.reshape(want.shape), want, rtol=1e-4, atol=1e-4)


def test_settings_also_from_processor_config(models, tmp_path):
  folder, _ = models['clip']
  for path in folder.iterdir():
    (tmp_path / path.name).write_bytes(path.read_bytes())
  settings = json.loads((tmp_path / 'preprocessor_config.json').read_text())
  (tmp_path / 'preprocessor_config.json').unlink()
  with pytest.raises(FileNotFoundError, match='neither preprocessor_config.json nor processor_config.json'):
    huggingface.load(tmp_path)
  (tmp_path / 'processor_config.json').write_text(json.dumps({'image_processor': settings}))
  images = canvases(huggingface.load(folder))
  np.testing.assert_array_equal(huggingface.load(tmp_path).encode_image(images).z,
                                huggingface.load(folder).encode_image(images).z)
  (tmp_path / 'processor_config.json').write_text(json.dumps({'image_processor': {**settings, 'image_std': [1]}}))
  with pytest.raises(ValueError, match=r'processor_config.json: image_std: expected three numbers, got \[1\]'):
    huggingface.load(tmp_path)


def test_what_cannot_be_loaded_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match='no such folder'):
    encoders.load(f'hf:{tmp_path / "absent"}')
  (tmp_path / 'config.json').write_text(json.dumps({'model_type': 'bert'}))
  with pytest.raises(ValueError, match="clip, siglip, siglip2, got 'bert'"):
    encoders.load(f'hf:{tmp_path}')
  with pytest.raises(FileNotFoundError, match='open_clip:some.pt: no such file'):
    encoders.load('open_clip:some.pt')
  with pytest.raises(ValueError, match='expected hf:NAME'):
    encoders.load('hf:')
  with pytest.raises(ValueError, match='has no steps'):
    encoders.load('hf:x/y', step=3)


@pytest.mark.parametrize('how', ['roi', 'mask-pool', 'crop', None])
def test_one_pass_over_a_data_set_gives_every_figure(models, base, how):
  import tiny_experiment as tiny
  from cloc_jax import evaluate
  encoder = encoders.with_regions(encoders.load(f'hf:{models["clip"][0]}'), how)
  evaluation, predictions = evaluate.run_encoder(encoder, path=tiny.data(base), split='val', batch_size=5)
  assert {name.split('/')[0] for name in evaluation.metrics} >= {
      'region_recognition', 'region_retrieval', 'image_text_retrieval'}
  assert predictions.z_region.shape == (len(predictions.boxes), 24)
  assert 'grounding' in evaluation.skipped and encoder.info['region_embedding'] == (how or 'roi')
  assert 'centre cropped' in encoder.info['preprocessing']
  with pytest.raises(ValueError, match='needs a model with a Prompter'):
    encoders.with_regions(encoder, 'prompter')
