"""The optimizer of SPEC §4: AdamW with decay on matrices alone, linear warm-up, cosine."""
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


def make(*, total_steps: int, learning_rate: float = 5e-4, warmup_steps: int = 2000, end_factor: float = 0.0,
         b1: float = 0.9, b2: float = 0.98, eps: float = 1e-6, weight_decay: float = 0.2,
         clip_norm: float | None = 1.0) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """Returns (optimizer, learning-rate schedule).

  clip_norm: global gradient norm above which gradients are scaled down; None for no clipping.
  """
  rate = schedule(learning_rate=learning_rate, total_steps=total_steps, warmup_steps=warmup_steps,
                  end_factor=end_factor)
  parts = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
  parts.append(optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decay_mask))
  return optax.chain(*parts), rate
