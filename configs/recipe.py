"""The paper's pre-training recipe (SPEC: batch 32 768, about 14 B images), shared by clip_* and cloc_* experiments."""
import ml_collections


def pretraining(*, image: str, image_size: int, text: str, embed_dim: int, regions: bool, arg: str = ''):
  """The recipe for one pair of towers.

  image, text: tower sizes by name. image_size: pixels. embed_dim: joint width. regions: CLOC, else plain CLIP.
  arg: the data set's folder; one made by `cloc data …`.
  """
  config = ml_collections.ConfigDict()
  config.data = dict(
      path=arg or 'data/region_text', split='train', batch_size=32_768, image_size=image_size,
      # T5's SentencePiece vocabulary, lower-cased, from a local file.
      tokenizer='sentencepiece:data/t5/spiece.model', text_length=77, region_text_length=16,
      regions_per_image=4 if regions else 1, pad='center', flip=False, num_workers=16, cache=None)
  config.model = dict(
      image=dict(variant=image, pool='tok', posemb='learn', attention='dot_product_attention', remat='dots'),
      text=dict(variant=text, pool='eos', attention='dot_product_attention', remat='dots'),
      embed_dim=embed_dim, region_encoder='prompter' if regions else 'none', dtype='bfloat16',
      separate_temperature=False)
  if regions:
    config.model.prompter = dict(pool='all', chunk=4)
  config.loss = dict(image_text='softmax', region_text='softmax', grounding='l2', lambda0=1.0, region_weight=1.0,
                     grounding_weight=1.0, filter_threshold=0.9, transport='gather', tile=1024, tile_dtype='bfloat16')
  config.optim = dict(learning_rate=5e-4, warmup_steps=2000, b1=0.9, b2=0.98, weight_decay=0.2, clip_norm=1.0)
  # Eight ways are enough for H/14's 16 GB of state, divide every width, and suit a single machine too.
  config.mesh = dict(data=-1, fsdp=8, rules=(('.*', 'fsdp'),))
  config.evals = dict(every_steps=5000, splits=('val',), batch_size=1024)
  config.checkpoint = dict(every_steps=1000, keep=2)
  config.train = dict(total_steps=439_087, seed=0, micro_batches=1, log_steps=100)
  return config
