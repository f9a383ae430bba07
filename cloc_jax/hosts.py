"""Several hosts that work apart and then put together what they have: values of any kind, and failures.

Every host must make these calls, in the same order; with one host they cost nothing.
"""
import contextlib
import pickle
from typing import Any

import jax
import numpy as np

# What all hosts together hold of an exchange at once, bytes: devices have a copy of it too.
_BLOCK = 1 << 26


class HostError(ValueError):
  """Another host failed; the message is its own."""


def gather(value: Any) -> list | None:
  """The values of all hosts in their order, on the first host; None elsewhere. Values are anything picklable."""
  if jax.process_count() == 1:
    return [value]
  found = _exchange(pickle.dumps(value, protocol=5), keep=jax.process_index() == 0)
  return None if found is None else [pickle.loads(data) for data in found]


def from_first(value: Any) -> Any:
  """The first host's value, on every host; what the others bring is not looked at."""
  if jax.process_count() == 1:
    return value
  data = _exchange(pickle.dumps(value, protocol=5) if jax.process_index() == 0 else b'', keep=True)[0]
  return value if jax.process_index() == 0 else pickle.loads(data)


@contextlib.contextmanager
def together():
  """What is done inside is done by all hosts or fails on all: none is left waiting for one that gave up.

  Nothing inside may wait for another host.

  Raises:
    HostError: on the hosts that succeeded, with the first failure; where it happened, the error itself.
  """
  if jax.process_count() == 1:
    yield
    return
  failure = None
  try:
    yield
  except Exception as error:
    failure = error
  said = '' if failure is None else f'{type(failure).__name__}: {failure}'
  found = [bytes(data).decode() for data in _exchange(said.encode(), keep=True)]
  if failure is not None:
    raise failure
  for host, text in enumerate(found):
    if text:
      raise HostError(f'host {host} of {len(found)} failed: {text}')


def _exchange(data: bytes, *, keep: bool) -> list[bytearray] | None:
  """Every host's bytes, of any length, on each host that keeps them."""
  from jax.experimental import multihost_utils
  size = np.frombuffer(len(data).to_bytes(8, 'little'), np.uint8)
  sizes = [int.from_bytes(row.tobytes(), 'little') for row in multihost_utils.process_allgather(size)]
  found = [bytearray() for _ in sizes] if keep else None
  block, start, longest = max(1, _BLOCK // len(sizes)), 0, max(sizes)
  while start < longest:
    # A power of two at the end: the exchange is compiled for a handful of lengths.
    length = min(block, 1 << (longest - start - 1).bit_length())
    part = np.zeros(length, np.uint8)
    own = np.frombuffer(data[start:start + length], np.uint8)
    part[:len(own)] = own
    rows = multihost_utils.process_allgather(part)
    if keep:
      for out, row, total in zip(found, rows, sizes):
        out += memoryview(row[:max(0, min(length, total - start))])
    start += length
  return found
