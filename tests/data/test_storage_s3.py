"""S3's own protocol on this machine: moto's server, asked by s3fs as a user's bucket is."""
import io
import json
import os
import tarfile

import cv2
import numpy as np
import pytest

from cloc_jax import cli
from cloc_jax.data import copies
from cloc_jax.data import location
from cloc_jax.data import schema
from cloc_jax.data import sources
from cloc_jax.data import storage
from cloc_jax.data.importers import coco
from cloc_jax.data.importers import engine
from cloc_jax.data.importers import json_stream
from cloc_jax.data.importers import rows
from cloc_jax.data.importers import upload
from cloc_jax.data.importers import webdataset

s3fs = pytest.importorskip('s3fs')
moto_server = pytest.importorskip('moto.server')

IMAGES = 6


def jpeg(i):
  """Noise, so that a file is of some size."""
  pixels = np.random.default_rng(i).integers(0, 256, (48, 64, 3), np.uint8)
  return cv2.imencode('.jpg', pixels)[1].tobytes()


@pytest.fixture(name='server', scope='module')
def server_fixture():
  """moto's server, which keeps its objects when it is stopped and started at the same port."""
  patch = pytest.MonkeyPatch()
  server = moto_server.ThreadedMotoServer(ip_address='127.0.0.1', port=0, verbose=False)
  server.start()
  server.port = server._port = server.get_host_and_port()[1]
  for name, value in {'AWS_ENDPOINT_URL': f'http://127.0.0.1:{server.port}', 'AWS_ACCESS_KEY_ID': 'a',
                      'AWS_SECRET_ACCESS_KEY': 'b', 'AWS_DEFAULT_REGION': 'us-east-1', 'AWS_MAX_ATTEMPTS': '1',
                      'AWS_CONFIG_FILE': os.devnull, 'AWS_EC2_METADATA_DISABLED': 'true'}.items():
    patch.setenv(name, value)
  forget()
  s3fs.S3FileSystem().mkdir('bucket')
  yield server
  server.stop()
  patch.undo()
  forget()


def forget():
  """fsspec and we keep connections, with the endpoint they were made for."""
  s3fs.S3FileSystem.clear_instance_cache()
  storage._filesystem.cache_clear()


@pytest.fixture(name='root', scope='module')
def root_fixture(server):
  """A bucket's folder with COCO's layout, an archive and rows of images by URL."""
  del server
  root = storage.path('s3://bucket/source')
  put({f'source/images/{i}.jpg': jpeg(i) for i in range(IMAGES)})
  boxes = [{'id': i, 'image_id': i, 'bbox': [8, 4, 32, 32], 'category_id': 3, 'iscrowd': 0} for i in range(IMAGES)]
  put({'source/instances.json': json.dumps({
      'images': [{'id': i, 'file_name': f'{i}.jpg', 'height': 48, 'width': 64} for i in range(IMAGES)],
      'annotations': boxes, 'categories': [{'id': 3, 'name': 'dog'}]}).encode()})
  put({'source/0.tar': tar(range(3)), 'source/1.tar': tar(range(3, IMAGES)),
       'source/rows.jsonl': b''.join(json.dumps({'image': f'{root}/images/{i}.jpg', 'caption': 'a'}).encode() + b'\n'
                                     for i in range(IMAGES))})
  return root


def put(content):
  files = s3fs.S3FileSystem()
  for name, data in content.items():
    files.pipe_file(f'bucket/{name}', data)


def tar(numbers):
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode='w') as archive:
    for i in numbers:
      for name, data in ((f'{i}.jpg', jpeg(i)), (f'{i}.txt', b'a caption')):
        member = tarfile.TarInfo(name)
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
  return buffer.getvalue()


def importer(root):
  return coco.Coco(coco.CocoSource('train', root / 'images', root / 'instances.json'), images_per_shard=2)


def images(path):
  source = sources.open_source(os.fspath(path), split='train')
  return [source[i].image for i in range(len(source))]


def test_importing_from_a_bucket(root, tmp_path):
  engine.run(importer(root), out=tmp_path / 'coco', workers=1)
  assert images(tmp_path / 'coco') == [jpeg(i) for i in range(IMAGES)]
  tars = tuple(storage.expand(f'{root}/*.tar'))
  assert tars == (f'{root}/0.tar', f'{root}/1.tar')
  engine.run(webdataset.WebDataset(webdataset.TarsSource('train', tars)), out=tmp_path / 'tars')
  assert images(tmp_path / 'tars') == images(tmp_path / 'coco')
  engine.run(rows.Rows(rows.RowsSource('train', (root / 'rows.jsonl',))), out=tmp_path / 'rows')
  assert images(tmp_path / 'rows') == images(tmp_path / 'coco')


def test_parquet(root, tmp_path):
  pyarrow = pytest.importorskip('pyarrow')
  from pyarrow import parquet
  parquet.write_table(pyarrow.Table.from_pylist([{'image': jpeg(i), 'caption': 'a'} for i in range(IMAGES)]),
                      tmp_path / 'a.parquet', row_group_size=2)
  data = (tmp_path / 'a.parquet').read_bytes()
  put({'source/a.parquet': data, 'source/cut.parquet': data[:len(data) // 2]})
  engine.run(rows.Rows(rows.RowsSource('train', (root / 'a.parquet',))), out=tmp_path / 'out')
  assert images(tmp_path / 'out') == [jpeg(i) for i in range(IMAGES)]
  with pytest.raises(ValueError, match=f'{root}/cut.parquet is no Parquet file, or cut off'):
    engine.run(rows.Rows(rows.RowsSource('train', (root / 'cut.parquet',))), out=tmp_path / 'cut')


def test_there_and_back(root, tmp_path, monkeypatch):
  upload.run(importer(root), out='s3://bucket/done', work=tmp_path / 'work')
  engine.run(importer(root), out=tmp_path / 'here')
  copies.copy('s3://bucket/done', tmp_path / 'back')
  for name in storage.walk(tmp_path / 'here'):
    if name != 'metadata.json':  # says when it was made
      assert (tmp_path / 'back' / name).read_bytes() == (tmp_path / 'here' / name).read_bytes(), name
  assert copies.copy(tmp_path / 'back', 's3://bucket/again').kept == 0
  assert copies.copy(tmp_path / 'back', 's3://bucket/again').kept == 6
  monkeypatch.setenv(location.CACHE, str(tmp_path / 'cache'))
  location._cached.cache_clear()
  assert images('s3://bucket/again') == [jpeg(i) for i in range(IMAGES)]


def test_a_changed_object_is_noticed_by_its_hash(root, tmp_path):
  copies.copy(write_here(root, tmp_path), 's3://bucket/changing')
  copies.copy('s3://bucket/changing', tmp_path / 'copy')
  changed = bytearray((tmp_path / 'copy' / 'features.json').read_bytes())
  changed[-2:] = b' }'
  put({'changing/features.json': bytes(changed)})
  with pytest.raises(FileExistsError, match=r'changed there \(features.json\)'):
    copies.copy('s3://bucket/changing', tmp_path / 'copy')
  copies.copy('s3://bucket/changing', tmp_path / 'copy', overwrite=True)
  assert (tmp_path / 'copy' / 'features.json').read_bytes() == changed


def write_here(root, tmp_path):
  engine.run(importer(root), out=tmp_path / 'made')
  return tmp_path / 'made'


@pytest.mark.parametrize('url', ['s3://bucket/source/nothing.json', 's3://no-bucket/a.json'])
def test_what_is_not_there(root, url, tmp_path):
  del root
  with pytest.raises(FileNotFoundError, match=f'no such file: {url}'):
    json_stream.check_file(url)
  with pytest.raises(FileNotFoundError, match=url):
    storage.path(url).read_bytes()
  assert storage.state(url) == 'missing'
  with pytest.raises(FileNotFoundError, match=url):
    copies.copy(url, tmp_path / 'a')


def test_a_truncated_archive_is_named_and_what_is_done_stays(root, tmp_path):
  whole = tar(range(3, IMAGES))
  put({'cut/0.tar': tar(range(3)), 'cut/1.tar': whole[:len(whole) // 2 + 100]})
  cut = webdataset.WebDataset(webdataset.TarsSource('train', tuple(storage.expand('s3://bucket/cut/*.tar'))))
  with pytest.raises(ValueError, match='s3://bucket/cut/1.tar is cut off or damaged'):
    engine.run(cut, out=tmp_path / 'out')
  put({'cut/1.tar': whole})
  engine.run(cut, out=tmp_path / 'out')
  assert images(tmp_path / 'out') == [jpeg(i) for i in range(IMAGES)]


def test_access_denied_is_no_missing_file(root, monkeypatch):
  def denied(*_, **__):
    raise PermissionError('Forbidden')
  monkeypatch.setattr(root.backend()[0], 'info', denied)
  for ask in (storage.state, storage.size):
    with pytest.raises(PermissionError, match=f'{root}/0.tar: the store denies access: Forbidden'):
      ask(root / '0.tar')


def test_a_store_that_goes_away(server, root, tmp_path, capsys):
  copies.copy(write_here(root, tmp_path), 's3://bucket/leaving')
  (tmp_path / 'copy').mkdir()
  (tmp_path / 'copy' / 'features.json').write_bytes((tmp_path / 'made' / 'features.json').read_bytes())
  archive = (root / '0.tar').open()  # nothing has been fetched of it
  server.stop()
  try:
    with pytest.raises(storage.StorageError, match=f'{root}/0.tar: '):
      archive.read(1)
    with pytest.raises(storage.StorageError, match=f'{root}/0.tar: '):
      (root / '0.tar').read_bytes()
    assert cli.main(['data', 'copy', 's3://bucket/leaving', str(tmp_path / 'copy')]) == 2
    assert 'cloc data: s3://bucket/leaving: ' in capsys.readouterr().err
  finally:
    server.start()
  assert copies.copy('s3://bucket/leaving', tmp_path / 'copy').kept == 1
  assert schema.read_meta(tmp_path / 'copy').splits == {'train': IMAGES}
