"""The detectors against transformers' own forward passes, hand-made pixels and plain loops."""
import json
import pickle
import shutil

import numpy as np
import pytest

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

from cloc_jax.label import checkpoints, detections, detectors, stages  # noqa: E402
import tiny_models  # noqa: E402

QUERIES = [['a red dog', 'cat'], ['a bus'], ['horse', 'a', 'window', 'boat', 'small tree']]


@pytest.fixture(name='owlv2', scope='module')
def owlv2_fixture(tmp_path_factory):
  return tiny_models.owlv2(tmp_path_factory.mktemp('tiny') / 'owlv2')


@pytest.fixture(name='dino', scope='module')
def dino_fixture(tmp_path_factory):
  return tiny_models.grounding_dino(tmp_path_factory.mktemp('tiny') / 'dino')


def pictures(*sizes, seed=0):
  rng = np.random.default_rng(seed)
  return [stages.Picture(f'p{i}', rng.integers(0, 256, (*size, 3)).astype(np.uint8)) for i, size in enumerate(sizes)]


def corners(boxes):
  return np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], -1)


def same(got, want, *, atol=1e-5):
  assert [d.phrase for d in got] == [d.phrase for d in want]
  np.testing.assert_allclose([[*d.box, d.score] for d in got], [[*d.box, d.score] for d in want], atol=atol)


@pytest.mark.parametrize('kind, pad', [('owlv2', 0), ('owlvit', 127)])
@pytest.mark.parametrize('size', [64, 96])
def test_owl_is_transformers_forward_with_zeroed_rows_for_padding(kind, pad, size, tmp_path):
  """Ragged queries in one batch, at the checkpoint's size (64) and a larger one, where positions are interpolated."""
  folder = getattr(tiny_models, kind)(tmp_path)
  images = pictures((size, size), (size // 2, size), (size, size // 2))
  detector = detectors.make(f'{kind}:{folder}', image_size=size, threshold=0.3)
  got = detector.detect(images, QUERIES)

  canvases = np.full((3, size, size, 3), pad, np.float64)
  for canvas, picture in zip(canvases, images):
    canvas[:picture.image.shape[0], :picture.image.shape[1]] = picture.image  # no resizing in this test
  pixels = (canvases / 255 - tiny_models.MEAN) / tiny_models.STD
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  longest = max(map(len, QUERIES))
  ids = torch.zeros(3, longest, 16, dtype=torch.long)
  for row, texts in zip(ids, QUERIES):
    row[:len(texts)] = tokenizer(texts, padding='max_length', max_length=16, return_tensors='pt')['input_ids']
  model = transformers.AutoModelForZeroShotObjectDetection.from_pretrained(folder).eval()
  with torch.no_grad():
    out = model(input_ids=ids.reshape(-1, 16), pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2)).float(),
                attention_mask=(ids > 0).long().reshape(-1, 16), interpolate_pos_encoding=True)
  logits, boxes = out.logits.numpy(), out.pred_boxes.numpy()
  assert size == 64 or boxes.shape[1] == (size // 8)**2
  for i, picture in enumerate(images):
    scores = 1 / (1 + np.exp(-logits[i].max(-1)))
    h, w = picture.image.shape[:2]
    unpadded = np.clip(corners(boxes[i]) / [w / size, h / size, w / size, h / size], 0, 1)
    whole = ((unpadded[:, 2:] - unpadded[:, :2]) * [w, h] >= 1).all(-1)
    want = [(*unpadded[k], scores[k], logits[i, k].argmax()) for k in np.argsort(-scores)
            if scores[k] > 0.3 and whole[k]]
    assert want, 'the comparison means something'
    np.testing.assert_allclose([(*d.box, d.score, d.phrase) for d in got[i]], want, atol=1e-4)


def test_padding_would_win_boxes_if_it_were_a_text(owlv2):
  """What transformers' processor fills up with, a blank text, does win boxes; ours is masked."""
  images = pictures((64, 64))
  model = transformers.AutoModelForZeroShotObjectDetection.from_pretrained(owlv2).eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(owlv2)
  pixels = (images[0].image / 255 - tiny_models.MEAN) / tiny_models.STD

  def blank_wins(text):
    tokens = tokenizer([text, *[' '] * 4], padding='max_length', max_length=16, return_tensors='pt')
    with torch.no_grad():
      out = model(pixel_values=torch.tensor(pixels.transpose(2, 0, 1)[None]).float(), input_ids=tokens['input_ids'],
                  attention_mask=tokens['attention_mask'])
    return bool((out.logits.argmax(-1) > 0).any())

  weak = next(text for text in tiny_models.WORDS if blank_wins(text))  # the trap is there
  detector = detectors.make(f'owlv2:{owlv2}', image_size=64, threshold=0.0)
  alone, = detector.detect(images, [[weak]])
  together = detector.detect(images * 2, [[weak], QUERIES[2]])
  assert {d.phrase for d in together[0]} == {0}
  same(together[0], alone)


def test_no_queries_no_detections_and_batches_change_nothing(owlv2):
  images = pictures(*[(40 + 8 * i, 64) for i in range(5)])
  queries = [*QUERIES, [], ['cat']]
  results = [detectors.make(f'hf:{owlv2}', image_size=64, batch_size=n).detect(images, queries) for n in (1, 2, 8)]
  assert results[0][3] == [] and all(len(r) for i, r in enumerate(results[0]) if i != 3)
  for other in results[1:]:
    for a, b in zip(other, results[0]):
      same(a, b)


def test_a_text_is_encoded_once_whatever_the_number_of_images(owlv2):
  detector = detectors.make(f'owlv2:{owlv2}', image_size=64)
  detector.load()
  seen, tokenizer = [], detector._tokenizer
  detector._tokenizer = lambda texts, **options: (seen.extend(texts), tokenizer(texts, **options))[1]
  detector.detect(pictures(*[(32, 32)] * 4), [['cat', 'dog'], ['dog'], ['bus', 'cat'], ['dog']])
  assert sorted(seen) == ['bus', 'cat', 'dog']


@pytest.mark.parametrize('height, width', [(96, 128), (128, 96), (64, 128), (32, 64), (300, 500), (501, 333)])
def test_a_painted_box_comes_back_to_the_pixel(owlv2, height, width):
  """An oracle in the model's place finds the white rectangle in the pixels that the model is given."""
  left, top, right, bottom = [round(f * n / 2) * 2 for f, n in zip((0.25, 0.375, 0.75, 0.875), (width, height) * 2)]
  image = np.full((height, width, 3), 60, np.uint8)
  image[top:bottom, left:right] = 255
  detector = detectors.make(f'owlv2:{owlv2}', image_size=64)
  detector.load()

  def find(canvases, numbers, encoded):
    del encoded
    out = []
    for canvas, _ in zip(canvases, numbers):
      # Edges between pixels, found by how much of each row and column is white.
      share = (canvas[..., 0].astype(float) - 60).clip(0) / 195
      row, column = share.max(1), share.max(0)
      (y0, y1), (x0, x1) = ((np.argmax(v > 0.01) + 1 - v[np.argmax(v > 0.01)],
                             len(v) - 1 - np.argmax(v[::-1] > 0.01) + v[::-1][np.argmax(v[::-1] > 0.01)])
                            for v in (row, column))
      box = np.array([[(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0]]) / 64
      out.append((box, np.array([0.9]), np.array([0])))
    return out

  detector.forward = find
  (found,), = detector.detect([stages.Picture('p', image)], [['a white box']])
  got = np.array(found.box) * [width, height, width, height]
  # To a tenth of a canvas pixel: what the rectangle's edge loses as a grey level of 256.
  tolerance = 0.1 * max(1, max(height, width) / 64)
  np.testing.assert_allclose(got, [left, top, right, bottom], atol=tolerance)


def test_boxes_are_clipped_dropped_and_ordered():
  boxes = np.array([
      [0.5, 0.5, 0.2, 0.2], [0.0, 0.25, 0.2, 0.2],  # the second sticks out at the left
      [0.9, 0.9, 0.1, 0.1],  # in the padding: the image is the upper half
      [0.5, 0.5, 0.2, 0.0], [0.3, 0.3, 0.1, 0.1], [0.2, 0.2, 0.1, 0.1]])
  scores = np.array([0.3, 0.9, 0.8, 0.7, 0.1, 0.2])
  got = detections.select(boxes, scores, np.array([1, 0, 2, 0, 0, 3]), extent=(1.0, 0.5), height=50, width=100,
                          threshold=0.1)
  assert [(d.phrase, d.score) for d in got] == [(0, 0.9), (1, 0.3), (3, 0.2)], 'exactly 0.1 is not more than 0.1'
  np.testing.assert_allclose([d.box for d in got],
                             [[0, 0.3, 0.1, 0.7], [0.4, 0.8, 0.6, 1], [0.15, 0.3, 0.25, 0.5]], atol=1e-12)
  with pytest.raises(ValueError, match='NaN'):
    detections.select(boxes, scores * np.nan, scores, extent=(1, 1), height=9, width=9, threshold=0.1)


def test_a_box_of_less_than_a_pixel_is_dropped():
  boxes = np.array([[0.5, 0.5, 1 / 100, 0.5], [0.5, 0.5, 0.9 / 100, 0.5]])
  got = detections.select(boxes, np.array([0.5, 0.6]), np.array([0, 1]), extent=(1, 1), height=10, width=100,
                          threshold=0)
  assert [d.phrase for d in got] == [0]


def test_nms_is_the_greedy_loop():
  rng = np.random.default_rng(1)
  boxes = np.concatenate([rng.uniform(0.3, 0.7, (60, 2)), rng.uniform(0.1, 0.4, (60, 2))], -1)
  scores = rng.random(60)
  everything = dict(extent=(1, 1), height=100, width=100, threshold=0.2)
  got = detections.select(boxes, scores, np.arange(60), nms=0.4, **everything)
  rest, want = detections.select(boxes, scores, np.arange(60), **everything), []
  while rest:
    best, rest = rest[0], rest[1:]
    want.append(best)

    def overlap(other, best=best):
      w, h = (min(best.box[k + 2], other.box[k + 2]) - max(best.box[k], other.box[k]) for k in (0, 1))
      area = lambda b: (b[2] - b[0]) * (b[3] - b[1])
      inner = max(w, 0) * max(h, 0)
      return inner / (area(best.box) + area(other.box) - inner)
    rest = [other for other in rest if overlap(other) <= 0.4]
  assert got == want and len(got) < sum(scores > 0.2)


def test_one_bad_image_fails_alone(owlv2):
  images = pictures((64, 64), (64, 64), (64, 64))
  images[1] = stages.Picture('bad', images[1].image / 255)
  detector = detectors.make(f'owlv2:{owlv2}', image_size=64)
  got = detector.detect(images, [['cat']] * 3)
  assert isinstance(got[1], ValueError) and 'bad: expected (H, W, 3) uint8' in str(got[1])
  same(got[0], detector.detect(images[:1], [['cat']])[0])
  forward = detector.forward

  def choke(canvases, numbers, encoded):
    if 2 in numbers:
      raise RuntimeError('out of memory')
    return forward(canvases, numbers, encoded)
  detector.forward = choke
  again = detector.detect(images, [['cat']] * 3)
  assert isinstance(again[2], RuntimeError)
  same(again[0], got[0])
  # A half character, as decoding with surrogateescape leaves them, is no reason to lose a batch.
  assert isinstance(detector.detect(images[:1], [['ca\udce9t', 'dog']])[0], list)


def test_heads_stay_in_float32_under_bfloat16(owlv2):
  images = pictures((64, 64))
  exact, = detectors.make(f'owlv2:{owlv2}', image_size=64, threshold=0).detect(images, [['cat']])
  got, = detectors.make(f'owlv2:{owlv2}', image_size=64, threshold=0, dtype='bfloat16').detect(images, [['cat']])
  sides = torch.tensor([d.score for d in got])
  assert (sides != sides.bfloat16().float()).float().mean() > 0.9, 'not rounded to eight bits'
  assert abs(len(got) - len(exact)) <= 3


def test_own_preprocessing_stays_close_to_the_processors_and_needs_no_torchvision(owlv2, coco_mini):
  import sys
  from cloc_jax.data import transforms
  assert 'torchvision' not in sys.modules
  processor = transformers.AutoImageProcessor.from_pretrained(owlv2)
  detector = detectors.make(f'owlv2:{owlv2}', image_size=448)
  path = sorted(coco_mini.glob('val2017/*.jpg'))[0]
  image = transforms.decode(path.read_bytes(), where=path.name)
  detector._size = 448
  canvas, extent = detector.prepare(image)
  want = processor(image, size=dict(height=448, width=448), return_tensors='np').pixel_values[0].transpose(1, 2, 0)
  want = (want * tiny_models.STD + tiny_models.MEAN) * 255
  inner = (slice(0, int(448 * extent[1]) - 2), slice(0, int(448 * extent[0]) - 2))
  error = canvas[inner].astype(float) - want[inner]
  assert 10 * np.log10(255**2 / np.mean(error**2)) > 30, 'another blur, the same places'
  assert abs(error.mean()) < 0.5
  outside = np.ones(canvas.shape[:2], bool)
  outside[:int(448 * extent[1]) + 2, :int(448 * extent[0]) + 2] = False
  assert outside.any() and np.abs(want[outside]).max() < 1 and not canvas[outside].any()


def test_grounding_dino_gives_what_transformers_post_processing_gives(dino):
  images = pictures((64, 96), (64, 96), (90, 70))
  queries = [['a cat', 'the red dog'], ['a bus'], ['window', 'large boat', 'tree']]
  got = detectors.make(f'hf:{dino}', threshold=0.2).detect(images, queries)
  processor = transformers.AutoProcessor.from_pretrained(dino)
  model = transformers.AutoModelForZeroShotObjectDetection.from_pretrained(dino).eval()
  for picture, texts, found in zip(images, queries, got):
    inputs = processor(images=picture.image, text=[texts], return_tensors='pt')
    with torch.no_grad():
      out = model(**inputs)
    token_scores = torch.sigmoid(out.logits)[0].numpy()
    ids = inputs['input_ids'][0].tolist()
    owner, owners = 0, []
    for token in ids:
      owners.append(-1 if token in (101, 102, 1012) else owner)
      owner += token == 1012
    raw = []
    for box, scores in zip(corners(out.pred_boxes[0].numpy()), token_scores):
      best = max((k for k, o in enumerate(owners) if o >= 0), key=lambda k: scores[k])
      box = np.clip(box, 0, 1)
      sides = (box[2:] - box[:2]) * picture.image.shape[1::-1]
      if scores[best] > 0.2 and (sides >= 1).all():
        raw.append((*box, scores[best], owners[best]))
    raw.sort(key=lambda r: -r[4])
    assert raw
    np.testing.assert_allclose([(*d.box, d.score, d.phrase) for d in found], raw, atol=1e-4)


def test_grounding_dino_asks_in_several_texts_when_one_is_too_short(dino):
  """32 tokens hold about a third of these; each phrase is asked once, and the indices stay those of the queries."""
  texts = [f'a {w} window' for w in ('red', 'green', 'small', 'large', 'old', 'dog', 'cat', 'bus', 'tree', 'horse')]
  detector = detectors.make(f'grounding-dino:{dino}', threshold=0)
  detector.load()
  requests = detector.encode_texts({0: texts})[0]
  assert len(requests) > 1 and all(len(tokens) <= 32 for tokens, _ in requests)
  spans = {}
  for tokens, owners in requests:
    for token, owner in zip(tokens, owners):
      if owner >= 0:
        spans.setdefault(owner, []).append(token)
  tokenizer = transformers.AutoTokenizer.from_pretrained(dino)
  assert [tokenizer.decode(spans[i]) for i in range(len(texts))] == texts
  found, = detector.detect(pictures((64, 64)), [texts])
  first, = detector.detect(pictures((64, 64)), [texts[:5]])
  assert len(found) > len(first) and max(d.phrase for d in found) > 4


@pytest.mark.parametrize('size', [(480, 640), (640, 480), (100, 1000), (64, 64), (333, 500), (65, 64), (50, 3)])
def test_grounding_dino_resizes_as_its_processor(dino, size):
  from transformers.image_transforms import get_size_with_aspect_ratio
  detector = detectors.make(f'grounding-dino:{dino}')
  detector._short, detector._long = 64, 100
  assert detector.prepared_shape(*size) == get_size_with_aspect_ratio(size, 64, 100)


def test_version_names_weights_and_settings(owlv2, tmp_path):
  plain = detectors.make(f'owlv2:{owlv2}')
  assert plain.version == detectors.make(f'hf:{owlv2}').version and 'threshold=0.1' in plain.version
  copy = tmp_path / owlv2.name
  shutil.copytree(owlv2, copy)
  assert detectors.make(f'owlv2:{copy}').version == plain.version
  weights = bytearray((copy / 'model.safetensors').read_bytes())
  weights[-1] ^= 1
  (copy / 'model.safetensors').write_bytes(weights)
  others = [detectors.make(f'owlv2:{copy}').version, *(
      detectors.make(f'owlv2:{owlv2}', **config).version for config in
      (dict(threshold=0.2), dict(image_size=64), dict(nms=0.5), dict(template='a photo of a {}')))]
  assert len({plain.version, *others}) == 6


def test_a_detector_travels_without_its_model(owlv2):
  detector = detectors.make(f'owlv2:{owlv2}', image_size=64)
  images = pictures((64, 64))
  want = pickle.loads(pickle.dumps(detector)).detect(images, [['cat']])
  detector.load()
  assert len(pickle.dumps(detector)) < 2_000
  assert pickle.loads(pickle.dumps(detector)).detect(images, [['cat']]) == want


def test_errors_say_what_to_do(owlv2, dino, tmp_path, monkeypatch):
  with pytest.raises(ValueError, match="got 'yolo:x'"):
    detectors.make('yolo:x')
  with pytest.raises(TypeError, match='treshold'):
    detectors.make(f'owlv2:{owlv2}', treshold=0.2)
  with pytest.raises(ValueError, match='threshold: expected a number from 0 to 1, got 10'):
    detectors.make(f'owlv2:{owlv2}', threshold=10)
  with pytest.raises(FileNotFoundError, match='no such folder.*hf download'):
    detectors.make(f'owlv2:{tmp_path}/nothing/here')
  (tmp_path / 'empty').mkdir()
  with pytest.raises(FileNotFoundError, match='config.json'):
    detectors.make(f'hf:{tmp_path}/empty')
  with pytest.raises(ValueError, match="expected a model of type 'owlv2', got 'grounding-dino'"):
    detectors.make(f'owlv2:{dino}').detect([], [])
  with pytest.raises(ValueError, match='multiple of the patch size 8, got 100; 96 and 104'):
    detectors.make(f'owlv2:{owlv2}', image_size=100).detect([], [])
  with pytest.raises(ValueError, match='template'):
    detectors.make(f'owlv2:{owlv2}', template='a photo')
  import huggingface_hub
  monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
  detector, tries = detectors.make('owlv2:google/no-such-owl'), []
  load = detector.load
  detector.load = lambda: (tries.append(1), load())
  for _ in range(2):
    with pytest.raises(FileNotFoundError, match='google/no-such-owl.*hf download'):
      detector.detect([], [])
  assert len(tries) == 1, 'what cannot be had is not asked for again for every image'


def test_missing_weights_are_an_error_and_not_noise(owlv2, tmp_path):
  from safetensors import torch as safetensors
  folder = tmp_path / 'cut'
  shutil.copytree(owlv2, folder)
  weights = safetensors.load_file(folder / 'model.safetensors')
  del weights['box_head.dense0.weight']
  safetensors.save_file(weights, folder / 'model.safetensors', metadata={'format': 'pt'})
  with pytest.raises(ValueError, match='lacks 1 of the weights.*box_head.dense0.weight'):
    detectors.make(f'owlv2:{folder}').detect([], [])
  config = json.loads((folder / 'config.json').read_text())
  (folder / 'config.json').write_text(json.dumps(config | {'model_type': 'clip'}))
  with pytest.raises(ValueError, match="got 'clip'"):
    detectors.make(f'hf:{folder}')


def test_each_alone_keeps_order_and_isolates():
  calls = []

  def run(items):
    calls.append(list(items))
    if any(i in (3, 4) for i in items):
      raise KeyError(items)
    return [i * 10 for i in items]
  got = checkpoints.each_alone(run, range(8))
  assert [g if isinstance(g, int) else type(g) for g in got] == [0, 10, 20, KeyError, KeyError, 50, 60, 70]
  assert checkpoints.each_alone(run, []) == []
