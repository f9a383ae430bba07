"""Photos with boxes beside image–text pairs without: `configs/mixture.py:BOXES+PAIRS`, two data sets of any kind.

`cloc data mix configs/mixture.py:BOXES+PAIRS` says what that means. The model is the small one of coco_mini.py.
"""
import coco_mini


def get_config(arg=''):
  boxes, _, pairs = arg.partition('+')
  config = coco_mini.get_config()
  config.data.path = None
  config.data.mixture = dict(
      boxes=dict(path=boxes or 'runs/coco_mini/data', weight=1.0),
      # Archives' captions are the alt-text, then the re-captions: the last is the longest.
      pairs=dict(path=pairs or 'webdataset:runs/pairs/*.tar,caption_keys=caption,recaption', weight=1.0,
                 captions='last'))
  config.data.crop = dict(scale=(0.5, 1.0), aspect=(3 / 4, 4 / 3), min_visible=0.5)
  config.evals.path = boxes or 'runs/coco_mini/data'
  return config
