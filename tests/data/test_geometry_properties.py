"""Boxes against pixels, from files of many kinds to the batches of training and evaluation.

A bright rectangle is painted into an image, the image is stored, decoded and put on its canvas, and the rectangle is
looked for there. It must be where the transformed box is, to half an output pixel, and must not be shifted on average.
"""
import io
import time

import marked_pictures as pictures
import numpy as np
from painted_pictures import WordTokenizer
import PIL.Image
import pytest

from cloc_jax import geometry as geometry_lib
from cloc_jax.data import eval_pipeline
from cloc_jax.data import pipeline
from cloc_jax.data import schema
from cloc_jax.data import transforms

HALF = 0.5 + 1e-3  # float32 boxes
MODES = transforms.DECODE_MODES


def random_size(rng, *, least=8, most=600):
  """(height, width): all magnitudes and proportions alike."""
  return tuple(int(v) for v in np.exp(rng.uniform(np.log(least), np.log(most), 2)))


def random_geometry(rng, height, width, *, canvas=None):
  made = geometry_lib.resize_with_pad(height=height, width=width, canvas=canvas or int(rng.integers(24, 240)),
                                      pad=geometry_lib.PAD_MODES[rng.integers(2)])
  return made.flip() if rng.random() < 0.5 else made


def random_box(rng, made):
  """Whole-number corners; at least four canvas pixels and two image pixels a side where there are as many."""
  least = np.minimum(np.maximum(2, np.ceil(4 / made.scale_xy)), [made.width, made.height]).astype(int)
  x0, y0 = (int(rng.integers(0, n - m + 1)) for n, m in zip((made.width, made.height), least))
  return x0, y0, int(rng.integers(x0 + least[0], made.width + 1)), int(rng.integers(y0 + least[1], made.height + 1))


def check_marker(canvas, made, box):
  """Asserts that the rectangle is where it should be, forth and back; returns the errors of sides inside the canvas."""
  want = made.boxes_to_canvas(np.array(box)) * made.canvas
  found = pictures.find(canvas, want)
  np.testing.assert_allclose(found, want, atol=HALF, err_msg=f'{made}, {box}')
  back = made.boxes_from_canvas(found / made.canvas)
  np.testing.assert_array_less(np.abs(back - box), HALF / np.tile(made.scale_xy, 2), err_msg=f'{made}, {box}')
  return (found - want)[(found > 0) & (found < made.canvas)]


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('kind', pictures.KINDS)
def test_a_marker_is_found_in_its_box(kind, mode):
  errors = []
  for seed in range(12):
    rng = np.random.default_rng(seed)
    height, width = random_size(rng)
    made = random_geometry(rng, height, width)
    box = random_box(rng, made)
    opened = transforms.open_image(pictures.encode(pictures.marked(height, width, box), kind), where='', mode=mode)
    assert (opened.height, opened.width) == (height, width)
    errors.append(check_marker(opened.on_canvas(made), made, box))
  assert abs(np.concatenate(errors).mean()) < 0.1  # half a pixel off on one side would be a habit, not an accident


def random_crop(rng, height, width, *, least=12):
  """xyxy; at least 12 pixels a side where there are as many: JPEG's own error must not be magnified fifty times."""
  sides = []
  for n in (width, height):
    side = int(rng.integers(min(n, least), n + 1))
    begin = int(rng.integers(n - side + 1))
    sides.append((begin, begin + side))
  (x0, x1), (y0, y1) = sides
  return x0, y0, x1, y1


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('kind', ['png', 'jpeg', 'jpeg420', 'progressive', 'cmyk jpeg',
                                  *(f'jpeg turned {i}' for i in range(2, 9))])
def test_a_marker_is_found_in_a_crop(kind, mode):
  errors = []
  for seed in range(30):
    rng = np.random.default_rng([1, seed])
    height, width = random_size(rng)
    crop = random_crop(rng, height, width)
    made = geometry_lib.resize_with_pad(height=height, width=width, canvas=int(rng.integers(24, 240)), crop=crop,
                                        pad=geometry_lib.PAD_MODES[rng.integers(2)])
    made = made.flip() if rng.random() < 0.5 else made
    # A box that lies in the crop at least in part: some of its corners are beyond the border.
    inside = random_box(rng, geometry_lib.resize_with_pad(height=crop[3] - crop[1], width=crop[2] - crop[0],
                                                          canvas=made.canvas))
    box = np.array(inside) + [crop[0], crop[1]] * 2
    beyond = rng.integers(0, 40, 4) * (box == crop)
    whole = np.clip(box + beyond * [-1, -1, 1, 1], 0, [width, height] * 2)
    opened = transforms.open_image(pictures.encode(pictures.marked(height, width, whole), kind), where='', mode=mode)
    canvas = opened.on_canvas(made)
    errors.append(check_marker(canvas, made, box))
    fractions = whole[None] / np.array([width, height] * 2)
    cut, kept = made.crop_boxes(fractions, min_visible=0)
    assert kept.tolist() == [0]
    np.testing.assert_allclose(cut[0] * [width, height, width, height], box, atol=1e-9)
    np.testing.assert_allclose(geometry_lib.normalized_boxes_to_canvas(made, cut), made.boxes_to_canvas(box[None]),
                               atol=1e-6)
  assert abs(np.concatenate(errors).mean()) < 0.1


@pytest.mark.parametrize('size', [(1, 1), (2, 90), (90, 1), (480, 640), (333, 77)])
@pytest.mark.parametrize('aspect', [(3 / 4, 4 / 3), (1, 1), None, (5, 9)])
def test_crops_have_the_size_that_is_asked_for(size, aspect):
  height, width = size
  crop = transforms.Crop(scale=(0.2, 0.6), aspect=aspect)
  rng = np.random.default_rng(0)
  for _ in range(200):
    x0, y0, x1, y1 = crop.draw(rng, height=height, width=width)
    w, h = x1 - x0, y1 - y0
    assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
    if min(w, h) > 4:
      least, most = (w - 0.5) * (h - 0.5), (w + 0.5) * (h + 0.5)
      assert most >= 0.2 * width * height and least <= 0.6 * width * height
      low, high = (width / height,) * 2 if aspect is None else aspect
      share = w * h / (width * height)
      low, high = (np.clip(v, width / height * share * 0.8, width / height / share / 0.8) for v in (low, high))
      assert (w + 0.5) / (h - 0.5) >= low * 0.8 and (w - 0.5) / (h + 0.5) <= high / 0.8


@pytest.mark.parametrize('mode', MODES)
def test_markers_through_the_training_pipeline_with_crops(write, mode):
  records = list(marked_records(42))
  path = write(records)
  crop = transforms.Crop(scale=(0.3, 0.9), min_visible=0.4)
  seen = dropped = cut = 0
  for item in pipeline.train_dataset(path, split='train', tokenizer=WordTokenizer(), batch_size=6, image_size=72,
                                     flip=True, epochs=6, decode=mode, regions_per_image=2, crop=crop):
    batch, stats = item['batch'], item['stats']
    assert batch.image_mask.all() and stats['cropped'] == 6
    assert batch.region_mask.sum() + stats['regions_cropped_out'] == 6 == stats['regions_seen']
    dropped += int(stats['regions_cropped_out'])
    for image, boxes, mask in zip(batch.image, batch.boxes, batch.region_mask):
      want = boxes[0] * 72
      if not mask.any() or min(want[2] - want[0], want[3] - want[1]) < 3:
        continue
      assert boxes.min() >= -1e-6 and boxes.max() <= 1 + 1e-6
      np.testing.assert_allclose(pictures.find(image, want), want, atol=HALF)
      seen += 1
      cut += np.any((want < 0.01) | (want > 71.99))
  assert seen > 100 and dropped > 20 and cut > 10


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('size', [(1, 2000), (2000, 1), (3, 1500), (1, 1), (3, 2), (2, 3), (1, 9), (17, 1)])
@pytest.mark.parametrize('kind', ['png', 'jpeg', 'jpeg turned 7', 'cmyk jpeg'])
def test_extreme_proportions_and_tiny_images(size, mode, kind):
  height, width = size
  box = (0, 0, width, height)
  data = pictures.encode(pictures.marked(height, width, box), kind)
  for pad in geometry_lib.PAD_MODES:
    opened = transforms.open_image(data, where='', mode=mode)
    made = geometry_lib.resize_with_pad(height=opened.height, width=opened.width, canvas=64, pad=pad).flip()
    # The short side has at least a pixel on the canvas, and its box is that pixel.
    assert min(made.resized_height, made.resized_width) >= 1
    check_marker(opened.on_canvas(made), made, box)
    np.testing.assert_allclose(made.boxes_from_canvas(made.boxes_to_canvas(np.array(box))), box, atol=1e-3)


@pytest.mark.parametrize('size', [(10_000, 10_000), (4_000, 25_000)])
def test_a_hundred_megapixels_are_quick(size):
  box = (size[1] // 4, size[0] // 4, size[1] // 2, size[0] // 2)
  grey = np.full(size, 127, np.uint8)
  grey[box[1]:box[3], box[0]:box[2]] = 240
  out = io.BytesIO()
  PIL.Image.fromarray(grey).save(out, 'JPEG', quality=75)
  began = time.process_time()
  opened = transforms.open_image(out.getvalue(), where='', mode='fast')
  made = geometry_lib.resize_with_pad(height=opened.height, width=opened.width, canvas=224)
  canvas = opened.on_canvas(made)
  assert time.process_time() - began < 3  # of processor time, on a slow machine; a second at most elsewhere
  check_marker(canvas, made, box)


def marked_records(count, *, kinds=pictures.KINDS, seed=0):
  """Records with one marked region each, of all kinds and sizes; the recorded size is the image's."""
  for i in range(count):
    rng = np.random.default_rng([seed, i])
    height, width = random_size(rng, least=12, most=300)
    box = random_box(rng, geometry_lib.resize_with_pad(height=height, width=width, canvas=48))
    fractions = tuple(float(v) for v in np.array(box) / [width, height, width, height])
    yield schema.Example(
        image=pictures.encode(pictures.marked(height, width, box), kinds[i % len(kinds)]), image_id=f'marked-{i}',
        height=height, width=width, captions=(f'picture {i}',), regions=(schema.Region(box=fractions, caption='it'),))


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('flip', [False, True])
@pytest.mark.parametrize('pad', geometry_lib.PAD_MODES)
def test_markers_through_the_training_pipeline(write, mode, flip, pad):
  path = write(list(marked_records(42)))
  seen = flipped = 0
  for item in pipeline.train_dataset(path, split='train', tokenizer=WordTokenizer(), batch_size=6, image_size=72,
                                     pad=pad, flip=flip, epochs=2, decode=mode, regions_per_image=2):
    batch = item['batch']
    flipped += int(item['stats']['flipped'])
    assert batch.image_mask.all() and (batch.region_mask.sum(1) == 1).all() and not item['stats']['corrupt_images']
    for image, boxes in zip(batch.image, batch.boxes):
      want = boxes[0] * 72
      np.testing.assert_allclose(pictures.find(image, want), want, atol=HALF)
      seen += 1
  assert seen == 84 and (20 < flipped < 64 if flip else not flipped)


@pytest.mark.parametrize('pad', geometry_lib.PAD_MODES)
def test_markers_through_evaluation(write, pad):
  records = list(marked_records(42, seed=1))
  path = write(records)
  seen = 0
  for batch in eval_pipeline.eval_batches(path, split='train', batch_size=5, image_size=96, pad=pad):
    for canvas, example in zip(batch.images, batch.examples):
      record = records[seen]
      box = np.array(record.regions[0].box) * [record.width, record.height, record.width, record.height]
      assert (example.geometry.height, example.geometry.width) == (record.height, record.width)
      check_marker(canvas, example.geometry, box)
      np.testing.assert_allclose(example.geometry.boxes_from_canvas(example.boxes[0]), box, atol=0.01)
      seen += 1
  assert seen == 42
