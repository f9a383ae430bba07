"""The training step: accumulation, devices, masks, and what an update does to the state."""
import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cloc_jax import optim, sharding, train_step, trees
from cloc_jax.batch import Outputs
from cloc_jax.models.cloc import MAX_LOG_SCALE
from cloc_jax.models.layers import l2_normalize

LOSS = {'filter_threshold': 0.9}
RULES = [('.*', 'fsdp')]
STEPS = 4


class Small(nn.Module):
  """Outputs from a batch with a handful of parameters: compiles in a second, where the whole model takes half a minute.

  What is said here of the state (steps, devices, averages) does not depend on what the model computes.
  """

  @nn.compact
  def __call__(self, batch):
    b, m, length = batch.region_text.shape
    pixels = batch.image.astype(jnp.float32).reshape(b, -1) / 255 - 0.5
    image = nn.tanh(nn.Dense(16, name='img')(pixels))
    words = nn.Embed(32, 16, name='txt')
    region = image[:, None] + nn.Dense(16, name='prompter')(batch.boxes)
    head = nn.Dense(8, use_bias=False, name='head')
    z_region_text = l2_normalize(head(words(batch.region_text).mean(2)))
    t, bias = self.param('t', nn.initializers.constant(2.0), ()), self.param('b', nn.initializers.zeros, ())
    return Outputs(
        z_image=l2_normalize(head(image)), z_text=l2_normalize(head(words(batch.text).mean(1))),
        z_region=l2_normalize(head(region)), z_region_text=z_region_text,
        pred_boxes=nn.sigmoid(nn.Dense(4, name='box_head')(z_region_text)), logit_scale=jnp.exp(t), logit_bias=bias,
        region_logit_scale=jnp.exp(t), region_logit_bias=bias)


@pytest.fixture(name='setup', scope='module', params=['small', pytest.param('cloc', marks=pytest.mark.slow)])
def setup_fixture(request, make_model, make_batch, randomize):
  """(model, randomised parameters, batch of 8, compiled loss_and_grads(params, batch, micro_batches))."""
  model = Small() if request.param == 'small' else make_model(prompter=dict(chunk=2))
  batch = make_batch(images=8)
  params = randomize(jax.eval_shape(model.init, jax.random.key(0), batch)['params'], seed=1)
  params['t'] = np.float32(1.5)
  run = jax.jit(lambda params, batch, parts: train_step.loss_and_grads(
      model, params, batch, loss=LOSS, micro_batches=parts), static_argnums=2)
  return model, params, batch, run


def assert_trees_close(got, want, *, rtol, atol):
  """atol is relative to the largest gradient of the whole tree."""
  largest = max(np.abs(x).max() for x in jax.tree.leaves(want))
  for (path, x), y in zip(trees.flatten(got).items(), trees.flatten(want).values()):
    np.testing.assert_allclose(x, y, rtol=rtol, atol=atol * largest, err_msg=path)


def test_gradients_are_those_of_the_loss(setup):
  _, params, batch, run = setup
  value, metrics, grads = run(params, batch, 1)
  assert metrics['loss'] == value and metrics['filtered_pairs'] > 0 and 0 < metrics['lambda'] < 1
  # Along the gradient, the loss must change by its squared norm.
  norm = float(trees.global_norm(grads))
  step = 1e-3 / norm
  (ahead, there, _), (behind, here, _) = (
      run(jax.tree.map(lambda p, g, s=s: p + s * step * g, params, grads), batch, 1) for s in (1, -1))
  assert there['filtered_pairs'] == here['filtered_pairs']  # a pair that crosses the threshold makes the loss jump
  np.testing.assert_allclose((float(ahead) - float(behind)) / (2 * step), norm**2, rtol=0.01)


def test_micro_batches_change_nothing(setup):
  _, params, batch, run = setup
  value, metrics, grads = run(params, batch, 1)
  other, other_metrics, others = run(params, batch, 4)
  np.testing.assert_allclose(other, value, rtol=1e-5)
  assert set(metrics) == set(other_metrics)
  for name in metrics:
    np.testing.assert_allclose(other_metrics[name], metrics[name], rtol=1e-5, err_msg=name)
  assert_trees_close(others, grads, rtol=1e-3, atol=1e-5)
  assert grads['t'] != 0
  np.testing.assert_allclose(others['t'], grads['t'], rtol=1e-4)


def test_a_batch_that_does_not_divide_is_an_error(setup):
  model, params, batch, _ = setup
  with pytest.raises(ValueError, match='train.micro_batches: 3 does not divide the batch of 8'):
    train_step.loss_and_grads(model, params, batch, loss=LOSS, micro_batches=3)


def test_masked_examples_and_regions_do_not_touch_the_gradients(setup):
  _, params, batch, run = setup
  rng = np.random.default_rng(7)
  gone = np.array([0, 1, 0, 0, 0, 1, 0, 0], bool)
  region_mask = batch.region_mask & ~gone[:, None]
  masked = dataclasses.replace(batch, image_mask=~gone, region_mask=region_mask)
  noise = lambda x, high: rng.integers(0, high, x.shape).astype(x.dtype)
  rows = lambda x, y: np.where(gone.reshape(-1, *(1,) * (x.ndim - 1)), y, x)
  regions = lambda x, y: np.where(region_mask[..., None], x, y)
  garbage = dataclasses.replace(
      masked, image=rows(batch.image, noise(batch.image, 256)), text=rows(batch.text, noise(batch.text, 29)),
      boxes=regions(batch.boxes, rng.normal(size=batch.boxes.shape).astype(np.float32)),
      region_text=regions(batch.region_text, noise(batch.region_text, 29)))
  assert (garbage.region_text != masked.region_text).any() and (garbage.image != masked.image).any()
  value, _, grads = run(params, masked, 1)
  other, _, others = run(params, garbage, 1)
  np.testing.assert_allclose(other, value, rtol=1e-6)
  assert_trees_close(others, grads, rtol=1e-5, atol=1e-7)
  # They did count before they were masked.
  assert abs(run(params, batch, 1)[0] - value) > 1e-3


def test_an_all_masked_batch_gives_no_gradient_at_all(setup):
  _, params, batch, run = setup
  nothing = dataclasses.replace(batch, image_mask=np.zeros_like(batch.image_mask),
                                region_mask=np.zeros_like(batch.region_mask))
  value, metrics, grads = run(params, nothing, 1)
  assert value == 0 and all(np.isfinite(v) for v in metrics.values())
  assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(grads))


@pytest.fixture(name='small_arrays_split', autouse=True, scope='module')
def small_arrays_split_fixture():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, '_MIN_SPLIT_SIZE', 64)
    yield


@pytest.fixture(name='training', scope='module')
def training_fixture(make_batch):
  """training(devices, fsdp, micro_batches) → (first parameters, metrics of each step, last state, shardings)."""
  model = Small()
  batches = [make_batch(seed, images=8) for seed in range(STEPS)]

  @functools.cache
  def training(devices, fsdp, micro_batches):
    mesh = sharding.make_mesh(data=-1, fsdp=fsdp, devices=jax.devices()[:devices])
    tx, rate = optim.make(total_steps=10, warmup_steps=1, learning_rate=1e-2)
    init = train_step.initializer(model, tx, batches[0], ema=True)
    shardings = train_step.state_sharding(train_step.abstract_state(init), mesh=mesh, rules=RULES)
    state = train_step.init_state(init, shardings=shardings, seed=3)
    start = jax.tree.map(np.asarray, state.params)
    step = train_step.jit_train_step(mesh=mesh, shardings=shardings, model=model, tx=tx, rate=rate, loss=LOSS,
                                     micro_batches=micro_batches, ema_decay=0.75)
    history = []
    for batch in batches:
      state, metrics = step(state, sharding.to_global(batch, mesh))
      history.append(jax.tree.map(float, metrics))
    return start, history, state, shardings
  return training


@pytest.mark.parametrize('devices, fsdp, micro_batches', [(4, 1, 1), (4, 2, 1), (4, 2, 4)])
def test_devices_and_micro_batches_change_nothing(training, devices, fsdp, micro_batches):
  start, history, state, _ = training(1, 1, 1)
  other_start, other_history, other_state, _ = training(devices, fsdp, micro_batches)
  jax.tree.map(np.testing.assert_array_equal, other_start, start)
  assert abs(history[-1]['loss'] - history[1]['loss']) > 0.1
  for mine, theirs in zip(history, other_history):
    assert set(mine) == set(theirs)
    for name in mine:
      np.testing.assert_allclose(theirs[name], mine[name], rtol=1e-4, atol=1e-6, err_msg=name)
  for (path, x), y in zip(trees.flatten(state.params).items(), trees.flatten(other_state.params).values()):
    np.testing.assert_allclose(y, x, rtol=1e-3, atol=1e-4, err_msg=path)


def test_fsdp_splits_parameters_moments_and_averages_alike(training):
  *_, state, shardings = training(4, 2, 1)
  moments = [x for path, x in trees.flatten(state.opt_state).items() if path.endswith('/img/kernel')]
  assert len(moments) == 2
  for leaf in (state.params['img']['kernel'], state.ema['img']['kernel'], *moments):
    assert leaf.shape == (768, 16) and leaf.addressable_shards[0].data.shape == (384, 16)
  assert state.params['t'].sharding.is_fully_replicated and state.step.sharding.is_fully_replicated
  jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or pytest.fail(str(s)), state, shardings)


def test_parameters_split_over_devices_give_the_same_gradients(setup):
  _, params, batch, run = setup
  mesh = sharding.make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])
  split = jax.device_put(params, sharding.tree_sharding(params, mesh, RULES))
  assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(split))
  value, metrics, grads = run(params, batch, 1)
  other, other_metrics, others = run(split, sharding.to_global(batch, mesh), 1)
  np.testing.assert_allclose(other, value, rtol=1e-5)
  for name in metrics:
    np.testing.assert_allclose(other_metrics[name], metrics[name], rtol=1e-5, err_msg=name)
  assert_trees_close(others, grads, rtol=1e-3, atol=1e-5)


def test_state_and_metrics_of_a_run(training):
  start, history, state, _ = training(1, 1, 1)
  assert state.step == STEPS and state.step.dtype == jnp.int32
  _, rate = optim.make(total_steps=10, warmup_steps=1, learning_rate=1e-2)
  np.testing.assert_allclose([h['learning_rate'] for h in history], [rate(s) for s in range(STEPS)], rtol=1e-6)
  assert all(h['grad_norm'] > 0 and np.isfinite(h['param_norm']) for h in history)
  np.testing.assert_allclose(history[-1]['param_norm'], trees.global_norm(state.params), rtol=1e-5)
  # The first step of a warm-up from 0 moves nothing; all parameters have moved at the end.
  np.testing.assert_allclose(history[0]['param_norm'], trees.global_norm(start), rtol=1e-6)
  for path, (before, after) in zip(trees.flatten(start), zip(jax.tree.leaves(start), jax.tree.leaves(state.params))):
    assert path == 'b' or (np.asarray(before) != np.asarray(after)).any(), path


def test_the_average_follows_its_definition_and_the_scale_stays_at_100(make_batch, randomize):
  batch = make_batch(images=8)
  params = randomize(jax.eval_shape(Small().init, jax.random.key(0), batch)['params'])
  climb = optax.GradientTransformation(lambda _: (), lambda grads, state, params: (
      jax.tree.map(lambda p: jnp.full_like(p, 0.01), params), state))
  step = jax.jit(functools.partial(train_step.train_step, model=Small(), tx=climb, rate=lambda step: step / 10,
                                   loss=LOSS, ema_decay=0.9))
  for start, scale in ((MAX_LOG_SCALE + 0.2, 100), (MAX_LOG_SCALE - 1e-4, 100), (2.0, np.exp(2.01))):
    params['t'] = np.float32(start)
    before = train_step.TrainState(jnp.int32(6), params, (), jax.tree.map(lambda x: x + np.float32(1), params))
    after, metrics = step(before, batch)
    np.testing.assert_allclose(jnp.exp(after.params['t']), scale, rtol=1e-5)
    np.testing.assert_allclose(after.params['img']['kernel'], params['img']['kernel'] + 0.01, rtol=1e-4)
    jax.tree.map(lambda old, new, ema: np.testing.assert_allclose(ema, 0.9 * old + 0.1 * new, rtol=1e-4, atol=1e-6),
                 before.ema, after.params, after.ema)
    assert after.step == 7 and metrics['learning_rate'] == np.float32(0.6)


def test_the_loss_is_told_the_step(make_batch):
  batch = make_batch(images=8)
  params = jax.jit(Small().init)(jax.random.key(0), batch)['params']
  tx = optax.identity()
  step = jax.jit(functools.partial(train_step.train_step, model=Small(), tx=tx, rate=lambda _: 0.0, micro_batches=2,
                                   loss={'filter_threshold': 0.9, 'filter_from_step': 3}))
  filtered = [step(train_step.TrainState(jnp.int32(i), params, tx.init(params), None), batch)[1]['filtered_pairs']
              for i in (0, 2, 3, 4)]
  assert filtered[0] == filtered[1] == 0 and filtered[2] == filtered[3] > 0


def test_abstract_state_has_the_real_shapes(training, make_model, make_batch):
  *_, state, _ = training(1, 1, 1)
  tx, _ = optim.make(total_steps=10, warmup_steps=1)
  shapes = train_step.abstract_state(train_step.initializer(Small(), tx, make_batch(images=8), ema=True))
  assert jax.tree.structure(shapes) == jax.tree.structure(state)
  jax.tree.map(lambda s, x: (s.shape, s.dtype) == (x.shape, x.dtype) or pytest.fail(f'{s} {x.shape}'), shapes, state)
  assert train_step.abstract_state(train_step.initializer(make_model(), tx, make_batch(images=8))).ema is None


def test_evaluation_reports_the_terms_of_the_loss(setup):
  model, params, batch, run = setup
  metrics = jax.jit(functools.partial(train_step.eval_step, model=model, loss=LOSS))(params, batch)
  want = run(params, batch, 1)[1]
  assert set(metrics) == set(want)
  for name in want:
    np.testing.assert_allclose(metrics[name], want[name], rtol=1e-5, err_msg=name)
