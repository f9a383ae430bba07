"""Plain folders of images, one folder a class, as torchvision's ImageFolder and VTAB's copies lay them out."""
import concurrent.futures
import dataclasses
import difflib
import json
import logging
import os
import pathlib
from collections.abc import Iterator

import numpy as np

from cloc_jax.data import transforms

# As torchvision.datasets.folder.IMG_EXTENSIONS.
EXTENSIONS = {'.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif', '.tiff', '.webp'}
_SPLITS = {'train', 'training', 'val', 'valid', 'validation', 'test', 'testing'}
_THREADS = 8
_log = logging.getLogger('cloc_jax.data')


@dataclasses.dataclass(frozen=True)
class ClassList:
  """folders: of the classes, in the order of the labels. names: what each is called in the prompts."""
  folders: tuple[str, ...]
  names: tuple[str, ...]
  templates: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ImageFolder:
  """paths: of the images, class by class, each class sorted. labels: (n,) int64. other_files: are no images; or images
  beside the classes' folders.

  expected: how many images the published set has; None where that is not known.
  """
  paths: tuple[pathlib.Path, ...]
  labels: np.ndarray
  other_files: int
  expected: int | None = None

  def share(self, index: int, *, of: int) -> 'ImageFolder':
    """Every `of`-th image from `index` on: one host's, of several that take turns."""
    return dataclasses.replace(self, paths=self.paths[index::of], labels=self.labels[index::of])


def read_classes(root: str | os.PathLike, path: str | os.PathLike | None, *,
                 templates: tuple[str, ...]) -> ClassList:
  """The classes of a folder.

  Args:
    root: the folder of the classes' folders.
    path: JSON: {"classes": {FOLDER: NAME, …}, "templates": ["a photo of a {}.", …]}; either may be left out. Without
      "classes", or without the file, the names are the folders' with _ and - read as spaces.
    templates: where the file has none.

  Raises:
    FileNotFoundError, ValueError: naming the file, the key and the nearest folder.
  """
  root = pathlib.Path(root)
  if not root.is_dir():
    raise FileNotFoundError(f'{root}: no such folder')
  folders = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith('.'))
  if not folders:
    raise ValueError(f'{root}: expected a folder for each class, found none')
  if path is None and set(map(str.lower, folders)) <= _SPLITS:
    raise ValueError(f'{root}: holds {folders}, which are splits and no classes: give one of these folders')
  content = {}
  if path is not None:
    try:
      content = json.loads(pathlib.Path(path).read_text(encoding='utf-8'))
    except ValueError as error:
      raise ValueError(f'{path}: expected JSON: {error}') from error
    unknown = sorted(set(content) - {'classes', 'templates'}) if isinstance(content, dict) else [type(content).__name__]
    if unknown:
      raise ValueError(f'{path}: expected an object with "classes" and "templates", got {unknown[:5]}')
  names = content.get('classes', {f: f.replace('_', ' ').replace('-', ' ') for f in folders})
  templates = tuple(content.get('templates', templates))
  if not isinstance(names, dict) or not all(isinstance(n, str) and n for n in names.values()):
    raise ValueError(f'{path}: classes: expected an object of folder → name')
  for folder in names:
    if folder not in folders:
      near = difflib.get_close_matches(folder, folders, 1, 0)[0]
      raise ValueError(f'{path}: class {folder!r} has no folder in {root}; the nearest is {near!r}')
  extra = [f for f in folders if f not in names]
  if extra:
    raise ValueError(f'{root}: {len(extra)} folders are no class of {path}, such as {extra[:3]}')
  return ClassList(folders=tuple(names), names=tuple(names.values()), templates=templates)


def find(root: str | os.PathLike, classes: ClassList, *, limit: int | None = None) -> ImageFolder:
  """Finds the images, in folders inside a class's folder too.

  Args:
    limit: take so many, spread evenly over the whole list.

  Raises:
    ValueError: if there is no image.
  """
  paths, labels = [], []
  others = sum(p.suffix.lower() in EXTENSIONS and p.is_file() for p in pathlib.Path(root).iterdir())
  for label, folder in enumerate(classes.folders):
    for path in sorted(p for p in (pathlib.Path(root) / folder).rglob('*') if p.is_file()):
      if path.suffix.lower() in EXTENSIONS:
        paths.append(path)
        labels.append(label)
      else:
        others += 1
  if not paths:
    raise ValueError(f'{root}: no image in the folders of {len(classes.folders)} classes; {others} other files')
  return limited(ImageFolder(paths=tuple(paths), labels=np.array(labels, np.int64), other_files=others), limit)


def limited(folder: ImageFolder, limit: int | None) -> ImageFolder:
  """So many of the images, spread evenly over the whole list; None or more than there are: all."""
  if limit is None or limit >= len(folder.paths):
    return folder
  kept = np.arange(limit) * len(folder.paths) // limit
  return dataclasses.replace(folder, paths=tuple(folder.paths[i] for i in kept), labels=folder.labels[kept],
                             expected=None)


def batches(folder: ImageFolder, *, batch_size: int, image_size: int, pad: str,
            on_error: str = 'raise') -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields ((B, S, S, 3) uint8 canvases, (B,) bool which of them are images): the last batch is filled up with zeros.

  Args:
    on_error: a file that cannot be decoded stops the evaluation ('raise') or is logged and False ('mask').

  Raises:
    transforms.ImageError: naming the file that cannot be decoded.
  """
  if on_error not in ('mask', 'raise'):
    raise ValueError(f"on_error: expected 'mask' or 'raise', got {on_error!r}")

  def load(path):
    try:
      image = transforms.decode(path.read_bytes(), where=str(path))
    except transforms.ImageError as error:
      if on_error == 'raise':
        raise transforms.ImageError(f'{error}; --allow-missing leaves such images out, and counts them') from error
      _log.warning('%s; left out', error)
      return None
    return transforms.prepare_image(image, image_size=image_size, pad=pad)[0]

  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    for start in range(0, len(folder.paths), batch_size):
      canvases = list(pool.map(load, folder.paths[start:start + batch_size]))
      images = np.zeros((batch_size, image_size, image_size, 3), np.uint8)
      valid = np.zeros(batch_size, bool)
      for i, canvas in enumerate(canvases):
        if canvas is not None:
          images[i], valid[i] = canvas, True
      yield images, valid
