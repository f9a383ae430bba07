"""The joint model: towers, Prompter (or RoI-Align), box head, temperature."""
import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cloc_jax.batch import Batch, Outputs
from cloc_jax.models import heads, layers, prompter, text, vit

REGION_ENCODERS = ('prompter', 'roi_align', 'none')
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_LOG_SCALE = math.log(100.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ImageEmbedding:
  """An encoded image. z: (B, E) L2-normalised float32; tokens: (B, N, D); state: what its prompts share, or None."""
  z: Any
  tokens: Any
  state: Any


class Cloc(nn.Module):
  """CLOC (SPEC §2). `image` and `text` are keyword dictionaries of vit.ViT and text.TextTower.

  embed_dim: E. region_encoder: 'prompter'; 'roi_align' (the paper's ablation; no text prompts, so no grounding);
  'none' (plain CLIP). prompter: keywords of prompter.Prompter. box_head_width: hidden width; 0 is E.
  separate_temperature: a temperature of its own for the region-text loss instead of a shared one.
  init_scale, init_bias: of the similarity, 1/0.07 and 0 for softmax, 10 and -10 for the sigmoid loss.
  """
  image: dict[str, Any]
  text: dict[str, Any]
  embed_dim: int = 512
  region_encoder: str = 'prompter'
  prompter: dict[str, Any] = dataclasses.field(default_factory=dict)
  box_head_width: int = 0
  separate_temperature: bool = False
  init_scale: float = 1 / 0.07
  init_bias: float = 0.0
  image_mean: tuple[float, float, float] = CLIP_MEAN
  image_std: tuple[float, float, float] = CLIP_STD
  dtype: Any = jnp.float32

  def setup(self):
    if self.region_encoder not in REGION_ENCODERS:
      raise ValueError(f'region_encoder: expected one of {REGION_ENCODERS}, got {self.region_encoder!r}')
    # SigLIP has no projection: its config sets out_dim=0 and an embed_dim equal to the width.
    self.img = vit.ViT(**{'out_dim': self.embed_dim, **self.image}, dtype=self.dtype, name='img')
    if not self.image.get('out_dim', self.embed_dim) and self.img.sizes().width != self.embed_dim:
      raise ValueError(f'embed_dim: an image tower without projection (out_dim=0) gives its width, '
                       f'{self.img.sizes().width}, but embed_dim is {self.embed_dim}')
    self.txt = text.TextTower(**self.text, out_dim=self.embed_dim, dtype=self.dtype, name='txt')
    if self.region_encoder == 'prompter':
      self.prompt = prompter.Prompter(width=self.img.sizes().width, out_dim=self.embed_dim, dtype=self.dtype,
                                      name='prompter', **self.prompter)
      self.box_head = heads.BoxHead(self.box_head_width or self.embed_dim, name='box_head')
    elif self.region_encoder == 'roi_align':
      self.roi_head = heads.RoIAlignHead(self.embed_dim, name='roi_head')
    log_scale = nn.initializers.constant(math.log(self.init_scale))
    bias = nn.initializers.constant(self.init_bias)
    self.t = self.param('t', log_scale, ())
    self.b = self.param('b', bias, ())
    if self.separate_temperature:
      self.region_t = self.param('region_t', log_scale, ())
      self.region_b = self.param('region_b', bias, ())

  def encode_image(self, image) -> ImageEmbedding:
    """(B, H, W, 3) uint8 canvases → ImageEmbedding, to be prompted as often as one likes."""
    mean, std = (255 * jnp.asarray(v, jnp.float32).reshape(1, 1, 1, 3) for v in (self.image_mean, self.image_std))
    pooled, tokens = self.img((image.astype(jnp.float32) - mean) / std)
    state = self.prompt.image_state(tokens) if self.region_encoder == 'prompter' else None
    return ImageEmbedding(layers.l2_normalize(pooled), tokens, state)

  def encode_text(self, text_bl):
    """(B, L) int32 → (B, E), L2-normalised float32."""
    return layers.l2_normalize(self.txt(text_bl))

  def embed_patches(self, image: ImageEmbedding):
    """Patches in the joint space, in their grid: (B, h, w, E) float32, not normalised; see vit.embed_patches."""
    z = vit.embed_patches(self.img, self.img.variables['params'], image.tokens).astype(jnp.float32)
    grid = round(z.shape[1]**0.5)
    return z.reshape(z.shape[0], grid, grid, -1)

  def embed_regions(self, image: ImageEmbedding, boxes_bm4):
    """Boxes (B, M, 4) xyxy on the canvas → (B, M, E), L2-normalised.

    Raises:
      ValueError: if the model was built without a region branch.
    """
    if self.region_encoder == 'prompter':
      tokens = self.prompt.box_tokens(boxes_bm4, grid=round(image.tokens.shape[1]**0.5))
      return layers.l2_normalize(self.prompt(image.state, tokens))
    if self.region_encoder == 'roi_align':
      return layers.l2_normalize(self.roi_head(image.tokens, boxes_bm4))
    raise ValueError("embed_regions: this model has region_encoder='none'; it embeds whole images only")

  def ground(self, image: ImageEmbedding, z_text_bme):
    """Normalised text embeddings (B, M, E) → boxes (B, M, 4) in (0, 1), xyxy on the canvas.

    Raises:
      ValueError: if the model has no Prompter.
    """
    if self.region_encoder != 'prompter':
      raise ValueError(f'ground: text prompts need the Prompter, this model has {self.region_encoder!r}')
    z = layers.l2_normalize(self.prompt(image.state, self.prompt.text_tokens(z_text_bme)))
    # The head sees the embedding as similarities do, without its length, at unit variance.
    return self.box_head(z * math.sqrt(self.embed_dim))

  def __call__(self, batch: Batch) -> Outputs:
    """Everything the losses need of one batch."""
    image = self.encode_image(batch.image)
    z_text = self.encode_text(batch.text)
    z_region = z_region_text = pred_boxes = None
    if self.region_encoder != 'none':
      b, m, length = batch.region_text.shape
      # B leads in the flattening, so that a batch sharded over images stays sharded.
      z_region_text = self.encode_text(batch.region_text.reshape(b * m, length)).reshape(b, m, -1)
      z_region = self.embed_regions(image, batch.boxes)
      if self.region_encoder == 'prompter':
        pred_boxes = self.ground(image, z_region_text)
    region_t, region_b = (self.region_t, self.region_b) if self.separate_temperature else (self.t, self.b)
    return Outputs(z_image=image.z, z_text=z_text, z_region=z_region, z_region_text=z_region_text,
                   pred_boxes=pred_boxes, logit_scale=jnp.exp(self.t), logit_bias=self.b,
                   region_logit_scale=jnp.exp(region_t), region_logit_bias=region_b)
