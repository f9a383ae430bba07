"""Detection over supplied proposals: NMS against a plain loop, AP against pycocotools and by hand."""
import dataclasses
import contextlib
import io
import types

import numpy as np
import pytest

from cloc_jax import boxes as box_lib
from cloc_jax.data import eval_pipeline
from cloc_jax.evaluators import EncoderFns, average_precision, collect, detection
from cloc_jax.evaluators.average_precision import Image, Truth
from cloc_jax.geometry import resize_with_pad

pytest.importorskip('faster_coco_eval')
NAMES = ('cat', 'dog', 'bus')


def random_boxes(rng, count, *, size=300):
  low = rng.uniform(0, size * 0.4, (count, 2))
  return np.concatenate([low, low + rng.uniform(5, size * 0.6, (count, 2))], 1).astype(np.float32)


def random_images(rng, *, images=12, classes=3):
  """True boxes, and boxes found near them or anywhere."""
  out = []
  for i in range(images):
    true = random_boxes(rng, rng.integers(0, 6))
    near = np.repeat(true, 3, 0) + rng.normal(size=(3 * len(true), 4)) * 4
    found = np.concatenate([near, random_boxes(rng, 5)])
    found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
    out.append(Image(image_id=f'im{i}', boxes=true, found=found.astype(np.float32), size=(300, 300),
                     categories=tuple(NAMES[c] for c in rng.integers(0, classes, len(true))),
                     found_label=rng.integers(0, classes, len(found)), score=rng.random(len(found))))
  return out


def pycocotools_figures(images, crowds, *, most):
  """The same boxes through COCO's own code."""
  coco_lib = pytest.importorskip('pycocotools.coco')
  evaluation = pytest.importorskip('pycocotools.cocoeval')
  gts, dts = [], []
  for number, image in enumerate(images, 1):
    rows = [(NAMES.index(c), box, 0) for c, box in zip(image.categories, image.boxes)]
    rows += [(c[0], np.array(c[1:]), 1) for c in crowds.get(image.image_id, [])]
    for label, (x0, y0, x1, y1), crowd in rows:
      gts.append(dict(id=len(gts) + 1, image_id=number, category_id=label, iscrowd=crowd,
                      bbox=[float(v) for v in (x0, y0, x1 - x0, y1 - y0)], area=float((x1 - x0) * (y1 - y0))))
    for label, (x0, y0, x1, y1), score in zip(image.found_label, image.found, image.score):
      dts.append(dict(image_id=number, category_id=int(label), score=float(score),
                      bbox=[float(v) for v in (x0, y0, x1 - x0, y1 - y0)]))
  with contextlib.redirect_stdout(io.StringIO()):
    coco = coco_lib.COCO()
    coco.dataset = {'images': [{'id': i, 'height': 300, 'width': 300} for i in range(1, len(images) + 1)],
                    'annotations': gts, 'categories': [{'id': i, 'name': n} for i, n in enumerate(NAMES)]}
    coco.createIndex()
    run = evaluation.COCOeval(coco, coco.loadRes(dts), 'bbox')
    run.params.maxDets = [1, 10, most]
    run.evaluate()
    run.accumulate()
    run.summarize()
  return dict(zip(('ap', 'ap50', 'ap75', 'ap_small', 'ap_medium', 'ap_large'), run.stats)) | {'ar': run.stats[8]}


def test_ap_is_that_of_pycocotools(monkeypatch):
  rng = np.random.default_rng(3)
  images = random_images(rng)
  crowds = {'im1': [[0, 10, 10, 200, 200], [2, 0, 0, 90, 300]], 'im4': [[1, 50, 50, 250, 250]]}
  truth = Truth(crowds=crowds)
  got = dict(average_precision.run(images, categories=NAMES, truth=truth))
  want = pycocotools_figures(images, crowds, most=100)
  assert got.items() >= {'crowds': 3, 'classes': 3, 'boxes': sum(len(i.boxes) for i in images)}.items()
  assert {k: got[k] for k in want} == pytest.approx(want, abs=1e-9)
  assert 0.05 < got['ap'] < got['ap50'] < 1 and dict(average_precision.run(
      images, categories=NAMES, truth=Truth()))['ap'] != got['ap'], 'crowds forgive'
  monkeypatch.setattr(average_precision, '_PAIRS', 1)  # class by class
  assert dict(average_precision.run(images, categories=NAMES, truth=truth)) == pytest.approx(got, abs=1e-12)


def box_image(found_label, score, *, image_id='im0', found=None):
  """One cat at 0…100 and the boxes found, by default on it."""
  boxes = np.float32([[0, 0, 100, 100]])
  return Image(image_id=image_id, boxes=boxes, categories=('cat',), found_label=np.array(found_label),
               score=np.array(score, float), size=(200, 200),
               found=np.repeat(boxes, len(score), 0) if found is None else np.float32(found))


def test_ap_by_hand():
  run = lambda *images, truth=Truth(): dict(average_precision.run(images, categories=NAMES, truth=truth))
  assert run(box_image([0], [0.9]))['ap'] == pytest.approx(1)
  # Moved by 30 of 100 pixels: IoU 70/130 = 0.538, right at the threshold of 0.5 alone, of ten.
  moved = run(box_image([0], [0.9], found=[[30, 0, 130, 100]]))
  assert (moved['ap50'], moved['ap75'], moved['ap']) == pytest.approx((1, 0, 0.1))
  # A better scored box beside the cat halves the precision wherever recall reaches one.
  assert run(box_image([0, 0], [0.5, 0.9], found=[[0, 0, 100, 100], [120, 120, 190, 190]]))['ap'] == pytest.approx(0.5)
  assert run(box_image([1], [0.9])).items() >= {'ap': 0.0, 'boxes': 1, 'classes': 1}.items()
  assert 'ap_small' not in moved and 'ap_rare' not in moved and 'crowds' not in moved
  nothing = box_image([], [], found=np.zeros((0, 4)))
  assert run(nothing)['ap'] == 0
  crowd = {'im0': [[0, 110, 110, 200, 200]]}
  beside = box_image([0, 0], [0.5, 0.9], found=[[0, 0, 100, 100], [120, 120, 190, 190]])
  assert run(beside, truth=Truth(crowds=crowd))['ap'] == pytest.approx(1), 'what lies in a crowd is not wrong'


def test_lvis_counts_a_class_where_it_is_known():
  """A dog is found on the cat's image, above the dog of another image: wrong, unknown, or excused."""
  box = np.float32([[0, 0, 50, 50]])
  dog = Image(image_id='im1', boxes=box, categories=('dog',), found=box,
              found_label=np.array([1]), score=np.array([0.4]), size=(200, 200))
  images = [box_image([0, 1], [0.9, 0.8]), dog]
  ap = lambda **truth: dict(average_precision.run(images, categories=NAMES, truth=Truth(
      frequencies='rfc', **truth)))
  unknown = ap()
  assert (unknown['ap'], unknown['ap_rare'], unknown['ap_frequent']) == pytest.approx((1, 1, 1))
  assert 'ap_common' not in unknown, 'the bus does not occur'
  absent = ap(negative={'im0': [1]})
  assert (absent['ap'], absent['ap_rare'], absent['ap_frequent']) == pytest.approx((0.75, 1, 0.5))
  excused = ap(negative={'im0': [1]}, not_exhaustive={'im0': [1]})
  assert excused['ap_frequent'] == pytest.approx(1)
  assert Truth(frequencies='rfc').most == 300 and Truth().most == 100


def test_truth_is_read_from_the_metadata():
  lvis = {'frequencies': ['r', 'f', 'c'], 'negative': {'val': {'7': [1]}}, 'not_exhaustive': {'val': {'7': [2]}}}
  meta = types.SimpleNamespace(categories=NAMES, extra={'lvis': lvis, 'crowds': {'val': {'7': [[0, 1, 2, 3, 4]]}}})
  got = average_precision.truth_of(meta, 'val')
  assert got.negative == {'7': [1]} and got.not_exhaustive == {'7': [2]} and got.crowds == {'7': [[0, 1, 2, 3, 4]]}
  assert average_precision.truth_of(meta, 'train').negative == {}
  meta.extra = {}
  assert average_precision.truth_of(meta, 'val') == Truth(crowds=None)
  meta.extra = {'lvis': {'frequencies': ['r']}}
  with pytest.raises(ValueError, match='expected one for each of 3 categories, got 1'):
    average_precision.truth_of(meta, 'val')


def naive_detections(z, z_class, boxes, weight, most):
  """Softmax and class-wise greedy NMS as text books have them, and the best of what remains."""
  logits = 100 * z.astype(np.float64) @ z_class.T.astype(np.float64)
  p = np.exp(logits - logits.max(1, keepdims=True))
  p = p / p.sum(1, keepdims=True) * weight[:, None]
  found = []
  for c in range(len(z_class)):
    kept = []
    for i in sorted(range(len(boxes)), key=lambda i: -p[i, c]):
      if all(box_lib.iou(boxes[i], boxes[j]) <= 0.5 for j in kept):
        kept.append(i)
    found += [(p[i, c], i, c) for i in kept]
  return sorted(found, key=lambda f: -f[0])[:most]


@pytest.mark.parametrize('most, first', [(10, 4096), (100, 8), (10_000, 8)])
def test_detections_are_those_of_a_plain_loop(unit, monkeypatch, most, first):
  monkeypatch.setattr(detection, '_FIRST', first)
  rng = np.random.default_rng(1)
  boxes, weight = random_boxes(rng, 60, size=100), rng.random(60)
  z, z_class = unit(rng.normal(size=(60, 16))), unit(rng.normal(size=(5, 16)))
  proposal, label, score = detection.best_detections(z, z_class=z_class, boxes=boxes, weight=weight, most=most)
  want = naive_detections(z, z_class, boxes, weight, most)
  assert list(zip(proposal, label)) == [(i, c) for _, i, c in want] and len(want) >= min(most, 60)
  np.testing.assert_allclose(score, [s for s, _, _ in want], rtol=1e-9)
  none = detection.best_detections(z[:0], z_class=z_class, boxes=boxes[:0], weight=weight[:0], most=3)
  assert [len(a) for a in none] == [0, 0, 0]


EYE = np.eye(8, dtype=np.float32)
# Image → true boxes and their classes, in pixels of 100 × 200 (height × width).
PLACES = {'a': ([[0, 0, 60, 60], [100, 20, 180, 90]], (0, 1)), 'b': ([[20, 20, 120, 80]], (2,)), 'c': ([], ())}


class Model:
  """Knows, by the picture's first pixel, which image it sees, and says of a box what the true box nearest to it is."""

  def __init__(self):
    self.encoded, self.texts = 0, []
    self.geometry = resize_with_pad(height=100, width=200, canvas=20)

  def fns(self):
    return EncoderFns(encode_image=self.encode_image, image_embedding=lambda images: EYE[images[:, 0, 0, 0] % 8],
                      embed_regions=self.embed_regions, encode_text=self.encode_text, ground=None)

  def encode_image(self, images):
    self.encoded += len(images)
    return images

  def embed_regions(self, images, boxes):
    out = np.tile(EYE[7], (*boxes.shape[:2], 1))
    for row, image in enumerate(images):
      true, labels = list(PLACES.values())[image[0, 0, 0] % 3]
      for column, box in enumerate(self.geometry.boxes_from_canvas(boxes[row])):
        iou = [float(box_lib.iou(np.float32(t), box)) for t in true]
        if iou and max(iou) > 0.3:
          out[row, column] = EYE[labels[int(np.argmax(iou))]]
    return out

  def encode_text(self, texts, *, region):
    assert region
    self.texts += texts
    return np.stack([EYE[NAMES.index(t)] if t in NAMES else EYE[6] for t in texts])

  def batches(self, *, masked=()):
    for names in (('a', 'b'), ('c',)):
      examples, images = [], np.zeros((2, 20, 20, 3), np.uint8)
      for row, name in enumerate(names):
        boxes, labels = PLACES[name]
        images[row] = list(PLACES).index(name)
        examples.append(eval_pipeline.EvalExample(
            image_id=name, captions=(), geometry=self.geometry, region_captions=tuple(NAMES[i] for i in labels),
            boxes=self.geometry.boxes_to_canvas(np.float32(boxes).reshape(-1, 4)),
            categories=tuple(NAMES[i] for i in labels)))
      mask = np.array([i < len(names) and names[i] not in masked for i in range(2)])
      yield eval_pipeline.EvalBatch(images=images, image_mask=mask, examples=examples)


def detect(proposals, *, masked=(), categories=NAMES):
  model = Model()
  fns = detection.once(model.fns())
  detector = detection.Detection(
      categories=categories, encode_text=fns.encode_text, truth=Truth(),
      proposals=lambda name: (np.float32(proposals.get(name, [])).reshape(-1, 4),
                              np.ones(len(proposals.get(name, [])), np.float32)))
  predictions = collect(fns, detector.watch(fns, model.batches(masked=masked)))
  return dict(detector.run()), dataclasses.replace(predictions, chosen_proposals=detector.chosen(predictions)), model


def test_true_boxes_as_proposals_find_everything():
  got, predictions, model = detect({name: boxes for name, (boxes, _) in PLACES.items()})
  assert (got['detection/ap'], got['detection/recall_proposals']) == pytest.approx((1, 1))
  assert got['detection/images_without_proposals'] == 1 and got['detection/proposals'] == 1.5
  assert (got['grounding_supplied/acc_iou50'], got['grounding_supplied/phrases']) == (1, 3)
  assert model.encoded == 4, 'two batches of two, each encoded once for both purposes'
  assert len(predictions.boxes) == 3, 'the other figures see the true boxes alone'
  assert sorted(model.texts[:3]) == sorted(NAMES) and model.texts.count('') == 1


def test_moved_and_missing_proposals_cost():
  moved = {'a': [[20, 0, 80, 60], [100, 20, 180, 90], [0, 60, 40, 100]], 'b': []}  # IoU 40/80 with the cat
  got, predictions, _ = detect(moved)
  assert [predictions.image_ids[i] for i in predictions.region_image] == ['a', 'a', 'b']
  np.testing.assert_allclose(predictions.chosen_proposals, [*moved['a'][:2], [np.nan] * 4], atol=1e-4)
  assert got['detection/recall_proposals'] == pytest.approx(2 / 3)
  # Of ten thresholds the cat is found at one, the dog at all, the bus at none.
  assert got['detection/ap'] == pytest.approx((0.1 + 1 + 0) / 3) and got['detection/ap50'] == pytest.approx(2 / 3)
  assert got['grounding_supplied/acc_iou50'] == pytest.approx(2 / 3)
  assert got['grounding_supplied/mean_iou'] == pytest.approx((0.5 + 1 + 0) / 3, abs=1e-5)
  alone, _, _ = detect(moved, masked=('b',))
  assert alone['detection/ap'] == pytest.approx(0.55) and alone['grounding_supplied/phrases'] == 2


def test_without_categories_there_is_grounding_alone():
  got, _, _ = detect({'a': PLACES['a'][0]}, categories=())
  assert set(name.partition('/')[0] for name in got) == {'grounding_supplied'}


def test_of_equally_similar_proposals_the_worst_counts():
  got, predictions, _ = detect({'a': [[0, 0, 60, 60], [0, 0, 60, 30]]})  # both are cats to the model
  np.testing.assert_allclose(predictions.chosen_proposals[0], [0, 0, 60, 30], atol=1e-4)
  assert got['grounding_supplied/mean_iou'] == pytest.approx(0.5 / 3, abs=1e-5)
