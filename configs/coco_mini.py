"""Real photos: a small CLOC on COCO images imported by `cloc data import coco`. `configs/coco_mini.py:DATASET`.

With a few dozen photos it can only memorise; it shows that the whole path works on real input, end to end.
"""
import ml_collections


def get_config(arg=''):
  config = ml_collections.ConfigDict()
  config.data = dict(
      path=arg or 'runs/coco_mini/data', split='train', batch_size=16, image_size=112, tokenizer='train:2048',
      text_length=32, region_text_length=8, regions_per_image=4, pad='center', flip=True, num_workers=0,
      cache=None)
  config.model = dict(
      image=dict(variant='mu/14', width=128, depth=3, heads=4, pool='tok', posemb='sincos2d', unroll=4),
      text=dict(variant='mu', width=64, depth=2, heads=2, pool='eos', unroll=4),
      prompter=dict(pool='all'), embed_dim=64, region_encoder='prompter', dtype='float32', separate_temperature=False)
  config.loss = dict(image_text='softmax', region_text='softmax', grounding='l2', lambda0=1.0, region_weight=1.0,
                     grounding_weight=1.0, filter_threshold=0.9)
  config.optim = dict(learning_rate=1e-3, warmup_steps=20, b1=0.9, b2=0.98, weight_decay=0.2, clip_norm=1.0)
  config.mesh = dict(data=-1, fsdp=1, rules=(('.*', 'fsdp'),))
  config.evals = dict(every_steps=100, splits=('train', 'val'), batch_size=32)
  config.checkpoint = dict(every_steps=100, keep=2)
  config.train = dict(total_steps=300, seed=0, micro_batches=1, ema_decay=0.0, log_steps=10)
  return config
