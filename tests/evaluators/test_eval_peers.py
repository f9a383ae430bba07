"""Our figures against those of scikit-learn, torchmetrics and pycocotools; and where they differ on purpose."""
import contextlib
import io

import numpy as np
import pytest

from cloc_jax import boxes as box_lib
from cloc_jax import evaluators
from cloc_jax.evaluators import ranking

KS = ranking.RECALL_AT


def scene(make_predictions, unit, *, classes, candidates, boxes, noise=1.0, seed=0):
  """(predictions, the candidates' embeddings, each box's class); some candidates never occur."""
  rng = np.random.default_rng(seed)
  z_class = unit(rng.normal(size=(candidates, 8)))
  label = rng.integers(0, classes, boxes)
  z_region = unit(z_class[label] + noise * rng.normal(size=(boxes, 8)))
  predictions = make_predictions(region_image=[0] * boxes, z_region=z_region, categories=[f'c{i}' for i in label])
  return predictions, z_class, label


def recognise(predictions, z_class):
  names = [f'c{i}' for i in range(len(z_class))]
  return dict(evaluators.RegionRecognition(categories=names, encode_text=lambda t, *, region: z_class).run(predictions))


@pytest.mark.parametrize('classes, candidates, boxes', [(7, 9, 400), (30, 40, 60), (1, 6, 50)])
def test_recognition_agrees_with_scikit_learn(make_predictions, unit, classes, candidates, boxes):
  metrics = pytest.importorskip('sklearn.metrics')
  predictions, z_class, label = scene(make_predictions, unit, classes=classes, candidates=candidates, boxes=boxes)
  got = recognise(predictions, z_class)
  scores = predictions.z_region.astype(np.float64) @ z_class.T.astype(np.float64)
  every = np.arange(candidates)
  assert got['top1'] == pytest.approx(metrics.top_k_accuracy_score(label, scores, k=1, labels=every))
  assert got['top5'] == pytest.approx(metrics.top_k_accuracy_score(label, scores, k=5, labels=every))
  occurring = np.unique(label)
  # Classes that are predicted and never occur make scikit-learn warn; it leaves them out of the mean, as we do.
  with pytest.warns(UserWarning, match='not in y_true'):
    assert got['macc'] == pytest.approx(metrics.balanced_accuracy_score(label, scores.argmax(1)))
  want = np.mean([metrics.average_precision_score(label == c, scores[:, c]) for c in occurring])
  assert got['ap_gt'] == pytest.approx(want) and got['classes'] == len(occurring)


def test_zero_shot_agrees_with_scikit_learn(unit):
  metrics = pytest.importorskip('sklearn.metrics')
  rng = np.random.default_rng(1)
  z_class, label = unit(rng.normal(size=(8, 6))), rng.integers(0, 8, 300)
  z_image = unit(z_class[label] + 0.7 * rng.normal(size=(300, 6)))
  evaluator = evaluators.ZeroShot(class_names=[f'c{i}' for i in range(8)], templates=['{}'],
                                  encode_text=lambda texts, *, region: z_class)
  got = dict(evaluator.run(z_image=z_image, labels=label))
  scores = z_image @ z_class.T
  assert got['macc'] == pytest.approx(metrics.balanced_accuracy_score(label, scores.argmax(1)))
  for k in (1, 5):
    assert got[f'top{k}'] == pytest.approx(metrics.top_k_accuracy_score(label, scores, k=k))


def test_ties_are_wrong_here_and_right_by_the_order_of_a_sort_elsewhere(make_predictions, unit):
  """A model that embeds everything alike: scikit-learn gives it the boxes of one class, by the order of the labels."""
  metrics = pytest.importorskip('sklearn.metrics')
  predictions, z_class, label = scene(make_predictions, unit, classes=6, candidates=6, boxes=100)
  predictions.z_region[:], z_class[:] = z_class[0], z_class[0]
  got = recognise(predictions, z_class)
  assert (got['top1'], got['top5'], got['macc']) == (0, 0, 0)
  equal = np.ones((100, 6))
  assert metrics.top_k_accuracy_score(label, equal, k=1) == pytest.approx(np.mean(label == 5))
  assert metrics.top_k_accuracy_score(label, equal, k=5) == pytest.approx(np.mean(label > 0))
  assert 0 < np.mean(label == 5) < np.mean(label > 0)
  # Average precision takes equals together in both: it is the share of each class.
  assert got['ap_gt'] == pytest.approx(1 / 6)
  assert metrics.average_precision_score(label == 1, equal[:, 1]) == pytest.approx(np.mean(label == 1))


def test_a_class_that_never_occurs_is_in_torchmetrics_mean_once_it_is_predicted(make_predictions, unit):
  functional = pytest.importorskip('torchmetrics.functional.classification')
  torch = pytest.importorskip('torch')
  predictions, z_class, label = scene(make_predictions, unit, classes=3, candidates=6, boxes=200)
  got = recognise(predictions, z_class)
  scores = torch.tensor(predictions.z_region @ z_class.T)
  theirs = lambda **kw: float(functional.multiclass_accuracy(scores, torch.tensor(label), num_classes=6, **kw))
  assert got['top1'] == pytest.approx(theirs(average='micro'))
  assert got['top5'] == pytest.approx(theirs(average='micro', top_k=5))
  per_class = functional.multiclass_accuracy(scores, torch.tensor(label), num_classes=6, average=None).numpy()
  assert got['macc'] == pytest.approx(per_class[:3].mean())
  assert theirs(average='macro') == pytest.approx(per_class.mean()) != pytest.approx(got['macc'])


def flat(similarity, right):
  """(scores, targets, queries) as torchmetrics takes them, from (q, p) similarities and (q, p) bool.

  It reads scores as probabilities, and takes nothing at or under 0 for an answer: cosines are moved to 0 … 1.
  """
  torch = pytest.importorskip('torch')
  query = np.repeat(np.arange(len(similarity)), similarity.shape[1])
  return torch.tensor((similarity.ravel() + 1) / 2), torch.tensor(right.ravel()), torch.tensor(query)


def test_retrieval_agrees_with_torchmetrics(make_predictions, unit):
  """Images with no, one and several captions: its hit rate is our recall, whoever asks."""
  retrieval = pytest.importorskip('torchmetrics.retrieval')
  rng = np.random.default_rng(2)
  counts = rng.integers(0, 5, 40)
  image = np.repeat(np.arange(40), counts)
  z_image = unit(rng.normal(size=(40, 8)))
  z_caption = unit(z_image[image] + 0.8 * rng.normal(size=(len(image), 8)))
  predictions = make_predictions(images=40, z_image=z_image, captions=[f'caption {i}' for i in range(len(image))],
                                 caption_image=image, z_caption=z_caption)
  got = dict(evaluators.ImageTextRetrieval().run(predictions))
  right = image[None] == np.arange(40)[:, None]
  for name, similarity, answers in (('i2t', z_image @ z_caption.T, right), ('t2i', z_caption @ z_image.T, right.T)):
    for k in KS:
      # Images without a caption ask nothing.
      hit_rate = retrieval.RetrievalHitRate(top_k=k, empty_target_action='skip')
      assert got[f'{name}_r{k}'] == pytest.approx(float(hit_rate(*flat(similarity, answers)))), (name, k)
  # One right answer: recall in the usual sense. Several: any of them will do (Karpathy's protocol), not all.
  recall = retrieval.RetrievalRecall(top_k=5, empty_target_action='skip')
  assert got['t2i_r5'] == pytest.approx(float(recall(*flat(z_caption @ z_image.T, right.T))))
  recall = retrieval.RetrievalRecall(top_k=1, empty_target_action='skip')
  assert got['i2t_r1'] > 1.2 * float(recall(*flat(z_image @ z_caption.T, right)))


def test_region_retrieval_agrees_with_torchmetrics_on_repeated_captions(make_predictions, unit):
  """A third of the captions repeat, some differ in case alone, some are empty."""
  retrieval = pytest.importorskip('torchmetrics.retrieval')
  rng = np.random.default_rng(3)
  words = [f'thing {i}' for i in range(30)]
  texts = [words[i] if rng.random() < 0.8 else words[i].upper() for i in rng.integers(0, 30, 90)] + [''] * 5
  number = {word: i for i, word in enumerate(words)}
  z_word = unit(rng.normal(size=(30, 8)))
  named = [number[t.lower()] for t in texts[:90]]
  z_region = unit(np.concatenate([z_word[named] + 0.6 * rng.normal(size=(90, 8)), rng.normal(size=(5, 8))]))
  z_text = np.concatenate([z_word[named], z_word[:5]])
  boxes = np.stack([np.arange(95) / 100, np.zeros(95), np.ones(95), np.ones(95)], 1)
  predictions = make_predictions(region_image=[0] * 95, region_captions=texts, z_region=z_region, z_region_text=z_text,
                                 boxes=boxes)
  got = dict(evaluators.RegionRetrieval().run(predictions))
  distinct = list(dict.fromkeys(named))
  right = np.array(named)[:, None] == np.array(distinct)[None]
  similarity = z_region[:90] @ z_word[distinct].T
  for k in KS:
    of = lambda scores, answers: float(retrieval.RetrievalHitRate(top_k=k)(*flat(scores, answers)))
    assert got[f'r2t_r{k}'] == pytest.approx(of(similarity, right))
    assert got[f't2r_distinct_r{k}'] == pytest.approx(of(similarity.T, right.T))
    each = [distinct.index(i) for i in named]
    assert got[f't2r_r{k}'] == pytest.approx(of(similarity.T[each], right.T[each]))
  assert (got['pool'], got['distinct_texts'], got['no_caption']) == (90, len(distinct), 5)


def test_average_precision_agrees_with_torchmetrics_on_scores_above_zero(unit):
  functional = pytest.importorskip('torchmetrics.functional.retrieval')
  torch = pytest.importorskip('torch')
  rng = np.random.default_rng(4)
  z, z_class, label = unit(rng.normal(size=(80, 6))), unit(rng.normal(size=(5, 6))), rng.integers(0, 4, 80)
  got = ranking.average_precisions(z, z_class=z_class, label=label)
  precision = functional.retrieval_average_precision
  theirs = lambda scores, c: float(precision(torch.tensor(scores), torch.tensor(label == c)))
  for c in range(4):
    scores = z @ z_class[c]
    assert got[c] == pytest.approx(theirs((scores + 1) / 2, c))
    # It does not count what is of the class and has a score under 0, which a cosine may well have.
    assert abs(got[c] - theirs(scores, c)) > 1e-4
  assert np.isnan(got[4])


def test_box_iou_is_pycocotools():
  mask = pytest.importorskip('pycocotools.mask')
  rng = np.random.default_rng(5)
  corners = np.sort(rng.uniform(0, 300, (40, 2, 2)), 1).reshape(-1, 4)
  hand = [[0, 0, 10, 10], [10, 0, 20, 10], [0, 0, 10, 10], [2, 2, 4, 4], [0, 0, 300, 300], [100, 100, 100.5, 101]]
  boxes = np.concatenate([corners, hand])  # identical, touching, nested and tiny ones
  xywh = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
  want = mask.iou(xywh, xywh, [0] * len(boxes))
  np.testing.assert_allclose(box_lib.pairwise_iou(boxes, boxes), want, atol=1e-9)
  np.testing.assert_allclose(box_lib.pairwise_iou(*2 * [boxes.astype(np.float32)]), want, atol=1e-5)
  assert want[40, 41] == 0 and want[40, 42] == 1 and want[40, 43] == pytest.approx(0.04)


def coco_precisions(scores, label):
  """COCOeval's precision of each class at recall 1/n, 2/n, …, where every box is a detection of every class.

  Boxes lie apart, in one image; detections are listed in the order of the boxes.
  """
  coco = pytest.importorskip('pycocotools.coco')
  cocoeval = pytest.importorskip('pycocotools.cocoeval')
  count, classes = scores.shape
  box = lambda i: [20.0 * i, 0.0, 10.0, 10.0]
  annotations = [{'id': i + 1, 'image_id': 1, 'category_id': int(c) + 1, 'bbox': box(i), 'area': 100, 'iscrowd': 0}
                 for i, c in enumerate(label)]
  found = [{'image_id': 1, 'category_id': c + 1, 'bbox': box(i), 'score': float(scores[i, c])}
           for c in range(classes) for i in range(count)]
  truth = coco.COCO()
  out = []
  with contextlib.redirect_stdout(io.StringIO()):
    truth.dataset = {'info': {}, 'images': [{'id': 1, 'width': 20 * count, 'height': 10}], 'annotations': annotations,
                     'categories': [{'id': c + 1, 'name': str(c)} for c in range(classes)]}
    truth.createIndex()
    for c in range(classes):
      run = cocoeval.COCOeval(truth, truth.loadRes(found), 'bbox')
      positives = int((label == c).sum())
      run.params.catIds, run.params.maxDets, run.params.iouThrs = [c + 1], [1, 1, count], np.array([0.5])
      run.params.recThrs = np.arange(1, positives + 1) / positives
      run.params.areaRng, run.params.areaRngLbl = [[0, 1e10]], ['all']
      run.evaluate()
      run.accumulate()
      out.append(run.eval['precision'][0, :, 0, 0, -1])
  return out


def average_precisions(scores, label):
  """Ours, of scores as they are: orthogonal classes make them the similarities."""
  return ranking.average_precisions(scores.astype(np.float32), z_class=np.eye(scores.shape[1], dtype=np.float32),
                                    label=label)


def test_ap_is_coco_ap_of_perfect_boxes_where_precision_only_falls():
  """Gaps between right boxes only grow, so that COCO's interpolation has nothing to fill in."""
  rng = np.random.default_rng(6)
  gaps = np.sort(rng.integers(0, 4, 12))
  right = np.concatenate([[0] * gap + [1] for gap in gaps])
  label = 1 - right
  scores = np.stack([np.linspace(0.9, 0.1, len(right)), np.linspace(0.1, 0.9, len(right))], 1)
  want = coco_precisions(scores, label)[0]
  assert (np.diff(want) <= 0).all() and want[-1] < 0.6
  assert average_precisions(scores, label)[0] == pytest.approx(want.mean())


def test_coco_interpolates_precision_and_we_do_not():
  """Wrong, right, right: precision 1/2 and 2/3; COCO takes the best that is still to come, 2/3 and 2/3."""
  scores, label = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]]), np.array([1, 0, 0])
  assert average_precisions(scores, label)[0] == pytest.approx((1 / 2 + 2 / 3) / 2)
  np.testing.assert_allclose(coco_precisions(scores, label)[0], [2 / 3, 2 / 3])
  rng = np.random.default_rng(7)
  scores, label = rng.random((60, 3)), rng.integers(0, 3, 60)
  ours = average_precisions(scores, label)
  assert all(0 < precisions.mean() - ap < 0.1 for precisions, ap in zip(coco_precisions(scores, label), ours))


def test_coco_breaks_ties_by_the_order_of_detections_and_we_do_not():
  scores = np.array([[0.5, 0.1], [0.5, 0.2]])
  assert coco_precisions(scores, np.array([0, 1]))[0] == pytest.approx(1)
  assert coco_precisions(scores, np.array([1, 0]))[0] == pytest.approx(0.5)
  for label in ([0, 1], [1, 0]):
    assert average_precisions(scores, np.array(label))[0] == 0.5
