"""The shared Prompter against its literal definition, and both against a float64 NumPy transformer layer."""
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import numpy_transformer as twin
import pytest

from cloc_jax import trees
from cloc_jax.models import prompter

B, GRID, D, E = 2, 3, 16, 6
N = GRID**2
POOLS = pytest.mark.parametrize('pool', prompter.POOLS)


def make(pool='all', *, seed=0, gain=1.0, **settings):
  """(Prompter, parameters): all of them random. `gain` scales queries and keys, so gain² scales the logits."""
  model = prompter.Prompter(width=D, out_dim=E, pool=pool, **settings)
  shapes = jax.eval_shape(
      lambda key: model.init(key, np.zeros((B, N, D), np.float32), np.zeros((B, 1, 4), np.float32),
                             np.zeros((B, 1, E), np.float32), method=_touch_everything), jax.random.key(0))['params']
  rng = np.random.default_rng(seed)

  def draw(path, x):
    value = 0.3 * rng.normal(size=x.shape) + path.endswith('scale')
    return (value * (gain if '/query/' in path or '/key/' in path else 1)).astype(np.float32)
  return model, trees.map_with_path(draw, shapes)


cached_make = functools.cache(make)


def _touch_everything(module, tokens, boxes, z_text):
  state = module.image_state(tokens)
  return module(state, module.box_tokens(boxes, grid=GRID)), module(state, module.text_tokens(z_text))


def random_tokens(p, m, *, seed=1, scale=1.0):
  """(image tokens, prompts)."""
  rng = np.random.default_rng(seed)
  return (rng.normal(size=(B, N, D)).astype(np.float32),
          (scale * rng.normal(size=(B, m, p, D))).astype(np.float32))


def twin_block(params, tokens, prompts, *, pool, act='gelu_tanh'):
  """(B, M, D): every prompt in its own sequence, one after another, float64."""
  out = np.zeros((*prompts.shape[:2], tokens.shape[-1]))
  for i in range(prompts.shape[0]):
    for j in range(prompts.shape[1]):
      y = twin.block(np.concatenate([prompts[i, j], tokens[i]]), params, act=act)
      kept = y if pool == 'all' else y[:prompts.shape[2]]
      out[i, j] = sum(kept) / len(kept)
  return out


def _blocks(model, params, tokens, prompts, chunk, block=1):
  params_block = model.apply({'params': params}, method='block_params')
  options = dict(pool=model.pool, act=model.act, dtype=model.dtype)
  if chunk is None:
    return prompter.literal_block(params_block, tokens, prompts, **options)
  state = prompter.image_state(params_block, tokens, pool=model.pool, dtype=model.dtype)
  return prompter.shared_block(params_block, state, prompts, chunk=chunk, block=block, **options)


_compiled_blocks = jax.jit(_blocks, static_argnums=(0, 4, 5))


def shared(model, params, tokens, prompts, *, chunk=4):
  return _compiled_blocks(model, params, tokens, prompts, chunk)


def literal(model, params, tokens, prompts):
  return _compiled_blocks(model, params, tokens, prompts, None)


def _weighted(params, tokens, prompts, model, chunk):
  y = _blocks(model, params, tokens, prompts, chunk)
  return (y * np.random.default_rng(9).normal(size=y.shape).astype(np.float32)).sum(), y


_slopes = jax.jit(jax.grad(_weighted, (0, 1, 2), has_aux=True), static_argnums=(3, 4))


def values_and_gradients(model, params, tokens, prompts, *, chunk):
  """Outputs, and gradients of a fixed weighting of them by (parameters, tokens, prompts). chunk=None: the literal."""
  gradients, y = _slopes(params, tokens, prompts, model, chunk)
  return y, gradients


def assert_same(mine, theirs, *, rtol, atol):
  """Trees agree; atol is relative to each leaf's largest entry, or to the largest of all where a leaf is all but 0."""
  largest = max(np.abs(x).max() for x in jax.tree.leaves(mine))
  for (path, x), y in zip(trees.flatten(mine).items(), trees.flatten(theirs).values()):
    np.testing.assert_allclose(y, x, rtol=rtol, atol=atol * max(np.abs(x).max(), 1e-2 * largest), err_msg=path)


@pytest.mark.parametrize('p, m, chunk', [(2, 5, 2), (1, 3, 8)])
@POOLS
def test_shared_is_literal_in_values_and_gradients(pool, p, m, chunk):
  model, params = cached_make(pool)
  got = values_and_gradients(model, params, *random_tokens(p, m), chunk=chunk)
  want = values_and_gradients(model, params, *random_tokens(p, m), chunk=None)
  np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-5)
  assert_same(want[1], got[1], rtol=1e-4, atol=1e-5)


@POOLS
def test_values_and_slopes_are_those_of_a_float64_transformer_layer(pool):
  model, params = cached_make(pool)
  tokens, prompts = random_tokens(2, 5)
  y, gradients = values_and_gradients(model, params, tokens, prompts, chunk=2)
  weights = np.random.default_rng(9).normal(size=y.shape)
  flat = {**trees.flatten(params), 'tokens': tokens, 'prompts': prompts}
  slopes = {**trees.flatten(gradients[0]), 'tokens': gradients[1], 'prompts': gradients[2]}
  block = [path for path in flat if path in ('tokens', 'prompts') or '_0/' in path or path.startswith('LayerNorm_1')]
  assert len(block) == 2 + 2 * 2 + 4 * 2 + 2 * 2
  exact = {path: np.asarray(flat[path], np.float64) for path in block}

  def run(point):
    arrays = trees.unflatten(point)
    return twin_block(arrays, arrays['tokens'], arrays['prompts'], pool=pool)

  np.testing.assert_allclose(y, run(exact), rtol=1e-5, atol=1e-5)
  rng = np.random.default_rng(3)
  for path in block:
    direction = rng.normal(size=exact[path].shape)
    ahead, behind = (run({**exact, path: exact[path] + sign * 1e-5 * direction}) for sign in (1, -1))
    want = ((ahead - behind) * weights).sum() / 2e-5
    got = (np.asarray(slopes[path], np.float64) * direction).sum()
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-4, err_msg=path)


def attention_of_image_rows(params, tokens, prompts):
  """(B, M, N, P + N) attention weights of the image's tokens, float64."""
  p = twin.as64(params)
  out = []
  for i in range(B):
    for prompt in prompts[i]:
      h = twin.layer_norm(np.concatenate([prompt, tokens[i]]), p['LayerNorm_0'])
      attention = p['MultiHeadDotProductAttention_0']
      q, k = (h @ attention[name]['kernel'][:, 0] + attention[name]['bias'][0] for name in ('query', 'key'))
      out.append([twin.softmax(k @ row / math.sqrt(D)) for row in q[len(prompt):]])
  return np.array(out)


@pytest.mark.parametrize('pool', prompter.POOLS)
def test_peaked_attention_stays_finite_and_equal(pool):
  gain = 14.0
  model, params = make(pool, gain=gain)
  tokens, prompts = random_tokens(2, 5)
  weights = attention_of_image_rows(params, tokens, prompts)
  to_prompt = weights[..., :2].sum(-1)
  # Some image tokens look at nothing but the prompt, some see nothing of it; in float32 either share underflows.
  assert (to_prompt > 1 - 1e-9).any() and (to_prompt < 1e-30).any()
  got = values_and_gradients(model, params, tokens, prompts, chunk=2)
  want = values_and_gradients(model, params, tokens, prompts, chunk=None)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves((got, want)))
  np.testing.assert_allclose(got[0], twin_block(twin.as64(params), tokens, prompts, pool=pool), rtol=1e-3, atol=1e-3)
  np.testing.assert_allclose(got[0], want[0], rtol=1e-3, atol=1e-3)
  assert_same(want[1], got[1], rtol=1e-2, atol=2e-3)


@POOLS
@pytest.mark.parametrize('scale', [0.0, 1e3])
def test_large_and_constant_prompts(pool, scale):
  model, params = cached_make(pool)
  tokens, prompts = random_tokens(2, 5, scale=scale)
  want = twin_block(twin.as64(params), tokens.astype(float), prompts.astype(float), pool=pool)
  np.testing.assert_allclose(shared(model, params, tokens, prompts), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('act', ['gelu', 'quick_gelu'])
def test_other_activations(act):
  model, params = make(act=act)
  tokens, prompts = random_tokens(1, 2)
  want = twin_block(twin.as64(params), tokens, prompts, pool='all', act=act)
  np.testing.assert_allclose(shared(model, params, tokens, prompts), want, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize('chunk, block', [(1, 1), (5, 2), (2, 8), (8, 3)])
def test_prompts_and_images_at_a_time_change_nothing(chunk, block):
  model, params = cached_make('all')
  tokens, prompts = (np.concatenate([x, x[::-1] + 1, 2 * x[:1]]) for x in random_tokens(2, 5))  # five images
  want = _compiled_blocks(model, params, tokens, prompts, None)
  got = _compiled_blocks(model, params, tokens, prompts, chunk, block)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def corner_code(x, y, *, grid):
  """posemb's docstring: sin x, cos x, sin y, cos y; periods from 2 patches to twice the grid."""
  quarter = D // 4
  longest = max(2 * grid, 4)
  turns = [2 * math.pi * grid / (longest * (2 / longest)**(i / (quarter - 1))) for i in range(quarter)]
  return np.array([f(at * turn) for at in (x, y) for f in (math.sin, math.cos) for turn in turns])


@POOLS
def test_box_and_text_prompts_from_the_parameters(pool):
  model, params = cached_make(pool)
  p = twin.as64(params)
  rng = np.random.default_rng(4)
  tokens, _ = random_tokens(1, 1)
  boxes = np.sort(rng.random((B, 3, 2, 2)), 2).reshape(B, 3, 4).astype(np.float32)
  z_text = rng.normal(size=(B, 3, E))
  z_text = (z_text / np.linalg.norm(z_text, axis=-1, keepdims=True)).astype(np.float32)
  box_prompts, text_prompts = np.zeros((B, 3, 2, D)), np.zeros((B, 3, 1, D))
  of_own, of_other = p['box_embed']['kernel']
  for i in range(B):
    for j in range(3):
      codes = [corner_code(*boxes[i, j, at:at + 2].astype(float), grid=GRID) for at in (0, 2)]
      for corner in range(2):
        box_prompts[i, j, corner] = codes[corner] @ of_own + codes[1 - corner] @ of_other
        box_prompts[i, j, corner] += p['box_embed']['bias'][corner]
      text_prompts[i, j, 0] = twin.dense(math.sqrt(E) * z_text[i, j].astype(float), p['text_embed'])
  run = jax.jit(functools.partial(model.apply, method=_touch_everything))
  z_region, z_grounded = run({'params': params}, tokens, boxes, z_text)
  assert z_region.dtype == z_grounded.dtype == jnp.float32
  for got, prompts in ((z_region, box_prompts), (z_grounded, text_prompts)):
    want = twin_block(p, tokens.astype(float), prompts, pool=pool) @ p['head']['kernel']
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5)


def test_prompts_of_an_image_do_not_see_one_another_nor_other_images():
  model, params = cached_make()
  tokens, prompts = random_tokens(2, 5)
  others, other_prompts = random_tokens(2, 5, seed=5)
  others[1], other_prompts[1, 4] = tokens[1], prompts[1, 4]
  z, other_z = (np.asarray(shared(model, params, *x)) for x in ((tokens, prompts), (others, other_prompts)))
  np.testing.assert_allclose(other_z[1, 4], z[1, 4], rtol=1e-6, atol=1e-6)
  assert np.abs(other_z - z).reshape(10, D).max(1)[:9].min() > 1e-2


def test_the_prompt_pool_needs_no_rows_of_the_image():
  model, params = make('prompt')
  assert model.apply({'params': params}, random_tokens(1, 1)[0], method='image_state').rows is None


@POOLS
def test_bfloat16_stays_near_and_returns_float32(pool):
  exact, params = cached_make(pool)
  rough, _ = make(pool, dtype=jnp.bfloat16)
  tokens, prompts = random_tokens(2, 5)
  want, got = shared(exact, params, tokens, prompts), shared(rough, params, tokens.astype(jnp.bfloat16), prompts)
  assert got.dtype == jnp.float32
  scale = np.abs(want).max()
  assert 1e-5 * scale < np.abs(got - want).max() < 0.05 * scale
  # No further from the truth than the definition in the same arithmetic, by an order of magnitude at most.
  literal_error = np.abs(literal(rough, params, tokens.astype(jnp.bfloat16), prompts) - want).max()
  assert np.abs(got - want).max() < 4 * literal_error


def test_an_unknown_pool_is_an_error():
  with pytest.raises(ValueError, match="prompter pool: expected one of .*'all'.* got 'mean'"):
    make('mean')


def test_a_width_that_codes_do_not_fit_is_an_error():
  module = prompter.Prompter(width=18, out_dim=8)
  with pytest.raises(ValueError, match='a width that is a multiple of 4, the image tower has 18'):
    jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 4, 18)), method='image_state'))
