"""Checkpoints of width 32 with random weights, as transformers saves and loads them: what the label stages run.

  tiny_models.owlv2(folder), .owlvit(folder), .grounding_dino(folder), .llava(folder), .language_model(folder)

Each writes a folder (model, tokenizer, preprocessor) and returns it. Import after pytest.importorskip('transformers').
"""
import json
import pathlib
import string

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from cloc_jax.data import clip_vocabulary

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
WORDS = ('a an the red green small large old dog cat horse bus table chair street person window tree car boat plate '
         'near on with under holding standing sitting and of in . ,').split()
IMAGE, USER, EOS = '<image>', 'USER:', '</s>'
CHAT = ("{% for message in messages %}USER: {% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}"
        "{% endif %}{% endfor %}{% endif %} ASSISTANT: {% endfor %}")


def randomize(model, *, seed=0, scale=0.3):
  """Normal weights large enough that a missing norm or a swapped input shows."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, p in model.named_parameters():
      gain = 'norm' in name.lower() and name.endswith('weight')  # around 1, or all patches would look alike
      p.copy_(gain + scale * torch.randn(p.shape, generator=generator))
  return model.eval()


def clip_tokenizer(folder, *, length=16):
  """CLIP's byte-level BPE with 512 bytes, the merges of the words dog, cat and red, and two marks; '!' (0) pads."""
  letters = clip_vocabulary.byte_letters()
  merges = [('d', 'o'), ('do', 'g</w>'), ('c', 'a'), ('ca', 't</w>'), ('r', 'e'), ('re', 'd</w>')]
  tokens = [*letters, *(c + '</w>' for c in letters), *(a + b for a, b in merges), clip_vocabulary.BOS,
            clip_vocabulary.EOS]
  tokenizer = transformers.CLIPTokenizer(
      vocab={token: i for i, token in enumerate(tokens)}, merges=merges, pad_token='!', model_max_length=length)
  tokenizer.save_pretrained(folder)
  return len(tokens)


def _owl(folder, name, *, image_size, patch, seed):
  folder = pathlib.Path(folder)
  vocabulary = clip_tokenizer(folder)
  narrow = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
  prefix = {'owlv2': 'Owlv2', 'owlvit': 'OwlViT'}[name]
  config = getattr(transformers, f'{prefix}Config')(
      text_config=narrow | dict(vocab_size=vocabulary, bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1),
      vision_config=narrow | dict(image_size=image_size, patch_size=patch), projection_dim=32)
  model = randomize(getattr(transformers, f'{prefix}ForObjectDetection')(config), seed=seed)
  model.save_pretrained(folder)
  (folder / 'preprocessor_config.json').write_text(json.dumps(dict(
      image_processor_type=f'{prefix}ImageProcessor', processor_class=f'{prefix}Processor', image_mean=MEAN,
      image_std=STD, size=dict(height=image_size, width=image_size))))
  return folder


def owlv2(folder, *, image_size=64, patch=8, seed=2):
  """OWLv2 of two layers for images of 64 pixels."""
  return _owl(folder, 'owlv2', image_size=image_size, patch=patch, seed=seed)


def owlvit(folder, *, image_size=64, patch=8, seed=2):
  """OWL-ViT of two layers for images of 64 pixels."""
  return _owl(folder, 'owlvit', image_size=image_size, patch=patch, seed=seed)


def grounding_dino(folder, *, seed=0):
  """Grounding DINO: Swin of width 16, BERT of width 32, 64 itself (its norms have 32 groups); 20 object queries.

  The short side becomes 64 pixels, the long one at most 100.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  # The model knows [CLS], [SEP], '.' and '?' by their places in BERT's vocabulary.
  vocabulary = [f'[unused{i}]' for i in range(1100)]
  marks = {0: '[PAD]', 100: '[UNK]', 101: '[CLS]', 102: '[SEP]', 103: '[MASK]', 1012: '.', 1029: '?'}
  for place, token in marks.items():
    vocabulary[place] = token
  rest = [w for w in dict.fromkeys([*WORDS, *string.ascii_lowercase]) if w != '.']
  vocabulary[200:200 + len(rest)] = rest
  vocabulary[300:326] = ['##' + c for c in string.ascii_lowercase]
  transformers.BertTokenizer(vocab={token: i for i, token in enumerate(vocabulary)}).save_pretrained(folder)
  config = transformers.GroundingDinoConfig(
      backbone_config=transformers.SwinConfig(image_size=64, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 2],
                                              window_size=4, out_indices=[2, 3, 4]),
      text_config=transformers.BertConfig(vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2,
                                          num_attention_heads=2, intermediate_size=64),
      d_model=64, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=64, decoder_ffn_dim=64,
      encoder_attention_heads=2, decoder_attention_heads=2, num_queries=20, max_text_len=32)
  torch.manual_seed(seed)
  model = transformers.GroundingDinoForObjectDetection(config).eval()
  with torch.no_grad():
    for p in model.model.decoder.bbox_embed.parameters():
      p.copy_(0.3 * torch.randn(p.shape))
  model.save_pretrained(folder)
  (folder / 'preprocessor_config.json').write_text(json.dumps(dict(
      image_processor_type='GroundingDinoImageProcessor', processor_class='GroundingDinoProcessor',
      size=dict(shortest_edge=64, longest_edge=100), image_mean=[0.485, 0.456, 0.406],
      image_std=[0.229, 0.224, 0.225])))
  return folder


def _word_tokenizer():
  """WORDS, one token each; everything else is <unk>. What a random model says is words."""
  special = ['<pad>', '<s>', EOS, '<unk>', IMAGE]
  fast = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*special, *WORDS])}, unk_token='<unk>'))
  fast.normalizer = normalizers.Lowercase()
  fast.pre_tokenizer = pre_tokenizers.Whitespace()
  fast.post_processor = processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 1)])
  tokenizer = transformers.PreTrainedTokenizerFast(
      tokenizer_object=fast, pad_token='<pad>', bos_token='<s>', eos_token=EOS, unk_token='<unk>',
      additional_special_tokens=[IMAGE])
  return tokenizer, len(special)


def _llama(tokenizer):
  return transformers.LlamaConfig(
      vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
      num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def llava(folder, *, seed=0):
  """LLaVA: CLIP of width 32 at 32 pixels, Llama of width 32; says random words, never a special token."""
  folder = pathlib.Path(folder)
  tokenizer, special = _word_tokenizer()
  config = transformers.LlavaConfig(
      vision_config=transformers.CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                                  num_attention_heads=2, image_size=32, patch_size=8,
                                                  projection_dim=32),
      text_config=_llama(tokenizer), image_token_index=tokenizer.convert_tokens_to_ids(IMAGE), image_seq_length=16)
  model = randomize(transformers.LlavaForConditionalGeneration(config), seed=seed)
  model.generation_config = transformers.GenerationConfig(
      pad_token_id=0, bos_token_id=1, eos_token_id=2, suppress_tokens=list(range(special)))
  model.save_pretrained(folder)
  transformers.LlavaProcessor(
      transformers.CLIPImageProcessor(size=dict(shortest_edge=32), crop_size=dict(height=32, width=32)), tokenizer,
      patch_size=8, vision_feature_select_strategy='default', chat_template=CHAT, image_token=IMAGE,
      num_additional_image_tokens=1).save_pretrained(folder)
  return folder


def language_model(folder, *, seed=0):
  """A Llama of width 32 with the same words and a chat template."""
  folder = pathlib.Path(folder)
  tokenizer, special = _word_tokenizer()
  tokenizer.chat_template = CHAT
  model = randomize(transformers.LlamaForCausalLM(_llama(tokenizer)), seed=seed)
  model.generation_config = transformers.GenerationConfig(
      pad_token_id=0, bos_token_id=1, eos_token_id=2, suppress_tokens=list(range(special)))
  model.save_pretrained(folder)
  tokenizer.save_pretrained(folder)
  return folder
