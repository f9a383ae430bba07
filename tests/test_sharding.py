"""Meshes and sharding rules on simulated devices, and meshes over pretended ones."""
import dataclasses
import itertools
import random

import jax
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from cloc_jax import sharding


def shape(*dims):
  return jax.ShapeDtypeStruct(dims, np.float32)


@pytest.mark.parametrize('sizes, expected', [
    ({}, (8, 1)), ({'fsdp': 2}, (4, 2)), ({'data': 2, 'fsdp': -1}, (2, 4)), ({'data': 1, 'fsdp': 8}, (1, 8)),
    ({'data': -1, 'fsdp': 8}, (1, 8))])
def test_mesh_sizes(sizes, expected):
  mesh = sharding.make_mesh(**sizes)
  assert mesh.devices.shape == expected and mesh.axis_names == ('data', 'fsdp')
  assert sorted(d.id for d in mesh.devices.flat) == list(range(8))


@pytest.mark.parametrize('sizes', [{'data': 3}, {'fsdp': 3}, {'data': 2, 'fsdp': 2}, {'fsdp': 16}, {'data': 16}])
def test_a_mesh_that_does_not_fit_the_devices_is_an_error(sizes):
  with pytest.raises(ValueError, match=r'mesh: data=.* × fsdp=.* does not fit 8 devices'):
    sharding.make_mesh(**sizes)


@pytest.mark.parametrize('sizes', [{'data': -1, 'fsdp': -1}, {'data': 0}, {'fsdp': -2}])
def test_mesh_sizes_are_positive_and_one_at_most_is_left_open(sizes):
  with pytest.raises(ValueError, match='mesh: expected positive sizes, one of them -1 at most; got data='):
    sharding.make_mesh(**sizes)


@dataclasses.dataclass(frozen=True)
class Pretended:
  """What a mesh reads of a device."""
  id: int
  platform: str
  device_kind: str
  process_index: int
  slice_index: int = 0
  coords: tuple[int, ...] = ()
  core_on_chip: int = 0


def tpu_slices(slices, side=4):
  """v5e slices of side × side chips, four chips a host, in no order."""
  host = lambda s, y, x: (s * side + y) // 2 * side // 2 + x // 2
  chips = [Pretended(1000 * s + side * y + x, 'tpu', 'TPU v5 lite', host(s, y, x), slice_index=s, coords=(x, y, 0))
           for s, y, x in itertools.product(range(slices), range(side), range(side))]
  random.Random(0).shuffle(chips)
  return chips


def arranged(devices, **sizes):
  found = sharding._arrange(devices, sharding.mesh_sizes(len(devices), **sizes))
  assert set(found.flat) == set(devices) and found.size == len(devices)
  return found


@pytest.mark.parametrize('sizes', [{'fsdp': 8}, {'data': 2, 'fsdp': -1}, {'fsdp': 1}])
def test_slices_are_joined_by_the_data_axis_alone(sizes):
  mesh = arranged(tpu_slices(2), **sizes)
  for group in mesh:
    assert len({d.slice_index for d in group}) == 1
  for place in mesh.T:  # the first half of the rows in one slice, the rest in the other
    assert [d.slice_index for d in place] == [0] * (len(mesh) // 2) + [1] * (len(mesh) // 2)


@pytest.mark.parametrize('slices', [1, 2])
@pytest.mark.parametrize('fsdp', [2, 4, 8])
def test_a_group_of_chips_has_direct_links(slices, fsdp):
  """Each chip has another of its group one step away, and the group is as compact as it can be."""
  for group in arranged(tpu_slices(slices), fsdp=fsdp):
    apart = np.abs(np.array([[np.subtract(a.coords, b.coords) for b in group] for a in group])).sum(-1)
    assert np.all(np.sort(apart)[:, 1] == 1) and apart.max() <= {2: 1, 4: 3, 8: 4}[fsdp]


@pytest.mark.parametrize('sizes', [{'fsdp': 32}, {'data': 1, 'fsdp': -1}])
def test_parameters_are_not_split_over_slices(sizes):
  with pytest.raises(ValueError, match='mesh.fsdp: 32 does not fit into one of 2 slices; expected a divisor of its 16'):
    arranged(tpu_slices(2), **sizes)
  assert arranged(tpu_slices(3), data=3, fsdp=16).shape == (3, 16)  # of three slices, it is one slice's


@pytest.mark.parametrize('nodes, processes, each, fsdp, shared', [
    (2, 4, 2, 2, 'process_index'), (2, 4, 2, 4, 'slice_index'), (2, 8, 1, 4, 'slice_index'), (2, 4, 2, 8, None),
    (1, 2, 4, 4, 'process_index'), (1, 2, 4, 8, 'slice_index')])
def test_elsewhere_a_group_shares_what_it_can(nodes, processes, each, fsdp, shared):
  devices = [Pretended(i, 'gpu', 'H100', process_index=i % processes, slice_index=i % processes % nodes)
             for i in range(processes * each)]
  groups = arranged(devices, fsdp=fsdp)
  assert shared is None or all(len({getattr(d, shared) for d in group}) == 1 for group in groups)


def test_devices_of_one_process_stay_as_they_came():
  devices = jax.devices()[::-1]
  assert list(sharding.make_mesh(data=2, fsdp=4, devices=devices).devices.flat) == devices


@pytest.mark.parametrize('dims, expected', [
    ((256, 1024), P(None, 'fsdp')),
    ((1024, 256), P('fsdp')),
    ((256, 1025), P('fsdp')),          # the largest does not divide
    ((12, 512, 64), P(None, 'fsdp')),
    ((333, 333), P()),                 # nothing divides
    ((64, 64), P()),                   # too small to be worth a message
    ((), P()),
])
def test_fsdp_splits_the_largest_axis_that_divides(dims, expected):
  mesh = sharding.make_mesh(data=2, fsdp=4)
  tree = sharding.tree_sharding({'w': shape(*dims)}, mesh, [('.*', 'fsdp')])
  assert tree['w'].spec == expected and tree['w'].mesh == mesh


def test_rules_go_by_path_and_the_first_wins():
  mesh = sharding.make_mesh(data=2, fsdp=4)
  tree = {'a': {'kernel': shape(512, 512)}, 'b': {'kernel': shape(512, 512)}}
  got = sharding.tree_sharding(tree, mesh, [('b/.*', 'replicate'), ('.*kernel', 'fsdp')])
  assert got['a']['kernel'].spec == P('fsdp') and got['b']['kernel'].spec == P()


def test_without_an_fsdp_axis_everything_is_replicated():
  mesh = sharding.make_mesh()
  assert sharding.tree_sharding({'w': shape(512, 512)}, mesh, [('.*', 'fsdp')])['w'].spec == P()


def test_errors_of_rules():
  mesh = sharding.make_mesh()
  with pytest.raises(ValueError, match=r"mesh.rules: expected one of \('replicate', 'fsdp'\), got 'zero'"):
    sharding.tree_sharding({'w': shape(2)}, mesh, [('.*', 'zero')])
  with pytest.raises(ValueError, match=r"mesh.rules: no rule matches \['w'\]"):
    sharding.tree_sharding({'w': shape(2)}, mesh, [('v', 'fsdp')])


def test_a_host_batch_is_split_over_all_devices_in_order():
  mesh = sharding.make_mesh(data=2, fsdp=4)
  host = {'x': np.arange(48).reshape(16, 3), 'm': np.arange(16) % 3 == 0}
  got = sharding.to_global(host, mesh)
  assert got['x'].sharding == sharding.batch_sharding(mesh)
  for shard in got['x'].addressable_shards:
    assert shard.data.shape == (2, 3)
  np.testing.assert_array_equal(got['x'], host['x'])
  np.testing.assert_array_equal(got['m'], host['m'])


def test_a_split_array_holds_what_it_should():
  mesh = sharding.make_mesh(data=2, fsdp=4)
  split = sharding.tree_sharding({'w': shape(256, 128)}, mesh, [('.*', 'fsdp')])['w']
  value = np.random.default_rng(0).normal(size=(256, 128)).astype(np.float32)
  placed = jax.device_put(value, split)
  assert {s.data.shape for s in placed.addressable_shards} == {(64, 128)}
  np.testing.assert_array_equal(placed, value)


def test_the_table_names_every_parameter_and_how_it_is_split():
  mesh = sharding.make_mesh(data=2, fsdp=4)
  params = {'img': {'kernel': shape(512, 256)}, 't': shape()}
  lines = sharding.describe(params, sharding.tree_sharding(params, mesh, [('.*', 'fsdp')])).splitlines()
  assert len(lines) == 3
  assert lines[0].split()[0] == 'img/kernel' and '(512, 256)' in lines[0] and 'fsdp' in lines[0]
  assert lines[1].split()[0] == 't' and 'fsdp' not in lines[1]
  assert lines[2] == '131,073 parameters'
