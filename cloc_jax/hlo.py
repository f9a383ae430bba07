"""Reads a compiled program's text (XLA's HLO): what it sends between devices and what it moves in and out of memory, with
loops counted as often as they run.

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
_ARRAY = re.compile(r'\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?')
_CALLS = re.compile(r'\b(?:calls|to_apply|body|condition|branch_computations|called_computations)='
                    r'(\{[^}]*\}|%?[^\s,)]+)')
_OPERAND = re.compile(r'%([\w.\-]+)')
# Between TPU slices: the compiler hands what leaves a slice to the host, and says what the hosts do with it.
_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
# {{0,1},{2,3}}, or [groups,size]<=[…], or mesh['a'=4,'b'=2], device_ids=(…) {'a'}
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\]|mesh\[([^\]]*)\](?:, device_ids=\(.*?\))? \{([^}]*)\})")


@dataclasses.dataclass(frozen=True)
class Instruction:
  name: str
  opcode: str              # of a custom call, its target
  shapes: tuple[int, ...]  # bytes of each array in the result
  stored: tuple[int, ...]  # the same as they lie in memory, padded to tiles; 0 for what stays in memory on the chip
  unknown: bool            # the result holds a type whose size is not known
  operands: tuple[str, ...]
  index: int               # of a parameter, or of the element that is taken of a tuple
  root: bool
  calls: tuple[str, ...]
  trips: int | None        # of a loop, where it is known
  group: int | None        # devices in a group of a collective
  between_slices: str      # of a `recv` from other TPU slices: what the hosts do, such as ALL_REDUCE
  scope: str               # the op_name of the metadata: where in the model it comes from


@dataclasses.dataclass(frozen=True)
class Traffic:
  """Of one device in one run of a program. received: bytes by kind of collective, over fast links; messages: how many;
  by_scope: those bytes by where in the model they come from; network: bytes by kind from other slices; doubts: what could
  not be read, in words."""
  received: dict[str, float]
  messages: dict[str, int]
  by_scope: dict[str, float]
  network: dict[str, float]
  doubts: tuple[str, ...] = ()

  @property
  def total(self) -> float:
    return sum(self.received.values())


def _array_bytes(text: str) -> tuple[tuple[int, ...], tuple[int, ...], bool]:
  """(bytes of each array, bytes as stored, whether a type is not known)."""
  plain, stored, unknown = [], [], False
  for kind, dims, layout in _ARRAY.findall(text):
    if kind not in _BITS:
      unknown = True
      continue
    shape = [int(d) for d in dims.split(',') if d]
    plain.append(math.prod(shape) * _BITS[kind] // 8)
    stored.append(0 if re.search(r'S\([1-9]', layout) else math.prod(_padded(shape, layout)) * _BITS[kind] // 8)
  return tuple(plain), tuple(stored), unknown


def _padded(shape: list[int], layout: str) -> list[int]:
  """The shape, major axis first, with its last axes rounded up to a layout's tile, such as {0,1:T(8,128)(2,1)}."""
  order, _, rest = layout.partition(':')
  minor_to_major = [int(d) for d in order.split(',') if d] or list(reversed(range(len(shape))))
  shape = [shape[d] for d in reversed(minor_to_major)]
  tile = re.match(r'T\(([\d,]+)\)', rest)
  for at, size in enumerate(reversed([int(t) for t in tile[1].split(',')] if tile else ())):
    if at < len(shape):
      shape[-1 - at] = -(-shape[-1 - at] // size) * size
  return shape


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
    shapes, stored, unknown = _array_bytes(kind)
    inside = _split_type(rest[len(opcode):])[0] if '(' in rest else ''
    index = re.search(r'\bindex=(\d+)', rest) or re.match(r'\((\d+)\)', inside)
    between = _BETWEEN_SLICES.search(rest)
    target = re.search(r'custom_call_target="([^"]*)"', rest)
    current.append(Instruction(
        name=found[1], opcode=target[1] if target else opcode, shapes=shapes, stored=stored, unknown=unknown,
        operands=tuple(_OPERAND.findall(inside)), index=int(index[1]) if index else 0,
        root=line.lstrip().startswith('ROOT'), calls=called, trips=int(trips[1]) if trips else None,
        group=_group_size(rest), between_slices=between[1] if between else '', scope=scope[1] if scope else ''))
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


def multiplicities(computations, entry, *, through: tuple[str, ...] = ()) -> dict[str, int]:
  """How often each computation runs in one run of the entry. through: enter the computations of these opcodes alone."""
  counts: collections.Counter = collections.Counter()

  def visit(name, times):
    counts[name] += times
    for instruction in computations.get(name, ()):
      if through and instruction.opcode not in through:
        continue
      factor = (instruction.trips or 1) if instruction.opcode == 'while' else 1
      for called in instruction.calls:
        if called in computations:
          visit(called, times * factor)

  visit(entry, 1)
  return counts


def traffic(text: str, *, devices: int, slices: int = 1) -> Traffic:
  """What one device receives from others while the program runs once.

  With g devices in a group: an all-gather brings (g − 1)/g of its result, a reduce-scatter (g − 1) times its result, an
  all-reduce both halves of that (2·(g − 1)/g), a permutation its result, an all-to-all (g − 1)/g of it.
  The TPU compiler writes a message over several slices as one within each of them and one between hosts: from the
  latter a device receives as above, with the slices as its group. What few devices receive counts as if all did.
  devices: of one slice; groups whose size is not written have all of them.
  """
  computations, entry = parse(text)
  counts = multiplicities(computations, entry)
  received, messages, network, scopes = (collections.Counter() for _ in range(4))
  doubts: set[str] = set()
  for name, times in counts.items():
    for instruction in computations.get(name, ()):
      if instruction.opcode == 'recv' and instruction.between_slices:
        kind = {'ONE_TO_ONE': 'collective-permute'}.get(instruction.between_slices,
                                                        instruction.between_slices.lower().replace('_', '-'))
        if kind in COLLECTIVES:
          network[kind] += times * _share(kind, slices) * instruction.shapes[0]
        else:
          doubts.add(f'{kind} between slices: not understood')
        continue
      kind = next((k for k in COLLECTIVES if instruction.opcode in (k, f'{k}-start')), None)
      if kind is None:
        continue
      g = instruction.group or devices
      if instruction.unknown or (instruction.group is None and kind != 'collective-permute') or g > devices:
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
  return Traffic(dict(received), dict(messages), dict(scopes), dict(network), tuple(sorted(doubts)))


def _share(kind: str, g: int) -> float:
  """Bytes that one of g devices receives, over those of its result."""
  return {'all-gather': (g - 1) / g, 'all-reduce': 2 * (g - 1) / g, 'reduce-scatter': g - 1, 'collective-permute': 1,
          'all-to-all': (g - 1) / g}[kind]


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
  return size * _share(kind, g)


def _sends(computations, name: str) -> bool:
  return any(instruction.opcode.removesuffix('-start') in COLLECTIVES or instruction.between_slices or any(
      _sends(computations, called) for called in instruction.calls) for instruction in computations.get(name, ()))


# --- memory

# These move nothing: they name, group or wait for what others move, or their bodies are counted.
_FREE = frozenset((
    'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all', 'partition-id', 'replica-id',
    'opt-barrier', 'while', 'conditional', 'call', 'domain', 'add-dependency', 'async-start', 'recv',
    'AllocateBuffer', 'AssumeGatherIndicesInBound', 'AsyncCollectiveDone', 'AsyncCollectiveStart', 'ConcatBitcast'))
_RUNS = ('while', 'conditional', 'call', 'async-start')
_SLICES = ('dynamic-slice', 'slice', 'gather')


def memory_bytes(text: str) -> float:
  """Bytes that one device reads and writes in its memory (HBM) while the program runs once.

  Sums the operands and results of every instruction that is not inside a fusion, padded as they are stored, and without
  what the TPU compiler keeps in memory on the chip. Of an operand that is only sliced, the slices count; of a result
  that is updated in place, the update. Caches that keep more than the compiler says (on CPUs, GPUs) make it less; loops
  of unknown length count once.
  """
  computations, entry = parse(text)
  counts = multiplicities(computations, entry, through=_RUNS)
  return float(sum(times * sum(_moved_in_memory(computations, name)) for name, times in counts.items()
                   if name in computations))


def _moved_in_memory(computations, name: str):
  body = computations[name]
  stored = {i.name: i.stored for i in body}
  for i in body:
    if i.opcode in _FREE or i.opcode.endswith('-done'):
      continue
    operands = [sum(stored.get(o, ())) for o in i.operands]
    if i.opcode in ('slice-start', 'dynamic-slice-start'):  # operands, the slice, a counter
      yield i.shapes[-2] + i.stored[-2]
    elif i.opcode.endswith('-start') and len(i.stored) > 1:  # operand and result stand together in its type
      yield sum(i.stored)
    elif i.opcode in _SLICES:
      yield 2 * sum(i.stored)
    elif i.opcode == 'dynamic-update-slice':
      yield 2 * operands[1]
    elif i.opcode == 'fusion' and i.calls and i.calls[0] in computations:
      inner = computations[i.calls[0]]
      yield sum(min(size, _read(computations, i.calls[0], at)) for at, size in enumerate(operands) if size)
      root = next((x for x in inner if x.root), None)
      yield min(sum(i.stored), _written(computations, i.calls[0], root)) if root else sum(i.stored)
    else:
      yield sum(operands) + sum(i.stored)


def _read(computations, name: str, index: int) -> float:
  """Bytes that a fused computation reads of one of its parameters; inf for all of it."""
  body = computations[name]
  parameter = next((i for i in body if i.opcode == 'parameter' and i.index == index), None)
  waiting, total = [parameter.name] if parameter else [], 0.0
  while waiting:
    value = waiting.pop()
    for user in body:
      if value not in user.operands:
        continue
      if user.opcode == 'bitcast':
        waiting.append(user.name)
      elif user.opcode in _SLICES and user.operands[0] == value:
        total += sum(user.stored)
      elif user.opcode == 'fusion' and user.calls[0] in computations:
        total += sum(_read(computations, user.calls[0], at) for at, o in enumerate(user.operands) if o == value)
      elif user.opcode != 'dynamic-update-slice' or user.operands[0] != value:  # what is updated is not read
        return math.inf
  return total


def _written(computations, name: str, value: Instruction) -> float:
  """Bytes that a fused computation writes for one value of its root; inf for all of it."""
  by_name = {i.name: i for i in computations[name]}
  while value.opcode == 'bitcast' and value.operands[0] in by_name:
    value = by_name[value.operands[0]]
  if value.opcode == 'tuple':
    return sum(min(sum(by_name[o].stored), _written(computations, name, by_name[o])) for o in value.operands)
  if value.opcode == 'fusion' and value.calls[0] in computations:
    return _written(computations, value.calls[0], next(i for i in computations[value.calls[0]] if i.root))
  return sum(by_name[value.operands[1]].stored) if value.opcode == 'dynamic-update-slice' else math.inf
