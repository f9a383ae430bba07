import numpy as np
import pytest

from cloc_jax.evaluators import NothingToMeasure, ZeroShot


def test_templates_are_averaged_after_normalising(unit):
  rng = np.random.default_rng(5)
  names, templates = ['cat', 'dog', 'owl'], ['a {}', 'the {} here', '{}']
  z = {t.format(n): unit(rng.normal(size=8)) * rng.uniform(0.5, 2) for n in names for t in templates}
  def encode(texts, *, region):
    assert not region
    return np.stack([z[t] for t in texts])
  z_image = unit(rng.normal(size=(50, 8)))
  labels = rng.integers(0, 3, 50)
  evaluator = ZeroShot(class_names=names, encode_text=encode, templates=templates)
  want = unit([np.mean([unit(z[t.format(n)]) for t in templates], 0) for n in names])
  np.testing.assert_allclose(evaluator.classifier(), want, atol=1e-6)
  got = dict(evaluator.run(z_image=z_image, labels=labels))
  assert got['top1'] == pytest.approx(np.mean([int(np.argmax(want @ v)) == y for v, y in zip(z_image, labels)]))
  assert (got['top5'], got['images'], got['classes']) == (1.0, 50, 3)


def test_top_five_and_ties():
  eye = np.eye(8, dtype=np.float32)
  evaluator = ZeroShot(class_names=[str(i) for i in range(8)], encode_text=lambda t, *, region: eye, prefix='z/')
  z = np.float32([[.5, .5, .5, .5, .01, 0, 0, 0]])
  z /= np.linalg.norm(z)
  assert dict(evaluator.run(z_image=z, labels=[4])).items() >= {'z/top1': 0.0, 'z/top5': 1.0}.items()
  assert dict(evaluator.run(z_image=z, labels=[5]))['z/top5'] == 0.0
  assert dict(evaluator.run(z_image=z, labels=[0]))['z/top1'] == 0.0  # four classes tie
  falling = np.arange(8, 0, -1, dtype=np.float32)[None]
  falling /= np.linalg.norm(falling)
  top5 = [dict(evaluator.run(z_image=falling, labels=[y]))['z/top5'] for y in range(8)]
  assert top5 == [1, 1, 1, 1, 1, 0, 0, 0]


def test_bad_labels_and_templates():
  encode = lambda t, *, region: np.eye(2, 8, dtype=np.float32)
  evaluator = ZeroShot(class_names=['a', 'b'], encode_text=encode)
  z = np.eye(3, 8, dtype=np.float32)
  with pytest.raises(ValueError, match='from 0 to 1'):
    dict(evaluator.run(z_image=z, labels=[0, 1, 2]))
  with pytest.raises(ValueError, match='one an image'):
    dict(evaluator.run(z_image=z, labels=[0, 1]))
  with pytest.raises(NothingToMeasure):
    dict(evaluator.run(z_image=z[:0], labels=[]))
  with pytest.raises(ValueError, match='one {} in each'):
    ZeroShot(class_names=['a'], encode_text=encode, templates=['a photo'])


def test_of_classes_with_one_name_the_first_is_taken(unit):
  """As argmax and top-k over the published classifier have it, where two columns are the same."""
  names = ['missile', 'cat', 'missile', 'dog', 'owl', 'cow', 'hen']
  z_of = dict(zip(dict.fromkeys(names), np.eye(6, 8, dtype=np.float32)))
  evaluator = ZeroShot(class_names=names, encode_text=lambda t, *, region: np.stack([z_of[x] for x in t]),
                       templates=['{}'])
  z_image = unit(np.random.default_rng(0).normal(size=(200, 8)))
  order = np.argsort(-(z_image @ evaluator.classifier().T), axis=1, kind='stable')
  for label in range(7):
    rank = evaluator.ranks(z_image=z_image, labels=np.full(200, label))
    np.testing.assert_array_equal(rank, (order == label).argmax(1))
