import json

import numpy as np
import pytest
from PIL import Image

from cloc_jax.data import imagefolder, transforms

COLORS = {'n01_red': (250, 0, 0), 'n02_green': (0, 250, 0), 'n03_blue': (0, 0, 250)}


@pytest.fixture(name='root')
def root_fixture(tmp_path):
  """torchvision's layout: a folder a class, sometimes with folders in it."""
  for folder, color in COLORS.items():
    (tmp_path / folder / 'deeper').mkdir(parents=True)
    for i in range(3):
      Image.new('RGB', (12, 6), color).save(tmp_path / folder / ('deeper' if i == 2 else '.') / f'{i}.PNG', 'PNG')
  (tmp_path / 'n01_red' / 'notes.txt').write_text('x')
  (tmp_path / 'list.csv').write_text('x')
  return tmp_path


def classes_of(root, content=None, **kw):
  path = None
  if content is not None:
    path = root / 'classes.json'
    path.write_text(content if isinstance(content, str) else json.dumps(content))
  return imagefolder.read_classes(root, path, templates=('{}',), **kw)


def test_classes_are_the_folders_or_those_of_the_file(root):
  got = classes_of(root)
  assert got.folders == tuple(COLORS) and got.names == ('n01 red', 'n02 green', 'n03 blue') and got.templates == ('{}',)
  names = {'n03_blue': 'blue', 'n01_red': 'red', 'n02_green': 'green'}
  got = classes_of(root, {'classes': names, 'templates': ['a {}', 'the {}']})
  assert got.folders == tuple(names) and got.names == ('blue', 'red', 'green') and got.templates == ('a {}', 'the {}')
  assert classes_of(root, {'templates': ['a {}']}).names == ('n01 red', 'n02 green', 'n03 blue')


def test_images_of_each_class_come_with_its_label(root):
  found = imagefolder.find(root, classes_of(root))
  assert found.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3 and found.other_files == 1
  batches = list(imagefolder.batches(found, batch_size=4, image_size=8, pad='center'))
  assert [n.tolist() for _, n in batches] == [[True] * 4] * 2 + [[True] + [False] * 3]
  assert all(x.shape == (4, 8, 8, 3) for x, _ in batches)
  images = np.concatenate([x[n] for x, n in batches])
  np.testing.assert_array_equal(images[:, 4, 4], [c for c in COLORS.values() for _ in range(3)])
  assert imagefolder.find(root, classes_of(root), limit=3).labels.tolist() == [0, 1, 2], 'spread over the classes'


def test_images_beside_the_folders_are_counted_and_splits_are_no_classes(root, tmp_path):
  Image.new('RGB', (4, 4)).save(root / 'stray.jpg')
  assert imagefolder.find(root, classes_of(root)).other_files == 2
  for name in ('train', 'val'):
    (tmp_path / 'vtab' / name / 'cat').mkdir(parents=True)
  with pytest.raises(ValueError, match=r"holds \['train', 'val'\], which are splits and no classes"):
    classes_of(tmp_path / 'vtab')
  assert classes_of(tmp_path / 'vtab', {'classes': {'train': 'a train', 'val': 'x'}}).names == ('a train', 'x')


def test_what_is_wrong_is_named(root, tmp_path):
  with pytest.raises(FileNotFoundError, match='no such folder'):
    imagefolder.read_classes(root / 'absent', None, templates=('{}',))
  with pytest.raises(ValueError, match="class 'n01_rad' has no folder in .*; the nearest is 'n01_red'"):
    classes_of(root, {'classes': {'n01_rad': 'red'}})
  with pytest.raises(ValueError, match=r"2 folders are no class of .*'n02_green'"):
    classes_of(root, {'classes': {'n01_red': 'red'}})
  with pytest.raises(ValueError, match=r"expected an object .*\['names'\]"):
    classes_of(root, {'names': []})
  with pytest.raises(ValueError, match='classes.json: expected JSON'):
    classes_of(root, '{')
  classes = classes_of(root)
  (root / 'n02_green' / '0.PNG').write_bytes(b'no image')
  with pytest.raises(transforms.ImageError, match='n02_green/0.PNG: not an image'):
    list(imagefolder.batches(imagefolder.find(root, classes), batch_size=4, image_size=8, pad='center'))
  valid = np.concatenate([v for _, v in imagefolder.batches(
      imagefolder.find(root, classes), batch_size=3, image_size=8, pad='center', on_error='mask')])
  assert np.flatnonzero(~valid).tolist() == [3]
  (tmp_path / 'none' / 'a').mkdir(parents=True)
  with pytest.raises(ValueError, match='no image in the folders of 1 classes'):
    imagefolder.find(tmp_path / 'none', imagefolder.read_classes(tmp_path / 'none', None, templates=('{}',)))
