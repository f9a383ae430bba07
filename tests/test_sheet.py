"""The grid of labelled pictures: boxes at their places, labels inside their tile and apart."""
import itertools

import numpy as np
from PIL import Image, ImageColor
import pytest

from cloc_jax import page, sheet

GREY = np.full((64, 64, 3), 127, np.uint8)


def mask(image, color):
  return (np.asarray(image)[..., :3] == ImageColor.getrgb(color)).all(-1)


def test_boxes_lie_at_their_places():
  box = np.array([0.5, 0.25, 0.875, 0.75])
  image = sheet.draw([sheet.Tile(image=GREY, boxes=[box], labels=['x'])])
  assert image.size == (320, 320)
  rows, columns = np.nonzero(mask(image, page.color(0)))
  inside = (rows > 85) & (rows < 235)  # away from the label
  assert abs(columns[inside].min() - 160) <= 2 and abs(columns[inside].max() - 280) <= 2
  sides = columns[inside]
  assert not ((sides > 165) & (sides < 275)).any()


def test_labels_stay_inside_and_apart(monkeypatch):
  rng = np.random.default_rng(0)
  corner = rng.random((6, 2)) * 0.6
  boxes = np.concatenate([corner, corner + 0.15 + 0.2 * rng.random((6, 2))], 1)
  texts = [f'phrase {"very " * i}long' for i in range(6)]
  places = []
  monkeypatch.setattr(sheet, '_label', lambda pen, lines, place, *, background: places.append(place))
  sheet.draw([sheet.Tile(image=GREY, boxes=boxes, labels=texts)])
  assert len(places) == 6
  for place in places:
    assert place.min() >= 0 and place.max() <= 320
  for a, b in itertools.combinations(places, 2):
    assert min(a[2], b[2]) <= max(a[0], b[0]) + 1e-6 or min(a[3], b[3]) <= max(a[1], b[1]) + 1e-6


def test_the_grid():
  tiles = [sheet.Tile(image=np.full((64, 64, 3), 40 * i, np.uint8), boxes=[], labels=[]) for i in range(5)]
  image = sheet.draw(tiles, columns=3)
  assert image.mode == 'RGBA' and image.size == (3 * 320 + 24, 2 * 320 + 12)
  pixels = np.asarray(image)
  for i in range(5):
    assert (pixels[332 * (i // 3) + 160, 332 * (i % 3) + 160] == [40 * i] * 3 + [255]).all()
  assert pixels[400, 900, 3] == 0 and pixels[100, 326, 3] == 0  # an empty place, and a gap
  assert sheet.draw(tiles, background='#ff0000').getpixel((326, 100)) == (255, 0, 0)


def test_odd_boxes_are_drawn():
  image = np.zeros((224, 224, 3), np.uint8)
  boxes = [[0.6, 0.2, 0.4, 0.5], [-1, -1, 2, 2], [0.5, 0.5, 0.5, 0.5]]
  drawn = sheet.draw([sheet.Tile(image=image, boxes=boxes, labels=['a', 'b' * 90, ''])])
  assert drawn.size == (320, 320)
  assert all(mask(drawn, page.color(i)).any() for i in range(3))


@pytest.mark.parametrize('side, shown', [(48, 336), (64, 320), (96, 288), (160, 320), (224, 320), (320, 320), (336, 336)])
def test_images_are_enlarged_but_never_shrunk(side, shown):
  tile = sheet.Tile(image=np.zeros((side, side, 3), np.uint8), boxes=[], labels=[])
  assert sheet.draw([tile]).size == (shown, shown)


def test_what_cannot_be_drawn():
  with pytest.raises(ValueError, match='at least one'):
    sheet.draw([])
  with pytest.raises(ValueError, match='of one size'):
    sheet.draw([sheet.Tile(image=GREY[:n, :n], boxes=[], labels=[]) for n in (32, 64)])
  with pytest.raises(ValueError, match='1 for 2'):
    sheet.draw([sheet.Tile(image=GREY, boxes=[[0, 0, 1, 1]] * 2, labels=['a'])])


def test_pillow_reads_what_was_written(tmp_path):
  sheet.draw([sheet.Tile(image=GREY, boxes=[[0, 0, 1, 1]], labels=['naïve café'])]).save(tmp_path / 'a.png')
  with Image.open(tmp_path / 'a.png') as image:
    assert image.size == (320, 320)
