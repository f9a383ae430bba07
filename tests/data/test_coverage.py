"""Coverage of a source's index: every form of index against the ids of a painted data set."""
import json

import numpy as np
from painted_pictures import painted_example
import pytest

from cloc_jax import cli
from cloc_jax.data import coverage
from cloc_jax.data import validate

IDS = [f'picture-{i}' for i in range(37)]  # of the painted data set's train split


def write_index(path, ids):
  rows = [{'image_id': image_id, 'x': 1} for image_id in ids]
  if path.suffix == '.parquet':
    pyarrow = pytest.importorskip('pyarrow')
    from pyarrow import parquet
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path
  path.write_text({
      '.json': json.dumps({'info': {}, 'images': [{'id': image_id, 'file_name': 'x'} for image_id in ids]}),
      '.jsonl': ''.join(json.dumps(row) + '\n' for row in rows),
      '.csv': '\ufeffImageID,LabelName\n' + ''.join(f'{image_id},/m/1\n{image_id},/m/2\n' for image_id in ids),
      '.txt': '\n'.join([*ids, '', ids[0]])}[path.suffix])
  return path


@pytest.mark.parametrize('suffix', ['.json', '.jsonl', '.csv', '.txt', '.parquet'])
def test_what_is_absent_is_named(painted, tmp_path, suffix):
  report = validate.validate(painted, splits=['train'], index={'train': write_index(
      tmp_path / f'index{suffix}', [*IDS[5:], 'gone', 'صورة'])})
  finding = report.findings['absent_images']
  assert (finding.count, finding.examples) == (2, ['gone', 'صورة'])
  assert report.coverage == {'train': '32 of 34 images (94.12 %); 5 images are not in the index'}
  assert report.ok and 'coverage, train: 32 of 34' in report.text()


def test_lists_and_numbers(tmp_path):
  path = tmp_path / 'image_data.json'
  path.write_text(json.dumps([{'image_id': 1, 'url': 'x'}, {'id': 2}, {'image_id': 7}]))
  assert list(coverage.image_ids(path)) == ['1', '2', '7']
  found = coverage.compare(path, present=np.array([coverage.id_hash('2')], np.uint64), examples=1)
  assert (found.listed, found.absent, found.examples, found.unlisted) == (3, 2, ['1'], 0)


def test_karpathys_files_and_others_that_name_splits(tmp_path):
  path = tmp_path / 'dataset_coco.json'
  path.write_text(json.dumps({'dataset': 'coco', 'images': [
      {'filename': f'COCO_{i}.jpg', 'cocoid': i, 'imgid': 7 * i, 'split': split} for i, split in
      enumerate(['train', 'test', 'restval', 'test'])]}))
  assert list(coverage.image_ids(path)) == ['0', '1', '2', '3']
  assert list(coverage.image_ids(path, split='test')) == ['1', '3']
  found = coverage.compare(path, present=np.array([coverage.id_hash('3')], np.uint64), split='test')
  assert (found.listed, found.absent, found.examples, found.unlisted) == (2, 1, ['1'], 0)
  with pytest.raises(ValueError, match=r"no entry is of split 'tset'; they are of \['restval', 'test', 'train'\]"):
    list(coverage.image_ids(path, split='tset'))
  path.write_text(json.dumps({'dataset': 'flickr30k', 'images': [{'filename': '10.a.jpg', 'imgid': 0}]}))
  assert list(coverage.image_ids(path, split='val')) == ['10.a']  # nothing is said of splits: all are


def test_all_splits_together_and_the_verb(painted, tmp_path, capsys):
  path = write_index(tmp_path / 'a.txt', [*IDS, 'picture-100', 'other'])
  argv = ['data', 'validate', painted, '--index', path, '--num-workers', 0, '--json', tmp_path / 'a.json']
  assert cli.main([str(arg) for arg in argv]) == 0
  assert 'coverage, all splits: 38 of 39 images' in capsys.readouterr().out
  assert json.loads((tmp_path / 'a.json').read_text())['findings']['absent_images']['examples'] == ['other']


def test_what_the_import_counted(write):
  counts = {'train': {'images': {'kept': 90, 'dropped': {'missing': {'count': 2, 'examples': []},
                                                         'of another size': {'count': 1, 'examples': []}}}},
            'elsewhere': {'images': {'kept': 1}}}
  report = validate.validate(write([painted_example(0)], extra={'counts': counts}))
  assert report.coverage == {'train': '90 of 93 images of the source; dropped: 2 missing, 1 of another size'}


@pytest.mark.parametrize('name, content, message', [
    ('a.json', '{"images": [{"name": 1}]}', r"a.json: entry 0: expected one of the keys .*got \['name'\]"),
    ('a.json', '[1]', 'entry 0: expected one of the keys .*got a int'), ('a.jsonl', 'x\n', 'line 1 is no JSON'),
    ('a.csv', 'a,b\n1,2\n', r"entry 2: expected one of the keys .*got \['a', 'b'\]")])
def test_what_is_no_index_is_named(tmp_path, name, content, message):
  (tmp_path / name).write_text(content)
  with pytest.raises(ValueError, match=message):
    list(coverage.image_ids(tmp_path / name))


def test_an_index_of_no_split(painted, tmp_path):
  with pytest.raises(ValueError, match=r"index: expected splits among \['train'\], got 'test'"):
    validate.validate(painted, splits=['train'], index={'test': tmp_path})
