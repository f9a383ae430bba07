"""Grounding DINO as transformers runs it: an image's phrases are one text, 'a cat. a dog.', and a box scores tokens."""
import numpy as np
import PIL.Image

from cloc_jax.label import batches, checkpoints

_SEPARATORS = str.maketrans('.?', '  ')  # these end a phrase in the model's attention mask


class GroundingDino(batches.BatchedDetector):
  """Grounding DINO; see BatchedDetector for the other settings.

  A phrase's score for a box is that of its best token, so a box's score is the one that transformers' own
  post-processing gives it. Phrases that do not fit into one text of 256 tokens are asked in several, and the boxes of
  all are kept. Images share a batch only where they are resized to the same shape, so that none is padded.

  Args:
    image_size: of the short side, pixels, and longest: limit for the long side; None is the checkpoint's own.
    dtype: float32 by default; the deformable attention is sensitive.
  """

  def __init__(self, name: str, *, kind: str = 'grounding-dino', image_size: int | None = None,
               longest: int | None = None, dtype: str | None = 'float32', **config):
    for key, value in dict(image_size=image_size, longest=longest).items():
      if value is not None and value < 1:
        raise ValueError(f'detector: {key}: expected at least 1 pixel, got {value}')
    super().__init__(name, kind=kind, settings=dict(image_size=image_size, longest=longest), dtype=dtype, **config)
    self.image_size, self.longest = image_size, longest

  def load(self) -> None:
    """Loads the model and the tokenizer."""
    import torch
    config = checkpoints.load('AutoConfig', self.name, revision=self.revision)
    if config.model_type != self.kind:
      raise ValueError(f'{self.name}: expected a model of type {self.kind!r}, got {config.model_type!r}')
    self._device, self._dtype = checkpoints.device_and_dtype(self.device, self.dtype)
    processor = checkpoints.load('AutoImageProcessor', self.name, revision=self.revision)
    self._short = self.image_size or processor.size['shortest_edge']
    self._long = self.longest or processor.size['longest_edge']
    self._tokenizer = checkpoints.load('AutoTokenizer', self.name, revision=self.revision)
    self._max_tokens = config.max_text_len
    as_column = lambda values: torch.tensor(values, device=self._device).reshape(1, 3, 1, 1) * 255
    self._mean, self._std = as_column(processor.image_mean), as_column(processor.image_std)
    model = checkpoints.load('AutoModelForZeroShotObjectDetection', self.name, revision=self.revision)
    self.model = model.to(self._device, self._dtype)

  def prepared_shape(self, height: int, width: int) -> tuple[int, int]:
    """The short side becomes `image_size`, or less where the long one would pass its limit; rounded as DETR does."""
    low, high = sorted((height, width))
    short, exact = self._short, float(self._short)
    if high / low * short > self._long:
      exact = self._long * low / high
      short = round(exact)
    other = high if low == short else int(exact * high / low)
    short, other = max(1, short), max(1, other)
    return (short, other) if height <= width else (other, short)

  def prepare(self, image: np.ndarray) -> tuple[np.ndarray, tuple[float, float]]:
    """The resized image; there is no padding."""
    height, width = self.prepared_shape(*image.shape[:2])
    resized = PIL.Image.fromarray(image).resize((width, height), PIL.Image.Resampling.BILINEAR)
    return np.asarray(resized), (1.0, 1.0)

  def encode_texts(self, texts: dict[int, list[str]]):
    """Token ids of each picture's texts: a list of requests, each (ids, which phrase each token belongs to or -1)."""
    cls, sep, dot = (self._tokenizer.convert_tokens_to_ids(token) for token in ('[CLS]', '[SEP]', '.'))
    distinct = list(dict.fromkeys(text for own in texts.values() for text in own))
    ids = self._tokenizer([text.lower().translate(_SEPARATORS) for text in distinct],
                          add_special_tokens=False)['input_ids'] if distinct else []
    room = self._max_tokens - 2
    ids = {text: tokens[:room - 1] for text, tokens in zip(distinct, ids)}
    requests = {}
    for i, own in texts.items():
      parts = [([cls], [-1])]
      for number, text in enumerate(own):
        tokens = ids[text]
        if len(parts[-1][0]) - 1 + len(tokens) + 1 > room:
          parts.append(([cls], [-1]))
        parts[-1][0].extend([*tokens, dot])
        parts[-1][1].extend([*[number] * len(tokens), -1])
      requests[i] = [([*tokens, sep], [*owners, -1]) for tokens, owners in parts]
    return requests

  def forward(self, canvases: np.ndarray, numbers: list[int], encoded) -> list[tuple[np.ndarray, ...]]:
    """The model's object queries, for each of a picture's requests."""
    import torch
    found = [[] for _ in numbers]
    with torch.inference_mode():
      pixels = torch.from_numpy(canvases).to(self._device).permute(0, 3, 1, 2)
      pixels = ((pixels.float() - self._mean) / self._std).to(self._dtype)
      for turn in range(max(len(encoded[i]) for i in numbers)):
        places = [k for k, i in enumerate(numbers) if turn < len(encoded[i])]
        requests = [encoded[numbers[k]][turn] for k in places]
        longest = max(len(tokens) for tokens, _ in requests)
        ids, owners, mask = (np.full((len(places), longest), fill) for fill in (0, -1, 0))
        for row, (tokens, owner) in enumerate(requests):
          ids[row, :len(tokens)], owners[row, :len(tokens)], mask[row, :len(tokens)] = tokens, owner, 1
        ids, mask = (torch.from_numpy(x).to(self._device) for x in (ids, mask))
        out = self.model(pixel_values=pixels[places], input_ids=ids, attention_mask=mask,
                         token_type_ids=torch.zeros_like(ids))
        scores = out.logits[..., :longest].float().sigmoid().cpu().numpy()
        boxes = out.pred_boxes.float().cpu().numpy()
        for row, k in enumerate(places):
          of_phrase = np.where(owners[row] >= 0, scores[row], 0.0)
          best = of_phrase.argmax(-1)
          found[k].append((boxes[row], of_phrase.max(-1), owners[row][best]))
    return [tuple(np.concatenate(part) for part in zip(*requests)) for requests in found]
