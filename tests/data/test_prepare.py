"""Preparing a record: which of its regions are usable, against a loop over them; and that no others are made."""
import numpy as np
from painted_pictures import painted_example
import pytest

from cloc_jax.data import prepare
from cloc_jax.data import schema

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


def test_only_drawn_regions_are_made(monkeypatch):
  """Of a record that was read; objects for all would cost more than the rest of its reading."""
  record = schema.encode(painted_example(0, regions=6))
  made = []
  original = schema.Region

  def counted(**fields):
    made.append(fields['caption'])
    return original(**fields)

  monkeypatch.setattr(schema, 'Region', counted)
  transform = prepare.Prepare(image_size=16, regions_per_image=2)
  prepared = transform.random_map(schema.decode(record, where='here'), np.random.default_rng(0))
  assert made == [r.caption for r in prepared.regions] and len(made) == 2 and prepared.counts['regions_seen'] == 6
