"""CLOC B/16 at 224 px (SPEC §2, §4). `configs/cloc_b16.py:DATASET`; the batch needs a pod: see recipe.py."""
import recipe


def get_config(arg=''):
  return recipe.pretraining(image='B/16', image_size=224, text='B', embed_dim=512, regions=True, arg=arg)
