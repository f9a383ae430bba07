"""The optimizer of SPEC §4: AdamW with decay on matrices alone, warm-up, cosine; rates by group of parameters."""
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from cloc_jax import trees

# Decay shrinks matrices; biases, norm gains, position tables and the temperature have no reason to be near zero.
_NO_DECAY = r'(.*/)?(bias|scale|pos_embedding|corner_embedding|cls|probe|t|b|region_t|region_b)'


def schedule(*, learning_rate: float, total_steps: int, warmup_steps: int, end_factor: float = 0.0) -> optax.Schedule:
  """Linear warm-up from 0 to `learning_rate` in `warmup_steps`, then cosine to `end_factor` of it at `total_steps`."""
  if not 0 <= warmup_steps <= total_steps:
    raise ValueError(f'optim.warmup_steps: expected 0 … total_steps = {total_steps}, got {warmup_steps}')
  return optax.warmup_cosine_decay_schedule(
      init_value=0.0, peak_value=learning_rate, warmup_steps=warmup_steps,
      decay_steps=max(total_steps, warmup_steps + 1), end_value=end_factor * learning_rate)


def decay_mask(params):
  """True where weight decay applies."""
  return trees.match_rules(params, [(_NO_DECAY, False), (r'.*', True)], what='optim.decay_mask')


# One row: (regex of whole paths, factor on the learning rate[, step from which they are trained at all]).
Multipliers = Sequence[tuple[str, float] | tuple[str, float, int]]


def groups(params, multipliers: Multipliers) -> dict[str, tuple[float, int]]:
  """{path: (factor, first step)} of every parameter, by the first row that matches; (1, 0) where none does.

  Raises:
    ValueError: on a row of another form, or one that matches nothing: what was to be frozen would be trained.
  """
  rules = []
  for row in multipliers:
    if (not isinstance(row, (tuple, list)) or len(row) not in (2, 3) or not isinstance(row[0], str)
        or not all(isinstance(n, (int, float)) and n >= 0 for n in row[1:])):
      raise ValueError(f'optim.multipliers: expected rows (REGEX, FACTOR[, FROM_STEP]), got {row!r}')
    rules.append((row[0], (float(row[1]), int(row[2]) if len(row) == 3 else 0)))
  rules.append(('.*', (1.0, 0)))
  first = trees.flatten(trees.match_rules(params, [(pattern, i) for i, (pattern, _) in enumerate(rules)],
                                          what='optim.multipliers'))
  for pattern, _ in rules:
    if not any(re.fullmatch(pattern, path) for path in first):
      raise ValueError(f'optim.multipliers: {pattern!r} matches no parameter; they are such as {list(first)[:4]}')
  return {path: rules[i][1] for path, i in first.items()}


def trained(params, multipliers: Multipliers, *, step: int | None = None) -> frozenset[str] | None:
  """Paths of the parameters that are trained at `step`, or at any step; None for all of them."""
  if not multipliers:
    return None
  chosen = groups(params, multipliers)
  return frozenset(path for path, (factor, first) in chosen.items() if factor and (step is None or first <= step))


def stages(multipliers: Multipliers) -> list[int]:
  """The steps at which the set of trained parameters changes, 0 among them."""
  return sorted({0, *(int(row[2]) for row in multipliers if len(row) == 3 and row[1])})


def _by_group(inner: optax.GradientTransformation, multipliers: Multipliers) -> optax.GradientTransformation:
  """`inner` on the parameters that are ever trained, its updates scaled. Frozen ones have no state and no update.

  Gradients may lack parameters that are not trained yet; they count as zero. (Their moments stay zero, so that the
  bias correction is over when they begin: Adam's first updates are then 0.7 to 1.7 times the rate, not 1.)
  """
  def select(params):
    flat, chosen = trees.flatten(params), trained(params, multipliers)
    return trees.unflatten({path: x for path, x in flat.items() if path in chosen})

  def init(params):
    own = select(params)
    if not own:
      raise ValueError('optim.multipliers: every parameter is frozen; nothing would be trained')
    return {'step': jnp.zeros((), jnp.int32), 'inner': inner.init(own)}

  def update(gradients, state, params):
    own, gradients = select(params), trees.flatten(gradients)
    gradients = trees.map_with_path(lambda path, x: gradients.get(path, jnp.zeros_like(x)), own)
    updates, inner_state = inner.update(gradients, state['inner'], own)
    chosen = groups(params, multipliers)

    def scale(path, x):
      factor, first = chosen[path]
      return factor * x if not first else jnp.where(state['step'] >= first, factor * x, 0)
    return trees.map_with_path(scale, updates), {'step': state['step'] + 1, 'inner': inner_state}

  return optax.GradientTransformation(init, update)


def apply(params, updates) -> Any:
  """The parameters with their updates added; `updates` may be of some of them alone."""
  if jax.tree.structure(params) == jax.tree.structure(updates):
    return optax.apply_updates(params, updates)
  changes = trees.flatten(updates)
  return trees.map_with_path(lambda path, x: (x + changes[path]).astype(x.dtype) if path in changes else x, params)


def make(*, total_steps: int, learning_rate: float = 5e-4, warmup_steps: int = 2000, end_factor: float = 0.0,
         b1: float = 0.9, b2: float = 0.98, eps: float = 1e-6, weight_decay: float = 0.2,
         clip_norm: float | None = 1.0,
         multipliers: Multipliers = ()) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """Returns (optimizer, learning-rate schedule).

  clip_norm: global gradient norm above which gradients are scaled down; None for no clipping.
  multipliers: rows (regex of parameter paths, factor on their learning rate[, step from which they are trained]); the
    first that matches counts, 1 where none does. Factor 0 freezes: no gradient, no optimizer state, no update.
  """
  rate = schedule(learning_rate=learning_rate, total_steps=total_steps, warmup_steps=warmup_steps,
                  end_factor=end_factor)
  parts = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
  parts.append(optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decay_mask))
  whole = optax.chain(*parts)
  return _by_group(whole, multipliers) if multipliers else whole, rate
