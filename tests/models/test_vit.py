"""Image towers against a NumPy transformer, a convolution, published sizes, and themselves under other schedules."""
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import numpy_transformer as twin
import pytest

from cloc_jax import trees
from cloc_jax.models import layers, posemb, vit

TINY = dict(variant='mu/4', width=16, depth=2, heads=2, out_dim=6)
IMAGES = np.random.default_rng(0).normal(size=(2, 12, 12, 3)).astype(np.float32)


@functools.cache
def build(**settings):
  """(module, randomised float32 parameters) of a tiny tower."""
  model = vit.ViT(**{**TINY, **settings})
  shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGES)['params']
  rng = np.random.default_rng(1)
  return model, trees.map_with_path(
      lambda path, x: (0.25 * rng.normal(size=x.shape) + path.endswith('scale')).astype(np.float32), shapes)


@functools.cache
def run(**settings):
  """(pooled, tokens) of IMAGES as NumPy arrays."""
  model, params = build(**settings)
  return jax.tree.map(np.asarray, jax.jit(model.apply)({'params': params}, IMAGES))


@pytest.mark.parametrize('use_bias', [False, True])
def test_patch_embedding_is_a_strided_convolution(use_bias):
  model = vit.PatchEmbedding(width=10, patch=4, use_bias=use_bias)
  rng = np.random.default_rng(2)
  params = {'kernel': rng.normal(size=(4, 4, 3, 10)).astype(np.float32)}
  if use_bias:
    params['bias'] = rng.normal(size=(10,)).astype(np.float32)
  want = jax.lax.conv_general_dilated(IMAGES, params['kernel'], (4, 4), 'VALID',
                                      dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
  want = np.asarray(want).reshape(2, 9, 10) + params.get('bias', np.float32(0))
  np.testing.assert_allclose(model.apply({'params': params}, IMAGES), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('act', sorted(twin.ACTS))
def test_class_token_form_is_clips(act):
  _, params = build(act=act)
  p = twin.as64(params)
  pooled, tokens = run(act=act)
  for i, image in enumerate(IMAGES.astype(np.float64)):
    x = np.concatenate([p['cls'][0], twin.patches(image, p['embedding'])]) + p['pos_embedding'][0]
    x = twin.encoder(twin.layer_norm(x, p['pre_norm']), p['Transformer'], act=act)
    np.testing.assert_allclose(pooled[i], x[0] @ p['head']['kernel'], rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(tokens[i], x[1:], rtol=1e-4, atol=2e-5)
  assert set(params['head']) == set(params['embedding']) == {'kernel'}


@pytest.mark.parametrize('pool', ['map', 'gap'])
@pytest.mark.parametrize('out_dim', [0, 6])
def test_the_forms_without_class_token(pool, out_dim):
  _, params = build(pool=pool, out_dim=out_dim)
  p = twin.as64(params)
  pooled, tokens = run(pool=pool, out_dim=out_dim)
  assert 'cls' not in p and 'pre_norm' not in p
  for i, image in enumerate(IMAGES.astype(np.float64)):
    x = twin.encoder(twin.patches(image, p['embedding']) + p['pos_embedding'][0], p['Transformer'])
    want = twin.map_head(x, p['MAPHead_0']) if pool == 'map' else sum(x) / len(x)
    if out_dim:
      want = twin.dense(want, p['head'])
      assert p['head']['bias'].shape == (6,)
    np.testing.assert_allclose(tokens[i], x, rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(pooled[i], want, rtol=1e-4, atol=3e-5)


def code_of(x, y, *, dim, grid):
  """The position code of one point, as posemb's docstring gives it: sin x, cos x, sin y, cos y."""
  quarter = dim // 4
  longest = max(2 * grid, 4)
  periods = [longest * (2 / longest)**(i / (quarter - 1)) for i in range(quarter)]
  waves = [2 * math.pi * grid / period for period in periods]
  return [f(at * wave) for at in (x, y) for f in (math.sin, math.cos) for wave in waves]


def test_sinusoidal_positions_have_no_table_and_follow_their_definition():
  _, params = build(posemb='sincos2d', pool='gap')
  p = twin.as64(params)
  assert 'pos_embedding' not in p
  _, tokens = run(posemb='sincos2d', pool='gap')
  codes = np.array([code_of((j + 0.5) / 3, (i + 0.5) / 3, dim=16, grid=3) for i in range(3) for j in range(3)])
  np.testing.assert_allclose(posemb.patch_codes(dim=16, grid=3)[0], codes, atol=1e-5)
  x = twin.encoder(twin.patches(IMAGES[0].astype(np.float64), p['embedding']) + codes, p['Transformer'])
  np.testing.assert_allclose(tokens[0], x, rtol=1e-4, atol=3e-5)


def test_codes_of_any_points_and_leading_axes():
  points = np.random.default_rng(3).random((2, 5, 2)).astype(np.float32)
  got = posemb.sincos2d(points, dim=24, grid=14)
  want = [[code_of(*p, dim=24, grid=14) for p in row] for row in points.astype(np.float64)]
  np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize('grid', [7, 14, 24])
def test_no_two_patches_share_a_code(grid):
  codes = np.asarray(posemb.patch_codes(dim=64, grid=grid)[0])
  distance = np.linalg.norm(codes[:, None] - codes[None], axis=-1) + 1e3 * np.eye(len(codes))
  assert distance.min() > 0.3


def test_position_codes_need_a_width_of_four_parts():
  with pytest.raises(ValueError, match='multiple of 4, got 18'):
    posemb.sincos2d(np.zeros((1, 2), np.float32), dim=18, grid=3)


@pytest.mark.parametrize('name, size, out_dim, count', [
    ('B/16', 224, 512, 86_192_640),  # what OpenAI's checkpoints hold in their `visual` part
    ('L/14', 336, 768, 304_293_888),
])
def test_sizes_are_clips(name, size, out_dim, count):
  model = vit.ViT(variant=name, out_dim=out_dim)
  shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32))
  assert trees.count(shapes) == count


def test_sizes_of_the_huge_tower():
  assert vit.decode_variant('H/14') == vit.Variant(width=1280, depth=32, mlp_dim=5120, heads=16, patch=14)


def test_overrides_and_the_mlp_that_follows_the_width():
  assert vit.ViT(variant='S/32', depth=3).sizes() == vit.Variant(384, 3, 1536, 6, 32)
  assert vit.ViT(variant='S/32', width=64, heads=4).sizes() == vit.Variant(64, 12, 256, 4, 32)
  assert vit.ViT(variant='S/32', width=64, mlp_dim=100).sizes().mlp_dim == 100


def test_scanned_blocks_are_the_blocks_one_after_another():
  _, params = build()
  params = params['Transformer']
  x = np.random.default_rng(4).normal(size=(2, 5, 16)).astype(np.float32)
  got = jax.jit(layers.Encoder(depth=2, heads=2, mlp_dim=64).apply)({'params': params}, x)
  block = jax.jit(layers.EncoderBlock(heads=2, mlp_dim=64).apply)
  want = x
  for layer in range(2):
    want, _ = block({'params': jax.tree.map(lambda leaf, layer=layer: leaf[layer], params['encoderblock'])}, want)
  p = params['encoder_norm']
  want = (want - want.mean(-1, keepdims=True)) / np.sqrt(np.var(want, -1, keepdims=True) + 1e-5)
  np.testing.assert_allclose(got, want * p['scale'][None, None] + p['bias'][None, None], rtol=1e-4, atol=1e-5)


@functools.cache
def loss_and_gradients(**settings):
  model, _ = build(**settings)
  _, params = build()
  def loss(params):
    pooled, tokens = model.apply({'params': params}, IMAGES)
    return jnp.sin(pooled).sum() + jnp.square(tokens).mean()
  return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize('settings', [{'remat': 'full'}, {'remat': 'dots', 'unroll': 2},
                                      {'attention': 'dot_product_attention', 'unroll': 7}], ids=str)
def test_schedules_change_neither_values_nor_gradients(settings):
  value, gradients = loss_and_gradients()
  other, others = loss_and_gradients(**settings)
  np.testing.assert_allclose(other, value, rtol=1e-5)
  for (path, mine), theirs in zip(trees.flatten(gradients).items(), trees.flatten(others).values()):
    np.testing.assert_allclose(theirs, mine, rtol=1e-3, atol=1e-5 * np.abs(mine).max() + 2e-6, err_msg=path)


def equations(jaxpr):
  """All equations of a jaxpr, those of its inner jaxprs included."""
  for equation in jaxpr.eqns:
    yield equation
    for value in equation.params.values():
      for inner in value if isinstance(value, (tuple, list)) else [value]:
        inner = getattr(inner, 'jaxpr', inner)
        if hasattr(inner, 'eqns'):
          yield from equations(inner)


@pytest.mark.parametrize('pool', vit.POOLS)
def test_bfloat16_runs_every_product_in_bfloat16_on_float32_parameters(pool):
  model, params = build(pool=pool, dtype=jnp.bfloat16)
  jaxpr = jax.make_jaxpr(model.apply)({'params': params}, IMAGES).jaxpr
  products = [e for e in equations(jaxpr) if e.primitive.name == 'dot_general']
  # Patches; queries, keys and values at once; scores; attended; out; two of the MLP; projection.
  assert len(products) >= 8
  assert {v.aval.dtype for e in products for v in e.invars} == {jnp.dtype(jnp.bfloat16)}
  softmaxes = [e for e in equations(jaxpr) if e.primitive.name == 'exp']
  assert softmaxes and {v.aval.dtype for e in softmaxes for v in e.outvars} == {jnp.dtype(jnp.float32)}
  # The residual stream is what the scan carries.
  scans = [e for e in equations(jaxpr) if e.primitive.name == 'scan']
  assert {v.aval.dtype for e in scans for v in e.outvars} == {jnp.dtype(jnp.bfloat16)}
  made = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
  assert {x.dtype for x in jax.tree.leaves(made)} == {jnp.dtype(jnp.float32)}


def test_bfloat16_stays_near_float32():
  for mine, theirs in zip(run(), run(dtype=jnp.bfloat16)):
    theirs = theirs.astype(np.float32)
    assert np.abs(mine - theirs).max() < 0.05 * np.abs(mine).max()


@pytest.mark.parametrize('name', ['X/16', 'B', 'B/', 'B16', 'B/x', ''])
def test_an_unknown_size_is_an_error(name):
  with pytest.raises(ValueError, match=r"image variant: expected SIZE/PATCH .*'B'"):
    vit.decode_variant(name)


@pytest.mark.parametrize('settings, message', [
    ({'pool': 'max'}, "pool: expected one of .*'tok'.* got 'max'"),
    ({'posemb': 'rope'}, "posemb: expected one of .* got 'rope'"),
    ({'act': 'relu'}, "act: expected one of .* got 'relu'"),
    ({'attention': 'flash'}, "attention: expected one of .* got 'flash'"),
    ({'remat': 'most'}, "remat: expected one of .* got 'most'"),
])
def test_an_unknown_choice_is_named(settings, message):
  with pytest.raises(ValueError, match=message):
    build(**settings)


@pytest.mark.parametrize('shape', [(1, 12, 16, 3), (1, 14, 14, 3)])
def test_images_are_squares_of_whole_patches(shape):
  with pytest.raises(ValueError, match=rf'multiple of the patch \(4\), got {shape[1]}×{shape[2]}'):
    jax.eval_shape(vit.ViT(**TINY).init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))


@pytest.mark.parametrize('pool, out_dim', [('map', 0), ('map', 6), ('gap', 6), ('gap', 0)])
def test_of_an_image_of_one_patch_the_patch_is_the_image(pool, out_dim, randomize):
  tower = vit.ViT(variant='mu/8', width=16, depth=1, heads=2, pool=pool, out_dim=out_dim)
  image = np.random.default_rng(0).normal(size=(3, 8, 8, 3)).astype(np.float32)
  params = randomize(jax.eval_shape(tower.init, jax.random.key(0), image)['params'])
  pooled, tokens = tower.apply({'params': params}, image)
  patches = vit.embed_patches(tower, params, tokens)
  assert patches.shape == (3, 1, out_dim or 16)
  np.testing.assert_allclose(patches[:, 0], pooled, rtol=1e-5, atol=1e-5)


def test_patches_of_clip_go_through_its_projection_alone(make_model, make_batch, randomize):
  model, batch = make_model(), make_batch()
  params = randomize(jax.eval_shape(model.init, jax.random.key(0), batch)['params'])
  apply = lambda *args, method: model.apply({'params': params}, *args, method=method)
  image = apply(batch.image, method='encode_image')
  patches = np.asarray(apply(image, method='embed_patches'))
  assert patches.shape == (8, 2, 2, 8)
  np.testing.assert_allclose(patches.reshape(8, 4, 8), np.asarray(image.tokens) @ params['img']['head']['kernel'],
                             rtol=1e-5, atol=1e-5)
