"""Grounding losses against explicit sums in float64."""
import functools

import jax
from loss_twins import GROUNDING_TWINS, numeric_gradient
import numpy as np
import pytest

from cloc_jax.losses.grounding import GROUNDINGS

BOTH = pytest.mark.parametrize('name', sorted(GROUNDINGS))
MASK = np.array([[1, 1], [0, 0], [1, 0]], bool)


def boxes(seed):
  corners = np.sort(np.random.default_rng(seed).random((3, 2, 2, 2)), 2)
  return corners.reshape(3, 2, 4)


@functools.cache
def compiled(name):
  return jax.jit(jax.value_and_grad(GROUNDINGS[name]))


def value_and_gradient(name, pred, true, mask):
  return compiled(name)(np.asarray(pred, np.float32), np.asarray(true, np.float32), mask)


@BOTH
@pytest.mark.parametrize('mask', [np.ones_like(MASK), MASK], ids=['all', 'masked'])
def test_value_and_gradient_are_the_explicit_sums(name, mask):
  pred, true = boxes(0), boxes(1)
  value, gradient = value_and_gradient(name, pred, true, mask)
  np.testing.assert_allclose(value, GROUNDING_TWINS[name](pred, true, mask), rtol=1e-5)
  want = numeric_gradient(lambda p: GROUNDING_TWINS[name](p, true, mask), pred)
  np.testing.assert_allclose(gradient, want, rtol=1e-4, atol=1e-6)


def test_l2_is_the_mean_square_over_valid_coordinates():
  true = np.full((3, 2, 4), 0.5)
  pred = true + np.where(MASK, 0.1, 7.0)[..., None]
  np.testing.assert_allclose(value_and_gradient('l2', pred, true, MASK)[0], 0.01, rtol=1e-5)


@BOTH
def test_perfect_boxes_cost_nothing(name):
  np.testing.assert_allclose(value_and_gradient(name, boxes(0), boxes(0), MASK)[0], 0, atol=1e-6)


@BOTH
@pytest.mark.parametrize('junk', ['random', 'empty', 'inverted'])
def test_masked_regions_change_nothing(name, junk):
  pred, true = boxes(0), boxes(1)
  value, gradient = value_and_gradient(name, pred, true, MASK)
  fill = {'random': 40 * np.random.default_rng(2).normal(size=(3, 2, 4)), 'empty': np.zeros((3, 2, 4)),
          'inverted': np.tile([0.9, 0.9, 0.1, 0.1], (3, 2, 1))}[junk]
  other, others = value_and_gradient(name, np.where(MASK[..., None], pred, fill),
                                     np.where(MASK[..., None], true, fill), MASK)
  assert value == other
  np.testing.assert_array_equal(gradient, others)
  assert (np.asarray(gradient)[~MASK] == 0).all()


@BOTH
def test_nothing_valid_gives_zero_and_no_gradient(name):
  value, gradient = value_and_gradient(name, boxes(0), np.zeros((3, 2, 4)), np.zeros_like(MASK))
  assert value == 0
  np.testing.assert_array_equal(gradient, np.zeros((3, 2, 4)))


def test_inverted_predictions_are_pulled_back_with_a_finite_gradient():
  true = np.tile([0.2, 0.2, 0.8, 0.8], (3, 2, 1))
  pred = np.tile([0.9, 0.9, 0.1, 0.1], (3, 2, 1))
  _, gradient = value_and_gradient('l1_giou', pred, true, MASK)
  gradient = np.asarray(gradient)[MASK]
  assert np.isfinite(gradient).all()
  # A step against the gradient moves the top-left corner up and left, the bottom-right down and right.
  assert (gradient[:, :2] > 0).all() and (gradient[:, 2:] < 0).all()
