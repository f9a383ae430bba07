import numpy as np
import pytest

from cloc_jax.evaluators import ImageTextRetrieval, NothingToMeasure


def test_several_captions_an_image_against_a_slow_loop(make_predictions, unit):
  rng = np.random.default_rng(3)
  caption_image = np.repeat(np.arange(20), rng.integers(1, 6, 20))
  c = len(caption_image)
  z_image = unit(rng.normal(size=(20, 8)))
  z_caption = unit(z_image[caption_image] + rng.normal(size=(c, 8)))
  got = dict(ImageTextRetrieval().run(make_predictions(
      images=20, z_image=z_image, captions=[f'text {i}' for i in range(c)], caption_image=caption_image,
      z_caption=z_caption)))
  sim = z_image.astype(np.float64) @ z_caption.T
  for k in (1, 5, 10):
    i2t = np.mean([any(caption_image[j] == i for j in np.argsort(-sim[i])[:k]) for i in range(20)])
    t2i = np.mean([caption_image[j] in np.argsort(-sim[:, j])[:k] for j in range(c)])
    assert got[f'i2t_r{k}'] == pytest.approx(i2t) and got[f't2i_r{k}'] == pytest.approx(t2i)
    # Without repeated captions the two protocols are one.
    assert got[f'i2t_any_r{k}'] == pytest.approx(i2t) and got[f't2i_any_r{k}'] == pytest.approx(t2i)
  assert 0.1 < got['i2t_r1'] < 1
  assert (got['images'], got['captions'], got['distinct_captions']) == (20, c, c)


def test_repeated_captions_count_in_the_any_figures_alone(make_predictions):
  eye = np.eye(8, dtype=np.float32)
  # Images 0 and 1 have equal captions; the text looks like image 0.
  got = dict(ImageTextRetrieval().run(make_predictions(
      images=3, z_image=np.stack([eye[0], (eye[0] + eye[3]) / 2 ** 0.5, eye[2]]),
      captions=['a red car', 'A red  car', 'a cow'], caption_image=[0, 1, 2], z_caption=eye[[0, 0, 2]])))
  # Usual: both car images tie their caption with the other's, so neither is right; the cow is.
  assert got['i2t_r1'] == pytest.approx(1 / 3)
  assert got['t2i_r1'] == pytest.approx(2 / 3)
  assert got['i2t_any_r1'] == 1 and got['t2i_any_r1'] == 1
  assert got['distinct_captions'] == 2


def test_a_repeated_caption_asks_as_often_as_it_occurs(make_predictions):
  eye = np.eye(8, dtype=np.float32)
  # "a car" finds a car image first, three times over; "a cow" finds a car.
  got = dict(ImageTextRetrieval().run(make_predictions(
      images=4, z_image=eye[[0, 0, 0, 2]], captions=['a car', 'a car', 'a car', 'a cow'], caption_image=[0, 1, 2, 3],
      z_caption=eye[[0, 0, 0, 0]])))
  assert got['t2i_any_r1'] == pytest.approx(3 / 4)


def test_images_without_caption_stay_in_the_pool(make_predictions):
  eye = np.eye(8, dtype=np.float32)
  predictions = make_predictions(
      images=3, z_image=eye[[0, 1, 1]], captions=['x', '  ', 'y'], caption_image=[0, 0, 1], z_caption=eye[[0, 7, 1]])
  got = dict(ImageTextRetrieval(prefix='q/').run(predictions))
  assert (got['q/images_without_caption'], got['q/empty_captions'], got['q/captions']) == (1, 1, 2)
  assert got['q/i2t_r1'] == 1      # two images ask, both right
  assert got['q/t2i_r1'] == 0.5    # the third image ties with the second


def test_nothing_to_measure(make_predictions):
  with pytest.raises(NothingToMeasure, match='none of 2 images'):
    dict(ImageTextRetrieval().run(make_predictions(images=2)))
