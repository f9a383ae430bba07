"""What accelerators can do, from their vendors' data sheets: peaks, memory, links."""
import dataclasses
import math
import re


@dataclasses.dataclass(frozen=True)
class Chip:
  """One accelerator, as JAX counts devices (a v3 device is one of the two cores of a chip).

  flops: dense bfloat16 FLOP/s. hbm_bytes, hbm_bandwidth: bytes, bytes/s. links: bytes/s out of a chip over all its fast
  links, one direction (ICI; NVLink). network: bytes/s a chip beyond them (DCN; a NIC). kinds: what occurs in JAX's
  device_kind. 0 where we have no figure. maker: 'tpu' or 'gpu'; '' is not offered for planning.
  """
  name: str
  flops: float
  hbm_bytes: float = 0
  hbm_bandwidth: float = 0
  links: float = 0
  network: float = 0
  kinds: tuple[str, ...] = ()
  maker: str = ''


# The first whose kind occurs in a device's counts. JAX calls a v5p plainly "TPU v5".
CHIPS = (
    Chip('v5e', 197e12, 16e9, 819e9, 4 * 45e9, 6.25e9, ('v5 lite', 'v5e'), 'tpu'),
    Chip('v5p', 459e12, 95e9, 2765e9, 6 * 90e9, 6.25e9, ('v5',), 'tpu'),
    Chip('v6e', 918e12, 32e9, 1640e9, 4 * 90e9, 12.5e9, ('v6 lite', 'v6e'), 'tpu'),
    Chip('v4i', 138e12, kinds=('v4 lite',)),
    Chip('v4', 275e12, 32e9, 1228e9, 6 * 45e9, 3.1e9, ('v4',), 'tpu'),
    Chip('v3', 61.5e12, 16e9, 450e9, kinds=('v3',)),
    Chip('h200', 989e12, 141e9, 4800e9, 450e9, 50e9, ('H200',), 'gpu'),
    Chip('h100-pcie', 756e12, 80e9, 2000e9, 300e9, 50e9, ('H100 PCIe',), 'gpu'),
    Chip('h100', 989e12, 80e9, 3350e9, 450e9, 50e9, ('H100',), 'gpu'),
    Chip('a100', 312e12, 80e9, 2039e9, 300e9, 25e9, ('A100',), 'gpu'),
)


def of_kind(device_kind: str) -> Chip | None:
  """The chip that JAX gives this name, or None where it is not known (CPUs, among others)."""
  return next((c for c in CHIPS if any(k.lower() in device_kind.lower() for k in c.kinds)), None)


@dataclasses.dataclass(frozen=True)
class Topology:
  """Chips and how they are joined: `chips_per_slice` share fast links, slices are joined by the network."""
  chip: Chip
  chips: int
  chips_per_slice: int
  shape: tuple[int, ...]
  libtpu_name: str  # what the TPU compiler calls a slice; '' where it cannot compile for it

  @property
  def slices(self) -> int:
    return self.chips // self.chips_per_slice


_TPU = re.compile(r'(v\w+):(\d+(?:x\d+)*)(?:\*(\d+))?')
_GPU = re.compile(r'gpu:(\d+)x([\w-]+)', re.IGNORECASE)
_GPUS_PER_NODE = 8


def topology(name: str) -> Topology:
  """'v5p:8x8x16', 'v5e:16x16*4' (four slices over the network), 'gpu:8xh200'.

  Raises:
    ValueError: on anything else, with the names that exist.
  """
  known = {c.name: c for c in CHIPS if c.maker}
  match = _TPU.fullmatch(name)
  if match:
    chip = known.get('v5p' if match[1] == 'v5' else match[1])
    if chip and chip.maker == 'tpu':
      shape = tuple(map(int, match[2].split('x')))
      per_slice = math.prod(shape)
      slices = int(match[3] or 1)
      if per_slice and slices:
        return Topology(chip, per_slice * slices, per_slice, shape, libtpu_name=f'{chip.name}:{match[2]}')
  match = _GPU.fullmatch(name)
  if match and int(match[1]):
    chip = known.get(match[2].lower())
    if chip and chip.maker == 'gpu':
      count = int(match[1])
      return Topology(chip, count, min(count, _GPUS_PER_NODE), (count,), libtpu_name='')
  tpus, gpus = ([n for n, c in known.items() if c.maker == maker] for maker in ('tpu', 'gpu'))
  raise ValueError(f"topology: expected CHIP:AxBxC with CHIP one of {tpus}, e.g. 'v5p:8x8x16', or gpu:COUNTxCHIP with "
                   f"CHIP one of {gpus}, e.g. 'gpu:8xh200'; got {name!r}")
