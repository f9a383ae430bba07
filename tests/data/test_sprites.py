"""Sprites: tight, distinguishable, pure; the held-out categories; pictures from fonts and folders."""
import collections
import math
import pathlib
import pickle

from cloc_jax.data import scenes
from cloc_jax.data import sprite_pictures
from cloc_jax.data import sprites
import numpy as np
from PIL import Image
import pytest

FONT = pathlib.Path('/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf')
SHAPES = sprites.ShapeSprites()


def by_category(source, category):
  return next(c for c in source.concepts if c.category == category)


def extent(mask):
  ys, xs = np.nonzero(mask)
  return xs.min(), ys.min(), xs.max() + 1, ys.max() + 1


@pytest.mark.parametrize('kind', sprites.KINDS)
def test_boxes_of_shapes_are_exact_and_as_large_as_asked(kind):
  concept = by_category(SHAPES, f'red {kind}')
  for pixels in (12, 21, 30):
    for variant in range(SHAPES.num_variants):
      for texture in SHAPES.textures:
        s = SHAPES.sprite(concept, texture, pixels, variant)
        x0, y0, x1, y1 = s.box
        assert extent(s.keep[..., 0] < 1) == (math.floor(x0), math.floor(y0), math.ceil(x1), math.ceil(y1))
        assert pixels - 1 <= max(x1 - x0, y1 - y0) <= pixels + 0.5
        assert min(x1 - x0, y1 - y0) > 0.3 * pixels
        np.testing.assert_allclose(s.layers.sum(-1), 1 - s.keep[..., 0], atol=0.01)
        assert s.area == s.solid.sum() > 0.15 * pixels**2 * 0.5


def test_kinds_can_be_told_apart_at_twelve_pixels():
  def outline(kind, pixels=12):
    masks = [np.pad(1 - s.keep[..., 0], ((0, 16 - s.keep.shape[0]), (0, 16 - s.keep.shape[1])))
             for s in (SHAPES.sprite(by_category(SHAPES, f'red {kind}'), 'solid', pixels, v) for v in range(4))]
    return masks

  def same(a, b):  # best overlap of two soft masks over small shifts
    return max(np.minimum(np.roll(a, (dy, dx), (0, 1)), b).sum() / np.maximum(np.roll(a, (dy, dx), (0, 1)), b).sum()
               for dy in (-1, 0, 1) for dx in (-1, 0, 1))

  drawn = {kind: outline(kind) for kind in sprites.KINDS}
  for i, a in enumerate(sprites.KINDS):
    for b in sprites.KINDS[:i]:
      assert max(same(x, y) for x in drawn[a] for y in drawn[b]) < 0.93, (a, b)


def test_colours_can_be_told_apart():
  bodies = {name: SHAPES.palette(by_category(SHAPES, f'{name} circle'), (0.5, 0.5, 0.5))[0] for name in sprites.COLORS}
  for a in bodies:
    for b in bodies:
      assert a == b or np.linalg.norm(bodies[a] - bodies[b]) > 80, (a, b)


def test_textures_change_the_picture_but_not_the_outline():
  concept = by_category(SHAPES, 'blue square')
  drawn = {t: SHAPES.sprite(concept, t, 28, 0) for t in SHAPES.textures}
  share = {t: s.layers[..., 1].sum() / s.layers[..., :2].sum() for t, s in drawn.items()}
  assert share['solid'] == 0 and all(0.15 < share[t] < 0.6 for t in ('striped', 'dotted', 'checkered'))


def test_render_is_a_pure_function_and_survives_pickling():
  concept = by_category(SHAPES, 'pink key')
  first = SHAPES.sprite(concept, 'striped', 17, 2)
  for other in (sprites.ShapeSprites(), pickle.loads(pickle.dumps(SHAPES))):
    again = other.sprite(concept, 'striped', 17, 2)
    assert (again.layers == first.layers).all() and again.box == first.box


def test_held_out_pairs():
  unseen = SHAPES.select('unseen')
  assert len(unseen) == 30 and len(SHAPES.concepts) == 200  # 15 %
  assert not {c.category for c in SHAPES.select('seen')} & {c.category for c in unseen}
  assert {c.name for c in SHAPES.select('seen')} == set(sprites.KINDS)
  assert {c.color for c in SHAPES.select('seen')} == set(sprites.COLORS)
  # Spread evenly, so that neither a kind nor a colour is rare in training.
  assert set(collections.Counter(c.color for c in unseen).values()) == {3}
  assert set(collections.Counter(c.name for c in unseen).values()) == {1, 2}
  assert SHAPES.unseen_categories[:2] == ('red circle', 'green circle')  # a changed split would spoil old data sets


def save(path, color, side=(40, 30)):
  picture = np.zeros((side[1] + 10, side[0] + 20, 4), np.uint8)
  picture[5:-5, 10:-10] = (*color, 255)
  Image.fromarray(picture).save(path)


@pytest.fixture
def folder(tmp_path):
  for i, name in enumerate(['Fire_Engine', 'tea-pot', 'cat', 'dog', 'owl', 'tree frog']):
    save(tmp_path / f'{name}.png', (200, 20 * i, 40))
  (tmp_path / 'notes.txt').write_text('not a picture')
  return tmp_path


def test_folder_of_pictures(folder):
  source = sprites.load_sprites(f'folder:{folder}')
  assert set(source.categories) == {'fire engine', 'tea pot', 'cat', 'dog', 'owl', 'tree frog'}
  assert all(c.color == '' and c.name == c.category for c in source.concepts)
  assert 2 <= len(source.unseen) < len(source.concepts)
  assert set(source.select('seen')) | set(source.select('unseen')) == set(source.concepts)
  for variant in range(source.num_variants):
    s = source.sprite(by_category(source, 'fire engine'), '', 24, variant)
    x0, y0, x1, y1 = s.box
    assert 22.5 <= x1 - x0 <= 24.5 and 15 < y1 - y0 < 23  # 40 × 30, turned a little
    np.testing.assert_allclose(extent(s.keep[..., 0] < 0.97), s.box, atol=1)
    inside = s.layers[s.keep[..., 0] == 0]
    np.testing.assert_allclose(inside, np.broadcast_to([200, 0, 40], inside.shape), atol=2)
  assert (source.palette(source.concepts[0], (0.6, 0.6, 0.6)) == np.float32(1) * np.eye(3, dtype=np.float32)).all()


def test_scenes_of_pictures(folder):
  scene = scenes.draw_scene(np.random.default_rng(0), spec=scenes.SceneSpec(sprites=f'folder:{folder}', max_objects=3))
  assert len(scene.objects) >= 2 and all(o.color == '' and o.texture == '' for o in scene.objects)
  assert all(o.category in o.caption and '  ' not in o.caption for o in scene.objects)


def test_a_new_picture_does_not_move_the_others_between_seen_and_unseen():
  names = [f'thing {i}' for i in range(200)]
  before = {names[i] for i in sprite_pictures.held_out(names)}
  more = ['a new one', *names]
  after = {more[i] for i in sprite_pictures.held_out(more)}
  assert after - {'a new one'} == before and 15 < len(before) < 50


@pytest.mark.parametrize('break_it, message', [
    (lambda f: (f / 'bad.png').write_bytes(b'\x89PNG\r\n\x1a\n'), 'bad.png.*does not decode'),
    (lambda f: save(f / 'fire engine.png', (1, 2, 3)), "both are named 'fire engine'"),
    (lambda f: Image.new('RGBA', (9, 9)).save(f / 'void.png'), 'void.png.*transparent'),
    (lambda f: [p.unlink() for p in f.glob('*.png')], 'found none'),
])
def test_bad_folders_name_the_file(folder, break_it, message):
  break_it(folder)
  with pytest.raises(ValueError, match=message):
    sprite_pictures.FolderSprites(str(folder))


@pytest.mark.parametrize('spec, message', [
    ('folders:/x', "did you mean 'folder'"), ('emoji', 'emoji:FONT.ttf'), ('emoji:/no/font.ttf', '/no/font.ttf'),
    ('folder:/no/folder', '/no/folder')])
def test_bad_sources(spec, message):
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    sprites.load_sprites(spec)


def test_a_file_that_is_no_font(tmp_path):
  path = tmp_path / 'letter.ttf'
  path.write_bytes(b'Dear all')
  with pytest.raises(ValueError, match='letter.ttf.*expected a TrueType'):
    sprites.load_sprites(f'emoji:{path}')


needs_font = pytest.mark.skipif(not FONT.exists(), reason='needs Noto Color Emoji (Debian: fonts-noto-color-emoji)')


@needs_font
def test_emoji_font():
  source = sprites.load_sprites(f'emoji:{FONT}')
  assert len(source.concepts) > 1000 and {'grinning face', 'pizza', 'slice of pizza'} & set(source.categories)
  assert 0.1 < len(source.unseen) / len(source.concepts) < 0.2
  s = source.sprite(by_category(source, 'grinning face'), '', 28, 1)
  red, green, blue = s.layers[s.solid].mean(0)
  assert red > 150 and green > 110 and blue < 110  # a yellow face, in RGB order
  np.testing.assert_allclose(extent(s.keep[..., 0] < 0.97), s.box, atol=1)
  scene = scenes.draw_scene(np.random.default_rng(1), spec=scenes.SceneSpec(sprites=f'emoji:{FONT}'))
  assert {o.category for o in scene.objects} <= {c.category for c in source.select('seen')}


@needs_font
def test_characters_of_a_font_agree_with_fonttools():
  ttlib = pytest.importorskip('fontTools.ttLib')
  assert sprite_pictures._mapped_characters(str(FONT)) == sorted(ttlib.TTFont(FONT).getBestCmap())
