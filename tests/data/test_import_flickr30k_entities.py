"""Flickr30k Entities: image 1000092795's sentences and some of its boxes, as published; the image is painted.

github.com/BryanPlummer/flickr30k_entities: README (marks, scene and nobndbox, UNRELATED_CAPTIONS), getAnnotations.m
(tags), flickr30k_entities_utils.py (pixels begin at 1).
"""
import numpy as np
from painted_pictures import encode_png
import pytest

from cloc_jax import cli
from cloc_jax.data import sources
from cloc_jax.data.importers import engine
from cloc_jax.data.importers import flickr30k_entities as entities

SENTENCES = '''\
[/EN#1/people Two young guys] with [/EN#2/bodyparts shaggy hair] look at [/EN#3/bodyparts their hands] while hanging \
out in [/EN#8/scene the yard] .
[/EN#1/people Two young , White males] are outside near [/EN#4/scene many bushes] .
[/EN#1/people Two men] in [/EN#5/clothing green shirts] are standing in [/EN#9/scene a yard] .
[/EN#6/people A man] in [/EN#7/clothing/other a blue shirt] standing in [/EN#9/scene a garden] .
[/EN#1/people Two men] enjoy [/EN#10/other time] [/EN#0/notvisual each other] spent together .
'''


def box(*names, corners):
  tags = ''.join(f'<name>{name}</name>' for name in names)
  sides = ''.join(f'<{side}>{value}</{side}>' for side, value in zip(('xmin', 'ymin', 'xmax', 'ymax'), corners))
  return f'<object>\n\t{tags}\n\t<bndbox>{sides}</bndbox>\n</object>'


def flag(name, *, scene):
  return f'<object><name>{name}</name>\n\t<scene>{scene}</scene>\n\t<nobndbox>{1 - scene}</nobndbox>\n</object>'


OBJECTS = [box(1, corners=(159, 125, 219, 335)), box(4, corners=(1, 220, 211, 473)),
           box(4, corners=(276, 215, 332, 337)), box(1, 6, corners=(197, 110, 261, 373)),
           box(12, corners=(1, 1, 332, 500)), flag(8, scene=1), flag(9, scene=1), flag(10, scene=0)]


@pytest.fixture(name='make')
def make_fixture(tmp_path):
  for name in ('Sentences', 'Annotations', 'images'):
    (tmp_path / name).mkdir()

  def make(sentences=SENTENCES, objects=OBJECTS, *, xml=None, image=True, **settings):
    (tmp_path / 'test.txt').write_text('1000092795\n')
    text = sentences if isinstance(sentences, bytes) else sentences.encode()
    (tmp_path / 'Sentences' / '1000092795.txt').write_bytes(text)
    (tmp_path / 'Annotations' / '1000092795.xml').write_text(xml or (
        '<annotation>\n\t<filename>1000092795.jpg</filename>\n\t<size>\n<width>332</width>\n\t\t<height>500</height>'
        f'\n\t\t<depth>3</depth>\n\t</size>\n{"".join(objects)}</annotation>\n'))
    if image:
      (tmp_path / 'images' / '1000092795.jpg').write_bytes(encode_png(np.zeros((500, 332, 3), np.uint8)))
    return entities.Flickr30kEntities(tmp_path, tmp_path / 'images', wanted=('test',), **settings)
  return make


def records(path):
  source = sources.RecordSource(path, split='test')
  return [source[i] for i in range(len(source))]


def test_phrases_and_boxes(make, tmp_path):
  found = engine.run(make(), out=tmp_path / 'out')['test']
  [got] = records(tmp_path / 'out')
  assert (got.image_id, got.height, got.width, len(got.captions)) == ('1000092795', 500, 332, 5)
  assert got.captions[1] == 'Two young , White males are outside near many bushes .'
  assert got.captions[4] == 'Two men enjoy time each other spent together .'
  pixels = [(r.caption, r.category, *np.round(np.array(r.box) * [332, 500, 332, 500], 3).tolist())
            for r in got.regions]
  first, second = (158, 124, 219, 335), (196, 109, 261, 373)
  assert pixels == [
      ('Two young guys', 'people', *first), ('Two young guys', 'people', *second),
      ('Two young , White males', 'people', *first), ('Two young , White males', 'people', *second),
      ('many bushes', 'scene', 0, 219, 211, 473), ('many bushes', 'scene', 275, 214, 332, 337),
      ('Two men', 'people', *first), ('Two men', 'people', *second), ('A man', 'people', *second)]
  assert found.of('boxes', 'dropped', 'phrase and box again') == 2
  assert found.examples('boxes', 'dropped', 'no phrase') == ['image 1000092795, chain 12']
  reasons = {reason: found.of('phrases', 'dropped', reason)
             for reason in ('a scene', 'no box', 'not visual', 'not annotated')}
  assert reasons == {'a scene': 3, 'no box': 1, 'not visual': 1, 'not annotated': 4}


def test_an_image_without_boxes_is_counted(make, tmp_path):
  found = engine.run(make(objects=[flag(1, scene=0)]), out=tmp_path / 'out')['test']
  assert found.examples('images', 'noted', 'without boxes') == ['image 1000092795']
  assert len(records(tmp_path / 'out')[0].captions) == 5 and records(tmp_path / 'out')[0].regions == ()


def test_unrelated_captions_are_left_out(make, tmp_path):
  (tmp_path / 'UNRELATED_CAPTIONS').write_text('# format: <imageID> <sentence number>\n1000092795 2\n129602216 5\n')
  found = engine.run(make(), out=tmp_path / 'out')['test']
  [got] = records(tmp_path / 'out')
  assert len(got.captions) == 4 and 'many bushes' not in {r.caption for r in got.regions}
  assert found.examples('captions', 'dropped', 'unrelated to its image') == ['image 1000092795, sentence 2']


def test_odd_sentences(make, tmp_path):
  sentences = '[/EN#1/people Two men stand .\n\n[/EN#1/people Café owners] .'.encode('latin-1')
  found = engine.run(make(sentences), out=tmp_path / 'out')['test']
  assert records(tmp_path / 'out')[0].captions == ('Café owners .',)
  assert found.of('captions', 'dropped', 'broken marks') == found.of('captions', 'noted') == 1


@pytest.mark.parametrize('settings, message', [
    (dict(xml='<annotation><size>'), '1000092795.xml is no XML, or cut off'),
    (dict(xml='<annotation/>'), r'1000092795.xml: expected a whole number in size/height, got None'),
    (dict(objects=[box(1, corners=(1, 2, 3, 'x'))]), "1000092795.xml: object 1: expected .* bndbox/ymax, got 'x'")])
def test_bad_annotations_are_named(make, tmp_path, settings, message):
  with pytest.raises(ValueError, match=message):
    engine.run(make(**settings), out=tmp_path / 'out')


def test_missing_files_are_named(make, tmp_path):
  importer = make(image=False)
  with pytest.raises(FileNotFoundError, match='1000092795.jpg: missing'):
    engine.run(importer, out=tmp_path / 'out')
  (tmp_path / 'Annotations' / '1000092795.xml').unlink()
  with pytest.raises(FileNotFoundError, match='1000092795.xml, of an image that a split lists'):
    engine.run(importer, out=tmp_path / 'other')
  with pytest.raises(FileNotFoundError, match='no such file.*val.txt; did you mean .*test.txt'):
    engine.run(entities.Flickr30kEntities(tmp_path, tmp_path / 'images', wanted=('val',)), out=tmp_path / 'out')


def test_the_verb(make, tmp_path):
  make()
  argv = ['data', 'import', 'flickr30k-entities', '--entities', tmp_path, '--images', tmp_path / 'images', '--split',
          'test', '--out', tmp_path / 'out', '--workers', 1]
  assert cli.main([str(arg) for arg in argv]) == 0
  assert len(records(tmp_path / 'out')[0].regions) == 9
