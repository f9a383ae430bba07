"""Chips by the names that devices give, and topologies by the names that people type."""
import pytest

from cloc_jax import hardware


@pytest.mark.parametrize('kind, expected', [
    ('TPU v4', 275e12), ('TPU v5 lite', 197e12), ('TPU v5e', 197e12), ('TPU v5p', 459e12), ('TPU v5', 459e12),
    ('TPU v6 lite', 918e12), ('NVIDIA H100 80GB HBM3', 989e12), ('NVIDIA H200', 989e12),
    ('NVIDIA A100-SXM4-40GB', 312e12), ('cpu', None), ('Radeon', None),
])
def test_peaks_by_the_names_that_devices_give(kind, expected):
  chip = hardware.of_kind(kind)
  assert (chip and chip.flops) == expected


@pytest.mark.parametrize('name, chips, per_slice, chip', [
    ('v5p:8x8x16', 1024, 1024, 'v5p'), ('v5:8x8x16', 1024, 1024, 'v5p'), ('v5e:16x16', 256, 256, 'v5e'),
    ('v6e:16x16*4', 1024, 256, 'v6e'), ('gpu:8xh200', 8, 8, 'h200'), ('gpu:32xH100', 32, 8, 'h100')])
def test_topologies(name, chips, per_slice, chip):
  found = hardware.topology(name)
  assert (found.chips, found.chips_per_slice, found.chip.name) == (chips, per_slice, chip)
  assert found.slices == chips // per_slice
  assert found.libtpu_name == ('' if name.startswith('gpu') else f'{chip}:{name.split(":")[1].split("*")[0]}')


@pytest.mark.parametrize('name', ['v9:4x4', 'v5e', 'v5e:4y4', 'gpu:0xh200', 'gpu:8xv5e', 'h200', 'v5e:0x4', 'gpu:16xv3', 'v3:4x4', ''])
def test_wrong_topologies_say_what_there_is(name):
  with pytest.raises(ValueError, match=r"topology: expected CHIP:AxBxC .*v5p.*h200.*got '" + name):
    hardware.topology(name)
