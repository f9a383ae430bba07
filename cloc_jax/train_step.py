"""State, the training step and the evaluation step. Everything here is traced: no files, no flags, no clocks."""
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from cloc_jax import compiler, losses, optim, sharding, trees
from cloc_jax.batch import Batch
from cloc_jax.models.cloc import MAX_LOG_SCALE, Cloc


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """All that changes during training. step: int32 scalar; ema: averaged parameters, or None."""
  step: Any
  params: Any
  opt_state: Any
  ema: Any


Initializer = Callable[[jax.Array], TrainState]


def initializer(model: Cloc, tx: optax.GradientTransformation, batch: Batch, *, ema: bool = False) -> Initializer:
  """key → a fresh state, for the two functions below. `batch` may be abstract.

  JAX traces one function once: whoever needs shapes and values gives the same object to both.
  """
  # Shapes alone matter to init; two images are enough and no real batch is kept alive.
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((min(2, x.shape[0]), *x.shape[1:]), x.dtype), batch)

  def init(key):
    params = model.init(key, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))['params']
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(params),
                      ema=jax.tree.map(jnp.copy, params) if ema else None)
  return init


def abstract_state(init: Initializer) -> TrainState:
  """The state's shapes, without computing anything."""
  return jax.eval_shape(init, jax.random.key(0))


def init_state(init: Initializer, *, shardings: TrainState, seed: int) -> TrainState:
  """Initialises the state directly where it will live (state_sharding).

  The same seed gives the same parameters on any mesh.
  """
  return jax.jit(init, out_shardings=shardings)(jax.random.key(seed))


def state_sharding(shapes: TrainState, *, mesh: Mesh, rules: Sequence[tuple[str, str]]) -> TrainState:
  """Shardings of a whole TrainState: the rules apply to parameters, and alike to their moments and averages."""
  # Counters and other scalars of the optimizer match no parameter's rule; they are tiny.
  anywhere = [(f'(.*/)?({pattern})', rule) for pattern, rule in rules] + [(r'.*', 'replicate')]
  return TrainState(
      step=sharding.replicated(mesh), params=sharding.tree_sharding(shapes.params, mesh, rules),
      opt_state=sharding.tree_sharding(shapes.opt_state, mesh, anywhere),
      ema=None if shapes.ema is None else sharding.tree_sharding(shapes.ema, mesh, rules))


def _split(tree, parts: int):
  """(B, …) → (parts, B / parts, …), strided so that every device keeps a share of every part."""
  return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0), tree)


def _join(x):
  return jnp.moveaxis(x, 0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def loss_and_grads(model: Cloc, params, batch: Batch, *, loss: Mapping[str, Any], micro_batches: int = 1,
                   mesh: Mesh | None = None, step=None, trained: frozenset[str] | None = None):
  """(loss, metrics, gradients) of the global batch, exactly, however many micro-batches it is computed in.

  With several, the contrastive denominators still run over the whole batch (GradCache, Gao et al. 2021): embed all
  micro-batches without keeping activations, differentiate the loss by the embeddings, then redo each micro-batch and
  pull its share of those gradients back to the parameters. Costs one extra forward pass.
  mesh: the devices that the batch is split over; None is a single one.
  trained: paths of the parameters to differentiate by; None for all. The gradients are of these alone, and what leads
    to none of them (a frozen tower) is computed forward only, without keeping activations.

  Raises:
    ValueError: when the batch does not divide.
  """
  if micro_batches < 1 or batch.size % micro_batches:
    raise ValueError(f'train.micro_batches: {micro_batches} does not divide the batch of {batch.size}')
  whole, params = params, params if trained is None else _select(params, trained)
  forward = lambda p, b: model.apply({'params': p if trained is None else _replace(whole, p)}, b)
  if micro_batches == 1:
    def objective(p):
      return losses.total(forward(p, batch), batch, mesh=mesh, step=step, **loss)
    (value, metrics), grads = jax.value_and_grad(objective, has_aux=True)(params)
    return value, metrics, grads

  parts = _split(batch, micro_batches)
  cached = jax.lax.map(lambda b: forward(params, b), parts)
  # Scalars (temperatures) come out once a part, all equal; everything else has a batch axis.
  joined = jax.tree.map(lambda x: x[0] if x.ndim == 1 else _join(x), cached)
  (value, metrics), d_outputs = jax.value_and_grad(
      lambda o: losses.total(o, batch, mesh=mesh, step=step, **loss), has_aux=True)(joined)
  d_parts = jax.tree.map(lambda x: jnp.broadcast_to(x / micro_batches, (micro_batches,)) if x.ndim == 0
                         else _split(x, micro_batches), d_outputs)

  def accumulate(total, part):
    b, d = part
    _, pull_back = jax.vjp(lambda p: forward(p, b), params)
    return jax.tree.map(jnp.add, total, pull_back(d)[0]), None

  grads, _ = jax.lax.scan(accumulate, jax.tree.map(jnp.zeros_like, params), (parts, d_parts))
  return value, metrics, grads


def _select(params, paths):
  return trees.unflatten({path: x for path, x in trees.flatten(params).items() if path in paths})


def _replace(params, some):
  """`params` with `some` of its leaves in place of its own."""
  some = trees.flatten(some)
  return trees.map_with_path(lambda path, x: some.get(path, x), params)


def train_step(state: TrainState, batch: Batch, *, model: Cloc, tx: optax.GradientTransformation,
               rate: optax.Schedule, loss: Mapping[str, Any], micro_batches: int = 1, ema_decay: float = 0.0,
               mesh: Mesh | None = None, trained: frozenset[str] | None = None):
  """One update. Returns (state, metrics of float32 scalars).

  trained: paths of the parameters that this step trains; None for all. `tx` knows the rates (optim.make's multipliers).
  """
  _, metrics, grads = loss_and_grads(model, state.params, batch, loss=loss, micro_batches=micro_batches, mesh=mesh,
                                     step=state.step, trained=trained)
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = optim.apply(state.params, updates)
  scales = {'t', 'region_t'} if trained is None else {'t', 'region_t'} & trained
  # SPEC §2: the similarity's scale stays at or under 100. A frozen one (SigLIP's is 117) stays what it is.
  params = trees.map_with_path(
      lambda path, x: jnp.minimum(x, MAX_LOG_SCALE) if path in scales else x, params)
  ema = state.ema
  if ema is not None:
    # The average of what stands still is it, to the last bit.
    ema = trees.map_with_path(
        lambda path, old, new: ema_decay * old + (1 - ema_decay) * new if trained is None or path in trained else new,
        ema, params)
  metrics |= {'grad_norm': trees.global_norm(grads), 'param_norm': trees.global_norm(params),
              'learning_rate': jnp.asarray(rate(state.step), jnp.float32)}
  return TrainState(state.step + 1, params, opt_state, ema), metrics


def jit_train_step(*, mesh: Mesh, shardings: TrainState, **static) -> Callable[..., Any]:
  """`train_step` compiled for a mesh: the state is donated, the batch arrives split, the metrics leave replicated."""

  def step(state, batch):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # models/layers.split_batch reads it
      return train_step(state, batch, mesh=mesh, **static)

  return jax.jit(step, in_shardings=(shardings, sharding.batch_sharding(mesh)),
                 out_shardings=(shardings, sharding.replicated(mesh)), donate_argnums=0,
                 compiler_options=compiler.options(mesh.devices.flat[0].platform))


def eval_step(params, batch: Batch, *, model: Cloc, loss: Mapping[str, Any]) -> dict[str, Any]:
  """The metrics of the loss on a batch, without an update."""
  return losses.total(model.apply({'params': params}, batch), batch, **loss)[1]
