"""Parameter trees: path names, ordered regex rules, readable differences, merging, and loop ↔ scan layouts."""
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np


def flatten(tree) -> dict[str, Any]:
  """Nested tree → {'img/embedding/kernel': leaf, …}, in tree order."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in leaves}


def map_with_path(fn: Callable[..., Any], tree, *rest):
  """jax.tree.map whose function gets the leaf's path name first."""
  return jax.tree_util.tree_map_with_path(
      lambda path, *leaves: fn(jax.tree_util.keystr(path, simple=True, separator='/'), *leaves), tree, *rest)


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
  """The inverse of `flatten` for trees of dictionaries."""
  tree: dict[str, Any] = {}
  for path, leaf in flat.items():
    *parents, last = path.split('/')
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return tree


def match_rules(tree, rules: Sequence[tuple[str, Any]], *, what: str):
  """Gives every leaf the value of the first rule whose regex matches its whole path.

  Raises:
    ValueError: naming the paths that no rule matches, or a rule that is not a valid regex.
  """
  compiled = []
  for pattern, value in rules:
    try:
      compiled.append((re.compile(pattern), value))
    except re.error as error:
      raise ValueError(f'{what}: {pattern!r} is not a regular expression: {error}') from error
  unmatched: list[str] = []

  def pick(path, _):
    for regex, value in compiled:
      if regex.fullmatch(path):
        return value
    unmatched.append(path)
    return None

  out = map_with_path(pick, tree)
  if unmatched:
    raise ValueError(f'{what}: no rule matches {unmatched[:5]}{" …" if len(unmatched) > 5 else ""} '
                     f'({len(unmatched)} parameters); rules: {[p for p, _ in rules]}')
  return out


def difference(expected, got, *, limit: int = 20) -> str:
  """A readable ± difference of two trees' paths and shapes; empty when they agree.

  Lines: '- path shape' is expected but absent, '+ path shape' is there unasked, '! path expected got' differs in shape.
  """
  want = {k: tuple(np.shape(v)) for k, v in flatten(expected).items()}
  have = {k: tuple(np.shape(v)) for k, v in flatten(got).items()}
  lines = []
  for path in sorted(want.keys() | have.keys()):
    if path not in have:
      near = difflib.get_close_matches(path, have.keys() - want.keys(), 1, 0.8)
      lines.append(f'- {path} {want[path]}' + (f'   (is it {near[0]}?)' if near else ''))
    elif path not in want:
      lines.append(f'+ {path} {have[path]}')
    elif want[path] != have[path]:
      lines.append(f'! {path}: expected {want[path]}, got {have[path]}')
  if len(lines) > limit:
    lines = lines[:limit] + [f'… and {len(lines) - limit} more']
  return '\n'.join(lines)


def merge(expected, got, *, where: str):
  """Returns `got` in the structure of `expected`.

  Raises:
    ValueError: with `where` and the ± difference, when paths or shapes disagree.
  """
  text = difference(expected, got)
  if text:
    raise ValueError(f'{where}: the parameters belong to another architecture '
                     f'(- expected and missing, + unexpected, ! other shape):\n{text}')
  flat = flatten(got)
  return map_with_path(lambda path, _: flat[path], expected)


def global_norm(tree):
  """√Σ x² over all leaves, float32 scalar."""
  squares = [jax.numpy.sum(jax.numpy.square(x.astype(jax.numpy.float32))) for x in jax.tree.leaves(tree)]
  return jax.numpy.sqrt(sum(squares))


def count(tree) -> int:
  """Number of scalars in a tree of arrays or shapes."""
  return sum(int(np.prod(np.shape(x))) for x in jax.tree.leaves(tree))


_STACKED = 'encoderblock'


def scan_to_loop(params):
  """Stacked blocks 'encoderblock/…' → 'encoderblock_0/…', 'encoderblock_1/…', the layout of unscanned code."""
  out = {}
  for path, leaf in flatten(params).items():
    parts = path.split('/')
    if _STACKED not in parts:
      out[path] = leaf
      continue
    at = parts.index(_STACKED)
    for layer in range(leaf.shape[0]):
      out['/'.join([*parts[:at], f'{_STACKED}_{layer}', *parts[at + 1:]])] = leaf[layer]
  return unflatten(out)


def loop_to_scan(params):
  """The inverse of `scan_to_loop`.

  Raises:
    ValueError: when a stack lacks a layer.
  """
  out, stacks, depths = {}, {}, {}
  for path, leaf in flatten(params).items():
    found = re.fullmatch(rf'(.*?/)?{_STACKED}_(\d+)/(.*)', path)
    if not found:
      out[path] = leaf
      continue
    stack, layer = f'{found[1] or ""}{_STACKED}', int(found[2])
    stacks.setdefault((stack, found[3]), {})[layer] = leaf
    depths[stack] = max(depths.get(stack, 0), layer + 1)
  for (stack, rest), layers in stacks.items():
    missing = sorted(set(range(depths[stack])) - set(layers))
    if missing:
      raise ValueError(f'{stack}/{rest}: layers {missing} are missing')
    out[f'{stack}/{rest}'] = np.stack([layers[i] for i in range(len(layers))])
  return unflatten(out)
