"""Makes communication.md: what a chip receives in a step of CLOC B/16 as the pod grows, from compiled programs.

  pip install 'cloc_jax[tpu]' && python docs/results/communication.py    # a minute or more a row; no TPU needed

Images a chip are fixed, so that the batch grows with the chips. Every row is a process of its own. Rows that are
already in communication.json are kept (--again makes them anew).

On a handful of chips the TPU compiler sends parameters from within the loops of products, whose length cloc_jax/hlo.py
does not read: such rows are marked "≥".
"""
import argparse
import json
import math
import pathlib
import subprocess
import sys
import time

import jax
import result_page

from cloc_jax import config as config_lib
from cloc_jax import hardware, hlo, plan, plan_step

HERE = pathlib.Path(__file__).parent
CONFIG = 'configs/cloc_b16.py'
TOPOLOGIES = ('v5p:4x4x4', 'v5p:8x8x4', 'v5p:8x8x16')
TRANSPORTS = ('gather', 'ring')
IMAGES_A_CHIP = 32
CAUSES = ('forward', 'backward', 'losses')


def by_cause(text: str, step) -> dict[str, dict[str, float]]:
  """{cause: {kind of message: bytes a chip receives}} of a compiled step.

  The losses' messages are named after shard_map, or go to all chips and hold all rows of the batch. Of the rest, what
  is named after the forward pass is parameters. What remains is the backward pass: parameters again, gradients that are
  summed, a few scalars. Kinds do not tell causes apart: the compiler also writes a gather as a sum of parts that are
  zero elsewhere.
  """
  images, regions, chips = step.data.batch_size, step.data.regions_per_image, step.where.chips
  embeddings = [f'[{rows},{step.model.embed_dim}]' for rows in (images, images * regions)]

  def cause(line):
    whole = hlo._group_size(line) == chips and any(rows in line.split('replica_groups')[0] for rows in embeddings)
    if 'shard_map' in line or whole:
      return 'losses'
    return 'forward' if 'jvp(' in line and 'transpose(' not in line else 'backward'

  sends = lambda line: any(f' {kind}' in line for kind in hlo.COLLECTIVES)
  lines = text.splitlines()
  return {name: hlo.traffic('\n'.join(l for l in lines if not sends(l) or cause(l) == name),
                            devices=chips).received for name in CAUSES}


def formula(step) -> dict[str, float]:
  """The same by cause, by what each chip has to learn.

  Split parameters are gathered in bfloat16, once forward and once backward; their gradients are summed in float32,
  first onto their owners, then over the copies; those of parameters that are not split, over all. Of every row of the
  losses that is not its own a chip needs the text in bfloat16, and for its own rows what the others found of the
  gradient, in float32.
  """
  chips, (data, fsdp) = step.where.chips, step.mesh.values()
  sizes = [(4 * math.prod(x.shape), s.shard_shape(x.shape) != x.shape)
           for x, s in zip(jax.tree.leaves(step.state.params), jax.tree.leaves(step.shardings.params), strict=True)]
  split, copied = (sum(size for size, is_split in sizes if is_split == want) for want in (True, False))
  others = lambda n: (n - 1) / n
  rows = step.data.batch_size * (1 + step.data.regions_per_image)
  gathered = split / 2 * others(fsdp)
  summed = split * others(fsdp) + 2 * split / fsdp * others(data) + 2 * copied * others(chips)
  return {'forward': gathered, 'backward': gathered + summed,
          'losses': others(chips) * rows * step.model.embed_dim * (2 + 4)}


def one(topology: str, transport: str) -> dict:
  """Compiles one row."""
  began = time.monotonic()
  where = hardware.topology(topology)
  config = config_lib.load(CONFIG)
  config_lib.override(config, [f'data.batch_size={IMAGES_A_CHIP * where.chips}', f'loss.transport={transport}'])
  step = plan_step.Step(config, where)
  compiled, reason = plan._compile(step, where)
  if compiled is None or isinstance(compiled, plan_step.OutOfMemory):
    raise RuntimeError(reason or compiled.message)
  text = compiled.as_text()
  traffic = hlo.traffic(text, devices=where.chips)
  per_image = step.data.step_flops(step.model)
  work = (per_image.train + step.recomputed(per_image)) * IMAGES_A_CHIP
  return {'topology': topology, 'transport': transport, 'chips': where.chips, 'batch_size': step.data.batch_size,
          'mesh': step.mesh, 'received': by_cause(text, step), 'formula': formula(step),
          'messages': traffic.messages, 'by_scope': traffic.by_scope, 'doubts': traffic.doubts,
          'memory': step.memory(compiled).total,
          'seconds': {'compute': work / where.chip.flops, 'links': traffic.total / where.chip.links},
          'seconds_to_plan': time.monotonic() - began}


def write(rows: dict) -> None:
  head = ('chips', 'batch', 'losses by', *(f'{cause}, MB' for cause in CAUSES), 'all, MB', 'links', 'compute')
  lines = ['| ' + ' | '.join(head) + ' |', '| ' + ' | '.join(['---'] * len(head)) + ' |']
  for row in sorted(rows.values(), key=lambda row: (row['transport'], row['chips'])):
    got = {cause: sum(kinds.values()) for cause, kinds in row['received'].items()}
    got, want = ([*x.values(), sum(x.values())] for x in (got, row['formula']))
    more = '≥ ' if row['doubts'] else ''
    lines.append('| ' + ' | '.join((
        f'{row["chips"]:,}', f'{row["batch_size"]:,}', row['transport'],
        *(f'{more}{mine / 1e6:,.0f} ({formula / 1e6:,.0f})' for mine, formula in zip(got, want)),
        f'{1e3 * row["seconds"]["links"]:.1f} ms', f'{1e3 * row["seconds"]["compute"]:.1f} ms')) + ' |')
  result_page.write_table(HERE / 'communication.md', '\n'.join(lines))


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--topologies', default=','.join(TOPOLOGIES))
  parser.add_argument('--transports', default=','.join(TRANSPORTS))
  parser.add_argument('--again', action='store_true')
  parser.add_argument('--timeout', type=float, default=1800, help='seconds a row')
  parser.add_argument('--one', nargs=2, metavar=('TOPOLOGY', 'TRANSPORT'), help='compile one row and print it')
  args = parser.parse_args()
  if args.one:
    print(json.dumps(one(*args.one)))
    return 0
  saved = HERE / 'communication.json'
  rows = json.loads(saved.read_text()) if saved.exists() else {}
  for topology in args.topologies.split(','):
    for transport in args.transports.split(','):
      key = f'{topology} {transport}'
      if key in rows and not args.again:
        continue
      try:
        done = subprocess.run([sys.executable, __file__, '--one', topology, transport], capture_output=True, text=True,
                              timeout=args.timeout, check=True)
      except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        print(f'{key}: {error}: {(error.stderr or "")[-500:]}', file=sys.stderr)
        continue
      rows[key] = json.loads(done.stdout.splitlines()[-1])
      print(f'{key}: {rows[key]["seconds_to_plan"]:.0f} s', flush=True)
      saved.write_text(json.dumps(rows, indent=1) + '\n')
  write(rows)
  return 0


if __name__ == '__main__':
  sys.exit(main())
