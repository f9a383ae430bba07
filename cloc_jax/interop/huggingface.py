"""CLIP, SigLIP and SigLIP 2 as Hugging Face's transformers runs them, in the terms of our evaluators.

A folder (or a name on the hub) holds config.json, the weights, a tokenizer and preprocessor_config.json, or since
transformers 5 processor_config.json with the same settings under 'image_processor'.
"""
import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

MODEL_TYPES = ('clip', 'siglip', 'siglip2')
_TEXT_BATCH = 64


@dataclasses.dataclass(frozen=True)
class EncodedImages:
  """z: (B, E) L2-normalised NumPy; tokens: (B, N, D) patch tokens behind the final norm, torch, on the device."""
  z: np.ndarray
  tokens: Any


class HuggingFaceEncoder:
  """A dual encoder in torch, float32, without gradients. Made by `load`.

  image_size: side of the square canvas that the tower takes, pixels. grid: patches along it. name: what was loaded.
  model_type: of MODEL_TYPES.
  """

  def __init__(self, model, *, tokenizer, mean: Sequence[float], std: Sequence[float], name: str,
               device: str | None = None):
    import torch
    self.model_type = model.config.model_type
    if self.model_type not in MODEL_TYPES:
      raise ValueError(f'{name}: expected a model of type {", ".join(MODEL_TYPES)}, got {self.model_type!r}')
    self.device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
    self.model = model.to(self.device, torch.float32).eval()
    self.name, self._tokenizer = name, tokenizer
    vision = model.config.vision_config
    self._patch = vision.patch_size
    # A NaFlex tower has no image size: it is fed the square that its table of positions was made for.
    # Of 384 pixels, patches of 14 cover 378: the canvas ends with the last patch, so that boxes and patches agree.
    self.grid = round(vision.num_patches**0.5) if self.model_type == 'siglip2' else vision.image_size // self._patch
    self.image_size = self.grid * self._patch
    self._mean, self._std = (torch.tensor(v, device=self.device).reshape(1, 1, 1, 3) for v in (mean, std))

  def encode_image(self, images: np.ndarray) -> EncodedImages:
    """(B, S, S, 3) uint8 canvases → EncodedImages. Pixels are scaled to 0 … 1, then by the model's mean and std."""
    import torch
    with torch.no_grad():
      x = torch.tensor(np.asarray(images), device=self.device).float() / 255
      x = (x - self._mean) / self._std
      if self.model_type == 'siglip2':
        b, g, p = len(x), self.grid, self._patch
        x = x.reshape(b, g, p, g, p, 3).transpose(2, 3).reshape(b, g * g, p * p * 3)
        out = self.model.vision_model(
            x, torch.ones(b, g * g, dtype=torch.long, device=self.device),
            torch.full((b, 2), g, dtype=torch.long, device=self.device))
      else:
        out = self.model.vision_model(pixel_values=x.permute(0, 3, 1, 2))
      if self.model_type == 'clip':
        z = self.model.visual_projection(out.pooler_output)
        tokens = self.model.vision_model.post_layernorm(out.last_hidden_state[:, 1:])
      else:
        z, tokens = out.pooler_output, out.last_hidden_state
      return EncodedImages(z=_unit(z), tokens=tokens)

  def embed_patches(self, image: EncodedImages) -> np.ndarray:
    """(B, g, g, E) float32: each patch token of the last layer, through the final norm and the head, not normalised.

    The head of CLIP is its linear projection. SigLIP pools by attention; here each token goes through that pooling
    alone, as if it were the only one: value and output projection (softmax over one token is 1), then the residual
    MLP. The last layer's own attention is left as it is: these are not MaskCLIP's value features.
    """
    import torch
    with torch.no_grad():
      tokens = image.tokens
      b, n, d = tokens.shape
      if self.model_type == 'clip':
        z = self.model.visual_projection(tokens)
      else:
        z = self.model.vision_model.head(tokens.reshape(b * n, 1, d))
      return z.reshape(b, self.grid, self.grid, -1).cpu().numpy()

  def encode_text(self, texts: Sequence[str]) -> np.ndarray:
    """(n, E) L2-normalised; cut at the model's own length. SigLIP's texts are lower-cased and padded to full length."""
    import torch
    length = self.model.config.text_config.max_position_embeddings
    siglip = self.model_type != 'clip'
    texts = [t.lower() for t in texts] if siglip else list(texts)
    out = []
    with torch.no_grad():
      for start in range(0, len(texts), _TEXT_BATCH):
        batch = self._tokenizer(texts[start:start + _TEXT_BATCH], padding='max_length' if siglip else True,
                                truncation=True, max_length=length, return_tensors='pt').to(self.device)
        # SigLIP was trained attending to its padding.
        mask = {} if siglip else {'attention_mask': batch['attention_mask']}
        z = self.model.get_text_features(input_ids=batch['input_ids'], **mask)
        out.append(_unit(z if isinstance(z, torch.Tensor) else z.pooler_output))
    width = out[0].shape[-1] if out else 0
    return np.concatenate(out) if out else np.zeros((0, width), np.float32)


def load(name: str | os.PathLike, *, device: str | None = None) -> HuggingFaceEncoder:
  """Loads a folder, or a model of the hub by name.

  Args:
    name: a folder with config.json, weights, tokenizer and preprocessor_config.json; or such as
      'openai/clip-vit-base-patch16'.
    device: torch's name of one; a GPU if there is one, by default.

  Raises:
    ModuleNotFoundError: without torch and transformers, saying what to install.
    FileNotFoundError: if there is no such folder or model, or it lacks a file.
    ValueError: if it is not a CLIP, SigLIP or SigLIP 2.
  """
  try:
    import torch  # noqa: F401
    import transformers
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"hf:{name} needs torch and transformers: pip install 'cloc_jax[hf]'") from error
  name = os.fspath(name)
  if not os.path.isdir(name) and (os.path.isabs(name) or name.startswith('.') or name.count('/') != 1):
    raise FileNotFoundError(f'hf:{name}: no such folder; a model of the hub is named OWNER/NAME')
  try:
    config = transformers.AutoConfig.from_pretrained(name)
    if config.model_type not in MODEL_TYPES:
      raise ValueError(f'hf:{name}: expected a model of type {", ".join(MODEL_TYPES)}, got {config.model_type!r}')
    if config.model_type != 'clip' and not getattr(config.vision_config, 'vision_use_head', True):
      raise ValueError(f'hf:{name}: this SigLIP has no pooling head (vision_use_head is false); it embeds no images')
    model = transformers.AutoModel.from_pretrained(name, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
  except OSError as error:
    raise FileNotFoundError(f'hf:{name}: {str(error).splitlines()[0]}') from error
  settings = _image_settings(name)
  return HuggingFaceEncoder(model, tokenizer=tokenizer, mean=settings['image_mean'], std=settings['image_std'],
                            name=name, device=device)


def _image_settings(name: str) -> dict[str, Any]:
  """The image processor's JSON, with mean and std.

  Raises:
    FileNotFoundError, ValueError: naming the file and the key.
  """
  from transformers.utils import cached_file
  return image_settings(lambda filename: cached_file(name, filename, _raise_exceptions_for_missing_entries=False),
                        name=name)


def image_settings(find: Callable[[str], str | os.PathLike | None], *, name: str) -> dict[str, Any]:
  """The image processor's JSON, with mean and std.

  Args:
    find: file name → path, or None where there is no such file. name: of the model, for errors.

  Raises:
    FileNotFoundError, ValueError: naming the file and the key.
  """
  for filename, key in (('preprocessor_config.json', None), ('processor_config.json', 'image_processor')):
    path = find(filename)
    if path is None:
      continue
    try:
      with open(path, encoding='utf-8') as f:
        settings = json.load(f)
    except ValueError as error:
      raise ValueError(f'{path}: expected JSON: {error}') from error
    settings = settings if key is None else settings.get(key, {})
    for wanted in ('image_mean', 'image_std'):
      value = settings.get(wanted)
      if not isinstance(value, list) or len(value) != 3:
        raise ValueError(f'{path}: {wanted}: expected three numbers, got {value!r}')
    if settings.get('do_rescale', True) and abs(settings.get('rescale_factor', 1 / 255) * 255 - 1) > 1e-3:
      raise ValueError(f'{path}: rescale_factor: expected 1/255, got {settings["rescale_factor"]}')
    return settings
  raise FileNotFoundError(f'hf:{name}: neither preprocessor_config.json nor processor_config.json: the mean and the '
                          "standard deviation that the model's pixels are scaled by are not known")


def _unit(z) -> np.ndarray:
  import torch
  return torch.nn.functional.normalize(z.float(), dim=-1).cpu().numpy()
