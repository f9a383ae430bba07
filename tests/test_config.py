"""Experiment files, overrides and checked calls: what is right goes through, what is wrong is named with its neighbour."""
import json
import pathlib

import ml_collections
import pytest
import tiny_experiment

from cloc_jax import config as config_lib
from cloc_jax import inference, losses, optim, sharding, train


@pytest.fixture(name='config')
def config_fixture():
  return tiny_experiment.get_config('some/data')


def write_config(folder, name='small.py', *, body='return dict.fromkeys(SECTIONS, {})', head=''):
  sections = 'SECTIONS = ' + repr(config_lib.SECTIONS)
  (folder / name).write_text(f'{head}\n{sections}\ndef get_config(arg=""):\n  {body}\n')
  return folder / name


# --- files


def test_the_argument_behind_the_colon_reaches_the_file(tmp_path):
  path = write_config(tmp_path, body='return dict.fromkeys(SECTIONS, arg)')
  assert config_lib.load(f'{path}:a,b=c')['data'] == 'a,b=c'
  assert config_lib.load(str(path))['train'] == ''


def test_a_file_may_import_the_files_beside_it_and_nobody_elses(tmp_path):
  found = []
  for name in ('one', 'two'):
    folder = tmp_path / name
    folder.mkdir()
    (folder / 'recipe_beside.py').write_text(f'NAME = {name!r}\n')
    late = 'import recipe_later; return dict.fromkeys(SECTIONS, recipe_beside.NAME + recipe_later.NAME)'
    (folder / 'recipe_later.py').write_text(f'NAME = {name!r}\n')
    path = write_config(folder, head='import recipe_beside', body=late)
    found.append(config_lib.load(str(path))['data'])
  assert found == ['oneone', 'twotwo']
  with pytest.raises(ModuleNotFoundError):
    import recipe_beside  # noqa: F401  the search path is as it was


def test_a_missing_file_names_the_nearest(tmp_path):
  write_config(tmp_path, 'scenes_local.py')
  write_config(tmp_path, 'other.py')
  with pytest.raises(FileNotFoundError, match=r"scenes_locl\.py' not found\. Did you mean 'scenes_local\.py'\?"):
    config_lib.load(str(tmp_path / 'scenes_locl.py'))
  with pytest.raises(FileNotFoundError, match=r"\['other\.py', 'scenes_local\.py'\]"):
    config_lib.load(str(tmp_path / 'qqq.py'))
  with pytest.raises(FileNotFoundError, match='nowhere'):
    config_lib.load(str(tmp_path / 'nowhere' / 'x.py'))


def test_a_file_without_get_config(tmp_path):
  (tmp_path / 'empty.py').write_text('')
  with pytest.raises(ValueError, match='empty.py: expected a function get_config'):
    config_lib.load(str(tmp_path / 'empty.py'))


@pytest.mark.parametrize('body, message', [
    ('return {**dict.fromkeys(SECTIONS, {}), "modle": {}}', "unknown section 'modle'. Did you mean 'model'"),
    ('return {k: {} for k in SECTIONS if k not in ("optim", "loss")}', r"missing sections \['loss', 'optim'\]"),
])
def test_sections_are_checked(tmp_path, body, message):
  with pytest.raises(ValueError, match=message):
    config_lib.load(str(write_config(tmp_path, body=body)))


# --- overrides


@pytest.mark.parametrize('text, expected', [
    ('optim.learning_rate=1e-4', 1e-4),
    ('optim.learning_rate=1', 1.0),
    ('data.batch_size=32', 32),
    ('data.path=/a=b/c d', '/a=b/c d'),
    ('data.path=123', '123'),
    ('data.path=None', None),
    ('loss.filter_threshold=None', None),
    ('loss.filter_threshold=none', None),
    ('evals.every_steps=7', 7),
    ("evals.splits=('val', 'unseen')", ('val', 'unseen')),
    ('evals.splits=["val"]', ('val',)),
    ('evals.splits=()', ()),
    ("mesh.rules=(('.*bias','replicate'),('.*','fsdp'))", (('.*bias', 'replicate'), ('.*', 'fsdp'))),
    ('model.image.variant=Ti/16', 'Ti/16'),
    ('model.separate_temperature=true', True),
    ('model.separate_temperature=False', False),
])
def test_override_values(config, text, expected):
  config.mesh.rules = (('.*', 'fsdp'),)
  config.model.separate_temperature = not expected if isinstance(expected, bool) else False
  config_lib.override(config, [text])
  node = config
  for key in text.partition('=')[0].split('.'):
    node = node[key]
  assert node == expected and type(node) is type(expected)


def test_later_overrides_win_and_nothing_else_changes(config):
  before = json.loads(config_lib.to_json(config))
  config_lib.override(config, ['data.batch_size=8', 'data.batch_size=24'])
  after = json.loads(config_lib.to_json(config))
  assert after['data'].pop('batch_size') == 24
  del before['data']['batch_size']
  assert after == before


@pytest.mark.parametrize('wrong, behind, nearest', [
    ('modle', '.embed_dim', 'model'),
    ('data.batchsize', '', 'batch_size'),
    ('model.embed_dims', '', 'embed_dim'),
    ('model.imge', '.width', 'image'),
    ('model.image.widht', '', 'width'),
    ('model.text.dept', '', 'depth'),
    ('model.prompter.pol', '', 'pool'),
    ('loss.filter_treshold', '', 'filter_threshold'),
    ('optim.lerning_rate', '', 'learning_rate'),
    ('mesh.fdsp', '', 'fsdp'),
    ('evals.split', '', 'splits'),
    ('checkpoint.every_step', '', 'every_steps'),
    ('train.totalsteps', '', 'total_steps'),
])
def test_unknown_keys_on_the_command_line(config, wrong, behind, nearest):
  with pytest.raises(KeyError) as error:
    config_lib.override(config, [f'{wrong}{behind}=1'])
  assert error.value.args[0].startswith(f'--config.{wrong}: no such key. Did you mean {nearest!r}? Keys: [')


@pytest.mark.parametrize('text, message', [
    ('data.batch_size=x', r"data\.batch_size: expected int \(now 16\), got str 'x'"),
    ('data.batch_size=1.5', 'expected int .* got float'),
    ('data.batch_size=True', 'expected int .* got bool'),
    ('model.separate_temperature=1', 'expected bool .* got int'),
    ('optim.learning_rate=fast', "expected float .* got str 'fast'"),
    ('optim.learning_rate=True', 'expected float .* got bool'),
    ('evals.splits=val', 'expected tuple .* got str'),
    ('model.image=3', r"model\.image: is a section, set one of its keys \['depth'"),
])
def test_wrong_types_on_the_command_line(config, text, message):
  config.model.separate_temperature = False
  with pytest.raises(TypeError, match=message):
    config_lib.override(config, [text])


def test_malformed_overrides(config):
  with pytest.raises(ValueError, match=r'expected --config\.data\.path=VALUE'):
    config_lib.override(config, ['data.path'])
  with pytest.raises(KeyError, match='data.path is a value, not a section'):
    config_lib.override(config, ['data.path.more=1'])


def test_overrides_are_told_from_other_arguments():
  found = config_lib.split_overrides(
      ['train', '--config', 'x.py:a', '--config.a.b=1=2', '--workdir', 'w', '--config.c', '3', '--config=y.py',
       '--config.text=two\nlines', '--config.last'])
  assert found == (['a.b=1=2', 'c=3', 'text=two\nlines', 'last'],
                   ['train', '--config', 'x.py:a', '--workdir', 'w', '--config=y.py'])


# --- checked calls: keys that a file has and nobody takes


@pytest.mark.parametrize('fn, name, nearest', [
    (train.TrainOptions, 'train', 'total_steps'),
    (train.DataOptions, 'data', 'batch_size'),
    (train.EvalOptions, 'evals', 'pool_limit'),
    (train.CheckpointOptions, 'checkpoint', 'keep_best'),
    (optim.make, 'optim', 'warmup_steps'),
    (sharding.make_mesh, 'mesh', 'fsdp'),
])
def test_unknown_keys_in_a_file(config, fn, name, nearest):
  extra = {'total_steps': 9} if name == 'optim' else {}
  config_lib.call(fn, config[name], name=name, **extra)
  section = dict(config[name], **{f'{nearest[:-1]}x': 1})
  with pytest.raises(TypeError, match=rf'config\.{name}\.{nearest[:-1]}x: no such key\. Did you mean {nearest!r}\?'):
    config_lib.call(fn, section, name=name, **extra)


def test_unknown_loss_key_in_a_file(config):
  with pytest.raises(TypeError, match=r"config\.loss\.lamda0: no such key\. Did you mean 'lambda0'\?"):
    config_lib.call(losses.total, dict(config.loss, lamda0=2.0), None, None, name='loss')


class _Tokenizer:
  vocab_size, eos_id = 30, 1


@pytest.mark.parametrize('part, key, nearest', [
    ('image', 'posem', 'posemb'), ('text', 'widht', 'width'), ('prompter', 'chunks', 'chunk'),
    (None, 'embed_dims', 'embed_dim'), (None, 'region_encode', 'region_encoder'),
])
def test_unknown_model_keys_in_a_file(config, part, key, nearest):
  with config.unlocked():
    (config.model[part] if part else config.model)[key] = 1
  where = f'{part}.{key}' if part else key
  with pytest.raises(TypeError, match=rf"config\.model\.{where}: no such key\. Did you mean '{nearest}'\?"):
    inference.build_model(config, tokenizer=_Tokenizer())


def test_what_the_program_sets_itself_is_no_key():
  def fn(first, *, given, free=1):
    return first, given, free
  assert config_lib.call(fn, {'free': 2}, 'x', name='part', given=3) == ('x', 3, 2)
  with pytest.raises(TypeError, match=r"config\.part\.given: no such key.* Keys: \['free'\]"):
    config_lib.call(fn, {'given': 2}, 'x', name='part', given=3)
  with pytest.raises(TypeError, match=r'config\.part\.first: no such key'):
    config_lib.call(fn, {'first': 2}, 'x', name='part', given=3)


def test_missing_keys_are_named():
  with pytest.raises(TypeError, match=r"config\.data: missing \['batch_size', 'image_size'\]"):
    config_lib.call(train.DataOptions, {'path': 'x'}, name='data')


# --- conversions


def test_json_and_plain_survive_nesting():
  config = ml_collections.ConfigDict(dict(a=dict(b=(1, (2, 'x')), c=None), d=[dict(e=1.5)]))
  plain = config_lib.plain(config)
  assert plain == {'a': {'b': (1, (2, 'x')), 'c': None}, 'd': [{'e': 1.5}]}
  assert type(plain['a']) is dict and type(plain['a']['b']) is tuple and type(plain['d'][0]) is dict
  assert json.loads(config_lib.to_json(config)) == {'a': {'b': [1, [2, 'x']], 'c': None}, 'd': [{'e': 1.5}]}


@pytest.mark.parametrize('section, expected', [
    (dict(total_steps=7), 7),
    (dict(total_steps=7, total_epochs=None), 7),
    (dict(total_examples=100), 6),  # 100 / 16 = 6.25
    (dict(total_epochs=2), 12),  # 2 · 96 / 16
    (dict(total_epochs=0.5), 3),
    (dict(total_epochs=1e-3), 1),
])
def test_durations(section, expected):
  found = config_lib.duration(section, 'total', batch_size=16, dataset_size=96)
  assert found == expected and type(found) is int


@pytest.mark.parametrize('section, message', [
    ({}, 'expected one of total_steps, total_examples, total_epochs, got none'),
    (dict(total_steps=1, total_epochs=2), "got {'steps': 1, 'epochs': 2}"),
    (dict(total_steps=0), 'total_steps: expected a positive number, got 0'),
    (dict(total_examples=-3), 'total_examples: expected a positive number, got -3'),
])
def test_wrong_durations(section, message):
  with pytest.raises(ValueError, match=message):
    config_lib.duration(section, 'total', batch_size=16, dataset_size=96)


def test_epochs_of_unknown_length():
  with pytest.raises(ValueError, match='total_epochs: the size of the data set is unknown; give total_steps'):
    config_lib.duration(dict(total_epochs=1), 'total', batch_size=16)


def test_the_experiment_of_the_tests_loads_like_any_other():
  config = config_lib.load(f'{tiny_experiment.CONFIG}:some/where')
  assert config.data.path == 'some/where' and pathlib.Path(tiny_experiment.CONFIG).is_file()
