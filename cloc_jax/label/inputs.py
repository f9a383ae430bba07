"""SOURCE → units of work, and a unit → its images in order.

A unit is what one worker reads alone: a run of image files, one archive, one Parquet or JSONL file, or one file of an
ArrayRecord data set. Nothing but names is read to make the list.
"""
from collections.abc import Iterator, Sequence
import dataclasses
import fnmatch
import os
import pathlib
import re
from typing import Any

from cloc_jax.data import imagefolder
from cloc_jax.data import schema
from cloc_jax.data import sources
from cloc_jax.data.importers import counts as counts_lib
from cloc_jax.data.importers import images
from cloc_jax.data.importers import rows
from cloc_jax.data.importers import webdataset
from cloc_jax.label import storage

TEXT_KEYS = ('captions', 'caption', 'text', 'alt_text')
_TAR = re.compile(r'\.tar(\.(gz|bz2|xz))?$')
_ROWS = ('.parquet', '.jsonl')
_RECORDS = re.compile(r'-(\w+)\.array_record-\d{5,}-of-\d{5,}$')


@dataclasses.dataclass(frozen=True)
class Unit:
  """What one worker reads.

  kind: 'images', 'tar', 'rows' or 'records'.
  root: what image ids of `images` are relative to.
  paths: files; one, except for `images`.
  label: names the unit for people, and changes when a local file does.
  images: how many it has; None where only reading it tells.
  """
  kind: str
  root: str
  paths: tuple[str, ...]
  label: str
  images: int | None = None


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
  return found


def read(unit: Unit, report: Report, *, text_keys: Sequence[str] = TEXT_KEYS) -> Iterator[schema.Example]:
  """A unit's images with their alt-texts as captions, and no regions; what is no image is in `report.ids`.

  Raises:
    ValueError, OSError: the unit itself is damaged or cannot be read; what was yielded before is sound.
  """
  if unit.kind == 'images':
    yield from _read_images(unit, report)
    return
  with storage.local_copy(unit.paths[0]) as path:
    if unit.kind == 'tar':
      importer = webdataset.WebDataset((webdataset.TarsSource('train', (path,)),), caption_keys=tuple(text_keys))
    elif unit.kind == 'rows':
      importer = rows.Rows((rows.RowsSource('train', (path,)),), trust_boxes=True)  # boxes are not used
    else:
      yield from _read_records(path, report, text_keys)
      return
    for task in importer.splits()['train']:
      for example in importer.read(task, report):
        yield dataclasses.replace(example, regions=())


def describe(units: Sequence[Unit]) -> dict[str, Any]:
  """What there is to read, for people."""
  known = [unit.images for unit in units]
  return {'units': len(units), 'kinds': sorted({unit.kind for unit in units}),
          'images': None if None in known else sum(known)}


# --- making the list


def _plan_one(source, split, shard_size):
  root, names, is_folder = _list(source)
  if not names:
    raise FileNotFoundError(f'{source}: no such file or folder, or it is empty')
  if is_folder and any(name.rpartition('/')[2] == 'dataset_info.json' for name in names):
    shards = [name for name in names if '/' not in name and (m := _RECORDS.search(name)) and m[1] == split]
    if not shards:
      splits = sorted({m[1] for name in names if (m := _RECORDS.search(name))})
      raise ValueError(f'{source}: the data set has no ArrayRecord files of split {split!r}; it has {splits}')
    return [_file_unit('records', root, name) for name in shards]
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


def _list(source):
  """(root, sorted names relative to it, whether `source` is a folder)."""
  if storage.is_remote(source):
    fs, inside = storage.file_system(source)
    protocol = source.partition('://')[0]
    url = lambda path: f'{protocol}://{path.removeprefix("/") if protocol == "memory" else path}'
    if any(c in source for c in '*?'):
      found, folder, is_folder = sorted(fs.glob(inside)), inside.rpartition('/')[0], False
    elif fs.isfile(inside):
      found, folder, is_folder = [inside], inside.rpartition('/')[0], False
    else:
      folder, is_folder = inside.rstrip('/'), True
      found = sorted(fs.find(folder)) if fs.exists(folder) else []
    return url(folder), [path.removeprefix(folder).lstrip('/') for path in found], is_folder
  path = pathlib.Path(source).expanduser().absolute()
  if path.is_dir():
    found = []
    for folder, folders, files in os.walk(path):
      folders[:] = sorted(name for name in folders if not name.startswith('.'))
      inside = os.path.relpath(folder, path).replace(os.sep, '/')
      found += [name if inside == '.' else f'{inside}/{name}' for name in files if not name.startswith('.')]
    return str(path), sorted(found), True
  if path.parent.is_dir():
    names = sorted(name for name in os.listdir(path.parent) if fnmatch.fnmatchcase(name, path.name))
    return str(path.parent), names, False
  return str(path.parent), [], False


def _file_unit(kind, root, name):
  path = f'{root}/{name}'
  state = '' if storage.is_remote(path) else f' ({counts_lib.file_state(path)})'
  return Unit(kind, root, (path,), label=path + state)


# --- reading


def _read_images(unit, report):
  for name in unit.paths:
    try:
      data = _bytes(unit.root, name)
    except OSError as error:
      missing = isinstance(error, FileNotFoundError)
      report.lost_image(name, 'missing' if missing else 'unreadable', detail='' if missing else str(error))
      continue
    size = images.check_image(data, report, name=name)
    if size is None:
      continue
    try:
      text = _bytes(unit.root, f'{name.rpartition(".")[0]}.txt').decode('utf-8-sig')
    except FileNotFoundError:
      text = ''
    except UnicodeDecodeError as error:
      report.lost_image(name, 'alt-text is not UTF-8', detail=str(error))
      continue
    texts = dict.fromkeys(line.strip() for line in text.splitlines() if line.strip())
    yield schema.Example(image=data, image_id=name, height=size[0], width=size[1], captions=tuple(texts))


def _bytes(root, name):
  if storage.is_remote(root):
    fs, inside = storage.file_system(root)  # fsspec keeps one connection for all
    return fs.cat_file(f'{inside}/{name}')
  return pathlib.Path(root, name).read_bytes()


def _read_records(path, report, text_keys):
  for example in sources.read_shard(path, text_keys=text_keys):
    if not (example.height and example.width):
      size = images.check_image(example.image, report, name=example.image_id)
      if size is None:
        continue
      example = dataclasses.replace(example, height=size[0], width=size[1])
    yield example
