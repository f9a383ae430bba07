"""`cloc export`."""
import sys
import time


def add_verbs(verbs) -> None:
  """Adds it to the verbs of `cloc`."""
  export = verbs.add_parser(
      'export', help='write a checkpoint for PyTorch, Hugging Face, open_clip, big_vision or ONNX',
      description='Writes a self-contained folder, runs it on real images and texts beside the model it came from, and '
                  'fails if any output differs by more than the tolerance.',
      epilog='Targets: hf-cloc (everything, with its own PyTorch code), hf-clip, hf-siglip (the towers, without custom '
             'code), open-clip, big-vision, safetensors, onnx. See docs/export.md.')
  export.add_argument('--checkpoint', required=True, metavar='DIR', help="a run's folder, or one step of it")
  export.add_argument('--step', type=int, help='which checkpoint; default: the newest')
  export.add_argument('--to', required=True, metavar='TARGET')
  export.add_argument('--out', required=True, metavar='DIR', help='the folder to make')
  export.add_argument('--images', metavar='DIR', help='compare on images of this folder instead of drawn scenes')
  export.add_argument('--limit', type=int, default=4, metavar='N', help='how many images to compare on')
  export.add_argument('--tolerance', type=float, default=1e-4,
                      help="largest difference of an output, relative to the output's largest value (default: 1e-4)")
  export.set_defaults(run=_export)


def _export(args) -> int:
  from cloc_jax import export
  began = time.monotonic()

  def progress(text):
    print(f'[{time.monotonic() - began:5.1f} s] {text}', file=sys.stderr, flush=True)

  result = export.run(args.checkpoint, to=args.to, out=args.out, step=args.step, images=args.images, limit=args.limit,
                      tolerance=args.tolerance, progress=progress)
  print(export.table(result.differences))
  if not result.passed:
    beyond = [name for name, d in result.differences.items() if not d.within(args.tolerance)]
    print(f'cloc export: differs by more than {args.tolerance:g}: {", ".join(beyond)}. Kept as {result.folder}',
          file=sys.stderr)
    return 1
  print(f'{result.folder}: the same numbers as the checkpoint; see README.md and parity.json there')
  return 0
