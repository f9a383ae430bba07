"""Which step function a step takes: one for each set of parameters that is trained."""
import bisect

from cloc_jax import optim, trees


class Stages:
  """The step function of each step: what is trained may change in the course of a run (optim.multipliers)."""

  def __init__(self, multipliers, params, flops_an_image, batch_size, make):
    self._starts = optim.stages(multipliers)
    self._trained = [optim.trained(params, multipliers, step=first) for first in self._starts]
    self._total = len(trees.flatten(params))
    self._flops_an_image, self._batch = flops_an_image, batch_size
    self._make, self._made = make, {}

  def _at(self, step):
    return bisect.bisect_right(self._starts, step) - 1

  def step_fn(self, step: int):
    """For the update after `step` updates."""
    stage = self._at(step)
    if stage not in self._made:
      self._made[stage] = self._make(self._trained[stage])
    return self._made[stage]

  def flops(self, step: int) -> float:
    trained = self._trained[self._at(max(step - 1, 0))]
    trains = lambda part: trained is None or any(path.startswith(f'{part}/') for path in trained)
    return self._flops_an_image.trained(image=trains('img'), text=trains('txt')) * self._batch

  def describe(self, start: int) -> str:
    """What is trained from `start` on; one line."""
    says = lambda trained: 'all parameters' if trained is None else (
        f'{len(trained)} of {self._total} arrays ({", ".join(sorted({p.split("/")[0] for p in trained}))})')
    left = list(zip(self._starts, self._trained))[self._at(start):]
    return 'training ' + ', '.join(says(trained) + (f' from step {first}' if first else '') for first, trained in left)
