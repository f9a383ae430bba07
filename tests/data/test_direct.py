"""Files read as they are are what an import of them gives: the same images, boxes, captions, categories and pixels."""
import base64
import gzip
import io
import json
import pathlib
import pickle
import tarfile

import numpy as np
from painted_pictures import painted_example
from painted_pictures import WordTokenizer
import pytest

from cloc_jax import cli
from cloc_jax.data import direct
from cloc_jax.data import direct_formats
from cloc_jax.data import eval_pipeline
from cloc_jax.data import pipeline
from cloc_jax.data import scan
from cloc_jax.data import sources
from cloc_jax.data import spec
from cloc_jax.data import stats
from cloc_jax.data import validate
from cloc_jax.data.importers import coco
from cloc_jax.data.importers import engine
from cloc_jax.data.importers import grit
from cloc_jax.data.importers import rows
from cloc_jax.data.importers import webdataset

COUNT = 9


def everything(data, split='train'):
  source = sources.open_source(data, split=split)
  return [source[i] for i in range(len(source))]


def write_jsonl(path, examples, *, inline=(), scale=False):
  """One row an example; images as files beside it, or base64 of those in `inline`. scale: boxes in pixels."""
  lines = []
  for i, e in enumerate(examples):
    (path.parent / f'{e.image_id}.png').write_bytes(e.image)
    size = np.array([e.width, e.height] * 2) if scale else 1
    image = {'bytes': base64.b64encode(e.image).decode()} if i in inline else f'{e.image_id}.png'
    lines.append(json.dumps({
        'image': image, 'image_id': e.image_id, 'captions': e.captions, 'height': e.height, 'width': e.width,
        'regions': [{'box': (np.array(r.box) * size).tolist(), 'caption': r.caption, 'category': r.category,
                     'score': 0.8} for r in e.regions]}))
  path.write_text('\n\n'.join(lines) + '\n')
  return path


def write_tar(path, files):
  with tarfile.open(path, 'w') as tar:
    for name, data in files.items():
      info = tarfile.TarInfo(name)
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))
  return path


def sample(i, *, boxes=False):
  """The members of one WebDataset sample; with boxes, as GRIT has them."""
  e = painted_example(i)
  content = {'caption': e.captions[0], 'recaption': [e.captions[1]]}
  if boxes:
    content |= {'noun_chunks': [[0, 7, *r.box, 0.5] for r in e.regions], 'ref_exps': []}
  return {f'{i:06}.png': e.image, f'{i:06}.txt': e.captions[0].encode(), f'{i:06}.json': json.dumps(content).encode()}


@pytest.fixture(name='files')
def files_fixture(tmp_path):
  """A folder with nine pictures in every format: rows in two files, two archives."""
  examples = [painted_example(i) for i in range(COUNT)]
  write_jsonl(tmp_path / 'a.jsonl', examples[:5], inline=(2,))
  write_jsonl(tmp_path / 'b.jsonl', examples[5:])
  for kind in ('pairs', 'grit'):
    for name, numbers in (('0', range(4)), ('1', range(4, COUNT))):
      members = [sample(i, boxes=kind == 'grit') for i in numbers]
      write_tar(tmp_path / f'{kind}-{name}.tar', {k: v for found in members for k, v in found.items()})
  return tmp_path


def imported(kind, files, out):
  tars = lambda name: (webdataset.TarsSource('train', tuple(sorted(files.glob(f'{name}-*.tar')))),)
  importer = {
      'jsonl': lambda: rows.Rows((rows.RowsSource('train', (files / 'a.jsonl', files / 'b.jsonl')),)),
      'webdataset': lambda: webdataset.WebDataset(tars('pairs'), caption_keys=('caption', 'recaption')),
      'grit': lambda: grit.Grit(tars('grit'))}[kind]()
  engine.run(importer, out=out)
  return everything(out)


def named(kind, files):
  return {'jsonl': f'jsonl:{files}/a.jsonl,{files}/b.jsonl',
          'grit': {'format': 'grit', 'tars': [f'{files}/grit-*.tar']},
          'webdataset': f'webdataset:{files}/pairs-*.tar,caption_keys=caption,recaption'}[kind]


@pytest.mark.parametrize('kind', ['jsonl', 'webdataset', 'grit'])
def test_rows_and_archives_are_what_an_import_gives(kind, files):
  found = everything(named(kind, files))
  assert found == imported(kind, files, files / 'out') and len(found) == COUNT
  assert [e.image for e in found] == [painted_example(i).image for i in range(COUNT)]
  # Whichever record is asked for first, and in another process.
  source = pickle.loads(pickle.dumps(sources.open_source(named(kind, files), split='train')))
  assert [source[i] for i in (8, 0, 4)] == [found[i] for i in (8, 0, 4)]


def coco_mini_spec(folder, **more):
  return {'format': 'coco', 'images': f'{folder}/{{split}}2017',
          'instances': f'{folder}/annotations/instances_{{split}}2017.json',
          'captions': f'{folder}/annotations/captions_{{split}}2017.json'} | more


def test_coco_is_what_an_import_gives_to_the_last_pixel(coco_mini, tmp_path):
  named_so, out = coco_mini_spec(coco_mini), tmp_path / 'out'
  annotations = coco_mini / 'annotations'
  report = engine.run(coco.Coco(tuple(
      coco.CocoSource(split, coco_mini / f'{split}2017', annotations / f'instances_{split}2017.json',
                      annotations / f'captions_{split}2017.json') for split in ('train', 'val'))), out=out)
  ours, theirs = sources.read_meta(named_so), sources.read_meta(out)
  assert (ours.splits, ours.categories) == (theirs.splits, theirs.categories) and len(ours.categories) == 80
  for split in ('train', 'val'):
    assert everything(named_so, split) == everything(out, split)
  for split, found in stats.collect(named_so).splits.items():  # counted as the import counts
    assert found.outcomes == report[split]
  options = dict(split='train', tokenizer=WordTokenizer(), batch_size=16, image_size=64, flip=True, decode='fast',
                 epochs=1)
  for a, b in zip(pipeline.train_dataset(named_so, **options), pipeline.train_dataset(out, **options), strict=True):
    for name, value in vars(a['batch']).items():
      np.testing.assert_array_equal(value, getattr(b['batch'], name), err_msg=name)
    assert a['stats'] == b['stats'] and a['batch'].region_mask.any()
  batches = [eval_pipeline.eval_batches(p, split='val', batch_size=16, image_size=48, limit=32)
             for p in (named_so, out)]
  for a, b in zip(*batches, strict=True):
    np.testing.assert_array_equal(a.images, b.images)
    for x, y in zip(a.examples, b.examples, strict=True):
      np.testing.assert_array_equal(x.boxes, y.boxes)
      assert (x.image_id, x.captions, x.region_captions, x.categories, x.geometry) == (
          y.image_id, y.captions, y.region_captions, y.categories, y.geometry)


def test_coco_captions_alone(coco_mini):
  whole = coco_mini_spec(coco_mini)
  found = everything({key: value for key, value in whole.items() if key != 'instances'}, 'val')
  assert [(e.image_id, e.captions, e.image) for e in found] == [
      (e.image_id, e.captions, e.image) for e in everything(whole, 'val')]
  assert not any(e.regions for e in found)
  with pytest.raises(ValueError, match=r"lvis needs \['instances'\]"):
    sources.read_meta(f'lvis:images={coco_mini},captions=x.json')


def test_splits_come_from_the_paths(files):
  for name in ('train', 'val'):
    (files / name).mkdir()
    write_jsonl(files / name / f'rows_{name}.jsonl', [painted_example(i) for i in range(3 if name == 'val' else 5)])
  data = f'jsonl:{files}/{{split}}/rows_{{split}}.jsonl'
  meta = sources.read_meta(data)
  assert meta.splits == {'train': 5, 'val': 3}
  assert meta.categories == tuple(sorted({r.category for i in range(5) for r in painted_example(i).regions}))
  assert [e.image_id for e in everything(data, 'val[1:]+train[:40%]')] == [f'picture-{i}' for i in (1, 2, 0, 1)]
  assert len(everything(data, 'all')) == 8
  with pytest.raises(ValueError, match="no split 'vall'.*did you mean 'val'"):
    sources.open_source(data, split='vall')
  assert sources.read_meta(f'jsonl:{files}/a.jsonl,split=test').splits == {'test': 5}
  with pytest.raises(FileNotFoundError, match='no file fits'):
    sources.read_meta(f'jsonl:{files}/{{split}}.txt')


def test_a_missing_image_is_an_error_that_names_it(files):
  data = f'jsonl:{files}/a.jsonl'
  (files / 'picture-3.png').unlink()
  with pytest.raises(FileNotFoundError, match=r"split 'train': 1 images are missing; allow_missing.*\n.*picture-3.png"):
    sources.open_source(data, split='train')
  found = sources.read_meta(f'{data},allow_missing=true')
  counts = found.extra['counts']['train']
  assert found.splits == {'train': 4} and counts['images']['dropped']['missing']['count'] == 1
  lost = [json.loads(line) for line in (files / 'a.jsonl').read_text().split('\n') if line][3]
  assert counts['boxes']['dropped']['image lost']['count'] == len(lost['regions']) > 0
  assert counts['captions']['dropped']['image lost']['count'] == len(lost['captions']) > 0
  assert [e.image_id for e in everything(f'{data},allow_missing=true')] == [f'picture-{i}' for i in (0, 1, 2, 4)]


def test_images_that_go_away_later_are_masked_counted_and_named(files, caplog):
  data = f'jsonl:{files}/b.jsonl'
  source = sources.open_source(data, split='train')
  (files / 'picture-6.png').unlink()
  (files / 'picture-7.png').write_bytes(b'')
  with pytest.raises(sources.RecordError, match="record 1: image .*picture-6.png is missing"):
    source[1]
  with pytest.raises(sources.RecordError, match=r'record 2: image .*picture-7.png \(0 bytes\) is unreadable'):
    source[2]
  with pytest.raises(IndexError, match='record 4: the split has 4'):
    source[4]
  batches = list(pipeline.train_dataset(data, tokenizer=WordTokenizer(), batch_size=4, image_size=16, epochs=1))
  assert [int(b['stats']['corrupt_records']) for b in batches] == [2] and 'picture-6.png' in caplog.text
  report = validate.validate(data)
  assert not report.coverage, 'nothing was imported of which a share could be told'
  assert not report.ok and report.findings['corrupt_records'].count == 2


def test_boxes_that_are_not_what_they_should_be_are_named(files):
  write_jsonl(files / 'pixels.jsonl', [painted_example(i) for i in range(COUNT)], scale=True)
  with pytest.raises(ValueError, match='pixels.jsonl: looks like xyxy pixels.*100 %'):
    sources.open_source(f'jsonl:{files}/pixels.jsonl', split='train')
  right = everything(f'jsonl:{files}/pixels.jsonl,boxes=xyxy pixels')
  for e, want in zip(right, map(painted_example, range(COUNT)), strict=True):
    np.testing.assert_allclose([r.box for r in e.regions], [r.box for r in want.regions], atol=1e-6)


@pytest.mark.parametrize('kind', ['jsonl', 'webdataset'])
def test_a_table_that_took_long_is_kept_until_its_files_change(kind, files, monkeypatch):
  monkeypatch.setattr(direct, '_KEEP_SECONDS', -1)
  data, form = named(kind, files), direct_formats.FORMATS[kind]
  want = everything(data)
  kept, = files.glob('.*.npz')
  build = form.build
  monkeypatch.setattr(form, 'build', lambda *_: pytest.fail('read anew'))
  direct._opened.cache_clear()
  assert everything(data) == want and sources.read_meta(data).splits == {'train': COUNT}
  monkeypatch.setattr(form, 'build', build)
  kept.write_bytes(kept.read_bytes()[:300])  # cut off: made anew
  direct._opened.cache_clear()
  assert everything(data) == want
  if kind == 'jsonl':
    with open(files / 'b.jsonl', 'a') as file:
      file.write(json.dumps({'image': 'picture-0.png', 'caption': 'one more'}) + '\n')
  else:
    write_tar(files / 'pairs-1.tar', sample(3))
  found = everything(data)
  assert len(found) == (COUNT + 1 if kind == 'jsonl' else 5) and found[:4] == want[:4]


def test_a_folder_that_may_not_be_written_is_no_error(files, monkeypatch):
  def refuse(*_, **__):
    raise PermissionError('read-only')
  monkeypatch.setattr(direct, '_KEEP_SECONDS', -1)
  monkeypatch.setattr(np, 'savez', refuse)
  assert len(everything(named('grit', files))) == COUNT and not list(files.glob('.*'))


def test_damaged_archives_are_named(files):
  whole = files / 'pairs-0.tar'
  packed = files / 'packed.tar'
  packed.write_bytes(gzip.compress(whole.read_bytes()))
  with pytest.raises(ValueError, match='packed.tar is compressed.*import'):
    sources.open_source(f'webdataset:{packed}', split='train')
  cut = files / 'cut.tar'
  cut.write_bytes(whole.read_bytes()[:3000])
  with pytest.raises(ValueError, match='cut.tar is cut off or damaged'):
    sources.open_source(f'webdataset:{cut}', split='train')
  write_tar(files / 'some.tar', sample(1) | {'lost.txt': b'no picture'})
  meta = sources.read_meta(f'webdataset:{files}/some.tar')
  assert meta.splits == {'train': 1}
  assert meta.extra['counts']['train']['images']['dropped']['not in the archive']['examples'] == ['some.tar: lost']
  source = sources.open_source(f'webdataset:{whole}', split='train')
  whole.write_bytes(whole.read_bytes()[:600])
  with pytest.raises(sources.RecordError, match='record 3: .*shorter than it was'):
    source[3]


@pytest.mark.slow
def test_workers_read_no_annotations(files, monkeypatch):
  data = named('jsonl', files)
  options = dict(tokenizer=WordTokenizer(), batch_size=4, image_size=16, epochs=2)
  alone = list(pipeline.train_dataset(data, **options))
  iterator = iter(pipeline.train_dataset(data, num_workers=2, **options))
  for a, b in zip(alone, iterator, strict=True):
    np.testing.assert_array_equal(a['batch'].image, b['batch'].image)
    np.testing.assert_array_equal(a['batch'].region_text, b['batch'].region_text)
  iterator.close()
  assert stats.collect(data, workers=2).splits == stats.collect(data).splits
  assert scan.split_sizes(data, None) == {'train': COUNT}


def test_the_verbs_take_what_a_spec_names(files, capsys):
  data = f'jsonl:{files}/a.jsonl'
  assert cli.main(['data', 'stats', data, '--num-workers', '0']) == 0
  assert 'images kept' in capsys.readouterr().out
  assert cli.main(['data', 'validate', data, '--num-workers', '0']) == 0
  assert cli.main(['data', 'inspect', data, '--out', str(files / 'page.html'), '--crop', '0.5', '--count', '3']) == 0
  assert 'picture-' in (files / 'page.html').read_text()


@pytest.mark.parametrize('data, message', [
    ('cocoa:images=x', "no format 'cocoa'.*did you mean 'coco'"),
    ('coco:images=x,instance=y', "no option 'instance'; did you mean 'instances'"),
    ('coco:images=x', r"coco needs \['instances'\]"), ('jsonl:images=x', r"jsonl needs \['rows'\]"),
    ('jsonl:a.jsonl,images=x,images=y', "'images' is there twice"), ('jsonl:a.jsonl,images=', 'images is empty'),
    ('jsonl:a.jsonl,allow_missing=maybe', "allow_missing: expected true or false, got 'maybe'"),
    ({'images': 'x'}, "a dictionary with 'format'"),
    ({'format': 'coco', 'images': ['a', 'b'], 'instances': 'x'}, 'images: expected one')])
def test_wrong_names_of_data_sets(data, message):
  with pytest.raises(ValueError, match=message):
    spec.parse(data)


def test_names_of_data_sets(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  found = spec.parse({'format': 'jsonl', 'images': 'x', 'rows': ['a,b.jsonl', 'c.jsonl']})
  assert spec.parse('some/folder') is None and spec.parse('gs://bucket/x') is None and spec.parse(tmp_path) is None
  assert str(spec.parse('jsonl:c.jsonl,images=x')) == f'jsonl:rows={tmp_path}/c.jsonl,images={tmp_path}/x'
  assert spec.parse(str(found)) == found and hash(spec.parse(str(found))) == hash(found)
  assert spec.short_name('jsonl:some/c.jsonl') == 'jsonl-c' and spec.short_name('some/folder/') == 'folder'
  pathlib.Path('c.jsonl').write_text('')
  with pytest.raises(ValueError, match='c.jsonl is a file: to read it as it is, write jsonl:c.jsonl'):
    spec.parse('c.jsonl')
