"""The tiled losses against the dense definitions in float64: any tile, any number of devices, both ways to travel."""
import functools

import jax
import jax.numpy as jnp
from loss_twins import unit
import numpy as np
import pytest

from cloc_jax import sharding
from cloc_jax.losses import tiles
from cloc_jax.losses.contrastive import CONTRASTS, DENSE

E = 24
SCALE, BIAS, THRESHOLD = 14.0, -8.0, 0.9
BOTH = pytest.mark.parametrize('name', sorted(CONTRASTS))
MESHES = {1: (1, 1), 4: (2, 2), 8: (8, 1), 6: (3, 2)}


def mesh_of(devices):
  data, fsdp = MESHES[devices]
  return sharding.make_mesh(data=data, fsdp=fsdp, devices=jax.devices()[:devices])


def inputs(n, seed=0):
  """(a, text) of n pairs in float32: related, and some texts nearly or wholly alike, as captions are."""
  rng = np.random.default_rng(seed)
  kinds = unit(rng, max(2, n // 3), E)
  near = rng.choice([0, 0.02, 0.3], size=(n, 1))
  text = kinds[rng.integers(len(kinds), size=n)] + near * rng.normal(size=(n, E))
  text /= np.linalg.norm(text, axis=-1, keepdims=True)
  a = text + 0.3 * rng.normal(size=(n, E))
  a /= np.linalg.norm(a, axis=-1, keepdims=True)
  return a.astype(np.float32), text.astype(np.float32)


def masks(n):
  rng = np.random.default_rng(3)
  return {'all': np.ones(n, bool), 'some': rng.random(n) < 0.7, 'one': np.arange(n) == n // 2, 'none': np.zeros(n, bool)}


def function(name, threshold, contrasts=CONTRASTS, **options):
  def loss(a, text, scale, bias, mask):
    out = contrasts[name](a, text, logit_scale=scale, logit_bias=bias, mask_n=mask, filter_threshold=threshold,
                          **options)
    return out.loss, out.filtered
  return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))


def reference(name, a, text, mask, threshold):
  """The definition, in float64, of the float32 inputs."""
  with jax.enable_x64(True):
    out = function(name, threshold, DENSE)(*(np.asarray(x, np.float64) for x in (a, text, SCALE, BIAS)), mask)
    return jax.tree.map(np.asarray, out)


def tiled(name, a, text, mask, threshold, *, devices, transport, tile, dtype='float32'):
  mesh = mesh_of(devices)
  tiling = tiles.Tiling.make(mesh=mesh, transport=transport, tile=tile, dtype=dtype)
  rows = functools.partial(jax.device_put, device=sharding.batch_sharding(mesh))
  scalars = jax.device_put((np.float32(SCALE), np.float32(BIAS)), sharding.replicated(mesh))
  return function(name, threshold, tiling=tiling)(rows(a), rows(text), *scalars, rows(mask))


def assert_same(got, want, rtol):
  """Value, share filtered, and each gradient by its norm.

  Those of the two scalars are sums over all pairs that nearly cancel: they are measured by the size of their terms.
  """
  (value, filtered), gradients = got
  (want_value, want_filtered), want_gradients = want
  np.testing.assert_allclose(value, want_value, rtol=rtol, atol=1e-7)
  np.testing.assert_allclose(filtered, want_filtered, rtol=1e-6)
  for at, (gradient, expected) in enumerate(zip(gradients, want_gradients)):
    assert gradient.shape == expected.shape
    error = np.linalg.norm(np.asarray(gradient, np.float64) - expected)
    size = np.linalg.norm(expected) if expected.ndim else max(abs(expected), 0.1)
    assert error <= rtol * size + 1e-8, (at, error, size)


@BOTH
@pytest.mark.parametrize('threshold', [None, THRESHOLD])
@pytest.mark.parametrize('devices,transport', [(1, 'gather'), (4, 'gather'), (4, 'ring'), (4, 'gather+ring'),
                                               (8, 'gather'), (8, 'ring'), (6, 'gather+ring')])
def test_tiles_are_the_definition(name, devices, transport, threshold):
  n = 48 if devices == 6 else 40
  a, text = inputs(n)
  mask = masks(n)['some']
  want = reference(name, a, text, mask, threshold)
  if threshold:
    assert 0.01 < want[0][1] < 0.3  # the filter has something to do
  # 5, 6 or 10 to 40 rows a device: 4 does not divide them.
  assert_same(tiled(name, a, text, mask, threshold, devices=devices, transport=transport, tile=4), want, 1e-6)


@BOTH
@pytest.mark.parametrize('tile', [1, 3, 7, 37, 1000])
def test_any_tile(name, tile):
  a, text = inputs(37)
  mask = masks(37)['some']
  got = tiled(name, a, text, mask, THRESHOLD, devices=1, transport='gather', tile=tile)
  assert_same(got, reference(name, a, text, mask, THRESHOLD), 1e-6)


@BOTH
@pytest.mark.parametrize('transport', ['gather', 'ring'])
@pytest.mark.parametrize('kind', ['all', 'one', 'none'])
def test_masks(name, kind, transport):
  a, text = inputs(16)
  mask = masks(16)[kind]
  got = tiled(name, a, text, mask, THRESHOLD, devices=4, transport=transport, tile=3)
  assert_same(got, reference(name, a, text, mask, THRESHOLD), 1e-6)
  if kind == 'none':
    for x in jax.tree.leaves(got):
      np.testing.assert_array_equal(x, np.zeros_like(x))


@BOTH
def test_masked_rows_may_hold_anything(name):
  a, text = inputs(16)
  mask = masks(16)['some']
  rubbish = np.where(mask[:, None], text, 1e4).astype(np.float32)
  options = dict(devices=4, transport='ring', tile=3)
  assert_same(tiled(name, np.where(mask[:, None], a, -1e4).astype(np.float32), rubbish, mask, THRESHOLD, **options),
              reference(name, a, text, mask, THRESHOLD), 1e-6)


@BOTH
def test_the_gradient_follows_what_the_loss_is_used_for(name):
  """A factor on the loss, and a branch that does not use it."""
  a, text = inputs(8)
  tiling = tiles.Tiling.make(mesh=mesh_of(4), tile=2)
  loss = lambda a, factor: factor * CONTRASTS[name](a, text, logit_scale=SCALE, logit_bias=BIAS, tiling=tiling).loss + (
      a**2).sum()
  once, thrice, never = (jax.jit(jax.grad(loss))(a, f) for f in (1.0, 3.0, 0.0))
  np.testing.assert_allclose(thrice - 2 * a, 3 * (once - 2 * a), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(never, 2 * a, rtol=1e-6)


@BOTH
def test_hot_logits_neither_overflow_nor_vanish(name):
  """At the largest scale, 100, exponentials span e^±100: far beyond float32 without their maximum."""
  a, text = inputs(12)
  a[:6] *= -1
  tiling = tiles.Tiling.make(tile=4)
  make = lambda contrasts, **options: jax.jit(jax.value_and_grad(lambda a: contrasts[name](
      a, text.astype(a.dtype), logit_scale=100.0, logit_bias=BIAS, **options).loss))
  value, gradient = make(CONTRASTS, tiling=tiling)(a)
  with jax.enable_x64(True):
    want, expected = make(DENSE)(a.astype(np.float64))
  np.testing.assert_allclose(value, want, rtol=1e-6)
  np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)


def test_near_the_optimum_the_loss_keeps_its_digits():
  """The dense form subtracts numbers near 100 there, and is off by 1e-5 of the loss and more."""
  text = unit(np.random.default_rng(0), 64, E).astype(np.float32)
  a = text + np.float32(0.02) * np.random.default_rng(1).normal(size=text.shape).astype(np.float32)
  a /= np.linalg.norm(a, axis=-1, keepdims=True)
  make = lambda contrasts: jax.jit(lambda a, t: contrasts['softmax'](a, t, logit_scale=20.0).loss)
  with jax.enable_x64(True):
    want = float(make(DENSE)(a.astype(np.float64), text.astype(np.float64)))
  assert 0 < want < 0.01
  error = lambda contrasts: abs(float(make(contrasts)(a, text)) - want) / want
  assert error(CONTRASTS) < 3e-6 < error(DENSE)


@BOTH
def test_bfloat16_tiles_are_near(name):
  """Operands are rounded, sums are not: errors stay near bfloat16's unit, 2⁻⁸, times the scale."""
  a, text = inputs(64)
  mask = masks(64)['some']
  # The threshold lies where no pair is near, so that rounding moves none to its other side.
  cosines = np.sort((text @ text.T)[np.triu_indices(64, 1)])
  cosines = cosines[cosines > 0.6]
  at = np.argmax(np.diff(cosines))
  threshold = float(cosines[at:at + 2].mean())
  assert cosines[at + 1] - cosines[at] > 4 * 2**-9
  got = tiled(name, a, text, mask, threshold, devices=4, transport='ring', tile=8, dtype='bfloat16')
  want = reference(name, a, text, mask, threshold)
  assert_same(got, want, 0.02)
  with pytest.raises(AssertionError):
    assert_same(got, want, 1e-5)  # it did compute in bfloat16


def all_shapes(jaxpr):
  for equation in jaxpr.eqns:
    for variable in (*equation.invars, *equation.outvars):
      yield tuple(getattr(variable.aval, 'shape', ()))
    for body in inner(equation):
      yield from all_shapes(body)


def inner(equation):
  for value in equation.params.values():
    for body in value if isinstance(value, (tuple, list)) else (value,):
      body = getattr(body, 'jaxpr', body)
      if hasattr(body, 'eqns'):
        yield body


def mapped_bodies(jaxpr):
  for equation in jaxpr.eqns:
    for body in inner(equation):
      yield from (body,) if equation.primitive.name == 'shard_map' else mapped_bodies(body)


@BOTH
@pytest.mark.parametrize('transport', ['gather', 'ring'])
def test_no_array_holds_all_pairs(name, transport):
  n, tile = 512, 32
  tiling = tiles.Tiling.make(mesh=mesh_of(4), transport=transport, tile=tile)
  abstract = jax.ShapeDtypeStruct((n, E), jnp.float32)
  loss = lambda a, text: CONTRASTS[name](a, text, logit_scale=SCALE, logit_bias=BIAS, filter_threshold=0.9,
                                         tiling=tiling).loss
  jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1)))(abstract, abstract).jaxpr
  shapes = set(all_shapes(jaxpr))
  assert max(int(np.prod(s)) for s in shapes) == n * E
  assert any(len(s) == 2 and int(np.prod(s)) == tile * tile for s in shapes)
  # Inside, on a device: around a ring it sees blocks alone, and gathered all columns.
  inside = {s for body in mapped_bodies(jaxpr) for s in all_shapes(body)}
  assert inside and max(int(np.prod(s)) for s in inside) == (n * E if transport == 'gather' else n // 4 * E)


def test_the_filter_may_be_traced():
  a, text = inputs(16)
  loss = jax.jit(lambda threshold: CONTRASTS['softmax'](
      a, text, logit_scale=SCALE, filter_threshold=threshold).filtered)
  assert loss(2.0) == 0 and loss(0.9) > 0


@pytest.mark.parametrize('options,message', [
    (dict(transport='pigeon'), "loss.transport: expected one of .*'pigeon'"), (dict(dtype='int8'), 'loss.tile_dtype'),
    (dict(tile=0), 'loss.tile: expected a positive number of rows, got 0')])
def test_wrong_options_are_named(options, message):
  with pytest.raises(ValueError, match=message):
    tiles.Tiling.make(**options)


@pytest.mark.parametrize('n,want', [
    (1, 1024), (128, 1024), (1000, 1024), (1100, 1024), (131072, 1024), (37, 5), (130, 128), (1000, 200)])
def test_tiles_cover_with_little_padding(n, want):
  size = tiles.tile_size(n, want)
  count = -(-n // size)
  assert size <= max(want, -(-want // 128) * 128) and size <= n
  assert count <= -(-n // want) and (count - 1) * size < n  # no tile more than needed, none empty
