"""The reading of image files against the decoder of training, and the small parts of the table of images."""
import io

import numpy as np
import PIL.Image
import pytest

from cloc_jax.data import transforms
from cloc_jax.data.importers import counts as counts_lib
from cloc_jax.data.importers import images


def encoded(image, kind, **settings):
  file = io.BytesIO()
  image.save(file, kind, **settings)
  return file.getvalue()


def turned(orientation, kind='JPEG'):
  exif = PIL.Image.Exif()
  exif[0x0112] = orientation
  return encoded(PIL.Image.new('RGB', (30, 20)), kind, exif=exif)


def turned_behind(orientation):
  """A PNG whose EXIF data comes after its pixels."""
  data = turned(orientation, 'PNG')
  begin = data.index(b'eXIf') - 4
  end = begin + 12 + int.from_bytes(data[begin:begin + 4], 'big')
  last = data.index(b'IEND') - 4
  return data[:begin] + data[end:last] + data[begin:end] + data[last:]


@pytest.mark.parametrize('data', [
    *(encoded(PIL.Image.new(mode, (30, 20)), kind) for mode, kind in (
        ('RGB', 'JPEG'), ('L', 'JPEG'), ('CMYK', 'JPEG'), ('RGBA', 'PNG'), ('P', 'PNG'), ('LA', 'PNG'), ('I;16', 'PNG'),
        ('RGB', 'WEBP'), ('RGB', 'BMP'), ('P', 'GIF'))),
    encoded(PIL.Image.new('P', (30, 20)), 'GIF', save_all=True, append_images=[PIL.Image.new('P', (30, 20), 3)] * 2),
    *(turned(orientation) for orientation in range(9)),
    *(make(orientation) for orientation in (1, 3, 6, 8) for make in (lambda i: turned(i, 'PNG'), turned_behind))])
def test_the_size_is_that_of_the_decoded_upright_image(data):
  report = counts_lib.Counts()
  assert images.check_image(data, report, name='a') == transforms.decode(data, where='a').shape[:2]
  assert not report.rows()


def test_a_picture_of_a_hundred_megapixels():
  data = encoded(PIL.Image.new('1', (10_000, 11_000)), 'PNG')
  assert images.check_image(data, counts_lib.Counts(), name='a') == (11_000, 10_000)


@pytest.mark.parametrize('data, annotated, reason, detail', [
    (b'', None, 'unreadable', 'a (0 bytes)'), (b'<html>', None, 'unreadable', 'a (no image)'),
    (encoded(PIL.Image.new('RGB', (30, 20)), 'PNG')[:20], None, 'unreadable', 'a (Truncated File Read)'),
    (encoded(PIL.Image.new('RGB', (30, 20)), 'PNG'), (30, 20), 'of another size',
     'a (annotated as 30×20, but is 20×30)')])
def test_no_image(data, annotated, reason, detail):
  report = counts_lib.Counts()
  assert images.check_image(data, report, name='a', annotated=annotated) is None
  assert report.examples('images', 'dropped', reason) == [detail] and len(report.lost) == 1


def test_a_file_that_is_not_there_or_a_folder(tmp_path):
  report = counts_lib.Counts()
  assert images.load_image(tmp_path / 'a.jpg', report, annotated=None) is None
  assert images.load_image(tmp_path, report, annotated=None) is None
  assert [(lost.reason, lost.path) for lost in report.lost] == [
      ('missing', str(tmp_path / 'a.jpg')), ('unreadable', str(tmp_path))]


def test_every_box_is_counted_once_and_cut():
  report = counts_lib.Counts()
  given = np.array([[.1, .1, .2, .2], [.5, .5, 1.4, .9], [.3, .3, .2, .5], [.3, .3, .3, .5], [1.2, 0, 1.4, 1],
                    [0, 0, 1, 1]])
  boxes, keep = images.sound_boxes(given, report, label='box {}'.format, skip=['', '', '', '', '', 'crowd'])
  assert keep.tolist() == [True, True, False, False, False, False]
  np.testing.assert_allclose(boxes[:2], [[.1, .1, .2, .2], [.5, .5, 1, .9]], rtol=1e-6)
  assert {row[1:]: report.examples(*row) for row in report.rows() if row[1] != 'kept'} == {
      ('repaired', 'cut at the border'): ['box 1'], ('dropped', 'crowd'): ['box 5'],
      ('dropped', 'empty'): ['box 3', 'box 4'], ('dropped', 'inverted'): ['box 2']}
  assert report.of('boxes') == 6


def test_texts():
  texts = images.Texts(['', 'ß', 'dog', 'כלב'])
  assert [texts[i] for i in range(len(texts))] == ['', 'ß', 'dog', 'כלב']
  assert [texts.take([3, 0])[i] for i in range(2)] == ['כלב', '']


def test_tables_against_dictionaries():
  """Random images, boxes and captions in random order: every task holds what a dictionary says."""
  rng = np.random.default_rng(0)
  table = images.Table()
  keys = [f'k{i}' for i in rng.permutation(23)]
  calls = [('image', key) for key in keys] + [('box', f'k{rng.integers(30)}') for _ in range(90)]
  boxes, order = {}, []
  for i in rng.permutation(len(calls)):
    kind, key = calls[i]
    if kind == 'image':
      table.add_image(key, name=f'{key}.jpg', height=100, width=200, where='x')
      order.append(key)
    else:
      box = rng.integers(1, 40, 4).tolist()
      table.add_box(key, box=box, category=int(rng.choice([3, 9])))
      table.add_caption(key, f'{box}')
      boxes.setdefault(key, []).append(box)
  tasks = table.tasks(folder='/', category_names={9: 'nine', 3: 'three'}, promised='xywh pixels', where='x',
                      images_per_shard=5, source='test')
  assert [task.images for task in tasks] == [5, 5, 5, 5, 3]
  found = {}
  for task in tasks:
    piece = task.payload
    for i in range(len(piece.ids)):
      mine = piece.boxes[piece.box_image == i]
      found[piece.ids[i]] = [[x, y, right - x, bottom - y] for x, y, right, bottom in mine.tolist()]
      assert [piece.captions[c] for c in np.flatnonzero(piece.caption_image == i)] == [
          f'{[int(v) for v in box]}' for box in found[piece.ids[i]]]
  assert list(found) == order and found == {key: boxes.get(key, []) for key in order}
  strays = sum(len(b) for key, b in boxes.items() if key not in order)
  assert table.counts.of('boxes', 'dropped', 'of an image not listed') == strays > 0
