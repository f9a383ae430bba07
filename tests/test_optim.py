"""The schedule, the decay mask, and AdamW against its equations."""
import math

import jax
import numpy as np
import pytest

from cloc_jax import optim, trees


def test_schedule_climbs_linearly_and_falls_as_a_cosine():
  rate = optim.schedule(learning_rate=0.5, total_steps=110, warmup_steps=10, end_factor=0.1)
  for step in range(0, 111, 5):
    want = 0.05 * step if step <= 10 else 0.05 + 0.45 * (1 + math.cos(math.pi * (step - 10) / 100)) / 2
    np.testing.assert_allclose(rate(step), want, rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(rate(200), 0.05, rtol=1e-5)


@pytest.mark.parametrize('warmup, total', [(0, 10), (10, 10)])
def test_schedules_at_the_edges(warmup, total):
  rate = optim.schedule(learning_rate=0.5, total_steps=total, warmup_steps=warmup)
  values = np.array([float(rate(step)) for step in range(total + 1)])
  assert np.isfinite(values).all()
  np.testing.assert_allclose(values[warmup], 0.5, rtol=1e-6)
  np.testing.assert_allclose(values.max(), 0.5, rtol=1e-6)


@pytest.mark.parametrize('warmup', [-1, 11])
def test_warmup_must_fit(warmup):
  with pytest.raises(ValueError, match=rf'optim.warmup_steps: expected 0 … total_steps = 10, got {warmup}'):
    optim.schedule(learning_rate=1.0, total_steps=10, warmup_steps=warmup)


def test_decay_is_for_matrices_alone(make_model, make_batch):
  model = make_model(image=dict(pool='map'), separate_temperature=True)
  params = jax.eval_shape(model.init, jax.random.key(0), make_batch(images=2))['params']
  mask = trees.flatten(optim.decay_mask(params))
  kept = {path for path, decays in mask.items() if not decays}
  assert {path for path, decays in mask.items() if decays} == {
      path for path in mask if path.endswith(('/kernel', '/embedding'))}
  assert {'t', 'b', 'region_t', 'region_b', 'img/MAPHead_0/probe', 'img/pos_embedding', 'txt/pos_embedding',
          'img/Transformer/encoder_norm/scale', 'prompter/LayerNorm_0/scale'} <= kept
  tok = make_model()
  params = jax.eval_shape(tok.init, jax.random.key(0), make_batch(images=2))['params']
  assert not optim.decay_mask(params)['img']['cls']


def adamw_twin(values, gradients, *, rate, b1, b2, eps, decay, clip):
  """Loshchilov & Hutter 2019, algorithm 2, on dictionaries of arrays; `decay` by name; clipping by the global norm."""
  mean, square = ({k: np.zeros_like(v) for k, v in values.items()} for _ in range(2))
  for t, gradient in enumerate(gradients, 1):
    norm = math.sqrt(sum((g**2).sum() for g in gradient.values()))
    shrink = min(1.0, clip / norm) if clip else 1.0
    for k in values:
      g = gradient[k] * shrink
      mean[k] = b1 * mean[k] + (1 - b1) * g
      square[k] = b2 * square[k] + (1 - b2) * g**2
      step = mean[k] / (1 - b1**t) / (np.sqrt(square[k] / (1 - b2**t)) + eps)
      values[k] = values[k] - rate(t - 1) * (step + decay[k] * values[k])
  return values


@pytest.mark.parametrize('clip', [None, 0.5])
def test_updates_are_adamws(clip):
  rng = np.random.default_rng(0)
  params = {'kernel': rng.normal(size=(3, 2)), 'bias': rng.normal(size=2)}
  gradients = [{k: rng.normal(size=v.shape) * 0.4 for k, v in params.items()} for _ in range(6)]
  tx, rate = optim.make(total_steps=8, warmup_steps=2, learning_rate=0.1, weight_decay=0.3, clip_norm=clip)
  want = adamw_twin(dict(params), gradients, rate=lambda t: float(rate(t)), b1=0.9, b2=0.98, eps=1e-6,
                    decay={'kernel': 0.3, 'bias': 0.0}, clip=clip)
  got = jax.tree.map(lambda x: x.astype(np.float32), params)
  state = tx.init(got)
  update = jax.jit(tx.update)
  for gradient in gradients:
    updates, state = update(jax.tree.map(lambda x: x.astype(np.float32), gradient), state, got)
    got = jax.tree.map(lambda x, u: x + u, got, updates)
  for name, value in want.items():
    np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-6)


def test_the_papers_defaults():
  _, rate = optim.make(total_steps=439_087)
  assert rate(0) == 0
  np.testing.assert_allclose([rate(1000), rate(2000)], [2.5e-4, 5e-4], rtol=1e-6)
  assert rate(439_087) < 1e-9
