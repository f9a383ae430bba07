"""Faults that are put into a data set one by one are found, counted and named, and nothing else is."""
import dataclasses
import json

import numpy as np
from painted_pictures import encode_png
from painted_pictures import painted_example
import pytest

from cloc_jax.data import schema
from cloc_jax.data import sources
from cloc_jax.data import validate

SOUND = [painted_example(i) for i in range(5)]


def counts(report):
  return {kind: finding.count for kind, finding in report.findings.items() if finding.count}


def with_region(example, *boxes, caption='it'):
  return dataclasses.replace(example, regions=tuple(schema.Region(box=box, caption=caption) for box in boxes))


def test_a_sound_data_set_is_sound(painted):
  seen = []
  report = validate.validate(painted, progress=lambda done, total: seen.append((done, total)))
  assert report.ok and counts(report) == {} and report.records == 42 and seen == [(37, 42), (42, 42)]
  assert report.splits == {'train': 37, 'val': 5}
  assert report.regions == sum(len(painted_example(i).regions) for i in [*range(37), *range(100, 105)])
  assert report.text().endswith('nothing is broken')
  found = json.loads(report.to_json())
  assert found['ok'] is True and set(found['findings']) == {*validate.BROKEN, *validate.NOTED}


BLACK = encode_png(np.zeros((40, 80, 3), np.uint8))
FAULTS = {
    'undecodable_images': lambda e: dataclasses.replace(e, image=e.image[:-40]),
    'size_mismatch': lambda e: dataclasses.replace(e, image=BLACK, height=80, width=40),
    'resized_images': lambda e: dataclasses.replace(e, image=BLACK, height=401, width=799),
    'inverted_boxes': lambda e: with_region(e, (0.6, 0.1, 0.2, 0.5)),
    'empty_boxes': lambda e: with_region(e, (1.1, 0.1, 1.3, 0.5)),
    'boxes_outside': lambda e: with_region(e, (0.5, 0.5, 1.2, 0.9)),
    'foreign_boxes': lambda e: with_region(e, (3, 4, 30, 40)),
    'empty_captions': lambda e: dataclasses.replace(e, captions=(*e.captions, ' ')),
    'images_without_caption': lambda e: dataclasses.replace(e, captions=()),
    'empty_region_captions': lambda e: with_region(e, (0, 0, 1, 1), caption=' '),
    'images_without_regions': lambda e: dataclasses.replace(e, regions=()),
}


@pytest.mark.parametrize('kind', FAULTS)
def test_each_fault_is_found_alone(write, monkeypatch, kind):
  monkeypatch.setattr(schema, 'check_example', lambda example: None)  # as if written by somebody else
  bad = FAULTS[kind](painted_example(77))
  report = validate.validate(write([*SOUND, bad]))
  assert counts(report) == {kind: 1}
  example, = report.findings[kind].examples
  assert 'picture-77' in example
  assert report.ok == (kind in validate.NOTED)
  assert example in report.text()


def test_duplicates_within_and_across_splits(tmp_path):
  rename = lambda example, name: dataclasses.replace(example, image_id=name)
  train = [*SOUND, rename(SOUND[1], 'copy'), rename(painted_example(50), 'picture-3'), rename(SOUND[1], 'copy 2')]
  val = [painted_example(60), rename(SOUND[4], 'leak'), rename(SOUND[4], 'leak again'), painted_example(61)]
  other = [rename(painted_example(60), 'from val'), painted_example(0)]
  path = tmp_path / 'set'
  schema.write_dataset(path, meta=schema.DatasetMeta(name='toy'), splits={'train': train, 'val': val, 'other': other})
  report = validate.validate(path)
  assert counts(report) == {'duplicate_ids': 1, 'duplicate_images': 3, 'duplicate_images_across_splits': 3}
  named = {kind: finding.examples for kind, finding in report.findings.items()}
  assert named['duplicate_ids'] == ["train, record 6 ('picture-3') is also train, record 3 ('picture-3')"]
  assert set(named['duplicate_images']) == {
      "train, record 5 ('copy') is also train, record 1 ('picture-1')",
      "train, record 7 ('copy 2') is also train, record 1 ('picture-1')",
      "val, record 2 ('leak again') is also val, record 1 ('leak')"}
  assert set(named['duplicate_images_across_splits']) == {
      "val, record 1 ('leak') is also train, record 4 ('picture-4')",
      "other, record 0 ('from val') is also val, record 0 ('picture-60')",
      "other, record 1 ('picture-0') is also train, record 0 ('picture-0')"}
  assert not report.ok
  assert counts(validate.validate(path, splits=['other'])) == {}


def test_examples_are_limited_and_counts_are_not(write):
  path = write([with_region(painted_example(i), (0.6, 0.1, 0.2, 0.5), (0, 0, 1, 1)) for i in range(300)])
  report = validate.validate(path)
  assert counts(report) == {'inverted_boxes': 300} and report.regions == 600
  finding = report.findings['inverted_boxes']
  assert len(finding.examples) == 10 and finding.examples[0].startswith("train, record 0 ('picture-0'), region 0: [0.6")
  assert '… and 290 more' in report.text()


def test_damaged_and_missing_files(tmp_path):
  path = tmp_path / 'set'
  schema.write_dataset(path, meta=schema.DatasetMeta(name='toy'), num_shards=2, splits={
      'train': [painted_example(i) for i in range(6)], 'val': [painted_example(10 + i) for i in range(4)]})
  cut, gone = sorted(path.glob('toy-train*'))[1], sorted(path.glob('toy-val*'))[0]
  cut.write_bytes(cut.read_bytes()[:-300])
  gone.unlink()
  report = validate.validate(path)
  assert counts(report) == {'missing_files': 1, 'corrupt_records': 3} and not report.ok
  assert gone.name in report.findings['missing_files'].examples[0]
  assert "split 'train', record 3: " in report.findings['corrupt_records'].examples[0]


@pytest.mark.slow
def test_workers_find_the_same(write):
  records = [painted_example(i) for i in range(400)]
  records[150] = FAULTS['inverted_boxes'](records[150])
  records[310] = dataclasses.replace(records[20], image_id='copy')
  path = write(records)
  alone, shared = (validate.validate(path, workers=workers) for workers in (0, 2))
  assert alone.findings == shared.findings and counts(alone) == {'inverted_boxes': 1, 'duplicate_images': 1}


def test_refusals(painted, tmp_path):
  with pytest.raises(ValueError, match="no split 'vale'"):
    validate.validate(painted, splits=['train', 'vale'])
  with pytest.raises(FileNotFoundError):
    validate.validate(tmp_path / 'nowhere')
  assert isinstance(sources.RecordError('x'), ValueError)
