import numpy as np
import pytest

from cloc_jax.evaluators import NothingToMeasure, RegionRetrieval, ranking


@pytest.fixture(name='make_predictions')
def make_predictions_fixture(make_predictions):
  """With a box of its own for each region, where the test names none."""
  def make(*, region_image, boxes=None, **kw):
    if boxes is None:
      left = np.arange(len(region_image)) / 100
      boxes = np.stack([left, 0 * left, left + 0.01, 0 * left + 1], 1)
    return make_predictions(region_image=region_image, boxes=boxes, **kw)
  return make


def test_regions_of_one_box_are_one_answer(make_predictions):
  """RefCOCO's three sentences of an object: told apart by nothing, they must not be each other's wrong answers."""
  eye = np.eye(8, dtype=np.float32)
  left, right = [0, 0, 0.5, 1], [0.5, 0, 1, 1]
  kw = dict(images=2, region_image=[0, 0, 0, 0, 1], boxes=[left, left, right, left, left],
            region_captions=['man', 'man in blue', 'dog', 'left one', 'cat'])
  z_region, z_text = eye[[0, 0, 1, 0, 2]], eye[[0, 0, 1, 0, 2]]
  got = dict(RegionRetrieval().run(make_predictions(z_region=z_region, z_region_text=z_text, **kw)))
  assert (got['pool'], got['regions'], got['distinct_texts']) == (3, 5, 5)
  assert got['r2t_r1'] == got['t2r_r1'] == got['t2r_distinct_r1'] == 1
  # The second image's box lies at the same place, and is another box; it is taken for the first image's man.
  got = dict(RegionRetrieval().run(make_predictions(z_region=eye[[0, 0, 1, 0, 0]], z_region_text=z_text, **kw)))
  # Two of three boxes tie with all the man's texts, which are right for the first of them alone.
  assert got['r2t_r1'] == pytest.approx(2 / 3)
  assert got['t2r_r1'] == pytest.approx(1 / 5) and got['t2r_r5'] == 1
  first = dict(RegionRetrieval(limit=1).run(make_predictions(z_region=z_region, z_region_text=z_text, **kw)))
  assert (first['pool'], first['regions'], first['distinct_texts']) == (1, 3, 3), 'all texts of the first box'


def test_perfect_and_shifted(make_predictions):
  eye = np.eye(12, dtype=np.float32)
  kw = dict(region_image=[0] * 12, region_captions=[f'thing {i}' for i in range(12)], z_region_text=eye)
  got = dict(RegionRetrieval().run(make_predictions(z_region=eye, **kw)))
  assert all(got[f'{d}_r{k}'] == 1 for d in ('r2t', 't2r', 't2r_distinct') for k in (1, 5, 10))
  assert (got['pool'], got['distinct_texts'], got['no_caption']) == (12, 12, 0)
  got = dict(RegionRetrieval().run(make_predictions(z_region=np.roll(eye, 1, 0), **kw)))
  # One wrong item is ahead, and the ten others tie with the right one: ties count as wrong.
  assert all(got[f'{d}_r{k}'] == 0 for d in ('r2t', 't2r') for k in (1, 5, 10))


def test_a_repeated_caption_is_one_text(make_predictions):
  eye = np.eye(8, dtype=np.float32)
  predictions = make_predictions(
      region_image=[0, 0, 1, 1], images=2, region_captions=['a dog', 'A  dog', 'a dog', 'a cat'],
      z_region=eye[[0, 0, 1, 2]],       # the third region is not seen as a dog
      z_region_text=eye[[0, 0, 0, 2]])
  got = dict(RegionRetrieval().run(predictions))
  assert (got['pool'], got['distinct_texts']) == (4, 2)
  # The odd dog ties with both texts, so it is wrong at 1; with two distinct texts everything is right at 5.
  assert got['r2t_r1'] == pytest.approx(3 / 4)
  assert got['r2t_r5'] == 1
  # "a dog" finds one of its regions first, however many of them asked.
  assert got['t2r_r1'] == 1 and got['t2r_distinct_r1'] == 1


def test_texts_ask_as_often_as_they_occur_or_once(make_predictions):
  eye = np.eye(8, dtype=np.float32)
  predictions = make_predictions(region_image=[0] * 4, region_captions=['dog', 'dog', 'dog', 'cat'],
                                 z_region=eye[[0, 0, 0, 3]], z_region_text=eye[[0, 0, 0, 0]])
  got = dict(RegionRetrieval().run(predictions))
  assert got['t2r_r1'] == pytest.approx(3 / 4)
  assert got['t2r_distinct_r1'] == pytest.approx(1 / 2)


@pytest.mark.parametrize('block', [30, 1 << 24])
def test_matches_a_slow_loop(make_predictions, unit, monkeypatch, block):
  monkeypatch.setattr(ranking, '_BLOCK', block)
  rng = np.random.default_rng(2)
  words = [f'w{i}' for i in range(15)]
  captions = [words[i] for i in rng.integers(0, 15, 60)]
  z_word = dict(zip(words, unit(rng.normal(size=(15, 8)))))
  z_text = np.stack([z_word[c] for c in captions])
  z_region = unit(z_text + rng.normal(size=z_text.shape) * 0.5)
  predictions = make_predictions(region_image=[0] * 60, region_captions=captions, z_region=z_region,
                                 z_region_text=z_text)
  got = dict(RegionRetrieval().run(predictions))
  pool = sorted(set(captions))
  for k in (1, 5, 10):
    right = [captions[r] in sorted(pool, key=lambda c: -float(z_region[r] @ z_word[c]))[:k] for r in range(60)]
    assert got[f'r2t_r{k}'] == pytest.approx(np.mean(right))
    finds = {c: any(captions[r] == c for r in sorted(range(60), key=lambda r: -float(z_region[r] @ z_word[c]))[:k])
             for c in pool}
    assert got[f't2r_r{k}'] == pytest.approx(np.mean([finds[c] for c in captions]))
    assert got[f't2r_distinct_r{k}'] == pytest.approx(np.mean(list(finds.values())))


def test_limit_takes_the_first_and_captionless_regions_are_counted(make_predictions):
  eye = np.eye(8, dtype=np.float32)
  predictions = make_predictions(region_image=[0] * 5, region_captions=['a', ' ', 'b', 'c', 'd'], z_region=eye[:5],
                                 z_region_text=eye[[0, 1, 2, 4, 3]])
  full = dict(RegionRetrieval().run(predictions))
  assert (full['pool'], full['no_caption'], full['r2t_r1']) == (4, 1, 0.5)
  first = dict(RegionRetrieval(limit=2, prefix='p/').run(predictions))
  assert (first['p/pool'], first['p/r2t_r1']) == (2, 1.0)


def test_nothing_to_measure(make_predictions):
  eye = np.eye(8, dtype=np.float32)
  with pytest.raises(NothingToMeasure, match='does not embed'):
    dict(RegionRetrieval().run(make_predictions(region_image=[0], region_captions=['a'])))
  with pytest.raises(NothingToMeasure, match='none of 1 regions'):
    dict(RegionRetrieval().run(make_predictions(region_image=[0], z_region=eye[:1])))
  with pytest.raises(ValueError, match='limit'):
    RegionRetrieval(limit=0)
