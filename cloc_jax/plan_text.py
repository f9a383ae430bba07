"""`cloc plan` in words, and as JSON."""
import dataclasses
import json
import math

from cloc_jax import plan as plan_lib


def render(plans: list[plan_lib.Plan], *, seconds: float | None = None) -> str:
  """The first plan in full, the others as what would change."""
  plan = plans[0]
  gb = lambda b: f'{b / 1e9:.2f} GB' if b < 1e11 else f'{b / 1e9:,.0f} GB'
  m = plan.memory
  lines = [f'{plan.label}  on {plan.topology}: {plan.chips} chips, batch {plan.batch_size:,} '
           f'({plan.batch_size // plan.chips} images a chip) · {plan.method}', *filter(None, [plan.choice]), '',
           'memory a chip' + ('' if m.fits else '   — DOES NOT FIT'),
           f'  parameters   {gb(m.parameters):>10}', f'  optimizer    {gb(m.optimizer):>10}',
           f'  batch        {gb(m.batch):>10}',
           f'  temporaries  {gb(m.temporaries):>10}   of which, from shapes: {gb(m.activations)} activations kept for the '
           f'backward pass, {gb(m.working)} in its hands',
           f'  total        {gb(m.total):>10}   of {gb(m.available)}', '',
           f'GFLOPs an image, forward and backward (formula): {plan.flops_per_image["all"] / 1e9:,.1f}']
  lines += [f'  {name:<12} {value / 1e9:>10,.1f}' for name, value in plan.flops_per_image.items()
            if name != 'all' and value]
  is_compiled = plan.method == 'compiled'
  lines += ['', 'received a chip and step ' + ('(read from the compiled program)' if is_compiled else '(formula)')]
  lines += [f'  {kind:<18} {gb(size):>10}' for kind, size in plan.received.items()]
  lines += [f'  {"over fast links":<18} {gb(sum(plan.received.values())):>10}']
  lines += [f'  {"over the network":<18} {gb(plan.network):>10}'] if plan.network else []
  how = ('operands and results of every instruction of the compiled program, loops as often as they run' if is_compiled
         else "formula: matrix products' operands and results, and what loops hand on; as if chips had no caches")
  lines += ['', f'in and out of memory a chip and step: {gb(plan.moved)}', f'  ({how})']
  lines += ['', 'a step, by resource alone at its peak (estimate)']
  lines += [f'  {name:<12} {value * 1e3:>10,.1f} ms' + ('   ← binds' if name == plan.bound else '')
            for name, value in plan.seconds.items()]
  lines += ['', f'expected with compute at {plan_lib.EXPECTED_UTILISATION:.0%} of peak: '
            f'{plan.step_seconds * 1e3:,.0f} ms a step, {plan.images_per_second:,.0f} images/s, {plan.days:,.1f} days and '
            f'{plan.chip_hours:,.0f} chip-hours for '
            f'{plan.total_steps:,} steps']
  if len(plans) > 1:
    lines += ['', f'{"what if":<24}{"GB a chip":>11}{"fits":>6}{"received":>12}{"ms a step":>11}{"chip-hours":>12}']
    for p in plans:
      lines.append(f'{p.label if p is not plan else "(as it is)":<24}{p.memory.total / 1e9:>11.1f}'
                   f'{"yes" if p.memory.fits else "NO":>6}{gb(sum(p.received.values())):>12}'
                   f'{p.step_seconds * 1e3:>11,.0f}{p.chip_hours:>12,.0f}')
  lines += ['', *(f'note: {n}' for n in dict.fromkeys(n for p in plans for n in p.notes))]
  if seconds is not None:
    lines.append(f'({plan.method} in {seconds:.0f} s; nothing was run on such a chip)')
  return '\n'.join(lines)


def to_json(plans: list[plan_lib.Plan]) -> str:
  def one(p):
    derived = ('bound', 'step_seconds', 'images_per_second', 'days', 'chip_hours')
    memory = dataclasses.asdict(p.memory) | {'total': p.memory.total, 'fits': p.memory.fits}
    memory = {k: None if v == math.inf else v for k, v in memory.items()}  # the compiler did not say how much
    return dataclasses.asdict(p) | {k: getattr(p, k) for k in derived} | {'memory': memory}
  return json.dumps([one(p) for p in plans], indent=1)
