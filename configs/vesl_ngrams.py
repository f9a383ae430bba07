"""The paper's baseline without re-captioning: n-grams of the alt-text as queries, OWLv2 L/14 at 448 px."""
import vesl_owlv2


def get_config(arg=''):
  config = vesl_owlv2.get_config(arg)
  config.captioner = dict(spec='alt-text')
  config.phrases = dict(spec='ngrams', limit=300, longest=10)
  return config
