"""Boxes and points as words of a language model: a region's embedding stands where the prompt says <region0>.

One file to copy: it needs torch, and CLOC in PyTorch (`cloc export … --to hf-cloc`). A region costs one token, made by
CLOC's Prompter in place of Ferret's visual sampler (Ferret: arXiv 2310.07704; the Prompter in it: arXiv 2410.02746).

  regions = RegionTokens(cloc, width)                       # width: of the language model's embeddings
  ids = add_placeholders(tokenizer, model)                  # <region0> … <region7>
  boxes, mask = pad([to_canvas([[x0, y0, x1, y1], [x, y]], image.size[::-1], image_processor)])
  embeds = place(embeds, input_ids, ids, regions(image_tokens, boxes), mask)

Shapes: B prompts, each with its image; M regions; N image tokens of width D; L tokens of text; W the language model's
width. Boxes are xyxy, normalised to the square canvas that CLOC's image processor puts an image on.
"""
import math
import re

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

PLACEHOLDER = '<region{}>'
LAST_CELL = 999  # coordinates in text are whole numbers from 0 to it
POINT_SIDE = 1 / 16


class RegionTokens(nn.Module):
  """The Prompter's embedding of a box, projected to the language model: (B, N, D), (B, M, 4) → (B, M, W).

  cloc: a model of an hf-cloc folder. Its Prompter is taken over, not copied, and trains if its parameters ask for
    gradients; the towers are not kept.
  """

  def __init__(self, cloc, width):
    super().__init__()
    if cloc.config.region_encoder != 'prompter':
      raise ValueError(f'region tokens come from a Prompter, this model has {cloc.config.region_encoder!r}')
    self.prompter = cloc.prompter
    self.project = nn.Sequential(nn.Linear(cloc.config.embed_dim, width), nn.GELU(), nn.Linear(width, width))

  def forward(self, image_tokens, boxes):
    """image_tokens: the tower's patch tokens after its final norm (see `tower_tokens`)."""
    with torch.autocast(boxes.device.type, enabled=False):  # positions need more than half precision
      z = self.prompter(image_tokens, self.prompter.box_tokens(boxes))
    z = F.normalize(z.float(), dim=-1) * math.sqrt(z.shape[-1])  # unit variance, as CLOC's box head takes it
    return self.project(z.to(self.project[0].weight.dtype))


def tower_tokens(llava, pixel_values):
  """One pass of a llava-hf model's tower: what its projector takes (B, N, D), and what the Prompter takes (B, N, D).

  The two differ: LLaVA reads the last layer but one, the Prompter what comes after the last layer and its norm.
  """
  config, tower = llava.config, llava.model.vision_tower
  out = tower(pixel_values, output_hidden_states=True)
  if config.vision_config.model_type == 'siglip_vision_model':  # no class token, and the last state is normed
    return out.hidden_states[config.vision_feature_layer], out.last_hidden_state
  tower = getattr(tower, 'vision_model', tower)  # transformers 4 has one module more
  return out.hidden_states[config.vision_feature_layer][:, 1:], tower.post_layernorm(out.last_hidden_state)[:, 1:]


def add_placeholders(tokenizer, model, count=8):
  """Makes <region0> … known to the tokenizer, one id each, and the model's tables large enough. Returns the ids."""
  names = [PLACEHOLDER.format(i) for i in range(count)]
  tokenizer.add_tokens(names, special_tokens=True)
  if len(tokenizer) > model.get_input_embeddings().num_embeddings:
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
  return tokenizer.convert_tokens_to_ids(names)


def place(embeds, input_ids, ids, tokens, mask):
  """Puts region tokens where prompts name them; a region may be named more than once.

  Args:
    embeds: (B, L, W), the prompts' embeddings. input_ids: (B, L). ids: those of <region0>, <region1>, ….
    tokens: (B, M, W). mask: (B, M), True for regions that are there.

  Raises:
    ValueError: when a prompt names a region that it has no box for, or has a box that it does not name.
  """
  match = input_ids[..., None] == torch.tensor(ids, device=input_ids.device)  # (B, L, placeholders)
  named, given = match.any(1), torch.zeros_like(match[:, 0])
  if mask.shape[1] > len(ids):
    raise ValueError(f'{mask.shape[1]} regions of one image, but only {len(ids)} placeholders; see add_placeholders')
  given[:, :mask.shape[1]] = mask
  for prompt, region in (named != given).nonzero().tolist():
    name = PLACEHOLDER.format(region)
    raise ValueError(f'prompt {prompt}: names {name}, but has {int(given[prompt].sum())} regions'
                     if named[prompt, region] else f'prompt {prompt}: region {region} is given, but no {name} names it')
  if not named.any():
    return embeds
  at = match.int().argmax(-1).clamp(max=tokens.shape[1] - 1)[..., None].expand_as(embeds)
  return torch.where(match.any(-1, keepdim=True), tokens.to(embeds.dtype).gather(1, at), embeds)


def to_canvas(regions, size, processor, *, point_side=POINT_SIDE):
  """Boxes (x0, y0, x1, y1) and points (x, y), in pixels of an image → xyxy on the canvas, (M, 4) float32.

  CLOC has seen boxes only. A point becomes a square around it, cut at the canvas: a box without area is nothing that
  the Prompter has learnt to read. Boxes are cut at the image's border.

  Args:
    regions: M boxes and points, mixed as you like. size: (height, width) of the image.
    processor: CLOC's image processor. point_side: of a point's square, as a fraction of the canvas.

  Raises:
    ValueError: naming a region that is neither, or lies outside the image.
  """
  height, width = (int(n) for n in size)
  out = np.zeros((len(regions), 4), np.float32)
  for i, region in enumerate(regions):
    values = np.asarray(region, np.float64)
    if values.shape not in ((2,), (4,)) or not np.isfinite(values).all():
      raise ValueError(f'region {i}: expected a box (x0, y0, x1, y1) or a point (x, y) in pixels, got {region!r}')
    inside = np.clip(values, 0, [width, height] * (len(values) // 2))
    if len(values) == 2:
      if (inside != values).any():
        raise ValueError(f'region {i}: the point {region!r} is outside the image of {width}×{height} pixels')
      x, y = processor.boxes_to_canvas(np.tile(inside, 2), (height, width))[:2]
      half = point_side / 2
      out[i] = np.clip([x - half, y - half, x + half, y + half], 0, 1)
    else:
      if inside[2] <= inside[0] or inside[3] <= inside[1]:
        raise ValueError(f'region {i}: the box {region!r} has no area inside the image of {width}×{height} pixels')
      out[i] = processor.boxes_to_canvas(inside, (height, width))
  return out


def pad(boxes):
  """A list of B arrays (m, 4) → boxes (B, M, 4) with the whole canvas for those that are not there, mask (B, M)."""
  most = max(map(len, boxes))
  out = torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(len(boxes), most, 1)
  mask = torch.zeros(len(boxes), most, dtype=torch.bool)
  for i, own in enumerate(boxes):
    out[i, :len(own)], mask[i, :len(own)] = torch.as_tensor(own, dtype=torch.float32), True
  return out, mask


def box_to_text(box):
  """A box on the canvas → '[120, 45, 873, 999]': thousandths, rounded, so that 0 and 1 are exact."""
  return '[' + ', '.join(str(round(min(max(float(v), 0.0), 1.0) * LAST_CELL)) for v in box) + ']'


def boxes_from_text(text):
  """Every '[x0, y0, x1, y1]' of an answer → (n, 4) float64 on the canvas, none lost by being skipped.

  Raises:
    ValueError: quoting the bracket that is no box, and saying what is wrong with it.
  """
  boxes = []
  for found in re.finditer(r'\[([^\[\]]*)\]?', text):
    inside = found[1].split(',')
    wrong = None
    if not found[0].endswith(']'):
      wrong = 'the bracket is not closed'
    elif not all(re.fullmatch(r'\s*\d+\s*', part, re.ASCII) for part in inside):
      wrong = 'expected whole numbers with commas between'
    elif len(inside) != 4:
      wrong = f'expected 4 numbers, got {len(inside)}'
    else:
      box = [int(part) for part in inside]
      if max(box) > LAST_CELL:
        wrong = f'{max(box)} is more than {LAST_CELL}'
      elif box[2] < box[0] or box[3] < box[1]:
        wrong = 'expected left ≤ right and top ≤ bottom'
    if wrong:
      raise ValueError(f'no box: {found[0]!r} in {text!r}: {wrong}')
    boxes.append(box)
  return np.array(boxes, np.float64).reshape(-1, 4) / LAST_CELL


def with_coordinates(text, boxes):
  """Ferret's hybrid form: 'What is <region0>?' → 'What is [120, 45, 873, 999] <region0>?'. boxes: (M, 4) on
  the canvas."""
  for i, box in enumerate(boxes):
    name = PLACEHOLDER.format(i)
    text = text.replace(name, f'{box_to_text(box)} {name}')
  return text
