"""`cloc plan`: will an experiment fit on given hardware, how fast will it go, and what will it take?

The real training step is lowered from shapes alone. Where libtpu is installed (no TPU is needed) its compiler compiles it
for the chips asked for, and temporaries and messages are read from the result: `compiled`. Elsewhere they are worked out
from the shapes: `estimated`. Parameters, optimizer and batch follow from the sharding rules. FLOPs are always the
formulas of models/flops.py, times always roofline estimates. Nothing is ever run.
"""
import dataclasses
import json
import math
import os
import re
import time
from typing import Any

import jax
import numpy as np

from cloc_jax import config as config_lib
from cloc_jax import hardware, hlo, inference, optim, sharding, train, train_step

T5_VOCABULARY = 32_100
# What a well-kept step reaches of its chip's peak; used for the expected time beside the roofline's lower bound.
EXPECTED_UTILISATION = 0.5


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes a chip. parameters, optimizer, batch: what goes in; activations: what the forward pass keeps for the backward
  pass (from shapes; part of temporaries); temporaries: everything that lives during a step; available: the chip's."""
  parameters: float
  optimizer: float
  batch: float
  activations: float
  temporaries: float
  available: float

  @property
  def total(self) -> float:
    return self.parameters + self.optimizer + self.batch + self.temporaries

  @property
  def fits(self) -> bool:
    return self.total <= self.available


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
  seconds: dict[str, float]
  total_steps: int
  notes: tuple[str, ...] = ()

  @property
  def bound(self) -> str:
    return max(self.seconds, key=self.seconds.get)

  @property
  def step_seconds(self) -> float:
    """Expected: compute at EXPECTED_UTILISATION, or a link that takes longer."""
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


class _Vocabulary:
  """Stands in for a tokenizer whose file is not here: a plan needs its size alone."""

  def __init__(self, size):
    self.vocab_size, self.eos_id = size, 1


def make(config, *, topology: str, estimate: bool = False, label: str = '') -> Plan:
  """Plans one experiment on one topology.

  Args:
    config: an experiment. topology: see hardware.topology. estimate: do not compile, even where it is possible.

  Raises:
    ValueError: on an unknown topology, or a batch or mesh that does not fit its chips.
  """
  where = hardware.topology(topology)
  step = _Step(config, where)
  notes = list(step.notes)
  compiled = None
  if not estimate and where.libtpu_name:
    compiled, reason = _compile(step, where.libtpu_name)
    notes += [reason] if reason else []
  elif not where.libtpu_name:
    notes.append('memory and messages are estimated: only single TPU slices are compiled')
  memory = step.memory(compiled)
  method = 'estimated' if compiled is None else 'compiled'
  if isinstance(compiled, OutOfMemory):
    method = 'refused'
    notes.append(f'does not fit, messages are estimated: {compiled.message}')
  if method == 'compiled':
    traffic = hlo.traffic(compiled.as_text(), devices=where.chips)
    received = traffic.received
    notes += [f'messages: {doubt}' for doubt in traffic.doubts]
  else:
    received = step.estimated_messages()
  if step.loss.get('tile_dtype', 'float32') == 'float32':
    notes.append('loss.tile_dtype is float32: its exact products take several times longer than the peak for bfloat16 says')
  network = sum(received.values()) / where.chips_per_slice if where.slices > 1 else 0.0
  per_image = step.data.step_flops(step.model)
  work = (per_image.train + step.recomputed(per_image)) * step.data.batch_size / where.chips
  chip = where.chip
  seconds = {'compute': work / chip.flops, 'links': sum(received.values()) / chip.links if chip.links else 0.0}
  if where.slices > 1:
    seconds['network'] = network / chip.network
  return Plan(label=label, method=method, topology=topology, chips=where.chips, memory=memory,
              flops_per_image=_by_part(per_image), batch_size=step.data.batch_size, received=received, network=network,
              seconds=seconds, total_steps=step.total_steps, notes=tuple(notes))


def _by_part(per_image) -> dict[str, float]:
  parts = dataclasses.asdict(per_image)
  return {name.replace('_', ' '): 3 * value for name, value in parts.items()} | {'all': per_image.train}


@dataclasses.dataclass(frozen=True)
class OutOfMemory:
  """The compiler's refusal. needed: bytes of temporaries, where it says."""
  message: str
  needed: float | None


class _Step:
  """An experiment's training step as shapes."""

  def __init__(self, config, where: hardware.Topology):
    config_lib.check_sections(config, where='config')
    self.where = where
    self.data = config_lib.call(train.DataOptions, config['data'], name='data')
    self.options = config_lib.call(train.TrainOptions, config['train'], name='train')
    self.loss = config_lib.plain(config['loss'])
    self.mesh_section = dict(config_lib.plain(config['mesh']))
    self.rules = self.mesh_section.pop('rules', (('.*', 'fsdp'),))
    self.mesh = config_lib.call(sharding.mesh_sizes, self.mesh_section, where.chips, name='mesh')
    self.notes: list[str] = []
    size = self._vocabulary()
    self.model = inference.build_model(config, tokenizer=_Vocabulary(size))
    if self.data.batch_size % where.chips:
      raise ValueError(f'config.data.batch_size: {self.data.batch_size} does not divide over {where.chips} chips')
    dataset_size = 1 if self.options.total_epochs is None else self._dataset_size()
    self.total_steps = config_lib.duration(vars(self.options), 'total', batch_size=self.data.batch_size,
                                           dataset_size=dataset_size)
    self.tx, self.rate = config_lib.call(optim.make, config['optim'], name='optim', total_steps=self.total_steps)
    self.batch = self.data.abstract_batch()
    self.state = train_step.abstract_state(self.model, self.tx, self.batch, ema=self.options.ema_decay > 0)
    mesh = jax.sharding.AbstractMesh(tuple(self.mesh.values()), tuple(self.mesh))
    self.shardings = train_step.state_sharding(self.state, mesh=mesh, rules=self.rules)

  def _vocabulary(self) -> int:
    kind, _, rest = self.data.tokenizer.partition(':')
    if kind == 'train' and rest.isdigit():
      return int(rest)
    from cloc_jax.data import tokenizer as tokenizer_lib
    try:
      return tokenizer_lib.load(self.data.tokenizer).vocab_size
    except (OSError, ValueError):
      self.notes.append(f"{self.data.tokenizer} is not here: T5's vocabulary of {T5_VOCABULARY:,} is assumed")
      return T5_VOCABULARY

  def _dataset_size(self) -> int:
    from cloc_jax.data import sources
    return len(sources.RecordSource(self.data.path, split=self.data.split))

  def lower(self, devices):
    """The real step, lowered for these devices."""
    mesh = config_lib.call(sharding.make_mesh, self.mesh_section, name='mesh', devices=devices)
    shardings = train_step.state_sharding(self.state, mesh=mesh, rules=self.rules)
    place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    state = jax.tree.map(place, self.state, shardings)
    batch = jax.tree.map(lambda x: place(x, sharding.batch_sharding(mesh)), self.batch)
    step = train_step.jit_train_step(
        mesh=mesh, shardings=shardings, model=self.model, tx=self.tx, rate=self.rate, loss=self.loss,
        micro_batches=self.options.micro_batches, ema_decay=self.options.ema_decay)
    return step.lower(state, batch)

  def recomputed(self, per_image) -> float:
    """FLOPs an image that are spent again: towers under remat="full", and everything once more in micro-batches.

    remat="dots" repeats elementwise work and the attention's own products: some per cent, which are left out.
    """
    again = lambda tower, *parts: sum(parts) if tower.get('remat') == 'full' else 0.0
    out = again(self.model.image, per_image.image_tower) + again(self.model.text, per_image.text_tower,
                                                                 per_image.region_text)
    return out + (per_image.forward - per_image.losses if self.options.micro_batches > 1 else 0.0)

  def activations(self) -> float:
    """Bytes of all chips together that the forward pass hands to the backward pass."""
    def residuals(params, batch):
      outputs, pull_back = jax.vjp(lambda p: self.model.apply({'params': p}, batch), params)
      return outputs, pull_back
    part = jax.tree.map(lambda x: jax.ShapeDtypeStruct((x.shape[0] // self.options.micro_batches, *x.shape[1:]), x.dtype),
                        self.batch)
    kept = jax.eval_shape(residuals, self.state.params, part)
    return max(0.0, _bytes(kept) - _bytes(self.state.params))

  def memory(self, compiled) -> Memory:
    chips = self.where.chips
    activations = self.activations() / chips
    parameters = _bytes(self.state.params, self.shardings.params)
    optimizer = _bytes(self.state.opt_state, self.shardings.opt_state) + _bytes(self.state.ema, self.shardings.ema)
    if isinstance(compiled, OutOfMemory):
      temporaries = compiled.needed or math.inf
    elif compiled is not None:
      temporaries = compiled.memory_analysis().temp_size_in_bytes
    else:  # gradients, a gathered copy of the parameters in the towers' dtype, and the tiled losses' embeddings
      width = np.dtype(self.model.dtype).itemsize / 4
      gathered = _bytes(self.state.params) * width if self.mesh['fsdp'] > 1 else 0
      columns = self._loss_rows() * self.model.embed_dim * (self._tile_bytes() + 4)
      temporaries = activations + parameters + gathered + columns * {'ring': 2 / chips}.get(self._transport(), 1)
    return Memory(parameters=parameters, optimizer=optimizer, batch=_bytes(self.batch) / chips, activations=activations,
                  temporaries=temporaries, available=self.where.chip.hbm_bytes)

  def estimated_messages(self) -> dict[str, float]:
    """Gradients summed over data, parameters gathered twice and gradients scattered over fsdp, embeddings collected."""
    chips, (data, fsdp) = self.where.chips, self.mesh.values()
    whole, own = _bytes(self.state.params), _bytes(self.state.params, self.shardings.params)
    split = (whole - own) * fsdp / (fsdp - 1) if fsdp > 1 else 0.0  # bytes of the parameters that are split
    passes = 2 * self.options.micro_batches + (self.options.micro_batches > 1) * self.options.micro_batches
    out = {'all-gather': passes * split * (fsdp - 1) / fsdp, 'reduce-scatter': split * (fsdp - 1) / fsdp,
           'all-reduce': 2 * own * (data - 1) / data + 2 * (whole - split) * (fsdp - 1) / fsdp}
    columns = self._loss_rows() * self.model.embed_dim * (chips - 1) / chips
    if self._transport() == 'gather':
      out['all-gather'] += 2 * columns * self._tile_bytes()
      out['reduce-scatter'] += columns * 4
    else:
      out['collective-permute'] = columns * (2 * self._tile_bytes() + 4)
    return {kind: size for kind, size in out.items() if size}

  def _transport(self) -> str:
    return self.loss.get('transport', 'gather')

  def _tile_bytes(self) -> int:
    return 2 if self.loss.get('tile_dtype') == 'bfloat16' else 4

  def _loss_rows(self) -> int:
    regions = self.data.regions_per_image if self.model.region_encoder != 'none' else 0
    return self.data.batch_size * (1 + regions)


def _bytes(tree, shardings=None) -> float:
  """Of a tree of shapes; with their shardings, of one device's part of it."""
  shapes = [x.shape for x in jax.tree.leaves(tree)]
  if shardings is not None:
    shapes = [s.shard_shape(shape) for s, shape in zip(jax.tree.leaves(shardings), shapes, strict=True)]
  sizes = [x.dtype.itemsize for x in jax.tree.leaves(tree)]
  return float(sum(math.prod(shape) * size for shape, size in zip(shapes, sizes)))


def _compile(step: _Step, name: str) -> tuple[Any, str]:
  """(the compiled step, an OutOfMemory, or None; why it is None)."""
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')  # there is no TPU to ask
  try:
    from jax.experimental import topologies
    devices = topologies.get_topology_desc(platform='tpu', topology_name=name).devices
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


# --- what would change


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


# --- said in words


def render(plans: list[Plan], *, seconds: float | None = None) -> str:
  """The first plan in full, the others as what would change."""
  plan = plans[0]
  gb = lambda b: f'{b / 1e9:.2f} GB' if b < 1e11 else f'{b / 1e9:,.0f} GB'
  m = plan.memory
  lines = [f'{plan.label}  on {plan.topology}: {plan.chips} chips, batch {plan.batch_size:,} '
           f'({plan.batch_size // plan.chips} images a chip) · {plan.method}', '',
           'memory a chip' + ('' if m.fits else '   — DOES NOT FIT'),
           f'  parameters   {gb(m.parameters):>10}', f'  optimizer    {gb(m.optimizer):>10}',
           f'  batch        {gb(m.batch):>10}',
           f'  temporaries  {gb(m.temporaries):>10}   of which activations kept for the backward pass, from shapes: '
           f'{gb(m.activations)}',
           f'  total        {gb(m.total):>10}   of {gb(m.available)}', '',
           f'GFLOPs an image, forward and backward (formula): {plan.flops_per_image["all"] / 1e9:,.1f}']
  lines += [f'  {name:<12} {value / 1e9:>10,.1f}' for name, value in plan.flops_per_image.items()
            if name != 'all' and value]
  lines += ['', f'received a chip and step: {gb(sum(plan.received.values()))} over fast links'
            + (f', {gb(plan.network)} over the network' if plan.network else '')]
  lines += [f'  {kind:<18} {gb(size):>10}' for kind, size in plan.received.items()]
  lines += ['', 'a step, by resource alone at its peak (estimate)']
  lines += [f'  {name:<12} {value * 1e3:>10,.1f} ms' + ('   ← binds' if name == plan.bound else '')
            for name, value in plan.seconds.items()]
  lines += ['', f'expected with compute at {EXPECTED_UTILISATION:.0%} of peak: '
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


def to_json(plans: list[Plan]) -> str:
  def one(p):
    derived = ('bound', 'step_seconds', 'images_per_second', 'days', 'chip_hours')
    memory = dataclasses.asdict(p.memory) | {'total': p.memory.total, 'fits': p.memory.fits}
    memory = {k: None if v == math.inf else v for k, v in memory.items()}  # the compiler did not say how much
    return dataclasses.asdict(p) | {k: getattr(p, k) for k in derived} | {'memory': memory}
  return json.dumps([one(p) for p in plans], indent=1)


def run(spec: str, *, assignments, topology: str, estimate: bool, what_if: bool) -> tuple[list[Plan], str]:
  """Plans an experiment file; returns (plans, text)."""
  def load(more=()):
    config = config_lib.load(spec)
    config_lib.override(config, [*assignments, *more])
    return config
  began = time.monotonic()
  name = os.path.basename(spec)
  plans = [make(load(), topology=topology, estimate=estimate, label=name)]
  if what_if:
    for label, overrides in variants(load()):
      try:
        plans.append(make(load(overrides), topology=topology, estimate=estimate, label=label))
      except (ValueError, jax.errors.JaxRuntimeError) as error:  # must not cost what was found before
        plans[0] = dataclasses.replace(plans[0], notes=(*plans[0].notes, f'{label}: {_first_line(error)}'))
  return plans, render(plans, seconds=time.monotonic() - began)
