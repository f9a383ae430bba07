"""What is exported, and what both sides of an export are run on."""
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from cloc_jax import trees
from cloc_jax.geometry import Geometry
from cloc_jax.models import posemb, text, vit
from cloc_jax.models.cloc import Cloc

# Ours → the name that transformers' configs have for it.
HF_ACTS = {'gelu_tanh': 'gelu_pytorch_tanh', 'gelu': 'gelu', 'quick_gelu': 'quick_gelu'}


@dataclasses.dataclass(frozen=True)
class Source:
  """A model with everything that goes out with it; made by `make`.

  params: float32 NumPy, with img/pos_embedding also where the model computes positions instead of learning them.
  image, text: the towers as Flax modules, for their settings. image_size, pad, text_length, region_text_length: as in
  inference.Preprocessing.
  """
  model: Cloc
  params: dict[str, Any]
  tokenizer: Any
  image: vit.ViT
  text: text.TextTower
  image_size: int
  pad: str
  text_length: int
  region_text_length: int

  @property
  def text_mlp_dim(self) -> int:
    return self.text.mlp_dim or 4 * self.text.sizes()[0]


def make(model: Cloc, params, *, tokenizer, image_size: int, pad: str, text_length: int,
         region_text_length: int) -> Source:
  """A Source of a model as it was trained."""
  bound = model.bind({'params': params})
  image, text_tower = bound.img, bound.txt
  flat = {path: np.asarray(x, np.float32) for path, x in trees.flatten(params).items()}
  if image.posemb == 'sincos2d':
    codes = np.asarray(posemb.patch_codes(dim=image.sizes().width, grid=image_size // image.sizes().patch))
    # The class token stands at no place.
    flat['img/pos_embedding'] = np.pad(codes, ((0, 0), (int(image.pool == 'tok'), 0), (0, 0)))
  return Source(model, trees.unflatten(flat), tokenizer, image, text_tower, image_size, pad, text_length,
                region_text_length)


@dataclasses.dataclass(frozen=True)
class Probe:
  """Real inputs, as a user has them and as our own pipeline prepares them.

  images: B PIL images of any size. boxes: of each image, (n, 4) xyxy in its pixels. texts: captions. phrases: T.
  canvases (B, S, S, 3) uint8; canvas_boxes (B, M, 4), padded with the whole canvas; geometry: of each image.
  text_ids, phrase_ids (T, L) int32. name: what to call these inputs.
  """
  images: list[Any]
  boxes: list[np.ndarray]
  texts: list[str]
  phrases: list[str]
  canvases: np.ndarray
  canvas_boxes: np.ndarray
  geometry: tuple[Geometry, ...]
  text_ids: np.ndarray
  phrase_ids: np.ndarray
  name: str


@dataclasses.dataclass(frozen=True)
class Target:
  """A format to export to.

  refuse: the reason why a model cannot be expressed in it, or None. write: (source, folder) → files. outputs: (source,
  folder, probe) → {name: array}, by the artefact as it lies on disk. how: says in the record what ran it. use: the
  Markdown of the model card that shows how to load it. needs: packages, to write it or to compare.
  """
  name: str
  refuse: Callable[[Source], str | None]
  write: Callable[..., None]
  outputs: Callable[..., dict[str, np.ndarray]]
  how: str
  use: str
  needs: tuple[str, ...] = ('torch', 'transformers', 'safetensors')


def pixel_values(source: Source, canvases: np.ndarray) -> np.ndarray:
  """(B, S, S, 3) uint8 → (B, 3, S, S) float32, scaled as the model does."""
  mean, std = (255 * np.asarray(v, np.float32) for v in (source.model.image_mean, source.model.image_std))
  return np.ascontiguousarray(((canvases.astype(np.float32) - mean) / std).transpose(0, 3, 1, 2))
