"""Checkpoints of random weights on disk, a few thousand parameters each, without a training run."""
import jax
import numpy as np

from cloc_jax import checkpoint, inference
from cloc_jax.batch import abstract_batch
from cloc_jax.data import tokenizer as tokenizer_lib

CAPTIONS = ['a small red circle on a blue square', 'two dogs and a large green cat', 'the cat left of the dog!'] * 4
IMAGE_SIZE = 32

CLIP = dict(image=dict(variant='mu/8', width=16, depth=3, heads=2, mlp_dim=40, act='quick_gelu'),
            text=dict(variant='mu', width=12, depth=2, heads=2, act='quick_gelu'), embed_dim=8)
SIGLIP = dict(image=dict(variant='mu/8', width=16, depth=2, heads=2, pool='map', out_dim=0, ln_eps=1e-6),
              text=dict(variant='mu', width=12, depth=2, heads=2, pool='last', ln_eps=1e-6), embed_dim=16,
              image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5), init_scale=10.0, init_bias=-10.0)


def write(folder, model, *, tokenizer=None, seed=0, pad='center'):
  """Writes FOLDER/checkpoints/00000003 of a model section; returns FOLDER."""
  tokenizer = tokenizer or tokenizer_lib.train(CAPTIONS, vocab_size=290)
  preprocessing = dict(image_size=IMAGE_SIZE, pad=pad, text_length=12, region_text_length=6)
  config = dict(model=dict(model), data=dict(path='/data/tiny', split='train', **preprocessing))
  built = inference.build_model(config, tokenizer=tokenizer)
  batch = abstract_batch(batch_size=1, image_size=IMAGE_SIZE, text_length=12, regions=1, region_text_length=6)
  shapes = jax.eval_shape(built.init, jax.random.key(0), batch)['params']
  rng = np.random.default_rng(seed)

  def draw(path, x):
    # No bias is 0 and no gain is 1: a mistake could hide there. Gains stay near 1, or depth would drown the rest.
    gain = jax.tree_util.keystr(path).endswith("['scale']")
    return np.float32((1.0 if gain else 0.0) + 0.25 * rng.normal(size=x.shape))
  params = jax.tree_util.tree_map_with_path(draw, shapes)
  keeper = checkpoint.Checkpointer(folder / 'checkpoints')
  keeper.save(3, {'params': params}, info=dict(config=config, tokenizer=tokenizer.to_dict(), examples_seen=48,
                                               preprocessing=preprocessing))
  keeper.wait()
  keeper.close()
  return folder
