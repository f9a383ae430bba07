"""Chat models of Hugging Face in this process: image-text-to-text ones (LLaVA, Qwen-VL, Gemma, …) and plain LLMs."""
from collections.abc import Sequence
import os

import numpy as np
import PIL.Image

from cloc_jax.label import checkpoints


class ChatModel(checkpoints.Lazy):
  """Answers prompts in batches, with or without an image, through the model's own chat template.

  Args:
    name: a folder, or OWNER/NAME on the hub. images: whether each prompt comes with an image.
    max_new_tokens: of an answer. batch_size: prompts at once.
    temperature: 0 takes the most likely token, so a run can be repeated; above, tokens are sampled from `seed` on.
    max_side: larger images are shrunk to it, pixels; models with dynamic resolution pay by the pixel.
    template: for models without a chat template, the whole text with {prompt} and the model's own image token.
    device, dtype: by default an accelerator and bfloat16 if there is one, else the CPU and float32.
    revision: of a repository on the hub.

  Raises:
    ValueError: on a value out of range. FileNotFoundError: if the folder is not there.
  """

  def __init__(self, name: str, *, images: bool = True, max_new_tokens: int = 256, batch_size: int = 8,
               temperature: float = 0.0, seed: int = 0, max_side: int = 1024, template: str | None = None,
               device: str | None = None, dtype: str | None = None, revision: str | None = None):
    for key, value in dict(max_new_tokens=max_new_tokens, batch_size=batch_size, max_side=max_side).items():
      if value < 1:
        raise ValueError(f'captioner: {key}: expected at least 1, got {value}')
    if temperature < 0:
      raise ValueError(f'captioner: temperature: expected 0 or more, got {temperature}')
    if template is not None and '{prompt}' not in template:
      raise ValueError(f'captioner: template: expected a text with {{prompt}}, got {template!r}')
    name = os.path.expanduser(name)
    self.name, self.images, self.revision = name, images, revision
    self.max_new_tokens, self.batch_size, self.max_side = max_new_tokens, batch_size, max_side
    self.temperature, self.seed, self.template = temperature, seed, template
    self.device, self.dtype = device, dtype
    self.version = checkpoints.version(
        f'hf:{checkpoints.identify(name, revision=revision)}', max_new_tokens=max_new_tokens,
        temperature=temperature or None, seed=seed if temperature else None, max_side=max_side if images else None,
        template=template, dtype=dtype)

  def reply(self, texts: Sequence[str], images: Sequence[np.ndarray] | None = None) -> list[str | Exception]:
    """One answer a prompt, in order; an Exception where that prompt alone failed.

    Args:
      texts: the prompts. images: for each its image, (H, W, 3) uint8, if the model was made with images.

    Raises:
      FileNotFoundError, ValueError, ImportError: if the model cannot be loaded.
    """
    self.open()
    jobs = list(zip(texts, images if self.images else [None] * len(texts), strict=True))
    out = []
    for start in range(0, len(jobs), self.batch_size):
      out += checkpoints.each_alone(self._answer, jobs[start:start + self.batch_size])
    return out

  def load(self) -> None:
    """Loads the model and its processor or tokenizer."""
    self._device, self._dtype = checkpoints.device_and_dtype(self.device, self.dtype)
    loader = 'AutoProcessor' if self.images else 'AutoTokenizer'
    self._processor = checkpoints.load(loader, self.name, revision=self.revision)
    self._tokenizer = getattr(self._processor, 'tokenizer', self._processor)
    self._tokenizer.padding_side = 'left'  # an answer goes on at the end
    if self._tokenizer.pad_token is None:
      self._tokenizer.pad_token = self._tokenizer.eos_token
    if self.template is None and not getattr(self._processor, 'chat_template', None):
      raise ValueError(f'{self.name}: the model has no chat template; give template=, the whole text with {{prompt}}'
                       + (' and the image token of the model' if self.images else ''))
    auto = 'AutoModelForImageTextToText' if self.images else 'AutoModelForCausalLM'
    model = checkpoints.load(auto, self.name, revision=self.revision, dtype=self._dtype).to(self._device)
    self.model = model

  def _answer(self, jobs):
    import torch
    texts = [self._chat(text) for text, _ in jobs]
    if self.images:
      # Some chat templates write the mark of the beginning (Gemma's), some leave it to the tokenizer (LLaVA's).
      begin = self._tokenizer.bos_token
      begun = begin is not None and texts[0].startswith(begin)
      # A list an image: processors differ in whether a flat list is one prompt's images or one image a prompt.
      inputs = self._processor(images=[[self._shrunk(image)] for _, image in jobs], text=texts, padding=True,
                               return_tensors='pt', add_special_tokens=not begun)
    else:
      # Of language models, the chat template writes all marks.
      inputs = self._processor(texts, padding=True, return_tensors='pt', return_token_type_ids=False,
                               add_special_tokens=self.template is not None)
    inputs = {key: value.to(self._device, self._dtype if value.is_floating_point() else value.dtype)
              if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}
    sampling = dict(do_sample=False)
    if self.temperature:
      torch.manual_seed(self.seed)
      sampling = dict(do_sample=True, temperature=self.temperature)
    with torch.inference_mode():
      ids = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, num_beams=1,
                                pad_token_id=self._tokenizer.pad_token_id, **sampling)
    answers = self._tokenizer.batch_decode(ids[:, inputs['input_ids'].shape[1]:], skip_special_tokens=True)
    return [answer.strip() for answer in answers]

  def _chat(self, text):
    if self.template is not None:
      return self.template.replace('{prompt}', text)
    content = [{'type': 'image'}, {'type': 'text', 'text': text}] if self.images else text
    return self._processor.apply_chat_template([{'role': 'user', 'content': content}], tokenize=False,
                                               add_generation_prompt=True)

  def _shrunk(self, image):
    picture = PIL.Image.fromarray(image)
    picture.thumbnail((self.max_side, self.max_side), PIL.Image.Resampling.BICUBIC)
    return picture
