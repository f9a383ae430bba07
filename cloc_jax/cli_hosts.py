"""The options by which the processes of several hosts find each other."""
import os


def add_arguments(parser) -> None:
  """Adds them to a verb; the same command then runs on every host."""
  parser.add_argument('--coordinator', metavar='HOST:PORT', help='several hosts: address of process 0 (TPU pods and '
                      'SLURM find it by themselves with --coordinator=auto)')
  parser.add_argument('--num-processes', type=int, help='several hosts: how many processes')
  parser.add_argument('--process-id', type=int, help='several hosts: which one this is')


def join(args) -> None:
  """Joins the other hosts where the options say that there are some; before anything else asks JAX for devices.

  Raises:
    ValueError: on options that belong together and are not all there.
  """
  import jax
  if not args.coordinator:
    if args.num_processes is not None or args.process_id is not None:
      raise ValueError('--num-processes and --process-id need --coordinator=HOST:PORT')
    return
  if args.coordinator == 'auto':
    jax.distributed.initialize()
    return
  if args.num_processes is None or args.process_id is None:
    raise ValueError('--coordinator needs --num-processes and --process-id (or --coordinator=auto)')
  if jax.config.jax_platforms == 'cpu' or os.environ.get('JAX_PLATFORMS') == 'cpu':
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id)
