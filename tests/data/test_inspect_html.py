"""The gallery: one file that stands alone, with the boxes where the pixels are."""
import base64
import dataclasses
import re
import xml.etree.ElementTree as ElementTree

import cv2
import html_tree
import numpy as np
from painted_pictures import COLORS
from painted_pictures import painted_example
import pytest

from cloc_jax.data import inspect_html
from cloc_jax.data import schema


def gallery(path, out, **options):
  """Writes a gallery and returns (counts, text, its figures as XML)."""
  counts = inspect_html.write_gallery(path, split='train', out=out, **options)
  text = out.read_text(encoding='utf-8')
  figures = [ElementTree.fromstring(f.replace('class=small', 'class="small"'))
             for f in re.findall(r'<figure>.*?</figure>', text, re.DOTALL)]
  return counts, text, figures


def pixels(figure):
  href = figure.find('./svg/image').get('href')
  data = base64.b64decode(href.partition('base64,')[2])
  return cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


@pytest.mark.parametrize('size', [48, 200])  # stored as PNG, and as JPEG
def test_boxes_lie_on_what_they_name(painted, tmp_path, size):
  counts, text, figures = gallery(painted, tmp_path / 'deep' / 'page.html', count=12, image_size=size, flip=True)
  assert len(figures) == counts['examples'] == counts['captions'] == 12 and counts['flipped'] > 0
  assert text.count('mirrored</div>') == counts['flipped']
  boxes = 0
  for figure in figures:
    image = pixels(figure)
    assert image.shape == (size, size, 3)
    names = [''.join(span.itertext()) for span in figure.findall('.//li/span')]
    rects = [r for r in figure.findall('.//rect') if r.get('class') == 'over']
    numbers = [int(t.text) for t in figure.findall('.//text')]
    assert sorted(numbers) == list(range(1, len(names) + 1)) and len(rects) == len(names) > 0
    for rect, number in zip(rects, numbers):
      name = names[number - 1]
      x, y, w, h = (float(rect.get(key)) for key in ('x', 'y', 'width', 'height'))
      inside = image[int(np.ceil(y)):int(y + h), int(np.ceil(x)):int(x + w)].reshape(-1, 3)
      np.testing.assert_allclose(np.median(inside, 0), COLORS[name], atol=30)  # JPEG thins colours out
      boxes += 1
  assert boxes == counts['regions_kept']


def test_the_page_stands_alone_and_says_what_it_shows(painted, tmp_path):
  _, text, figures = gallery(painted, tmp_path / 'page.html', count=100, image_size=32)
  assert len(figures) == 37
  assert not re.findall(r'(?:src|href)="(?!data:)', text) and 'http' not in text and '<script' not in text
  assert '<h1>painted · train</h1>' in text and 'Squares.' in text and 'train 37, val 5' in text
  assert sorted(f.find('.//div[@class="id"]').text.split(' ')[0] for f in figures) == sorted(
      f'picture-{i}' for i in range(37))


def test_odd_records(write, tmp_path):
  full = painted_example(0, regions=1)
  odd = [
      dataclasses.replace(full, captions=('<script>alert("a & b")</script>',), image_id='a<b>'),
      dataclasses.replace(full, captions=(), regions=(
          schema.Region(box=(0, 0, 1, 1), caption='sharp <edge>', category='knife', score=0.25),)),
      dataclasses.replace(full, regions=()),
      dataclasses.replace(full, image=full.image[:-30])]
  counts, text, figures = gallery(write(odd, description='Odd & even.'), tmp_path / 'page.html', image_size=32,
                                  shuffle=False)
  assert '<script' not in text and 'Odd &amp; even.' in text
  words = [' '.join(figure.itertext()) for figure in figures]
  assert '<script>alert("a & b")</script>' in words[0] and 'a<b>' in words[0]
  assert 'No caption.' in words[1] and 'sharp <edge>' in words[1] and '(knife, 0.25)' in words[1]
  assert figures[2].find('.//rect') is None
  assert 'could not be decoded' in words[3]
  assert counts['corrupt_images'] == 1 and counts['empty_captions'] == 1


def test_texts_from_right_to_left(write, tmp_path):
  region = schema.Region(box=(0, 0, 1, 1), caption='כלב לבן', category='כלב', score=0.5)
  example = dataclasses.replace(painted_example(0), captions=('כלב לבן (3 מטר) על ספה.',), regions=(region,))
  _, text, _ = gallery(write([example]), tmp_path / 'page.html', image_size=32)
  assert 'כלב לבן (3 מטר) על ספה.' in text
  html_tree.assert_own_direction(text)


def test_a_wrong_split_fails_before_anything_is_written(painted, tmp_path):
  with pytest.raises(ValueError, match="did you mean 'train'"):
    inspect_html.write_gallery(painted, split='trains', out=tmp_path / 'page.html')
  assert not list(tmp_path.iterdir())
