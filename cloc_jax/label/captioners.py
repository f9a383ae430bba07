"""Captioners: what writes a new caption for an image (SPEC §5.1).

  make('hf:DIR')                              a vision-language model of Hugging Face in this process
  make('openai:http://host:8000/v1#MODEL')    a server with OpenAI's chat API: vLLM, SGLang, llama.cpp, …
  make('alt-text')                            no new caption: the alt-texts stay
  make('fuse:CAPTIONER|LLM')                  CAPTIONER's caption and the alt-text merged by LLM (VeCap); both are
                                              hf: or openai: specs, with settings in captioner= and llm=
"""
from collections.abc import Sequence

from cloc_jax.label import chat_models, chat_server, checkpoints, prompts, stages

_FORMS = "'hf:NAME', 'openai:URL#MODEL', 'alt-text' or 'fuse:CAPTIONER|LLM'"


def make(spec: str, **config) -> stages.Captioner:
  """The captioner that `spec` names; `config` goes to it. Models are loaded, servers asked, at first use.

  Raises:
    ValueError: on an unknown spec. TypeError: on an unknown setting. FileNotFoundError: if a folder is not there.
  """
  kind, _, rest = spec.partition(':')
  if spec == 'alt-text':
    return AltText(**config)
  if kind == 'fuse' and rest.count('|') == 1 and all(rest.split('|')):
    return Fused(*rest.split('|'), **config)
  if kind in ('hf', 'openai') and rest:
    return Recaptioned(spec, **config)
  raise ValueError(f'captioner: expected {_FORMS}, got {spec!r}')


def _speaker(spec, *, images, **config):
  kind, _, rest = spec.partition(':')
  if kind == 'openai':
    return chat_server.ChatServer(rest, **config)
  if kind == 'hf' and rest:
    return chat_models.ChatModel(rest, images=images, **config)
  raise ValueError(f"captioner: expected 'hf:NAME' or 'openai:URL#MODEL', got {spec!r}")


class AltText:
  """The alt-texts as they are, one after another; an image without any gets an empty caption."""

  version = 'alt-text-1'

  def caption(self, pictures: Sequence[stages.Picture]) -> list[str | Exception]:
    """One text a picture."""
    return [prompts.join(picture.alt_texts) for picture in pictures]


class Recaptioned:
  """A model's description of the image.

  Args:
    spec: hf: or openai:. prompt: may hold {alt_text}. config: see chat_models.ChatModel, chat_server.ChatServer.
  """

  def __init__(self, spec: str, *, prompt: str = prompts.CAPTION, **config):
    self._speaker, self._prompt = _speaker(spec, images=True, **config), prompt
    self.version = checkpoints.version(self._speaker.version, prompt=prompt)

  def caption(self, pictures: Sequence[stages.Picture]) -> list[str | Exception]:
    """One caption a picture, in order; an Exception where that picture alone failed.

    Raises:
      FileNotFoundError, ValueError, ImportError: if a model cannot be loaded; that concerns all pictures.
    """
    return self._speaker.reply([prompts.fill(self._prompt, alt_texts=p.alt_texts) for p in pictures],
                               [p.image for p in pictures])


class Fused:
  """A caption of `captioner` and the alt-text merged into one by a language model, as VeCap does.

  Args:
    captioner, llm: specs. captioner_config, llm_config: their settings. prompt: holds {caption} and {alt_text}.

  An image without alt-text keeps its caption, and the language model is not asked.
  """

  def __init__(self, captioner_spec: str, llm_spec: str, *, captioner: dict | None = None, llm: dict | None = None,
               prompt: str = prompts.FUSE):
    for place in ('{caption}', '{alt_text}'):
      if place not in prompt:
        raise ValueError(f'captioner: the prompt that fuses needs {place}, got {prompt!r}')
    self._captioner = make(captioner_spec, **(captioner or {}))
    self._llm = _speaker(llm_spec, images=False, **(llm or {}))
    self._prompt = prompt
    self.version = f'fuse-1 ({self._captioner.version}) ' + checkpoints.version(f'({self._llm.version})', prompt=prompt)

  def caption(self, pictures: Sequence[stages.Picture]) -> list[str | Exception]:
    """One caption a picture, in order; an Exception where that picture alone failed, in either step."""
    captions = self._captioner.caption(pictures)
    merge = [i for i, (picture, caption) in enumerate(zip(pictures, captions))
             if isinstance(caption, str) and caption and prompts.join(picture.alt_texts)]
    asked = [prompts.fill(self._prompt, alt_texts=pictures[i].alt_texts, caption=captions[i]) for i in merge]
    for i, merged in zip(merge, self._llm.reply(asked)):
      captions[i] = merged
    return captions
