"""Twenty steps of the whole tiny model are the same on 1, 4 and 8 devices, however state and batch are split."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cloc_jax import optim, sharding, train_step, trees

pytestmark = pytest.mark.slow
STEPS = 20
RULES = [('.*', 'fsdp')]
# In float32, sums over several devices round otherwise than sums on one, and Adam divides what is left by its own size:
# a mistake of 1e-3 would pass. In float64 such runs were seen to differ by 1e-12 at most.
TOLERANCE = 1e-9


@pytest.fixture(name='wide', scope='module', autouse=True)
def wide_fixture():
  """float64 wherever the code says float32, and FSDP for small arrays too."""
  with pytest.MonkeyPatch.context() as patch, jax.enable_x64(True):
    patch.setattr(jnp, 'float32', jnp.float64)
    patch.setattr(sharding, '_MIN_SPLIT_SIZE', 64)
    yield


@pytest.fixture(name='training', scope='module')
def training_fixture(make_model, make_batch, randomize):
  """training(data, fsdp, micro_batches, transport) → (metrics of each step, last state)."""
  model = make_model(image=dict(depth=1), prompter=dict(chunk=2), dtype=jnp.float64)
  batches = [make_batch(seed, images=16) for seed in range(STEPS)]
  tx, rate = optim.make(total_steps=STEPS, warmup_steps=2, learning_rate=3e-3)
  params = randomize(jax.eval_shape(model.init, jax.random.key(0), batches[0])['params'])
  params = jax.tree.map(np.float64, params) | {'t': np.float64(1.5)}

  @functools.cache
  def training(data, fsdp, micro_batches, transport):
    mesh = sharding.make_mesh(data=data, fsdp=fsdp, devices=jax.devices()[:data * fsdp])
    state = train_step.TrainState(jnp.int32(0), params, tx.init(params), params)
    shardings = train_step.state_sharding(state, mesh=mesh, rules=RULES)
    # The step donates its state, and the next mesh starts from the same arrays.
    state = jax.device_put(jax.tree.map(np.array, state), shardings)
    step = train_step.jit_train_step(
        mesh=mesh, shardings=shardings, model=model, tx=tx, rate=rate, micro_batches=micro_batches, ema_decay=0.75,
        loss={'filter_threshold': 0.999, 'transport': transport, 'tile': 16})
    history = []
    for batch in batches:
      state, metrics = step(state, sharding.to_global(batch, mesh))
      history.append(jax.tree.map(float, metrics))
    return history, state
  return training


@pytest.mark.parametrize('data, fsdp, micro_batches, transport', [
    (4, 1, 1, 'gather'), (2, 2, 2, 'ring'), (2, 4, 1, 'gather+ring')])
def test_twenty_steps_are_those_of_one_device(training, data, fsdp, micro_batches, transport):
  history, state = training(1, 1, 1, 'gather')
  other_history, other_state = training(data, fsdp, micro_batches, transport)
  # It is a training: the loss falls, some pairs are filtered and some not. All is float64, and split as it should be.
  assert history[-1]['loss'] < 0.9 * history[0]['loss']
  assert all(0 < h['filtered_pairs'] < 0.5 for h in history), [h['filtered_pairs'] for h in history]
  kinds = {str(x.dtype) for x in jax.tree.leaves(other_state)}
  assert kinds == {'float64', 'int32'}
  kernel = other_state.params['img']['embedding']['kernel']
  assert kernel.addressable_shards[0].data.size == kernel.size // fsdp
  for mine, theirs in zip(history, other_history, strict=True):
    assert set(mine) == set(theirs)
    for name in mine:
      np.testing.assert_allclose(theirs[name], mine[name], rtol=TOLERANCE, err_msg=name)
  for (path, x), y in zip(trees.flatten(state).items(), trees.flatten(other_state).values(), strict=True):
    np.testing.assert_allclose(y, x, rtol=TOLERANCE, atol=TOLERANCE, err_msg=path)
