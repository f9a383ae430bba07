"""An experiment's training step as shapes: what `cloc plan` knows of it without compiling it."""
import dataclasses
import functools
import itertools
import math

import jax
import numpy as np

from cloc_jax import config as config_lib
from cloc_jax import hardware, inference, initialize, jaxprs, optim, sharding, train, train_step, trees
from cloc_jax.models import flops
from cloc_jax.models.vit import ViT

T5_VOCABULARY = 32_100
_TILE = (8, 128)  # TPUs store arrays in tiles of this many rows and columns


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes a chip. parameters, optimizer, batch: what goes in; activations: what the forward pass keeps for the backward
  pass, working: what the backward pass holds beside it (both from shapes; parts of temporaries); temporaries: all that
  lives during a step; available: the chip's."""
  parameters: float
  optimizer: float
  batch: float
  activations: float
  working: float
  temporaries: float
  available: float

  @property
  def total(self) -> float:
    return self.parameters + self.optimizer + self.batch + self.temporaries

  @property
  def fits(self) -> bool:
    return self.total <= self.available


@dataclasses.dataclass(frozen=True)
class OutOfMemory:
  """The compiler's refusal. needed: bytes of temporaries, where it says."""
  message: str
  needed: float | None


class _Vocabulary:
  """Stands in for a tokenizer whose file is not here: a plan needs its size alone."""

  def __init__(self, size):
    self.vocab_size, self.eos_id = size, 1


class Step:
  """One experiment on one topology."""

  def __init__(self, config, where: hardware.Topology):
    config_lib.check_sections(config, where='config')
    init = initialize.of_config(config)
    config = initialize.resolve(config, init)
    self.where = where
    self.data = config_lib.call(train.DataOptions, config['data'], name='data')
    self.data.use_cache()
    self.options = config_lib.call(train.TrainOptions, config['train'], name='train')
    self.loss = config_lib.plain(config['loss'])
    self.mesh_section = dict(config_lib.plain(config['mesh']))
    self.rules = self.mesh_section.pop('rules', (('.*', 'fsdp'),))
    self.mesh = config_lib.call(sharding.mesh_sizes, self.mesh_section, where.chips, name='mesh')
    if where.chip.maker == 'tpu':
      sharding.check_slices(self.mesh, where.slices)
    self.notes: list[str] = []
    size = self._vocabulary() if init is None or init.tokenizer is None else init.tokenizer.vocab_size
    self.model = inference.build_model(config, tokenizer=_Vocabulary(size))
    if self.data.batch_size % where.chips:
      raise ValueError(f'config.data.batch_size: {self.data.batch_size} does not divide over {where.chips} chips')
    dataset_size = 1 if self.options.total_epochs is None else self._dataset_size()
    self.total_steps = config_lib.duration(vars(self.options), 'total', batch_size=self.data.batch_size,
                                           dataset_size=dataset_size)
    self.tx, self.rate = config_lib.call(optim.make, config['optim'], name='optim', total_steps=self.total_steps)
    self.multipliers = config['optim'].get('multipliers', ())
    self.batch = self.data.abstract_batch()
    self.state = train_step.abstract_state(
        train_step.initializer(self.model, self.tx, self.batch, ema=self.options.ema_decay > 0))
    self.trained = optim.trained(self.state.params, self.multipliers)
    if self.trained is not None:
      self.notes.append(f'{len(self.trained)} of {len(trees.flatten(self.state.params))} arrays are trained at the end; '
                        'without a compilation, activations are counted as if all were')
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
    if self.data.mixture:
      raise ValueError('config.train.total_epochs: the sources of a mixture have epochs of their own; give total_steps')
    from cloc_jax.data import sources
    return len(sources.open_source(self.data.path, split=self.data.split))

  def lower(self, devices):
    """The real step, lowered for these devices."""
    mesh = config_lib.call(sharding.make_mesh, self.mesh_section, name='mesh', devices=devices)
    shardings = train_step.state_sharding(self.state, mesh=mesh, rules=self.rules)
    place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    state = jax.tree.map(place, self.state, shardings)
    batch = jax.tree.map(lambda x: place(x, sharding.batch_sharding(mesh)), self.batch)
    step = train_step.jit_train_step(
        mesh=mesh, shardings=shardings, model=self.model, tx=self.tx, rate=self.rate, loss=self.loss,
        micro_batches=self.options.micro_batches, ema_decay=self.options.ema_decay, trained=self.trained)
    return step.lower(state, batch)

  def train_flops(self, per_image) -> float:
    """FLOPs an image, forward and backward, of what is trained."""
    trains = lambda part: self.trained is None or any(path.startswith(f'{part}/') for path in self.trained)
    return per_image.trained(image=trains('img'), text=trains('txt'))

  def recomputed(self, per_image) -> float:
    """FLOPs an image that are spent again: by remat, and by the extra forward pass of micro-batches."""
    out = flops.step_recomputed(self.model, image_size=self.data.image_size, text_length=self.data.text_length,
                                region_text_length=self.data.region_text_length, regions=self.data.regions_per_image)
    return out + (per_image.forward - per_image.losses if self.options.micro_batches > 1 else 0.0)

  def _part(self):
    """Shapes of what one chip computes at once."""
    rows = lambda n: max(1, n // (self.where.chips * self.options.micro_batches))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows(x.shape[0]), *x.shape[1:]), x.dtype), self.batch)

  def _forward(self, params, batch):
    return self.model.apply({'params': params}, batch)

  @functools.cached_property
  def _forward_jaxpr(self):
    return jax.make_jaxpr(self._forward)(self.state.params, self._part()).jaxpr

  @functools.cached_property
  def _backward(self):
    """(the traced gradient of one part's outputs, shapes of what its forward pass keeps)."""
    def gradients(params, batch):
      outputs, pull_back = jax.vjp(lambda p: self._forward(p, batch), params)
      return (outputs, pull_back), pull_back(jax.tree.map(lambda x: jax.numpy.ones(x.shape, x.dtype), outputs))
    traced, (kept, _) = jax.make_jaxpr(gradients, return_shape=True)(self.state.params, self._part())
    return traced.jaxpr, jax.tree.leaves(kept)

  @functools.cached_property
  def activations(self) -> float:
    """Bytes a chip that the forward pass hands to the backward pass. Parameters, in whatever dtype, are not of them."""
    parameters = {x.shape for x in jax.tree.leaves(self.state.params)}
    return sum(self._stored(x) for x in self._backward[1] if x.shape not in parameters)

  def _stored(self, x) -> float:
    """Bytes of an array as it lies in memory: of TPUs, in tiles over the two axes that waste least."""
    size, (rows, columns) = math.prod(x.shape) * x.dtype.itemsize, _TILE
    if self.where.chip.maker != 'tpu' or len(x.shape) < 2:
      return size
    waste = lambda n, tile: -(-n // tile) * tile / max(n, 1)
    return size * min(waste(x.shape[a], rows) * waste(x.shape[b], columns)
                      for a, b in itertools.permutations(range(len(x.shape)), 2))

  @functools.cached_property
  def working(self) -> float:
    """Bytes a chip that the backward pass holds beside the activations, at the larger of two places.

    A loop that reads the same arrays in every turn (the Prompter's, over chunks of prompts) sums their gradients in as
    much again;
    a block of the image tower holds its attention weights and the MLP's hidden layer, and the gradients of both.
    """
    v, tokens = ViT(**self.model.image).sizes(), flops.image_tokens(self.model, self.data.image_size)
    hidden = 2 * tokens * v.mlp_dim * np.dtype(self.model.dtype).itemsize
    loop, images = jaxprs.loop_constants(self._forward_jaxpr), self._part().image.shape[0]
    return max(loop, images * (2 * 4 * v.heads * tokens**2 + hidden))

  def memory(self, compiled) -> Memory:
    parameters = _bytes(self.state.params, self.shardings.params)
    optimizer = _bytes(self.state.opt_state, self.shardings.opt_state) + _bytes(self.state.ema, self.shardings.ema)
    batch = _bytes(self.batch) / self.where.chips
    if isinstance(compiled, OutOfMemory):
      temporaries = compiled.needed or math.inf
    elif compiled is not None:
      temporaries = compiled.memory_analysis().temp_size_in_bytes
    else:  # and gradients, a gathered copy of the parameters in the towers' dtype, and the tiled losses' embeddings
      several = self.options.micro_batches > 1  # gradients of one part and of all so far, and the batch in parts
      width = np.dtype(self.model.dtype).itemsize / 4
      gathered = _bytes(self.state.params) * width if self.mesh['fsdp'] > 1 else 0
      columns = self._loss_rows() * self.model.embed_dim * (self._tile_bytes() + 4)
      columns *= {'ring': 2 / self.where.chips}.get(self._transport(), 1)
      temporaries = (self.activations + self.working + gathered + columns
                     + parameters * (1 + several) + batch * several)
    return Memory(parameters=parameters, optimizer=optimizer, batch=batch, activations=self.activations,
                  working=self.working, temporaries=temporaries, available=self.where.chip.hbm_bytes)

  def estimated_memory_bytes(self) -> float:
    """Bytes a chip and step in and out of its memory: the model's by jaxprs.memory_bytes, once forward and backward for
    each micro-batch, and the optimizer's, which reads and writes its state, parameters and gradients once."""
    parts = self.options.micro_batches
    moved = parts * jaxprs.memory_bytes(self._backward[0])
    if parts > 1:  # embeddings first
      moved += parts * jaxprs.memory_bytes(self._forward_jaxpr)
    held = self.memory(None)
    return moved + 2 * (2 * held.parameters + held.optimizer)

  def estimated_messages(self) -> dict[str, float]:
    """Gradients summed over data, parameters gathered twice and gradients scattered over fsdp, embeddings collected."""
    chips, (data, fsdp) = self.where.chips, self.mesh.values()
    whole, own = _bytes(self.state.params), _bytes(self.state.params, self.shardings.params)
    split = (whole - own) * fsdp / (fsdp - 1) if fsdp > 1 else 0.0  # bytes of the parameters that are split
    passes = 2 * self.options.micro_batches + (self.options.micro_batches > 1) * self.options.micro_batches
    out = {'all-gather': passes * split * (fsdp - 1) / fsdp, 'reduce-scatter': split * (fsdp - 1) / fsdp,
           'all-reduce': 2 * own * (data - 1) / data + 2 * (whole - split) * (fsdp - 1) / fsdp}
    columns = self._loss_rows() * self.model.embed_dim * (chips - 1) / chips
    if self._transport() == 'gather' and self.where.chip.maker == 'tpu':
      # As compiled (docs/results/communication.md): texts once, gradients once, both written as sums over all chips.
      out['all-reduce'] += 2 * columns * (self._tile_bytes() + 4)
    elif self._transport() == 'gather':
      out['all-gather'] += 2 * columns * self._tile_bytes()
      out['reduce-scatter'] += columns * 4
    else:
      out['collective-permute'] = columns * (2 * self._tile_bytes() + 4)
    return {kind: size for kind, size in out.items() if size}

  def estimated_network(self, messages: dict[str, float]) -> float:
    """Bytes a chip and step from other slices or nodes, where chips of one share what comes in.

    Gradients and gathered embeddings cross once a slice. A ring's blocks cross with every hop, all of them to the one
    chip that has its neighbour there. Parameters that are split over more than a node come from the others, to each chip.
    """
    near, slices = self.where.chips_per_slice, self.where.slices
    crossing = 2 * _bytes(self.state.params)
    if self._transport() == 'gather':
      crossing += self._loss_rows() * self.model.embed_dim * (2 * self._tile_bytes() + 4)
    split = sum(messages.get(kind, 0.0) for kind in ('all-gather', 'reduce-scatter'))
    return (crossing * (slices - 1) / slices / near + messages.get('collective-permute', 0.0)
            + split * max(0.0, 1 - near / self.mesh['fsdp']))

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
