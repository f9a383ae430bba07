"""Tiny models of transformers with random weights, and our model of a Spec. Shared by the tests of import and export."""
import jax
import numpy as np
import torch
import transformers

from cloc_jax import models, trees
from cloc_jax.batch import abstract_batch

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
VOCABULARY, LENGTH = 40, 9


def config(family, *, act='quick_gelu', eos=39):
  """'clip', 'siglip' or 'siglip2', two layers of width 32; MLPs that are not 4 × the width, towers that differ."""
  vision, text = dict(SIZES, intermediate_size=48), dict(SIZES, intermediate_size=80, vocab_size=VOCABULARY,
                                                         max_position_embeddings=LENGTH)
  if family == 'clip':
    return transformers.CLIPConfig(
        text_config=dict(text, eos_token_id=eos, bos_token_id=1, pad_token_id=0, hidden_act=act),
        vision_config=dict(vision, image_size=32, patch_size=8, hidden_act=act, layer_norm_eps=3e-5),
        projection_dim=24)
  text |= dict(projection_size=32, eos_token_id=1, bos_token_id=2, pad_token_id=0)
  if family == 'siglip':
    return transformers.SiglipConfig(text_config=text, vision_config=dict(vision, image_size=35, patch_size=8))
  return transformers.Siglip2Config(text_config=text, vision_config=dict(vision, num_patches=16, patch_size=8))


def model(family, *, seed=0, **options):
  """The torch model; weights so large that a missing norm, bias or activation shows."""
  torch.manual_seed(seed)
  out = transformers.AutoModel.from_config(config(family, **options))
  with torch.no_grad():
    for name, p in out.named_parameters():
      p.copy_(0.25 * torch.randn(p.shape) + (1.0 if 'norm' in name and name.endswith('weight') else 0.0))
  return out.eval()


def state(module):
  """Its state dict in NumPy."""
  return {k: v.detach().numpy() for k, v in module.state_dict().items()}


def pixels(family, images):
  """(B, S, S, 3) normalised → the keywords of get_image_features."""
  if family != 'siglip2':
    return dict(pixel_values=torch.tensor(images.transpose(0, 3, 1, 2)))
  from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches
  patches = np.stack([convert_image_to_patches(image.transpose(2, 0, 1), 8) for image in images])
  grid = images.shape[1] // 8
  return dict(pixel_values=torch.tensor(patches), pixel_attention_mask=torch.ones(patches.shape[:2], dtype=torch.long),
              spatial_shapes=torch.full((len(images), 2), grid))


def features(found):
  """transformers 5 wraps what transformers 4 returned bare."""
  return found if isinstance(found, torch.Tensor) else found.pooler_output


def our_model(spec, **options):
  """(Cloc, abstract parameters) of a Spec; options of the model section."""
  section = spec.model_section(**options)
  cloc = models.build(**section, vocab_size=spec.text['vocab_size'], eos_id=spec.eos_id or 0,
                      text_length=spec.text_length) if 'eos_id' not in section['text'] else models.build(
                          **section, vocab_size=0, eos_id=0, text_length=spec.text_length)
  batch = abstract_batch(batch_size=2, image_size=spec.image_size, text_length=spec.text_length, regions=1,
                         region_text_length=spec.text_length)
  return cloc, jax.eval_shape(cloc.init, jax.random.key(0), batch)['params']


def expected(params):
  """What name_map.to_jax takes as `expected`."""
  loop = trees.scan_to_loop(jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), params))
  return {k: v.shape for k, v in trees.flatten(loop).items()}
