"""A loaded checkpoint in a user's hands: pixels and phrases in, embeddings, boxes in pixels and names out.

The parameters are random but far from symmetric, so that every image, box and phrase has an embedding of its own.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

import cloc_jax
from cloc_jax import batch as batch_lib
from cloc_jax import checkpoint, inference, train_step
from cloc_jax.data import tokenizer as tokenizer_lib
from cloc_jax.data import transforms

SIZE = 24
PHRASES = ['a red circle', 'the blue square', 'green', 'a very long phrase of many many words that will not fit']
CONFIG = {
    'data': {'text_length': 12},
    'model': {'image': {'variant': 'mu/8', 'width': 16, 'depth': 2, 'heads': 2},
              'text': {'variant': 'mu', 'width': 12, 'depth': 1, 'heads': 2}, 'embed_dim': 8}}


@functools.cache
def reference(method):
  """A method of the model itself: (params, *arrays on the canvas) → what the model returns."""
  model = inference.build_model(CONFIG, tokenizer=tokenizer())
  return jax.jit(lambda params, *args: model.apply({'params': params}, *args, method=method))


@functools.cache
def tokenizer():
  return tokenizer_lib.train(PHRASES, vocab_size=400)


def write(folder, *, region_encoder='prompter', pad='center', step=7, config=None):
  """A run's folder with one checkpoint in it."""
  config = config or {**CONFIG, 'model': {**CONFIG['model'], 'region_encoder': region_encoder}}
  model = inference.build_model(config, tokenizer=tokenizer())
  batch = batch_lib.abstract_batch(batch_size=2, image_size=SIZE, text_length=12, regions=2, region_text_length=5)
  shapes = jax.eval_shape(model.init, jax.random.key(0), batch)['params']
  rng = np.random.default_rng(5)
  params = jax.tree.map(lambda x: rng.normal(scale=0.5, size=x.shape).astype(np.float32), shapes)
  if region_encoder == 'prompter':  # boxes with an area, all of them different
    params['box_head']['Dense_1']['bias'] = np.float32([-2, -2, 2, 2])
  state = train_step.TrainState(step=jnp.int32(step), params=params, opt_state={'count': jnp.int32(step)}, ema=None)
  keeper = checkpoint.Checkpointer(folder / 'checkpoints')
  keeper.save(step, state, info={'config': config, 'tokenizer': tokenizer().to_dict(), 'examples_seen': 0, 'metrics': {},
                                 'preprocessing': {'image_size': SIZE, 'pad': pad, 'text_length': 12,
                                                   'region_text_length': 5}})
  keeper.close()
  return folder


@pytest.fixture(name='folder', scope='module')
def folder_fixture(tmp_path_factory):
  return write(tmp_path_factory.mktemp('run'))


@pytest.fixture(name='cloc', scope='module')
def cloc_fixture(folder):
  return cloc_jax.load(folder)


def picture(height, width, seed=0):
  """A smooth random picture, so that resizing keeps what it shows."""
  rng = np.random.default_rng([seed, height, width])
  small = PIL.Image.fromarray(rng.integers(0, 256, (4, 5, 3)).astype(np.uint8))
  return small.resize((width, height), PIL.Image.Resampling.BICUBIC)


TALL, WIDE, SQUARE = picture(60, 30), picture(20, 50), picture(SIZE, SIZE)


# --- loading


def test_load_takes_a_run_its_checkpoints_or_one_step(folder, cloc):
  assert isinstance(cloc, cloc_jax.Cloc) and cloc.info['step'] == 7
  for path in (folder / 'checkpoints', folder / 'checkpoints' / '00000007', str(folder)):
    again = inference.load(path)
    jax.tree.map(np.testing.assert_array_equal, again.params, cloc.params)
  assert inference.load(folder, step=7).info['step'] == 7


def test_load_says_what_there_is(folder, tmp_path):
  with pytest.raises(FileNotFoundError, match=r'no step 8; it holds \[7\]'):
    inference.load(folder, step=8)
  with pytest.raises(FileNotFoundError, match='does not exist'):
    inference.load(tmp_path / 'nothing')


def test_parameters_that_do_not_fit_their_own_config(tmp_path, monkeypatch):
  build = inference.build_model
  write(tmp_path)
  wider = {**CONFIG, 'model': {**CONFIG['model'], 'embed_dim': 10}}
  monkeypatch.setattr(inference, 'build_model', lambda config, *, tokenizer: build(wider, tokenizer=tokenizer))
  with pytest.raises(checkpoint.ArchitectureError, match=r'! img/head/kernel: expected \(16, 10\), got \(16, 8\)'):
    inference.load(tmp_path)


def test_the_tokenizer_came_with_the_checkpoint(cloc):
  ids = cloc.functions.tokenizer(PHRASES, length=12).ids
  np.testing.assert_array_equal(ids, tokenizer()(PHRASES, length=12).ids)


# --- whole images


def assert_close(got, want, **kwargs):
  np.testing.assert_allclose(got, want, **{'rtol': 2e-5, 'atol': 2e-6, **kwargs})


@pytest.mark.parametrize('image', [TALL, WIDE, SQUARE])
def test_an_image_equals_the_model_on_its_canvas(cloc, image):
  """The canvas by hand: the long side resized to the model's, the rest padded evenly with grey."""
  width, height = image.size
  scale = SIZE / max(width, height)
  canvas, _ = transforms.prepare_image(image, image_size=SIZE)
  top, left = (SIZE - round(height * scale)) // 2, (SIZE - round(width * scale)) // 2
  assert (canvas[:top] == 127).all() and (canvas[:, :left] == 127).all() and canvas.std() > 0
  found = cloc.encode_image(image)
  want = reference('encode_image')(cloc.params, canvas[None])
  assert found.z.shape == (1, 8) and found.single
  assert_close(found.z, want.z)
  assert_close(np.linalg.norm(found.z, axis=-1), 1)


def test_pil_arrays_and_batches_of_different_sizes_are_the_same_to_it(cloc):
  images = [TALL, WIDE, SQUARE]
  alone = np.concatenate([cloc.encode_image(image).z for image in images])
  assert np.abs(alone[0] - alone[1]).max() > 0.05  # they can be told apart at all
  batch = cloc.encode_image(images)
  assert batch.z.shape == (3, 8) and not batch.single and len(batch.geometry) == 3
  assert_close(batch.z, alone)
  assert_close(cloc.encode_image([np.asarray(image) for image in images]).z, alone)
  assert_close(cloc.encode_image((WIDE,)).z, alone[1:2])
  stacked = np.stack([np.asarray(SQUARE), np.asarray(SQUARE)[::-1]])
  assert_close(cloc.encode_image(stacked).z[0], alone[2])


def test_grey_and_transparent_images(cloc):
  grey = SQUARE.convert('L')
  assert_close(cloc.encode_image(grey).z, cloc.encode_image(grey.convert('RGB')).z)
  assert_close(cloc.encode_image(np.asarray(grey)).z, cloc.encode_image(grey.convert('RGB')).z)
  assert cloc.encode_image(SQUARE.convert('RGBA')).z.shape == (1, 8)


@pytest.mark.parametrize('image, error, message', [
    ([], ValueError, 'expected at least one image'),
    (np.zeros((0, 8, 8, 3), np.uint8), ValueError, 'expected at least one image'),
    (np.zeros((8, 8, 3), np.float32), TypeError, 'expected uint8 pixels, got float32; scale'),
    (np.zeros((8, 8, 7), np.uint8), ValueError, r'\(8, 8, 7\)'),
    ('picture.jpg', TypeError, 'uint8'),
    (None, TypeError, 'uint8'),
])
def test_what_is_no_image(cloc, image, error, message):
  with pytest.raises(error, match=message):
    cloc.encode_image(image)


# --- regions


def canvas_boxes(image, boxes):
  """Pixels of the original → fractions of the canvas, by hand."""
  width, height = image.size
  scale = SIZE / max(width, height)
  offset = np.array([(SIZE - round(width * scale)) // 2, (SIZE - round(height * scale)) // 2] * 2)
  stretch = np.array([round(width * scale) / width, round(height * scale) / height] * 2)
  return ((np.asarray(boxes, np.float64) * stretch + offset) / SIZE).astype(np.float32)


BOXES = {id(TALL): [[0, 0, 30, 60], [3, 40, 21, 57], [10, 5, 12, 9]], id(WIDE): [[31, 2, 50, 18]], id(SQUARE): []}


@pytest.mark.parametrize('image', [TALL, WIDE])
def test_regions_in_pixels_equal_the_model_on_the_canvas(cloc, image):
  boxes = BOXES[id(image)]
  canvas, _ = transforms.prepare_image(image, image_size=SIZE)
  encoded = reference('encode_image')(cloc.params, canvas[None])
  want = reference('embed_regions')(cloc.params, encoded, canvas_boxes(image, boxes)[None])[0]
  found = cloc.embed_regions(cloc.encode_image(image), boxes)
  assert found.shape == (len(boxes), 8)
  assert_close(found, want)
  assert_close(np.linalg.norm(found, axis=-1), 1)


def test_a_checkpoint_that_was_trained_with_corner_padding_is_used_with_it(tmp_path):
  cloc = inference.load(write(tmp_path, pad='corner'))
  canvas, _ = transforms.prepare_image(WIDE, image_size=SIZE, pad='corner')
  assert (canvas[-1] == 127).all() and (canvas[0] != 127).any()
  # 50×20 pixels become 24×10, and there is no offset: the image stands in the corner.
  box = np.float32([[31 * 24 / 50, 2 * 10 / 20, 24, 18 * 10 / 20]]) / SIZE
  want = reference('embed_regions')(cloc.params, reference('encode_image')(cloc.params, canvas[None]), box[None])[0]
  assert_close(cloc.embed_regions(cloc.encode_image(WIDE), [[31, 2, 50, 18]]), want)


def test_regions_of_a_batch_are_those_of_its_images(cloc):
  images = [TALL, WIDE, SQUARE]
  found = cloc.embed_regions(cloc.encode_image(images), [BOXES[id(image)] for image in images])
  assert [z.shape for z in found] == [(3, 8), (1, 8), (0, 8)]
  for image, z in zip(images, found):
    assert_close(z, cloc.embed_regions(cloc.encode_image(image), BOXES[id(image)]))


def test_one_box_does_not_see_the_others(cloc):
  image = cloc.encode_image(TALL)
  boxes = np.array(BOXES[id(TALL)], np.float64)
  together = cloc.embed_regions(image, boxes)
  assert np.abs(together[0] - together[1]).max() > 0.02
  for box, z in zip(boxes, together):
    assert_close(cloc.embed_regions(image, [box])[0], z)
  assert_close(cloc.embed_regions(image, boxes[::-1]), together[::-1])
  assert_close(cloc.embed_regions(image, np.repeat(boxes, 40, 0)), np.repeat(together, 40, 0))


def test_a_box_is_cut_at_the_border_of_the_image(cloc):
  """As in training; what lies on the padding is no part of the image."""
  image = cloc.encode_image(WIDE)
  assert_close(cloc.embed_regions(image, [[-9, -30, 25, 400]]), cloc.embed_regions(image, [[0, 0, 25, 20]]))


@pytest.mark.parametrize('boxes, message', [
    ([[5, 5, 2, 9]], r'\[5.0, 5.0, 2.0, 9.0\] has no area'),
    ([[1, 1, 4, 4], [2, 3, 9, 3]], r'\[2.0, 3.0, 9.0, 3.0\] has no area'),
    ([[1, 1, np.nan, 4]], 'nan'),
    ([[60, 1, 70, 4]], r'\[60.0, 1.0, 70.0, 4.0\]'),
    ([1, 2, 3, 4], r'expected \(n, 4\) xyxy in pixels, got shape \(4,\)'),
    ([[1, 2, 3]], r'got shape \(1, 3\)'),
])
def test_wrong_boxes(cloc, boxes, message):
  with pytest.raises(ValueError, match=f'boxes of image 0: .*{message}'):
    cloc.embed_regions(cloc.encode_image(WIDE), boxes)


def test_a_list_for_each_image(cloc):
  images = cloc.encode_image([TALL, WIDE])
  with pytest.raises(ValueError, match='boxes: expected one list for each of 2 images, got 1'):
    cloc.embed_regions(images, [[[0, 0, 5, 5]]])
  with pytest.raises(ValueError, match='phrases: expected one list for each of 2 images, got 3'):
    cloc.ground(images, [['a'], ['b'], ['c']])
  with pytest.raises(ValueError, match='boxes of image 1: .* has no area'):
    cloc.embed_regions(images, [[[0, 0, 5, 5]], [[9, 9, 2, 2]]])


# --- text


def test_a_text_does_not_see_the_texts_beside_it(cloc):
  texts = [f'{phrase} {i}' for i in range(35) for phrase in PHRASES[:2]]  # more than fit in one call of the model
  for region in (False, True):
    together = cloc.encode_text(texts, region=region)
    assert together.shape == (70, 8) and together.dtype == np.float32
    assert_close(np.linalg.norm(together, axis=-1), 1)
    for i in (0, 1, 63, 64, 69):
      assert_close(cloc.encode_text([texts[i]], region=region)[0], together[i])
  assert cloc.encode_text([]).shape == (0, 8)


def test_texts_equal_the_model_on_their_tokens(cloc):
  for region, length in ((False, 12), (True, 5)):
    want = reference('encode_text')(cloc.params, tokenizer()(PHRASES, length=length).ids)
    assert_close(cloc.encode_text(PHRASES, region=region), want)


def test_an_iterator_of_texts_is_read_whole(cloc):
  assert_close(cloc.encode_text(p for p in PHRASES), cloc.encode_text(PHRASES))


@pytest.mark.parametrize('texts', ['a red circle', [b'bytes'], ['fine', None], [['nested']]])
def test_what_is_no_list_of_texts(cloc, texts):
  image = cloc.encode_image(SQUARE)
  for call in (lambda: cloc.encode_text(texts), lambda: cloc.ground(image, texts),
               lambda: cloc.classify_regions(image, [[0, 0, 5, 5]], texts)):
    with pytest.raises(TypeError, match='expected a list of texts, got'):
      call()


# --- grounding and naming


@pytest.mark.parametrize('image', [TALL, WIDE])
def test_grounding_equals_the_model_and_ends_in_pixels(cloc, image):
  encoded = cloc.encode_image(image)
  found = cloc.ground(encoded, PHRASES)
  width, height = image.size
  assert found.boxes.shape == (4, 4) and found.scores.shape == (4,) and found.boxes.dtype == np.float32
  assert (found.boxes >= 0).all() and (found.boxes <= [width, height, width, height]).all()
  assert (found.boxes[:, 2:] > found.boxes[:, :2]).all()
  canvas, _ = transforms.prepare_image(image, image_size=SIZE)
  state = reference('encode_image')(cloc.params, canvas[None])
  z = reference('encode_text')(cloc.params, tokenizer()(PHRASES, length=5).ids)
  raw = reference('ground')(cloc.params, state, z[None])
  whole = canvas_boxes(image, [[0, 0, width, height]])
  assert_close(canvas_boxes(image, found.boxes), np.clip(raw[0], whole[:, [0, 1, 0, 1]], whole[:, [2, 3, 2, 3]]),
               atol=1e-5)
  assert_close(found.scores, np.sum(reference('embed_regions')(cloc.params, state, raw)[0] * z, -1))


def test_grounding_does_not_depend_on_what_is_asked_beside_it(cloc):
  images = [TALL, WIDE, SQUARE]
  together = cloc.ground(cloc.encode_image(images), [PHRASES, PHRASES[1:2], []])
  assert [g.boxes.shape for g in together] == [(4, 4), (1, 4), (0, 4)]
  for image, phrases, got in zip(images, [PHRASES, PHRASES[1:2], []], together):
    encoded = cloc.encode_image(image)
    for i, phrase in enumerate(phrases):
      alone = cloc.ground(encoded, [phrase])
      assert_close(got.boxes[i], alone.boxes[0], atol=1e-3)
      assert_close(got.scores[i], alone.scores[0])
  assert np.abs(together[0].boxes[0] - together[0].boxes[1]).max() > 0.01


def test_the_name_of_a_region_is_the_nearest(cloc):
  image = cloc.encode_image(TALL)
  boxes = BOXES[id(TALL)]
  found = cloc.classify_regions(image, boxes, PHRASES)
  cosine = cloc.embed_regions(image, boxes) @ cloc.encode_text(PHRASES, region=True).T
  scale = np.exp(float(np.asarray(cloc.params['t'])))
  odds = np.exp(scale * cosine.astype(np.float64))
  assert found.labels == [PHRASES[i] for i in cosine.argmax(-1)]
  assert_close(found.scores, cosine.max(-1))
  assert_close(found.probabilities, odds / odds.sum(-1, keepdims=True), rtol=1e-4)
  batch = cloc.classify_regions(cloc.encode_image([SQUARE, TALL]), [[], boxes], PHRASES)
  assert batch[0].labels == [] and batch[0].probabilities.shape == (0, 4) and batch[0].scores.shape == (0,)
  assert batch[1].labels == found.labels
  with pytest.raises(ValueError, match='expected at least one name'):
    cloc.classify_regions(image, boxes, [])


def test_the_image_is_encoded_once(cloc, monkeypatch):
  calls = []
  encode = cloc.functions.encode_image
  monkeypatch.setattr(cloc.functions, 'encode_image', lambda *args: calls.append(1) or encode(*args))
  image = cloc.encode_image(TALL)
  for _ in range(2):
    cloc.embed_regions(image, BOXES[id(TALL)])
    cloc.ground(image, PHRASES)
    cloc.classify_regions(image, BOXES[id(TALL)], PHRASES)
  assert len(calls) == 1


# --- other branches


def test_roi_align_embeds_regions_and_grounds_nothing(tmp_path):
  cloc = inference.load(write(tmp_path, region_encoder='roi_align'))
  image = cloc.encode_image(TALL)
  assert cloc.embed_regions(image, BOXES[id(TALL)]).shape == (3, 8)
  assert cloc.classify_regions(image, BOXES[id(TALL)], PHRASES).probabilities.shape == (3, 4)
  with pytest.raises(ValueError, match="no box head .region_encoder='roi_align'"):
    cloc.ground(image, PHRASES)
  assert cloc.functions.encoder_fns(cloc.params).ground is None


def test_plain_clip_embeds_images_and_texts_alone(tmp_path):
  cloc = inference.load(write(tmp_path, region_encoder='none'))
  image = cloc.encode_image([TALL, WIDE])
  assert cloc.similarity(image.z, cloc.encode_text(PHRASES)).shape == (2, 4)
  with pytest.raises(ValueError, match="region_encoder='none'; it embeds whole images only"):
    cloc.embed_regions(image, [[], []])
  with pytest.raises(ValueError, match='no box head'):
    cloc.ground(image, [[], []])
  fns = cloc.functions.encoder_fns(cloc.params)
  assert fns.embed_regions is None and fns.ground is None
