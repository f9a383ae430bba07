"""CLOC in PyTorch: image and text towers, the Prompter (or RoI-Align), and the box head. Needs torch and transformers.

  model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True)
  processor = AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)
  inputs = processor(images=image, boxes=[[x0, y0, x1, y1]])
  z = model.get_region_features(inputs['pixel_values'], inputs['boxes'])

Shapes: B images, M regions of each, N patches, L text tokens, D the image tower's width, E the joint width. Boxes are
xyxy, normalised to the square canvas that the processor puts an image on. Embeddings are L2-normalised float32.
The method: Contrastive Localized Language-Image Pre-Training, arXiv 2410.02746.
"""
import dataclasses
import functools
import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

ACTIVATIONS = {
    'gelu': F.gelu,
    'gelu_tanh': functools.partial(F.gelu, approximate='tanh'),
    'quick_gelu': lambda x: x * torch.sigmoid(1.702 * x),
}


class ClocConfig(PretrainedConfig):
  """Shapes and choices of a CLOC model.

  image: size (pixels of the canvas' side), patch, width, depth, heads, mlp_dim, pool ('tok', 'map' or 'gap'), out_dim
    (0: no projection), act, ln_eps.
  text: vocab_size, max_length, eos_id, width, depth, heads, mlp_dim, pool ('eos' or 'last'), act, ln_eps.
  prompter: pool ('all' or 'prompt'), mlp_ratio, act, ln_eps. region_encoder: 'prompter', 'roi_align' or 'none'.
  """
  model_type = 'cloc'

  def __init__(self, image=None, text=None, prompter=None, embed_dim=512, region_encoder='prompter', box_head_width=512,
               separate_temperature=False, **kwargs):
    self.image, self.text, self.prompter = dict(image or {}), dict(text or {}), dict(prompter or {})
    self.embed_dim, self.region_encoder, self.box_head_width = embed_dim, region_encoder, box_head_width
    self.separate_temperature = separate_temperature
    super().__init__(**kwargs)


@dataclasses.dataclass
class ClocOutput(ModelOutput):
  """image_embeds (B, E), image_tokens (B, N, D), text_embeds (T, E), region_embeds (B, M, E); logits_per_image (B, T)
  and logits_per_region (B, M, T): cosines times the temperature, plus the bias. What was not asked for is None."""
  image_embeds: torch.Tensor | None = None
  image_tokens: torch.Tensor | None = None
  text_embeds: torch.Tensor | None = None
  region_embeds: torch.Tensor | None = None
  logits_per_image: torch.Tensor | None = None
  logits_per_region: torch.Tensor | None = None


@dataclasses.dataclass
class ClocGrounding(ModelOutput):
  """boxes: (B, M, 4) in (0, 1), xyxy on the canvas. scores: (B, M) cosine of each text and what its box holds."""
  boxes: torch.Tensor | None = None
  scores: torch.Tensor | None = None


def l2_normalize(x):
  """x / ‖x‖ over the last axis, float32."""
  x = x.float()
  return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-12)


class Float32Linear(nn.Linear):
  """A dense layer that computes in float32 whatever the weights are stored in: positions need more than bfloat16."""

  def forward(self, x):
    return F.linear(x.float(), self.weight.float(), None if self.bias is None else self.bias.float())


class Attention(nn.Module):
  """Multi-head attention; over x itself without `context`."""

  def __init__(self, width, heads):
    super().__init__()
    self.heads = heads
    self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

  def forward(self, x, context=None, causal=False):
    context = x if context is None else context
    split = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
    y = F.scaled_dot_product_attention(split(self.query(x)), split(self.key(context)), split(self.value(context)),
                                       is_causal=causal)
    return self.out(y.transpose(1, 2).flatten(2))


class Mlp(nn.Module):

  def __init__(self, width, hidden, act):
    super().__init__()
    self.fc1, self.fc2, self.act = nn.Linear(width, hidden), nn.Linear(hidden, width), ACTIVATIONS[act]

  def forward(self, x):
    return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
  """Pre-norm transformer block."""

  def __init__(self, width, heads, mlp_dim, act, eps):
    super().__init__()
    self.norm1, self.norm2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
    self.attention, self.mlp = Attention(width, heads), Mlp(width, mlp_dim, act)

  def forward(self, x, causal=False):
    x = x + self.attention(self.norm1(x), causal=causal)
    return x + self.mlp(self.norm2(x))


class AttentionPool(nn.Module):
  """SigLIP's head: one learned probe attends to all tokens."""

  def __init__(self, width, heads, mlp_dim, act, eps):
    super().__init__()
    self.probe = nn.Parameter(torch.zeros(1, 1, width))
    self.attention, self.norm = Attention(width, heads), nn.LayerNorm(width, eps=eps)
    self.mlp = Mlp(width, mlp_dim, act)

  def forward(self, x):
    x = self.attention(self.probe.expand(x.shape[0], -1, -1), x)
    return (x + self.mlp(self.norm(x)))[:, 0]


class ImageTower(nn.Module):
  """(B, 3, size, size) normalised pixels → pooled (B, E), patch tokens (B, N, D) after the final norm."""

  def __init__(self, size, patch, width, depth, heads, mlp_dim, pool, out_dim, act, ln_eps):
    super().__init__()
    self.size, self.pool = size, pool
    clip = pool == 'tok'  # OpenAI CLIP's form
    self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, bias=not clip)
    self.class_embedding = nn.Parameter(torch.zeros(width)) if clip else None
    self.position_embedding = nn.Parameter(torch.zeros((size // patch)**2 + clip, width))
    self.pre_norm = nn.LayerNorm(width, eps=ln_eps) if clip else nn.Identity()
    self.blocks = nn.ModuleList(Block(width, heads, mlp_dim, act, ln_eps) for _ in range(depth))
    self.norm = nn.LayerNorm(width, eps=ln_eps)
    self.attention_pool = AttentionPool(width, heads, mlp_dim, act, ln_eps) if pool == 'map' else None
    self.projection = nn.Linear(width, out_dim, bias=not clip) if out_dim else nn.Identity()

  def forward(self, pixel_values):
    if tuple(pixel_values.shape[1:]) != (3, self.size, self.size):
      raise ValueError(f'pixel_values: expected (B, 3, {self.size}, {self.size}), got {tuple(pixel_values.shape)}')
    weight = self.patch_embedding.weight
    x = self.patch_embedding(pixel_values.to(weight.dtype)).flatten(2).transpose(1, 2)
    if self.class_embedding is not None:
      x = torch.cat([self.class_embedding.expand(x.shape[0], 1, -1), x], 1)
    x = self.pre_norm(x + self.position_embedding)
    for block in self.blocks:
      x = block(x)
    x = self.norm(x)
    if self.pool == 'tok':
      return self.projection(x[:, 0]), x[:, 1:]
    return self.projection(self.attention_pool(x) if self.pool == 'map' else x.mean(1)), x


class TextTower(nn.Module):
  """(T, L) token ids → (T, E). 'eos' is causal and pools at the first end token; 'last' sees and pools everything."""

  def __init__(self, vocab_size, max_length, eos_id, width, depth, heads, mlp_dim, pool, act, ln_eps, out_dim):
    super().__init__()
    self.eos_id, self.causal, self.max_length = eos_id, pool == 'eos', max_length
    self.token_embedding = nn.Embedding(vocab_size, width)
    self.position_embedding = nn.Parameter(torch.zeros(max_length, width))
    self.blocks = nn.ModuleList(Block(width, heads, mlp_dim, act, ln_eps) for _ in range(depth))
    self.norm = nn.LayerNorm(width, eps=ln_eps)
    self.projection = nn.Linear(width, out_dim, bias=not self.causal)

  def forward(self, input_ids):
    length = input_ids.shape[1]
    if length > self.max_length:
      raise ValueError(f'input_ids: {length} tokens, but this tower has {self.max_length} positions')
    x = self.token_embedding(input_ids) + self.position_embedding[:length]
    for block in self.blocks:
      x = block(x, causal=self.causal)
    if not self.causal:
      return self.projection(self.norm(x[:, -1]))
    is_end = (input_ids == self.eos_id).int()
    is_end = torch.cat([is_end[:, :-1], torch.ones_like(is_end[:, :1])], 1)  # the last position where none ends
    at = is_end.argmax(1)[:, None, None].expand(-1, 1, x.shape[-1])
    return self.projection(self.norm(x.gather(1, at)[:, 0]))


@functools.lru_cache
def _frequencies(width, grid):
  """Radians a patch, width/4 of them: periods from 2 × grid patches down to 2, geometric."""
  longest, count = max(2.0 * grid, 4.0), width // 4
  return tuple(2 * math.pi / (longest * (2.0 / longest)**(i / max(count - 1, 1))) for i in range(count))


def _project(x, linear, bias=True):
  """A product in the weights' precision, its result in float32."""
  y = F.linear(x.to(linear.weight.dtype), linear.weight).float()
  return y + linear.bias.float() if bias else y


class Prompter(nn.Module):
  """Image tokens and prompts → region embeddings (B, M, E), before normalisation.

  One pre-norm transformer layer with one head over a prompt's P tokens (two for a box, one for a text) and the image's
  N, pooled ('all': over all outputs; 'prompt': over the prompt's own) and projected. What the prompts of an image share
  is computed once. With 'all', a prompt changes an image token's attention by P further terms of its softmax, so the
  products with the layer's matrices are made once for the image and once for the prompt, and only merged, elementwise,
  for each pair. The outcome is that of the layer as described.

  chunk: prompts of an image at a time; each needs (N, 4·D) floats for a moment. None: all at once.
  """

  def __init__(self, width, out_dim, grid, pool, mlp_ratio, act, ln_eps):
    super().__init__()
    self.grid, self.pool, self.scale, self.chunk = grid, pool, width**-0.5, 16
    self.box_embedding = Float32Linear(2 * width, width, bias=False)
    self.corner_bias = nn.Parameter(torch.zeros(2, width))
    self.text_embedding = Float32Linear(out_dim, width)
    self.norm1, self.norm2 = nn.LayerNorm(width, eps=ln_eps), nn.LayerNorm(width, eps=ln_eps)
    self.attention, self.mlp = Attention(width, 1), Mlp(width, mlp_ratio * width, act)
    self.projection = Float32Linear(width, out_dim, bias=False)

  def box_tokens(self, boxes):
    """(B, M, 4) → (B, M, 2, D): each corner's token sees its own position code and the other's."""
    corners = boxes.float().unflatten(-1, (2, 2))
    waves = torch.tensor(_frequencies(self.corner_bias.shape[1], self.grid), device=boxes.device)
    angles = (corners * self.grid)[..., None] * waves
    codes = torch.cat([angles.sin(), angles.cos()], -1).flatten(-2)
    return self.box_embedding(torch.cat([codes, codes.flip(2)], -1)) + self.corner_bias.float()

  def text_tokens(self, text_features):
    """(B, M, E) normalised → (B, M, 1, D)."""
    return self.text_embedding(text_features.float() * math.sqrt(text_features.shape[-1]))[:, :, None]

  def forward(self, image_tokens, prompts):
    image = self._image_state(image_tokens)
    if self.chunk is None or prompts.shape[1] <= self.chunk:
      return self.projection(self._pooled(image, prompts))
    return self.projection(torch.cat([self._pooled(image, part) for part in prompts.split(self.chunk, 1)], 1))

  def _norm(self, norm, x):
    return F.layer_norm(x.float(), x.shape[-1:], norm.weight.float(), norm.bias.float(), norm.eps)

  def _image_state(self, tokens):
    h = self._norm(self.norm1, tokens)
    state = {'keys': _project(h, self.attention.key), 'values': _project(h, self.attention.value)}
    if self.pool == 'prompt':
      return state
    queries = _project(h, self.attention.query)
    logits = queries @ state['keys'].transpose(1, 2) * self.scale
    peak = logits.amax(-1)
    weights = (logits - peak[..., None]).exp()
    # The token itself with the output bias, and what it reads from the image, not yet divided by the softmax's sum.
    base = tokens.float() + self.attention.out.bias.float()
    update = _project(weights @ state['values'], self.attention.out, bias=False)
    return {**state, 'queries': queries, 'peak': peak, 'sum': weights.sum(-1), 'base': base, 'update': update,
            'base_hidden': self._hidden(base), 'update_hidden': self._hidden(update)}

  def _hidden(self, x):
    """Through the second norm's gain and the MLP's first product: the part of it that is linear."""
    return _project(x * self.norm2.weight.float(), self.mlp.fc1, bias=False)

  def _pooled(self, image, prompts):
    h = self._norm(self.norm1, prompts)
    queries, keys, values = (_project(h, part) for part in (self.attention.query, self.attention.key,
                                                            self.attention.value))
    own = self._prompt_rows(image, prompts, queries, keys, values)
    if self.pool == 'prompt':
      return own.mean(2)
    count = image['keys'].shape[1] + prompts.shape[2]
    return (self._image_rows_sum(image, keys, values) + own.sum(2)) / count

  def _prompt_rows(self, image, prompts, queries, keys, values):
    """(B, M, P, D): the outputs of the prompts' tokens, which attend to the image and to one another."""
    to_image = torch.einsum('bmpd,bnd->bmpn', queries, image['keys'])
    to_prompt = torch.einsum('bmpd,bmrd->bmpr', queries, keys)
    weights = (torch.cat([to_image, to_prompt], -1) * self.scale).softmax(-1)
    n = image['keys'].shape[1]
    read = torch.einsum('bmpn,bnd->bmpd', weights[..., :n], image['values'])
    read = read + torch.einsum('bmpr,bmrd->bmpd', weights[..., n:], values)
    x = prompts + _project(read, self.attention.out)
    hidden = self.mlp.act(_project(self._norm(self.norm2, x), self.mlp.fc1))
    return x + _project(hidden, self.mlp.fc2)

  def _image_rows_sum(self, image, keys, values):
    """(B, M, D): the sum of the image tokens' outputs, each attending to the image and to a prompt's P tokens."""
    logits = torch.einsum('bnd,bmpd->bmnp', image['queries'], keys) * self.scale
    peak = torch.maximum(image['peak'][:, None], logits.amax(-1))
    to_prompt = (logits - peak[..., None]).exp()
    to_image = (image['peak'][:, None] - peak).exp()
    total = to_image * image['sum'][:, None] + to_prompt.sum(-1)
    to_image, to_prompt = (to_image / total)[..., None], to_prompt / total[..., None]      # (B, M, N, 1), (B, M, N, P)
    update = _project(values, self.attention.out, bias=False)                               # (B, M, P, D)
    merge = lambda base, own, new: base[:, None] + to_image * own[:, None] + to_prompt @ new
    x = merge(image['base'], image['update'], update)                                       # (B, M, N, D)
    hidden = merge(image['base_hidden'], image['update_hidden'], self._hidden(update))      # (B, M, N, 4D)
    # The second norm, applied behind the product: its mean and deviation are two numbers a token.
    ones = torch.ones_like(self.norm2.weight, dtype=torch.float32)
    offset = _project(self.norm2.bias[None], self.mlp.fc1)
    mean = x.mean(-1, keepdim=True)
    inverse = torch.rsqrt((x - mean).square().mean(-1, keepdim=True) + self.norm2.eps)
    hidden = self.mlp.act((hidden - mean * self._hidden(ones)) * inverse + offset)
    summed = _project(hidden.sum(2), self.mlp.fc2, bias=False)
    return x.sum(2) + summed + x.shape[2] * self.mlp.fc2.bias.float()


class RoIAlign(nn.Module):
  """Boxes → the mean of 7×7 RoI-Align bins (2×2 samples each, aligned) of the image tokens, projected: (B, M, E)."""

  def __init__(self, width, out_dim, bins=7, samples=2):
    super().__init__()
    self.points = bins * samples
    self.projection = Float32Linear(width, out_dim, bias=False)

  def _weights(self, low, high, cells):
    """(B, M, cells): what each row or column of the feature map counts for, by bilinear interpolation."""
    fractions = (torch.arange(self.points, device=low.device) + 0.5) / self.points
    at = (low[..., None] + (high - low)[..., None] * fractions) * cells - 0.5
    at = at.clamp(0, cells - 1)
    return (1 - (at[..., None] - torch.arange(cells, device=low.device)).abs()).clamp(min=0).mean(-2)

  def forward(self, image_tokens, boxes):
    grid = math.isqrt(image_tokens.shape[1])
    x0, y0, x1, y1 = boxes.float().unbind(-1)
    features = image_tokens.float().unflatten(1, (grid, grid))
    columns = torch.einsum('bmh,bhwd->bmwd', self._weights(y0, y1, grid), features)
    return self.projection((self._weights(x0, x1, grid)[:, :, None] @ columns)[:, :, 0])


class BoxHead(nn.Module):
  """Text-prompted region embedding (…, E) → box (…, 4) in (0, 1)."""

  def __init__(self, width, hidden):
    super().__init__()
    self.fc1, self.fc2 = Float32Linear(width, hidden), Float32Linear(hidden, 4)

  def forward(self, z):
    return self.fc2(F.gelu(self.fc1(z), approximate='tanh')).sigmoid()


class ClocModel(PreTrainedModel):
  """CLOC: one pass over an image, then the embedding of any box of it and the box of any text."""
  config_class = ClocConfig
  base_model_prefix = 'cloc'
  main_input_name = 'pixel_values'
  _supports_sdpa = True
  _no_split_modules = ['Block', 'Prompter']

  def __init__(self, config):
    super().__init__(config)
    image, e = config.image, config.embed_dim
    self.image = ImageTower(**image)
    self.text = TextTower(**config.text, out_dim=e)
    if config.region_encoder == 'prompter':
      self.prompter = Prompter(image['width'], e, grid=image['size'] // image['patch'], **config.prompter)
      self.box_head = BoxHead(e, config.box_head_width)
    elif config.region_encoder == 'roi_align':
      self.roi_head = RoIAlign(image['width'], e)
    names = ['logit'] + ['region_logit'] * config.separate_temperature
    for name in names:
      setattr(self, f'{name}_scale', nn.Parameter(torch.tensor(math.log(1 / 0.07))))
      setattr(self, f'{name}_bias', nn.Parameter(torch.tensor(0.0)))
    self.post_init()

  def get_image_tokens(self, pixel_values):
    """(B, 3, size, size) from the processor → (B, N, D): patch tokens after the final norm, row by row.

    Compute them once for an image, and give them to get_region_features and ground instead of the pixels.
    """
    return self.image(pixel_values)[1]

  def get_image_features(self, pixel_values):
    """(B, 3, size, size) from the processor → (B, E)."""
    return l2_normalize(self.image(pixel_values)[0])

  def get_text_features(self, input_ids):
    """(T, L) from the processor → (T, E)."""
    return l2_normalize(self.text(input_ids))

  def get_region_features(self, image, boxes):
    """Embeds boxes.

    image: pixel_values (B, 3, size, size), or the images' tokens (B, N, D). boxes: (B, M, 4) xyxy on the canvas, from
      the processor. Returns (B, M, E).
    """
    tokens = self._tokens(image)
    if boxes.ndim != 3 or boxes.shape[0] != tokens.shape[0] or boxes.shape[2] != 4:
      raise ValueError(f'boxes: expected ({tokens.shape[0]}, M, 4), got {tuple(boxes.shape)}')
    if self.config.region_encoder == 'prompter':
      return l2_normalize(self.prompter(tokens, self.prompter.box_tokens(boxes)))
    if self.config.region_encoder == 'roi_align':
      return l2_normalize(self.roi_head(tokens, boxes))
    raise ValueError('get_region_features: this model embeds whole images only (region_encoder is "none")')

  def ground(self, image, text_features):
    """Finds the box of each text.

    image: as in get_region_features. text_features: from get_text_features; (M, E), the same texts for every image, or
      (B, M, E). Returns a ClocGrounding.
    """
    if self.config.region_encoder != 'prompter':
      raise ValueError(f'ground: texts are found by a Prompter, this model has {self.config.region_encoder!r}')
    tokens = self._tokens(image)
    z_text = text_features if text_features.ndim == 3 else text_features.expand(tokens.shape[0], -1, -1)
    z = l2_normalize(self.prompter(tokens, self.prompter.text_tokens(z_text)))
    boxes = self.box_head(z * math.sqrt(z.shape[-1]))
    found = self.get_region_features(tokens, boxes)
    return ClocGrounding(boxes=boxes, scores=(found * z_text.float()).sum(-1))

  def forward(self, pixel_values=None, input_ids=None, boxes=None, original_sizes=None, box_mask=None,
              return_dict=True):
    """Whatever the inputs allow; texts (T, L) are compared with every image and region. The processor's original_sizes
    and box_mask may be given and are not used: padding boxes are embedded like any other."""
    found = {}
    if input_ids is not None:
      found['text_embeds'] = z_text = self.get_text_features(input_ids)
    if pixel_values is not None:
      pooled, tokens = self.image(pixel_values)
      found['image_embeds'], found['image_tokens'] = l2_normalize(pooled), tokens
      if boxes is not None:
        found['region_embeds'] = self.get_region_features(tokens, boxes)
    if input_ids is not None and pixel_values is not None:
      found['logits_per_image'] = self._logits(found['image_embeds'], z_text, 'logit')
      if boxes is not None:
        region = 'region_logit' if self.config.separate_temperature else 'logit'
        found['logits_per_region'] = self._logits(found['region_embeds'], z_text, region)
    out = ClocOutput(**found)
    return out if return_dict else out.to_tuple()

  def _logits(self, z, z_text, name):
    return getattr(self, f'{name}_scale').float().exp() * (z @ z_text.T) + getattr(self, f'{name}_bias').float()

  def _tokens(self, image):
    return self.get_image_tokens(image) if image.ndim == 4 else image
