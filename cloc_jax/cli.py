"""`cloc`: the verbs a user types. Each imports what it needs when it runs, so that --help is quick."""
import argparse
import gc
import logging
import os
import pathlib
import signal
import sys
import time

from cloc_jax import cli_data, cli_eval, cli_export, cli_hosts, cli_import_model, cli_label

# Errors that the user can mend: shown as one line, without a traceback (--debug shows it).
_USER_ERRORS = (ValueError, TypeError, KeyError, FileNotFoundError, FileExistsError, PermissionError,
                ModuleNotFoundError)
# To trace a model makes and drops small objects by the million, among a million that stay: at Python's own thresholds the
# search for cycles is a seventh of a run's start.
GC_THRESHOLD = (50_000, 20, 100)
_BELOW_FLOOR = 3  # exit status of a run that its guard stopped


def main(argv=None) -> int:
  """Runs a verb; returns the exit status."""
  argv = list(sys.argv[1:] if argv is None else argv)
  gc.set_threshold(*GC_THRESHOLD)
  from cloc_jax import config as config_lib
  assignments, others = config_lib.split_overrides(argv)
  verb = next((i for i, word in enumerate(others) if not word.startswith('-')), 0)
  if others[verb:verb + 2] == ['eval', 'diff']:  # `cloc eval` takes nothing but flags, so this is the other verb
    others[verb:verb + 2] = ['eval-diff']
  args = _parser().parse_args(others)
  if assignments and args.verb not in ('train', 'plan', 'label') and getattr(args, 'data_verb', '') != 'mix':
    _parser().error('--config.KEY=VALUE belongs to `cloc train`, `cloc plan`, `cloc label` and `cloc data mix`')
  args.assignments = assignments
  logging.basicConfig(level=logging.DEBUG if args.debug else logging.WARNING, format='%(levelname)s %(message)s')
  # Orbax reports every save at a level that drowns what a person wants to read.
  logging.getLogger('absl').setLevel(logging.DEBUG if args.debug else logging.ERROR)
  try:
    status = args.run(args) or 0
    sys.stdout.flush()
    return status
  except BrokenPipeError:  # whoever reads has enough, as `| head` does
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it flushes at exit
    return 128 + signal.SIGPIPE
  except Exception as error:
    if args.debug or not _is_for_user(error):
      raise
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    print(f'cloc {args.verb}: {message}', file=sys.stderr)
    return 2


def _is_for_user(error) -> bool:
  from cloc_jax.checkpoint import CheckpointError
  from cloc_jax.data.storage import StorageError
  return isinstance(error, (*_USER_ERRORS, CheckpointError, StorageError, FloatingPointError))


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
      prog='cloc', description='Contrastive localized language-image pre-training: make data, plan, train, evaluate.',
      epilog='`cloc VERB --help` explains a verb.')
  parser.add_argument('--debug', action='store_true', help='show tracebacks and the logs of the libraries')
  verbs = parser.add_subparsers(dest='verb', required=True, metavar='VERB')

  train = verbs.add_parser(
      'train', help='train an experiment, or resume it',
      description='Trains the experiment of a config file. Run the same command again to resume after a stop.',
      epilog='Any value of the config can be changed: --config.optim.learning_rate=1e-3 --config.data.path=DIR. '
             'Unknown keys and wrong types fail at once.')
  train.add_argument('--config', required=True, metavar='FILE.py[:ARGS]', help='e.g. configs/scenes_local.py')
  train.add_argument('--workdir', required=True, metavar='DIR', help='checkpoints, metrics and evaluations go here')
  train.add_argument('--report', action='store_true', help='write WORKDIR/report.html at the end')
  cli_hosts.add_arguments(train)
  train.set_defaults(run=_train)

  plan = verbs.add_parser(
      'plan', help='will an experiment fit on given hardware, and how fast will it go?',
      description='Compiles the real training step for the chips you name, without having one, and says what it needs: '
                  'memory a chip, FLOPs, messages, a roofline of the step time, days and chip-hours.',
      epilog="The TPU compiler comes with pip install 'cloc_jax[tpu]'; without it, and for GPUs, figures are estimated "
             'from shapes. --config.KEY=VALUE changes the experiment, as in `cloc train`.')
  plan.add_argument('--config', required=True, metavar='FILE.py[:ARGS]', help='e.g. configs/cloc_l14.py')
  plan.add_argument('--topology', required=True, metavar='CHIP:SHAPE',
                    help='v5p:8x8x16, v5e:16x16, v6e:16x16, v5p:4x4x4*2 (two slices), gpu:8xh200')
  plan.add_argument('--estimate', action='store_true', help='do not compile (seconds instead of minutes)')
  plan.add_argument('--what-if', action='store_true', help='also with other M, batch, remat and FSDP (one compilation each)')
  plan.add_argument('--fit', action='store_true', help='choose train.micro_batches: the fewest that fit the memory')
  plan.add_argument('--json', metavar='FILE', help='write the figures there')
  plan.set_defaults(run=_plan)

  report = verbs.add_parser('report', help='write an HTML page about a run, with pictures',
                            description='Curves, tables, and found boxes drawn on images that the run evaluated on.')
  report.add_argument('--workdir', required=True, metavar='DIR')
  report.add_argument('--out', metavar='FILE', help='default: WORKDIR/report.html')
  report.add_argument('--images', type=int, default=12, help='how many images of each split to draw')
  report.set_defaults(run=_report)

  cli_eval.add_verbs(verbs)
  cli_data.add_verbs(verbs)
  cli_label.add_verbs(verbs)
  cli_import_model.add_verbs(verbs)
  cli_export.add_verbs(verbs)
  return parser


def _train(args) -> int:
  from cloc_jax import config as config_lib
  config = config_lib.override(config_lib.load(args.config), args.assignments)
  import jax
  cli_hosts.join(args)
  from cloc_jax import compiler, evaluate, train
  config.lock()
  compiler.keep_compiled()
  result = train.train(config, workdir=args.workdir)
  if jax.process_index():
    return 0
  if result.status == 'interrupted':
    return 0
  if result.status == 'below_floor':
    return _BELOW_FLOOR
  if result.status == 'already_done':
    print(f'{result.workdir}: all {result.total_steps} steps are done')
  report = None
  if args.report:
    from cloc_jax import report as report_lib
    report = report_lib.write(result.workdir)
  if any(result.evaluations.values()):
    print('\n' + evaluate.table(result.evaluations) + '\n')
  places = {'checkpoints': result.workdir / 'checkpoints', 'metrics': result.workdir / 'metrics.jsonl',
            'evaluations': result.workdir / 'evals', 'TensorBoard': result.workdir / 'tensorboard', 'report': report}
  for name, path in places.items():
    if path:
      print(f'{name:<12} {path}')
  return 0


def _plan(args) -> int:
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')  # a plan needs shapes and a compiler, not the accelerator
  from cloc_jax import plan, plan_text
  began = time.monotonic()
  plans = plan.run(args.config, assignments=args.assignments, topology=args.topology, estimate=args.estimate,
                   what_if=args.what_if, choose=args.fit)
  print(plan_text.render(plans, seconds=time.monotonic() - began))
  if args.json:
    pathlib.Path(args.json).write_text(plan_text.to_json(plans) + '\n')
  return 0 if plans[0].memory.fits else 1


def _report(args) -> int:
  from cloc_jax import report
  print(report.write(args.workdir, out=args.out, images=args.images))
  return 0


if __name__ == '__main__':
  sys.exit(main())
