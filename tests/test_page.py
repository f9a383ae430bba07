"""Parts of pages: nothing escapes its quotes, boxes lie where they should, pictures survive the way into the page."""
import base64
import io

import html_tree
import numpy as np
from PIL import Image
import pytest

from cloc_jax import page

NASTY = '</title><script>alert("a & b")</script>\'"'


def test_texts_are_escaped_and_the_document_is_whole():
  text = page.document(title=NASTY, body='<main>' + page.facts({NASTY: NASTY}) + '</main>', style='h2 { margin: 0; }')
  html_tree.assert_stands_alone(text)
  root = html_tree.parse(text)
  assert root.all('title')[0].text == NASTY
  assert root.all('dt')[0].text == NASTY and root.all('dd')[0].text == NASTY
  style = root.all('style')[0].text
  assert style.startswith(page.STYLE) and style.endswith('h2 { margin: 0; }')
  assert 'prefers-color-scheme: dark' in style


def test_texts_keep_their_own_direction():
  """Without isolation the figure behind a Hebrew class would be drawn before it."""
  for text in ('כלב <b> לבן', 'a dog'):
    bdi, = html_tree.parse(page.words(text)).all()
    assert (bdi.tag, bdi.text) == ('bdi', text)
    p, = html_tree.parse(page.paragraph(text, cls='soft')).all()
    assert (p.tag, p.attributes, p.text) == ('p', {'dir': 'auto', 'class': 'soft'}, text)


def test_facts_write_thousands():
  root = html_tree.parse(page.facts({'a': 1234567, 'b': np.int64(1000), 'c': 0.5, 'd': 'x', 'e': True}))
  assert [d.text for d in root.all('dd')] == ['1,234,567', '1,000', '0.5', 'x', 'True']


@pytest.mark.parametrize('side, kind, slack', [(33, 'png', 0), (page.SMALL, 'png', 0), (page.SMALL + 1, 'jpeg', 12)])
def test_pictures_hold_their_pixels(side, kind, slack):
  ramp = np.linspace(0, 255, side).astype(np.uint8)
  red = np.tile(ramp, (side, 1))
  image = np.stack([red, red.T, np.full_like(red, 90)], -1)
  root = html_tree.parse(page.picture(image, '<rect/>', label=NASTY))
  svg, = root.all('svg')
  assert svg.attributes['aria-label'] == NASTY and svg.attributes['viewbox'] == f'0 0 {side} {side}'
  assert ('small' in svg.attributes['class'].split()) == (kind == 'png')
  assert [child.tag for child in svg.children] == ['image', 'rect']
  head, data = svg.children[0].attributes['href'].split(',')
  assert head == f'data:image/{kind};base64'
  shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert('RGB'))
  assert shown.shape == image.shape and np.abs(shown.astype(int) - image).max() <= slack


def test_boxes_lie_where_they_should():
  root = html_tree.parse(page.box((0.25, 0.5, 0.75, 0.625), index=9, side=80))
  for rect in root.all('rect'):
    assert [float(rect.attributes[k]) for k in ('x', 'y', 'width', 'height')] == [20, 40, 40, 10]
  under, over = root.all('rect')
  assert under.attributes['class'] == 'under' and over.attributes['class'] == 'over'
  assert over.attributes['stroke'] == page.color(9) == page.COLORS[1]
  assert root.all('text')[0].text == '10'
  assert root.all('g')[0].attributes['transform'] == 'translate(20.00 36.00) scale(4.000)'  # stands on the box


def test_the_number_stays_in_the_picture():
  top = html_tree.parse(page.box((0.99, 0.01, 1, 0.5), index=0, side=100)).all('g')[0].attributes['transform']
  assert top == 'translate(95.00 1.00) scale(5.000)'


def test_dashed_boxes_without_a_number_and_boxes_turned_inside_out():
  root = html_tree.parse(page.box((0.5, 0.2, 0.4, 0.3), index=0, side=100, dashed=True, number=False))
  assert not root.all('text') and len(root.all('rect', cls='dashed')) == 2
  assert root.all('rect')[0].attributes['width'] == '0.00'
