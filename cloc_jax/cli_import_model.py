"""`cloc import`: others' weights as a checkpoint of ours."""


def add_verbs(verbs) -> None:
  """Adds it to the verbs of `cloc`."""
  verb = verbs.add_parser(
      'import', help="turn somebody's CLIP or SigLIP into a checkpoint of ours",
      description='Reads the weights (nothing in the files is executed), prints what became of each, and writes a '
                  'self-contained checkpoint that `cloc eval --checkpoint`, cloc_jax.load and '
                  '--config.model.init=DIR take.')
  verb.add_argument('source', metavar='SPEC', help='hf:DIR (CLIP, SigLIP, SigLIP 2, MetaCLIP, DFN, FG-CLIP), '
                    'open_clip:FILE.safetensors|.pt (its JSON config beside it), openai:FILE.pt, big_vision:FILE.npz')
  verb.add_argument('--out', required=True, metavar='DIR', help='the checkpoint goes here')
  verb.add_argument('--tokenizer', metavar='KIND:PATH', help='where none lies beside the weights: '
                    'clip:bpe_simple_vocab_16e6.txt.gz, siglip:spiece.model, sentencepiece:tokenizer.model, '
                    'hf:tokenizer.json')
  verb.add_argument('--image-size', type=int, metavar='PIXELS', help="default: the model's own; for another, its "
                    'position table is resampled')
  verb.add_argument('--prompter', action='store_true', help='with a fresh, untrained Prompter and box head')
  verb.set_defaults(run=_import)


def _import(args) -> int:
  import pathlib

  from cloc_jax import initialize
  cloc, report = initialize.import_model(args.source, tokenizer=args.tokenizer, image_size=args.image_size,
                                         region_encoder='prompter' if args.prompter else 'none')
  initialize.save(cloc, args.out)
  out = pathlib.Path(args.out)
  (out / 'import.txt').write_text(report.full(), encoding='utf-8')
  print(report.summary())
  print(f'every name: {out / "import.txt"}\ncheckpoint: {out}')
  return 0
