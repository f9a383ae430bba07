"""CLIP B/16 at 224 px: the recipe without regions (SPEC §2, §4). `configs/clip_b16.py:DATASET`; the batch needs a pod: see recipe.py."""
import recipe


def get_config(arg=''):
  return recipe.pretraining(image='B/16', image_size=224, text='B', embed_dim=512, regions=False, arg=arg)
