"""Makes scenes.md: ablations on the embedded data, equal steps, several seeds, as in the paper's Table 2.

  cloc data scenes --preset local --size 72 --out runs/table/scenes
  python docs/results/scenes_table.py --data runs/table/scenes --workdir runs/table --steps 1500 --seeds 2

Finished runs are kept in WORKDIR and not repeated. Times are of one machine: read them as ratios to the first row.
"""
import argparse
import json
import pathlib
import platform
import statistics
import sys

import jax
import result_page

from cloc_jax import config as config_lib
from cloc_jax import evaluate, inference, metrics, train

# The share of the run after which the text filter begins, as in configs/scenes_local.py at its own length.
_FILTERED_FROM = 0.68

# (label, argument of configs/scenes_local.py, how regions are embedded)
ROWS = (
    ('CLIP, regions by crop and re-encode', 'clip', 'crop'),
    ('RoI-Align instead of the Prompter', 'roi_align', 'model'),
    ('CLOC (pool over all tokens)', 'all_pool', 'model'),
    ('CLOC, `pool="prompt"`', 'prompt_pool', 'model'),
    ('– text filter', 'prompt_pool,no_filter', 'model'),
    ('– grounding', 'prompt_pool,no_grounding', 'model'),
    ('M = 2', 'prompt_pool,m2', 'model'),
)
# (heading, split, metric)
COLUMNS = (
    ('recognition, seen', 'val', 'region_recognition/top1'),
    ('recognition, unseen pairs', 'unseen', 'region_recognition/top1'),
    ('region → text R@10', 'val', 'region_retrieval/r2t_r10'),
    ('text → region R@10', 'val', 'region_retrieval/t2r_distinct_r10'),
    ('image → text R@1', 'val', 'image_text_retrieval/i2t_any_r1'),
    ('text → image R@1', 'val', 'image_text_retrieval/t2i_any_r1'),
    ('grounding at 0.5', 'val', 'grounding/acc_iou50'),
)


def run_one(arg: str, region_embedding: str, *, seed: int, args) -> dict:
  """Trains (or finds) one run and evaluates it; returns its numbers."""
  workdir = pathlib.Path(args.workdir) / f'{arg.replace(",", "-")}-seed{seed}'
  done = workdir / 'table.json'
  if done.exists() and json.loads(done.read_text())['steps'] == args.steps:
    return json.loads(done.read_text())
  config = config_lib.load(f'{args.config}:{arg}')
  config_lib.override(config, [
      f'data.path={args.data}', f'train.total_steps={args.steps}', f'train.seed={seed}',
      f'evals.every_steps={args.steps}', f'checkpoint.every_steps={args.steps}',
      f'loss.filter_from_step={round(_FILTERED_FROM * args.steps)}', *args.set])
  train.train(config, workdir=workdir, quiet=not args.verbose)
  cloc = inference.load(workdir)
  out = {'steps': args.steps, 'seed': seed}
  for split in ('val', 'unseen'):
    evaluation, _ = evaluate.run(cloc.functions, cloc.params, path=args.data, split=split, limit=args.limit,
                                 region_embedding=region_embedding)
    out |= {f'{split}/{k}': v for k, v in evaluation.metrics.items()}
  rows = metrics.read(workdir).values()
  out['step_seconds'] = statistics.median(r['step_seconds'] for r in rows if 'step_seconds' in r)
  done.write_text(json.dumps(out))
  return out


def cell(values) -> str:
  values = [100 * v for v in values if v is not None]
  if not values:
    return '–'
  spread = (max(values) - min(values)) / 2
  return f'{statistics.mean(values):.1f} ± {spread:.1f}' if len(values) > 1 else f'{values[0]:.1f}'


def write(results: dict, *, args) -> None:
  """Writes scenes.md and scenes.json beside this script."""
  base = statistics.mean(r['step_seconds'] for r in results[ROWS[0][0]])
  head = ['', *(h for h, _, _ in COLUMNS), 'step time']
  lines = ['| ' + ' | '.join(head) + ' |', '| ' + ' | '.join(['---'] * len(head)) + ' |']
  for label, runs in results.items():
    cells = [cell([r.get(f'{split}/{key}') for r in runs]) for _, split, key in COLUMNS]
    ratio = statistics.mean(r['step_seconds'] for r in runs) / base
    lines.append('| ' + ' | '.join([label, *cells, f'{ratio:.2f} ×']) + ' |')
  command = f'python docs/results/scenes_table.py --steps {args.steps} --seeds {args.seeds}'
  note = (f'{args.steps} steps of the same data in the same order, {args.seeds} seeds; per cent, mean ± half the range. '
          f'Made by `{" ".join([command, *(f"--set {s}" for s in args.set)])}` on {platform.machine()}, '
          f'{jax.devices()[0].platform}, jax {jax.__version__}. Step time is a ratio to the first row.')
  here = pathlib.Path(__file__).parent
  result_page.write_table(here / 'scenes.md', note + '\n\n' + '\n'.join(lines))
  (here / 'scenes.json').write_text(json.dumps(results, indent=1) + '\n')


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--config', default='configs/scenes_local.py')
  parser.add_argument('--data', default='runs/table/scenes')
  parser.add_argument('--workdir', default='runs/table')
  parser.add_argument('--steps', type=int, default=1500)
  parser.add_argument('--seeds', type=int, default=2)
  parser.add_argument('--limit', type=int, default=1000)
  parser.add_argument('--set', action='append', default=[], metavar='section.key=value')
  parser.add_argument('--verbose', action='store_true')
  args = parser.parse_args()
  results: dict[str, list] = {label: [] for label, _, _ in ROWS}
  for seed in range(args.seeds):
    for label, arg, region_embedding in ROWS:
      results[label].append(run_one(arg, region_embedding, seed=seed, args=args))
      print(f'seed {seed} · {label}: ' + ', '.join(
          f'{h} {cell([results[label][-1].get(f"{s}/{k}")])}' for h, s, k in COLUMNS), flush=True)
  write(results, args=args)
  return 0


if __name__ == '__main__':
  sys.exit(main())
