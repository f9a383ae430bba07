"""Makes plans.md: the paper's models on pods, as `cloc plan` sees them.

  pip install 'cloc_jax[tpu]' && python docs/results/plans.py            # compiled: minutes a row, no TPU needed
  python docs/results/plans.py --estimate                                # from shapes: seconds

Every row is a process of its own. Rows that are already in plans.json are kept (--again makes them anew).
"""
import argparse
import json
import pathlib
import subprocess
import sys
import time

import result_page

HERE = pathlib.Path(__file__).parent
CONFIGS = ('cloc_b16', 'cloc_l14', 'cloc_h14')
TOPOLOGIES = ('v5p:8x8x4', 'v5p:8x8x16', 'v5p:16x16x16', 'v5e:16x16', 'v6e:16x16')


def run_one(config: str, topology: str, *, estimate: bool, timeout: float, overrides) -> dict:
  out = HERE / '.plan.json'
  out.unlink(missing_ok=True)
  command = [sys.executable, '-m', 'cloc_jax.cli', 'plan', '--config', f'configs/{config}.py', '--topology', topology,
             '--json', str(out), *(['--estimate'] if estimate else []), *(f'--config.{o}' for o in overrides)]
  began = time.monotonic()
  done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
  if not out.exists():
    raise RuntimeError(f'{" ".join(command)}: exit {done.returncode}: {done.stderr[-500:]}')
  row, = json.loads(out.read_text())
  out.unlink()
  return row | {'seconds_to_plan': time.monotonic() - began}


def write(rows: dict) -> None:
  head = ('model', 'chips', 'batch a chip', 'GB a chip', 'of', 'fits', 'received a step', 'compute', 'memory traffic', 'links',
          'images/s at 50 %', 'days', 'chip-hours', 'how')
  lines = ['| ' + ' | '.join(head) + ' |', '| ' + ' | '.join(['---'] * len(head)) + ' |']
  for row in rows.values():
    m, s = row['memory'], row['seconds']
    lines.append('| ' + ' | '.join((
        row['label'].removesuffix('.py'), row['topology'], f'{row["batch_size"] // row["chips"]}',
        f'{m["total"] / 1e9:.1f}', f'{m["available"] / 1e9:.0f}', 'yes' if m['fits'] else '**no**',
        f'{sum(row["received"].values()) / 1e9:.2f} GB', f'{1e3 * s["compute"]:.0f} ms',
        f'{1e3 * s["memory"]:.0f} ms' if 'memory' in s else '–', f'{1e3 * s["links"]:.0f} ms',
        f'{row["images_per_second"]:,.0f}', f'{row["days"]:.1f}', f'{row["chip_hours"]:,.0f}', row['method'])) + ' |')
  result_page.write_table(HERE / 'plans.md', '\n'.join(lines))


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--configs', default=','.join(CONFIGS))
  parser.add_argument('--topologies', default=','.join(TOPOLOGIES))
  parser.add_argument('--estimate', action='store_true')
  parser.add_argument('--again', action='store_true')
  parser.add_argument('--timeout', type=float, default=1800, help='seconds a row')
  parser.add_argument('--set', action='append', default=[], metavar='section.key=value')
  args = parser.parse_args()
  saved = HERE / 'plans.json'
  rows = json.loads(saved.read_text()) if saved.exists() else {}
  for config in args.configs.split(','):
    for topology in args.topologies.split(','):
      key = ' '.join([config, topology, *args.set])
      if key in rows and not args.again and (args.estimate or rows[key]['method'] == 'compiled'):
        continue
      try:
        rows[key] = run_one(config, topology, estimate=args.estimate, timeout=args.timeout, overrides=args.set)
      except (RuntimeError, subprocess.TimeoutExpired) as error:
        print(f'{key}: {error}', file=sys.stderr)
        continue
      print(f'{key}: {rows[key]["method"]}, {rows[key]["memory"]["total"] / 1e9:.1f} GB, '
            f'{rows[key]["seconds_to_plan"]:.0f} s', flush=True)
      saved.write_text(json.dumps(rows, indent=1) + '\n')
  write(rows)
  return 0


if __name__ == '__main__':
  sys.exit(main())
