"""A Ferret of your own: ask about boxes and points, and get boxes as answers. Regions are read by CLOC's Prompter.

  cloc export --checkpoint RUN --to hf-clip --out tower
  cloc export --checkpoint RUN --to hf-cloc --out whole
  python cloc_ferret.py --tower tower --cloc whole --images train2017 --annotations instances_train2017.json --out mine
  python cloc_ferret.py … --llm lmsys/vicuna-7b-v1.5 --dtype bfloat16 --device cuda --learning-rate 2e-5
  python cloc_ferret.py --llava my_llava --cloc whole …          # what cloc_llava.py has saved

Two tasks, mixed: 'Name <region0>, <region1>.' → 'dog, red car', and 'Where is the dog?' → '[120, 45, 873, 999]'.
"""
import pathlib
import random
import re

import cloc_llava as llava_lib
import numpy as np
import PIL.ImageOps
import region_tokens as region_lib
import torch
from torch import nn
import transformers

ASK = f'USER: {llava_lib.IMAGE}\n{{}} ASSISTANT:'
MOST = 3  # regions that one prompt of the training names


class Ferret(nn.Module):
  """A llava-hf model (not AnyRes) whose prompts may name regions.

  llava, processor: of cloc_llava.build. cloc: a model of the hf-cloc folder of the same checkpoint, for its Prompter.
  count: how many regions a prompt may name.
  """

  def __init__(self, llava, processor, cloc, *, count=8):
    super().__init__()
    if llava.config.model_type != 'llava':
      raise ValueError(f'expected a LLaVA model with one canvas an image, got {llava.config.model_type!r}')
    vision, image = llava.config.vision_config, cloc.config.image
    ours, theirs = [(image['size'], image['patch'], image['width']),
                    (vision.image_size, vision.patch_size, vision.hidden_size)]
    if ours != theirs:
      raise ValueError(f'the Prompter is for a tower of (size, patch, width) {ours}, the model has {theirs}')
    self.llava, self.processor = llava, processor
    self.ids = region_lib.add_placeholders(processor.tokenizer, llava, count)
    reference = next(llava.model.multi_modal_projector.parameters())
    self.regions = region_lib.RegionTokens(cloc, llava.config.text_config.hidden_size).to(reference)

  def encode(self, images, prompts, regions, answers=None, *, coordinates=False):
    """PIL images, prompts with <image> and <region0> …, and for each a list of boxes and points in pixels → inputs.

    coordinates: whether each placeholder is preceded by its box as text, as in Ferret.
    """
    images = [PIL.ImageOps.exif_transpose(image) for image in images]
    for i, prompt in enumerate(prompts):
      beyond = [n for n in re.findall(r'<region(\d+)>', prompt) if int(n) >= len(self.ids)]
      if beyond:
        raise ValueError(f'prompt {i}: names <region{beyond[0]}>, but the last placeholder is '
                         f'<region{len(self.ids) - 1}>')
    canvas = [region_lib.to_canvas(own, image.size[::-1], self.processor.image_processor)
              for own, image in zip(regions, images, strict=True)]
    if coordinates:
      prompts = [region_lib.with_coordinates(p, own) for p, own in zip(prompts, canvas, strict=True)]
    boxes, mask = region_lib.pad(canvas)
    return llava_lib.encode(self.processor, images, prompts, answers) | dict(boxes=boxes, box_mask=mask)

  def embed(self, input_ids, pixel_values, boxes, box_mask):
    """The language model's input, (B, L, W): words, image tokens and region tokens, each in its place."""
    inner = self.llava.model
    embeds = inner.language_model.get_input_embeddings()(input_ids)
    selected, tokens = region_lib.tower_tokens(self.llava, pixel_values)
    image = inner.multi_modal_projector(selected)
    where = input_ids == self.llava.config.image_token_index
    if int(where.sum()) != image.shape[0] * image.shape[1]:
      raise ValueError(f'{image.shape[0]} images of {image.shape[1]} tokens, but {int(where.sum())} places in the '
                       'prompts')
    embeds = embeds.masked_scatter(where[..., None], image.to(embeds.dtype))
    return region_lib.place(embeds, input_ids, self.ids, self.regions(tokens, boxes), box_mask)

  def forward(self, input_ids, attention_mask, pixel_values, boxes, box_mask, labels=None):
    embeds = self.embed(input_ids, pixel_values, boxes, box_mask)
    return self.llava(inputs_embeds=embeds, attention_mask=attention_mask, labels=labels)

  def generate(self, input_ids, attention_mask, pixel_values, boxes, box_mask, **options):
    """As transformers' generate: the prompts' ids with the new ones behind them."""
    embeds = self.embed(input_ids, pixel_values, boxes, box_mask)
    new = self.llava.generate(inputs_embeds=embeds, attention_mask=attention_mask, **options)
    return torch.cat([input_ids, new], 1)

  def ask(self, images, questions, regions, *, length=40, coordinates=False):
    """Texts: 'What is <region0>?' with its boxes and points in pixels, image by image."""
    inputs = self.encode(images, [ASK.format(q) for q in questions], regions, coordinates=coordinates)
    return llava_lib.answer(self, self.processor, inputs, length=length, banned=self.ids)

  def parts(self):
    """What --train can name."""
    return llava_lib.parts(self.llava) | {'regions': [*self.regions.project.parameters()],
                                          'prompter': [*self.regions.prompter.parameters()]}

  def save(self, folder):
    """The llava-hf model and its processor in FOLDER, projection and Prompter in FOLDER/region_tokens.safetensors."""
    from safetensors.torch import save_file
    folder = pathlib.Path(folder)
    self.llava.save_pretrained(folder)
    self.processor.save_pretrained(folder)
    save_file({name: x.contiguous().cpu() for name, x in self.regions.state_dict().items()},
              folder / 'region_tokens.safetensors')


def load(folder, cloc, *, dtype=torch.float32, count=8):
  """What `save` or cloc_llava.py has written, with an hf-cloc folder's model for the Prompter's shapes → Ferret."""
  from safetensors.torch import load_file
  folder = pathlib.Path(folder)
  model = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype)
  made = Ferret(model, transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True), cloc, count=count)
  if (folder / 'region_tokens.safetensors').exists():
    made.regions.load_state_dict(load_file(folder / 'region_tokens.safetensors'))
  return made.eval()


def refer(picture, rng, count=None):
  """(question, answer, boxes as fractions): names of one to three of a picture's regions, in random order."""
  chosen = rng.sample(picture.regions, min(count or rng.randint(1, MOST), len(picture.regions)))
  names = ', '.join(region_lib.PLACEHOLDER.format(i) for i in range(len(chosen)))
  return f'Name {names}.', ', '.join(name for _, name in chosen), [box for box, _ in chosen]


def unique(picture):
  """The regions whose name no other region of the picture has: those that can be asked for."""
  names = [name for _, name in picture.regions]
  return [region for region in picture.regions if names.count(region[1]) == 1]


def pixels(boxes, image):
  return [[v * side for v, side in zip(box, image.size * 2)] for box in boxes]


def make_batch(ferret, pictures, rng, *, size, grounding=0.3, coordinates=False):
  """Inputs of a training step: `size` questions about random pictures, a share `grounding` of them for boxes."""
  images, prompts, regions, answers = [], [], [], []
  for _ in range(size):
    picture = rng.choice(pictures)
    image, wanted = picture.load(), unique(picture)
    if wanted and rng.random() < grounding:
      box, name = rng.choice(wanted)
      question, boxes = f'Where is the {name}?', []
      text = region_lib.box_to_text(
          region_lib.to_canvas(pixels([box], image), image.size[::-1], ferret.processor.image_processor)[0])
    else:
      question, text, boxes = refer(picture, rng)
    images.append(image)
    prompts.append(ASK.format(question))
    regions.append(pixels(boxes, image))
    answers.append(text)
  return ferret.encode(images, prompts, regions, answers, coordinates=coordinates)


def overlap(a, b):
  """IoU of two boxes."""
  w, h = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
  both = max(w, 0) * max(h, 0)
  area = lambda box: (box[2] - box[0]) * (box[3] - box[1])
  return both / max(area(a) + area(b) - both, 1e-9)


def evaluate(ferret, pictures, *, limit=50, batch=8, coordinates=False):
  """Asks of up to `limit` pictures the name of every region, and the box of every name that is unique in its picture.

  Returns {'name accuracy', 'box accuracy' (IoU at least 0.5), 'no box' (answers that are not one)}: (hits, of all).
  """
  names, where = [], []
  for picture in pictures[:limit]:
    names += [(picture, box, name) for box, name in picture.regions]
    where += [(picture, box, name) for box, name in unique(picture)]
  right, hits, lost = 0, 0, 0
  for part in (names[i:i + batch] for i in range(0, len(names), batch)):
    images = [picture.load() for picture, *_ in part]
    said = ferret.ask(images, ['Name <region0>.'] * len(part), [pixels([box], image) for (_, box, _), image in
                                                                zip(part, images)], coordinates=coordinates)
    right += sum(text == name for text, (*_, name) in zip(said, part))
  for part in (where[i:i + batch] for i in range(0, len(where), batch)):
    images = [picture.load() for picture, *_ in part]
    said = ferret.ask(images, [f'Where is the {name}?' for *_, name in part], [[]] * len(part))
    for text, (_, box, _), image in zip(said, part, images):
      try:
        found, = region_lib.boxes_from_text(text)
      except ValueError:
        lost += 1
        continue
      found = ferret.processor.image_processor.boxes_from_canvas(found, image.size[::-1])
      hits += overlap(found, np.array(pixels([box], image)[0])) >= 0.5
  return {'name accuracy': (right, len(names)), 'box accuracy': (hits, len(where)), 'no box': (lost, len(where))}


def main(argv=None):
  parser = llava_lib.arguments(__doc__, tower_required=False)
  parser.add_argument('--cloc', required=True, help='folder of `cloc export --to hf-cloc`, of the same checkpoint')
  parser.add_argument('--llava', help='folder that cloc_llava.py has saved, in place of --tower and --llm')
  parser.add_argument('--train', nargs='+', default=['projector', 'regions', 'llm'],
                      choices=('projector', 'regions', 'prompter', 'llm', 'tower'))
  parser.add_argument('--coordinates', action='store_true', help="boxes as text before the placeholders, as in Ferret")
  parser.add_argument('--grounding', type=float, default=0.3, help='share of questions for boxes')
  parser.add_argument('--limit', type=int, default=50, help='images of each kind to evaluate on')
  args = parser.parse_args(argv)
  if bool(args.tower) == bool(args.llava):
    parser.error('expected --tower or --llava')
  pictures = [p for p in llava_lib.data(args, parser) if p.regions]
  if len(pictures) < 2:
    parser.error(f'{args.annotations}: expected at least two images with boxes, got {len(pictures)}')
  held_out = max(1, len(pictures) // 10)
  learnt, held = pictures[:-held_out], pictures[-held_out:]
  dtype = getattr(torch, args.dtype)
  cloc = transformers.AutoModel.from_pretrained(args.cloc, trust_remote_code=True)
  if args.llava:
    ferret = load(args.llava, cloc, dtype=dtype)
  else:
    texts = [f'Name <. Where is the {name}? [{i}, {i + 1}]' for p in learnt for i, (_, name) in enumerate(p.regions)]
    llm, tokenizer = llava_lib.language_model(args.llm, texts=texts, dtype=dtype, seed=args.seed)
    ferret = Ferret(*llava_lib.build(args.tower, llm, tokenizer), cloc)
  ferret.to(args.device)
  rng = random.Random(args.seed)
  batch = lambda: make_batch(ferret, learnt, rng, size=args.batch, grounding=args.grounding,
                             coordinates=args.coordinates)
  trained = [p for name in args.train for p in ferret.parts()[name]]
  losses = llava_lib.train(ferret, [batch] * args.steps, parameters=trained, learning_rate=args.learning_rate)
  few = max(1, len(losses) // 5)
  print(f'loss {sum(losses[:few]) / few:.3f} (first {few} steps) → {sum(losses[-few:]) / few:.3f} (last {few})')
  for which, some in (('learnt', learnt), ('held out', held)):
    for name, (count, total) in evaluate(ferret, some, limit=args.limit, coordinates=args.coordinates).items():
      print(f'{which}: {name} {count}/{total}')
  image = held[0].load()
  question, right, boxes = refer(held[0], random.Random(0))
  print(f'{question} {ferret.ask([image], [question], [pixels(boxes, image)], coordinates=args.coordinates)[0]!r}; '
        f'right: {right!r}')
  if args.out:
    ferret.save(args.out)
    print(f'saved in {args.out}')
  return losses


if __name__ == '__main__':
  main()
