"""CLOC H/14 at 336 px (SPEC §2, §4). `configs/cloc_h14.py:DATASET`; the batch needs a pod: see recipe.py."""
import recipe


def get_config(arg=''):
  return recipe.pretraining(image='H/14', image_size=336, text='H', embed_dim=1024, regions=True, arg=arg)
