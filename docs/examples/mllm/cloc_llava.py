"""LLaVA with CLOC's image tower: put it in, prove that it is in, train the projector, generate. No JAX.

  cloc export --checkpoint RUN --to hf-clip --out tower
  python cloc_llava.py --tower tower --images coco/train2017 --annotations captions_train2017.json --out my_llava
  python cloc_llava.py … --llm lmsys/vicuna-7b-v1.5 --dtype bfloat16 --device cuda      # the real thing
  python cloc_llava.py … --anyres                                                       # LLaVA-NeXT's tiles

Without --llm a tiny language model of random weights is made on the spot, and without --images scenes are drawn.
"""
import argparse
import math
import pathlib
import random
import time

import pictures as pictures_lib
import torch
from torch import nn
import transformers
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

IMAGE = '<image>'
PROMPT = f'USER: {IMAGE}\nDescribe the image. ASSISTANT:'


def language_model(path=None, *, texts=(), dtype=torch.float32, seed=0):
  """(model, tokenizer) of a path or hub name; without one, a small Llama and a byte-level BPE learnt from texts."""
  if path:
    return (transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype),
            transformers.AutoTokenizer.from_pretrained(path))
  from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
  bpe = Tokenizer(models.BPE())
  bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
  bpe.train_from_iterator([PROMPT, *texts], trainers.BpeTrainer(
      vocab_size=600, special_tokens=['<pad>', '<s>', '</s>'], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False))
  bpe.post_processor = processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 1)])
  tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token='<pad>', bos_token='<s>',
                                                   eos_token='</s>')
  config = transformers.LlamaConfig(
      vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
      num_key_value_heads=4, max_position_embeddings=4096, initializer_range=0.1, pad_token_id=0, bos_token_id=1,
      eos_token_id=2)
  torch.manual_seed(seed)
  return transformers.LlamaForCausalLM(config).to(dtype), tokenizer


def build(folder, llm, tokenizer, *, anyres=False):
  """A llava-hf model around a language model, with the tower of an exported folder.

  Args:
    folder: of `cloc export --to hf-clip`, or hf-siglip for models with a MAP head.
    llm, tokenizer: a causal language model, taken over as it is; <image> is added to its vocabulary.
    anyres: LLaVA-NeXT (tiles) in place of LLaVA-1.5 (the image padded to a square).

  Returns:
    (model, processor).
  """
  config = transformers.AutoConfig.from_pretrained(folder)
  siglip = config.model_type == 'siglip'
  tower = (transformers.SiglipVisionModel if siglip else transformers.CLIPVisionModel).from_pretrained(
      folder, dtype=llm.dtype)
  if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
  tokenizer.add_tokens([IMAGE], special_tokens=True)
  if len(tokenizer) > llm.get_input_embeddings().num_embeddings:
    llm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
  size, patch = tower.config.image_size, tower.config.patch_size
  strategy = 'full' if siglip else 'default'  # 'default' leaves the class token out; SigLIP has none
  options = dict(vision_config=tower.config, text_config=llm.config, vision_feature_select_strategy=strategy,
                 image_token_index=tokenizer.convert_tokens_to_ids(IMAGE), image_seq_length=(size // patch)**2,
                 tie_word_embeddings=bool(getattr(llm.config, 'tie_word_embeddings', False)))
  grids = [[size * rows, size * columns] for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
  llava_config = (transformers.LlavaNextConfig(image_grid_pinpoints=grids, **options) if anyres
                  else transformers.LlavaConfig(**options))
  make = transformers.LlavaNextForConditionalGeneration if anyres else transformers.LlavaForConditionalGeneration
  with torch.device('meta'):  # no second copy of the language model, not even for a moment
    model = make(llava_config)
  model.model.vision_tower, model.model.language_model = tower, llm.base_model
  model.lm_head = llm.get_output_embeddings()
  model.model.multi_modal_projector = LlavaMultiModalProjector(llava_config).to(llm.dtype)
  if anyres:
    width = llm.config.hidden_size
    model.model.image_newline = nn.Parameter((torch.randn(width) / math.sqrt(width)).to(llm.dtype))
  model.generation_config = llm.generation_config
  check_tower(model, folder)
  image_processor = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)  # it pads
  if anyres:
    image_processor = transformers.LlavaNextImageProcessor(
        size={'shortest_edge': size}, crop_size={'height': size, 'width': size}, image_grid_pinpoints=grids,
        image_mean=image_processor.image_mean, image_std=image_processor.image_std)
  make = transformers.LlavaNextProcessor if anyres else transformers.LlavaProcessor
  return model, make(image_processor, tokenizer, patch_size=patch, vision_feature_select_strategy=strategy,
                     image_token=IMAGE, num_additional_image_tokens=0 if siglip else 1)


def check_tower(model, folder):
  """Compares every parameter of the model's tower with the folder's file, bit by bit. Returns their number.

  Raises:
    ValueError: naming the first that is missing or different.
  """
  from safetensors import safe_open
  path, tower, count = pathlib.Path(folder) / 'model.safetensors', model.model.vision_tower.state_dict(), 0
  with safe_open(path, 'pt') as file:
    stored = {name.removeprefix('vision_model.'): name for name in file.keys()}
    for name, value in tower.items():
      key = stored.get(name.removeprefix('vision_model.'))
      if key is None:
        if name.endswith('position_ids'):
          continue
        raise ValueError(f'{path}: no {name}, which the tower has')
      if not torch.equal(file.get_tensor(key).to(value.dtype), value.cpu()):
        raise ValueError(f'{path}: {key} is not what the tower has')
      count += 1
  return count


def encode(processor, images, prompts, answers=None):
  """Images, prompts and the answers to learn → a model's inputs, on the CPU; answers are followed by the end mark.

  With answers the rows are padded on the right and there are labels, -100 for all but the answers; without, they are
  padded on the left, for generation.
  """
  made = processor(images=images, text=prompts, padding=True, return_tensors='pt')
  rows = [ids[mask.bool()].tolist() for ids, mask in zip(made['input_ids'], made['attention_mask'])]
  inputs = {name: made[name] for name in ('pixel_values', 'image_sizes') if name in made}  # no model asks for more
  tokenizer, ends = processor.tokenizer, [[]] * len(rows)
  if answers is not None:
    ends = [tokenizer(a, add_special_tokens=False)['input_ids'] + [tokenizer.eos_token_id] for a in answers]
  length = max(len(row) + len(end) for row, end in zip(rows, ends))
  ids = torch.full((len(rows), length), tokenizer.pad_token_id)
  attention, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
  for i, (row, end) in enumerate(zip(rows, ends)):
    own = torch.tensor(row + end)
    where = slice(0, len(own)) if answers is not None else slice(length - len(own), length)
    ids[i, where], attention[i, where] = own, 1
    labels[i, len(row):len(own)] = own[len(row):]
  inputs |= dict(input_ids=ids, attention_mask=attention) | ({} if answers is None else dict(labels=labels))
  return inputs


def parts(model):
  """What --train can name."""
  inner = model.model
  found = {'projector': [*inner.multi_modal_projector.parameters()], 'tower': [*inner.vision_tower.parameters()],
           'llm': [*inner.language_model.parameters(), *model.lm_head.parameters()]}
  if hasattr(inner, 'image_newline'):
    found['projector'].append(inner.image_newline)
  return {name: list(dict.fromkeys(own)) for name, own in found.items()}  # tied embeddings are there twice


def train(model, batches, *, parameters, learning_rate, say=print):
  """Trains some parameters of a model that returns a loss; all others stay as they are. Returns the losses.

  What is trained is kept in float32 whatever the rest is in, and computes in the model's own precision.

  Args:
    batches: a list of functions that give a step's inputs. learning_rate: the peak; 3% warm-up, then cosine.
  """
  dtype, device = next(model.parameters()).dtype, next(model.parameters()).device
  model.train().requires_grad_(False)
  for p in parameters:
    p.data = p.data.float()
    p.requires_grad_(True)
  optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
  steps = len(batches)
  warm = max(1, round(0.03 * steps))
  schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
      (step + 1) / warm, 0.5 * (1 + math.cos(math.pi * max(0, step - warm) / max(1, steps - warm)))))
  losses, start, shown = [], time.monotonic(), time.monotonic()
  for step, batch in enumerate(batches, 1):
    inputs = {name: x.to(device) for name, x in batch().items()}
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
      loss = model(**inputs).loss
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad(set_to_none=True)
    losses.append(loss.item())
    if not math.isfinite(losses[-1]):
      raise ValueError(f'step {step}: the loss is {losses[-1]}')
    now = time.monotonic()
    if step in (1, steps) or now - shown > 5:
      rate, shown = step / (now - start), now
      say(f'step {step}/{steps}  loss {losses[-1]:.3f}  {rate:.2f} steps/s  {(steps - step) / rate:.0f} s left')
  for p in parameters:
    p.data = p.data.to(dtype)
  model.eval()
  return losses


@torch.inference_mode()
def answer(model, processor, inputs, *, length=40, banned=()):
  """Greedy answers to `encode`d prompts, as texts. banned: ids never to be said."""
  device = next(model.parameters()).device
  inputs = {name: x.to(device) for name, x in inputs.items()}
  tokenizer = processor.tokenizer
  ids = model.generate(**inputs, do_sample=False, max_new_tokens=length, pad_token_id=tokenizer.pad_token_id,
                       suppress_tokens=[tokenizer.convert_tokens_to_ids(IMAGE), *banned])
  new = ids[:, inputs['input_ids'].shape[1]:]
  return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def arguments(description, *, tower_required=True):
  """The flags that both scripts have."""
  parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--tower', required=tower_required, help='folder of `cloc export --to hf-clip`, or hf-siglip')
  parser.add_argument('--llm', help='path or hub name of a causal language model; a tiny random one without it')
  parser.add_argument('--images', help='folder of images; without it, scenes are drawn')
  parser.add_argument('--annotations', nargs='+', default=[], help="COCO's .json files, or .jsonl rows")
  parser.add_argument('--steps', type=int, default=50)
  parser.add_argument('--batch', type=int, default=8)
  parser.add_argument('--learning-rate', type=float, default=1e-3,
                      help='1e-3 for projectors alone, 2e-5 with a real LLM')
  parser.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16'))
  parser.add_argument('--device', default='cpu')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--out', help='folder to save the result in')
  return parser


def data(args, parser):
  """The pictures that the flags name."""
  if bool(args.images) != bool(args.annotations):
    parser.error('--images and --annotations come together')
  if args.out and pathlib.Path(args.out).exists():
    parser.error(f'--out {args.out} is there already')
  return pictures_lib.read(args.images, args.annotations) if args.images else pictures_lib.draw(200, seed=args.seed)


def main(argv=None):
  parser = arguments(__doc__)
  parser.add_argument('--anyres', action='store_true', help="LLaVA-NeXT's tiling")
  parser.add_argument('--train', nargs='+', default=['projector'], choices=('projector', 'tower', 'llm'))
  args = parser.parse_args(argv)
  pictures = [p for p in data(args, parser) if p.captions]
  if not pictures:
    parser.error(f'{args.annotations}: no captions')
  llm, tokenizer = language_model(args.llm, texts=[c for p in pictures for c in p.captions],
                                  dtype=getattr(torch, args.dtype), seed=args.seed)
  model, processor = build(args.tower, llm, tokenizer, anyres=args.anyres)
  print(f'{check_tower(model, args.tower)} parameters of the tower are those of {args.tower}')
  model.to(args.device)
  rng = random.Random(args.seed)

  def batch():
    chosen = [rng.choice(pictures) for _ in range(args.batch)]
    return encode(processor, [p.load() for p in chosen], [PROMPT] * len(chosen),
                  [rng.choice(p.captions) for p in chosen])

  trained = [p for name in args.train for p in parts(model)[name]]
  losses = train(model, [batch] * args.steps, parameters=trained, learning_rate=args.learning_rate)
  few = max(1, len(losses) // 5)
  print(f'loss {sum(losses[:few]) / few:.3f} (first {few} steps) → {sum(losses[-few:]) / few:.3f} (last {few})')
  shown = pictures[:3]
  inputs = encode(processor, [p.load() for p in shown], [PROMPT] * len(shown))
  for picture, text in zip(shown, answer(model, processor, inputs)):
    name = picture.image if isinstance(picture.image, pathlib.Path) else 'drawn'
    print(f'{name}: {text!r}; learnt: {picture.captions}')
  if args.out:
    model.save_pretrained(args.out)
    processor.save_pretrained(args.out)
    print(f'saved in {args.out}')
  return losses


if __name__ == '__main__':
  main()
