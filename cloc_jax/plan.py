"""`cloc plan`: will an experiment fit on given hardware, how fast will it go, and what will it take?

The real training step is lowered from shapes alone. Where libtpu is installed (no TPU is needed) its compiler compiles it
for the chips asked for, and temporaries, messages and memory traffic are read from the result: `compiled`. Elsewhere
they are worked out from the shapes: `estimated`. Parameters, optimizer and batch follow from the sharding rules. FLOPs
are always the formulas of models/flops.py, times always roofline estimates. Nothing is ever run.
"""
import dataclasses
import os
import re
from typing import Any

import jax

from cloc_jax import config as config_lib
from cloc_jax import hardware, hlo, plan_step
from cloc_jax.plan_step import Memory, OutOfMemory

# What a well-kept step reaches of its chip's peak; used for the expected time beside the roofline's lower bound.
EXPECTED_UTILISATION = 0.5
# What `fit` allows compiled temporaries to be of the estimated ones. Measured on cloc_b16 to cloc_h14: 1.0 where the chip
# is full, 0.9 to 1.4 where there is room, which the compiler then uses to have more under way.
FIT_MARGIN = 1.25


@dataclasses.dataclass(frozen=True)
class Plan:
  """See `render` for what each figure says. seconds: by resource, for one step, each alone at the chip's peak."""
  label: str
  method: str                      # 'compiled', 'estimated', or 'refused' (the compiler ran out of memory)
  topology: str
  chips: int
  memory: Memory
  flops_per_image: dict[str, float]
  batch_size: int
  received: dict[str, float]       # bytes a chip and step over the fast links, by kind of message
  network: float                   # bytes a chip and step between slices or nodes
  moved: float                     # bytes a chip and step in and out of its memory
  seconds: dict[str, float]
  total_steps: int
  notes: tuple[str, ...] = ()
  choice: str = ''                 # what --fit chose, and why

  @property
  def bound(self) -> str:
    return max(self.seconds, key=self.seconds.get)

  @property
  def step_seconds(self) -> float:
    """Expected: compute at EXPECTED_UTILISATION, or memory or a link that takes longer."""
    return max(self.seconds['compute'] / EXPECTED_UTILISATION, *(v for k, v in self.seconds.items() if k != 'compute'))

  @property
  def images_per_second(self) -> float:
    return self.batch_size / self.step_seconds

  @property
  def days(self) -> float:
    return self.total_steps * self.step_seconds / 86_400

  @property
  def chip_hours(self) -> float:
    return self.days * 24 * self.chips


def make(config, *, topology: str, estimate: bool = False, label: str = '') -> Plan:
  """Plans one experiment on one topology.

  Args:
    config: an experiment. topology: see hardware.topology. estimate: do not compile, even where it is possible.

  Raises:
    ValueError: on an unknown topology, or a batch or mesh that does not fit its chips.
  """
  return _plan(plan_step.Step(config, hardware.topology(topology)), topology=topology, estimate=estimate, label=label)


def _plan(step: plan_step.Step, *, topology: str, estimate: bool, label: str) -> Plan:
  where, notes, compiled = step.where, list(step.notes), None
  if not estimate and where.libtpu_name:
    compiled, reason = _compile(step, where)
    notes += [reason] if reason else []
  elif not where.libtpu_name:
    notes.append('memory and messages are estimated: only TPU programs are compiled')
  method = 'estimated' if compiled is None else 'compiled'
  if isinstance(compiled, OutOfMemory):
    method = 'refused'
    notes.append(f'does not fit, messages are estimated: {compiled.message}')
  if method == 'compiled':
    text = compiled.as_text()
    traffic = hlo.traffic(text, devices=where.chips_per_slice, slices=where.slices)
    received, network, moved = traffic.received, sum(traffic.network.values()), hlo.memory_bytes(text)
    notes += [f'messages: {doubt}' for doubt in traffic.doubts]
  else:
    received, moved = step.estimated_messages(), step.estimated_memory_bytes()
    network = step.estimated_network(received) if where.slices > 1 else 0.0
  if step.loss.get('tile_dtype', 'float32') == 'float32':
    notes.append('loss.tile_dtype is float32: its exact products take several times longer than the peak for bfloat16 says')
  per_image = step.data.step_flops(step.model)
  work = (step.train_flops(per_image) + step.recomputed(per_image)) * step.data.batch_size / where.chips
  chip = where.chip
  seconds = {'compute': work / chip.flops, 'memory': moved / chip.hbm_bandwidth,
             'links': sum(received.values()) / chip.links if chip.links else 0.0}
  if where.slices > 1:
    seconds['network'] = network / chip.network
  return Plan(label=label, method=method, topology=topology, chips=where.chips, memory=step.memory(compiled),
              flops_per_image=_by_part(per_image), batch_size=step.data.batch_size, received=received, network=network,
              moved=moved, seconds=seconds, total_steps=step.total_steps, notes=tuple(notes))


def _by_part(per_image) -> dict[str, float]:
  parts = dataclasses.asdict(per_image)
  return {name.replace('_', ' '): 3 * value for name, value in parts.items()} | {'all': per_image.train}


def _compile(step: plan_step.Step, where: hardware.Topology) -> tuple[Any, str]:
  """(the compiled step, an OutOfMemory, or None; why it is None)."""
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')  # there is no TPU to ask
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')  # nor one to be kept from others
  try:
    from jax.experimental import topologies
    several = {'num_slices': where.slices} if where.slices > 1 else {}
    devices = topologies.get_topology_desc(platform='tpu', topology_name=where.libtpu_name, **several).devices
  except Exception as error:  # libtpu raises what it likes
    return None, (f'not compiled: {_first_line(error)} (pip install "cloc_jax[tpu]" brings the compiler; no TPU is '
                  'needed)')
  try:
    return step.lower(devices).compile(), ''
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    size = re.search(r'\(([\d.]+)([KMGT])\) exceeds', str(error))
    needed = float(size[1]) * 2**(10 * (' KMGT'.index(size[2]))) if size else None
    return OutOfMemory(_first_line(error), needed), ''


def _first_line(error) -> str:
  return (str(error).splitlines() or [type(error).__name__])[0][:200]


# --- what to choose, and what would change


def fit(load, *, topology: str, estimate: bool = False, label: str = '') -> tuple[Plan, list[str]]:
  """(the plan with the smallest power of two of micro-batches that fits, the overrides that choose it).

  The first choice is the estimate's, with FIT_MARGIN on its temporaries. Where it can be compiled, the compiler has the
  last word: as long as it refuses, or needs more than there is, the next is tried. If none fits, the last is returned.
  load: overrides → config.
  """
  where = hardware.topology(topology)
  counts = [1]
  while load([]).data.batch_size % (2 * counts[-1] * where.chips) == 0:
    counts.append(2 * counts[-1])
  tried: list[str] = []
  for count in counts:  # the last one returns in any case
    overrides = [f'train.micro_batches={count}']
    step = plan_step.Step(load(overrides), where)
    memory = step.memory(None)
    needed = memory.total + (FIT_MARGIN - 1) * memory.temporaries
    if needed > memory.available and count != counts[-1]:
      tried.append(f'{count}: {needed / 1e9:.1f} GB estimated, with a margin of {FIT_MARGIN}')
      continue
    found = _plan(step, topology=topology, estimate=estimate, label=label)
    fits = found.memory.fits and (found.method != 'estimated' or needed <= memory.available)
    tried.append(f'{count}: {found.memory.total / 1e9:.1f} GB {found.method}' + (
        f', {needed / 1e9:.1f} GB with a margin of {FIT_MARGIN}' if found.method == 'estimated' else ''))
    if fits or count == counts[-1]:
      verdict = f'fits: --config.{overrides[0]}' if fits else (
          'no number of micro-batches fits; try remat="full", a larger mesh.fsdp, or more chips')
      return dataclasses.replace(found, choice=f'{verdict}   ({"; ".join(tried)}; of {memory.available / 1e9:.0f} GB)'
                                 ), overrides


def variants(config) -> list[tuple[str, list[str]]]:
  """(label, overrides) of what a person would try next."""
  out = []
  data, model = config['data'], config['model']
  if model['region_encoder'] == 'prompter':
    if data['regions_per_image'] > 2:
      out.append(('M = 2', ['data.regions_per_image=2']))
    other = {'all': 'prompt', 'prompt': 'all'}[model.get('prompter', {}).get('pool', 'all')]
    if 'pool' in model.get('prompter', {}):
      out.append((f'pool="{other}"', [f'model.prompter.pool={other}']))
  out.append(('half the batch', [f'data.batch_size={data["batch_size"] // 2}']))
  if 'remat' in model['image'] and 'remat' in model['text']:
    now = model['image']['remat']
    out += [(f'remat "{r}"', [f'model.image.remat={r}', f'model.text.remat={r}'])
            for r in ('none', 'dots', 'full') if r != now]
  if config['mesh'].get('fsdp', 1) != 1:
    out.append(('parameters replicated', ['mesh.data=-1', 'mesh.fsdp=1']))
  return out


def run(spec: str, *, assignments, topology: str, estimate: bool = False, what_if: bool = False,
        choose: bool = False) -> list[Plan]:
  """Plans an experiment file: as it is (choose: with the micro-batches that fit), and with what_if its variants."""
  def load(more):
    config = config_lib.load(spec)
    config_lib.override(config, [*assignments, *more])
    return config
  name, chosen = os.path.basename(spec), []
  if choose:
    first, chosen = fit(load, topology=topology, estimate=estimate, label=name)
  else:
    first = make(load([]), topology=topology, estimate=estimate, label=name)
  plans = [first]
  if what_if:
    for label, overrides in variants(load(chosen)):
      try:
        plans.append(make(load([*chosen, *overrides]), topology=topology, estimate=estimate, label=label))
      except (ValueError, jax.errors.JaxRuntimeError) as error:  # must not cost what was found before
        plans[0] = dataclasses.replace(plans[0], notes=(*plans[0].notes, f'{label}: {_first_line(error)}'))
  return plans
