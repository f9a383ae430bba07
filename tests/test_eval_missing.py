"""Images that cannot be read: an error that names them, or counted beside every figure."""
import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from cloc_jax import encoders, evaluate, evaluators
from cloc_jax.data import schema, sources, transforms
from cloc_jax.evaluators import EncoderFns, coverage
from data.painted_pictures import COLORS, painted_example

EYE = np.eye(8, dtype=np.float32)


def encoder():
  """Embeds a region by its brightest colour, and a text by the colour that it names."""
  names = list(COLORS)
  number = lambda text: names.index(text) if text in names else 7
  fns = EncoderFns(
      encode_image=lambda images: images, image_embedding=lambda images: EYE[np.arange(len(images)) % 8],
      embed_regions=lambda images, boxes: EYE[np.zeros(boxes.shape[:2], int)],
      encode_text=lambda texts, *, region: EYE[[number(t) for t in texts]], ground=None)
  return encoders.Encoder(fns=fns, image_size=16, pad='center', info={'encoder': 'hf:x/colors', 'region_branch': 'x'})


def write(path, examples, extra=None):
  meta = schema.DatasetMeta(name='painted', categories=tuple(COLORS), extra=extra or {})
  schema.write_dataset(path, meta=meta, splits={'val': examples})
  return path


@pytest.fixture(name='damaged')
def damaged_fixture(tmp_path):
  """Seven pictures; of the third and the last the image is cut off."""
  examples = [painted_example(i) for i in range(7)]
  for i in (2, 6):
    examples[i] = dataclasses.replace(examples[i], image=examples[i].image[:40])
  return write(tmp_path / 'damaged', examples), examples


def test_an_unreadable_image_stops_the_evaluation_and_is_named(damaged):
  with pytest.raises(transforms.ImageError, match="'picture-2'.*--allow-missing"):
    evaluate.run_encoder(encoder(), path=damaged[0], split='val', batch_size=3)


def test_regions_without_words_are_counted_and_a_category_is_enough_for_recognition(tmp_path, caplog):
  whole = painted_example(0, regions=6)
  first, *_ = colored = whole.regions
  bare = dataclasses.replace(colored[1], caption=' ')  # its category stays
  odd = (dataclasses.replace(colored[2], caption='', category=''), dataclasses.replace(colored[3], box=(.3, .2, .3, .8)))
  path = write(tmp_path / 'bare', [dataclasses.replace(whole, regions=(first, bare, *odd, *colored[4:]))])
  got, predictions = evaluate.run_encoder(encoder(), path=path, split='val', batch_size=3)
  assert got.metrics['region_recognition/boxes'] == 4 and got.metrics['region_retrieval/pool'] == 3
  assert predictions.region_captions[1] == '' and predictions.categories[1] == bare.category
  assert got.coverage.unusable == 2 and got.coverage.complete and got.coverage.of_regions == 4
  assert got.coverage.left_out == ('2 regions without an area or without words',)
  assert '2 regions have no area, or no words' in caplog.text


def test_figures_are_those_of_the_sound_images_and_say_so(damaged, tmp_path):
  path, examples = damaged
  got, predictions = evaluate.run_encoder(encoder(), path=path, split='val', batch_size=3, allow_missing=True)
  sound = [e for i, e in enumerate(examples) if i not in (2, 6)]
  want, _ = evaluate.run_encoder(encoder(), path=write(tmp_path / 'sound', sound), split='val', batch_size=3)
  assert predictions.image_ids == tuple(e.image_id for e in sound)
  assert got.metrics['region_recognition/top1'] == want.metrics['region_recognition/top1'] > 0
  regions, every = (sum(len(e.regions) for e in some) for some in (sound, examples))
  c = got.coverage
  assert (c.images, c.of_images, c.regions, c.of_regions) == (5, 7, regions, every)
  assert [why.split("'")[1] for why in c.unreadable] == ['picture-2', 'picture-6'] and want.coverage.complete
  text = evaluate.table({'val': got.metrics}, {'val': c})
  rows = [line for line in text.splitlines()[2:]]
  assert rows and all(f'({regions} of {every} regions)' in r or '(5 of 7 images)' in r for r in rows)
  assert '(5 of 7 images)' in next(r for r in rows if 'image → text' in r)
  assert '(' not in ''.join(evaluate.table({'val': want.metrics}, {'val': want.coverage}).splitlines()[2:])
  back = json.loads(evaluate.write(got, tmp_path / 'val.json').read_text())
  assert back['coverage'] == {'images': 5, 'of_images': 7, 'regions': regions, 'of_regions': every,
                              'unreadable': list(c.unreadable), 'unusable': 0}


def test_a_record_that_cannot_be_read_counts_as_an_image(tmp_path, monkeypatch):
  path = write(tmp_path / 'set', [painted_example(i) for i in range(3)])
  read = sources.RecordSource.__getitem__

  def broken(self, index):
    if int(index) == 1:
      raise sources.RecordError('record 1: torn')
    return read(self, index)

  monkeypatch.setattr(sources.RecordSource, '__getitem__', broken)
  with pytest.raises(sources.RecordError, match='torn'):
    evaluate.run_encoder(encoder(), path=path, split='val')
  got, _ = evaluate.run_encoder(encoder(), path=path, split='val', allow_missing=True)
  assert (got.coverage.images, got.coverage.of_images, got.coverage.unreadable) == (2, 3, ('record 1: torn',))
  monkeypatch.setattr(sources.RecordSource, '__getitem__', lambda self, i: broken(self, 1))
  with pytest.raises(ValueError, match=r'no valid image \(3 masked\)'):
    evaluate.run_encoder(encoder(), path=path, split='val', allow_missing=True)


def test_of_files_read_as_they_are_all_missing_regions_are_known(tmp_path):
  """One image is not there, one is empty, one ends early."""
  examples, rows = [painted_example(i) for i in range(5)], []
  for i, e in enumerate(examples):
    content = {1: None, 2: b'', 3: e.image[:40]}.get(i, e.image)
    if content is not None:
      (tmp_path / f'{i}.png').write_bytes(content)
    rows.append({'image': f'{i}.png', 'image_id': e.image_id, 'captions': e.captions,
                 'regions': [{'box': r.box, 'caption': r.caption, 'category': r.category} for r in e.regions]})
  (tmp_path / 'val.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  got, _ = evaluate.run_encoder(encoder(), path=f'jsonl:{tmp_path}/val.jsonl,split=val,allow_missing=true', split='val',
                                allow_missing=True)
  c = got.coverage
  assert (c.images, c.of_images) == (2, 5) and len(c.unreadable) == 2
  assert c.regions == sum(len(examples[i].regions) for i in (0, 4)) > 0
  assert c.of_regions == sum(len(e.regions) for e in examples)


def test_what_an_import_left_out_is_missing_too(tmp_path):
  counts = {'val': {'images': {'kept': 2, 'dropped': {
      'missing': {'count': 3, 'examples': []}, 'unreadable': {'count': 1, 'examples': []},
      'listed twice': {'count': 9, 'examples': []}}},
      'boxes': {'dropped': {'image lost': {'count': 5, 'examples': []}, 'crowd': {'count': 8, 'examples': []}}}}}
  examples = [painted_example(i) for i in range(2)]
  path = write(tmp_path / 'set', examples, extra={'counts': counts})
  got, _ = evaluate.run_encoder(encoder(), path=path, split='val')
  regions = sum(len(e.regions) for e in examples)
  assert got.coverage == evaluators.Coverage(images=2, of_images=6, regions=regions, of_regions=regions + 5)
  assert evaluate.run_encoder(encoder(), path=path, split='val', limit=1)[0].coverage.complete
  assert coverage.lost_in_import(schema.read_meta(path), 'other') == (0, 0)


def test_imagenet_from_the_command_line(tmp_path, monkeypatch, capsys):
  """Two classes of ImageNet-R, one file broken."""
  from cloc_jax import cli
  from cloc_jax.data import imagenet
  classes = imagenet.read_task('imagenet-r').classes
  for label, folder in enumerate(classes.folders):
    if label < 2:
      (tmp_path / 'r' / folder).mkdir(parents=True)
      Image.new('RGB', (8, 8), (250, 0, 0)).save(tmp_path / 'r' / folder / '0.jpg')
  (tmp_path / 'r' / classes.folders[1] / '1.jpg').write_bytes(b'no image')
  z = np.random.default_rng(0).normal(size=(200, 16)).astype(np.float32)
  z /= np.linalg.norm(z, axis=-1, keepdims=True)
  asked = []

  def encode_text(texts, *, region):
    first = len(asked)
    asked.extend(texts)
    return z[np.arange(first, len(asked)) // 80]  # a class's 80 texts stand beside each other

  fns = EncoderFns(encode_image=lambda images: images, image_embedding=lambda images: np.tile(z[0], (len(images), 1)),
                   embed_regions=None, encode_text=encode_text, ground=None)
  one = encoders.Encoder(fns=fns, image_size=8, pad='center', info={'encoder': 'hf:x/one'})
  monkeypatch.setattr(encoders, 'load', lambda spec, **options: one)
  monkeypatch.chdir(tmp_path)
  argv = ['eval', '--encoder', 'hf:x/one', '--imagefolder', 'r', '--task', 'imagenet-r']
  assert cli.main(argv) == 2 and '198 class folders are missing' in capsys.readouterr().err
  assert cli.main([*argv, '--allow-missing']) == 0
  said = capsys.readouterr()
  assert '50.0 (2 of 30,000 images)' in said.out and '1.jpg' in said.err
  got = json.loads((tmp_path / 'evals' / 'x-one-r' / 'r.json').read_text())
  assert got['metrics']['zeroshot/top1'] == 0.5 and got['protocols']['task'] == 'imagenet-r@1'
  assert got['per_class'] == {classes.names[0]: 1, classes.names[1]: 0}
  assert len(asked) == 200 * 80 and asked[0] == f'a bad photo of a {classes.names[0]}.'
  assert cli.main([*argv, '--classes', 'x.json']) == 2 and 'a task has its own' in capsys.readouterr().err
  assert cli.main(['eval', '--encoder', 'x', '--data', 'd', '--task', 'imagenet']) == 2
  assert '--task belongs to --imagefolder' in capsys.readouterr().err
