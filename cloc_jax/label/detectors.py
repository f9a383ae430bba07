"""Open-vocabulary detectors of Hugging Face behind one interface (SPEC §5.3).

  make('owlv2:DIR')            OWLv2 (Minderer et al. 2023), the paper's detector; also OWNER/NAME on the hub
  make('owlvit:DIR')           OWL-ViT (Minderer et al. 2022)
  make('grounding-dino:DIR')   Grounding DINO (Liu et al. 2023)
  make('hf:DIR')               whichever of them the folder holds
"""
import os

from cloc_jax.label import batches, checkpoints, grounding_dino, owl

KINDS = {'owlv2': owl.Owl, 'owlvit': owl.Owl, 'grounding-dino': grounding_dino.GroundingDino}


def make(spec: str, **config) -> batches.BatchedDetector:
  """The detector that `spec` names; `config` goes to its class. The model is loaded at first use.

  Raises:
    ValueError: on an unknown spec. TypeError: on an unknown setting. FileNotFoundError: if the folder is not there.
  """
  kind, _, name = spec.partition(':')
  if name and kind in KINDS:
    return KINDS[kind](name, kind=kind, **config)
  if kind != 'hf' or not name:
    raise ValueError(f'detector: expected {", ".join(f"{k}:NAME" for k in (*KINDS, "hf"))}, got {spec!r}')
  name = os.path.expanduser(name)
  checkpoints.identify(name)  # its errors are clearer
  kind = checkpoints.load('AutoConfig', name, revision=config.get('revision')).model_type
  if kind not in KINDS:
    raise ValueError(f'{spec}: expected a model of type {", ".join(KINDS)}, got {kind!r}')
  return KINDS[kind](name, kind=kind, **config)
