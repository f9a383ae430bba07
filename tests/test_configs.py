"""Every experiment that is shipped: it builds, its sizes are those of the paper, and one training step traces.

Nothing is computed: states and batches are shapes. No tokenizer file is read: the vocabulary's size is given.
"""
import dataclasses
import functools
import pathlib

import jax
import pytest

from cloc_jax import config as config_lib
from cloc_jax import inference, optim, sharding, train, train_step, trees
from cloc_jax.batch import abstract_batch

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / 'configs'
PAPER = ('clip_b16', 'cloc_b16', 'cloc_l14', 'cloc_h14')
ABLATIONS = ('', 'clip', 'roi_align', 'prompt_pool', 'all_pool', 'no_filter,no_grounding,m2')
T5_VOCABULARY = 32_100


@dataclasses.dataclass(frozen=True)
class _Tokenizer:
  vocab_size: int = T5_VOCABULARY
  eos_id: int = 1


def load(name):
  file, _, arg = name.partition(':')
  return config_lib.load(f'{CONFIGS / file}.py:{arg}')


@dataclasses.dataclass(frozen=True)
class Traced:
  """An experiment as shapes. after, metrics: of one step on a small batch."""
  config: object
  state: train_step.TrainState
  after: train_step.TrainState
  metrics: dict


@functools.cache
def trace(name):
  """Shape-evaluates everything that `cloc train` would build of an experiment."""
  config = load(name)
  data = config_lib.call(train.DataOptions, config.data, name='data')
  options = config_lib.call(train.TrainOptions, config.train, name='train')
  for section, fields in (('evals', train.EvalOptions), ('checkpoint', train.CheckpointOptions)):
    config_lib.call(fields, config[section], name=section)
  model = inference.build_model(config, tokenizer=_Tokenizer())
  total = config_lib.duration(vars(options), 'total', batch_size=data.batch_size, dataset_size=10_000)
  tx, rate = config_lib.call(optim.make, config.optim, name='optim', total_steps=total)
  batch = abstract_batch(batch_size=4, image_size=data.image_size, text_length=data.text_length,
                         regions=data.regions_per_image, region_text_length=data.region_text_length)
  state = train_step.abstract_state(train_step.initializer(model, tx, batch, ema=options.ema_decay > 0))
  after, metrics = jax.eval_shape(functools.partial(
      train_step.train_step, model=model, tx=tx, rate=rate, loss=config_lib.plain(config.loss),
      micro_batches=options.micro_batches, ema_decay=options.ema_decay), state, batch)
  return Traced(config, state, after, metrics)


SHIPPED = sorted(p.stem for p in CONFIGS.glob('*.py') if p.stem != 'recipe' and not p.stem.startswith('vesl_'))


def test_every_shipped_file_is_tested_here():
  # localise needs a model to start from: tests/test_localise.py trains it.
  assert SHIPPED == sorted([*PAPER, 'scenes_local', 'coco_mini', 'localise', 'mixture'])


@pytest.mark.parametrize('name', [*PAPER, 'coco_mini', 'mixture', *(f'scenes_local:{a}' for a in ABLATIONS)])
def test_builds_and_traces_a_training_step(name):
  found = trace(name)
  assert jax.tree.structure(found.after) == jax.tree.structure(found.state)
  shapes = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
  assert shapes(found.after) == shapes(found.state)  # else the step could not take its own state
  assert {x.dtype.name for x in jax.tree.leaves(found.state.params)} == {'float32'}
  assert all(x.shape == () and x.dtype == 'float32' for x in found.metrics.values())
  regions = found.config.model.region_encoder
  terms = {'loss_image_text'} | ({'loss_region_text'} if regions != 'none' else set()) | (
      {'loss_grounding'} if regions == 'prompter' and found.config.loss.grounding_weight else set())
  assert {k for k in found.metrics if k.startswith('loss_')} == terms


@pytest.mark.parametrize('name', [*PAPER, 'coco_mini', 'scenes_local'])
def test_every_parameter_has_a_place_on_a_mesh(name):
  found = trace(name)
  mesh_section = dict(config_lib.plain(found.config.mesh))
  rules = mesh_section.pop('rules')
  mesh = config_lib.call(sharding.make_mesh, mesh_section, name='mesh')
  placed = train_step.state_sharding(found.state, mesh=mesh, rules=rules)
  assert len(jax.tree.leaves(placed)) == len(jax.tree.leaves(found.state))


@pytest.mark.parametrize('name', PAPER)
def test_the_recipe_of_the_paper(name):
  config = load(name)
  assert config.data.batch_size == 32_768 and config.train.total_steps == 439_087
  assert 14e9 < config.data.batch_size * config.train.total_steps < 14.5e9  # "about 14 B images"
  optimizer = config.optim
  assert (optimizer.learning_rate, optimizer.warmup_steps, optimizer.weight_decay) == (5e-4, 2000, 0.2)
  assert (optimizer.b1, optimizer.b2) == (0.9, 0.98)
  assert config.data.text_length == 77 and config.data.region_text_length == 16
  assert config.data.tokenizer.startswith('sentencepiece:') and 't5' in config.data.tokenizer
  assert config.data.flip is False and config.train.get('micro_batches', 1) == 1
  assert config.model.image.posemb == 'learn' and config.model.image.pool == 'tok'
  assert config.model.text.pool == 'eos' and config.model.separate_temperature is False
  assert config.loss.image_text == 'softmax' and config.loss.lambda0 == 1.0
  if name.startswith('cloc'):
    assert config.data.regions_per_image == 4 and config.model.region_encoder == 'prompter'
    assert config.model.prompter.pool == 'all'
    assert (config.loss.region_text, config.loss.grounding, config.loss.filter_threshold) == ('softmax', 'l2', 0.9)
    assert config.loss.region_weight == config.loss.grounding_weight == 1.0
    assert not config.loss.get('filter_from_step', 0)
  else:
    assert config.model.region_encoder == 'none'


def test_the_learning_rate_of_the_paper():
  config = load('cloc_b16')
  _, rate = config_lib.call(optim.make, config.optim, name='optim', total_steps=config.train.total_steps)
  found = [float(rate(step)) for step in (0, 1000, 2000, (2000 + 439_087) // 2, 439_087)]
  assert found == pytest.approx([0, 2.5e-4, 5e-4, 2.5e-4, 0], rel=1e-3, abs=1e-9)


def _blocks(width, depth):
  """Scalars of pre-norm blocks with biases and an MLP ratio of 4: 12 d² + 13 d each, and the norm behind them."""
  return depth * (12 * width**2 + 13 * width) + 2 * width


def _image_tower(*, width, depth, patch, size, out):
  patches = (size // patch)**2
  return (patch**2 * 3 * width + width + (patches + 1) * width + 2 * width  # patches, class token, table, pre-norm
          + _blocks(width, depth) + width * out)


def _text_tower(*, width, depth, out):
  return T5_VOCABULARY * width + 77 * width + _blocks(width, depth) + width * out


@pytest.mark.parametrize('name, image, text, out, millions', [
    ('clip_b16', dict(width=768, depth=12, patch=16, size=224), dict(width=512, depth=12), 512, 86.2),
    ('cloc_b16', dict(width=768, depth=12, patch=16, size=224), dict(width=512, depth=12), 512, 86.2),
    ('cloc_l14', dict(width=1024, depth=24, patch=14, size=336), dict(width=768, depth=12), 768, 304.3),
    ('cloc_h14', dict(width=1280, depth=32, patch=14, size=336), dict(width=1024, depth=24), 1024, 632.4),
])
def test_parameter_counts(name, image, text, out, millions):
  """Against sums by hand, and against what is published of these image towers (B and L: OpenAI; H: OpenCLIP)."""
  params = trace(name).state.params
  assert trees.count(params['img']) == _image_tower(**image, out=out)
  assert trees.count(params['img']) / 1e6 == pytest.approx(millions, abs=0.5)
  assert trees.count(params['txt']) == _text_tower(**text, out=out)
  if name == 'clip_b16':
    assert set(params) == {'img', 'txt', 't', 'b'}
    return
  # One layer as wide as the ViT, and no more than a twentieth of the image tower on top: the Prompter is light.
  prompter = trees.count(params['prompter'])
  assert 12 * image['width']**2 < prompter < 12 * image['width']**2 + 0.05 * trees.count(params['img'])
  assert trees.count(params['box_head']) == out * out + out + 4 * out + 4


@pytest.mark.parametrize('name', PAPER)
def test_heads_are_those_of_the_paper(name):
  params = trace(name).state.params
  heads = {'b16': (12, 8), 'l14': (16, 12), 'h14': (16, 16)}[name.split('_')[1]]
  found = [value for path, value in trees.flatten(params).items() if path.endswith('query/kernel')]
  by_tower = {path.split('/')[0]: value.shape for path, value in trees.flatten(params).items()
              if path.endswith('query/kernel')}
  assert (by_tower['img'][-2], by_tower['txt'][-2]) == heads
  assert len(found) == (2 if name.startswith('clip') else 3)
  if name.startswith('cloc'):
    assert by_tower['prompter'][-2] == 1


@pytest.mark.parametrize('name', ['cloc_b16', 'clip_b16', 'coco_mini'])
def test_the_argument_is_the_data_set(name):
  assert load(f'{name}:/some/where').data.path == '/some/where'
  assert load(name).data.path != ''


def test_the_arguments_of_a_mixture():
  config = load('mixture:/some/boxes+webdataset:/some/*.tar,caption_keys=a,b')
  parts = config_lib.call(train.DataOptions, config.data, name='data').parts()
  assert {part.name: part.path for part in parts} == {
      'boxes': '/some/boxes', 'pairs': 'webdataset:/some/*.tar,caption_keys=a,b'}
  assert config.evals.path == '/some/boxes' and config.data.path is None


def test_ablations_change_what_they_name_and_nothing_else():
  plain = lambda name: trees.flatten(config_lib.plain(load(name)))
  base = plain('scenes_local')
  changed = lambda name: {k: v for k, v in plain(f'scenes_local:{name}').items() if base.get(k, '?') != v} | {
      k: '?' for k in base.keys() - plain(f'scenes_local:{name}').keys()}
  assert changed('') == {}
  assert changed('clip') == {'model/region_encoder': 'none'}
  assert changed('roi_align') == {'model/region_encoder': 'roi_align'}
  assert changed('no_grounding') == {'loss/grounding_weight': 0.0}
  assert changed('m2') == {'data/regions_per_image': 2}
  assert load('scenes_local:no_filter').loss.filter_threshold is None
  pools = [load(f'scenes_local:{name}').model.prompter.pool for name in ('prompt_pool', 'all_pool')]
  assert pools == ['prompt', 'all']
  assert changed('m2,clip') == changed('m2') | changed('clip')


def test_an_unknown_ablation_names_the_nearest():
  with pytest.raises(ValueError, match='roi_algn.*roi_align'):
    load('scenes_local:roi_algn')


@pytest.mark.parametrize('name', ['scenes_local', 'coco_mini'])
def test_small_experiments_stay_small(name):
  """Two CPU cores train these in minutes."""
  config = load(name)
  params = trace(name).state.params
  words = trees.count(params['txt']['Embed_0']) // T5_VOCABULARY * int(config.data.tokenizer.split(':')[1])
  assert 1e5 < trees.count(params) - trees.count(params['txt']['Embed_0']) + words < 3e6
  assert config.data.batch_size <= 256 and config.model.dtype == 'float32'
