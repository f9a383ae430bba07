"""Device mesh and sharding rules: who holds which part of the state and of a batch.

Two mesh axes: 'data' replicates parameters, 'fsdp' splits them (and the optimizer's state). A batch is split over both.
'fsdp' sends most and stays where links are fast: within a TPU slice, a node, a process.
"""
import functools
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
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


def check_slices(sizes: dict[str, int], slices: int) -> None:
  """Raises a ValueError when parameters would be split over TPU slices, which only the slow network joins."""
  per_slice = math.prod(sizes.values()) // slices
  if per_slice % sizes['fsdp']:
    raise ValueError(f'mesh.fsdp: {sizes["fsdp"]} does not fit into one of {slices} slices; expected a divisor of its '
                     f'{per_slice} chips: parameters are split within a slice, over which mesh.data goes')


def make_mesh(*, data: int = -1, fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A (data, fsdp) mesh over all devices; one of the sizes may be -1, for "the rest".

  On TPUs, groups along 'fsdp' are neighbours of one slice, and 'data' goes over slices. Elsewhere devices keep their
  order, by node and process, so that such a group shares a node or a process whose size it divides.

  Raises:
    ValueError: when the sizes do not multiply to the number of devices, or 'fsdp' does not fit into a TPU slice.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = mesh_sizes(len(devices), data=data, fsdp=fsdp)
  return Mesh(_arrange(devices, sizes), AXES)


def _arrange(devices, sizes: dict[str, int]) -> np.ndarray:
  shape = tuple(sizes.values())
  slice_of = lambda device: getattr(device, 'slice_index', None) or 0
  if devices[0].platform != 'tpu':  # the sort is stable: of one process, devices stay as they came
    return np.asarray(sorted(devices, key=lambda d: (slice_of(d), d.process_index))).reshape(shape)
  slices = len({slice_of(d) for d in devices})
  if slices == 1:
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  check_slices(sizes, slices)
  return mesh_utils.create_hybrid_device_mesh((shape[0] // slices, shape[1]), (slices, 1), devices,
                                              allow_split_physical_axes=True)


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
  With several hosts, each row of each goes to one of its own devices, whatever the order of devices in the mesh: where
  it comes to stand in the global batch follows from the mesh, alike for all arrays of the tree.

  Raises:
    ValueError: when this host's rows do not divide over its devices.
  """
  sharding = batch_sharding(mesh)
  if jax.process_count() == 1:
    return jax.device_put(host_batch, sharding)

  def one(x):
    own = len(sharding.addressable_devices)
    if x.shape[0] % own:
      raise ValueError(f'batch: {x.shape[0]} rows of a host do not divide over its {own} devices')
    shape = (x.shape[0] // own * mesh.size, *x.shape[1:])
    places = sharding.addressable_devices_indices_map(shape)
    # A host holds no more than its own rows: these fill the places of its devices, wherever those are, in their order.
    order = sorted(places, key=lambda device: places[device][0].start or 0)
    shards = [jax.device_put(part, device) for part, device in zip(np.split(x, len(order)), order, strict=True)]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)

  return jax.tree.map(one, host_batch)


def local_mesh(mesh: Mesh) -> Mesh:
  """The mesh of this host's own devices; they split parameters if those of `mesh` do. With one host, `mesh` itself."""
  if jax.process_count() == 1:
    return mesh
  own = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
  return Mesh(np.array(own).reshape((-1, 1) if mesh.shape['fsdp'] == 1 else (1, -1)), AXES)


def to_local(tree, mesh: Mesh):
  """Global arrays → the same on `local_mesh(mesh)`, whole, so that each host can compute without the others.

  Every host must call it. What each device holds whole is taken as it is; the rest is brought to all devices, one array
  at a time, and split anew over those of the host. With one host, the tree as it is.
  """
  if jax.process_count() == 1:
    return tree
  own = local_mesh(mesh)

  def one(leaf):
    split = not leaf.is_fully_replicated
    shards = (_gather(mesh)(leaf) if split else leaf).addressable_shards
    here = jax.make_array_from_single_device_arrays(leaf.shape, replicated(own), [s.data for s in shards])
    if not split:
      return here
    # Waits, else all arrays would be whole at once.
    return jax.block_until_ready(jax.device_put(here, NamedSharding(own, _fsdp_spec(leaf.shape, own))))

  return jax.tree.map(one, tree)


@functools.cache  # one function, so that an array's shape is compiled once and not for every evaluation
def _gather(mesh: Mesh):
  return jax.jit(lambda x: x, out_shardings=replicated(mesh))


def describe(params, shardings) -> str:
  """The table printed at the start of a run: path, shape, and how it is split."""
  flat, spec = trees.flatten(params), trees.flatten(shardings)
  width = max(map(len, flat))
  rows = [f'{path:<{width}}  {str(tuple(leaf.shape)):<22} {spec[path].spec}' for path, leaf in flat.items()]
  return '\n'.join(rows + [f'{trees.count(params):,} parameters'])
