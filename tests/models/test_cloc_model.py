"""The joint model: its public parameter tree, one encoding for many prompts, and its variants."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cloc_jax import trees
from cloc_jax.batch import Batch
from cloc_jax.models import vit

# Parameters are public API: a change here breaks saved checkpoints and needs a conversion.
BLOCK = {
    'LayerNorm_0/bias': ('D',), 'LayerNorm_0/scale': ('D',), 'LayerNorm_1/bias': ('D',), 'LayerNorm_1/scale': ('D',),
    'MlpBlock_0/Dense_0/bias': ('4D',), 'MlpBlock_0/Dense_0/kernel': ('D', '4D'),
    'MlpBlock_0/Dense_1/bias': ('D',), 'MlpBlock_0/Dense_1/kernel': ('4D', 'D'),
    'MultiHeadDotProductAttention_0/key/bias': ('h', 'D/h'),
    'MultiHeadDotProductAttention_0/key/kernel': ('D', 'h', 'D/h'),
    'MultiHeadDotProductAttention_0/out/bias': ('D',),
    'MultiHeadDotProductAttention_0/out/kernel': ('h', 'D/h', 'D'),
    'MultiHeadDotProductAttention_0/query/bias': ('h', 'D/h'),
    'MultiHeadDotProductAttention_0/query/kernel': ('D', 'h', 'D/h'),
    'MultiHeadDotProductAttention_0/value/bias': ('h', 'D/h'),
    'MultiHeadDotProductAttention_0/value/kernel': ('D', 'h', 'D/h'),
}


def block(prefix, *, d, heads, depth=()):
  sizes = {'D': d, '4D': 4 * d, 'h': heads, 'D/h': d // heads}
  return {f'{prefix}/{path}': (*depth, *(sizes[s] for s in shape)) for path, shape in BLOCK.items()}


# Width 16, 2 layers, 2 heads, patch 8 at 16 px; text width 12, 1 layer, 2 heads, 29 words, 9 positions; E = 8.
IMG = {
    'img/cls': (1, 1, 16),
    'img/embedding/kernel': (8, 8, 3, 16),
    'img/head/kernel': (16, 8),
    'img/pos_embedding': (1, 5, 16),
    'img/pre_norm/bias': (16,), 'img/pre_norm/scale': (16,),
    'img/Transformer/encoder_norm/bias': (16,), 'img/Transformer/encoder_norm/scale': (16,),
    **block('img/Transformer/encoderblock', d=16, heads=2, depth=(2,)),
}
TXT = {
    'txt/Embed_0/embedding': (29, 12),
    'txt/head/kernel': (12, 8),
    'txt/pos_embedding': (1, 9, 12),
    'txt/Encoder_0/encoder_norm/bias': (12,), 'txt/Encoder_0/encoder_norm/scale': (12,),
    **block('txt/Encoder_0/encoderblock', d=12, heads=2, depth=(1,)),
}
PROMPTER = {
    'prompter/box_embed/bias': (2, 16), 'prompter/box_embed/kernel': (2, 16, 16),
    'prompter/text_embed/bias': (16,), 'prompter/text_embed/kernel': (8, 16),
    'prompter/head/kernel': (16, 8),
    **block('prompter', d=16, heads=1),
}
BOX_HEAD = {
    'box_head/Dense_0/bias': (8,), 'box_head/Dense_0/kernel': (8, 8),
    'box_head/Dense_1/bias': (4,), 'box_head/Dense_1/kernel': (8, 4),
}
TEMPERATURE = {'t': (), 'b': ()}
FULL = {**IMG, **TXT, **PROMPTER, **BOX_HEAD, **TEMPERATURE}
ROI = {**IMG, **TXT, 'roi_head/head/kernel': (16, 8), **TEMPERATURE}
SIGLIP = dict(image=dict(pool='map', out_dim=0), text=dict(pool='last'), embed_dim=16, init_scale=10.0, init_bias=-10.0)


def parameter_shapes(model, batch):
  return jax.eval_shape(model.init, jax.random.key(0), batch)['params']


@pytest.mark.parametrize('overrides, expected', [
    ({}, FULL),
    ({'region_encoder': 'none'}, {**IMG, **TXT, **TEMPERATURE}),
    ({'region_encoder': 'roi_align'}, ROI),
    ({'separate_temperature': True}, {**FULL, 'region_t': (), 'region_b': ()}),
    ({'box_head_width': 5}, {**FULL, 'box_head/Dense_0/bias': (5,), 'box_head/Dense_0/kernel': (8, 5),
                             'box_head/Dense_1/kernel': (5, 4)}),
], ids=['default', 'none', 'roi_align', 'separate_temperature', 'box_head_width'])
def test_parameter_paths_and_shapes_are_golden(make_model, make_batch, overrides, expected):
  shapes = trees.flatten(parameter_shapes(make_model(**overrides), make_batch()))
  assert {path: leaf.shape for path, leaf in shapes.items()} == expected


def test_all_parameters_are_float32_whatever_the_activations(make_model, make_batch):
  shapes = parameter_shapes(make_model(dtype=jnp.bfloat16), make_batch())
  assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}


@pytest.fixture(name='ready', scope='module')
def ready_fixture(make_model, make_batch, randomize):
  """ready(**overrides) → (model, randomised parameters, batch, compiled function of the two)."""
  @functools.cache
  def ready(dtype=jnp.float32, **overrides):
    model = make_model(dtype=dtype, **overrides)
    batch = make_batch(images=2)
    shapes = parameter_shapes(model, batch)
    params = randomize(shapes)
    return model, params, batch, jax.jit(lambda params, batch: model.apply({'params': params}, batch))
  return ready


def outputs(ready):
  _, params, batch, run = ready
  return run(params, batch)


def assert_unit(z):
  assert z.dtype == jnp.float32
  np.testing.assert_allclose(np.linalg.norm(np.asarray(z), axis=-1), 1, rtol=1e-5)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_outputs_are_float32_unit_vectors_and_boxes(ready, dtype):
  _, params, batch, run = ready(dtype)
  out = run(params, batch)
  assert out.z_image.shape == out.z_text.shape == (2, 8)
  assert out.z_region.shape == out.z_region_text.shape == (2, 3, 8)
  for z in (out.z_image, out.z_text, out.z_region, out.z_region_text):
    assert_unit(z)
  assert out.pred_boxes.shape == batch.boxes.shape and out.pred_boxes.dtype == jnp.float32
  assert ((np.asarray(out.pred_boxes) > 0) & (np.asarray(out.pred_boxes) < 1)).all()
  np.testing.assert_allclose(out.logit_scale, np.exp(params['t']), rtol=1e-6)
  np.testing.assert_allclose(out.logit_bias, params['b'], rtol=1e-6)
  assert out.region_logit_scale == out.logit_scale and out.region_logit_bias == out.logit_bias


def test_bfloat16_stays_near_float32(ready):
  exact, rough = outputs(ready(jnp.float32)), outputs(ready(jnp.bfloat16))
  for field in ('z_image', 'z_text', 'z_region', 'z_region_text'):
    cosine = np.sum(np.asarray(getattr(exact, field)) * np.asarray(getattr(rough, field)), -1)
    assert 0.99 < cosine.min() < 1 - 1e-7, field
  np.testing.assert_allclose(rough.pred_boxes, exact.pred_boxes, atol=0.02)


@pytest.mark.parametrize('region_encoder', ['prompter', 'roi_align'])
def test_encoding_once_and_prompting_often_is_the_joint_model(ready, region_encoder):
  model, params, batch, run = ready(jnp.float32) if region_encoder == 'prompter' else ready(region_encoder='roi_align')
  out = run(params, batch)

  @jax.jit
  def step_by_step(params, batch):
    call = lambda method, *arguments: model.apply({'params': params}, *arguments, method=method)
    image = call('encode_image', batch.image)
    z_region = [call('embed_regions', image, batch.boxes[:, j:j + 1]) for j in range(3)]
    z_region_text = call('encode_text', batch.region_text.reshape(6, 4)).reshape(2, 3, 8)
    boxes = call('ground', image, z_region_text) if region_encoder == 'prompter' else None
    return image, z_region, call('encode_text', batch.text), z_region_text, boxes

  image, z_region, z_text, z_region_text, boxes = step_by_step(params, batch)
  assert image.tokens.shape == (2, 4, 16)
  for got, want in ((image.z, out.z_image), (np.concatenate(z_region, 1), out.z_region), (z_text, out.z_text),
                    (z_region_text, out.z_region_text), (boxes, out.pred_boxes)):
    if want is not None:
      np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
  assert_unit(out.z_region)
  assert (out.pred_boxes is None) == (region_encoder == 'roi_align')


def test_regions_depend_on_their_box_and_their_own_image(ready):
  _, params, batch, run = ready(jnp.float32)
  out = run(params, batch)
  boxes = batch.boxes.copy()
  boxes[0, 1, 2] += 0.2
  image = batch.image.copy()
  image[1] = 255 - image[1]
  moved = run(params, Batch(image, batch.image_mask, batch.text, boxes, batch.region_text, batch.region_mask))
  change = np.abs(np.asarray(moved.z_region) - np.asarray(out.z_region)).max(-1)
  assert (change[0, [0, 2]] < 1e-6).all() and change[0, 1] > 1e-4 and (change[1] > 1e-3).all()
  np.testing.assert_allclose(moved.z_region_text, out.z_region_text, atol=1e-6)


def test_pixels_are_normalised_by_mean_and_deviation(ready):
  model, params, batch, run = ready(jnp.float32)
  tower = model.image | {'out_dim': model.embed_dim}
  mean, std = np.array(model.image_mean), np.array(model.image_std)
  pixels = ((batch.image / 255 - mean) / std).astype(np.float32)
  pooled, _ = jax.jit(vit.ViT(**tower).apply)({'params': params['img']}, pixels)
  want = np.asarray(pooled) / np.linalg.norm(np.asarray(pooled), axis=-1, keepdims=True)
  np.testing.assert_allclose(run(params, batch).z_image, want, rtol=1e-4, atol=1e-5)


def test_without_a_region_encoder_it_is_clip(ready):
  model, params, batch, run = ready(region_encoder='none')
  out = jax.eval_shape(run, params, batch)
  assert out.z_region is out.z_region_text is out.pred_boxes is None
  encode = functools.partial(model.apply, {'params': params})
  image = jax.eval_shape(functools.partial(encode, method='encode_image'), batch.image)
  assert image.state is None
  with pytest.raises(ValueError, match="embed_regions: .*region_encoder='none'"):
    encode(image, batch.boxes, method='embed_regions')
  with pytest.raises(ValueError, match="ground: .*'none'"):
    encode(image, np.zeros((2, 3, 8), np.float32), method='ground')


def test_roi_align_cannot_ground(ready):
  model, params, *_ = ready(region_encoder='roi_align')
  with pytest.raises(ValueError, match="ground: text prompts need the Prompter, this model has 'roi_align'"):
    model.apply({'params': params}, None, np.zeros((2, 3, 8), np.float32), method='ground')


def test_siglips_form(make_model, make_batch):
  model, batch = make_model(**SIGLIP), make_batch()
  params = parameter_shapes(model, batch)
  out = jax.eval_shape(model.apply, {'params': params}, batch)
  assert out.z_image.shape == out.z_text.shape == (8, 16)
  assert out.z_region.shape == out.z_region_text.shape == (8, 3, 16)
  assert 'head' not in params['img'] and 'cls' not in params['img'] and 'pre_norm' not in params['img']
  assert params['img']['pos_embedding'].shape == (1, 4, 16)
  assert params['img']['embedding']['bias'].shape == params['txt']['head']['bias'].shape == (16,)
  assert params['img']['MAPHead_0']['probe'].shape == (1, 1, 16)


@pytest.mark.parametrize('overrides, scale, bias', [({'separate_temperature': True}, 1 / 0.07, 0), (SIGLIP, 10, -10)],
                         ids=['softmax', 'siglip'])
def test_temperatures_start_where_they_are_told(make_model, make_batch, overrides, scale, bias):
  model, batch = make_model(**overrides), make_batch(images=2)
  scalars = lambda key: {k: v for k, v in model.init(key, batch)['params'].items() if k.split('_')[-1] in ('t', 'b')}
  values = jax.jit(scalars)(jax.random.key(0))
  assert set(values) == ({'t', 'b', 'region_t', 'region_b'} if 'separate_temperature' in overrides else {'t', 'b'})
  for name, value in values.items():
    np.testing.assert_allclose(value, np.log(scale) if name.endswith('t') else bias, rtol=1e-6)


def test_a_shared_temperature_is_one_parameter_and_a_separate_one_two(ready):
  _, params, *_ = separate = ready(separate_temperature=True, region_encoder='none')
  out = outputs(separate)
  np.testing.assert_allclose(out.region_logit_scale, np.exp(params['region_t']), rtol=1e-6)
  np.testing.assert_allclose(out.region_logit_bias, params['region_b'], rtol=1e-6)
  assert out.region_logit_scale != out.logit_scale


def test_an_unknown_region_encoder_is_an_error(make_model, make_batch):
  with pytest.raises(ValueError, match="region_encoder: expected one of .*'prompter'.* got 'pool'"):
    parameter_shapes(make_model(region_encoder='pool'), make_batch())
