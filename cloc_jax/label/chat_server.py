"""Any server that speaks OpenAI's chat API (vLLM, SGLang, llama.cpp, …), asked with patience; standard library only."""
import base64
from collections.abc import Callable, Sequence
import concurrent.futures
import email.utils
import http.client
import io
import json
import os
import random
import time
import urllib.error
import urllib.parse
import urllib.request

import numpy as np
import PIL.Image

from cloc_jax.label import checkpoints

_PATIENT = {408, 409, 425, 429, 500, 502, 503, 504, 529}  # to be tried again; other refusals stay refusals
_SHOWN = 200  # characters of a server's answer in an error


class ServerError(RuntimeError):
  """A request that was not answered; the message names the server, the attempts and the last reason."""


class _Later(Exception):
  """A failed attempt that may go better; `wait`: seconds that the server asked for, or None."""

  def __init__(self, reason, wait=None):
    super().__init__(reason)
    self.wait = wait


class ChatServer:
  """Answers prompts by HTTP, `concurrency` at a time.

  429, 5xx, time-outs, refused connections and answers that cannot be read are tried again after 1, 2, 4 … seconds (a
  random half to all of it, so that workers do not come back at once), or after what Retry-After says.

  Args:
    address: 'http://host:8000/v1#MODEL', or without '#MODEL' for a server of one model.
    max_new_tokens, temperature, seed: of an answer; temperature 0 so that a run can be repeated.
    concurrency: requests at once. attempts: for each. timeout: seconds without a word from the server.
    backoff: seconds before the second attempt. max_wait: seconds between two attempts at most.
    max_side: larger images are shrunk to it, pixels; they are sent as JPEG.
    api_key_env: environment variable with the key, if the server wants one; keys come from nowhere else.
    extra: further fields of the request, as the server documents them.

  Raises:
    ValueError: on an address without http(s), with a user or password in it, or on a value out of range.
  """

  def __init__(self, address: str, *, max_new_tokens: int = 256, temperature: float = 0.0, seed: int = 0,
               concurrency: int = 16, attempts: int = 6, timeout: float = 120.0, backoff: float = 1.0,
               max_wait: float = 60.0, max_side: int = 1024, api_key_env: str = 'OPENAI_API_KEY',
               extra: dict | None = None):
    url, _, self._model = address.partition('#')
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ('http', 'https') or not parts.hostname:
      raise ValueError(f"captioner: expected 'openai:http://HOST:PORT/v1#MODEL', got 'openai:{address}'")
    if parts.username or parts.password:
      raise ValueError(f'captioner: a key belongs into the environment ({api_key_env}), not into the address')
    for key, value, least in (('max_new_tokens', max_new_tokens, 1), ('concurrency', concurrency, 1),
                              ('attempts', attempts, 1), ('max_side', max_side, 1), ('timeout', timeout, 0.01),
                              ('temperature', temperature, 0), ('backoff', backoff, 0), ('max_wait', max_wait, 0)):
      if value < least:
        raise ValueError(f'captioner: {key}: expected at least {least}, got {value}')
    self._url = url.rstrip('/') + '/chat/completions'
    self._fields = dict(max_tokens=max_new_tokens, temperature=temperature, seed=seed) | (extra or {})
    self._concurrency, self._attempts, self._timeout = concurrency, attempts, timeout
    self._backoff, self._max_wait, self._max_side, self._key_env = backoff, max_wait, max_side, api_key_env
    self._sleep: Callable[[float], None] = time.sleep
    # Where a model is served does not change what it says.
    self.version = checkpoints.version(
        f'openai:{self._model or "default"}', max_new_tokens=max_new_tokens, temperature=temperature or None,
        seed=seed if temperature else None, max_side=max_side,
        extra=json.dumps(extra, sort_keys=True) if extra else None)

  def reply(self, texts: Sequence[str], images: Sequence[np.ndarray] | None = None) -> list[str | Exception]:
    """One answer a prompt, in order; an Exception where that prompt alone failed."""
    jobs = list(zip(texts, images if images is not None else [None] * len(texts), strict=True))
    with concurrent.futures.ThreadPoolExecutor(self._concurrency) as pool:
      return list(pool.map(self._answer, jobs))

  def _answer(self, job):
    text, image = job
    try:
      content = text if image is None else [
          {'type': 'image_url', 'image_url': {'url': self._data_url(image)}}, {'type': 'text', 'text': text}]
      body = {'messages': [{'role': 'user', 'content': content}]} | self._fields
      if self._model:
        body['model'] = self._model
      return self._insist(json.dumps(body).encode())
    except Exception as error:  # reported for this image; the others go on
      return error.with_traceback(None)

  def _insist(self, body):
    for attempt in range(1, self._attempts + 1):
      try:
        return self._ask(body)
      except _Later as error:
        if attempt == self._attempts:
          raise ServerError(f'{self._url}: no answer in {attempt} attempt{"s" * (attempt > 1)}; the last time: '
                            f'{error}') from None
        wait = self._backoff * 2**(attempt - 1) * random.uniform(0.5, 1) if error.wait is None else error.wait
        self._sleep(min(wait, self._max_wait))

  def _ask(self, body):
    headers = {'Content-Type': 'application/json'}
    if key := os.environ.get(self._key_env):
      headers['Authorization'] = f'Bearer {key}'
    request = urllib.request.Request(self._url, data=body, headers=headers, method='POST')
    try:
      with urllib.request.urlopen(request, timeout=self._timeout) as response:
        data = response.read()
    except urllib.error.HTTPError as error:
      with error:
        reason = f'HTTP {error.code}: {_shown(error.read())}'
      if error.code in _PATIENT:
        raise _Later(reason, _retry_after(error.headers.get('Retry-After'))) from None
      hint = f' (is {self._key_env} set?)' if error.code in (401, 403) else ''
      raise ServerError(f'{self._url}: {reason}{hint}') from None
    except TimeoutError:
      raise _Later(f'nothing came for {self._timeout:g} seconds') from None
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
      reason = getattr(error, 'reason', error)
      if isinstance(reason, TimeoutError):
        raise _Later(f'nothing came for {self._timeout:g} seconds') from None
      raise _Later(f'{type(reason).__name__}: {reason}') from None
    try:
      answer = json.loads(data)['choices'][0]['message']['content']
    except (ValueError, LookupError, TypeError):
      raise _Later(f'expected JSON with choices[0].message.content, got {_shown(data)}') from None
    if not isinstance(answer, str):
      raise ServerError(f'{self._url}: expected a text as the answer, got {answer!r}')
    return answer.strip()

  def _data_url(self, image):
    picture = PIL.Image.fromarray(image)
    picture.thumbnail((self._max_side, self._max_side), PIL.Image.Resampling.BICUBIC)
    data = io.BytesIO()
    picture.save(data, 'JPEG', quality=92)
    return 'data:image/jpeg;base64,' + base64.b64encode(data.getvalue()).decode()


def _retry_after(value):
  """Seconds that a Retry-After header asks for: a number or a date; None if there is none, or it says neither."""
  if value is None:
    return None
  try:
    return max(0.0, float(value))
  except ValueError:
    pass
  try:
    return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
  except ValueError:
    return None


def _shown(data):
  text = data.decode('utf-8', 'replace').strip()
  return repr(text[:_SHOWN] + '…' * (len(text) > _SHOWN)) if text else 'an empty answer'
