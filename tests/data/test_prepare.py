"""Preparing a record: which of its regions are usable, against a loop over them; and that no others are made."""
import dataclasses
import io
import weakref

import numpy as np
from painted_pictures import painted_example
import PIL.Image
import pytest

from cloc_jax.data import jpeg
from cloc_jax.data import prepare
from cloc_jax.data import schema
from cloc_jax.data import transforms

CAPTIONS = ['a dog', '', ' ', '\t\n', '\u00a0', '\u3000 x', 'größe', 'כלב']


def messy_regions(seed, *, count, sound):
  rng = np.random.default_rng(seed)
  corners = rng.uniform(-0.2, 1.2, (count, 4)) if not sound else np.sort(rng.random((count, 2, 2)), 1).reshape(-1, 4)
  corners[rng.random(count) < (0.2 if not sound else 0)] = [0.3, 0.3, 0.3, 0.6]
  return tuple(schema.Region(box=tuple(np.float32(box).tolist()), caption=str(rng.choice(CAPTIONS)), category=str(i))
               for i, box in enumerate(corners))


def one_by_one(regions):
  """[(region, its box cut at the image)], and what was left out."""
  kept, counts = [], {'boxes_dropped': 0, 'boxes_clipped': 0, 'empty_region_captions': 0}
  for region in regions:
    box = [min(max(x, 0.0), 1.0) for x in region.box]
    if region.box[2] < region.box[0] or region.box[3] < region.box[1] or box[0] >= box[2] or box[1] >= box[3]:
      counts['boxes_dropped'] += 1
      continue
    counts['boxes_clipped'] += max(abs(a - b) for a, b in zip(box, region.box)) > 1e-4
    if region.caption.strip():
      kept.append((region, box))
    else:
      counts['empty_region_captions'] += 1
  return kept, counts


@pytest.mark.parametrize('sound', [True, False])
@pytest.mark.parametrize('stored', [True, False])
def test_usable_regions_are_those_of_a_loop(sound, stored):
  left_out = 0
  for seed in range(40):
    regions = messy_regions(seed, count=seed % 9, sound=sound)
    example = schema.Example(image=b'x', image_id='a', height=4, width=4, captions=(), regions=regions)
    if stored:
      example = schema.decode(schema.encode(example), where='here')
    found = prepare.usable_regions(example)
    want, counts = one_by_one(regions)
    assert [r.category for r in found.regions] == [r.category for r, _ in want]
    assert found.regions == tuple(r for r, _ in want)
    np.testing.assert_array_equal(found.boxes, np.array([box for _, box in want], np.float32).reshape(-1, 4))
    assert found.boxes.dtype == np.float32
    assert {name: found.counts.get(name, 0) for name in counts} == counts
    left_out += len(regions) - len(want)
  assert left_out > 20


def prepared(*examples, **options):
  """PreparedBatch of some examples, 2 regions each."""
  transform = prepare.Prepare(**dict(image_size=16, regions_per_image=2) | options)
  return transform(examples, rngs=map(np.random.default_rng, range(len(examples))), captions=['random'] * len(examples))


def test_only_regions_that_are_asked_for_are_made(monkeypatch):
  """Of a record that was read; objects for all would cost more than the rest of its reading."""
  record = schema.encode(painted_example(0, regions=6))
  made = []
  original = schema.Region

  def counted(**fields):
    made.append(fields['caption'])
    return original(**fields)

  monkeypatch.setattr(schema, 'Region', counted)
  batch = prepared(schema.decode(record, where='here'))
  captions = batch.region_captions()
  assert not made and len(captions) == 2 and batch.count('regions_seen') == [6]
  assert made == [r.caption for r in batch.regions(0)] == captions


def test_no_two_whole_images_are_held(monkeypatch):
  """A PNG is decoded to know its size; a batch of large ones would be gigabytes."""
  alive = []

  class Opened(transforms.Opened):
    def __init__(self, *args, **kwargs):
      super().__init__(*args, **kwargs)
      alive.append(weakref.ref(self))

    def on_canvas(self, *args, **kwargs):
      assert sum(ref() is not None for ref in alive) == 1
      return super().on_canvas(*args, **kwargs)

  monkeypatch.setattr(transforms, 'Opened', Opened)
  batch = prepared(*map(painted_example, range(5)))
  assert len(alive) == 5 and all(image.shape == (16, 16, 3) for image in batch.images)


@pytest.mark.parametrize('flip', [False, True])
def test_a_batch_is_its_examples_one_by_one(flip):
  """What is done for all regions of a batch at once is what each example gets alone."""
  crop = transforms.Crop(scale=(0.4, 1.0))
  examples = [dataclasses.replace(painted_example(i), regions=messy_regions(i, count=i % 5, sound=i % 3 > 0))
              for i in range(24)]
  examples[7] = prepare.Damaged('record 7: gone')
  examples[9] = dataclasses.replace(examples[9], image=b'no image')
  transform = prepare.Prepare(image_size=24, regions_per_image=3, flip=flip, crop=crop)
  rngs = lambda: map(np.random.default_rng, range(24))
  whole = transform(examples, rngs=rngs(), captions=['random'] * 24)
  images = np.zeros((24, 24, 24, 3), np.uint8)
  whole.paint(images, on_error='mask')
  for i, (example, rng) in enumerate(zip(examples, rngs())):
    alone = transform([example], rngs=[rng], captions=['random'])
    image = np.zeros((1, 24, 24, 3), np.uint8)
    alone.paint(image, on_error='mask')
    np.testing.assert_array_equal(images[i], image[0])
    for name in ('boxes', 'region_mask', 'counts'):
      np.testing.assert_array_equal(getattr(whole, name)[i], getattr(alone, name)[0], err_msg=name)
    assert (whole.captions[i], whole.image_ids[i]) == (alone.captions[0], alone.image_ids[0])
    assert whole.geometries[i] == alone.geometries[0] and whole.regions(i) == alone.regions(0)
  for i in (7, 9):
    assert whole.images[i] is None and not whole.region_mask[i].any() and whole.counts[i].sum() == 2
  counts = dict(zip(prepare.STATS, whole.counts.sum(0)))
  assert min(counts[name] for name in ('regions_kept', 'cropped', 'regions_cropped_out', 'boxes_dropped')) > 0
  assert (counts['flipped'] > 0) == flip


@pytest.mark.parametrize('mode', transforms.DECODE_MODES)
def test_damage_behind_the_header_masks_one_row(mode, monkeypatch):
  """The size is known before the pixels are: what is wrong with these shows when the batch is painted."""
  file = io.BytesIO()
  PIL.Image.new('RGB', (60, 40), (200, 30, 30)).save(file, 'JPEG')
  example = dataclasses.replace(painted_example(0, regions=6), image=file.getvalue(), height=80, width=60)
  real = jpeg.read_header(example.image)
  monkeypatch.setattr(jpeg, 'read_header', lambda data: dataclasses.replace(real, height=80))  # a header that lies
  sound = painted_example(1, regions=6)
  batch, again = (prepared(sound, example, sound, decode=mode) for _ in range(2))
  assert batch.images[1] is not None and batch.region_mask.all()
  images = np.zeros((3, 16, 16, 3), np.uint8)
  with pytest.raises(transforms.ImageError, match=f"{example.image_id}.*says 80×60.*40×60"):
    batch.paint(images, on_error='raise')
  again.paint(images, on_error='mask')
  assert again.images[1] is None and again.captions[1] == '' and not len(again.regions(1))
  assert again.region_mask.tolist() == [[True] * 2, [False] * 2, [True] * 2]
  assert again.boxes[1].tolist() == [[0, 0, 1, 1]] * 2 and again.region_captions()[2:4] == ['', '']
  assert dict(zip(prepare.STATS, again.counts[1])) == dict.fromkeys(prepare.STATS, 0) | {
      'examples': 1, 'corrupt_images': 1}
  assert (images[1] == prepare.PAD_VALUE).all() and (images[0] != prepare.PAD_VALUE).any()
