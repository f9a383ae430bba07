"""AP by LVIS's rules against two others: a plain loop written from the rules, and LVIS's own package where it is there.

The rules (Gupta et al. 2019, section 5, and lvisdataset.org): the 300 best detections of an image count, of all classes
together; a class is judged on the images that have it or are said to lack it; what is found of a class that is not
boxed exhaustively, and meets no box, is nobody's mistake. `lvis` 0.5.3 on PyPI needs OpenCV with windows and
matplotlib, so that automatic runs have the plain loop alone: `pip install --no-deps lvis` brings the other. Both gave
the same figures on every case here, to 1e-9.
"""
import sys
import types

import numpy as np
import pytest

from cloc_jax import boxes as box_lib
from cloc_jax.evaluators import average_precision
from cloc_jax.evaluators.average_precision import Image, Truth

pytest.importorskip('faster_coco_eval')
NAMES = tuple(f'class {i}' for i in range(9))
FREQUENCIES = 'rrccffffr'  # the last two occur nowhere; the last one is found nowhere either
RANGES = {'': (0, 1e10), '_small': (0, 32**2), '_medium': (32**2, 96**2), '_large': (96**2, 1e10)}
THRESHOLDS = np.linspace(0.5, 0.95, 10)


def whole_boxes(rng, count, *, size=240):
  """Whole pixels, so that areas and overlaps come out equal; some of exactly 32² and 96² pixels."""
  low = rng.integers(0, size // 2, (count, 2))
  side = np.where(rng.random((count, 1)) < 0.2, rng.choice([32, 96], (count, 1)),
                  rng.integers(4, size // 2, (count, 2)))
  return np.concatenate([low, low + side], 1).astype(np.float32)


def random_case(seed):
  """Images in any state: without boxes, without detections, with a crowd of one class, with over 300 detections."""
  rng = np.random.default_rng(seed)
  images, negative, not_exhaustive = [], {}, {}
  for i in range(14):
    count = (0, 40)[i] if i < 2 else rng.integers(1, 8)
    true, label = whole_boxes(rng, count), rng.integers(0, 7, count)
    if i == 1:
      label[:30] = 5
    near = np.repeat(true, 3, 0) + rng.integers(-6, 7, (3 * count, 4))
    found = np.concatenate([near, whole_boxes(rng, 450 if i in (1, 4) else 25)])
    found_label = np.where(rng.random(len(found)) < 0.5, np.resize(np.repeat(label, 3), len(found)) if count else 0,
                           rng.integers(0, 8, len(found)))
    found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
    if i == 3:
      found, found_label = found[:0], found_label[:0]
    absent = [int(c) for c in range(9) if c not in label]
    negative[f'im{i}'] = list(rng.choice(absent, min(2, len(absent)), replace=False))
    not_exhaustive[f'im{i}'] = [int(c) for c in np.unique(label) if rng.random() < 0.3]
    score = rng.random(len(found)).round(1 if i % 2 else 3)  # many ties, and few
    images.append(Image(image_id=f'im{i}', boxes=true, categories=tuple(NAMES[c] for c in label), found=found,
                        found_label=found_label, score=score, size=(300, 300)))
  return images, Truth(frequencies=FREQUENCIES, negative=negative, not_exhaustive=not_exhaustive)


def mean(values):
  values = np.asarray(values)
  return float(values[values > -1].mean()) if (values > -1).any() else None


def plain_figures(images, truth):
  """Box by box, class by class, threshold by threshold."""
  rows = {}
  for image in images:
    order = sorted(range(len(image.score)), key=lambda d: -image.score[d])[:300]
    have = {NAMES.index(c) for c in image.categories}
    for c in have | set(truth.negative[image.image_id]):
      true = [b.astype(float) for b, name in zip(image.boxes, image.categories) if name == NAMES[c]]
      found = [(image.score[d], image.found[d].astype(float)) for d in order if image.found_label[d] == c]
      rows.setdefault(c, []).append((true, found, c in truth.not_exhaustive[image.image_id]))
  area = lambda b: (b[2] - b[0]) * (b[3] - b[1])
  ap, ar = {}, {}
  for suffix, (least, most) in RANGES.items():
    outside = lambda b: not least <= area(b) <= most
    for c in range(len(NAMES)):
      for t in THRESHOLDS:
        judged, total = [], 0
        for true, found, forgiving in rows.get(c, []):
          true = sorted(true, key=outside)  # those that count come first
          total += sum(not outside(b) for b in true)
          free = set(range(len(true)))
          for score, box in found:
            ious = {j: float(box_lib.iou(true[j], box)) for j in sorted(free)}
            fits = {j: iou for j, iou in ious.items() if iou >= t}
            fits = {j: iou for j, iou in fits.items() if not outside(true[j])} or fits
            if fits:
              best = max(fits, key=lambda j: (fits[j], j))
              free.remove(best)
              if not outside(true[best]):
                judged.append((score, True))
            elif not (forgiving or outside(box)):
              judged.append((score, False))
        if not total:
          ap[suffix, c, t] = ar[suffix, c, t] = -1
          continue
        judged.sort(key=lambda j: -j[0])  # stable: of equal scores the earlier image first
        right = np.cumsum([ok for _, ok in judged])
        recall = right / total
        precision = right / np.arange(1, len(judged) + 1)
        ap[suffix, c, t] = np.mean([max(precision[recall >= r], default=0) for r in np.linspace(0, 1, 101)])
        ar[suffix, c, t] = recall[-1] if len(judged) else 0
  pick = lambda suffix='', at=THRESHOLDS, of=range(len(NAMES)): mean([ap[suffix, c, t] for c in of for t in at])
  figures = {f'ap{suffix}': pick(suffix) for suffix in RANGES} | {'ap50': pick(at=[0.5]), 'ap75': pick(at=[0.75])}
  for letter, name in (('r', 'rare'), ('c', 'common'), ('f', 'frequent')):
    figures[f'ap_{name}'] = pick(of=[c for c in range(len(NAMES)) if FREQUENCIES[c] == letter])
  return figures | {'ar': mean([v for (suffix, _, _), v in ar.items() if not suffix])}


def lvis_figures(images, truth, monkeypatch):
  """Through LVIS's own code, of 2020: NumPy has lost a name since, and its drawing is not needed."""
  pytest.importorskip('pycocotools')
  monkeypatch.setitem(sys.modules, 'lvis.vis', types.SimpleNamespace(LVISVis=None))
  monkeypatch.setattr(np, 'float', float, raising=False)
  lvis = pytest.importorskip('lvis')
  gts, dts, entries = [], [], []
  for number, image in enumerate(images, 1):
    entries.append({'id': number, 'height': 300, 'width': 300, 'neg_category_ids': truth.negative[image.image_id],
                    'not_exhaustive_category_ids': truth.not_exhaustive[image.image_id]})
    for label, (x0, y0, x1, y1) in zip(image.categories, image.boxes.tolist()):
      gts.append({'id': len(gts) + 1, 'image_id': number, 'category_id': NAMES.index(label),
                  'bbox': [x0, y0, x1 - x0, y1 - y0], 'area': (x1 - x0) * (y1 - y0)})
    dts += [{'image_id': number, 'category_id': int(label), 'score': float(score), 'bbox': [x0, y0, x1 - x0, y1 - y0]}
            for label, score, (x0, y0, x1, y1) in zip(image.found_label, image.score, image.found.tolist())]
  truth_api = lvis.LVIS.__new__(lvis.LVIS)  # its constructor wants a file
  truth_api.dataset = {'images': entries, 'annotations': gts, 'categories': [
      {'id': i, 'name': name, 'frequency': FREQUENCIES[i]} for i, name in enumerate(NAMES)]}
  truth_api.logger = types.SimpleNamespace(info=lambda _: None)
  truth_api._create_index()
  run = lvis.LVISEval(truth_api, lvis.LVISResults(truth_api, dts), 'bbox')
  run.run()
  names = {'ap': 'AP', 'ap50': 'AP50', 'ap75': 'AP75', 'ap_small': 'APs', 'ap_medium': 'APm', 'ap_large': 'APl',
           'ap_rare': 'APr', 'ap_common': 'APc', 'ap_frequent': 'APf', 'ar': 'AR@300'}
  return {ours: float(run.results[theirs]) for ours, theirs in names.items()}


@pytest.mark.parametrize('referee', ['loop', 'lvis'])
@pytest.mark.parametrize('seed', range(2))
def test_ap_is_that_of_lvis(seed, referee, monkeypatch):
  images, truth = random_case(seed)
  want = plain_figures(images, truth) if referee == 'loop' else lvis_figures(images, truth, monkeypatch)
  got = dict(average_precision.run(images, categories=NAMES, truth=truth))
  assert {name: got[name] for name in want} == pytest.approx(want, abs=1e-9)
  assert len(want) == 10 and all(0.01 < value < 0.99 for value in want.values())
  assert got['classes'] == 7 and max(len(image.score) for image in images) > 450
  # Each of the rules matters here: without it the figure is another.
  for other in (Truth(frequencies=FREQUENCIES, negative=truth.negative),
                Truth(frequencies=FREQUENCIES, not_exhaustive=truth.not_exhaustive), Truth(crowds={})):
    assert dict(average_precision.run(images, categories=NAMES, truth=other))['ap'] != pytest.approx(want['ap'])
