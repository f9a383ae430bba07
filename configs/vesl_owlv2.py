"""VESL as the paper runs it: a captioner, noun phrases, OWLv2 L/14 (ST+FT) at 448 px.

For `cloc label`: `configs/vesl_owlv2.py[:CAPTIONER]`. Any key can be changed on the command line: --config.detector.threshold=0.2.
"""
import ml_collections


def get_config(arg=''):
  config = ml_collections.ConfigDict()
  # What the stages take beside 'spec' is said in docs/vesl.md.
  config.captioner = dict(spec=arg or 'hf:llava-hf/llava-1.5-7b-hf')
  config.phrases = dict(spec='nltk', limit=20)
  config.detector = dict(spec='owlv2:google/owlv2-large-patch14-finetuned', image_size=448, threshold=0.1)
  config.engine = dict(shard_size=1024, chunk=64, max_error_share=0.01,
                       text_keys=('captions', 'caption', 'text', 'alt_text'))
  # For --runner ray. size: of the pool, or (least, most); None for tasks as many as the cluster has room for.
  pools = dict(read={}, decode={}, captioner={}, phrases={}, detector={}, writer={})
  config.pools = {name: dict(size=None, num_cpus=1.0, num_gpus=0.0, resources={}) | pool
                  for name, pool in pools.items()}
  config.pools.captioner.update(size=1, num_cpus=0.5, threads=4)
  config.pools.detector.update(size=1, num_cpus=0.5, threads=4)
  return config
