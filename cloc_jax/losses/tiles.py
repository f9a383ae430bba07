"""Sweeps over all pairs of N rows and N columns in tiles, on one device or on many: no N × N array ever exists.

A device keeps its own rows. Columns come to it in one of two ways, or one within the other:

  gather: all columns of a group of devices are collected first. One message; holds N columns.
  ring: every device hands its block of columns to the next one, P times. Never holds more than two blocks, and two of
    what columns accumulate, which travels one hop behind: both messages are under way while tiles are computed.

What a sweep computes is a function of a tile (`TileFn`) that updates what rows, columns and nobody in particular (scalars)
accumulate. `losses/contrastive.py` has them.
"""
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

TRANSPORTS = ('gather', 'ring', 'gather+ring')
# Tiles keep the asked-for area when a device has few rows, but are not stretched further than this.
_MAX_STRETCH = 16
_LANES = 128  # a TPU's; also a multiple of every CPU and GPU vector


@dataclasses.dataclass(frozen=True)
class Tiling:
  """How a sweep is carried out. Hashable: a static argument.

  mesh: the devices that rows and columns are split over, along all mesh axes; None is a single device.
  ring, gather: the mesh axes along which columns travel, and along which they are collected; together, all of them.
  tile: rows and columns of a tile. dtype: of the matrix products' operands; sums are always float32 or wider, and
    float32 operands are multiplied as such (not as TF32 or in bfloat16 passes, as accelerators do by default).
  """
  mesh: Mesh | None = None
  ring: tuple[str, ...] = ()
  gather: tuple[str, ...] = ()
  tile: int = 1024
  dtype: str = 'float32'

  @property
  def axes(self) -> tuple[str, ...]:
    return self.mesh.axis_names if self.mesh is not None else ()

  @classmethod
  def make(cls, *, mesh: Mesh | None = None, transport: str = 'gather', tile: int = 1024,
           dtype: str = 'float32') -> 'Tiling':
    """transport: 'gather', 'ring', or 'gather+ring': gathered along the last mesh axis, around a ring of the others.

    Raises:
      ValueError: on an unknown transport or dtype, or a tile that is not positive.
    """
    if transport not in TRANSPORTS:
      raise ValueError(f'loss.transport: expected one of {TRANSPORTS}, got {transport!r}')
    if dtype not in ('float32', 'bfloat16'):
      raise ValueError(f"loss.tile_dtype: expected 'float32' or 'bfloat16', got {dtype!r}")
    if tile < 1:
      raise ValueError(f'loss.tile: expected a positive number of rows, got {tile}')
    axes = mesh.axis_names if mesh is not None else ()
    ring = {'gather': (), 'ring': axes, 'gather+ring': axes[:-1]}[transport]
    return cls(mesh, ring, tuple(a for a in axes if a not in ring), tile, dtype)

  def dot(self, x, y, contract: tuple[int, int]):
    """x · y over one axis of each, accumulated in float32 (float64 for float64)."""
    accumulate = jnp.promote_types(jnp.float32, x.dtype)
    exact = lax.Precision.HIGHEST if self.dtype == 'float32' else lax.Precision.DEFAULT
    return lax.dot_general(x, y, (((contract[0],), (contract[1],)), ((), ())), precision=exact,
                           preferred_element_type=accumulate)

  def operand(self, x):
    """x in the products' dtype; float64 (tests) passes."""
    return x if x.dtype == jnp.float64 else x.astype(self.dtype)

  def vary(self, tree):
    """Marks constants as free to differ between devices, as what a loop carries has to be from its start."""
    return jax.tree.map(lambda x: lax.pcast(x, self.axes, to='varying'), tree) if self.axes else tree


# (row tile, column tile, row sums, column sums, scalars) → (row sums, column sums, scalars)
TileFn = Callable[[Any, Any, Any, Any, Any], tuple[Any, Any, Any]]


def tile_size(n: int, want: int) -> int:
  """Rows of equal tiles, at most `want` rounded up to whole lanes, that cover n with little padding."""
  even = math.ceil(n / math.ceil(n / want))
  return min(n, math.ceil(even / _LANES) * _LANES) if even > _LANES else even


def _leading(tree) -> int:
  return jax.tree.leaves(tree)[0].shape[0]


def _to_tiles(tree, size: int):
  """(n, …) → (⌈n / size⌉, size, …), zero-padded: masks become False."""
  def one(x):
    padding = -x.shape[0] % size
    x = jnp.pad(x, ((0, padding), *((0, 0) for _ in x.shape[1:]))) if padding else x
    return x.reshape(x.shape[0] // size, size, *x.shape[1:])
  return jax.tree.map(one, tree)


def _from_tiles(tree, n: int):
  return jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])[:n], tree)


def _sweep_block(tiling: Tiling, fn: TileFn, rows, columns, row_sums, column_sums, scalars):
  """All tiles of these rows and these columns, on this device."""
  n_rows, n_columns = _leading(rows), _leading(columns)
  row_size = tile_size(n_rows, tiling.tile)
  column_size = tile_size(n_columns, min(tiling.tile**2 // row_size, _MAX_STRETCH * tiling.tile))
  column_tiles = _to_tiles(columns, column_size)

  def row_step(carry, row):
    column_sums, scalars = carry
    row_tile, row_sums = row

    def column_step(carry, column):
      row_sums, scalars = carry
      column_tile, column_sums = column
      row_sums, column_sums, scalars = fn(row_tile, column_tile, row_sums, column_sums, scalars)
      return (row_sums, scalars), column_sums

    (row_sums, scalars), column_sums = lax.scan(column_step, (row_sums, scalars), (column_tiles, column_sums))
    return (column_sums, scalars), row_sums

  (column_sums, scalars), row_sums = lax.scan(
      row_step, (_to_tiles(column_sums, column_size), scalars),
      (_to_tiles(rows, row_size), _to_tiles(row_sums, row_size)))
  return _from_tiles(row_sums, n_rows), _from_tiles(column_sums, n_columns), scalars


def sweep(tiling: Tiling, fn: TileFn, rows, columns, *, row_sums, column_sums, scalars, combine):
  """Every row of this device with every column of all devices. Inside shard_map, if there is a mesh.

  Args:
    rows, columns: trees of (n, …), this device's share.
    row_sums, column_sums: number of them → tree of (number, …), what their sums start from; scalars: a tree of scalars.
    combine: (column_sums, axes) → this device's share of the sums over the devices along `axes`.

  Returns:
    (row_sums, column_sums) of this device's rows and columns, over all; scalars: this device's part alone.
  """
  if tiling.gather:
    columns = jax.tree.map(lambda x: lax.all_gather(x, tiling.gather, tiled=True), columns)
  row_sums, column_sums, scalars = tiling.vary((row_sums(_leading(rows)), column_sums(_leading(columns)), scalars))
  if not tiling.ring:
    row_sums, column_sums, scalars = _sweep_block(tiling, fn, rows, columns, row_sums, column_sums, scalars)
  else:
    row_sums, column_sums, scalars = _around_the_ring(tiling, fn, rows, columns, row_sums, column_sums, scalars)
  if tiling.gather:
    column_sums = combine(column_sums, tiling.gather)
  return row_sums, column_sums, scalars


def _around_the_ring(tiling, fn, rows, columns, row_sums, column_sums, scalars):
  size = math.prod(tiling.mesh.shape[a] for a in tiling.ring)
  onward = [(i, (i + 1) % size) for i in range(size)]
  shift = lambda tree: jax.tree.map(lambda x: lax.ppermute(x, tiling.ring, onward), tree)

  def hop(carry, _):
    columns, column_sums, row_sums, scalars = carry
    # Neither message waits for this hop's tiles: the sums that arrive are those of the hop before. (In the first hop,
    # the next device's, which are still what all sums start from.)
    following, arrived = shift(columns), shift(column_sums)
    row_sums, column_sums, scalars = _sweep_block(tiling, fn, rows, columns, row_sums, arrived, scalars)
    return (following, column_sums, row_sums, scalars), None

  (_, column_sums, row_sums, scalars), _ = lax.scan(hop, (columns, column_sums, row_sums, scalars), None, length=size)
  return row_sums, shift(column_sums), scalars


def on_mesh(tiling: Tiling, fn, *, split: tuple[bool, ...], out_split):
  """`fn` under shard_map, or as it is on one device.

  split: for each argument (a tree), whether its leading axis is split over the devices or it is alike on all of them;
  out_split: a tree of the same for the results.
  """
  if tiling.mesh is None:
    return fn
  spec = lambda is_split: PartitionSpec(tiling.axes) if is_split else PartitionSpec()
  # check_vma stays on: without it, results that only look alike on all devices would pass, and gradients be wrong.
  return jax.shard_map(fn, mesh=tiling.mesh, in_specs=tuple(spec(s) for s in split),
                       out_specs=jax.tree.map(spec, out_split), check_vma=True)
