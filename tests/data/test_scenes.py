"""Scenes: reproducible, tightly boxed, visible as claimed, worded truly, split as promised."""
import collections
import dataclasses
import math
import re

from cloc_jax import boxes as box_lib
from cloc_jax.data import scenes
from cloc_jax.data import schema
from cloc_jax.data import sources
from cloc_jax.data import sprites as sprites_lib
import cv2
import numpy as np
from PIL import Image
import pytest

BARE = scenes.SceneSpec(backgrounds=('flat',), clutter=0, noise=0, brightness=0)


def draw(index, *, seed=0, **kwargs):
  return scenes.draw_scene(np.random.default_rng([seed, index]), **kwargs)


@pytest.fixture(scope='module')
def many():
  return [draw(i) for i in range(500)]


def test_a_scene_depends_on_its_generator_alone(many):
  again = draw(7)
  assert (again.image == many[7].image).all()
  assert again.objects == many[7].objects and again.captions == many[7].captions
  assert not (draw(7, seed=1).image == again.image).all()
  assert len({scene.image.tobytes() for scene in many}) == len(many)


@pytest.mark.parametrize('size', [48, 64, 160])
def test_shape_and_range(size):
  scene = draw(3, size=size)
  assert scene.image.shape == (size, size, 3) and scene.image.dtype == np.uint8
  assert scene.image.std() > 5


@pytest.mark.parametrize('overhang', [0.0, 0.15])
def test_boxes_are_tight_around_the_pixels_drawn(overhang):
  spec = dataclasses.replace(BARE, min_objects=1, max_objects=1, overhang=overhang)
  clipped = 0
  for i in range(150):
    scene = draw(i, spec=spec)
    flat = scene.image.reshape(-1, 3).astype(int)
    background = collections.Counter(map(tuple, flat)).most_common(1)[0][0]
    drawn = np.abs(scene.image.astype(int) - background).max(-1) > 0
    ys, xs = np.nonzero(drawn)
    found = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    box = np.array(scene.objects[0].box) * 64
    assert np.abs(box - found).max() <= 1.0, (scene.objects[0], found)
    clipped += (box <= 0).any() or (box >= 64).any()
  assert (clipped > 10) == (overhang > 0)


def test_visible_share_is_what_the_pixels_show(tmp_path):
  # Discs of six pure colours on grey: the picture itself tells whose pixel is whose, and a disc fills π/4 of its box.
  colors = {'r': (255, 0, 0), 'g': (0, 255, 0), 'b': (0, 0, 255), 'c': (0, 255, 255), 'm': (255, 0, 255),
            'y': (255, 255, 0)}
  for name, color in colors.items():
    disc = np.zeros((120, 120, 4), np.uint8)
    cv2.circle(disc, (60, 60), 55, (*color, 255), -1, cv2.LINE_AA)
    disc[..., :3] = color
    Image.fromarray(disc).save(tmp_path / f'{name}.png')
  spec = dataclasses.replace(BARE, sprites=f'folder:{tmp_path}', split='all', overhang=0.0, count_weights=None,
                             min_objects=5, max_objects=6, max_iou=0.5)
  hidden = 0
  for i in range(60):
    scene = draw(i, spec=spec, size=96)
    signs = (scene.image.astype(int) > 128).astype(int)
    strength = scene.image.max(-1).astype(int) - scene.image.min(-1)
    for obj in scene.objects:
      mine = (signs == (np.array(colors[obj.name]) > 0)).all(-1) & (strength > 128)
      x0, y0, x1, y1 = np.array(obj.box) * 96
      shown = mine.sum() / (math.pi / 4 * (x1 - x0) * (y1 - y0))
      assert shown == pytest.approx(obj.visible, abs=0.12)
      assert obj.visible >= 0.6
      hidden += obj.visible < 0.9
  assert hidden > 20  # there is occlusion to measure


def test_objects_that_stick_out_stay_visible():
  spec = scenes.SceneSpec(overhang=0.7)
  shares = [o.visible for i in range(60) for o in draw(i, spec=spec).objects]
  assert 0.6 <= min(shares) < 0.65


def test_overlap_is_bounded():
  spec = scenes.SceneSpec(overhang=0.0, max_iou=0.1)
  worst = 0
  for i in range(100):
    boxes = np.array([o.box for o in draw(i, spec=spec).objects])
    iou = box_lib.pairwise_iou(boxes, boxes)
    worst = max(worst, iou[~np.eye(len(boxes), dtype=bool)].max())
  assert 0.01 < worst <= 0.1 + 1e-6


def test_richness(many):
  objects = [o for scene in many for o in scene.objects]
  assert {len(scene.objects) for scene in many} == set(range(2, 9))
  assert {o.name for o in objects} == set(sprites_lib.KINDS) and len(sprites_lib.KINDS) >= 16
  assert {o.color for o in objects} == set(sprites_lib.COLORS) and len(sprites_lib.COLORS) >= 8
  assert {o.texture for o in objects} == set(sprites_lib.TEXTURES)
  sides = collections.defaultdict(list)
  for o in objects:
    if o.visible == 1 and 0 < min(o.box) and max(o.box) < 1:
      sides[o.size].append(64 * max(o.box[2] - o.box[0], o.box[3] - o.box[1]))
  assert min(sides['small']) >= 11 and max(sides['large']) <= 31
  assert max(sides['small']) < min(sides['medium']) and max(sides['medium']) < min(sides['large'])
  assert min(o.visible for o in objects) >= 0.6 and any(o.visible < 0.8 for o in objects)


def test_a_category_names_one_object_unless_asked_otherwise(many):
  assert all(len({o.category for o in s.objects}) == len(s.objects) for s in many)
  spec = scenes.SceneSpec(repeat_category=True, split='unseen', min_objects=6, count_weights=None)
  repeated = [draw(i, spec=spec) for i in range(40)]
  assert any(len({o.category for o in s.objects}) < len(s.objects) for s in repeated)


def test_region_captions_vary_and_name_their_object(many):
  objects = [o for scene in many for o in scene.objects]
  plain = np.mean([o.caption == o.category for o in objects])
  assert 0.31 < plain < 0.39
  for o in objects:
    assert o.category == f'{o.color} {o.name}'
    assert o.name in o.caption and o.color in o.caption and o.caption == o.caption.lower().strip()
    said = set(o.caption.split())
    if said & {'small', 'little', 'tiny'}:
      assert o.size == 'small'
    if said & {'large', 'big', 'huge'}:
      assert o.size == 'large'
    if said & set(sprites_lib.TEXTURES):
      assert o.texture in said
  forms = {o.caption.replace(o.color, 'C').replace(o.name, 'K') for o in objects}
  assert len(forms) >= 30 and {'C K', 'a C K', 'K in C', 'a K that is C', 'the C K'} <= forms
  assert 'an orange' in ' '.join(o.caption for o in objects)
  assert not re.search(r'\ba ([aeio]|hour)', ' '.join(o.caption for o in objects))


def test_relations_in_image_captions_are_true(many):
  centre = lambda o: ((o.box[0] + o.box[2]) / 2, (o.box[1] + o.box[3]) / 2)
  truths = {'left of': (0, -1), 'right of': (0, 1), 'above': (1, -1), 'over': (1, -1), 'below': (1, 1), 'under': (1, 1)}
  seen = collections.Counter()
  for scene in many:
    assert len(scene.captions) == 3
    places = {o.category: centre(o) for o in scene.objects}
    name = f'({"|".join(places)})'
    for caption in scene.captions:
      assert sum(category in caption for category in places) >= 2
      for a, relation, b in re.findall(rf'{name} (?:to the )?({"|".join(truths)}) an? (?:\S+ )?{name}', caption):
        axis, sign = truths[relation]
        assert sign * (places[a][axis] - places[b][axis]) > 0.1, (caption, places)
        seen[relation] += 1
  assert set(seen) == set(truths)


def test_places_in_image_captions_are_true(many):
  for scene in many:
    places = {o.category: o.box for o in scene.objects}
    name = f'({"|".join(places)})'
    for caption in scene.captions:
      for a, place in re.findall(rf'{name} (at the (?:top|bottom)(?: left| right)?|on the left|on the right)', caption):
        x0, y0, x1, y1 = places[a]
        x, y = (x0 + x1) / 2, (y0 + y1) / 2
        assert ('left' in place) == (x < 1 / 3) and ('right' in place) == (x >= 2 / 3), caption
        assert ('top' in place) == (y < 1 / 3) and ('bottom' in place) == (y >= 2 / 3), caption


def test_seen_and_unseen_scenes_share_no_category(many):
  unseen = [draw(i, spec=scenes.SceneSpec(split='unseen')) for i in range(200)]
  trained = {o.category for s in many for o in s.objects}
  held_out = {o.category for s in unseen for o in s.objects}
  assert not trained & held_out
  assert held_out == set(sprites_lib.load_sprites('shapes').unseen_categories)


def test_written_data_set_is_what_was_drawn(tmp_path):
  seen = []
  counts = scenes.write_scenes(tmp_path / 'a', num_train=5, num_val=3, num_unseen=2, seed=4, encoding='png',
                               progress=lambda split, n: seen.append((split, n)))
  assert counts == {'train': 5, 'val': 3, 'unseen': 2} and ('val', 3) in seen
  meta = schema.read_meta(tmp_path / 'a')
  assert len(meta.categories) == 200 and len(meta.unseen_categories) == 30 and meta.extra['seed'] == 4
  source = sources.RecordSource(tmp_path / 'a', split='val')
  scene = scenes.draw_scene(np.random.default_rng([4, 1, 2]))
  record = source[2]
  decoded = cv2.cvtColor(cv2.imdecode(np.frombuffer(record.image, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
  assert (decoded == scene.image).all()
  assert record.captions == scene.captions and (record.height, record.width) == (64, 64)
  assert [(r.caption, r.category) for r in record.regions] == [(o.caption, o.category) for o in scene.objects]
  np.testing.assert_allclose([r.box for r in record.regions], [o.box for o in scene.objects], atol=1e-6)
  for split, held_out in (('train', False), ('val', False), ('unseen', True)):
    records = sources.RecordSource(tmp_path / 'a', split=split)
    regions = [r for i in range(len(records)) for r in records[i].regions]
    assert all((r.category in meta.unseen_categories) == held_out for r in regions)


def test_bytes_do_not_depend_on_the_number_of_processes(tmp_path):
  for workers in (1, 2):
    scenes.write_scenes(tmp_path / str(workers), num_train=300, num_val=0, num_unseen=20, size=32, num_workers=workers)
  files = [{p.name: p.read_bytes() for p in (tmp_path / w).iterdir()} for w in '12']
  assert files[0] == files[1] and len(files[0]) >= 4
  source = sources.RecordSource(tmp_path / '2', split='train')
  assert len({source[i].image for i in range(300)}) == 300
  last = scenes.draw_scene(np.random.default_rng([0, 0, 299]), size=32)
  assert source[299].captions == last.captions and source[299].image == scenes.encode_image(last.image)


def test_jpeg_is_close_to_the_pixels():
  scene = draw(1)
  decoded = cv2.imdecode(np.frombuffer(scenes.encode_image(scene.image), np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
  assert np.abs(decoded.astype(int) - scene.image).mean() < 4


def test_contact_sheet_shows_every_scene():
  sheet = scenes.contact_sheet([draw(i) for i in range(5)], columns=2, scale=2)
  assert sheet.mode == 'RGB' and sheet.width == 2 * (128 + 8) and sheet.height > 3 * 128
  with pytest.raises(ValueError, match='no scenes'):
    scenes.contact_sheet([])


@pytest.mark.parametrize('spec, message', [
    (dict(min_objects=5, max_objects=3), 'min_objects <= max_objects'),
    (dict(count_weights=(1, 2)), 'expected 7 weights'),
    (dict(split='training'), "'seen', 'unseen' or 'all', got 'training'"),
    (dict(textures=('striped', 'furry')), 'furry'),
    (dict(sprites='shape'), "did you mean 'shapes'"),
    (dict(min_objects=12, max_objects=12, overhang=0.0, max_iou=0.0, sizes=(('small', 0.6, 0.7),), size_weights=(1,)),
     'could not fit 12 objects'),
])
def test_bad_specs_say_what_is_wrong(spec, message):
  with pytest.raises(ValueError, match=message):
    draw(0, spec=scenes.SceneSpec(**spec))


@pytest.mark.parametrize('kwargs, message', [
    (dict(num_train=-1), 'at least 0'), (dict(num_train=0), 'not all of them 0'), (dict(encoding='gif'), "got 'gif'"),
    (dict(size=8), 'size >= 16'), (dict(num_workers=0), 'num_workers >= 1'),
    (dict(sprites='folder:/no/such'), '/no/such'),
])
def test_bad_requests_fail_before_anything_is_written(tmp_path, kwargs, message):
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    scenes.write_scenes(tmp_path / 'x', **(dict(num_train=2, num_val=0, num_unseen=0) | kwargs))
  assert not (tmp_path / 'x').exists()
