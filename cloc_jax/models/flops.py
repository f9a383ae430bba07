"""Floating-point operations by formula: what a step must do, whatever a compiler makes of it.

A multiply-add counts as two. Matrix products alone are counted (norms, softmax and activations are left out, as is
usual for model FLOPs), so utilisation computed from these figures is a lower bound.
"""
import dataclasses

from cloc_jax.models.cloc import Cloc
from cloc_jax.models.text import decode_variant as _text_variant
from cloc_jax.models.vit import ViT


@dataclasses.dataclass(frozen=True)
class StepFlops:
  """Forward FLOPs of one image and its texts, by part. `train` adds the backward pass (twice the forward)."""
  image_tower: float
  text_tower: float
  region_text: float
  prompter: float
  losses: float

  @property
  def forward(self) -> float:
    return self.image_tower + self.text_tower + self.region_text + self.prompter + self.losses

  @property
  def train(self) -> float:
    return 3 * self.forward


def transformer(*, tokens: int, width: int, depth: int, mlp_dim: int) -> float:
  """`depth` blocks over one sequence: projections 8·T·D², MLP 4·T·D·H, attention 4·T²·D."""
  return depth * (8 * tokens * width**2 + 4 * tokens * width * mlp_dim + 4 * tokens**2 * width)


def recomputed(*, tokens: int, width: int, depth: int, mlp_dim: int, remat: str) -> float:
  """What the backward pass of `depth` blocks computes again. 'dots' keeps products with parameters, and so repeats the
  attention's own two; 'full' repeats all but the MLP's second product, whose result no gradient needs."""
  attention, others = 4 * tokens**2 * width, 8 * tokens * width**2 + 2 * tokens * width * mlp_dim
  return depth * {'none': 0, 'dots': attention, 'full': attention + others}[remat]


def prompter(*, patches: int, width: int, out_dim: int, prompts: int, tokens: int, pool: str, shared: bool = True,
             state: bool = True) -> float:
  """The Prompter on one image: `prompts` prompts of `tokens` tokens each; see models/prompter.py for the derivation.

  shared: the fast form; False for the literal layer per prompt. state: count what prompts share (once an image).
  """
  n, d, p = patches, width, tokens
  if not shared:
    return prompts * (24 * (n + p) * d**2 + 4 * (n + p)**2 * d + 2 * d * out_dim)
  total = 4 * n * d**2 if state else 0.0
  each = 24 * p * d**2 + 4 * p * (n + p) * d + 2 * d * out_dim
  if pool == 'all':
    total += (4 * n * d**2 + 4 * n**2 * d + 16 * n * d**2) if state else 0.0
    # Scores, the rank-P update over D and 4D, and the second MLP product of the mean.
    each += 2 * n * p * d + 2 * n * (p + 1) * 5 * d + p * 10 * d**2 + 8 * d**2
  return total + prompts * each


def image_tokens(model: Cloc, image_size: int) -> int:
  """How many tokens the image tower sees."""
  return (image_size // ViT(**model.image).sizes().patch)**2 + (model.image.get('pool', 'tok') == 'tok')


def _image_blocks(model: Cloc, image_size: int) -> dict[str, int]:
  v = ViT(**model.image).sizes()
  return dict(tokens=image_tokens(model, image_size), width=v.width, depth=v.depth, mlp_dim=v.mlp_dim)


def _text_blocks(model: Cloc, length: int) -> dict[str, int]:
  width, depth, _ = _text_variant(model.text.get('variant', 'B'))
  width, depth = model.text.get('width') or width, model.text.get('depth') or depth
  return dict(tokens=length, width=width, depth=depth, mlp_dim=model.text.get('mlp_dim') or 4 * width)


def step_recomputed(model: Cloc, *, image_size: int, text_length: int, region_text_length: int, regions: int) -> float:
  """FLOPs an image that the towers' remat adds to a step."""
  again = lambda tower, blocks: recomputed(**blocks, remat=tower.get('remat', 'none'))
  regions = regions if model.region_encoder != 'none' else 0
  return (again(model.image, _image_blocks(model, image_size)) + again(model.text, _text_blocks(model, text_length))
          + regions * again(model.text, _text_blocks(model, region_text_length)))


def step_flops(model: Cloc, *, image_size: int, text_length: int, region_text_length: int, regions: int,
               batch_size: int) -> StepFlops:
  """Forward FLOPs an image at a global batch of `batch_size` (the contrastive matrices grow with it)."""
  v = ViT(**model.image).sizes()
  patches = (image_size // v.patch)**2
  e = model.embed_dim
  image = (2 * patches * v.patch**2 * 3 * v.width + transformer(**_image_blocks(model, image_size)) + 2 * v.width * e)

  def per_text(length):
    blocks = _text_blocks(model, length)
    return transformer(**blocks) + 2 * blocks['width'] * e

  region_text = prompt = losses = 0.0
  if model.region_encoder != 'none':
    region_text = regions * per_text(region_text_length)
    losses += 2 * 2 * regions**2 * batch_size * e  # similarities, and the texts' own for the filter
  if model.region_encoder == 'prompter':
    pool = model.prompter.get('pool', 'all')
    kw = dict(patches=patches, width=v.width, out_dim=e, prompts=regions, pool=pool)
    prompt = prompter(tokens=2, **kw) + prompter(tokens=1, state=False, **kw)
  return StepFlops(image_tower=image, text_tower=per_text(text_length), region_text=region_text, prompter=prompt,
                   losses=losses + 2 * batch_size * e)
