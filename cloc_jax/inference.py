"""Using a trained model: encode an image once, then ask about any region or phrase of it.

  cloc = cloc_jax.load('runs/local')
  image = cloc.encode_image(pil_image)
  cloc.embed_regions(image, [[x0, y0, x1, y1]])         # pixels of the original image
  cloc.ground(image, ['a red circle'])                  # boxes in pixels of the original image, and scores
  cloc.classify_regions(image, boxes, ['cat', 'dog'])
"""
import contextlib
import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cloc_jax import checkpoint, compiler, config as config_lib, models, sharding, trees
from cloc_jax.batch import abstract_batch
from cloc_jax.data import tokenizer as tokenizer_lib
from cloc_jax.data import transforms
from cloc_jax.evaluators.collect import EncoderFns
from cloc_jax.geometry import Geometry
from cloc_jax.models.cloc import Cloc as ClocModel
from cloc_jax.models.cloc import ImageEmbedding

INIT_KEYS = ('init', 'init_parts')  # of config.model: where the first weights come from; see initialize.py
_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclasses.dataclass(frozen=True)
class Preprocessing:
  """What was done to pixels and texts in training, and must be done again. Travels inside the checkpoint.

  image_size: side of the canvas, pixels. pad: where the image stands on it. text_length, region_text_length: tokens.
  """
  image_size: int
  pad: str
  text_length: int
  region_text_length: int


@dataclasses.dataclass(frozen=True)
class Images:
  """Encoded images. `z` (B, E) L2-normalised NumPy; the rest is for the methods of `Cloc`.

  single: one image was given, not a batch; the methods then take and return that image's own boxes, without B.
  """
  z: np.ndarray
  embedding: ImageEmbedding
  geometry: tuple[Geometry, ...]
  single: bool


@dataclasses.dataclass(frozen=True)
class Grounded:
  """boxes: (n, 4) float32 xyxy, pixels of the original image. scores: (n,) cosine of each phrase and its box."""
  boxes: np.ndarray
  scores: np.ndarray


@dataclasses.dataclass(frozen=True)
class Classified:
  """labels: the best name of each box. scores: (n,) its cosine. probabilities: (n, names) softmax at temperature."""
  labels: list[str]
  scores: np.ndarray
  probabilities: np.ndarray


def _bucket(n: int) -> int:
  """The next static size, so that jit meets a handful of shapes and no more."""
  return next((b for b in _BUCKETS if b >= n), -(-n // _BUCKETS[-1]) * _BUCKETS[-1])


class Functions:
  """The model's functions, compiled, with parameters bound at call time. What `Cloc` and the evaluators share."""

  def __init__(self, model: ClocModel, *, tokenizer, preprocessing: Preprocessing, text_batch: int = 64,
               mesh: jax.sharding.Mesh | None = None):
    """With a mesh, of this process's own devices, `encoder_fns` and `encode_text` split each batch over them."""
    self.model, self.tokenizer, self.preprocessing = model, tokenizer, preprocessing
    self.devices = 1 if mesh is None else mesh.size
    self._text_batch = -(-text_batch // self.devices) * self.devices
    self._split = (lambda x: x) if mesh is None else (lambda x: sharding.to_global(np.asarray(x), mesh))
    self.can_embed_regions = model.region_encoder != 'none'
    self.can_ground = model.region_encoder == 'prompter'

    def apply(method, params, *args):
      with contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return model.apply({'params': params}, *args, method=method)

    def ground(params, image, z_text):
      boxes = apply('ground', params, image, z_text)
      z = apply('embed_regions', params, image, boxes)
      return boxes, jnp.einsum('bme,bme->bm', z, z_text)

    jit = functools.partial(jax.jit, compiler_options=compiler.options())
    self.encode_image = jit(functools.partial(apply, 'encode_image'))
    self.embed_regions = jit(functools.partial(apply, 'embed_regions'))
    self.ground = jit(ground)
    self.embed_patches = jit(functools.partial(apply, 'embed_patches'))
    self._encode_ids = jit(functools.partial(apply, 'encode_text'))

  def encode_text(self, params, texts: Sequence[str], *, region: bool) -> np.ndarray:
    """(n, E) float32 NumPy; `region` tokenises at the short length that region captions were trained at."""
    p = self.preprocessing
    ids = self.tokenizer(list(texts), length=p.region_text_length if region else p.text_length).ids
    out = []
    for start in range(0, len(ids), self._text_batch):
      part = ids[start:start + self._text_batch]
      padded = np.zeros((self._text_batch, ids.shape[1]), np.int32)
      padded[:len(part)] = part
      out.append(np.asarray(self._encode_ids(params, self._split(padded)))[:len(part)])
    return np.concatenate(out) if out else np.zeros((0, self.model.embed_dim), np.float32)

  def encoder_fns(self, params) -> EncoderFns:
    """These functions in the form the evaluators take. With a mesh, a batch is a multiple of `devices`."""
    return EncoderFns(
        encode_image=lambda images: self.encode_image(params, self._split(images)),
        image_embedding=lambda image: image.z,
        embed_regions=(lambda image, boxes: self.embed_regions(params, image, self._split(boxes)))
        if self.can_embed_regions else None,
        encode_text=lambda texts, *, region: self.encode_text(params, texts, region=region),
        ground=(lambda image, z_text: self.ground(params, image, self._split(z_text))) if self.can_ground else None,
        embed_patches=lambda image: self.embed_patches(params, image))


class Cloc:
  """A trained model with everything around it: preprocessing, tokenizer, geometry. Made by `load`."""

  def __init__(self, model: ClocModel, params, *, tokenizer, preprocessing: Preprocessing, info: dict[str, Any]):
    self.functions = Functions(model, tokenizer=tokenizer, preprocessing=preprocessing)
    self.params, self.info = params, info

  def encode_image(self, images) -> Images:
    """Encodes one image or a batch of images, each of any size.

    Args:
      images: a PIL image or (H, W, 3) uint8 array; or a sequence of them, or (B, H, W, 3).

    Raises:
      ValueError, TypeError: naming what came, when it is no image.
    """
    single = not isinstance(images, (list, tuple)) and np.ndim(images if isinstance(images, np.ndarray) else 0) != 4
    batch = [images] if single else list(images)
    if not batch:
      raise ValueError('encode_image: expected at least one image, got an empty batch')
    p = self.functions.preprocessing
    prepared = [transforms.prepare_image(im, image_size=p.image_size, pad=p.pad) for im in batch]
    canvases = np.stack([canvas for canvas, _ in prepared])
    padded = np.zeros((_bucket(len(batch)), *canvases.shape[1:]), np.uint8)
    padded[:len(batch)] = canvases
    embedding = self.functions.encode_image(self.params, padded)
    return Images(z=np.asarray(embedding.z)[:len(batch)], embedding=embedding,
                  geometry=tuple(g for _, g in prepared), single=single)

  def encode_text(self, texts: Sequence[str], *, region: bool = False) -> np.ndarray:
    """(n, E) L2-normalised. `region=True` for phrases to be compared with regions, False for whole-image captions."""
    return self.functions.encode_text(self.params, _texts(texts, 'encode_text'), region=region)

  def embed_regions(self, image: Images, boxes) -> np.ndarray | list[np.ndarray]:
    """Embeds boxes of encoded images.

    Args:
      image: from `encode_image`.
      boxes: (n, 4) xyxy in pixels of the original image, cut at its border; for a batch, a list of such arrays, one an
        image.

    Returns:
      (n, E) L2-normalised; for a batch, a list of them.

    Raises:
      ValueError: on boxes of another shape or without area in the image, or a model without a region branch.
    """
    per_image = self._boxes(image, boxes)
    count = _bucket(max(map(len, per_image), default=1))
    canvas = np.tile(np.float32([0, 0, 1, 1]), (len(image.embedding.z), count, 1))
    for i, (geometry, own) in enumerate(zip(image.geometry, per_image)):
      canvas[i, :len(own)] = geometry.boxes_to_canvas(own)
    z = np.asarray(self.functions.embed_regions(self.params, image.embedding, canvas))
    out = [z[i, :len(own)] for i, own in enumerate(per_image)]
    return out[0] if image.single else out

  def ground(self, image: Images, phrases) -> Grounded | list[Grounded]:
    """Finds the box of each phrase.

    Args:
      image: from `encode_image`.
      phrases: a list of texts; for a batch, a list of such lists, one an image.

    Raises:
      ValueError: when the model has no box head.
    """
    if not self.functions.can_ground:
      raise ValueError(f'ground: this model has no box head (region_encoder={self.functions.model.region_encoder!r})')
    lists = [_texts(phrases, 'ground')] if image.single else [_texts(p, 'ground') for p in phrases]
    self._check_count(image, lists, 'phrases')
    count = _bucket(max(map(len, lists), default=1))
    z_text = np.zeros((len(image.embedding.z), count, self.functions.model.embed_dim), np.float32)
    z_text[..., 0] = 1
    for i, own in enumerate(lists):
      if own:
        z_text[i, :len(own)] = self.encode_text(own, region=True)
    boxes, scores = map(np.asarray, self.functions.ground(self.params, image.embedding, z_text))
    out = [Grounded(boxes=g.boxes_from_canvas(boxes[i, :len(own)]), scores=scores[i, :len(own)])
           for i, (g, own) in enumerate(zip(image.geometry, lists))]
    return out[0] if image.single else out

  def classify_regions(self, image: Images, boxes, names: Sequence[str]) -> Classified | list[Classified]:
    """Names each box with the most similar of `names`; boxes as in `embed_regions`."""
    names = _texts(names, 'classify_regions')
    if not names:
      raise ValueError('classify_regions: expected at least one name, got none')
    z_names = self.encode_text(names, region=True)
    z = self.embed_regions(image, boxes)
    out = [self._classify(own, z_names, names) for own in ([z] if image.single else z)]
    return out[0] if image.single else out

  def similarity(self, z_a: np.ndarray, z_b: np.ndarray) -> np.ndarray:
    """Cosines of two sets of embeddings: (n, E), (m, E) → (n, m)."""
    return np.asarray(z_a) @ np.asarray(z_b).T

  def _classify(self, z, z_names, names):
    cosine = self.similarity(z, z_names)
    scale = float(np.exp(np.asarray(self.params.get('region_t', self.params['t']))))
    logits = scale * (cosine - cosine.max(-1, keepdims=True)) if len(cosine) else cosine
    exp = np.exp(logits)
    best = cosine.argmax(-1)
    return Classified(labels=[names[i] for i in best], scores=cosine.max(-1) if len(cosine) else cosine[:, 0],
                      probabilities=exp / exp.sum(-1, keepdims=True))

  def _boxes(self, image, boxes):
    if not self.functions.can_embed_regions:
      raise ValueError("embed_regions: this model has region_encoder='none'; it embeds whole images only")
    lists = [boxes] if image.single else list(boxes)
    self._check_count(image, lists, 'boxes')
    out = []
    for i, (own, geometry) in enumerate(zip(lists, image.geometry)):
      own = np.asarray(own, np.float32)
      own = own.reshape(0, 4) if own.size == 0 else own
      if own.ndim != 2 or own.shape[1] != 4:
        raise ValueError(f'boxes of image {i}: expected (n, 4) xyxy in pixels, got shape {own.shape}')
      # As in training: what reaches out of the image lies on padding, which is no part of it.
      inside = np.clip(own, 0, np.float32([geometry.width, geometry.height] * 2))
      bad = ~np.isfinite(own).all(-1) | (inside[:, 2:] <= inside[:, :2]).any(-1)
      if bad.any():
        raise ValueError(f'boxes of image {i}: {own[bad][0].tolist()} has no area inside the image of '
                         f'{geometry.width}×{geometry.height} pixels; expected xyxy with left < right and top < bottom')
      out.append(inside)
    return out

  def _check_count(self, image, lists, what):
    if len(lists) != len(image.geometry):
      raise ValueError(f'{what}: expected one list for each of {len(image.geometry)} images, got {len(lists)}')


def _texts(texts, where):
  found = texts if isinstance(texts, str) else list(texts)  # an iterator can be read once
  if isinstance(found, str) or not all(isinstance(t, str) for t in found):
    raise TypeError(f'{where}: expected a list of texts, got {found!r:.80}')
  return found


def build_model(config, *, tokenizer) -> ClocModel:
  """The model of an experiment's config."""
  section = {k: v for k, v in config['model'].items() if k not in INIT_KEYS}
  return config_lib.call(models.build, section, name='model', vocab_size=tokenizer.vocab_size,
                         eos_id=tokenizer.eos_id, text_length=config['data']['text_length'])


def _check_fit(model, params, preprocessing, *, where):
  """Raises ArchitectureError with the ± difference when the parameters are not the model's."""
  batch = abstract_batch(batch_size=1, image_size=preprocessing.image_size, text_length=preprocessing.text_length,
                         regions=1, region_text_length=preprocessing.region_text_length)
  text = trees.difference(jax.eval_shape(model.init, jax.random.key(0), batch)['params'], params)
  if text:
    raise checkpoint.ArchitectureError(f'{where}: the parameters do not fit the config that lies beside them '
                                       f'(- expected and missing, + unexpected, ! other shape):\n{text}')


def load(path: str | os.PathLike, *, step: int | None = None) -> Cloc:
  """Loads a checkpoint.

  Args:
    path: a run's folder, its checkpoints folder, or the folder of one step.
    step: which; the newest by default.

  Raises:
    FileNotFoundError: when there is no checkpoint, or no such step. CheckpointError: when it is damaged, or does not
      fit its own config.
  """
  folder, named = checkpoint.find(path)
  keeper = checkpoint.Checkpointer(folder, read_only=True)
  try:
    step = named if step is None else step
    step = keeper.steps[-1] if step is None else step
    if step not in keeper.steps:
      raise FileNotFoundError(f'{folder}: no step {step}; it holds {keeper.steps}')
    info, params = keeper.info(step), keeper.restore_params(step)
  finally:
    keeper.close()
  tokenizer = tokenizer_lib.Tokenizer.from_dict(info['tokenizer'])
  model = build_model(info['config'], tokenizer=tokenizer)
  preprocessing = Preprocessing(**info['preprocessing'])
  _check_fit(model, params, preprocessing, where=f'{folder}, step {step}')
  return Cloc(model, params, tokenizer=tokenizer, preprocessing=preprocessing,
              info={**info, 'step': step, 'path': os.fspath(folder)})
