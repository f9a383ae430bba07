"""Localise my CLIP: towers of somebody's CLIP, frozen; a Prompter and a box head learn on them. docs/from_clip.md.

`configs/localise.py:INIT`, or with the data set's folder `configs/localise.py:INIT,DATA`. INIT is what
--config.model.init takes: hf:DIR, open_clip:FILE, openai:FILE, big_vision:FILE, or the folder of `cloc import`.
Of the towers, everything but how they are computed comes from there, tokenizer, sizes and pixel scaling included.
"""
import ml_collections


def get_config(arg=''):
  init, _, data = arg.partition(',')
  if not init:
    raise ValueError('configs/localise.py:INIT names the model to start from, such as hf:DIR or open_clip:FILE')
  config = ml_collections.ConfigDict()
  its_own = lambda: ml_collections.config_dict.placeholder(int)  # one alone would be one value in three places
  config.data = dict(
      path=data or 'data/region_text', split='train', batch_size=256, image_size=its_own(), tokenizer='init',
      text_length=its_own(), region_text_length=its_own(), regions_per_image=4, pad='center', flip=False, num_workers=8,
      cache=None)
  # No matmul result of a frozen tower is kept for a backward pass, so there is nothing to recompute.
  config.model = dict(
      init=init, init_parts='both',
      image=dict(attention='dot_product_attention', remat='none', unroll=1),
      text=dict(attention='dot_product_attention', remat='none', unroll=1),
      prompter=dict(pool='all', chunk=4), region_encoder='prompter', dtype='bfloat16', separate_temperature=True)
  config.loss = dict(image_text='softmax', region_text='softmax', grounding='l1_giou', lambda0=1.0, region_weight=1.0,
                     grounding_weight=1.0, filter_threshold=0.9)
  # Frozen: no gradients, no optimizer state. To let a tower follow at a tenth of the rate from step 5 000 on, put
  # ('img/.*', 0.1, 5000) first.
  config.optim = dict(learning_rate=1e-3, warmup_steps=500, b1=0.9, b2=0.98, weight_decay=0.1, clip_norm=1.0,
                      multipliers=(('(img|txt)/.*|t|b', 0.0),))
  config.mesh = dict(data=-1, fsdp=1, rules=(('.*', 'fsdp'),))
  # With towers that are trained, a guard: floors=(('val/image_text_retrieval/t2i_r1', 0.40),).
  config.evals = dict(every_steps=1000, splits=('val',), batch_size=256, floors=())
  config.checkpoint = dict(every_steps=500, keep=2)
  config.train = dict(total_steps=10_000, seed=0, micro_batches=1, log_steps=50)
  return config
