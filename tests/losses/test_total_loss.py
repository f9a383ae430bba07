"""The whole training loss against SPEC §3 written out, and what must leave it unchanged."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
from loss_twins import numeric_gradient, texts_with_twins, total_twin, unit
import numpy as np
import pytest

from cloc_jax import losses, sharding
from cloc_jax.batch import Batch, Outputs

B, M, E = 4, 3, 4
IMAGE_MASK = np.array([1, 1, 1, 1], bool)
REGION_MASK = np.array([[1, 1, 1], [0, 0, 0], [1, 0, 0], [1, 1, 0]], bool)


def random_boxes(rng, *shape):
  return np.sort(rng.random((*shape, 2, 2)), -2).reshape(*shape, 4)


def make_values(seed=0):
  rng = np.random.default_rng(seed)
  return {
      'z_image': unit(rng, B, E), 'z_text': unit(rng, B, E), 'z_region': unit(rng, B, M, E),
      'z_region_text': texts_with_twins(rng, B * M, E).reshape(B, M, E)[[0, 2, 1, 3]],
      'pred_boxes': random_boxes(rng, B, M), 'logit_scale': 8.0, 'logit_bias': -1.0, 'region_logit_scale': 5.0,
      'region_logit_bias': -2.0}


def make_batch(boxes, *, image_mask=IMAGE_MASK, region_mask=REGION_MASK):
  b, m = region_mask.shape
  return Batch(image=np.zeros((b, 4, 4, 3), np.uint8), image_mask=image_mask, text=np.zeros((b, 2), np.int32),
               boxes=np.asarray(boxes, np.float32), region_text=np.zeros((b, m, 2), np.int32),
               region_mask=region_mask)


@functools.cache
def compiled(**options):
  return jax.jit(jax.value_and_grad(lambda o, b: losses.total(o, b, **options), has_aux=True))


def evaluate(values, batch, **options):
  """((loss, metrics), gradients by field)."""
  outputs = Outputs(**{k: None if v is None else np.asarray(v, np.float32) for k, v in values.items()})
  return compiled(**options)(outputs, batch)


VALUES = make_values()
BOXES = random_boxes(np.random.default_rng(5), B, M)
PAPER = {}
SIGMOID = {'image_text': 'sigmoid', 'region_text': 'sigmoid', 'grounding': 'l1_giou'}


@pytest.mark.parametrize('options', [
    PAPER, SIGMOID,
    {'image_text': 'sigmoid', 'region_weight': 0.5, 'grounding_weight': 3.0, 'lambda0': 0.7, 'filter_threshold': None},
], ids=['paper', 'sigmoid', 'weights'])
def test_value_terms_and_gradients_are_the_specification(options):
  masks = {'boxes': BOXES, 'image_mask': np.array([1, 1, 0, 1], bool), 'region_mask': REGION_MASK}
  twin = lambda **moved: total_twin({**VALUES, **moved}, **masks, **options)
  (loss, metrics), gradients = evaluate(VALUES, make_batch(BOXES, image_mask=masks['image_mask']), **options)
  want, terms = twin()
  assert options.get('filter_threshold', 0.9) is None or terms['filtered_pairs'] > 0
  np.testing.assert_allclose(loss, want, rtol=1e-5)
  assert metrics['loss'] == loss
  for name, term in terms.items():
    np.testing.assert_allclose(metrics[name], term, rtol=1e-5, err_msg=name)
  for field, value in VALUES.items():
    numeric = numeric_gradient(lambda x, field=field: twin(**{field: x})[0], value)
    np.testing.assert_allclose(getattr(gradients, field), numeric, rtol=1e-4, atol=2e-6, err_msg=field)


def test_lambda_is_the_share_of_images_with_a_region():
  (_, metrics), _ = evaluate(VALUES, make_batch(BOXES), lambda0=2.0)
  np.testing.assert_allclose(metrics['lambda'], 2.0 * 3 / 4)
  np.testing.assert_allclose(metrics['regions_per_image'], 6 / 4)


def test_metrics_are_float32_scalars():
  (_, metrics), _ = evaluate(VALUES, make_batch(BOXES))
  assert all(v.shape == () and v.dtype == jnp.float32 for v in metrics.values())
  np.testing.assert_allclose(metrics['logit_scale'], 8.0)
  np.testing.assert_allclose(metrics['region_logit_scale'], 5.0)


def test_content_of_padding_regions_and_of_images_without_regions_is_never_seen():
  rng = np.random.default_rng(3)
  hidden = ~REGION_MASK[..., None]
  garbage = {**VALUES, **{k: np.where(hidden, 20 * rng.normal(size=VALUES[k].shape), VALUES[k])
                          for k in ('z_region', 'z_region_text', 'pred_boxes')}}
  # A padding text that equals a valid one: the filter must not count it.
  garbage['z_region_text'][1, 0] = VALUES['z_region_text'][0, 0]
  other_boxes = np.where(hidden, rng.normal(size=BOXES.shape), BOXES)
  for options in (PAPER, SIGMOID):
    (loss, metrics), gradients = evaluate(VALUES, make_batch(BOXES), **options)
    (other, other_metrics), other_gradients = evaluate(garbage, make_batch(other_boxes), **options)
    assert loss == other and metrics == other_metrics
    jax.tree.map(np.testing.assert_array_equal, gradients, other_gradients)
    for field in ('z_region', 'z_region_text', 'pred_boxes'):
      assert (np.asarray(getattr(gradients, field))[~REGION_MASK] == 0).all(), field


def test_more_padding_regions_change_nothing():
  wider = {k: np.concatenate([v, v[:, ::-1]], 1) if np.ndim(v) == 3 else v for k, v in VALUES.items()}
  mask = np.concatenate([REGION_MASK, np.zeros_like(REGION_MASK)], 1)
  (loss, metrics), gradients = evaluate(VALUES, make_batch(BOXES))
  (other, other_metrics), other_gradients = evaluate(
      wider, make_batch(np.concatenate([BOXES, BOXES], 1), region_mask=mask))
  np.testing.assert_allclose(other, loss, rtol=1e-6)
  for name, value in metrics.items():
    np.testing.assert_allclose(other_metrics[name], value, rtol=1e-6, err_msg=name)
  for field in dataclasses.fields(Outputs):
    mine, theirs = (np.asarray(getattr(g, field.name)) for g in (gradients, other_gradients))
    theirs = theirs[:, :M] if theirs.ndim == 3 else theirs
    np.testing.assert_allclose(theirs, mine, rtol=1e-5, atol=1e-7, err_msg=field.name)


def test_padding_examples_are_not_images():
  longer = {k: np.concatenate([v, v[::-1]]) if np.ndim(v) else v for k, v in VALUES.items()}
  batch = make_batch(np.concatenate([BOXES, BOXES]), image_mask=np.r_[IMAGE_MASK, np.zeros(B, bool)],
                     region_mask=np.concatenate([REGION_MASK, np.zeros_like(REGION_MASK)]))
  (loss, metrics), _ = evaluate(VALUES, make_batch(BOXES))
  (other, other_metrics), gradients = evaluate(longer, batch)
  np.testing.assert_allclose(other, loss, rtol=1e-6)
  for name, value in metrics.items():
    np.testing.assert_allclose(other_metrics[name], value, rtol=1e-6, err_msg=name)
  for field in ('z_image', 'z_text', 'z_region', 'z_region_text', 'pred_boxes'):
    assert (np.asarray(getattr(gradients, field))[B:] == 0).all(), field


def test_a_batch_without_regions_is_plain_clip():
  (loss, metrics), gradients = evaluate(VALUES, make_batch(BOXES, region_mask=np.zeros_like(REGION_MASK)))
  bare = {**VALUES, 'z_region': None, 'z_region_text': None, 'pred_boxes': None}
  (clip, clip_metrics), clip_gradients = evaluate(bare, make_batch(BOXES))
  assert loss == clip == metrics['loss_image_text'] and metrics['lambda'] == 0
  assert 'loss_region_text' not in clip_metrics and 'loss_grounding' not in clip_metrics
  np.testing.assert_allclose(gradients.z_image, clip_gradients.z_image, rtol=1e-6)
  for field in ('z_region', 'z_region_text', 'pred_boxes'):
    assert (np.asarray(getattr(gradients, field)) == 0).all(), field


@pytest.mark.parametrize('options', [PAPER, SIGMOID], ids=['paper', 'sigmoid'])
def test_an_all_padding_batch_is_harmless(options):
  nothing = make_batch(np.zeros_like(BOXES), image_mask=np.zeros(B, bool), region_mask=np.zeros_like(REGION_MASK))
  (loss, metrics), gradients = evaluate(VALUES, nothing, **options)
  assert loss == 0 and all(np.isfinite(v) for v in metrics.values())
  assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(gradients))


def test_a_weight_of_zero_leaves_a_term_out():
  (loss, metrics), gradients = evaluate(VALUES, make_batch(BOXES), grounding_weight=0.0)
  assert 'loss_grounding' not in metrics and (np.asarray(gradients.pred_boxes) == 0).all()
  np.testing.assert_allclose(loss, metrics['loss_image_text'] + 0.75 * metrics['loss_region_text'], rtol=1e-6)
  (loss, metrics), gradients = evaluate(VALUES, make_batch(BOXES), region_weight=0.0)
  assert 'loss_region_text' not in metrics and (np.asarray(gradients.z_region) == 0).all()
  np.testing.assert_allclose(loss, metrics['loss_image_text'] + 0.75 * metrics['loss_grounding'], rtol=1e-6)


def test_the_filter_waits_for_its_step():
  run = jax.jit(lambda outputs, step: losses.total(outputs, make_batch(BOXES), filter_from_step=5, step=step)[1])
  outputs = Outputs(**{k: np.asarray(v, np.float32) for k, v in VALUES.items()})
  masks = {'boxes': BOXES, 'image_mask': IMAGE_MASK, 'region_mask': REGION_MASK}
  (loss, filtered), (unfiltered_loss, _) = (total_twin(VALUES, **masks, filter_threshold=t) for t in (0.9, None))
  assert abs(loss - unfiltered_loss) > 0.01
  for step in (0, 4, 5, 6):
    metrics = run(outputs, step)
    np.testing.assert_allclose(metrics['loss'], unfiltered_loss if step < 5 else loss, rtol=1e-5)
    np.testing.assert_allclose(metrics['filtered_pairs'], 0 if step < 5 else filtered['filtered_pairs'], rtol=1e-5)
  (other, _), _ = evaluate(VALUES, make_batch(BOXES), filter_from_step=5)  # no step given: the wait is over
  np.testing.assert_allclose(other, loss, rtol=1e-5)


@pytest.mark.parametrize('option', ['image_text', 'region_text', 'grounding'])
def test_an_unknown_choice_is_named(option):
  with pytest.raises(ValueError, match=f"loss.{option}: expected one of .* got 'softmx'"):
    evaluate(VALUES, make_batch(BOXES), **{option: 'softmx'})


def test_four_devices_give_what_one_gives():
  outputs = Outputs(**{k: np.asarray(v, np.float32) for k, v in VALUES.items()})
  batch = make_batch(BOXES)
  one = compiled()(outputs, batch)
  mesh = sharding.make_mesh(devices=jax.devices()[:4])
  rows, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  place = lambda x: jax.device_put(x, rows if np.ndim(x) else everywhere)
  four = compiled()(jax.tree.map(place, outputs), jax.tree.map(place, batch))
  assert len(four[1].z_region.sharding.device_set) == 4
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), four, one)
