"""Karpathy's splits: dataset_coco.json and dataset_flickr30k.json, and retrieval by them.

Layout: github.com/karpathy/neuraltalk, imagernn/data_provider.py at 2c99eac; COCO's filepath and cocoid as in the file
of cs.stanford.edu/people/karpathy/deepimagesent.
"""
import json

import numpy as np
from painted_pictures import encode_png
import pytest

from cloc_jax import cli
from cloc_jax import evaluate
from cloc_jax import encoders
from cloc_jax.data import schema
from cloc_jax.data import sources
from cloc_jax.data.importers import engine
from cloc_jax.data.importers import karpathy
from cloc_jax.evaluators import EncoderFns


def entry(number, split, *, captions=5, coco=True, words='a photo'):
  sentences = [{'tokens': words.split(), 'raw': f'{words} {number} no. {j}.', 'imgid': number,
                'sentid': 10 * number + j} for j in range(captions)]
  found = {'sentids': [s['sentid'] for s in sentences], 'imgid': number, 'sentences': sentences, 'split': split}
  if not coco:
    return found | {'filename': f'{1000 + number}.jpg'}
  folder = 'train2014' if split == 'train' else 'val2014'
  return found | {'filepath': folder, 'filename': f'COCO_{folder}_{number:012}.jpg', 'cocoid': number}


@pytest.fixture(name='write')
def write_fixture(tmp_path):
  """write(entries, data set) → the JSON file; makes the images."""
  def write(entries, data_set='coco'):
    for item in entries:
      path = tmp_path / 'images' / item.get('filepath', '') / item['filename']
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(encode_png(np.full((20, 30, 3), 7 * item['imgid'], np.uint8)))
    file = tmp_path / f'dataset_{data_set}.json'
    file.write_text(json.dumps({'images': entries, 'dataset': data_set}))
    return file
  return write


def records(path, split):
  source = sources.open_source(path, split=split)
  return [source[i] for i in range(len(source))]


def test_splits_and_the_first_five_captions(write, tmp_path):
  file = write([entry(1, 'test', captions=7), entry(2, 'train'), entry(3, 'restval'), entry(4, 'test', captions=4),
                entry(5, 'val')])
  found = engine.run(karpathy.Karpathy(file, tmp_path / 'images'), out=tmp_path / 'out')
  assert list(found) == ['train', 'restval', 'val', 'test']
  first, second = records(tmp_path / 'out', 'test')
  assert (first.image_id, first.height, first.width, len(first.regions)) == ('1', 20, 30, 0)
  assert first.captions == tuple(f'a photo 1 no. {j}.' for j in range(5)) and len(second.captions) == 4
  assert len(records(tmp_path / 'out', 'train+restval')) == 2
  test = found['test']
  assert test.of('captions', 'dropped', 'beyond the first 5') == 2 and test.written('captions') == 9
  assert test.examples('images', 'noted', 'fewer than 5 captions') == ['image 4']
  assert test.examples('images', 'noted', 'not the published number') == ['test: 2 images; published: 5,000']
  assert schema.read_meta(tmp_path / 'out').extra['provenance'] == "Karpathy's splits of coco"
  every = engine.run(karpathy.Karpathy(file, tmp_path / 'images', wanted=('test',), captions_per_image=0),
                     out=tmp_path / 'every')
  assert list(every) == ['test'] and every['test'].written('captions') == 11


def test_a_blank_caption_is_none_of_the_five(write, tmp_path):
  item = entry(1, 'test', captions=6, coco=False)
  item['sentences'][0]['raw'] = ' '
  found = engine.run(karpathy.Karpathy(write([item], 'flickr30k'), tmp_path / 'images'), out=tmp_path / 'out')
  [got] = records(tmp_path / 'out', 'test')
  assert got.image_id == '1001' and got.captions == tuple(f'a photo 1 no. {j}.' for j in range(1, 6))
  assert found['test'].of('captions') == 6 and found['test'].of('captions', 'dropped', 'blank') == 1


def test_what_is_wrong_is_named(write, tmp_path, capsys):
  no_text = entry(2, 'test')
  del no_text['sentences'][3]['raw']
  cases = {
      r"images\[1\]: sentences\[3\]: no key 'raw'": [entry(1, 'test'), no_text],
      "image '1' was there before": [entry(1, 'test'), entry(1, 'val')],
      "no key 'split'": [{'filename': 'a.jpg', 'imgid': 1, 'sentences': []}]}
  for message, entries in cases.items():
    with pytest.raises(ValueError, match=message):
      engine.run(karpathy.Karpathy(write(entries), tmp_path / 'images'), out=tmp_path / 'out')
  file = write([entry(1, 'test'), entry(2, 'val')])
  argv = ['data', 'import', 'karpathy', '--annotations', str(file), '--images', str(tmp_path / 'images'), '--out',
          str(tmp_path / 'out'), '--workers', '0']
  assert cli.main([*argv, '--split', 'tset']) == 2
  assert "no images of split 'tset'; it has ['test', 'val']" in capsys.readouterr().err
  (tmp_path / 'images' / 'val2014' / 'COCO_val2014_000000000001.jpg').unlink()
  assert cli.main([*argv, '--split', 'test']) == 2 and '1 of 1 images are missing' in capsys.readouterr().err
  assert cli.main([*argv, '--split', 'val', '--overwrite']) == 0


def test_retrieval_by_the_protocol(write, tmp_path):
  """A model that tells images by their grey, and takes image 3's captions for image 2's: counted by hand."""
  write_at = write([entry(i, 'test', captions=6) for i in range(1, 5)])
  engine.run(karpathy.Karpathy(write_at, tmp_path / 'images'), out=tmp_path / 'out')
  eye = np.eye(8, dtype=np.float32)
  fns = EncoderFns(
      encode_image=lambda images: eye[np.asarray(images)[:, 8, 8, 0] // 7 % 8], image_embedding=lambda handle: handle,
      embed_regions=None, ground=None,
      encode_text=lambda texts, *, region: eye[[{3: 2}.get(int(t.split()[2]), int(t.split()[2])) for t in texts]])
  got, _ = evaluate.run_encoder(encoders.Encoder(fns=fns, image_size=16, pad='center', info={}), path=tmp_path / 'out',
                                split='test', batch_size=3)
  m = {name.partition('/')[2]: value for name, value in got.metrics.items() if name.startswith('image_text')}
  assert (m['images'], m['captions']) == (4, 20)
  # Image 2 has ten captions that are equally like it, five of them its own; image 3 has none: ties are wrong.
  assert m['i2t_r1'] == 0.5 and m['i2t_r10'] == 0.75
  assert m['t2i_r1'] == 0.75 and m['t2i_r5'] == 1.0


def test_the_photos_of_2017_are_found(coco_mini, tmp_path):
  """Karpathy's file speaks of 2014's names; the same photos are called otherwise in 2017's archives."""
  ids = sorted(int(path.stem) for path in (coco_mini / 'val2017').glob('*.jpg'))[:12]
  texts = {}
  for item in json.loads((coco_mini / 'annotations' / 'captions_val2017.json').read_text())['annotations']:
    texts.setdefault(item['image_id'], []).append(item['caption'])
  entries = [entry(i, 'test') for i in ids]
  for item in entries:
    item['sentences'] = [{'raw': text} for text in texts[item['cocoid']]]
  (tmp_path / 'dataset_coco.json').write_text(json.dumps({'images': entries, 'dataset': 'coco'}))
  argv = ['data', 'import', 'karpathy', '--annotations', str(tmp_path / 'dataset_coco.json'), '--images',
          str(coco_mini), '--split', 'test', '--out', str(tmp_path / 'out'), '--workers', '0']
  assert cli.main(argv) == 0
  got = records(tmp_path / 'out', 'test')
  assert [r.image_id for r in got] == [str(i) for i in ids]
  for record in got:
    assert record.image == (coco_mini / 'val2017' / f'{int(record.image_id):012}.jpg').read_bytes()
    assert record.captions == tuple(text.strip() for text in texts[int(record.image_id)][:5])
