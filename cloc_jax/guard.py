"""The guard of a run: floors under evaluation metrics, below which it stops (config.evals.floors)."""
from cloc_jax import config as config_lib


def check_floors(floors, splits) -> None:
  """Raises ValueError on rows of another form, or of a split that is not evaluated."""
  for row in floors:
    if not (isinstance(row, (tuple, list)) and len(row) == 2 and isinstance(row[0], str)
            and isinstance(row[1], (int, float))):
      raise ValueError(f"config.evals.floors: expected rows ('SPLIT/METRIC', VALUE), got {row!r}")
    if row[0].partition('/')[0] not in splits:
      raise ValueError(f'config.evals.floors: {row[0]!r}: the splits that are evaluated are {list(splits)}')


def check_start(evaluations, floors) -> None:
  """A floor above what the run starts with would stop it after the first evaluation, with the work done."""
  found = below({f'{split}/{k}': v for split, found in evaluations.items() for k, v in found.items()}, floors,
                 always=True)
  if found:
    raise ValueError(f'config.evals.floors: before the first step, {found}')


def below(scores, floors, *, always: bool = False) -> str:
  """Which floors are missed, '' for none. Without scores (no evaluation was due) none is, unless `always`.

  Raises:
    ValueError: when a metric was not measured, naming the nearest.
  """
  if not scores and not always:
    return ''
  missing = [name for name, _ in floors if name not in scores]
  if missing:
    raise ValueError(f'config.evals.floors: {missing[0]!r} was not measured.{config_lib.nearest(missing[0], scores)} '
                     f'Measured: {sorted(scores)}')
  return '; '.join(f'{name} is {scores[name]:.4f}, below its floor of {floor:.4f}' for name, floor in floors
                   if not scores[name] >= floor)
