"""Contrastive losses against explicit sums in float64, and against what must not change them."""
import functools

import jax
import jax.numpy as jnp
from loss_twins import CONTRAST_TWINS, filtered_twin, numeric_gradient, softmax_twin, texts_with_twins, unit
import numpy as np
import pytest

from cloc_jax import sharding
from cloc_jax.losses.contrastive import CONTRASTS

N, E = 8, 5
SCALE, BIAS = 9.0, -2.5
MASK = np.array([1, 1, 1, 1, 0, 1, 0, 1], bool)
BOTH = pytest.mark.parametrize('name', sorted(CONTRASTS))


def inputs(seed=0):
  rng = np.random.default_rng(seed)
  return unit(rng, N, E), texts_with_twins(rng, N, E)


@functools.cache
def compiled(name, threshold):
  """Of (a, texts, scale, bias, mask): ((loss, share filtered), gradients by the first four)."""
  def loss(a, texts, scale, bias, mask):
    out = CONTRASTS[name](a, texts, logit_scale=scale, logit_bias=bias, mask_n=mask, filter_threshold=threshold)
    return out.loss, out.filtered
  return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))


def value_and_gradients(name, a, texts, *, mask=None, threshold=None):
  mask = np.ones(len(a), bool) if mask is None else mask
  (value, _), gradients = compiled(name, threshold)(*(np.asarray(x, np.float32) for x in (a, texts, SCALE, BIAS)), mask)
  return value, gradients


@BOTH
@pytest.mark.parametrize('threshold', [None, 0.9])
@pytest.mark.parametrize('mask', [None, MASK], ids=['all', 'masked'])
def test_value_and_gradients_are_the_explicit_sums(name, mask, threshold):
  arguments = [*inputs(), SCALE, BIAS]
  twin = lambda *x: CONTRAST_TWINS[name](*x, np.ones(N, bool) if mask is None else mask, threshold)
  value, gradients = value_and_gradients(name, *arguments[:2], mask=mask, threshold=threshold)
  np.testing.assert_allclose(value, twin(*arguments), rtol=2e-6)
  for at, gradient in enumerate(gradients):
    want = numeric_gradient(lambda x, at=at: twin(*arguments[:at], x, *arguments[at + 1:]), arguments[at])
    np.testing.assert_allclose(gradient, want, rtol=2e-5, atol=2e-6, err_msg=f'argument {at}')


def test_the_filter_clears_both_denominators():
  a, texts = inputs()
  value, _ = value_and_gradients('softmax', a, texts, threshold=0.9)
  everything = np.ones(N, bool)
  for directions in (('rows',), ('columns',), ()):
    assert abs(value - softmax_twin(a, texts, SCALE, 0, everything, 0.9, directions=directions)) > 1e-2
  np.testing.assert_allclose(value, softmax_twin(a, texts, SCALE, 0, everything, 0.9), rtol=2e-6)


@BOTH
@pytest.mark.parametrize('mask', [np.ones(N, bool), MASK], ids=['all', 'masked'])
def test_filtered_is_the_share_of_valid_pairs(name, mask):
  a, texts = (np.asarray(x, np.float32) for x in inputs())
  (_, filtered), _ = compiled(name, 0.9)(a, texts, np.float32(SCALE), np.float32(BIAS), mask)
  want = filtered_twin(texts, mask, 0.9)
  assert want > 0
  np.testing.assert_allclose(filtered, want, rtol=1e-6)


@BOTH
def test_without_a_mask_everything_is_valid(name):
  a, texts = (jnp.asarray(x, jnp.float32) for x in inputs())
  out = CONTRASTS[name](a, texts, logit_scale=SCALE, logit_bias=BIAS)
  np.testing.assert_allclose(out.loss, value_and_gradients(name, a, texts)[0], rtol=1e-6)
  assert out.filtered == 0


def test_with_one_and_the_same_text_everywhere_only_positives_remain():
  a, texts = inputs()
  value, _ = value_and_gradients('softmax', a, np.tile(texts[:1], (N, 1)), threshold=0.9)
  np.testing.assert_allclose(value, 0, atol=1e-6)
  unfiltered, _ = value_and_gradients('softmax', a, np.tile(texts[:1], (N, 1)))
  assert unfiltered > 1


@BOTH
def test_masked_entries_change_nothing(name):
  a, texts = inputs()
  rng = np.random.default_rng(1)
  value, gradients = value_and_gradients(name, a, texts, mask=MASK, threshold=0.9)
  garbage_a, garbage_t = a.copy(), texts.copy()
  garbage_a[~MASK] = 30 * rng.normal(size=(2, E))
  garbage_t[~MASK] = [texts[0], -50 * texts[2]]  # one that the filter would match, one that would swamp any sum
  other, others = value_and_gradients(name, garbage_a, garbage_t, mask=MASK, threshold=0.9)
  assert value == other
  for mine, theirs in zip(gradients, others):
    np.testing.assert_array_equal(mine, theirs)
  for gradient in gradients[:2]:
    assert (np.asarray(gradient)[~MASK] == 0).all() and (np.asarray(gradient)[MASK] != 0).all()
  without, _ = value_and_gradients(name, a[MASK], texts[MASK], threshold=0.9)
  np.testing.assert_allclose(value, without, rtol=1e-6)


@BOTH
def test_nothing_valid_gives_zero_and_no_gradient(name):
  value, gradients = value_and_gradients(name, *inputs(), mask=np.zeros(N, bool), threshold=0.9)
  assert value == 0
  for gradient in gradients:
    np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


@BOTH
def test_a_single_valid_entry_has_a_finite_gradient(name):
  value, gradients = value_and_gradients(name, *inputs(), mask=np.arange(N) == 2, threshold=0.9)
  assert np.isfinite(value) and all(np.isfinite(g).all() for g in gradients)
  if name == 'softmax':
    np.testing.assert_allclose(value, 0, atol=1e-6)


def test_a_softmax_does_not_see_the_bias():
  _, gradients = value_and_gradients('softmax', *inputs())
  assert gradients[3] == 0


@BOTH
def test_four_devices_give_what_one_gives(name):
  a, texts = (np.asarray(x, np.float32) for x in inputs())
  mesh = sharding.make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])
  rows = sharding.batch_sharding(mesh)

  scalars = np.float32(SCALE), np.float32(BIAS)
  one = compiled(name, 0.9)(a, texts, *scalars, MASK)
  split = [jax.device_put(x, rows) for x in (a, texts, MASK)]
  assert len(split[0].sharding.device_set) == 4 and not split[0].is_fully_replicated
  four = compiled(name, 0.9)(*split[:2], *jax.device_put(scalars, sharding.replicated(mesh)), split[2])
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), four, one)
