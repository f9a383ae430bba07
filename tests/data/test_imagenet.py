import dataclasses
import hashlib

import pytest

from cloc_jax.data import imagenet

# Of the lists as three publishers have them, joined by line breaks. Names and templates: OpenAI's notebook, open_clip's
# zero_shot_metadata.py, CLIP_benchmark's en_classnames.json. WordNet ids: eval.py of imagenet-r and of
# natural-adv-examples, timm's imagenet_synsets.txt and those of -a and -r, CLIP_benchmark's builder.py.
SHA256 = {
    'names': '571ae1c583b4be7da87519494c52bf405a46af05d5815627c7a0dee997068b60',
    'templates': '4f976686fb651bb5803d4689dcd849f75efe0ef19a3c801355bc9a6f03c8a5af',
    'imagenet': '385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd',
    'imagenet-a': 'f6aa4b23244554d9b864fd715ae20048f6a9686388911b2dfbf1ada01bf0f520',
    'imagenet-r': 'e19a59d84e3746fafd34d2ccf6ae604a44e9a0500a596f343c878a89e30ce624',
}
digest = lambda lines: hashlib.sha256('\n'.join(lines).encode()).hexdigest()


def test_the_lists_are_the_published_ones():
  full = imagenet.read_task('imagenet')
  assert (len(full.classes.folders), len(full.classes.names), len(full.classes.templates)) == (1000, 1000, 80)
  assert len(set(full.classes.folders)) == 1000 and len(set(full.classes.templates)) == 80
  assert all(t.count('{}') == 1 for t in full.classes.templates)
  assert digest(full.classes.names) == SHA256['names'] and digest(full.classes.templates) == SHA256['templates']
  for name in ('imagenet', 'imagenet-a', 'imagenet-r'):
    assert digest(imagenet.read_task(name).classes.folders) == SHA256[name]
  twice = {n for n in full.classes.names if full.classes.names.count(n) > 1}
  assert twice == {'missile', 'sunglasses'}


def test_names_keep_their_classes_in_every_task():
  full = imagenet.read_task('imagenet')
  name_of = dict(zip(full.classes.folders, full.classes.names))
  assert [name_of[w] for w in ('n01440764', 'n02012849', 'n03126707', 'n15075141')] == [
      'tench', 'crane bird', 'construction crane', 'toilet paper']
  for task in ('imagenet-a', 'imagenet-r'):
    classes = imagenet.read_task(task).classes
    assert len(classes.folders) == 200 and [name_of[f] for f in classes.folders] == list(classes.names)
  assert imagenet.read_task('imagenet-sketch').classes == full.classes
  v2 = imagenet.read_task('imagenet-v2')
  assert v2.classes.folders[134] == '134' and v2.classes.names[134] == 'crane bird' and v2.protocol == 'imagenet-v2@1'
  with pytest.raises(ValueError, match="expected one of .*'imagenet-sketch'.*got 'imagenet-o'"):
    imagenet.read_task('imagenet-o')


def fill(root, folders, *, images=1):
  """Folders with files that are named as images; none is opened here."""
  for folder in folders:
    (root / folder).mkdir(parents=True, exist_ok=True)
    for i in range(images):
      (root / folder / f'{i}.jpeg').touch()
  return root


def test_folders_are_numbers_or_wordnet_ids_and_may_lie_one_deeper(tmp_path):
  v2 = imagenet.read_task('imagenet-v2')
  root = fill(tmp_path / 'v2', v2.classes.folders, images=10)
  found = imagenet.find(root, v2)
  assert len(found.paths) == 10_000 and found.labels[::10].tolist() == list(range(1000))
  assert all(int(p.parent.name) == label for p, label in zip(found.paths, found.labels)), 'not in the order of text'
  assert found.expected == 10_000 and imagenet.find(root, v2, limit=5).labels.tolist() == [0, 200, 400, 600, 800]
  a = imagenet.read_task('imagenet-a')
  fill(tmp_path / 'tar' / 'imagenet-a', a.classes.folders)
  assert len(imagenet.find(tmp_path / 'tar', a, allow_missing=True).paths) == 200
  with pytest.raises(ValueError, match='has 7,500 images, found 200; --allow-missing'):
    imagenet.find(tmp_path / 'tar', a)
  fill(tmp_path / 'tar' / 'other', a.classes.folders[:2])
  with pytest.raises(ValueError, match='2 folders in it hold classes; give one: .*imagenet-a, .*other'):
    imagenet.find(tmp_path / 'tar', a, allow_missing=True)


def test_other_folders_are_refused(tmp_path):
  r, full = imagenet.read_task('imagenet-r'), imagenet.read_task('imagenet')
  root = fill(tmp_path / 'r', r.classes.folders)
  with pytest.raises(ValueError, match='800 class folders are missing, such as n01440764.*of --task imagenet-r'):
    imagenet.find(root, full)
  assert len(imagenet.find(root, full, allow_missing=True).paths) == 200
  fill(root, ['n99999999'])
  with pytest.raises(ValueError, match='1 are none of its classes, such as n99999999$'):
    imagenet.find(root, r, allow_missing=True)
  with pytest.raises(ValueError, match=r'expected the 1000 class folders of ImageNet-v2.* \(0, 1, 2, …\), found none'):
    imagenet.find(root, imagenet.read_task('imagenet-v2'))
  with pytest.raises(FileNotFoundError, match='absent: no such folder'):
    imagenet.find(tmp_path / 'absent', full)


def test_more_images_than_published_are_no_validation_set(tmp_path):
  task = imagenet.read_task('imagenet-r')
  root = fill(tmp_path / 'r', task.classes.folders, images=2)

  with pytest.raises(ValueError, match='has 399 images, found 400; is this the training set'):
    imagenet.find(root, dataclasses.replace(task, images=399), allow_missing=True)


@pytest.fixture(name='flat')
def flat_fixture(tmp_path):
  root = tmp_path / 'val'
  root.mkdir()
  for i in (1, 2, 3):
    (root / f'ILSVRC2012_val_0000000{i}.JPEG').touch()
  return root


# The layouts: Kaggle's LOC_val_solution.csv; Caffe's ilsvrc12 val.txt; TensorFlow's synset labels.
@pytest.mark.parametrize('text', [
    'ImageId,PredictionString\nILSVRC2012_val_00000003,n01440764 1 2 3 4 n01440764 5 6 7 8 \n'
    'ILSVRC2012_val_00000001,n01751748 85 1 499 272\nILSVRC2012_val_00000002,n09193705 1 2 3 4 \n',
    'ILSVRC2012_val_00000001.JPEG 65\nval/ILSVRC2012_val_00000002.JPEG 970\nILSVRC2012_val_00000003.JPEG 0\n',
    'ILSVRC2012_val_00000001.JPEG n01751748\nILSVRC2012_val_00000002.JPEG n09193705\n'
    'ILSVRC2012_val_00000003.JPEG n01440764\n',
    'n01751748\nn09193705\nn01440764\n'])
def test_the_flat_layout_with_its_labels(flat, tmp_path, text):
  (tmp_path / 'labels').write_text(text)
  task = imagenet.read_task('imagenet')
  found = imagenet.find(flat, task, labels=tmp_path / 'labels', allow_missing=True)
  assert found.labels.tolist() == [65, 970, 0] and [p.name[-6] for p in found.paths] == ['1', '2', '3']
  with pytest.raises(ValueError, match='flat; give its labels with --labels .* or move each image'):
    imagenet.find(flat, task)


@pytest.mark.parametrize('text, message', [
    ('490\n361\n171\n', "development kit's own class ids"),
    ('n01751748\n', '1 lines for 3 images'),
    ('ILSVRC2012_val_00000001.JPEG 65\n', 'no label for 2 images of .*val, such as ILSVRC2012_val_00000002.JPEG'),
    ('ILSVRC2012_val_00000001.JPEG 1000\n', "entry 1: .*from 0 to 999, got '1000'"),
    ('a.JPEG n00000001\n', "entry 1: expected a WordNet id of ImageNet .* got 'n00000001'")])
def test_labels_that_do_not_fit_are_refused(flat, tmp_path, text, message):
  (tmp_path / 'labels').write_text(text)
  with pytest.raises(ValueError, match=message):
    imagenet.find(flat, imagenet.read_task('imagenet'), labels=tmp_path / 'labels', allow_missing=True)
  with pytest.raises(ValueError, match='imagenet-r comes in class folders'):
    imagenet.find(flat, imagenet.read_task('imagenet-r'), labels=tmp_path / 'labels')
