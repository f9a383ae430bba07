"""Exported folders against the model they came from, on tiny models of random weights."""
import json

import numpy as np
import pytest

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
pytest.importorskip('safetensors')

import tiny_checkpoint as tiny  # noqa: E402

from cloc_jax import cli, export, inference  # noqa: E402
from cloc_jax.interop import hf_cloc  # noqa: E402
from cloc_jax.models import vit  # noqa: E402

SINCOS = dict(tiny.CLIP['image'], posemb='sincos2d', act='gelu_tanh')
MODELS = {
    'all': tiny.CLIP | dict(prompter=dict(pool='all'), separate_temperature=True),
    'prompt': tiny.CLIP | dict(image=SINCOS, prompter=dict(pool='prompt', mlp_ratio=2), box_head_width=12),
    'siglip': tiny.SIGLIP,
    'roi_align': tiny.CLIP | dict(region_encoder='roi_align'),
    'gap': tiny.CLIP | dict(image=dict(variant='mu/8', width=16, depth=2, heads=2, pool='gap', act='gelu'),
                            region_encoder='none'),
}
TARGETS = {'all': ('hf-cloc', 'hf-clip', 'open-clip', 'safetensors'), 'prompt': ('hf-cloc', 'hf-clip'),
           'siglip': ('hf-cloc', 'hf-siglip', 'big-vision'), 'roi_align': ('hf-cloc',), 'gap': ('hf-cloc',)}


@pytest.fixture(name='runs', scope='module')
def runs_fixture(tmp_path_factory):
  base = tmp_path_factory.mktemp('runs')
  return {name: tiny.write(base / name, model, pad='corner' if name == 'prompt' else 'center')
          for name, model in MODELS.items()}


@pytest.fixture(name='exported', scope='module')
def exported_fixture(runs, tmp_path_factory):
  """(model, target) → Result, made when asked for."""
  base, made = tmp_path_factory.mktemp('exported'), {}

  def get(name, target):
    if (name, target) not in made:
      made[name, target] = export.run(runs[name], to=target, out=base / f'{name}-{target}', tolerance=1e-5)
    return made[name, target]
  return get


@pytest.mark.parametrize('name, target', [(n, t) for n, targets in TARGETS.items() for t in targets])
def test_every_output_agrees(exported, name, target):
  result = exported(name, target)
  assert result.passed and not result.folder.name.endswith('failed')
  record = json.loads((result.folder / 'parity.json').read_text())
  assert record['passed'] and record['target'] == target and record['outputs'].keys() == result.differences.keys()
  want = {'image_tokens', 'image_features', 'text_features', 'phrase_features', 'pixel_values', 'text_ids'}
  if target == 'hf-cloc' and name in ('all', 'prompt', 'siglip'):
    want |= {'boxes', 'region_features', 'ground_boxes', 'ground_scores', 'ground_pixels'}
  if target in ('hf-clip', 'hf-siglip'):
    want.add('hidden_states')
  assert want <= set(result.differences)
  assert result.differences['image_features'].largest > 0.1
  card = (result.folder / 'README.md').read_text()
  assert 'Passed.' in card and f'exported as `{target}` from step\n3' in card and '/data/tiny' in card
  assert '{' not in card.split('```json')[0].replace("{'pixel_values'", '')


@pytest.mark.parametrize('name', ['all', 'prompt', 'siglip', 'roi_align'])
def test_box_by_box_as_the_library_itself_says(runs, exported, name):
  """Not through the gate: inference.Cloc, image by image and box by box, against the folder's model in one batch."""
  cloc = inference.load(runs[name])
  model, processor = hf_cloc.load(exported(name, 'hf-cloc').folder)
  rng = np.random.default_rng(0)
  images = [rng.integers(0, 256, (h, w, 3)).astype(np.uint8) for h, w in ((50, 40), (20, 31), (32, 32))]
  boxes = [[[1, 2, 30, 40], [5, 5, 9, 30], [0, 0, 40, 50]], [[0, 0, 31, 20]], [[3, 4, 20, 32], [-5, 8, 20, 99]]]
  inputs = processor(images=images, boxes=boxes)
  assert inputs['box_mask'].tolist() == [[True] * 3, [True, False, False], [True, True, False]]
  with torch.inference_mode():
    found = model.get_region_features(inputs['pixel_values'], inputs['boxes'])
    again = model.get_region_features(model.get_image_tokens(inputs['pixel_values']), inputs['boxes'])
  np.testing.assert_array_equal(found, again)
  phrases = ['a red circle', 'the cat left of the dog', 'two dogs']
  ids = processor(text=phrases, region=True)['input_ids']
  for i, image in enumerate(images):
    encoded = cloc.encode_image(image)
    for j, box in enumerate(boxes[i]):
      np.testing.assert_allclose(found[i, j], cloc.embed_regions(encoded, [box])[0], atol=1e-5)
    if cloc.functions.can_ground:
      with torch.inference_mode():
        z_text = model.get_text_features(ids)
        out = model.ground(inputs['pixel_values'][i:i + 1], z_text)
      want = cloc.ground(encoded, phrases)
      got = processor.boxes_from_canvas(out.boxes[0], inputs['original_sizes'][i])
      np.testing.assert_allclose(got, want.boxes, atol=1e-3)  # pixels
      np.testing.assert_allclose(out.scores[0], want.scores, atol=1e-5)
  spread = np.linalg.norm(found[0, 0] - found[0, 1])
  assert spread > 0.02, 'boxes differ enough for the comparison to mean something'


def test_chunks_of_prompts_make_no_difference(exported):
  model, _ = hf_cloc.load(exported('all', 'hf-cloc').folder)
  tokens, boxes = torch.randn(2, 16, 16), torch.tensor([[0.1, 0.2, 0.5, 0.9]]) + torch.rand(2, 7, 1) * 0.1
  with torch.inference_mode():
    want = model.get_region_features(tokens, boxes)
    for chunk in (3, None):
      model.prompter.chunk = chunk
      np.testing.assert_allclose(model.get_region_features(tokens, boxes), want, atol=1e-6)


def test_logits_gradients_and_half_precision(exported):
  model, processor = hf_cloc.load(exported('all', 'hf-cloc').folder)
  image = np.random.default_rng(0).integers(0, 256, (40, 30, 3)).astype(np.uint8)
  inputs = processor(images=image, text=['a red circle', 'two dogs'], boxes=[[1, 1, 20, 30]])
  out = model(**inputs)
  z = out.region_embeds[0] @ out.text_embeds.T
  torch.testing.assert_close(out.logits_per_region[0],
                             z * model.region_logit_scale.exp() + model.region_logit_bias)
  assert out.logits_per_image.shape == (1, 2)
  (out.logits_per_region.sum() + out.logits_per_image.sum() + model.ground(
      inputs['pixel_values'], out.text_embeds).boxes.sum()).backward()
  silent = [name for name, p in model.named_parameters() if p.grad is None]
  assert not silent
  half = model.to(torch.bfloat16)
  with torch.inference_mode():
    got = half(**inputs)
  for key in ('image_embeds', 'region_embeds', 'text_embeds'):
    cosine = (got[key].float() * out[key].detach()).sum(-1)
    assert cosine.min() > 0.99, (key, cosine)
  assert half.prompter.box_tokens(inputs['boxes']).dtype == torch.float32


def test_saved_again_it_loads_again(exported, tmp_path):
  model, processor = hf_cloc.load(exported('siglip', 'hf-cloc').folder)
  model.save_pretrained(tmp_path)
  processor.save_pretrained(tmp_path)
  again, processor_again = hf_cloc.load(tmp_path)
  for (name, a), b in zip(model.state_dict().items(), again.state_dict().values()):
    assert torch.equal(a, b), name
  assert processor_again.region_text_length == 6
  text = processor(text=['a cat'], region=True)['input_ids']
  assert torch.equal(processor_again(text=['a cat'], region=True)['input_ids'], text)


def test_bad_inputs_are_named(exported):
  model, processor = hf_cloc.load(exported('gap', 'hf-cloc').folder)
  image = np.zeros((20, 30, 3), np.uint8)
  with pytest.raises(ValueError, match=r'pixel_values: expected \(B, 3, 32, 32\), got \(1, 3, 16, 16\)'):
    model.get_image_features(torch.zeros(1, 3, 16, 16))
  with pytest.raises(ValueError, match='embeds whole images only'):
    model.get_region_features(torch.zeros(1, 16, 16), torch.zeros(1, 1, 4))
  with pytest.raises(ValueError, match="texts are found by a Prompter, this model has 'none'"):
    model.ground(torch.zeros(1, 16, 16), torch.zeros(1, 8))
  with pytest.raises(ValueError, match='13 tokens, but this tower has 12'):
    model.get_text_features(torch.zeros(1, 13, dtype=torch.long))
  with pytest.raises(ValueError, match=r'\[40.0, 0.0, 50.0, 10.0\] has no area inside the image of 30×20 pixels'):
    processor(images=image, boxes=[[40, 0, 50, 10]])
  with pytest.raises(ValueError, match='one list for each of 2 images, got 1'):
    processor(images=[image, image], boxes=[[[0, 0, 5, 5]]])
  with pytest.raises(TypeError, match='uint8 pixels, got float32'):
    processor(images=image.astype(np.float32))


def test_hidden_states_end_in_the_towers_tokens(runs):
  cloc = inference.load(runs['all'])
  source = export.of_cloc(cloc)
  images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
  hidden = vit.hidden_states(source.image.clone(parent=None), source.params['img'], images)
  assert hidden.shape == (4, 2, 17, 16)
  norm = source.params['img']['Transformer']['encoder_norm']
  x = np.asarray(hidden[-1], np.float64)[:, 1:]
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + source.image.ln_eps)
  _, tokens = source.image.clone(parent=None).apply({'params': source.params['img']}, images)
  np.testing.assert_allclose(x * norm['scale'] + norm['bias'], tokens, atol=1e-5)


def test_clip_folder_loads_without_custom_code(exported):
  folder = exported('all', 'hf-clip').folder
  model = transformers.AutoModel.from_pretrained(folder)
  assert type(model) is transformers.CLIPModel
  assert type(transformers.AutoImageProcessor.from_pretrained(folder)).__name__.startswith('CLIPImageProcessor')
  config = json.loads((folder / 'config.json').read_text())
  assert config['vision_config']['hidden_act'] == 'quick_gelu' and config['vision_config']['intermediate_size'] == 40


@pytest.mark.parametrize('name, target, reason', [
    ('siglip', 'hf-clip', "pools a class token, this image tower pools by 'map'; try --to hf-siglip"),
    ('all', 'hf-siglip', "pools by 'tok'; try --to hf-clip"),
    ('gap', 'hf-clip', "pools by 'gap'; try --to hf-cloc"),
    ('siglip', 'open-clip', 'through timm'),
    ('all', 'big-vision', 'no norm before the blocks'),
    ('all', 'hf-klip', 'did you mean hf-clip'),
])
def test_what_a_target_cannot_express_is_refused(runs, tmp_path, name, target, reason):
  with pytest.raises(ValueError, match=reason):
    export.run(runs[name], to=target, out=tmp_path / 'out')
  assert not list(tmp_path.iterdir())


def test_an_end_token_of_two_is_refused_for_clip(tmp_path):
  from cloc_jax.data import tokenizer as tokenizer_lib
  tokenizer = tokenizer_lib.train(tiny.CAPTIONS, vocab_size=290)
  tokenizer.eos_id = 2
  run = tiny.write(tmp_path / 'run', tiny.CLIP | dict(region_encoder='none'), tokenizer=tokenizer)
  with pytest.raises(ValueError, match='eos_token_id 2 for an older rule'):
    export.run(run, to='hf-clip', out=tmp_path / 'out')


@pytest.mark.parametrize('part', ['prompter.attention.value.weight', 'image.blocks.1.mlp.fc1.bias',
                                  'text.position_embedding', 'box_head.fc2.weight'])
def test_a_wrong_weight_fails_the_gate(runs, tmp_path, monkeypatch, capsys, part):
  right = hf_cloc.state_dict

  def wrong(source):
    state = right(source)
    state[part] = state[part] * 1.02
    return state
  monkeypatch.setattr(hf_cloc, 'state_dict', wrong)
  status = cli.main(['export', '--checkpoint', str(runs['prompt']), '--to', 'hf-cloc', '--out', str(tmp_path / 'out'),
                     '--limit', '1'])
  assert status == 1 and 'differs by more than 0.0001' in capsys.readouterr().err
  assert [p.name for p in tmp_path.iterdir()] == ['out.failed']
  assert not json.loads((tmp_path / 'out.failed' / 'parity.json').read_text())['passed']
  assert 'do not use this folder' in (tmp_path / 'out.failed' / 'README.md').read_text()


def test_command_on_photos(runs, tmp_path, coco_mini, capsys):
  status = cli.main(['export', '--checkpoint', str(runs['all']), '--to', 'hf-cloc', '--out', str(tmp_path / 'out'),
                     '--images', str(coco_mini / 'val2017'), '--limit', '3'])
  assert status == 0
  shown = capsys.readouterr()
  assert '| region_features | 3 × 3 × 8 |' in shown.out and 'comparing on 3 images of' in shown.err
  record = json.loads((tmp_path / 'out' / 'parity.json').read_text())
  assert record['outputs']['pixel_values']['relative'] < 1e-6


def test_damage_and_places_that_are_taken(runs, tmp_path):
  with pytest.raises(FileExistsError, match='name another folder'):
    export.run(runs['all'], to='safetensors', out=tmp_path)
  with pytest.raises(FileNotFoundError, match='no such folder'):
    export.run(runs['all'], to='safetensors', out=tmp_path / 'out', images=tmp_path / 'absent')
  (tmp_path / 'empty').mkdir()
  with pytest.raises(FileNotFoundError, match='no image in it'):
    export.run(runs['all'], to='safetensors', out=tmp_path / 'out', images=tmp_path / 'empty')
  (tmp_path / 'empty' / 'a.jpg').write_bytes(b'no image')
  with pytest.raises(ValueError, match='a.jpg: not an image'):
    export.run(runs['all'], to='safetensors', out=tmp_path / 'out', images=tmp_path / 'empty')
  from cloc_jax import checkpoint
  broken = tiny.write(tmp_path / 'broken', MODELS['all'])
  for path in (broken / 'checkpoints' / '00000003' / 'state').rglob('*'):
    if path.is_file():
      path.write_bytes(path.read_bytes()[:10])
  with pytest.raises(checkpoint.CheckpointError, match='00000003'):
    export.run(broken, to='safetensors', out=tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


def test_a_missing_library_is_named(runs, tmp_path, monkeypatch):
  import importlib.util
  real = importlib.util.find_spec
  monkeypatch.setattr(importlib.util, 'find_spec',
                      lambda name, *rest: None if name == 'onnxscript' else real(name, *rest))
  with pytest.raises(ModuleNotFoundError, match=r"onnxscript.*pip install 'cloc_jax\[export\]'"):
    export.run(runs['all'], to='onnx', out=tmp_path / 'out')


def test_wrong_positions_fail_the_gate(runs, tmp_path, monkeypatch):
  """The reference computes its positions itself, so that a wrong table shows."""
  from cloc_jax.interop import exported as exported_lib
  make = exported_lib.make

  def wrong(*args, **kwargs):
    source = make(*args, **kwargs)
    source.params['img']['pos_embedding'][:, 3] += np.linspace(0, 0.1, 16, dtype=np.float32)
    return source
  monkeypatch.setattr(exported_lib, 'make', wrong)
  result = export.run(runs['prompt'], to='safetensors', out=tmp_path / 'out', limit=1)
  assert not result.passed and not result.differences['image_tokens'].within(1e-4)
  assert result.differences['text_features'].within(0)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['all', 'siglip', 'roi_align'])
def test_onnx(exported, name):
  for package in ('onnx', 'onnxscript', 'onnxruntime'):
    pytest.importorskip(package)
  result = exported(name, 'onnx')
  assert result.passed
  assert (result.folder / 'ground.onnx').exists() == (name != 'roi_align')
  assert 'region_features of one box' in result.differences


def test_differences():
  want = {'x': np.float32([1, -4]), 'ids': np.int32([[1, 2]])}
  found = export.compare(want, {'x': np.float32([1, -3]), 'ids': np.int64([[1, 3]])})
  assert found['x'] == export.Difference((2,), 4.0, 1.0, 0.25)
  assert found['ids'].relative == 1.0 and not found['ids'].within(0.5)
  assert not export.compare(want, {'x': np.float32([1, np.nan])})['x'].within(1e9)
  with pytest.raises(ValueError, match=r'x: expected \(2,\), got shape \(3,\)'):
    export.compare(want, {'x': np.zeros(3)})
