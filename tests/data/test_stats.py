"""Statistics against plain loops over the records, and figures by hand."""
import collections
import dataclasses
import json

import html_tree
import numpy as np
from painted_pictures import painted_example
import pytest

from cloc_jax.data import schema
from cloc_jax.data import stats


def test_figures_equal_a_plain_loop(painted):
  found = stats.collect(painted)
  for split, records in (('train', [painted_example(i) for i in range(37)]),
                         ('val', [painted_example(100 + i) for i in range(5)])):
    s = found.splits[split]
    regions = [r for e in records for r in e.regions]
    assert (s.images, s.regions, s.captions) == (len(records), len(regions), 2 * len(records))
    assert s.image_bytes == sum(len(e.image) for e in records) and not s.corrupt_records
    assert s.categories == collections.Counter(r.category for r in regions) and s.sources == {'': len(regions)}
    h = s.histograms
    assert h['regions_per_image'] == collections.Counter(len(e.regions) for e in records)
    assert h['caption_words'] == {2: 2 * len(records)} and h['region_caption_words'] == {1: len(regions)}
    assert h['image_height'] == collections.Counter(e.height for e in records)
    assert h['image_width'] == collections.Counter(e.width for e in records)
    sides = [100 * np.sqrt((r.box[2] - r.box[0]) * (r.box[3] - r.box[1])) for r in regions]
    assert sum(h['box_side_percent'].values()) == len(sides)
    assert stats.summary(h['box_side_percent'])['mean'] == pytest.approx(np.mean(sides), abs=0.3)
  assert 'train: 37 images' in found.text() and 'CORRUPT' not in found.text()


def test_summaries_by_hand():
  assert stats.summary({}) == {}
  assert stats.summary({3: 1}) == {'mean': 3.0, 'p5': 3, 'p50': 3, 'p95': 3, 'max': 3}
  assert stats.summary({0: 5, 1: 45, 2: 45, 10: 5}) == {'mean': 1.85, 'p5': 0, 'p50': 1, 'p95': 2, 'max': 10}


def test_json_and_page(write, tmp_path):
  odd = dataclasses.replace(painted_example(0), captions=('one two three', ''), regions=(
      schema.Region(box=(0.6, 0.1, 0.2, 0.5), caption='', category='<b>'),))
  bare = dataclasses.replace(painted_example(1), regions=(), captions=())
  found = stats.collect(write([odd, bare]))
  written = json.loads(found.to_json())['splits']['train']
  assert written['histograms']['caption_words'] == {'0': 1, '3': 1} and written['categories'] == {'<b>': 1}
  assert written['summaries']['regions_per_image']['max'] == 1
  assert written['histograms']['box_side_percent'] == {'0': 1}  # inverted: no area
  stats.write_page(found, out=tmp_path / 'pages' / 'stats.html')
  page = (tmp_path / 'pages' / 'stats.html').read_text()
  html_tree.parse(page)
  assert '&lt;b&gt;' in page and '<b>' not in page and 'median 0' in page


@pytest.mark.parametrize('values', [{5: 3}, {0: 1, 1: 2}, {1: 4, 100_000: 1}, {i: i + 1 for i in range(300)}])
def test_any_histogram_can_be_drawn(values):
  html_tree.parse(stats.chart('t', values))


@pytest.mark.slow
def test_workers_find_the_same(write):
  path = write([painted_example(i) for i in range(300)])
  assert stats.collect(path) == stats.collect(path, workers=2)


def test_refusals(painted):
  with pytest.raises(ValueError, match="no split 'vale'"):
    stats.collect(painted, splits=['vale'])
