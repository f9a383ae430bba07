"""Weights by name, in both directions: tables of (our paths, their name, form), one table a family and layout.

Our paths are those of models/ with one block a layer ('encoderblock_3', see trees.scan_to_loop). Arrays are NumPy.
"""
import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from cloc_jax import trees

PARTS = ('image', 'text', 'both')
_SCALARS = ('t', 'b')


@dataclasses.dataclass(frozen=True)
class Form:
  """How one of their arrays becomes one of ours, given the number of heads, and back."""
  to_ours: Callable[[np.ndarray, int], np.ndarray]
  to_theirs: Callable[[np.ndarray], np.ndarray]


SAME = Form(lambda x, h: x, lambda x: x)
NUMBER = Form(lambda x, h: x.reshape(()), lambda x: x.reshape(()))
NUMBER_1D = Form(lambda x, h: x.reshape(()), lambda x: x.reshape(1))
# torch's Linear keeps (out, in), flax's Dense (in, out).
LINEAR = Form(lambda x, h: x.T, lambda x: x.T)
CONV = Form(lambda x, h: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))
# NaFlex embeds patches that are flattened row by row, colours last.
FLAT_PATCHES = Form(lambda x, h: x.T.reshape(*2 * (math.isqrt(x.shape[1] // 3),), 3, len(x)),
                    lambda x: x.reshape(-1, x.shape[-1]).T)
HEADS_IN = Form(lambda x, h: x.T.reshape(x.shape[1], h, -1), lambda x: x.reshape(len(x), -1).T)
HEADS_BIAS = Form(lambda x, h: x.reshape(h, -1), lambda x: x.reshape(-1))
HEADS_OUT = Form(lambda x, h: x.T.reshape(h, -1, len(x)), lambda x: x.reshape(-1, x.shape[-1]).T)
TABLE = Form(lambda x, h: x[None], lambda x: x[0])
VECTOR = Form(lambda x, h: x.reshape(1, 1, -1), lambda x: x.reshape(-1))


@dataclasses.dataclass(frozen=True)
class Row:
  """ours: one path, or several that theirs holds one behind another along its first axis. '{}' stands for the layer."""
  ours: tuple[str, ...]
  theirs: str
  form: Form


@dataclasses.dataclass(frozen=True)
class Converted:
  """params: our tree, blocks stacked, float32. loaded: their names that went in. skipped: {name: why it is not ours}."""
  params: dict[str, Any]
  loaded: tuple[str, ...]
  skipped: dict[str, str]


def row(ours: str | Sequence[str], theirs: str, form: Form = SAME) -> Row:
  return Row((ours,) if isinstance(ours, str) else tuple(ours), theirs, form)


def norm(ours: str, theirs: str) -> list[Row]:
  """A layer norm."""
  return [row(f'{ours}/scale', f'{theirs}.weight'), row(f'{ours}/bias', f'{theirs}.bias')]


def dense(ours: str, theirs: str) -> list[Row]:
  """A linear layer with bias."""
  return [row(f'{ours}/kernel', f'{theirs}.weight', LINEAR), row(f'{ours}/bias', f'{theirs}.bias')]


def packed(ours: str, names: Sequence[str], weight: str, bias: str) -> list[Row]:
  """Projections into heads that lie in one matrix, such as torch's in_proj_weight."""
  return [row([f'{ours}/{n}/kernel' for n in names], weight, HEADS_IN),
          row([f'{ours}/{n}/bias' for n in names], bias, HEADS_BIAS)]


def heads_out(ours: str, theirs: str) -> list[Row]:
  """The projection back from the heads."""
  return [row(f'{ours}/out/kernel', f'{theirs}.weight', HEADS_OUT), row(f'{ours}/out/bias', f'{theirs}.bias')]


def to_jax(state: Mapping[str, np.ndarray], rows: Sequence[Row], *, depths: Mapping[str, int],
           heads: Mapping[str, int], expected: Mapping[str, tuple[int, ...]] | None = None, parts: str = 'both',
           skip: Iterable[tuple[str, str]] = (), where: str = 'weights') -> Converted:
  """Their arrays in our tree.

  Args:
    state: their name → array (or anything with a shape that NumPy takes).
    rows: the table.
    depths, heads: of our 'img' and 'txt'.
    expected: our path (loop layout) → shape, where the architecture is known; any other shape is an error.
    parts: 'image', 'text' or 'both' (with temperature and bias).
    skip: (regex of their name, why it is left out).
    where: the file, for errors.

  Raises:
    ValueError: with a ± line for each of their names that is missing (-), unexplained (+) or of another shape (!).
  """
  if parts not in PARTS:
    raise ValueError(f'init_parts: expected one of {PARTS}, got {parts!r}')
  wanted = {'image': ('img',), 'text': ('txt',), 'both': ('img', 'txt', *_SCALARS)}[parts]
  flat, lines, loaded, known = {}, [], [], {}
  for one in unrolled(rows, depths):
    part = one.ours[0].split('/')[0]
    known[one.theirs] = part
    if part not in wanted:
      continue
    if one.theirs not in state:
      lines.append(f'- {one.theirs}')
      continue
    x = np.asarray(state[one.theirs])
    try:
      pieces = [one.form.to_ours(piece, heads.get(part, 1)) for piece in np.split(x, len(one.ours))] if len(
          one.ours) > 1 else [one.form.to_ours(x, heads.get(part, 1))]
    except (ValueError, IndexError):
      pieces = None
    shapes = None if expected is None else [expected[path] for path in one.ours]
    if pieces is None or (shapes is not None and [p.shape for p in pieces] != shapes):
      want = 'another shape' if shapes is None else _their_shape(one, shapes)
      lines.append(f'! {one.theirs}: expected {want}, got {x.shape}')
      continue
    flat |= {path: np.asarray(piece, np.float32, order='C') for path, piece in zip(one.ours, pieces)}
    loaded.append(one.theirs)
  skipped = {}
  for name in state:
    if name in known:
      if known[name] not in wanted:
        skipped[name] = f'init_parts is {parts!r}'
      continue
    why = next((why for pattern, why in skip if re.fullmatch(pattern, name)), None)
    if why is None:
      lines.append(f'+ {name} {tuple(np.shape(state[name]))}')
    else:
      skipped[name] = why
  if lines:
    shown = '\n'.join(lines[:20] + ([f'… and {len(lines) - 20} more'] if len(lines) > 20 else []))
    raise ValueError(f'{where}: these are not the weights that were expected (- missing, + unexplained, ! other '
                     f'shape):\n{shown}')
  if 'b' in wanted:
    flat.setdefault('b', np.zeros((), np.float32))  # CLIP has none
  return Converted(trees.loop_to_scan(trees.unflatten(flat)), tuple(loaded), skipped)


def from_jax(params, rows: Sequence[Row]) -> dict[str, np.ndarray]:
  """Our tree under their names, C-contiguous. Parts that they do not have (prompter/, box_head/, …) are left out.

  The bias `b` of the similarity is left out as well where they have none: no softmax changes by it.

  Raises:
    ValueError: when a tower holds a parameter that has no place in their layout, or lacks one of theirs.
  """
  flat = {k: np.asarray(v) for k, v in trees.flatten(trees.scan_to_loop(params)).items()}
  depths = {part: 1 + max((int(n) for path in flat for n in re.findall(rf'{part}/.*encoderblock_(\d+)/', path)),
                          default=-1) for part in ('img', 'txt')}
  table = list(unrolled(rows, depths))
  covered = {path for one in table for path in one.ours}
  towers = {path for path in flat if path.startswith(('img/', 'txt/'))}
  lines = [f'+ {path} {flat[path].shape}' for path in sorted(towers - covered)]
  lines += [f'- {path}' for path in sorted(covered - flat.keys())]
  if lines:
    raise ValueError('the model does not fit their layout (+ has no place in it, - is missing):\n'
                     + '\n'.join(lines[:20]))
  return {one.theirs: np.asarray(_join([one.form.to_theirs(flat[path]) for path in one.ours]), order='C')
          for one in table}


def unrolled(rows: Sequence[Row], depths: Mapping[str, int]) -> Iterable[Row]:
  """The rows with every layer's own."""
  for one in rows:
    if '{}' not in one.theirs:
      yield one
      continue
    for layer in range(depths.get(one.ours[0].split('/')[0], 0)):
      yield Row(tuple(path.format(layer) for path in one.ours), one.theirs.format(layer), one.form)


def _join(pieces):
  return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def _their_shape(one, shapes):
  # Views of a single zero: nothing of these sizes is allocated for most forms.
  return _join([one.form.to_theirs(np.broadcast_to(np.float32(0), shape)) for shape in shapes]).shape
