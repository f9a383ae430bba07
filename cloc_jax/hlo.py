"""Reads a compiled program's text (XLA's HLO): what it sends between devices, with loops counted as often as they run.

XLA's own cost analysis counts a loop's body once. Here every computation is weighed by how often it is reached from the
entry: trip counts of loops multiply.
"""
import collections
import dataclasses
import math
import re

_BITS = {'pred': 8, 's4': 4, 'u4': 4, 's8': 8, 'u8': 8, 's16': 16, 'u16': 16, 'bf16': 16, 'f16': 16, 's32': 32, 'u32': 32,
         'f32': 32, 's64': 64, 'u64': 64, 'f64': 64, 'c64': 64, 'c128': 128, 'f8e4m3fn': 8, 'f8e5m2': 8}
COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'collective-permute', 'all-to-all')
_HEADER = re.compile(r'^(ENTRY )?%?([^\s(]+) \(.*\{\s*$')
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?([^\s=]+) = (.*)$')
_ARRAY = re.compile(r'\b([a-z]\w*)\[([\d,]*)\]')
_CALLS = re.compile(r'\b(?:calls|to_apply|body|condition|branch_computations|called_computations)='
                    r'(\{[^}]*\}|%?[^\s,)]+)')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
# {{0,1},{2,3}}, or [groups,size]<=[…], or mesh['a'=4,'b'=2], device_ids=(…) {'a'}
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\]|mesh\[([^\]]*)\](?:, device_ids=\(.*?\))? \{([^}]*)\})")


@dataclasses.dataclass(frozen=True)
class Instruction:
  opcode: str
  shapes: tuple[int, ...]  # bytes of each array in the result
  unknown: bool            # the result holds a type whose size is not known
  calls: tuple[str, ...]
  trips: int | None        # of a loop, where it is known
  group: int | None        # devices in a group of a collective
  scope: str               # the op_name of the metadata: where in the model it comes from


@dataclasses.dataclass(frozen=True)
class Traffic:
  """Of one device in one run of a program. received: bytes by kind of collective; messages: how many of them;
  by_scope: bytes by where in the model they come from; doubts: what could not be read, in words."""
  received: dict[str, float]
  messages: dict[str, int]
  by_scope: dict[str, float]
  doubts: tuple[str, ...] = ()

  @property
  def total(self) -> float:
    return sum(self.received.values())


def _array_bytes(text: str) -> tuple[tuple[int, ...], bool]:
  found = _ARRAY.findall(text)
  known = tuple(math.prod(map(int, filter(None, dims.split(',')))) * _BITS[kind] // 8
                for kind, dims in found if kind in _BITS)
  return known, len(known) < len(found)


def _split_type(text: str) -> tuple[str, str]:
  """'(f32[2]{0}, s32[]) while(…), …' → its type, and the rest."""
  if not text.startswith('('):
    kind, _, rest = text.partition(' ')
    return kind, rest
  depth = 0
  for at, char in enumerate(text):
    depth += (char == '(') - (char == ')')
    if not depth:
      return text[:at + 1], text[at + 1:].lstrip()
  raise ValueError(f'HLO: unbalanced type in {text[:80]!r}')


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
  """(computations by name, the entry's name).

  Raises:
    ValueError: when there is no entry: not HLO.
  """
  computations: dict[str, list[Instruction]] = {}
  constants: dict[str, list[int]] = collections.defaultdict(list)
  counting: set[str] = set()
  entry, current, name = '', None, ''
  for line in text.splitlines():
    header = _HEADER.match(line)
    if header and ' = ' not in line.split('->')[0]:
      name = header[2]
      current = computations.setdefault(name, [])
      entry = name if header[1] else entry
      continue
    found = _INSTRUCTION.match(line)
    if not found or current is None:
      continue
    kind, rest = _split_type(found[2])
    opcode = rest.split('(')[0]
    if opcode == 'constant' and kind.startswith('s32[]'):
      constants[name] += map(int, re.findall(r'constant\((-?\d+)\)', rest))
    if opcode == 'compare' and 'direction=LT' in rest and line.lstrip().startswith('ROOT'):
      counting.add(name)
    called = tuple(c.strip().lstrip('%') for match in _CALLS.findall(rest) for c in match.strip('{}').split(','))
    trips = _TRIPS.search(rest)
    scope = re.search(r'op_name="([^"]*)"', rest)
    shapes, unknown = _array_bytes(kind)
    current.append(Instruction(opcode, shapes, unknown, called, int(trips[1]) if trips else None,
                               _group_size(rest), scope[1] if scope else ''))
  if not entry:
    raise ValueError('HLO: no ENTRY computation found')
  # A backend that does not write trip counts still shows them: lax.scan counts from 0 while below a constant.
  bounds = {c: constants[c][0] for c in counting if len(constants[c]) == 1}
  for body in computations.values():
    for at, instruction in enumerate(body):
      if instruction.opcode == 'while' and instruction.trips is None:
        bound = next((bounds[c] for c in instruction.calls if c in bounds), None)
        body[at] = dataclasses.replace(instruction, trips=bound)
  return computations, entry


def _group_size(text: str) -> int | None:
  """Devices in a group of a collective; None where that cannot be read."""
  found = _GROUPS.search(text)
  if not found:
    return None
  listed, size, mesh, axes = found.groups()
  if listed is not None:
    return len(listed.split(','))
  if size is not None:
    return int(size)
  sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", mesh)}
  names = [a.strip().strip("'") for a in axes.split(',')]
  return math.prod(sizes[n] for n in names) if all(n in sizes for n in names) else None


def multiplicities(computations, entry) -> dict[str, int]:
  """How often each computation runs in one run of the entry."""
  counts: collections.Counter = collections.Counter()

  def visit(name, times):
    counts[name] += times
    for instruction in computations.get(name, ()):
      factor = (instruction.trips or 1) if instruction.opcode == 'while' else 1
      for called in instruction.calls:
        if called in computations:
          visit(called, times * factor)

  visit(entry, 1)
  return counts


def traffic(text: str, *, devices: int) -> Traffic:
  """What one device receives from others while the program runs once.

  With g devices in a group: an all-gather brings (g − 1)/g of its result, a reduce-scatter (g − 1) times its result, an
  all-reduce both halves of that (2·(g − 1)/g), a permutation its result, an all-to-all (g − 1)/g of it.
  """
  computations, entry = parse(text)
  counts = multiplicities(computations, entry)
  received, messages = collections.Counter(), collections.Counter()
  scopes: collections.Counter = collections.Counter()
  doubts: set[str] = set()
  for name, times in counts.items():
    for instruction in computations.get(name, ()):
      kind = next((k for k in COLLECTIVES if instruction.opcode in (k, f'{k}-start')), None)
      if kind is None:
        continue
      g = instruction.group or devices
      if instruction.unknown or (instruction.group is None and kind != 'collective-permute'):
        doubts.add(f'{kind}: a type or group of devices that is not understood')
      if kind == 'all-reduce' and name.startswith('all-reduce-scatter'):
        kind = 'reduce-scatter'  # the TPU compiler's: a fusion of an all-reduce and the slice that is kept of it
        size = sum(instruction.shapes) * (g - 1) / g
      else:
        size = _moved(kind, instruction, g)
      received[kind] += times * size
      messages[kind] += times
      scopes[instruction.scope] += times * size
  for name in counts:
    for instruction in computations.get(name, ()):
      if (instruction.opcode == 'while' and instruction.trips is None
          and any(_sends(computations, called) for called in instruction.calls)):
        doubts.add('a loop that sends, of unknown length: counted once')
  return Traffic(dict(received), dict(messages), dict(scopes), tuple(sorted(doubts)))


def _moved(kind: str, instruction: Instruction, g: int) -> float:
  """Bytes that one device receives, from an instruction's result; several arrays may be sent in one."""
  size = sum(instruction.shapes)
  if instruction.opcode.endswith('-start') and len(instruction.shapes) > 1:
    # The start of an all-gather, reduce-scatter or permutation carries its operands beside its results (and a
    # permutation two small counters). That of an all-reduce does not.
    if kind == 'all-gather':
      size *= g / (g + 1)
    elif kind == 'reduce-scatter':
      size /= g + 1
    elif kind in ('collective-permute', 'all-to-all'):
      size = sum(x for x in instruction.shapes if x > 4 or len(instruction.shapes) == 2) / 2
  return size * {'all-gather': (g - 1) / g, 'all-reduce': 2 * (g - 1) / g, 'reduce-scatter': g - 1,
                 'collective-permute': 1, 'all-to-all': (g - 1) / g}[kind]


def _sends(computations, name: str) -> bool:
  return any(instruction.opcode.removesuffix('-start') in COLLECTIVES or any(
      _sends(computations, called) for called in instruction.calls) for instruction in computations.get(name, ()))
