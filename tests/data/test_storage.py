"""Sources in stores: fsspec's memory:// (of one process: importers run in this one), and a local web server."""
import functools
import http.server
import json
import os
import pathlib
import pickle
import threading

import numpy as np
from painted_pictures import encode_png
import pytest
from test_import_refcoco import INSTANCES
from test_import_refcoco import REFS
from test_import_webdataset import members
from test_import_webdataset import records
from test_import_webdataset import write_tar

from cloc_jax import cli
from cloc_jax.data import direct
from cloc_jax.data import schema
from cloc_jax.data import sources
from cloc_jax.data import storage
from cloc_jax.data.importers import coco
from cloc_jax.data.importers import engine
from cloc_jax.data.importers import json_stream
from cloc_jax.data.importers import refcoco
from cloc_jax.data.importers import rows
from cloc_jax.data.importers import upload
from cloc_jax.data.importers import webdataset

fsspec = pytest.importorskip('fsspec')
memory = pytest.importorskip('fsspec.implementations.memory')
PNG = encode_png(np.zeros((40, 80, 3), np.uint8))


@pytest.fixture(name='put')
def put_fixture(request):
  """put({name: bytes}) → a folder of them in memory://."""
  files = fsspec.filesystem('memory')
  root = f'/{request.node.name}'.replace('[', '_').replace(']', '_')

  def put(content):
    for name, data in content.items():
      files.pipe_file(f'{root}/{name}', data)
    return storage.path(f'memory:/{root}')
  yield put
  if files.exists(root):
    files.rm(root, recursive=True)


def coco_files():
  boxes = [[8, 4, 32, 32], [0, 0, 8, 4]]
  return {
      'instances.json': json.dumps({
          'images': [{'id': i, 'file_name': f'{i}.png', 'height': 40, 'width': 80} for i in (1, 2)],
          'annotations': [{'image_id': 1 + i, 'bbox': box, 'category_id': 3} for i, box in enumerate(boxes)],
          'categories': [{'id': 3, 'name': 'dog'}]}).encode(),
      'images/1.png': PNG, 'images/2.png': PNG}


def write(folder, content):
  for name, data in content.items():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)
  return folder


def same_data(a, b):
  assert records(a) == records(b) and len(records(a)) > 0
  assert schema.read_meta(a).extra['counts'] == schema.read_meta(b).extra['counts']


def import_coco(root, out, **settings):
  return engine.run(coco.Coco(coco.CocoSource('train', root / 'images', root / 'instances.json')), out=out, **settings)


def test_coco_from_a_store_is_as_from_a_disk(put, tmp_path):
  import_coco(put(coco_files()), tmp_path / 'a')
  import_coco(write(tmp_path / 'source', coco_files()), tmp_path / 'b')
  same_data(tmp_path / 'a', tmp_path / 'b')


def test_archives_pickles_and_rows(put, tmp_path):
  import pickle
  tar = write_tar(tmp_path / '0.tar', members(0) | members(1)).read_bytes()
  lines = b''.join(json.dumps({'image': image, 'caption': 'a'}).encode() + b'\n' for image in ('x.png', 'URL'))
  images = {f'train2014/COCO_train2014_{i:012}.jpg': PNG for i in (581857, 9)}
  root = put({'tars/0.tar': tar, 'refs(unc).p': pickle.dumps(REFS, protocol=2), 'x.png': PNG,
              'instances.json': json.dumps(INSTANCES).encode(), **images})
  put({'rows.jsonl': lines.replace(b'URL', f'{root}/x.png'.encode())})
  engine.run(webdataset.WebDataset(webdataset.TarsSource('train', tuple(storage.expand(f'{root}/tars/*.tar')))),
             out=tmp_path / 'tars')
  assert [r.image_id for r in records(tmp_path / 'tars')] == ['0/000000000', '0/000000001']
  engine.run(refcoco.RefCoco(root / 'refs(unc).p', root / 'instances.json', root / 'train2014'), out=tmp_path / 'ref')
  assert records(tmp_path / 'ref')[0].regions[0].caption == 'the lady with the blue shirt'
  engine.run(rows.Rows(rows.RowsSource('train', (root / 'rows.jsonl',))), out=tmp_path / 'rows')
  assert [r.image for r in records(tmp_path / 'rows')] == [PNG, PNG]


def test_parquet(put, tmp_path):
  pyarrow = pytest.importorskip('pyarrow')
  from pyarrow import parquet
  parquet.write_table(pyarrow.Table.from_pylist([{'image': PNG, 'caption': 'a'}]), tmp_path / 'a.parquet')
  root = put({'a.parquet': (tmp_path / 'a.parquet').read_bytes()})
  engine.run(rows.Rows(rows.RowsSource('train', (root / 'a.parquet',))), out=tmp_path / 'out')
  assert records(tmp_path / 'out')[0].captions == ('a',)


def test_missing_images_and_files_are_named(put, tmp_path):
  content = coco_files()
  del content['images/2.png']
  root = put(content)
  with pytest.raises(FileNotFoundError, match='memory://.*/images/2.png: missing'):
    import_coco(root, tmp_path / 'out')
  assert import_coco(root, tmp_path / 'out', allow_missing=True)['train'].of('images', 'dropped', 'missing') == 1
  with pytest.raises(FileNotFoundError, match='instance.json; did you mean memory://.*/instances.json'):
    json_stream.check_file(root / 'instance.json')
  with pytest.raises(FileNotFoundError, match='no file fits memory://'):
    storage.expand(f'{root}/*.tar')


def test_an_image_that_came_is_read_when_the_import_goes_on(put, tmp_path):
  content = coco_files()
  late = content.pop('images/2.png')
  with pytest.raises(FileNotFoundError):
    import_coco(put(content), tmp_path / 'out')
  root = put({'images/2.png': late})
  assert import_coco(root, tmp_path / 'out')['train'].of('images', 'kept') == 2


def test_a_store_that_fails_stops_the_import(put, tmp_path, monkeypatch):
  root = put(coco_files())

  class Refused(Exception):
    """Stores have exceptions of their own."""

  def cat_file(*_, **__):
    raise Refused('quota')
  monkeypatch.setattr(fsspec.get_filesystem_class('memory'), 'cat_file', cat_file)
  with pytest.raises(OSError, match=r'memory://.*/images/1.png: Refused: quota'):
    import_coco(root, tmp_path / 'out', allow_missing=True)


def test_a_connection_that_breaks_is_no_damaged_archive(put, tmp_path, monkeypatch):
  """The archive is whole: what is wrong is the store, after some of it was read."""
  put({'0.tar': tar_bytes(tmp_path / '0.tar')})
  root, read = put({'1.tar': tar_bytes(tmp_path / '1.tar')}), memory.MemoryFile.read

  def breaking(self, *size):
    if self.path.endswith('1.tar') and self.tell():
      raise RuntimeError('reset by peer')
    return read(self, *size)
  importer = webdataset.WebDataset(webdataset.TarsSource('train', tuple(storage.expand(f'{root}/*.tar'))))
  with monkeypatch.context() as broken:
    broken.setattr(memory.MemoryFile, 'read', breaking, raising=False)
    with pytest.raises(storage.StorageError, match='memory://.*/1.tar: RuntimeError: reset by peer'):
      engine.run(importer, out=tmp_path / 'out')
  engine.run(importer, out=tmp_path / 'out')
  assert len(records(tmp_path / 'out')) == 4


def tar_bytes(path):
  """An archive larger than what is read ahead of it."""
  write_tar(path, members(0) | members(1) | {f'{1:09}.cls': bytes(500_000)})
  return path.read_bytes()


def test_state_tells_a_changed_file(put):
  path = put({'a': b'1'}) / 'a'
  first = storage.state(path)
  assert first == storage.state(path) and first.startswith('1 bytes, created') and storage.size(path) == 1
  put({'a': b'2'})
  assert storage.state(path) != first
  assert storage.state(path.parent / 'b') == 'missing'


@pytest.mark.parametrize('url, name, suffix, parent', [
    ('gs://bucket/a/b.tar.gz', 'b.tar.gz', '.gz', 'gs://bucket/a'),
    ('https://x.org/a/b.json?key=c/d', 'b.json', '.json', ''),
    ('s3://bucket/a', 'a', '', 's3://bucket')])
def test_paths(url, name, suffix, parent):
  path = storage.path(url)
  assert (path.name, path.suffix, str(path), os.fspath(path.expanduser().absolute())) == (name, suffix, url, url)
  if parent:
    assert path.parent == storage.path(parent)


def test_what_is_no_url():
  for name in ('a/b', '/a', 'C:\\a', 'a:b', '~/x'):
    assert isinstance(storage.path(name), pathlib.Path)
  assert storage.join(pathlib.Path('/a'), 'gs://b/c') == storage.path('gs://b/c')
  assert storage.path('https://x.org/a') / 'ein Bild.jpg' == storage.path('https://x.org/a/ein%20Bild.jpg')


def test_what_to_install(monkeypatch):
  def filesystem(_):
    raise ImportError('Please install gcsfs to access Google Storage')
  storage._filesystem.cache_clear()
  monkeypatch.setattr(fsspec, 'filesystem', filesystem)
  with pytest.raises(ModuleNotFoundError, match=r"gs:// needs gcsfs: pip install 'cloc_jax\[cloud\]'"):
    json_stream.check_file('gs://bucket/a.json')


def test_a_scheme_that_nobody_knows():
  with pytest.raises(ValueError, match='nonsense://a…: '):
    storage.path('nonsense://a/b').exists()


@pytest.mark.parametrize('url, way', [
    ('gs://b/c', 'CLOC_DATA_CACHE.*cloc data copy gs://b/c FOLDER.*gcsfuse'),
    ('s3://b/c', 'CLOC_DATA_CACHE.*cloc data copy s3://b/c FOLDER.*mount-s3'), ('https://x/y', 'fetch the folder')])
def test_finished_data_sets_are_read_from_a_disk(url, way, capsys, monkeypatch):
  monkeypatch.delenv('CLOC_DATA_CACHE', raising=False)
  with pytest.raises(ValueError, match=f'{url}: data sets are read from a disk.*{way}'):
    schema.read_meta(url)
  assert cli.main(['data', 'validate', url]) != 0
  assert 'read from a disk' in capsys.readouterr().err


# --- reading as it is


def test_reading_files_of_a_store_as_they_are(put, tmp_path, monkeypatch):
  """The examples are those of the same files on a disk; one is one request, of no more than its own bytes."""
  lines = b''.join(json.dumps({'image': f'images/{i}.png', 'caption': f'row {i}', 'regions': [
      {'box': [0.1, 0.2, 0.5, 0.9], 'caption': 'a dog', 'category': 'dog'}]}).encode() + b'\n' for i in (1, 2))
  content = coco_files() | {'rows_train.jsonl': lines, '0.tar': tar_bytes(tmp_path / 'x')}
  root, asked = put(content), []
  write(tmp_path, content)
  cat_file, kind = fsspec.get_filesystem_class('memory').cat_file, fsspec.get_filesystem_class('memory')
  monkeypatch.setattr(kind, 'cat_file', lambda self, name, start=None, end=None, **more: asked.append(
      (name.rpartition('/')[2], (end or 0) - (start or 0))) or cat_file(self, name, start, end, **more))
  for text in ('coco:images=ROOT/images,instances=ROOT/instances.json', 'webdataset:ROOT/*.tar',
               'jsonl:ROOT/rows_{split}.jsonl'):
    there, here = (sources.open_source(text.replace('ROOT', str(place)), split='train') for place in (root, tmp_path))
    assert len(there) == len(here) == 2
    assert sources.read_meta(text.replace('ROOT', str(root))).splits == {'train': 2}
    asked.clear()
    assert [there[i] for i in range(2)] == [here[i] for i in range(2)]
    if 'webdataset' in text:
      assert [name for name, _ in asked] == ['0.tar', '0.tar'] and asked[0][1] < 10_000
    elif 'jsonl' in text:
      assert asked == [('rows_train.jsonl', len(lines) // 2), ('1.png', 0), ('rows_train.jsonl', len(lines) // 2),
                       ('2.png', 0)]
  assert pickle.loads(pickle.dumps(there))[1] == here[1]
  root.backend()[0].rm_file(f'{root.backend()[1]}/images/2.png')
  with pytest.raises(FileNotFoundError, match='1 images are missing.*\n.*memory://.*/images/2.png'):
    direct._opened.cache_clear()
    sources.open_source(f'coco:images={root}/images,instances={root}/instances.json', split='train')
  monkeypatch.setattr(kind, 'cat_file', lambda *_, **__: (_ for _ in ()).throw(RuntimeError('reset by peer')))
  with pytest.raises(storage.StorageError, match='reset by peer'):  # nothing that training would mask
    there[0]  # pylint: disable=pointless-statement


def test_tables_of_a_store_are_kept_in_the_cache(put, tmp_path, monkeypatch):
  root = put({'0.tar': tar_bytes(tmp_path / 'x.tar')})
  monkeypatch.setenv('CLOC_DATA_CACHE', str(tmp_path / 'cache'))
  monkeypatch.setattr(direct, '_KEEP_SECONDS', 0)
  found = []
  for _ in range(2):
    direct._opened.cache_clear()
    source = sources.open_source(f'webdataset:{root}/0.tar', split='train')
    found.append([source[i] for i in range(len(source))])
    monkeypatch.setattr(webdataset, 'members', lambda _: pytest.fail('read again'))
  assert found[0] == found[1] and len(list((tmp_path / 'cache').glob('.0.tar.cloc-*.npz'))) == 1


# --- writing to a store


def run_upload(root, tmp_path, **settings):
  importer = coco.Coco(coco.CocoSource('train', root / 'images', root / 'instances.json'))
  return root / 'done', upload.run(importer, out=root / 'done', work=tmp_path / 'work', **settings)


def test_upload(put, tmp_path):
  root = put(coco_files())
  target, counts = run_upload(root, tmp_path)
  assert counts['train'].of('images', 'kept') == 2 and not list((tmp_path / 'work').iterdir())
  local = tmp_path / 'copy'
  local.mkdir()
  for path in target.glob('*'):
    (local / path.name).write_bytes(path.read_bytes())
  import_coco(root, tmp_path / 'direct')
  same_data(local, tmp_path / 'direct')
  with pytest.raises(FileExistsError, match='done holds a data set already'):
    run_upload(root, tmp_path)
  stale = put({'done/old-00000-of-00001': b'x'}) / 'done' / 'old-00000-of-00001'
  assert run_upload(root, tmp_path, overwrite=True)[1] == counts and not stale.exists()


def test_an_upload_that_broke_off_goes_on_and_nobody_takes_it_for_whole(put, tmp_path, monkeypatch):
  root = put(coco_files())
  kind = fsspec.get_filesystem_class('memory')
  put_file, sent = kind.put_file, []

  def broken(self, source, target, **more):
    if len(sent) == 2:
      raise ConnectionError('gone')
    sent.append(target)
    return put_file(self, source, target, **more)
  monkeypatch.setattr(kind, 'put_file', broken)
  with pytest.raises(storage.StorageError, match='memory://.*/done/.*: ConnectionError: gone'):
    run_upload(root, tmp_path)
  assert not (root / 'done' / schema.INFO_FILE).exists()
  before = list(sent)
  sent.clear()
  monkeypatch.setattr(engine, 'run', lambda *_, **__: pytest.fail('nothing is read again'))
  monkeypatch.setattr(kind, 'put_file', lambda self, source, target, **more: sent.append(target) or put_file(
      self, source, target, **more))
  _, counts = run_upload(root, tmp_path)
  assert counts['train'].of('images', 'kept') == 2 and not set(before) & set(sent)
  assert sent[-1].endswith(schema.INFO_FILE)


def test_data_sets_are_written_to_a_disk(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match='gs://b/c: data sets are written to a disk'):
    schema.write_dataset('gs://b/c', meta=schema.DatasetMeta(name='a'), splits={'train': []})
  assert not list(tmp_path.iterdir())


def test_where_shards_wait_must_be_said(put, tmp_path):
  root = put(coco_files())
  argv = ['data', 'import', 'coco', '--images', f'{root}/images', '--instances', f'{root}/instances.json', '--workers',
          '0', '--out', f'{root}/done']
  with pytest.raises(ValueError, match='expected --work DIR'):
    upload.run(coco.Coco(coco.CocoSource('train', root / 'images', root / 'instances.json')), out=root / 'd', work=None)
  assert cli.main([*argv, '--work', str(tmp_path / 'work')]) == 0
  assert (root / 'done' / schema.INFO_FILE).exists()


# --- a web server


class Handler(http.server.SimpleHTTPRequestHandler):
  """Serves ranges, as stores do; without them where `ranges` is False."""
  ranges = True

  def do_GET(self):
    if self.path.endswith('gone.png'):
      return self.send_error(410)
    asked = self.headers.get('Range')
    path = pathlib.Path(self.translate_path(self.path))
    if not (self.ranges and asked and path.is_file()):
      return super().do_GET()
    begin, end = asked.removeprefix('bytes=').split('-')
    data = path.read_bytes()
    piece = data[int(begin):int(end or len(data)) + 1]
    self.send_response(206)
    self.send_header('Content-Range', f'bytes {begin}-{int(begin) + len(piece) - 1}/{len(data)}')
    self.send_header('Content-Length', str(len(piece)))
    self.end_headers()
    self.wfile.write(piece)
    return None

  def log_message(self, *_):
    pass


@pytest.fixture(name='serve')
def serve_fixture():
  pytest.importorskip('aiohttp')
  servers = []

  def serve(folder, *, ranges):
    handler = functools.partial(type('Served', (Handler,), {'ranges': ranges}), directory=str(folder))
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    servers.append(server)
    return storage.path(f'http://127.0.0.1:{server.server_port}')
  yield serve
  for server in servers:
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize('ranges', [True, False])
def test_the_web(serve, tmp_path, ranges):
  write(tmp_path / 'source', coco_files())
  write_tar(tmp_path / 'source' / '0.tar', members(0) | members(1))
  root = serve(tmp_path / 'source', ranges=ranges)
  import_coco(root, tmp_path / 'a')
  import_coco(tmp_path / 'source', tmp_path / 'b')
  same_data(tmp_path / 'a', tmp_path / 'b')
  engine.run(webdataset.WebDataset(webdataset.TarsSource('train', (root / '0.tar',))), out=tmp_path / 'tars')
  assert len(records(tmp_path / 'tars')) == 2
  with pytest.raises(FileNotFoundError, match='no such file: http://.*/1.tar'):
    json_stream.check_file(root / '1.tar')
  for name in ('gone.png', 'never.png'):
    with pytest.raises(FileNotFoundError):
      (root / name).read_bytes()
