"""WebDataset archives as img2dataset writes them, whole, cut off and damaged.

github.com/webdataset/webdataset (README: files of one sample share the name up to the first dot);
github.com/rom1504/img2dataset (README, "Output format"; writer.py): {shard:05d}.tar with KEY.jpg, KEY.txt, KEY.json.
"""
import gzip
import io
import json
import tarfile

import numpy as np
from painted_pictures import encode_png
import pytest

from cloc_jax import cli
from cloc_jax.data import sources
from cloc_jax.data.importers import engine
from cloc_jax.data.importers import webdataset

PNG = encode_png(np.zeros((40, 80, 3), np.uint8))


def members(index, **changes):
  """Files of one sample, in img2dataset's order."""
  key, caption = f'{index:09}', f'caption {index}'
  meta = {'url': f'http://x/{index}.jpg', 'caption': caption, 'key': key, 'status': 'success', 'error_message': None,
          'width': 80, 'height': 40, 'original_width': 80, 'original_height': 40, 'exif': '{}', 'sha256': '0'} | changes
  return {f'{key}.jpg': PNG, f'{key}.json': json.dumps(meta).encode(), f'{key}.txt': caption.encode()}


def write_tar(path, files):
  with tarfile.open(path, 'w') as tar:
    for name, data in files.items():
      info = tarfile.TarInfo(name)
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))
  return path


def records(path, split='train'):
  source = sources.RecordSource(path, split=split)
  return [source[i] for i in range(len(source))]


def importer(*tars, **settings):
  return webdataset.WebDataset(webdataset.TarsSource('train', tars), **settings)


def test_pairs(tmp_path):
  a = write_tar(tmp_path / '00000.tar', members(0) | members(1, caption=' caption 1', recaption=['new', 'newer']))
  b = write_tar(tmp_path / '00001.tar', {
      './a/x.seg.png': b'1', './a/y.WebP': PNG, './a/y.txt': 'يد'.encode(), 'z.txt': b'no image', 'w.jpg': b''})
  found = engine.run(importer(a, b, caption_keys=('caption', 'recaption')), out=tmp_path / 'out', allow_missing=True)
  got = records(tmp_path / 'out')
  assert [r.image_id for r in got] == ['00000/000000000', '00000/000000001', '00001/a/y']
  assert [r.captions for r in got] == [('caption 0',), ('caption 1', 'new', 'newer'), ('يد',)]
  assert [(r.image, r.height, r.width, r.regions) for r in got] == 3 * [(PNG, 40, 80, ())]
  found = found['train']
  assert found.examples('images', 'dropped', 'not in the archive') == ['00001/a/x', '00001/z']
  assert found.examples('images', 'dropped', 'unreadable') == ['00001/w (0 bytes)']
  assert found.examples('files', 'noted', '.seg.png not read') == ['a/x.seg.png']
  assert (found.of('images'), found.of('captions', 'dropped', 'image lost')) == (6, 1)


def test_compressed(tmp_path):
  path = tmp_path / 'a.tar.gz'
  path.write_bytes(gzip.compress(write_tar(tmp_path / 'b.tar', members(0)).read_bytes()))
  engine.run(importer(path), out=tmp_path / 'out')
  assert records(tmp_path / 'out')[0].image_id == 'a/000000000'


@pytest.mark.parametrize('compress', [False, True])
def test_every_cut_is_noticed(tmp_path, compress):
  data = write_tar(tmp_path / 'a.tar', members(0) | members(1)).read_bytes()
  whole = data.rstrip(b'\0')
  ends = [*range(0, len(whole) + 1, 512), 100, 512 + 30, len(whole)]  # at the borders of blocks, and within
  if compress:
    data = gzip.compress(data)
    ends = [5, 30, len(data) // 2]
  for end in ends:
    (tmp_path / 'a.tar').write_bytes(data[:end])
    with pytest.raises(ValueError, match='a.tar is cut off or damaged.*fetch it again'):
      list(webdataset.samples(tmp_path / 'a.tar'))


def test_the_other_archives_stay_done(tmp_path, monkeypatch):
  paths = [write_tar(tmp_path / f'{i}.tar', members(i)) for i in range(3)]
  data = paths[1].read_bytes()
  paths[1].write_bytes(data[:1000])
  with pytest.raises(ValueError, match='1.tar is cut off'):
    engine.run(importer(*paths), out=tmp_path / 'out')
  paths[1].write_bytes(data)
  paths.append(write_tar(tmp_path / '3.tar', members(3)))  # and one that has come meanwhile
  opened, samples = [], webdataset.samples
  monkeypatch.setattr(webdataset, 'samples', lambda path: opened.append(path.name) or samples(path))
  engine.run(importer(*paths), out=tmp_path / 'out')
  assert opened == ['1.tar', '2.tar', '3.tar']
  assert [r.captions for r in records(tmp_path / 'out')] == [(f'caption {i}',) for i in range(4)]


@pytest.mark.parametrize('files, message', [
    (members(0) | {'1.txt': b'x', '000000000.npy': b''}, 'the files of 000000000 do not stand together'),
    ({'a.jpg': PNG, 'a.png': PNG}, r'a: more than one image'),
    ({'a.jpg': PNG, 'a.JPG': PNG}, 'a.JPG is there twice'),
    ({'a.jpg': PNG, 'a.json': b'{'}, 'a.json is no JSON'),
    ({'a.jpg': PNG, 'a.json': b'[]'}, 'a.json: expected an object, got a list'),
    ({'a.jpg': PNG, 'a.txt': b'\xff'}, 'a.txt is not UTF-8'),
    ({'a.jpg': PNG, 'a.json': b'{"caption": 3}'}, "'caption' must be a text")])
def test_bad_members_are_named(tmp_path, files, message):
  with pytest.raises(ValueError, match=f'0.tar: .*{message}'):
    engine.run(importer(write_tar(tmp_path / '0.tar', files)), out=tmp_path / 'out')


def test_no_archive(tmp_path):
  (tmp_path / 'a.tar').write_bytes(b'<html>not found</html>' * 100)
  with pytest.raises(ValueError, match='a.tar is cut off or damaged, in or after its beginning'):
    engine.run(importer(tmp_path / 'a.tar'), out=tmp_path / 'out')


def test_the_verb(tmp_path):
  for i in range(2):
    write_tar(tmp_path / f'0000{i}.tar', members(i))
  argv = ['data', 'import', 'webdataset', '--tars', tmp_path / '*.tar', '--out', tmp_path / 'out', '--workers', 1]
  assert cli.main([str(arg) for arg in argv]) == 0
  assert [r.captions for r in records(tmp_path / 'out')] == [('caption 0',), ('caption 1',)]
