"""`cloc plan`: what it reads from shapes and compiled programs, against sums done here."""
import json

import jax
import pytest

from cloc_jax import cli, hlo, plan, plan_step, trees
from cloc_jax import config as config_lib
from cloc_jax import hardware

LOCAL = 'configs/scenes_local.py'


@pytest.fixture(name='config')
def config_fixture():
  config = config_lib.load(LOCAL)
  config.data.batch_size = 64
  return config


def make(config, *overrides, topology='gpu:8xh200'):
  config_lib.override(config, overrides)
  return plan.make(config, topology=topology, estimate=True)


def test_memory_is_that_of_the_state(config):
  step = plan_step.Step(config, hardware.topology('gpu:8xh200'))
  parameters = 4 * trees.count(step.state.params)
  whole = make(config)
  assert whole.memory.parameters == parameters and whole.memory.available == 141e9 and whole.memory.fits
  assert 2 * parameters <= whole.memory.optimizer < 2 * parameters + 1000  # AdamW's two moments and its counters
  assert whole.memory.batch == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(step.batch)) / 8
  split = make(config, 'mesh.data=2', 'mesh.fsdp=4')
  held = 0  # by an independent count: large arrays are split where an axis divides, small ones are not
  for x in jax.tree.leaves(step.state.params):
    held += 4 * x.size // (4 if x.size >= 2**14 and any(n % 4 == 0 for n in x.shape) else 1)
  assert parameters / 4 < split.memory.parameters == held < parameters
  averaged = make(config, 'train.ema_decay=0.9')
  assert averaged.memory.optimizer - split.memory.optimizer == held
  rule = (('.*', 'replicate'),)
  config.mesh.rules = rule
  assert make(config).memory.parameters == parameters


def test_activations_follow_remat_and_micro_batches(config):
  for tower in ('image', 'text'):
    config.model[tower].remat = 'none'
  kept = {remat: make(config, f'model.image.remat={remat}', f'model.text.remat={remat}').memory.activations
          for remat in ('none', 'dots', 'full')}
  assert kept['none'] > kept['dots'] > kept['full'] > 0
  parts = make(config, 'train.micro_batches=4').memory.activations
  assert kept['full'] / 5 < parts < kept['full'] / 3


@pytest.mark.parametrize('remat', ['dots', 'full'])
def test_recomputation_costs_time(config, remat):
  config.model.region_encoder = 'none'
  for tower in ('image', 'text'):
    config.model[tower].remat = 'none'
  plain = make(config)
  again = make(config, f'model.image.remat={remat}', f'model.text.remat={remat}')
  assert again.flops_per_image == plain.flops_per_image
  extra = (again.seconds['compute'] - plain.seconds['compute']) * 8 * 989e12 / 64
  towers = sum(plain.flops_per_image[k] for k in ('image tower', 'text tower', 'region text')) / 3
  assert 0 < extra < {'dots': 0.2, 'full': 0.75}[remat] * towers  # of 24·D² a token, "full" spares the last 8·D²


def test_time_and_cost(config):
  found = make(config)
  assert found.seconds['compute'] >= found.flops_per_image['all'] * 64 / 8 / 989e12
  assert found.seconds['memory'] == found.moved / 4800e9
  assert found.step_seconds == max(2 * found.seconds['compute'], found.seconds['links'], found.seconds['memory'])
  assert found.images_per_second == pytest.approx(64 / found.step_seconds)
  assert found.days == pytest.approx(3800 * found.step_seconds / 86_400)
  assert found.chip_hours == pytest.approx(found.days * 24 * 8)
  assert found.flops_per_image['all'] == pytest.approx(
      sum(v for k, v in found.flops_per_image.items() if k != 'all'))


def test_nodes_add_a_network(config):
  one, two = make(config), make(config, topology='gpu:16xh200')
  assert 'network' not in one.seconds and two.seconds['network'] > 0 and two.network < sum(two.received.values())


def test_slices_share_what_comes_over_the_network(config):
  """Twice the parameters' gradients over the other half of the chips, and the embeddings: no more enters a slice."""
  config.data.batch_size = 512
  step = plan_step.Step(config, hardware.topology('v5e:2x4*2'))
  gradients, rows = 2 * 4 * trees.count(step.state.params), 512 * (1 + config.data.regions_per_image)
  width = {'float32': 4, 'bfloat16': 2}[config.loss.get('tile_dtype', 'float32')]
  embeddings = rows * config.model.embed_dim * (2 * width + 4)
  network = lambda step: step.estimated_network(step.estimated_messages())
  assert network(step) == pytest.approx((gradients + embeddings) / 2 / 8)
  assert network(plan_step.Step(config, hardware.topology('v5e:2x4*4'))) == pytest.approx(1.5 * network(step))
  step.loss['transport'] = 'ring'  # one chip of a slice passes on all that goes around
  assert network(step) == pytest.approx(gradients / 2 / 8 + step.estimated_messages()['collective-permute'])


def test_parameters_are_not_split_over_slices(config):
  with pytest.raises(ValueError, match='mesh.fsdp: 8 does not fit into one of 2 slices'):
    make(config, 'mesh.fsdp=8', topology='v5e:2x2*2')


def test_tpus_store_in_tiles(config):
  step = plan_step.Step(config, hardware.topology('v5e:2x2'))
  stored = lambda *shape: step._stored(jax.ShapeDtypeStruct(shape, 'bfloat16'))
  assert stored(512) == 2 * 512 and stored(16, 256) == 2 * 16 * 256
  assert stored(3, 12, 64, 32, 197) == 2 * 3 * 12 * 64 * 32 * 256  # what the compiler says of these heads
  assert stored(197, 3072) == 2 * 200 * 3072 and stored(3, 32, 197, 3072) == 2 * 3 * 32 * 197 * 3072
  assert plan_step.Step(config, hardware.topology('gpu:4xh200'))._stored(jax.ShapeDtypeStruct((3, 5), 'int8')) == 15


@pytest.mark.parametrize('sizes', [('mesh.fsdp=16',), ('mesh.fsdp=3',), ('mesh.data=4', 'mesh.fsdp=4')])
def test_a_mesh_that_does_not_fit_its_chips(config, sizes):
  with pytest.raises(ValueError, match='mesh: data=.* does not fit 8 devices'):
    make(config, *sizes)


@pytest.mark.slow
def test_the_estimate_is_near_what_a_compiler_makes_of_it(config):
  """The real step, compiled for eight devices of this machine."""
  config_lib.override(config, ('mesh.data=2', 'mesh.fsdp=4'))
  step = plan_step.Step(config, hardware.topology('gpu:8xh200'))
  compiled = step.lower(jax.devices()[:8]).compile()
  memory = step.memory(compiled)
  arguments = compiled.memory_analysis().argument_size_in_bytes
  assert memory.parameters + memory.optimizer + memory.batch == pytest.approx(arguments, rel=0.01)
  measured = hlo.traffic(compiled.as_text(), devices=8)
  expected = sum(step.estimated_messages().values())
  assert not measured.doubts and expected / 2 < measured.total < 3 * expected


def test_a_compiler_that_refuses(config, monkeypatch):
  error = jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO '
                                     'temporaries (762.70G) exceeds available HBM (95.74G).')

  class Refusing:
    def compile(self):
      raise error

  from jax.experimental import topologies
  monkeypatch.setattr(plan_step.Step, 'lower', lambda self, devices: Refusing())
  monkeypatch.setattr(topologies, 'get_topology_desc', lambda **settings: type('T', (), {'devices': ()}))
  found = plan.make(config, topology='v5e:4x4')
  assert found.method == 'refused' and not found.memory.fits
  assert found.memory.temporaries == pytest.approx(762.70 * 2**30)
  assert any('does not fit, messages are estimated: RESOURCE_EXHAUSTED' in n for n in found.notes)


def test_a_variant_that_cannot_be_does_not_cost_the_others(capsys):
  command = ['plan', '--config', LOCAL, '--topology', 'gpu:32xh200', '--estimate', '--what-if']
  assert cli.main(command) == 0  # a batch of 32: half of it does not divide
  out = capsys.readouterr().out
  assert '(as it is)' in out and 'M = 2' in out
  assert 'note: half the batch: config.data.batch_size: 16 does not divide over 32 chips' in out


def test_without_the_tpu_compiler_it_says_so(config, monkeypatch):
  from jax.experimental import topologies

  def missing(**settings):
    raise RuntimeError(f'no libtpu for {settings["topology_name"]}\nmore')

  monkeypatch.setattr(topologies, 'get_topology_desc', missing)
  found = plan.make(config, topology='v5e:4x4')
  assert found.method == 'estimated' and found.chips == 16
  assert any(n.startswith('not compiled: no libtpu for v5e:4x4 (pip install') for n in found.notes)


def test_a_batch_that_does_not_divide(config):
  with pytest.raises(ValueError, match='config.data.batch_size: 64 does not divide over 24 chips'):
    make(config, topology='gpu:24xh100')


def test_on_the_command_line(tmp_path, capsys):
  out = tmp_path / 'plan.json'
  command = ['plan', '--config', 'configs/cloc_b16.py', '--topology', 'v5p:8x8x16', '--estimate', '--json', str(out)]
  assert cli.main(command) == 0
  text = capsys.readouterr().out
  assert 'cloc_b16.py  on v5p:8x8x16: 1024 chips, batch 32,768 (32 images a chip) · estimated' in text
  assert "T5's vocabulary of 32,100 is assumed" in text and '← binds' in text and 'DOES NOT FIT' not in text
  saved, = json.loads(out.read_text())
  assert saved['chips'] == 1024 and saved['memory']['fits'] and saved['bound'] in ('compute', 'memory')
  assert saved['seconds']['memory'] == saved['moved'] / 2765e9
  # A thousand times the images on one small chip.
  assert cli.main(['plan', '--config', 'configs/cloc_b16.py', '--topology', 'v5e:1x1', '--estimate',
                   '--config.mesh.fsdp=1']) == 1
  assert 'DOES NOT FIT' in capsys.readouterr().out
  assert cli.main(['plan', '--config', 'configs/cloc_b16.py', '--topology', 'v9:4']) == 2
  assert 'expected CHIP:AxBxC' in capsys.readouterr().err


def test_what_if_tries_what_a_person_would(capsys):
  command = ['plan', '--config', 'configs/cloc_b16.py', '--topology', 'v5e:16x16', '--estimate', '--what-if']
  assert cli.main(command) in (0, 1)
  text = capsys.readouterr().out
  for label in ('(as it is)', 'M = 2', 'pool="prompt"', 'half the batch', 'remat "none"', 'remat "full"',
                'parameters replicated'):
    assert label in text


def load(more):
  config = config_lib.load(LOCAL)
  config_lib.override(config, ['data.batch_size=16', 'model.region_encoder=none', *more])
  return config


@pytest.mark.parametrize('available, expected', [(20e9, 1), (8.1e9, 2), (7.5e9, 4), (5.6e9, 4), (5.4e9, None)])
def test_fit_takes_the_fewest_micro_batches_that_the_estimate_allows(monkeypatch, available, expected):
  """3 GB stay, 8 GB are halved, and a quarter more of these is allowed for: 13, 8 and 5.5 GB."""
  monkeypatch.setattr(plan_step.Step, 'memory', lambda step, compiled: plan_step.Memory(
      1e9, 2e9, 0.0, 0.0, 0.0, 8e9 / step.options.micro_batches, available))
  monkeypatch.setattr(plan_step.Step, 'estimated_memory_bytes', lambda step: 0.0)
  found, overrides = plan.fit(load, topology='v5e:2x2', estimate=True)
  if expected is None:
    assert found.choice.startswith('no number of micro-batches fits') and overrides == ['train.micro_batches=4']
  else:
    assert found.choice.startswith(f'fits: --config.train.micro_batches={expected} ')
    assert overrides == [f'train.micro_batches={expected}']


def test_fit_goes_up_where_the_compiler_refuses(monkeypatch):
  asked = []

  def refusing(step, where):
    asked.append(step.options.micro_batches)
    return (plan_step.OutOfMemory('too much', 2e12), '') if asked[-1] < 2 else (None, 'no compiler after all')

  monkeypatch.setattr(plan, '_compile', refusing)
  _, overrides = plan.fit(load, topology='v5e:2x2')
  assert overrides == ['train.micro_batches=2'] and asked == [1, 2]


def test_fit_on_the_command_line(capsys):
  assert cli.main(['plan', '--config', LOCAL, '--topology', 'gpu:8xh200', '--estimate', '--fit']) == 0
  out = capsys.readouterr().out
  assert 'fits: --config.train.micro_batches=1 ' in out and 'in and out of memory a chip and step' in out


@pytest.mark.slow
def test_two_slices_are_really_compiled(config):
  """Needs the TPU compiler, not a TPU."""
  pytest.importorskip('libtpu')
  with config.unlocked():
    config.model.image.depth = config.model.text.depth = 1
  config_lib.override(config, ['mesh.fsdp=4'])
  found = plan.make(config, topology='v5e:2x2*2')
  assert found.method == 'compiled' and not any('messages' in n for n in found.notes), found.notes
  step = plan_step.Step(config, hardware.topology('v5e:2x2*2'))
  estimated = step.estimated_network(step.estimated_messages())
  assert estimated / 2 < found.network < 3 * estimated
  assert found.moved > found.memory.parameters + found.memory.optimizer
