"""The evaluation as a whole: the same figures on any number of devices, and by every way to embed a region."""
import json
import pathlib

import jax
import numpy as np
import pytest
import tiny_experiment as tiny
from PIL import Image

from cloc_jax import encoders, evaluate, evaluators, sharding
from cloc_jax.evaluators import EncoderFns


@pytest.fixture(autouse=True, scope='module')
def compiled_once(base):
  with tiny.compiled_once(base):
    yield


def figures(run, *, devices=None, how=None, batch_size=7):
  mesh = None if devices is None else sharding.make_mesh(devices=jax.devices()[:devices])
  encoder = encoders.with_regions(encoders.load(str(run.workdir), mesh=mesh), how)
  return evaluate.run_encoder(encoder, path=run.data, split='val', batch_size=batch_size)


@pytest.fixture(name='alone', scope='module')
def alone_fixture(reference):
  return figures(reference)


@pytest.mark.slow
def test_one_device_and_four_give_the_same_figures(reference, alone):
  want, predictions = alone
  # Seven images do not divide over four devices: batches are of eight, the last one half empty.
  got, split = figures(reference, devices=4)
  assert got.metrics == pytest.approx(want.metrics, abs=1e-6) and got.skipped == want.skipped
  for name in ('z_image', 'z_caption', 'z_region', 'z_region_text', 'pred_boxes', 'pred_scores', 'points'):
    assert getattr(split, name) == pytest.approx(getattr(predictions, name), abs=2e-5), name


@pytest.mark.slow
def test_a_batch_is_split_over_the_devices(reference):
  encoder = encoders.load(str(reference.workdir), mesh=sharding.make_mesh(devices=jax.devices()[:4]))
  assert encoder.devices == 4
  handle = encoder.fns.encode_image(np.zeros((8, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, 3), np.uint8))
  assert {s.data.shape[0] for s in handle.tokens.addressable_shards} == {2}


@pytest.mark.slow
def test_every_way_to_embed_a_region_leaves_the_image_figures_alone(reference, alone):
  want, _ = alone
  seen = []
  for how in ('prompter', 'roi', 'mask-pool'):
    got, _ = figures(reference, how=how)
    same = [k for k in want.metrics if k.split('/')[0] in ('image_text_retrieval', 'grounding', 'pointing_game')]
    assert {k: got.metrics[k] for k in same} == pytest.approx({k: want.metrics[k] for k in same})
    assert got.metrics.keys() == want.metrics.keys()
    seen.append(got.metrics['region_recognition/ap_gt'])
  assert seen[0] == pytest.approx(want.metrics['region_recognition/ap_gt']) and len(set(seen)) == 3


def color_encoder():
  """Embeds an image by its mean colour, and a text by the colour that it ends in."""
  colors = {'red': 0, 'green': 1, 'blue': 2}
  unit = lambda z: z / np.linalg.norm(z, axis=-1, keepdims=True)
  encode_text = lambda texts, *, region: np.eye(3, dtype=np.float32)[[colors[t.strip('.').split()[-1]] for t in texts]]
  fns = EncoderFns(
      encode_image=lambda images: images.astype(np.float32).mean((1, 2)) + 1, image_embedding=unit, embed_regions=None,
      encode_text=encode_text, ground=None)
  return encoders.Encoder(fns=fns, image_size=8, pad='center', info={'encoder': 'hf:x/colors'})


def test_an_image_folder_is_classified_by_the_names_and_templates_of_a_file(tmp_path):
  root = tmp_path / 'images'
  painted = {'r': [(250, 0, 0)] * 3, 'g': [(0, 250, 0)], 'b': [(0, 0, 250), (0, 250, 0)]}
  for folder, images in painted.items():
    (root / folder).mkdir(parents=True)
    for i, color in enumerate(images):
      Image.new('RGB', (8, 8), color).save(root / folder / f'{i}.png')
  classes = tmp_path / 'classes.json'
  classes.write_text(json.dumps({'classes': {'r': 'red', 'g': 'green', 'b': 'blue'}, 'templates': ['a {}', 'the {}']}))
  done = []
  got, about, classified = evaluate.run_imagefolder(color_encoder(), path=root, classes=classes, batch_size=4,
                                                    progress=done.append)
  assert got.metrics['zeroshot/top1'] == pytest.approx(5 / 6) and got.metrics['zeroshot/macc'] == pytest.approx(2.5 / 3)
  assert (got.metrics['zeroshot/images'], got.metrics['zeroshot/classes']) == (6, 3)
  assert about['per_class'] == {'red': 1, 'green': 1, 'blue': 0.5} and about['templates'] == ['a {}', 'the {}']
  assert [pathlib.Path(p).parent.name for p in classified.images] == ['r', 'r', 'r', 'g', 'b', 'b']
  assert classified.rank.tolist() == [0, 0, 0, 0, 0, 2], 'green is taken for green, and red ties with blue'
  assert done == [4, 6] and got.protocols == {'zeroshot': 'zeroshot@1'}


def test_the_verb_writes_the_figures_of_an_image_folder(tmp_path, monkeypatch, capsys):
  from cloc_jax import cli
  (tmp_path / 'images' / 'red').mkdir(parents=True)
  Image.new('RGB', (8, 8), (250, 0, 0)).save(tmp_path / 'images' / 'red' / '0.png')
  monkeypatch.setattr(encoders, 'load', lambda spec, **options: color_encoder())
  argv = ['eval', '--encoder', 'hf:x/colors', '--imagefolder', str(tmp_path / 'images')]
  monkeypatch.chdir(tmp_path)
  assert cli.main(argv) == 0
  assert '| zero-shot classification, top-1 ' in capsys.readouterr().out
  got = json.loads((tmp_path / 'evals' / 'x-colors-images' / 'images.json').read_text())
  assert got['metrics']['zeroshot/top1'] == 1 and got['per_class'] == {'red': 1} and got['encoder'] == 'hf:x/colors'
  assert cli.main([*argv, '--split', 'val']) == 2
  assert '--split does not apply to --imagefolder' in capsys.readouterr().err


def test_several_image_folders_in_one_command(tmp_path, monkeypatch, capsys):
  """Folders of one name keep apart, each with its own classes, and stand side by side."""
  from cloc_jax import cli
  colors = {'red': (250, 0, 0), 'green': (0, 250, 0), 'blue': (0, 0, 250)}
  for folder, images in {'a/val': ('red', 'green'), 'b/val': ('blue', 'blue')}.items():
    for number, (name, painted) in enumerate(zip(('red', 'blue'), images)):
      (tmp_path / folder / name).mkdir(parents=True)
      Image.new('RGB', (8, 8), colors[painted]).save(tmp_path / folder / name / f'{number}.png')
  monkeypatch.setattr(encoders, 'load', lambda spec, **options: color_encoder())
  monkeypatch.chdir(tmp_path)
  argv = ['eval', '--encoder', 'hf:x/colors', '--imagefolder', 'a/val', '--imagefolder', 'b/val']
  assert cli.main([*argv, '--report', 'both.html', '--report', 'both.md']) == 0
  head, rule, row, *_ = [line.split('|') for line in capsys.readouterr().out.splitlines()]
  assert [cell.strip() for cell in head[2:4]] == ['a-val', 'b-val'] and [c.strip() for c in row[2:4]] == ['50.0', '50.0']
  for name in ('a-val', 'b-val'):
    got = json.loads((tmp_path / 'evals' / f'x-colors-{name}' / f'{name}.json').read_text())
    assert got['data'] == str(tmp_path / name.replace('-', '/')) and got['metrics']['zeroshot/images'] == 2
  page = (tmp_path / 'both.html').read_text()
  assert 'a-val' in page and 'b-val' in page and page.count('data:image') >= 4 and 'b-val' in (tmp_path / 'both.md').read_text()
  (tmp_path / 'c.json').write_text(json.dumps({'classes': {'red': 'blue', 'blue': 'red'}}))
  (tmp_path / 'd.json').write_text(json.dumps({'classes': {'red': 'red', 'blue': 'blue'}}))
  assert cli.main([*argv, '--classes', 'c.json', '--classes', 'd.json', '--out', 'here']) == 0
  assert [json.loads((tmp_path / 'here' / f'{name}.json').read_text())['metrics']['zeroshot/top1']
          for name in ('a-val', 'b-val')] == [0.0, 0.5]
  for more, said in ((['--classes', 'c.json'], 'one for each of 2 image folders, got 1'),
                     (['--task', 'imagenet'], 'are of one --imagefolder'),
                     (['--imagefolder', 'b/../a/val'], 'a folder is there twice'),
                     (['--imagefolder', 'c/val', '--out', 'there'], 'c/val')):
    assert cli.main([*argv, *more]) == 2 and said in capsys.readouterr().err
  assert not (tmp_path / 'there').exists()  # a wrong folder is named before the others are evaluated


def test_the_pool_of_a_retrieval_stands_beside_its_figures():
  # (Training keeps its metrics as floats.)
  metrics = {'region_retrieval/r2t_r1': 0.125, 'region_retrieval/t2r_distinct_r10': 0.5, 'region_retrieval/pool': 12345,
             'region_retrieval/distinct_texts': 678.0, 'image_text_retrieval/i2t_r1': 0.25,
             'image_text_retrieval/t2i_r1': 0.75, 'image_text_retrieval/images': 1000,
             'image_text_retrieval/captions': 5000, 'region_recognition/top1': 0.5}
  lost = evaluators.Coverage(images=998, of_images=1000)
  cells = [line.split('|')[2].strip() for line in evaluate.table({'val': metrics}, {'val': lost}).splitlines()[2:]]
  assert cells == ['50.0 (998 of 1,000 images)', '12.5 (998 of 1,000 images) among 678 texts',
                   '50.0 (998 of 1,000 images) among 12,345 boxes', '25.0 (998 of 1,000 images) among 5,000 captions',
                   '75.0 (998 of 1,000 images) among 1,000 images']
