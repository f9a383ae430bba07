"""VESL as the paper runs it: a captioner, noun phrases, OWLv2 L/14 (ST+FT) at 448 px.

For `cloc label`: `configs/vesl_owlv2.py[:CAPTIONER]`. Any key can be changed on the command line, such as
--config.detector.threshold=0.2 or --config.captioner.prompt='Describe …'; docs/vesl_stages.md says what each does.
"""
import ml_collections

# Those of cloc_jax/label/prompts.py, to be changed here.
CAPTION = ('Describe this image in one detailed paragraph. Name every visible object and person, with colour, '
           'material, number and where it is. Say only what can be seen; do not guess at what is not in the picture, '
           'and do not begin with "The image shows".')
FUSE = ('Below are two texts about the same image: a description by someone who saw it, and the text that stood beside '
        'it on its web page. Write one fluent caption that keeps every visible detail of the first and adds the proper '
        'names and facts of the second that fit it. Leave out advertising, file names, sizes and web addresses. Answer '
        'with the caption alone.\n\nDescription: {caption}\nWeb text: {alt_text}')


def get_config(arg=''):
  config = ml_collections.ConfigDict()
  config.captioner = captioner(arg or 'hf:llava-hf/llava-1.5-7b-hf')
  config.phrases = dict(spec='nltk', limit=20)
  # Of the published checkpoints the one of Minderer et al. 2023, Table 1, row 15: OWL-ST+FT CLIP L/14.
  config.detector = dict(spec='owlv2:google/owlv2-large-patch14-finetuned', image_size=448, threshold=0.1, batch_size=8,
                         threads=4)
  config.engine = dict(shard_size=1024, chunk=64, max_error_share=0.01,
                       text_keys=('captions', 'caption', 'text', 'alt_text'))
  # For --runner ray. size: of the pool, or (least, most); None for tasks as many as the cluster has room for.
  pools = dict(read={}, decode={}, captioner={}, phrases={}, detector={}, writer={})
  config.pools = {name: dict(size=None, num_cpus=1.0, num_gpus=0.0, resources={}) | pool
                  for name, pool in pools.items()}
  config.pools.captioner.update(size=1, num_cpus=0.5, threads=4)
  config.pools.detector.update(size=1, num_cpus=0.5, threads=4)
  return config


def captioner(spec):
  """The settings that a captioner of this kind has."""
  kind, _, rest = spec.partition(':')
  if kind == 'fuse':
    first, _, second = rest.partition('|')
    without = lambda name: {key: value for key, value in captioner(name).items() if key not in ('spec', 'prompt')}
    return dict(spec=spec, prompt=FUSE, captioner=dict(prompt=CAPTION, **without(first)), llm=without(second))
  own = dict(hf=dict(batch_size=8), openai=dict(concurrency=16, attempts=6, timeout=120.0))
  if kind not in own:
    return dict(spec=spec)
  return dict(spec=spec, prompt=CAPTION, max_new_tokens=256, temperature=0.0, max_side=1024) | own[kind]
