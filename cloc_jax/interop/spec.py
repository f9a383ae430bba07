"""What a foreign config says about a dual encoder, in the terms of our models."""
import dataclasses
from typing import Any

from cloc_jax.models.cloc import CLIP_MEAN, CLIP_STD

SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)
ACTS = {'quick_gelu': 'quick_gelu', 'gelu': 'gelu', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu_new': 'gelu_tanh',
        'gelu_fast': 'gelu_tanh'}


@dataclasses.dataclass(frozen=True)
class Spec:
  """A dual encoder.

  family: of the name map that its weights are read with.
  image, text: keywords of vit.ViT and text.TextTower. embed_dim: E.
  image_size: side of the square that all its patches cover, pixels. text_length: tokens, also the longest.
  eos_id: what the text tower pools at; None is the tokenizer's own end token.
  mean, std: of pixels between 0 and 1. notes: what a user should know about the reading.
  """
  family: str
  image: dict[str, Any]
  text: dict[str, Any]
  embed_dim: int
  image_size: int
  text_length: int
  eos_id: int | None = None
  mean: tuple[float, ...] = CLIP_MEAN
  std: tuple[float, ...] = CLIP_STD
  notes: tuple[str, ...] = ()

  @property
  def depths(self) -> dict[str, int]:
    return {'img': self.image['depth'], 'txt': self.text['depth']}

  @property
  def heads(self) -> dict[str, int]:
    return {'img': self.image['heads'], 'txt': self.text['heads']}

  @property
  def siglip(self) -> bool:
    """Pooled at the last position, padding and all: its texts are padded to full length, always."""
    return self.text['pool'] == 'last'

  def model_section(self, **options) -> dict[str, Any]:
    """`config.model` of this encoder as plain CLIP; options go on top."""
    text = dict(self.text)
    if self.eos_id is not None:
      text['eos_id'] = self.eos_id
    return {'image': dict(self.image), 'text': text, 'embed_dim': self.embed_dim, 'region_encoder': 'none',
            'image_mean': self.mean, 'image_std': self.std, **options}


def image_tower(*, width: int, depth: int, mlp_dim: int, heads: int, patch: int, pool: str, act: str, ln_eps: float,
                **more) -> dict[str, Any]:
  """Keywords of vit.ViT; every size is written out, the variant's name only carries the patch."""
  return dict(variant=f'B/{patch}', width=width, depth=depth, mlp_dim=mlp_dim, heads=heads, pool=pool, posemb='learn',
              act=act, ln_eps=ln_eps, **more)


def text_tower(*, width: int, depth: int, mlp_dim: int, heads: int, vocab_size: int, max_length: int, pool: str,
               act: str, ln_eps: float) -> dict[str, Any]:
  """Keywords of text.TextTower, its vocabulary and its longest text among them: a tokenizer may hold fewer ids."""
  return dict(variant='B', width=width, depth=depth, mlp_dim=mlp_dim, heads=heads, vocab_size=vocab_size,
              max_length=max_length, pool=pool, act=act, ln_eps=ln_eps)


def activation(name: str, *, where: str) -> str:
  """Their name of an activation → ours.

  Raises:
    ValueError: on one that our models do not have.
  """
  if name not in ACTS:
    raise ValueError(f'{where}: expected an activation of {sorted(ACTS)}, got {name!r}')
  return ACTS[name]
