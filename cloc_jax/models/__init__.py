"""The joint model from a config section."""
import difflib
import inspect
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from cloc_jax.models import prompter as prompter_lib
from cloc_jax.models import text as text_lib
from cloc_jax.models import vit
from cloc_jax.models.cloc import Cloc

DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}
# Set by Cloc for all of its parts, or by flax; not keys of a config's sub-section.
_NOT_KEYS = {'dtype', 'parent', 'name'}


def build(*, image: Mapping[str, Any], text: Mapping[str, Any], vocab_size: int, eos_id: int, text_length: int,
          dtype: str = 'float32', prompter: Mapping[str, Any] | None = None, **options) -> Cloc:
  """Makes a Cloc.

  Args:
    image, text, prompter: keywords of vit.ViT, text.TextTower and prompter.Prompter.
    vocab_size, eos_id: the tokenizer's. text_length: the longest text, in tokens.
    dtype: of activations, in every tower: 'float32' or 'bfloat16'. Parameters, norms and logits are float32.
    **options: further fields of models.cloc.Cloc.

  Raises:
    TypeError: on a key that no part has, naming the part. ValueError: on an unknown dtype.
  """
  if dtype not in DTYPES:
    raise ValueError(f'model.dtype: expected one of {sorted(DTYPES)}, got {dtype!r}')
  prompter = dict(prompter or {})
  text = {'vocab_size': vocab_size, 'eos_id': eos_id, 'max_length': text_length, **text}
  for name, section, module in (('image', image, vit.ViT), ('text', text, text_lib.TextTower),
                                ('prompter', prompter, prompter_lib.Prompter)):
    _check_keys(f'.{name}', section, module)
  _check_keys('', options, Cloc)
  return Cloc(image=dict(image), text=text, prompter=prompter, dtype=DTYPES[dtype], **options)


def _check_keys(name, section, module):
  allowed = set(inspect.signature(module).parameters) - _NOT_KEYS
  for key in section:
    if key not in allowed:
      near = difflib.get_close_matches(key, allowed, 1, 0.5)
      hint = f' Did you mean {near[0]!r}?' if near else ''
      raise TypeError(f'config.model{name}.{key}: no such key.{hint} Keys: {sorted(allowed)}')
