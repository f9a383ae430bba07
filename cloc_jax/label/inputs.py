"""SOURCE → units of work, and a unit → its images in order.

A unit is what one worker reads alone: a run of image files, one archive, one Parquet or JSONL file, or one file of an
ArrayRecord data set. Nothing but names is read to make the list.
"""
from collections.abc import Iterator, Sequence
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import re
from typing import Any

from cloc_jax.data import imagefolder
from cloc_jax.data import schema
from cloc_jax.data import sources
from cloc_jax.data import storage
from cloc_jax.data.importers import counts as counts_lib
from cloc_jax.data.importers import images
from cloc_jax.data.importers import rows
from cloc_jax.data.importers import tfds_named
from cloc_jax.data.importers import webdataset

TEXT_KEYS = ('captions', 'caption', 'text', 'alt_text')
_TAR = re.compile(r'\.tar(\.(gz|bz2|xz))?$')
_ROWS = ('.parquet', '.jsonl')
_REQUESTS, _AHEAD = 16, 128  # to a store at once; images in memory ahead
_RECORDS = re.compile(r'-(\w+)\.array_record-\d{5,}-of-\d{5,}$')


@dataclasses.dataclass(frozen=True)
class Unit:
  """What one worker reads.

  kind: 'images', 'tar', 'rows', 'records' (ours) or 'tfds' (of any other data set of TFDS).
  root: the folder; what image ids of `images` are relative to.
  paths: files; one, except for `images`.
  label: names the unit for people, and changes when a local archive, table or shard does.
  images: how many it has; None where only reading it tells.
  task: of a 'tfds' unit, the importer's.
  """
  kind: str
  root: str
  paths: tuple[str, ...]
  label: str
  images: int | None = None
  task: Any = None


class Report(counts_lib.Counts):
  """Counts that also keep (id, reason) of every image that is not read, in `ids`."""

  def __init__(self):
    super().__init__()
    self.ids: list[tuple[str, str]] = []

  def lost_image(self, name: str, reason: str, *, path: str | os.PathLike = '', detail: str = '') -> None:
    self.dropped('images', f'{reason}: {detail}' if detail else reason, name)

  def dropped(self, what: str, reason: str, example: str, count: int = 1) -> None:
    if what == 'images':
      self.ids.append((example, reason))
    super().dropped(what, reason, example, count)


def plan(inputs: Sequence[str | os.PathLike], *, split: str = 'train', shard_size: int = 1024) -> list[Unit]:
  """The units of one or several SOURCEs, in an order that depends on names alone.

  Args:
    inputs: folders, files or patterns with * and ?, on a disk or in an object store. A folder holds images (in folders
      inside it too), or archives, or Parquet or JSONL files, or is an ArrayRecord data set.
    split: of a data set.
    shard_size: images in a unit of `images`.

  Raises:
    FileNotFoundError: nothing is there.
    ValueError: a folder holds several of these kinds, or a file is none of them.
  """
  found = [unit for one in inputs for unit in _plan_one(os.fspath(one), split, shard_size)]
  names = [unit.paths[0].rpartition('/')[2] for unit in found if unit.kind in ('tar', 'rows')]
  if len(set(names)) != len(names):
    twice = next(name for name in names if names.count(name) > 1)
    raise ValueError(f'two input files are called {twice!r}, and images are called by their file: rename one')
  if len(inputs) > 1:
    seen = set()
    for name in (name for unit in found if unit.kind == 'images' for name in unit.paths):
      if name in seen:
        raise ValueError(f'two images are called {name!r}: give the folder that both are in, or label one after the '
                         'other and train on a mixture')
      seen.add(name)
  return found


def read(unit: Unit, report: Report, *, text_keys: Sequence[str] = TEXT_KEYS) -> Iterator[schema.Example]:
  """A unit's images with their alt-texts as captions, and no regions; what is no image is in `report.ids`.

  Raises:
    ValueError, OSError: the unit itself is damaged or cannot be read; what was yielded before is sound.
  """
  if unit.kind == 'images':
    yield from _read_images(unit, report)
    return
  if unit.kind == 'records':
    with storage.local_copy(unit.paths[0]) as path:
      for example in sources.read_shard(path):
        yield dataclasses.replace(example, regions=())
    return
  for example in _imported(unit, report, tuple(text_keys)):
    yield dataclasses.replace(example, regions=())


# --- making the list


def _plan_one(source, split, shard_size):
  root, names, is_folder = _list(source)
  if not names:
    raise FileNotFoundError(f'{source}: no such file or folder, or it is empty')
  if is_folder and schema.INFO_FILE in names:
    return _plan_data_set(root, names, split)
  kinds = {
      'tar': [name for name in names if _TAR.search(name)],
      'rows': [name for name in names if name.endswith(_ROWS)],
      'images': [name for name in names if pathlib.PurePosixPath(name).suffix.lower() in imagefolder.EXTENSIONS]}
  if kinds['tar'] and kinds['rows']:  # img2dataset writes a Parquet file of the same name beside each archive
    stems = {_TAR.sub('', name) for name in kinds['tar']}
    kinds['rows'] = [name for name in kinds['rows'] if name.rpartition('.')[0] not in stems]
  several = {kind: found for kind, found in kinds.items() if found}
  if not several:
    raise ValueError(f'{source}: expected images, .tar, .parquet or .jsonl files, or an ArrayRecord data set; found '
                     f'{sorted(names)[:3]}')
  if len(several) > 1:
    raise ValueError(f'{source} holds several kinds of input, give one: '
                     + ', '.join(f'{len(found)} {kind} ({found[0]} …)' for kind, found in several.items()))
  (kind, found), = several.items()
  if kind != 'images':
    return [_file_unit(kind, root, name) for name in found]
  units = []
  for start in range(0, len(found), shard_size):
    part = tuple(found[start:start + shard_size])
    units.append(Unit('images', root, part, label=f'{root}: {part[0]} to {part[-1]}', images=len(part)))
  return units


def _plan_data_set(root, names, split):
  """A unit a file of the split. Ours keep their ids; others are read as `cloc data import tfds` reads them."""
  features = storage.path(root) / 'features.json'
  there = json.loads(features.read_text()) if features.is_file() else {}
  if schema.features().keys() <= there.get('featuresDict', {}).get('features', {}).keys():
    shards = [name for name in names if '/' not in name and (m := _RECORDS.search(name)) and m[1] == split]
    if not shards:
      splits = sorted({m[1] for name in names if (m := _RECORDS.search(name))})
      raise ValueError(f'{root}: the data set has no ArrayRecord files of split {split!r}; it has {splits}')
    return [_file_unit('records', root, name) for name in shards]
  tasks = tfds_named.Tfds(root, wanted=((split, split),), with_boxes=False).splits()[split]
  return [Unit('tfds', root, (task.payload.path,), label=f'{_label(task.payload.path)}: {task.label}',
               images=task.images, task=task) for task in tasks]


def _list(source):
  """(root, sorted names relative to it, whether `source` is a folder)."""
  where = storage.path(source)
  where = where if isinstance(where, storage.Remote) else where.absolute()
  found = storage.expand(os.fspath(where))
  alone = found == [os.fspath(where)]
  if alone and not where.is_file():
    return os.fspath(where).rstrip('/'), storage.walk(where), True
  root = (found[0] if alone else re.split(r'[*?[]', os.fspath(where))[0]).rpartition('/')[0]
  if isinstance(where, storage.Remote):  # stores spell a URL in their own way
    key = storage.Remote(root).backend()[1].rstrip('/')
    return root, sorted(storage.Remote(name).backend()[1][len(key) + 1:] for name in found), False
  return root, sorted(name[len(root) + 1:] for name in found), False


def _file_unit(kind, root, name):
  path = f'{root}/{name}'
  return Unit(kind, root, (path,), label=_label(path))


def _label(path):
  return path if storage.is_url(path) else f'{path} ({storage.state(path)})'


# --- reading


def _read_images(unit, report):
  for name, data, text in _files(unit):
    if isinstance(data, OSError):
      missing = isinstance(data, FileNotFoundError)
      report.lost_image(name, 'missing' if missing else 'unreadable', detail='' if missing else str(data))
      continue
    size = images.check_image(data, report, name=name)
    if size is None:
      continue
    if isinstance(text, OSError) and not isinstance(text, FileNotFoundError):
      report.lost_image(name, 'alt-text is unreadable', detail=str(text))
      continue
    try:
      text = '' if isinstance(text, OSError) else text.decode('utf-8-sig')
    except UnicodeDecodeError as error:
      report.lost_image(name, 'alt-text is not UTF-8', detail=str(error))
      continue
    texts = dict.fromkeys(line.strip() for line in text.splitlines() if line.strip())
    yield schema.Example(image=data, image_id=name, height=size[0], width=size[1], captions=tuple(texts))


def _files(unit):
  """Yields (name, bytes of the image, bytes of the .txt beside), or the OSError for either. Stores are asked ahead."""
  def fetch(name):
    return name, _bytes(unit.root, name), _bytes(unit.root, f'{name.rpartition(".")[0]}.txt')
  if not storage.is_url(unit.root):
    yield from map(fetch, unit.paths)
    return
  with concurrent.futures.ThreadPoolExecutor(_REQUESTS) as pool:
    for start in range(0, len(unit.paths), _AHEAD):
      yield from pool.map(fetch, unit.paths[start:start + _AHEAD])


def _bytes(root, name):
  try:
    return (storage.path(root) / name).read_bytes()
  except storage.StorageError:  # says nothing of the image
    raise
  except OSError as error:
    return error


def _imported(unit, report, text_keys):
  """What the importer of the unit's format reads, file by file as a stream."""
  where = storage.path(unit.paths[0])
  if unit.kind == 'tar':
    source = webdataset.TarsSource('train', (where,))
    importer = webdataset.WebDataset((source,), caption_keys=text_keys)
  elif unit.kind == 'rows':
    importer = rows.Rows((rows.RowsSource('train', (where,)),), trust_boxes=True)  # boxes are not used
  else:
    yield from tfds_named.Tfds(unit.root, fields=_texts(unit.root, text_keys), with_boxes=False).read(unit.task, report)
    return
  for task in importer.splits()['train']:
    yield from importer.read(task, report)


def _texts(root, text_keys):
  """The features among `text_keys` that hold texts, as the importer's fields."""
  found = []
  for key in text_keys:
    try:
      tfds_named.Tfds(root, fields=(('captions', key),), with_boxes=False)
    except ValueError:  # not there, or no text
      continue
    found.append(('captions', key))
  return tuple(found)
