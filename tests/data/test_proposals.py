import json

import numpy as np
import pytest

from cloc_jax.data import proposals


def write(path, rows):
  path.write_text(json.dumps(rows))
  return path


def row(image, box, **more):
  return {'image_id': image, 'bbox': box} | more


def test_coco_results_and_arrays_say_the_same(tmp_path):
  rows = [row(139, [10, 20, 30, 40], score=0.5, category_id=7), row(42, [0, 0, 5.5, 6], score=0.25, category_id=1),
          row(139, [1, 2, 3, 4], score=1, category_id=2), row(139, [1, 2, 0, 4], score=0.1)]
  want = {'139': [[10, 20, 40, 60], [1, 2, 4, 6]], '42': [[0, 0, 5.5, 6]]}
  np.savez(tmp_path / 'p.npz', image_id=[r['image_id'] for r in rows], bbox=[r['bbox'] for r in rows],
           score=[r['score'] for r in rows])
  for path in (write(tmp_path / 'p.json', rows), tmp_path / 'p.npz'):
    got = proposals.read(path)
    assert {k: v.tolist() for k, v in got.boxes.items()} == want and got.dropped == 1
    assert got.of('139')[1].tolist() == [0.5, 1] and len(got.of('7')[0]) == 0
  bare = proposals.read(write(tmp_path / 'bare.json', [row('a/b', [0, 0, 1, 1])]))
  assert bare.of('a/b')[1].tolist() == [1]


@pytest.mark.parametrize('rows, message', [
    ([row(1, [0, 0, 1, 1], score=1), row(1, [0, 0, 1, 1])], "entry 1: expected a 'score' in every entry or in none"),
    ([row(1, [0, 0, 1, 1]), row(1, [0, 0, 1, 1], score=1)], "entry 1: expected a 'score' in every entry or in none"),
    ([row(1, [0, 0, 1])], "entry 0: expected 'bbox' as four numbers"),
    ([{'bbox': [0, 0, 1, 1]}], "entry 0: no key 'image_id'"),
    ([row(1, [0, 0, 1, 1], score=-1)], r'entry 0 \(image 1\): expected finite numbers and a score'),
    ([row(1, [0, 0, 1, 1], score='high')], 'score: expected numbers'),
    ([], 'holds no proposals')])
def test_bad_entries_are_named(tmp_path, rows, message):
  with pytest.raises(ValueError, match=message):
    proposals.read(write(tmp_path / 'p.json', rows))


def test_bad_files_are_named(tmp_path):
  with pytest.raises(FileNotFoundError, match='absent.json: no such file'):
    proposals.read(tmp_path / 'absent.json')
  (tmp_path / 'p.npz').write_bytes(b'PK no archive')
  with pytest.raises(ValueError, match='p.npz: not an NPZ file'):
    proposals.read(tmp_path / 'p.npz')
  np.savez(tmp_path / 'q.npz', boxes=np.zeros((1, 4)))
  with pytest.raises(ValueError, match=r"q.npz: lacks \['bbox', 'image_id'\]; it holds \['boxes'\]"):
    proposals.read(tmp_path / 'q.npz')


def test_corners_in_place_of_widths_and_other_images_are_noticed(tmp_path):
  rng = np.random.default_rng(0)
  low = rng.uniform(0, 200, (200, 2))
  corners = np.concatenate([low, low + rng.uniform(60, 200, (200, 2))], 1)
  sizes = {'1': (400, 400)}
  xywh = np.concatenate([low, corners[:, 2:] - low], 1)
  right = proposals.read(write(tmp_path / 'a.json', [row(1, box) for box in xywh.tolist()]))
  right.check(sizes, where='a.json')
  wrong = proposals.read(write(tmp_path / 'b.json', [row(1, c) for c in corners.tolist()]))
  with pytest.raises(ValueError, match='b.json: .*xyxy pixels'):
    wrong.check(sizes, where='b.json')
  with pytest.raises(ValueError, match=r"no proposal for any of the 1 images; the file speaks of images such as "
                                       r"\['1'\], the data set of \['x'\]"):
    right.check({'x': (400, 400)}, where='a.json')
