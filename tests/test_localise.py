"""Starting from somebody's CLIP: frozen towers, late ones, the guard; through the real trainer on drawn scenes."""
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny_experiment
import tokenizers

import cloc_jax
from cloc_jax import checkpoint, cli, guard, initialize, optim, train, train_step, trees
from cloc_jax import config as config_lib
from cloc_jax.data import clip_vocabulary
from cloc_jax.interop import open_clip

D, T, E, WORDS, LENGTH = 32, 16, 16, 600, 10
CONFIG = tiny_experiment.ROOT / 'configs' / 'localise.py'
LOSS = dict(image_text='softmax', grounding='l2', filter_threshold=0.9)


@pytest.fixture(name='foreign', scope='module')
def foreign_fixture(tmp_path_factory):
  """(open_clip:FILE, its arrays): a random CLIP as open_clip's repositories lie on the hub, half in float16."""
  folder = tmp_path_factory.mktemp('open_clip')
  config = {'model_cfg': {
      'embed_dim': E, 'quick_gelu': True,
      'vision_cfg': {'image_size': 24, 'layers': 2, 'width': D, 'head_width': 16, 'patch_size': 12},
      'text_cfg': {'context_length': LENGTH, 'vocab_size': WORDS, 'width': T, 'heads': 2, 'layers': 1}}}
  (folder / 'open_clip_config.json').write_text(json.dumps(config))
  spec = open_clip.spec(config)
  rng = np.random.default_rng(0)
  block = lambda prefix, d: {
      f'{prefix}.attn.in_proj_weight': (3 * d, d), f'{prefix}.attn.in_proj_bias': (3 * d,),
      f'{prefix}.attn.out_proj.weight': (d, d), f'{prefix}.attn.out_proj.bias': (d,),
      **{f'{prefix}.{n}.{k}': (d,) for n in ('ln_1', 'ln_2') for k in ('weight', 'bias')},
      f'{prefix}.mlp.c_fc.weight': (4 * d, d), f'{prefix}.mlp.c_fc.bias': (4 * d,),
      f'{prefix}.mlp.c_proj.weight': (d, 4 * d), f'{prefix}.mlp.c_proj.bias': (d,)}
  names = {**block('visual.transformer.resblocks.0', D), **block('visual.transformer.resblocks.1', D),
           **block('transformer.resblocks.0', T), 'visual.class_embedding': (D,), 'visual.conv1.weight': (D, 3, 12, 12),
           **{f'{n}.{k}': (D,) for n in ('visual.ln_pre', 'visual.ln_post') for k in ('weight', 'bias')},
           'visual.positional_embedding': (5, D), 'visual.proj': (D, E), 'token_embedding.weight': (WORDS, T),
           'positional_embedding': (LENGTH, T), 'ln_final.weight': (T,), 'ln_final.bias': (T,),
           'text_projection': (T, E), 'logit_scale': ()}
  state = {name: np.asarray((rng.normal(size=shape) * 0.2 + ('ln_' in name and name.endswith('weight'))).astype(
      np.float16 if 'mlp' in name else np.float32)) for name, shape in names.items()}
  state['logit_scale'] = np.float32(4.7)  # above the bound that trained ones are held to
  safetensors.numpy.save_file({k: np.asarray(v) for k, v in state.items()}, folder / 'model.safetensors')
  write_tokenizer(folder)
  return f'open_clip:{folder / "model.safetensors"}', state, spec


def write_tokenizer(folder):
  letters = clip_vocabulary.byte_letters()
  tokens = [*letters, *(c + '</w>' for c in letters)]
  tokens += [f'unused {i}' for i in range(WORDS - 2 - len(tokens))] + ['<|startoftext|>', '<|endoftext|>']
  made = tokenizers.Tokenizer(tokenizers.models.BPE(
      vocab={t: i for i, t in enumerate(tokens)}, merges=[], end_of_word_suffix='</w>', unk_token='<|endoftext|>'))
  made.normalizer = tokenizers.normalizers.Lowercase()
  made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
      tokenizers.pre_tokenizers.Whitespace(),
      tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
  made.post_processor = tokenizers.processors.TemplateProcessing(
      single='<|startoftext|> $A <|endoftext|>',
      special_tokens=[('<|startoftext|>', WORDS - 2), ('<|endoftext|>', WORDS - 1)])
  made.save(str(folder / 'tokenizer.json'))


def overrides(**more):
  values = {'data.batch_size': 16, 'data.num_workers': 0, 'model.prompter.pool': 'prompt', 'data.image_size': 36,
            'optim.multipliers': (('img/.*', 0.1, 2), ('txt/.*|t|b', 0.0)),
            'data.regions_per_image': 2, 'model.dtype': 'float32',
            'optim.warmup_steps': 1, 'evals.every_steps': 2, 'evals.splits': (), 'evals.batch_size': 12,
            'checkpoint.every_steps': 2, 'checkpoint.keep': 20, 'train.total_steps': 4, 'train.log_steps': 1, **more}
  return [f'{key}={value!r}' if not isinstance(value, str) else f'{key}={value}' for key, value in values.items()]


def params_at(workdir, step):
  keeper = checkpoint.Checkpointer(workdir / 'checkpoints', read_only=True)
  try:
    return trees.flatten(jax.tree.map(np.asarray, keeper.restore_params(step)))
  finally:
    keeper.close()


def test_frozen_towers_stay_bit_for_bit_and_late_ones_wait(foreign, base, tmp_path):
  name, state, spec = foreign
  config = config_lib.load(f'{CONFIG}:{name},{tiny_experiment.data(base)}')
  assert config.optim.multipliers == (('(img|txt)/.*|t|b', 0.0),)
  config_lib.override(config, overrides())
  with tiny_experiment.compiled_once(base):  # the guard's run takes the same steps
    result = train.train(config, workdir=tmp_path, quiet=True)
  assert result.status == 'done'
  start = trees.flatten(open_clip.to_jax(state, spec).params)
  early, late = params_at(tmp_path, 2), params_at(tmp_path, 4)
  assert late['t'] == np.float32(4.7)
  for path, x in start.items():
    if path == 'img/pos_embedding':  # 2 × 2 → 3 × 3 patches
      assert early[path].shape == (1, 10, D)
      continue
    np.testing.assert_array_equal(early[path], x, err_msg=path)
    assert np.array_equal(late[path], x) == (not path.startswith('img/')), path
  moved = [path for path in early if path.startswith(('prompter/', 'box_head/')) and (early[path] != late[path]).any()]
  assert len(moved) > 15 and 'region_t' in late
  report = (tmp_path / 'init.txt').read_text()
  assert 'float16 → float32' in report and '2×2 → 3×3' in report and 'fresh    prompter/head/kernel' in report
  # What the run wrote stands alone: the file it started from may go, and another run may start from it.
  again = initialize.of_config({'model': {'init': 'hf:gone'}, 'data': {}}, run=tmp_path)
  assert again.tokenizer.eos_id == WORDS - 1 and again.image_size == 36
  assert train.train(config, workdir=tmp_path, quiet=True).status == 'already_done'


def test_the_verb_writes_a_checkpoint_that_everything_reads(foreign, tmp_path, capsys):
  name, state, spec = foreign
  out = tmp_path / 'imported'
  assert cli.main(['import', name, '--out', str(out), '--prompter']) == 0
  printed = capsys.readouterr().out
  assert f'{len(state)} arrays loaded (float16 → float32)' in printed and 'box_head, prompter' in printed
  assert 'loaded   visual.conv1.weight (float32)' in (out / 'import.txt').read_text()
  cloc = cloc_jax.load(out)
  assert cloc.ground(cloc.encode_image(np.zeros((20, 30, 3), np.uint8)), ['a dog']).boxes.shape == (1, 4)
  want = trees.flatten(open_clip.to_jax(state, spec).params)
  init = initialize.open_init(str(out))
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), dict(cloc.params))
  flat, report = initialize.load_params(init, shapes, parts='image')
  assert {path.split('/')[0] for path in flat} == {'img'}
  assert set(report.skipped) == set(trees.flatten(shapes)) - set(flat)
  for path, x in flat.items():
    np.testing.assert_array_equal(x, want[path])
  assert cli.main(['import', name, '--out', str(out)]) == 2
  assert 'holds checkpoints already' in capsys.readouterr().err


def test_a_config_that_disagrees_with_its_init_is_told_where(foreign):
  name, *_ = foreign
  config = config_lib.load(str(tiny_experiment.ROOT / 'configs' / 'scenes_local.py'))
  config_lib.override(config, [f'model.init={name}'])
  with pytest.raises(ValueError) as error:
    initialize.resolve(config, initialize.of_config(config))
  for line in ('! model.image.width: the config says 128, the init has 32',
               "! model.image.posemb: the config says 'sincos2d'",
               '! model.text.depth: the config says 2, the init has 1', '! model.embed_dim: the config says 64',
               '! data.text_length: the config says 28', "! data.tokenizer: 'train:1024'"):
    assert line in str(error.value), line
  with pytest.raises(ValueError, match="init_parts: expected one of .*got 'images'"):
    initialize.resolve({'model': {'init_parts': 'images'}, 'data': {}}, None)


@pytest.mark.slow
def test_the_guard_saves_and_stops(foreign, base, tmp_path, monkeypatch, capsys):
  name, *_ = foreign
  figures = iter([0.5, 0.45, 0.2])  # before the first step, after 1, after 2
  monkeypatch.setattr(train, '_evaluator', lambda *_, **__: lambda params, step, progress: {
      'val': {'image_text_retrieval/t2i_r1': next(figures)}})
  argv = lambda floor: [
      'train', '--config', f'{CONFIG}:{name},{tiny_experiment.data(base)}', '--workdir', str(tmp_path), *(
          f'--config.{a}' for a in overrides(**{
              'evals.every_steps': 1, 'evals.splits': ('val',),
              'evals.floors': (('val/image_text_retrieval/t2i_r1', floor),)}))]
  assert cli.main(argv(0.6)) == 2
  assert 'before the first step, val/image_text_retrieval/t2i_r1 is 0.5000, below its floor of 0.6000' in (
      capsys.readouterr().err)
  figures = iter([0.5, 0.45, 0.2])
  with tiny_experiment.compiled_once(base):
    assert cli.main(argv(0.4)) == 3
  assert 'stopped after step 2, saved: val/image_text_retrieval/t2i_r1 is 0.2000' in capsys.readouterr().out
  assert tiny_experiment.newest(tmp_path) == 2


def test_floors_that_cannot_be_watched_are_errors():
  with pytest.raises(ValueError, match="the splits that are evaluated are .'val'"):
    guard.check_floors((('test/x', 0.1),), ['val'])
  with pytest.raises(ValueError, match="'val/grunding' was not measured. Did you mean 'val/grounding'"):
    guard.below({'val/grounding': 0.1}, (('val/grunding', 0.1),))
  assert guard.below({}, (('val/grounding', 0.1),)) == ''
  assert 'is nan' in guard.below({'val/x': float('nan')}, (('val/x', 0.1),))


@pytest.mark.parametrize('micro_batches', [1, pytest.param(2, marks=pytest.mark.slow)])
def test_gradients_of_some_are_those_of_all_and_cost_less(make_model, make_batch, randomize, micro_batches):
  model = make_model(image=dict(width=32), text=dict(width=24), prompter=dict(pool='prompt'))
  batch = make_batch(images=4)
  params = randomize(jax.eval_shape(model.init, jax.random.key(0), batch)['params'])
  trained = optim.trained(params, (('(img|txt)/.*|t|b', 0.0),))
  assert {path.split('/')[0] for path in trained} == {'prompter', 'box_head'}

  def compiled(trained):
    run = jax.jit(functools.partial(train_step.loss_and_grads, model, loss=LOSS, micro_batches=micro_batches,
                                    trained=trained))
    made = run.lower(params, batch).compile()
    return made(params, batch), made.cost_analysis()['flops']

  (value, _, everything), cost = compiled(None)
  (same, _, some), less = compiled(trained)
  np.testing.assert_allclose(same, value, rtol=1e-6)
  everything, some = trees.flatten(everything), trees.flatten(some)
  assert set(some) == trained
  for path, x in some.items():
    np.testing.assert_allclose(x, everything[path], rtol=1e-4, atol=1e-6 + 1e-4 * np.abs(everything[path]).max())
  if micro_batches == 1:  # (a loop's cost is counted once, however often it runs)
    assert less < 0.75 * cost


def test_rates_and_beginnings_by_group():
  params = {'img': {'kernel': jnp.ones((2, 2))}, 'prompter': {'kernel': jnp.ones((2, 2))}, 't': jnp.ones(())}
  rows = (('img/.*', 0.25, 2), ('t', 0))
  tx, rate = optim.make(total_steps=100, warmup_steps=0, learning_rate=0.1, weight_decay=0.5, clip_norm=None,
                        multipliers=rows)
  plain, _ = optim.make(total_steps=100, warmup_steps=0, learning_rate=0.1, weight_decay=0.5, clip_norm=None)
  state, other = tx.init(params), plain.init({'prompter': params['prompter']})
  held = {path for path in trees.flatten(state) if path.startswith('inner')}
  assert not any('/t' in path[-2:] for path in held) and any('/mu/img/kernel' in path for path in held)
  gradient = {'img': {'kernel': jnp.full((2, 2), 0.3)}, 'prompter': {'kernel': jnp.full((2, 2), -0.2)}}
  mine = {'prompter': params['prompter']}
  for step in range(4):
    assert optim.trained(params, rows, step=step) == {'prompter/kernel', *(['img/kernel'] if step >= 2 else [])}
    given = gradient if step >= 2 else {'prompter': gradient['prompter']}
    updates, state = tx.update(given, state, params)
    want, other = plain.update({'prompter': gradient['prompter']}, other, mine)
    np.testing.assert_allclose(updates['prompter']['kernel'], want['prompter']['kernel'], rtol=1e-6)
    assert 't' not in updates
    if step < 2:
      assert not np.asarray(updates['img']['kernel']).any()
    if step == 2:  # Adam without bias correction left, then decay, then a quarter of the rate
      adam = 0.1 * 0.3 / np.sqrt(0.02 * 0.3**2) / (1 - 0.9**3) * np.sqrt(1 - 0.98**3)
      np.testing.assert_allclose(updates['img']['kernel'], -0.25 * rate(2) * (adam + 0.5), rtol=1e-4)
    params, mine = optim.apply(params, updates), optim.apply(mine, want)
  assert optim.stages(rows) == [0, 2] and optim.stages(()) == [0]
  with pytest.raises(ValueError, match="'image/.*' matches no parameter"):
    optim.trained(params, (('image/.*', 0.0),))
  with pytest.raises(ValueError, match='expected rows'):
    optim.trained(params, (('img/.*',),))
  with pytest.raises(ValueError, match='every parameter is frozen'):
    optim.make(total_steps=9, warmup_steps=1, multipliers=(('.*', 0.0),))[0].init(params)
