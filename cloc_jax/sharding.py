"""Device mesh and sharding rules: who holds which part of the state and of a batch.

Two mesh axes: 'data' replicates parameters, 'fsdp' splits them (and the optimizer's state). A batch is split over both.
"""
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cloc_jax import trees

AXES = ('data', 'fsdp')
# Below this many scalars splitting costs more in messages than it saves in memory.
_MIN_SPLIT_SIZE = 2**14
RULES = ('replicate', 'fsdp')


def mesh_sizes(count: int, *, data: int = -1, fsdp: int = 1) -> dict[str, int]:
  """The sizes of the mesh's axes for so many devices; one of them may be -1, for "the rest".

  Raises:
    ValueError: when the sizes do not multiply to the number of devices.
  """
  sizes = [data, fsdp]
  if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
    raise ValueError(f'mesh: expected positive sizes, one of them -1 at most; got data={data}, fsdp={fsdp}')
  if -1 in sizes:
    known = math.prod(s for s in sizes if s != -1)
    sizes[sizes.index(-1)] = max(1, count // known)
  if math.prod(sizes) != count:
    raise ValueError(f'mesh: data={data} × fsdp={fsdp} does not fit {count} devices')
  return dict(zip(AXES, sizes))


def make_mesh(*, data: int = -1, fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A (data, fsdp) mesh over all devices; one of the sizes may be -1, for "the rest".

  Raises:
    ValueError: when the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = mesh_sizes(len(devices), data=data, fsdp=fsdp)
  return Mesh(np.asarray(devices).reshape(tuple(sizes.values())), AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Leading axis split over all devices."""
  return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def _fsdp_spec(shape, mesh: Mesh) -> PartitionSpec:
  """Splits the largest axis that the 'fsdp' size divides; small arrays are replicated."""
  size = mesh.shape['fsdp']
  if size == 1 or math.prod(shape) < _MIN_SPLIT_SIZE:
    return PartitionSpec()
  candidates = [axis for axis, length in enumerate(shape) if length % size == 0]
  if not candidates:
    return PartitionSpec()
  best = max(candidates, key=lambda axis: shape[axis])
  return PartitionSpec(*('fsdp' if axis == best else None for axis in range(best + 1)))


def tree_sharding(tree, mesh: Mesh, rules: Sequence[tuple[str, str]]):
  """A NamedSharding for every leaf of a tree of shapes, by the first of `rules` that matches its path.

  rules: (regex over the whole path, 'replicate' | 'fsdp'). Optimizer state holds parameter-shaped leaves whose paths
  end in the parameter's, so the same rules (with a leading `.*`) cover it.

  Raises:
    ValueError: on an unknown rule, or a path that nothing matches.
  """
  for _, rule in rules:
    if rule not in RULES:
      raise ValueError(f'mesh.rules: expected one of {RULES}, got {rule!r}')
  names = trees.match_rules(tree, rules, what='mesh.rules')
  return jax.tree.map(lambda leaf, rule: NamedSharding(
      mesh, _fsdp_spec(leaf.shape, mesh) if rule == 'fsdp' else PartitionSpec()), tree, names)


def to_global(host_batch, mesh: Mesh):
  """This host's part of a batch (a tree of NumPy arrays) → global arrays split over the mesh.

  The transfers are explicit ones and pass a transfer guard; they do not wait for one another, or for the devices.
  """
  sharding = batch_sharding(mesh)
  if jax.process_count() == 1:
    return jax.device_put(host_batch, sharding)

  def one(x):
    shape = (x.shape[0] * jax.process_count(), *x.shape[1:])
    places = sharding.addressable_devices_indices_map(shape)
    # This host's rows go to its own devices in the order of their places in the global batch.
    order = sorted(places, key=lambda device: places[device][0].start or 0)
    shards = [jax.device_put(part, device) for part, device in zip(np.split(x, len(order)), order)]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)

  return jax.tree.map(one, host_batch)


def describe(params, shardings) -> str:
  """The table printed at the start of a run: path, shape, and how it is split."""
  flat, spec = trees.flatten(params), trees.flatten(shardings)
  width = max(map(len, flat))
  rows = [f'{path:<{width}}  {str(tuple(leaf.shape)):<22} {spec[path].spec}' for path, leaf in flat.items()]
  return '\n'.join(rows + [f'{trees.count(params):,} parameters'])
