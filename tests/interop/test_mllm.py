"""docs/examples/mllm: LLaVA and LLaVA-NeXT with our tower, and a Ferret whose regions the Prompter reads."""
import json
import math
import pathlib
import re
import sys

import numpy as np
import PIL.Image
import pytest

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
pytest.importorskip('safetensors')

import tiny_checkpoint as tiny  # noqa: E402

from cloc_jax import export, inference  # noqa: E402
from cloc_jax.data import transforms  # noqa: E402
from cloc_jax.interop import exported, hf_cloc, hf_dual  # noqa: E402
from cloc_jax.models import vit  # noqa: E402

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / 'docs' / 'examples' / 'mllm'
sys.path.insert(0, str(EXAMPLES))
import cloc_ferret as ferret_lib  # noqa: E402
import cloc_llava as llava_lib  # noqa: E402
import pictures as pictures_lib  # noqa: E402
import region_tokens as region_lib  # noqa: E402

SIZE, PATCH, CELLS = 32, 8, 4


@pytest.fixture(name='sources', scope='module')
def sources_fixture(tmp_path_factory):
  """name → (what is exported, its folders by target)."""
  base, made = tmp_path_factory.mktemp('mllm'), {}
  for name, model, targets in (('clip', tiny.CLIP, ('clip', 'cloc')), ('siglip', tiny.SIGLIP, ('siglip',))):
    source = export.of_cloc(inference.load(tiny.write(base / name, model)))
    folders = {}
    for target in targets:
      folders[target] = base / f'{name}-{target}'
      folders[target].mkdir()
      if target == 'cloc':
        hf_cloc.write(source, folders[target])
      else:
        hf_dual.write(source, folders[target], family=target)
    made[name] = source, folders
  return made


@pytest.fixture(name='clip', scope='module')
def clip_fixture(sources):
  return sources['clip']


def photo(height, width, seed=0):
  rng = np.random.default_rng(seed)
  return PIL.Image.fromarray(rng.integers(0, 256, (height, width, 3)).astype(np.uint8))


def jax_hidden_states(source, pixel_values):
  """(B, 3, S, S) → (layers + 1, B, tokens, D), from our own tower."""
  tower = source.image.clone(parent=None)
  return np.asarray(vit.hidden_states(tower, source.params['img'], np.asarray(pixel_values).transpose(0, 2, 3, 1)))


def make_llava(folder, *, anyres=False, texts=()):
  with hf_cloc.quiet():
    return llava_lib.build(folder, *llava_lib.language_model(texts=texts), anyres=anyres)


def make_ferret(folders, texts=()):
  with hf_cloc.quiet():
    cloc = transformers.AutoModel.from_pretrained(folders['cloc'], trust_remote_code=True)
  return ferret_lib.Ferret(*make_llava(folders['clip'], texts=texts), cloc), cloc


@pytest.mark.parametrize('name', ['clip', 'siglip'])
def test_llava_sees_what_our_tower_sees(sources, name):
  source, folders = sources[name]
  model, processor = make_llava(folders[name])
  assert llava_lib.check_tower(model, folders[name]) == len(
      [k for k in model.model.vision_tower.state_dict() if not k.endswith('position_ids')])
  images = [photo(50, 40), photo(20, 31, 1)]
  inputs = llava_lib.encode(processor, images, [llava_lib.PROMPT] * 2)
  canvases = np.stack([transforms.prepare_image(np.asarray(image), image_size=SIZE)[0] for image in images])
  np.testing.assert_allclose(inputs['pixel_values'], exported.pixel_values(source, canvases), atol=1e-6)
  assert (inputs['input_ids'] == model.config.image_token_index).sum(1).tolist() == [CELLS**2] * 2
  taken = []
  model.model.multi_modal_projector.register_forward_pre_hook(lambda module, args: taken.append(args[0]))
  with torch.inference_mode():
    model(**inputs)
    selected, tokens = region_lib.tower_tokens(model, inputs['pixel_values'])
  class_token = int(name == 'clip')
  want = jax_hidden_states(source, inputs['pixel_values'])[-2][:, class_token:]
  np.testing.assert_allclose(taken[0], want, atol=2e-5)
  np.testing.assert_array_equal(selected, taken[0])
  cloc_tokens = source.model.apply({'params': source.params}, canvases, method='encode_image').tokens
  np.testing.assert_allclose(tokens, cloc_tokens, atol=2e-5)
  assert np.abs(np.asarray(taken[0]) - np.asarray(tokens)).max() > 0.1, 'the Prompter is not to be given these'


def test_a_tower_that_is_not_the_folders_is_found(clip):
  model, _ = make_llava(clip[1]['clip'])
  tower = model.model.vision_tower
  weight = getattr(tower, 'vision_model', tower).post_layernorm.bias
  with torch.no_grad():
    weight[3] = torch.nextafter(weight[3], torch.tensor(9.0))
  with pytest.raises(ValueError, match='post_layernorm.bias is not what the tower has'):
    llava_lib.check_tower(model, clip[1]['clip'])


def test_llavas_own_loader_takes_the_folder(clip):
  """The calls of CLIPVisionTower in LLaVA 1.5's repository (clip_encoder.py, mm_utils.py), one by one."""
  source, folders = clip
  path = str(folders['clip'])
  config = transformers.CLIPVisionConfig.from_pretrained(path)
  assert (config.hidden_size, config.image_size // config.patch_size) == (16, CELLS)
  processor = transformers.CLIPImageProcessor.from_pretrained(path)
  with hf_cloc.quiet():
    tower = transformers.CLIPVisionModel.from_pretrained(path, device_map=None)
  tower.requires_grad_(False)
  assert processor.crop_size['height'] == SIZE and processor.size['shortest_edge'] == SIZE
  fill = tuple(int(v * 255) for v in processor.image_mean)  # image_aspect_ratio 'pad'
  square = PIL.Image.new('RGB', (50, 50), fill)
  square.paste(photo(30, 50), (0, 10))
  pixels = processor.preprocess(square, return_tensors='pt')['pixel_values'][0]
  assert pixels.shape == (3, SIZE, SIZE)
  out = tower(torch.stack([pixels, pixels.flip(2)]), output_hidden_states=True)
  features = out.hidden_states[-2][:, 1:]
  want = jax_hidden_states(source, torch.stack([pixels, pixels.flip(2)]))[-2][:, 1:]
  np.testing.assert_allclose(features, want, atol=2e-5)


def test_anyres_tiles_are_our_towers_tokens(clip):
  """Tile by tile, packed by a loop: the overview, then rows of the grid without its border, a mark behind each row."""
  source, folders = clip
  model, processor = make_llava(folders['clip'], anyres=True)
  model.model.multi_modal_projector = torch.nn.Identity()
  model.model.image_newline = torch.nn.Parameter(torch.full((16,), 7.0))
  sizes, grids = [(14, 64), (70, 64), (90, 20), (40, 40)], [(1, 2), (2, 2), (3, 1), (2, 2)]
  inputs = llava_lib.encode(processor, [photo(*size) for size in sizes], [llava_lib.PROMPT] * 4)
  with torch.inference_mode():
    found = model.model.get_image_features(inputs['pixel_values'], inputs['image_sizes'], return_dict=True)
  found = getattr(found, 'pooler_output', found)
  for i, ((height, width), (rows, columns)) in enumerate(zip(sizes, grids)):
    tiles = inputs['pixel_values'][i, :1 + rows * columns]
    tokens = jax_hidden_states(source, tiles)[-2][:, 1:]
    want, grid = [*tokens[0]], tokens[1:].reshape(rows, columns, CELLS, CELLS, 16)
    all_rows, all_columns = rows * CELLS, columns * CELLS
    if width / height > columns / rows:
      top, left = (all_rows - int(height * all_columns / width)) // 2, 0
    else:
      top, left = 0, (all_columns - int(width * all_rows / height)) // 2
    for y in range(top, all_rows - top):
      want += [grid[y // CELLS, x // CELLS, y % CELLS, x % CELLS] for x in range(left, all_columns - left)]
      want.append(np.full(16, 7.0))
    np.testing.assert_allclose(found[i], np.stack(want), atol=2e-5)
    assert len(want) == (inputs['input_ids'][i] == model.config.image_token_index).sum()


@pytest.mark.parametrize('anyres', [False, True])
def test_projector_alone_learns_captions_and_the_folder_loads(clip, tmp_path, coco_mini, capsys, anyres):
  out, captions = tmp_path / 'out', coco_mini / 'annotations' / 'captions_val2017.json'
  flags = ['--tower', str(clip[1]['clip']), '--steps', '24', '--batch', '4', '--out', str(out),
           '--learning-rate', '5e-3', *['--anyres'] * anyres]
  with hf_cloc.quiet():
    losses = llava_lib.main([*flags, '--images', str(coco_mini / 'val2017'), '--annotations', str(captions)])
  assert np.mean(losses[-5:]) < np.mean(losses[:3]) - 0.1
  shown = capsys.readouterr().out
  assert 'parameters of the tower are those of' in shown and 'learnt: ' in shown and 'step 24/24' in shown
  make = transformers.LlavaNextForConditionalGeneration if anyres else transformers.LlavaForConditionalGeneration
  with hf_cloc.quiet():
    model = make.from_pretrained(out).eval()
    processor = transformers.AutoProcessor.from_pretrained(out, trust_remote_code=True)
  learnt = pictures_lib.read(coco_mini / 'val2017', [captions], say=lambda line: None)
  fresh, _ = make_llava(clip[1]['clip'], anyres=anyres, texts=[c for p in learnt for c in p.captions])
  assert llava_lib.check_tower(model, clip[1]['clip'])
  moved = model.model.multi_modal_projector.linear_1.weight - fresh.model.multi_modal_projector.linear_1.weight
  assert moved.abs().max() > 1e-3
  assert torch.equal(model.model.language_model.layers[0].mlp.up_proj.weight,
                     fresh.model.language_model.layers[0].mlp.up_proj.weight)
  image = photo(40, 60)
  inputs = llava_lib.encode(processor, [image, photo(20, 20)], [llava_lib.PROMPT, f'{llava_lib.IMAGE}?'])
  alone = llava_lib.encode(processor, [image], [llava_lib.PROMPT])
  said = llava_lib.answer(model, processor, inputs, length=8)
  assert said[0] == llava_lib.answer(model, processor, alone, length=8)[0], 'padding changes nothing'


def test_bfloat16(clip):
  with hf_cloc.quiet():
    model, processor = llava_lib.build(clip[1]['clip'], *llava_lib.language_model(dtype=torch.bfloat16))
  batch = llava_lib.encode(processor, [photo(40, 30)], [llava_lib.PROMPT], ['a red circle'])
  losses = llava_lib.train(model, [lambda: batch] * 12, parameters=llava_lib.parts(model)['projector'],
                           learning_rate=1e-2, say=lambda line: None)
  assert losses[-1] < losses[0] - 0.2
  assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_boxes_keep_their_precision_where_the_rest_is_half(clip):
  ferret, _ = make_ferret(clip[1])
  tokens, boxes, said = torch.randn(1, CELLS**2, 16), torch.tensor([[[0.1, 0.2, 0.5, 0.6]]]), []
  ferret.regions.prompter.register_forward_hook(lambda module, args, out: said.append(out.detach()))
  ferret.regions(tokens, boxes)
  with torch.autocast('cpu', torch.bfloat16):
    assert ferret.regions(tokens, boxes).dtype == torch.bfloat16
  assert torch.equal(*said)


@pytest.mark.parametrize('part', ['projector', 'llm'])
def test_tied_embeddings(clip, tmp_path, part):
  llm, tokenizer = llava_lib.language_model()
  llm = transformers.LlamaForCausalLM(transformers.LlamaConfig(**llm.config.to_dict() | {'tie_word_embeddings': True}))
  with hf_cloc.quiet():
    model, processor = llava_lib.build(clip[1]['clip'], llm, tokenizer)
    batch = llava_lib.encode(processor, [photo(40, 30)], [llava_lib.PROMPT], ['a red circle'])
    llava_lib.train(model, [lambda: batch] * 2, parameters=llava_lib.parts(model)[part], learning_rate=1e-2,
                    say=lambda line: None)
    model.save_pretrained(tmp_path)
    again = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
  assert again.lm_head.weight is again.model.language_model.embed_tokens.weight
  with torch.inference_mode():
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits)


def test_what_the_ferret_is_given(clip):
  """Words and image tokens as llava-hf itself places them; at placeholders, what CLOC says of the box, projected."""
  ferret, cloc = make_ferret(clip[1])
  images = [photo(50, 40), photo(30, 60, 1)]
  prompts = [f'{llava_lib.IMAGE}\nIs <region1> left of <region0>?', f'What is <region0>? {llava_lib.IMAGE} <region0>']
  regions = [[[1, 2, 30, 40], [5, 5, 9, 30]], [[12, 20]]]
  inputs = ferret.encode(images, prompts, regions, ['no', 'a dog'])
  labels = inputs.pop('labels')
  assert inputs['box_mask'].tolist() == [[True, True], [True, False]]
  taken = []
  ferret.llava.model.language_model.register_forward_pre_hook(
      lambda module, args, kwargs: taken.append(kwargs['inputs_embeds']), with_kwargs=True)
  with torch.no_grad():
    ferret.llava(input_ids=inputs['input_ids'], pixel_values=inputs['pixel_values'],
                 attention_mask=inputs['attention_mask'])
    ferret(**inputs)
    z = cloc.get_region_features(cloc.get_image_tokens(inputs['pixel_values']), inputs['boxes'])
    want = ferret.regions.project(z * math.sqrt(z.shape[-1]))
  theirs, ours = taken
  ids = torch.tensor(ferret.ids)
  for row in range(2):
    for at, token in enumerate(inputs['input_ids'][row]):
      region = (ids == token).nonzero()
      expected = want[row, int(region)] if len(region) else theirs[row, at]
      np.testing.assert_allclose(ours[row, at], expected, atol=2e-5)
  tokenizer = ferret.processor.tokenizer
  assert [tokenizer.decode(row[row != -100]) for row in labels] == ['no</s>', 'a dog</s>']
  assert (want[0, 0] - want[0, 1]).abs().max() > 1e-3


def test_only_region_tokens_tell_which_of_two_things(clip):
  """Two things in an image, one question: without regions every answer is a coin toss, ln 2 nats."""
  pictures = pictures_lib.draw(12, size=SIZE)
  asked = [(p.load(), ferret_lib.pixels([box], p.load()), name.split()[0]) for p in pictures for box, name in p.regions]
  images, boxes, names = zip(*asked)
  question = 'Name <region0>.'
  last, said = {}, {}
  for blind in (False, True):
    ferret, _ = make_ferret(clip[1], texts=[f'Name <. {name}' for name in names])
    if blind:
      ferret.regions.register_forward_hook(lambda module, args, out: torch.zeros_like(out))
    batch = ferret.encode(images, [ferret_lib.ASK.format(question)] * len(names), boxes, names)
    trained = [p for name in ('projector', 'regions', 'prompter', 'llm') for p in ferret.parts()[name]]
    last[blind] = llava_lib.train(ferret, [lambda b=batch: b] * 120, parameters=trained, learning_rate=3e-3,
                                  say=lambda line: None)[-1]
    said[blind] = ferret.ask(images, [question] * len(names), boxes, length=4)
    if not blind:
      swapped = [boxes[i ^ 1] for i in range(len(boxes))]
      assert ferret.ask(images, [question] * len(names), swapped, length=4) == [names[i ^ 1] for i in range(len(names))]
      points = [[[(b[0][0] + b[0][2]) / 2, (b[0][1] + b[0][3]) / 2]] for b in boxes]
      right = sum(a == b for a, b in zip(ferret.ask(images, [question] * len(names), points, length=4), names))
      assert right > len(names) / 2, 'points, never trained on, do better than chance'
  floor = len(names) * math.log(2) / int((batch['labels'] != -100).sum())
  assert last[False] < 0.2 * floor and last[True] > floor - 1e-3
  assert said[False] == list(names) and sum(a == b for a, b in zip(said[True], names)) <= len(names) / 2


@pytest.mark.parametrize('unfrozen', [False, True])
def test_gradients_reach_the_prompter_when_it_is_unfrozen(clip, unfrozen):
  ferret, _ = make_ferret(clip[1])
  parts = ferret.parts()
  before = [p.detach().clone() for p in parts['prompter'] + parts['regions']]
  batch = ferret.encode([photo(30, 40)], [ferret_lib.ASK.format('Name <region0>.')], [[[2, 3, 20, 20]]], ['dog'])
  trained = parts['projector'] + parts['regions'] + (parts['prompter'] if unfrozen else [])
  llava_lib.train(ferret, [lambda: batch] * 2, parameters=trained, learning_rate=1e-2, say=lambda line: None)
  moved = [not torch.equal(a, b) for a, b in zip(before, parts['prompter'] + parts['regions'])]
  assert all(moved[len(parts['prompter']):])
  heard = [name for name, p in ferret.regions.prompter.named_parameters() if not name.startswith('text_embedding')]
  assert sum(moved[:len(parts['prompter'])]) == (len(heard) if unfrozen else 0)


def test_ferret_script_on_photos_saves_and_loads(clip, tmp_path, coco_mini, capsys):
  folders = clip[1]
  out = tmp_path / 'out'
  with hf_cloc.quiet():
    losses = ferret_lib.main([
        '--tower', str(folders['clip']), '--cloc', str(folders['cloc']), '--images', str(coco_mini / 'val2017'),
        '--annotations', str(coco_mini / 'annotations' / 'instances_val2017.json'), '--steps', '16', '--batch', '4',
        '--out', str(out), '--coordinates', '--train', 'projector', 'regions', 'prompter', 'llm', '--limit', '2'])
    cloc = transformers.AutoModel.from_pretrained(folders['cloc'], trust_remote_code=True)
    ferret = ferret_lib.load(out, cloc)
  assert np.mean(losses[-4:]) < losses[0] - 1
  shown = capsys.readouterr().out
  assert re.search(r'held out: name accuracy \d+/\d+\nheld out: box accuracy \d+/\d+\n', shown)
  stored = transformers.AutoModel.from_pretrained(folders['cloc'], trust_remote_code=True).prompter.box_embedding.weight
  assert not torch.equal(ferret.regions.prompter.box_embedding.weight, stored), 'the trained Prompter comes back'
  first, second = ferret.ask([photo(30, 40)] * 2, ['Name <region0>.', 'Where is the dog?'], [[[2, 3, 20, 20]], []])
  assert isinstance(first, str) and isinstance(second, str)


def test_places_and_their_errors():
  ids, tokens = [7, 8, 9], torch.arange(12.0).reshape(2, 3, 2)
  input_ids = torch.tensor([[1, 8, 7, 8], [2, 7, 1, 1]])
  mask = torch.tensor([[True, True, False], [True, False, False]])
  out = region_lib.place(torch.full((2, 4, 2), -1.0), input_ids, ids, tokens, mask)
  assert out.tolist() == [[[-1, -1], [2, 3], [0, 1], [2, 3]], [[-1, -1], [6, 7], [-1, -1], [-1, -1]]]
  with pytest.raises(ValueError, match='prompt 1: names <region0>, but has 0 regions'):
    region_lib.place(out, input_ids, ids, tokens, torch.tensor([[True, True, False], [False] * 3]))
  with pytest.raises(ValueError, match='prompt 1: region 1 is given, but no <region1> names it'):
    region_lib.place(out, input_ids, ids, tokens, torch.tensor([[True, True, False], [True, True, False]]))
  with pytest.raises(ValueError, match='3 regions of one image, but only 2 placeholders'):
    region_lib.place(out, input_ids, ids[:2], tokens, mask)
  plain = torch.ones(1, 2, 2)
  none = region_lib.place(plain, torch.ones(1, 2, dtype=torch.long), ids, tokens[:1, :0], torch.zeros(1, 0, dtype=bool))
  assert torch.equal(none, plain)


def test_boxes_and_points_on_the_canvas(clip):
  processor = transformers.AutoImageProcessor.from_pretrained(clip[1]['clip'], trust_remote_code=True)
  regions = [[0, 0, 40, 20], [20, 10], [-5, 5, 20, 99], [40, 0]]
  found = region_lib.to_canvas(regions, (20, 40), processor, point_side=0.25)
  np.testing.assert_allclose(found, [[0, 0.25, 1, 0.75], [0.375, 0.375, 0.625, 0.625], [0, 0.375, 0.5, 0.75],
                                     [0.875, 0.125, 1, 0.375]], atol=1e-6)
  for region, message in (([1, 2, 3], 'expected a box'), ([41, 3], 'is outside the image of 40×20 pixels'),
                          ([50, 0, 60, 9], 'no area inside the image'), ([1, math.nan], 'expected a box')):
    with pytest.raises(ValueError, match=f'region 1: .*{message}'):
      region_lib.to_canvas([[0, 0, 5, 5], region], (20, 40), processor)


def test_boxes_in_text():
  assert region_lib.box_to_text([0, 0.5, 0.2502, 1.0]) == '[0, 500, 250, 999]'
  boxes = np.sort(np.random.default_rng(0).random((200, 2, 2)), 1).reshape(-1, 4)
  text = ' and '.join(f'a dog {region_lib.box_to_text(box)}' for box in boxes)
  np.testing.assert_allclose(region_lib.boxes_from_text(text), boxes, atol=0.5 / 999 + 1e-9)
  assert region_lib.boxes_from_text('no box').shape == (0, 4)
  assert region_lib.with_coordinates('Is <region0> a <region1>?', [[0, 0, 1, 1], [0, 0, 0, 1]]) == \
      'Is [0, 0, 999, 999] <region0> a [0, 0, 0, 999] <region1>?'
  for wrong, message in (('[1, 2, 3]', 'expected 4 numbers, got 3'), ('[1, 2, 3, 1000]', '1000 is more than 999'),
                         ('[5, 2, 3, 4]', 'left ≤ right'), ('[1, 2, 3', 'not closed'),
                         ('[a, 2, 3, 4]', 'whole numbers'),
                         ('[0.1, 2, 3, 4]', 'whole numbers'), ('[]', 'whole numbers')):
    with pytest.raises(ValueError, match=message):
      region_lib.boxes_from_text(f'a dog [1, 2, 3, 4], a cat {wrong}')


def test_what_does_not_fit_is_named(sources, tmp_path):
  _, folders = sources['clip']
  ferret, cloc = make_ferret(folders)
  model, processor = make_llava(sources['siglip'][1]['siglip'])
  cloc.config.image['width'] = 24
  with pytest.raises(ValueError, match=r'tower of \(size, patch, width\) \(32, 8, 24\), the model has \(32, 8, 16\)'):
    ferret_lib.Ferret(model, processor, cloc)
  with pytest.raises(ValueError, match="got 'llava_next'"):
    ferret_lib.Ferret(*make_llava(folders['clip'], anyres=True), cloc)
  with pytest.raises(ValueError, match='prompt 1: names <region8>, but the last placeholder is <region7>'):
    ferret.encode([photo(9, 9)] * 2, ['<region0>', '<region8>'], [[[1, 1]], [[1, 1]]])
  cloc.config.region_encoder = 'roi_align'
  with pytest.raises(ValueError, match="a Prompter, this model has 'roi_align'"):
    region_lib.RegionTokens(cloc, 8)
  with pytest.raises(ValueError, match='1 images of 16 tokens, but 0 places in the prompts'):
    ferret(torch.ones(1, 3, dtype=torch.long), None, torch.zeros(1, 3, 32, 32), torch.zeros(1, 0, 4),
           torch.zeros(1, 0, dtype=torch.bool))


def test_annotations(tmp_path):
  photo(10, 20).save(tmp_path / 'a.png')
  rows = tmp_path / 'rows.jsonl'
  rows.write_text(json.dumps({'image': 'a.png', 'captions': ['x'], 'regions': [
      {'box': [0, 0, 0.5, 1], 'caption': 'dog'}, {'box': [0.5, 0, 0.5, 1], 'caption': 'line'}]}) + '\n')
  said = []
  found, = pictures_lib.read(tmp_path, [rows], say=said.append)
  assert found.captions == ['x'] and found.regions == [([0, 0, 0.5, 1], 'dog')] and found.load().size == (20, 10)
  assert said == ['1 images, 1 captions, 1 boxes, 1 boxes without area left out']
  coco = tmp_path / 'coco.json'
  coco.write_text(json.dumps(dict(
      images=[dict(id=1, file_name='a.png', width=20, height=10)], categories=[dict(id=5, name='cat')],
      annotations=[dict(id=1, image_id=1, category_id=5, bbox=[5, 0, 10, 5]),
                   dict(id=2, image_id=1, category_id=5, bbox=[0, 0, 1, 1], iscrowd=1)])))
  found, = pictures_lib.read(tmp_path, [rows, coco], say=said.append)
  assert found.regions[1] == ([0.25, 0, 0.75, 0.5], 'cat') and '1 crowds left out' in said[1]
  rows.write_text('{"image": "b.png", "caption": "x"}\n')
  with pytest.raises(FileNotFoundError, match='b.png: no such image'):
    pictures_lib.read(tmp_path, [rows])
  for line in ('{"caption": "x"}', '{"image": "a.png", "regions": [{"box": [0, 0, 5, 5], "caption": "dog"}]}', 'x'):
    rows.write_text('{"image": "a.png"}\n' + line + '\n')
    with pytest.raises(ValueError, match='rows.jsonl:2: expected'):
      pictures_lib.read(tmp_path, [rows])
  (tmp_path / 'a.png').write_bytes(b'no image')
  with pytest.raises(ValueError, match='a.png: not an image'):
    found.load()
