"""GRIT's archives: the instance below is the one of GRIT's own description, its image painted.

github.com/microsoft/unilm/tree/master/kosmos-2 ("GRIT", format of an instance) and
huggingface.co/datasets/zzliang/GRIT (the img2dataset command); members as in test_import_webdataset.
"""
import json

import cv2
import numpy as np
import pytest
from test_import_webdataset import records
from test_import_webdataset import write_tar

from cloc_jax import cli
from cloc_jax.data.importers import engine
from cloc_jax.data.importers import grit

CAPTION = 'a wire hanger with a paper cover that reads we heart our customers'
PAPER = [0.019644069503434333, 0.31054004033406574, 0.9622142865754519, 0.9603442351023356]
HANGER = [0.019422357885505368, 0.027634161214033764, 0.9593302408854166, 0.969467560450236]
INSTANCE = {
    'clip_similarity_vitb32': 0.353271484375, 'clip_similarity_vitl14': 0.2958984375, 'id': 1795296605919,
    'url': 'https://www.thestrapsaver.com/wp-content/uploads/customerservice-1.jpg', 'caption': CAPTION,
    'noun_chunks': [[19, 32, *PAPER, 0.79298526], [0, 13, *HANGER, 0.67520964]],
    'ref_exps': [[19, 66, *PAPER, 0.79298526], [0, 66, *HANGER, 0.67520964]],
    'key': '000000012', 'status': 'success', 'error_message': None, 'width': 256, 'height': 173,
    'original_width': 1024, 'original_height': 693, 'exif': '{}', 'sha256': '0'}


def tar(path, *, size=(173, 256), **changes):
  image = cv2.imencode('.jpg', np.zeros((*size, 3), np.uint8))[1].tobytes()
  content = {key: value for key, value in (INSTANCE | changes).items() if value is not KeyError}
  return write_tar(path, {'000000012.jpg': image, '000000012.json': json.dumps(content).encode(),
                          '000000012.txt': CAPTION.encode()})


def run(path, out, **settings):
  return engine.run(grit.Grit(grit.TarsSource('train', (path,)), **settings), out=out)['train']


@pytest.mark.parametrize('phrases, expected', [
    ('both', ['a paper cover', 'a wire hanger', CAPTION[19:], CAPTION]), ('noun_chunks', ['a paper cover',
                                                                                       'a wire hanger']),
    ('ref_exps', [CAPTION[19:], CAPTION])])
def test_phrases(tmp_path, phrases, expected):
  found = run(tar(tmp_path / '00000.tar'), tmp_path / 'out', phrases=phrases)
  [got] = records(tmp_path / 'out')
  assert (got.image_id, got.captions, got.height, got.width) == ('00000/000000012', (CAPTION,), 173, 256)
  assert [r.caption for r in got.regions] == expected and found.of('boxes', 'kept') == len(expected)
  np.testing.assert_allclose(got.regions[0].box, PAPER, rtol=1e-6)
  assert got.regions[0].score == pytest.approx(0.79298526)
  assert got.regions[-1].source == ('noun chunk' if phrases == 'noun_chunks' else 'referring expression')


def test_what_is_no_region(tmp_path):
  found = run(tar(tmp_path / '0.tar', noun_chunks=[[0.0, 13.0, *HANGER, 0.6], [60, 67, *PAPER, 0.6]],
                  ref_exps=[[0, 13, *HANGER, 0.6], [-3, 4, *PAPER, 0.5], [5, 5, *PAPER, 0.5]]), tmp_path / 'out')
  assert [r.caption for r in records(tmp_path / 'out')[0].regions] == ['a wire hanger']
  assert found.examples('boxes', 'dropped', 'noun chunk again') == ['image 0/000000012, ref_exps[0]']
  assert found.examples('boxes', 'dropped', 'span outside of the caption') == [
      f'image 0/000000012, {name}' for name in ('noun_chunks[1]', 'ref_exps[1]', 'ref_exps[2]')]


@pytest.mark.parametrize('size, kept', [((173, 256), 4), ((174, 256), 4), ((693, 1024), 4), ((256, 256), 0),
                                        ((256, 173), 0), ((160, 256), 0)])
def test_padded_images_lose_their_boxes(tmp_path, size, kept):
  found = run(tar(tmp_path / '0.tar', size=size), tmp_path / 'out')
  assert found.of('boxes', 'kept') == kept
  assert found.of('boxes', 'dropped', 'image padded, cropped or turned') == 4 - kept


def test_an_archive_of_padded_images_is_named(tmp_path):
  image = cv2.imencode('.jpg', np.zeros((256, 256, 3), np.uint8))[1].tobytes()
  files = {}
  for i in range(20):
    files |= {f'{i:09}.jpg': image, f'{i:09}.json': json.dumps(INSTANCE).encode()}
  path = write_tar(tmp_path / '0.tar', files)
  with pytest.raises(ValueError, match='0.tar: the images of 80 of 80 boxes have lost their proportions'):
    run(path, tmp_path / 'out')
  assert run(path, tmp_path / 'out', trust_boxes=True).of('images', 'kept') == 20


@pytest.mark.parametrize('changes, message', [
    ({'noun_chunks': KeyError}, "000000012.json: no key 'noun_chunks'; found"),
    ({'ref_exps': None}, "'ref_exps' must be a list"),
    ({'ref_exps': [[0, 1, 2]]}, r'ref_exps\[0\]: a box must be four numbers'),
    ({'ref_exps': [['a', 1, 2]]}, r'ref_exps\[0\]: expected \[start, end'),
    ({'ref_exps': [[0, 13, 0.1, None, 0.2, 0.3, 0.5]]}, r'ref_exps\[0\]: a box must be four numbers')])
def test_bad_entries_are_named(tmp_path, changes, message):
  with pytest.raises(ValueError, match=message):
    run(tar(tmp_path / '0.tar', **changes), tmp_path / 'out')


def test_the_verb(tmp_path):
  tar(tmp_path / '00000.tar')
  argv = ['data', 'import', 'grit', '--tars', tmp_path / '*.tar', '--phrases', 'ref_exps', '--out', tmp_path / 'out',
          '--workers', 1]
  assert cli.main([str(arg) for arg in argv]) == 0
  assert len(records(tmp_path / 'out')[0].regions) == 2
