"""OWLv2 and OWL-ViT as transformers runs them, with our own way in and out.

An image becomes a square canvas with the project's resize and padding (geometry.resize_with_pad, at the bottom and the
right as both models were trained). OWLv2 is padded with black, OWL-ViT with grey (transformers pull request 41938;
scenic's owl_vit). Transformers' own processor for OWL-ViT squeezes the image instead; ours keeps its proportions.
"""
import numpy as np

from cloc_jax import geometry as geometry_lib
from cloc_jax.data import transforms
from cloc_jax.label import batches, checkpoints

_PAD = {'owlv2': 0, 'owlvit': 127}
_TEXT_BATCH = 256


class Owl(batches.BatchedDetector):
  """OWLv2 or OWL-ViT; see BatchedDetector for the other settings.

  Args:
    image_size: side of the canvas, pixels; the paper labelled at 448. A checkpoint trained at another size has its
      position embeddings interpolated. None is the checkpoint's own.
  """

  def __init__(self, name: str, *, kind: str = 'owlv2', image_size: int | None = 448, **config):
    if image_size is not None and image_size < 1:
      raise ValueError(f'detector: image_size: expected at least 1 pixel, got {image_size}')
    super().__init__(name, kind=kind, settings=dict(image_size=image_size), **config)
    self.image_size = image_size

  def load(self) -> None:
    """Loads the model; the tower in the asked dtype, the heads in float32."""
    import torch
    config = checkpoints.load('AutoConfig', self.name, revision=self.revision)
    if config.model_type != self.kind:
      raise ValueError(f'{self.name}: expected a model of type {self.kind!r}, got {config.model_type!r}')
    patch, native = config.vision_config.patch_size, config.vision_config.image_size
    size = self.image_size or native
    if size % patch:
      raise ValueError(f'{self.name}: image_size: expected a multiple of the patch size {patch}, got {size}; '
                       f'{size - size % patch} and {size + patch - size % patch} are the nearest')
    self._device, dtype = checkpoints.device_and_dtype(self.device, self.dtype)
    model = checkpoints.load('AutoModelForZeroShotObjectDetection', self.name, revision=self.revision)
    self._tokenizer = checkpoints.load('AutoTokenizer', self.name, revision=self.revision)
    model = model.to(self._device, dtype)
    # bfloat16 knows 128 places between 0.5 and 1: boxes would jump by two pixels.
    for head in (model.box_head, model.class_head):
      head.float()
    self._base = getattr(model, self.kind)
    self._dtype, self._size, self._interpolate = dtype, size, size != native
    self._max_tokens = config.text_config.max_position_embeddings
    processor = checkpoints.load('AutoImageProcessor', self.name, revision=self.revision)
    as_column = lambda values: torch.tensor(values, device=self._device).reshape(1, 3, 1, 1) * 255
    self._mean, self._std = as_column(processor.image_mean), as_column(processor.image_std)
    self.model = model

  def prepared_shape(self, height: int, width: int) -> tuple[int, int]:
    """All canvases are the same square."""
    return self._size, self._size

  def prepare(self, image: np.ndarray) -> tuple[np.ndarray, tuple[float, float]]:
    """The canvas, and which part of it is image."""
    geometry = geometry_lib.resize_with_pad(height=image.shape[0], width=image.shape[1], canvas=self._size,
                                            pad='corner')
    canvas = transforms.resize_with_pad(image, geometry, pad_value=_PAD[self.kind])
    return canvas, (geometry.resized_width / self._size, geometry.resized_height / self._size)

  def encode_texts(self, texts: dict[int, list[str]]):
    """Each distinct text once: (rows by picture, (P, E) float32 embeddings on the device).

    Texts longer than the model's 16 tokens are cut there.
    """
    import torch
    place: dict[str, int] = {}
    rows = {i: [place.setdefault(text, len(place)) for text in own] for i, own in texts.items()}
    distinct, parts = list(place), []
    for start in range(0, len(distinct), _TEXT_BATCH):
      tokens = self._tokenizer(distinct[start:start + _TEXT_BATCH], padding='max_length', truncation=True,
                               max_length=self._max_tokens, return_tensors='pt').to(self._device)
      with torch.inference_mode():
        out = self._base.get_text_features(input_ids=tokens['input_ids'], attention_mask=tokens['attention_mask'])
      parts.append(getattr(out, 'pooler_output', out).float())
    return rows, torch.cat(parts) if parts else None

  def forward(self, canvases: np.ndarray, numbers: list[int], encoded) -> list[tuple[np.ndarray, ...]]:
    """A prediction a patch. Shorter query lists are filled up, and what fills them is masked: it cannot win a box."""
    import torch
    rows, table = encoded
    most = max(len(rows[i]) for i in numbers)
    index = np.full((len(numbers), most), -1)
    for k, i in enumerate(numbers):
      index[k, :len(rows[i])] = rows[i]
    with torch.inference_mode():
      index = torch.from_numpy(index).to(self._device)
      pixels = torch.from_numpy(canvases).to(self._device).permute(0, 3, 1, 2)
      pixels = ((pixels.float() - self._mean) / self._std).to(self._dtype)
      feature_map = self.model.image_embedder(pixel_values=pixels, interpolate_pos_encoding=self._interpolate)[0]
      features = feature_map.flatten(1, 2).float()
      logits = self.model.class_predictor(features, table[index.clamp(min=0)], index >= 0)[0]
      boxes = self.model.box_predictor(features, feature_map, self._interpolate)
      logit, phrase = logits.max(-1)
      out = torch.cat([boxes, logit.sigmoid()[..., None], phrase[..., None].float()], -1).cpu().numpy()
    return [(one[:, :4], one[:, 4], one[:, 5].astype(int)) for one in out]
