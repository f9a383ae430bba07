"""CLOC L/14 at 336 px (SPEC §2, §4). `configs/cloc_l14.py:DATASET`; the batch needs a pod: see recipe.py."""
import recipe


def get_config(arg=''):
  return recipe.pretraining(image='L/14', image_size=336, text='L', embed_dim=768, regions=True, arg=arg)
