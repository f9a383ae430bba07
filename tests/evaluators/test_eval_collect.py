import dataclasses

import numpy as np
import pytest

from cloc_jax.evaluators import EncoderFns, collect
from cloc_jax.evaluators.collect import REGION_BUCKETS
from cloc_jax.geometry import resize_with_pad

E = 16


@dataclasses.dataclass
class Example:
  image_id: str
  captions: tuple
  geometry: object
  boxes: np.ndarray
  region_captions: tuple
  categories: tuple


@dataclasses.dataclass
class Batch:
  images: np.ndarray
  image_mask: np.ndarray
  examples: list


def vector(*numbers):
  """A unit vector that depends on all of `numbers`, in a way no slot mix-up could reproduce."""
  rng = np.random.default_rng([int(round(float(n) * 1000)) for n in numbers])
  z = rng.normal(size=E).astype(np.float32)
  return z / np.linalg.norm(z)


class FakeModel:
  """Counts what it is asked; an image is known by its first pixel."""

  def __init__(self):
    self.images, self.texts, self.widths = [], [], []

  def encode_image(self, images):
    self.images += images[:, 0, 0, 0].tolist()
    return images[:, 0, 0, 0]

  def image_embedding(self, handle):
    return np.stack([vector(i) for i in handle])

  def embed_regions(self, handle, boxes):
    assert boxes.dtype == np.float32 and (boxes[..., 2:] > boxes[..., :2]).all()
    self.widths.append(boxes.shape[1])
    return np.stack([[vector(i, *box) for box in row] for i, row in zip(handle, boxes)])

  def encode_text(self, texts, *, region):
    self.texts += [(t, region) for t in texts]
    return np.stack([self.text(t, region) for t in texts])

  @staticmethod
  def text(text, region):
    return vector(*text.encode(), region)

  def ground(self, handle, z_text):
    scores = z_text[..., 0] + handle[:, None]
    return np.clip(np.abs(z_text[..., :4]), 0, 1), scores

  def fns(self, **changes):
    fns = EncoderFns(encode_image=self.encode_image, image_embedding=self.image_embedding,
                     embed_regions=self.embed_regions, encode_text=self.encode_text, ground=self.ground)
    return dataclasses.replace(fns, **changes)


def example(number, regions):
  rng = np.random.default_rng(number)
  low = rng.uniform(0, 0.5, (regions, 2))
  return Example(image_id=f'im{number}', captions=(f'caption {number % 3}', 'a photo')[:1 + number % 2],
                 geometry=resize_with_pad(height=10 + number, width=20, canvas=8),
                 boxes=np.concatenate([low, low + 0.3], 1).astype(np.float32),
                 region_captions=tuple(f'thing {i % 5}' for i in range(regions)),
                 categories=tuple(f'class {i % 2}' for i in range(regions)))


def batch(numbers, regions, *, size):
  images = np.full((size, 8, 8, 3), 255, np.uint8)
  for i, n in enumerate(numbers):
    images[i] = n
  mask = np.arange(size) < len(numbers)
  return Batch(images=images, image_mask=mask, examples=[example(n, r) for n, r in zip(numbers, regions)])


@pytest.fixture(name='batches')
def _batches():
  return [batch([0, 1, 2], [3, 0, 70], size=3), batch([3, 4], [0, 0], size=3), batch([5], [9], size=3)]


@pytest.mark.parametrize('grounds', [True, False])
def test_every_value_lands_where_it_belongs(batches, grounds):
  model = FakeModel()
  got = collect(model.fns() if grounds else model.fns(ground=None), iter(batches))
  examples = [e for b in batches for e in b.examples]
  assert got.image_ids == tuple(e.image_id for e in examples)
  assert got.geometry == tuple(e.geometry for e in examples)
  k = 0
  for n, e in enumerate(examples):
    np.testing.assert_array_equal(got.z_image[n], vector(n))
    for box, caption, category in zip(e.boxes, e.region_captions, e.categories):
      assert (got.region_image[k], got.region_captions[k], got.categories[k]) == (n, caption, category)
      np.testing.assert_array_equal(got.boxes[k], box)
      np.testing.assert_array_equal(got.z_region[k], vector(n, *box))
      z_text = model.text(caption, True)
      np.testing.assert_array_equal(got.z_region_text[k], z_text)
      if grounds:
        np.testing.assert_array_equal(got.pred_boxes[k], np.abs(z_text[:4]))
        assert got.pred_scores[k] == pytest.approx(z_text[0] + n)
      k += 1
  assert k == len(got.boxes) == 82
  assert (got.pred_boxes is None) == (not grounds)
  captions = [(n, c) for n, e in enumerate(examples) for c in e.captions]
  assert list(zip(got.caption_image, got.captions)) == captions
  for z, (_, caption) in zip(got.z_caption, captions):
    np.testing.assert_array_equal(z, model.text(caption, False))


def test_one_pass_each_image_and_each_text_once(batches):
  model = FakeModel()
  progress = []
  collect(model.fns(), iter(batches), progress=progress.append)
  assert sorted(i for i in model.images if i != 255) == [0, 1, 2, 3, 4, 5]
  assert len(model.texts) == len(set(model.texts))
  assert set(model.widths) <= set(REGION_BUCKETS)
  assert model.widths == [64, 8, 16]  # 70 regions in two calls; none for the batch without regions
  assert progress == [3, 5, 6]


def test_points_are_of_the_patch_most_like_each_caption_on_its_own_image(batches):
  model = FakeModel()
  grid = lambda handle: np.stack([[[5 * vector(i, row, column) for column in range(4)] for row in range(4)]
                                  for i in handle])
  got = collect(model.fns(embed_patches=grid, ground=None), batches)
  assert len(model.texts) == len(set(model.texts)) and got.points.shape == (82, 2)
  k = 0
  for n, e in enumerate(e for b in batches for e in b.examples):
    # The canvas is 8 pixels high, a patch 2; the image covers what is not above or below it.
    top, g = e.geometry.top, e.geometry
    rows = [r for r in range(4) if top <= 2 * r + 1 <= top + g.resized_height]
    for caption in e.region_captions:
      row, column = max(((r, c) for r in rows for c in range(4)),
                        key=lambda at: float(vector(n, *at) @ model.text(caption, True)))
      np.testing.assert_allclose(got.points[k], [(column + .5) / 4, (row + .5) / 4], atol=1e-6)
      k += 1
  assert collect(model.fns(), batches).points is None


def test_masked_images_are_left_out_and_counted():
  one = batch([0, 1, 2], [1, 2, 1], size=3)
  one.image_mask[1] = False                     # unreadable, has a record
  two = batch([3], [1], size=3)
  two.examples += [None, None]                  # padding
  three = batch([], [], size=3)
  got = collect(FakeModel().fns(), [one, two, three])
  assert got.image_ids == ('im0', 'im2', 'im3')
  assert got.region_image.tolist() == [0, 1, 2]
  np.testing.assert_array_equal(got.z_image, [vector(0), vector(2), vector(3)])
  np.testing.assert_array_equal(got.z_region[1], vector(2, *one.examples[2].boxes[0]))
  assert got.masked_images == 1


def test_a_model_without_regions_or_data_without_text(batches):
  got = collect(FakeModel().fns(embed_regions=None, ground=None), batches)
  assert got.z_region is None and got.pred_boxes is None and len(got.z_region_text) == 82
  empty = batch([1], [0], size=1)
  empty.examples[0].captions = ()
  got = collect(FakeModel().fns(), [empty])
  assert got.z_caption.shape == got.z_region.shape == got.z_region_text.shape == (0, E)
  assert got.boxes.shape == got.pred_boxes.shape == (0, 4)


def test_what_a_model_makes_of_padding_does_not_matter(batches):
  model = FakeModel()
  def embed(handle, boxes):
    z = model.embed_regions(handle, boxes)
    z[handle == 255] = np.nan
    return z
  assert np.isfinite(collect(model.fns(embed_regions=embed), batches).z_region).all()


def test_bad_functions_and_bad_data_are_named(batches):
  model = FakeModel()
  nan = lambda handle: np.full((len(handle), E), np.nan)
  with pytest.raises(ValueError, match=r"image_embedding, images 'im0' to 'im2'.*NaN"):
    collect(model.fns(image_embedding=nan), batches)
  with pytest.raises(ValueError, match='length 2'):
    collect(model.fns(image_embedding=lambda h: 2 * model.image_embedding(h)), batches)
  with pytest.raises(ValueError, match=r'embed_regions.*expected shape \(3, 64, 16\), got \(3, 63, 16\)'):
    collect(model.fns(embed_regions=lambda h, b: model.embed_regions(h, b)[:, 1:]), batches)
  with pytest.raises(ValueError, match=r'encode_text.*expected shape \(5, 16\)'):
    collect(model.fns(encode_text=lambda t, *, region: np.zeros((1, E))), batches)
  with pytest.raises(ValueError, match='ground.*NaN'):
    collect(model.fns(ground=lambda h, z: (z[..., :4] * np.nan, z[..., 0])), batches)
  with pytest.raises(ValueError, match='no valid image'):
    collect(model.fns(), [])
  batches[0].examples[2].categories = ()
  with pytest.raises(ValueError, match=r"'im2'.*70, 70 and 0"):
    collect(model.fns(), batches)
  with pytest.raises(ValueError, match='image 1 is valid'):
    collect(model.fns(), [dataclasses.replace(batches[1], examples=batches[1].examples[:1])])


def test_predictions_check_their_lengths(make_predictions):
  with pytest.raises(ValueError, match=r'categories: expected 2 entries, got 1'):
    make_predictions(region_image=[0, 0], categories=['a'])
