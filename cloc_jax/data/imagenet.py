"""ImageNet and its variants as zero-shot tasks: their classes, CLIP's names and templates, and their folders.

tasks/imagenet.json holds the lists, with the source and licence of each.
"""
import csv
import dataclasses
import functools
import importlib.resources
import json
import os
import pathlib
import re

import numpy as np

from cloc_jax.data import imagefolder

TASKS = ('imagenet', 'imagenet-v2', 'imagenet-a', 'imagenet-r', 'imagenet-sketch')
_FLAT = 'ILSVRC2012_val_'  # how the files of the validation set's own archive begin
_ARRANGE = ('the archive of the validation set is flat; give its labels with --labels (LOC_val_solution.csv, or a text '
            'file of lines «FILE WNID», «FILE NUMBER», or one WNID for each file in order), or move each image into a '
            'folder of its WordNet id, as n01440764/ILSVRC2012_val_00000293.JPEG')


@dataclasses.dataclass(frozen=True)
class Task:
  """name: one of TASKS. protocol: with the version, 'imagenet@1'. images: how many the published set has.

  classes: folders, names and templates; for -A and -R of their 200 classes alone.
  """
  name: str
  protocol: str
  title: str
  images: int
  classes: imagefolder.ClassList


def read_task(name: str) -> Task:
  """One of TASKS. Raises ValueError on another name."""
  content = _content()
  if name not in content['tasks']:
    raise ValueError(f'task: expected one of {list(TASKS)}, got {name!r}')
  about = content['tasks'][name]
  wnids = content['subsets'].get(name, list(content['classes']))
  # Of ImageNet-v2 a folder's name is the class's number; as text, '10' would sort before '2'.
  folders = [str(i) for i in range(len(wnids))] if about['folders'] == 'number' else wnids
  return Task(name=name, protocol=f'{name}@{content["version"]}', title=about['title'], images=about['images'],
              classes=imagefolder.ClassList(folders=tuple(folders), names=tuple(content['classes'][w] for w in wnids),
                                            templates=tuple(content['templates'])))


def find(root: str | os.PathLike, task: Task, *, labels: str | os.PathLike | None = None, allow_missing: bool = False,
         limit: int | None = None) -> imagefolder.ImageFolder:
  """Finds a task's images: in `root`, or in the one folder within it that holds the classes' folders.

  Args:
    labels: of a flat folder of the validation set, see read_labels.
    allow_missing: classes and images may be fewer than published.
    limit: take so many images, spread evenly.

  Raises:
    FileNotFoundError, ValueError: saying which folders or images are missing or too many, and what is expected.
  """
  root = pathlib.Path(root)
  if not root.is_dir():
    raise FileNotFoundError(f'{root}: no such folder')
  if labels is None:
    base = _base(root, task, allow_missing=allow_missing)
    found = imagefolder.find(base, task.classes)
  else:
    found = _labelled(root, task, labels)
  if len(found.paths) > task.images or (len(found.paths) < task.images and not allow_missing):
    hint = ('; is this the training set?' if len(found.paths) > task.images else
            '; --allow-missing takes what there is, and says so beside every figure')
    raise ValueError(f'{root}: {task.title} has {task.images:,} images, found {len(found.paths):,}{hint}')
  return imagefolder.limited(dataclasses.replace(found, expected=task.images), limit)


def read_labels(path: str | os.PathLike, *, files: list[str]) -> dict[str, int]:
  """File name → class number (of 1 000), of the validation set.

  Args:
    path: Kaggle's LOC_val_solution.csv; or text with a line an image: «FILE WNID», «FILE NUMBER» (from 0, in the order
      of the WordNet ids), or the WNID alone, for the files in the order of their names.
    files: the images' names.

  Raises:
    FileNotFoundError, ValueError: naming file and line. Numbers alone, as the development kit's ground truth has them,
      are refused: they count the classes in an order of that kit's own.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f'{path}: no such file')
  lines = [line for line in path.read_text(encoding='utf-8').splitlines() if line.strip()]
  if lines and lines[0].startswith('ImageId,'):
    rows = [(f'{row["ImageId"]}.JPEG', row['PredictionString'].split()[0]) for row in csv.DictReader(lines)]
  else:
    split = [line.split() for line in lines]
    if all(len(words) == 1 for words in split):
      if all(words[0].isdecimal() for words in split):
        raise ValueError(f"{path}: numbers alone are the development kit's own class ids, which are not in the order "
                         'of the WordNet ids; expected those, or «FILE NUMBER» with numbers from 0 in their order')
      if len(split) != len(files):
        raise ValueError(f'{path}: {len(split)} lines for {len(files)} images; without file names expected as many')
      split = [[name, *words] for name, words in zip(sorted(files), split)]
    rows = [(words[0].rpartition('/')[2], words[-1]) for words in split]
  number = {wnid: i for i, wnid in enumerate(_content()['classes'])}
  out = {}
  for line, (name, label) in enumerate(rows, 1):
    if label.isdecimal() and int(label) < len(number):
      out[name] = int(label)
    elif label in number:
      out[name] = number[label]
    else:
      raise ValueError(f'{path}, entry {line}: expected a WordNet id of ImageNet or a number from 0 to '
                       f'{len(number) - 1}, got {label!r}')
  return out


@functools.cache
def _content() -> dict:
  return json.loads(importlib.resources.files('cloc_jax.data').joinpath('tasks/imagenet.json').read_text('utf-8'))


def _base(root, task, *, allow_missing) -> pathlib.Path:
  """The folder that holds the classes' folders; checks that these are the task's."""
  wanted = set(task.classes.folders)
  holding = [f for f in (root, *sorted(p for p in root.iterdir() if p.is_dir())) if wanted & _folders(f)]
  if root in holding:
    holding = [root]
  if not holding:
    if any(p.name.startswith(_FLAT) for p in root.iterdir()):
      raise ValueError(f'{root}: no class folders, but images beside each other: {_ARRANGE}')
    some = ', '.join(task.classes.folders[:3])
    raise ValueError(f'{root}: expected the {len(wanted)} class folders of {task.title} ({some}, …), found none')
  if len(holding) > 1:
    raise ValueError(f'{root}: {len(holding)} folders in it hold classes; give one: {", ".join(map(str, holding[:4]))}')
  base = holding[0]
  present = _folders(base)
  missing = [f for f in task.classes.folders if f not in present]
  extra = sorted(present - wanted)
  other = [t for t in TASKS if t != task.name and present == set(read_task(t).classes.folders)]
  if extra or (missing and not allow_missing):
    wrong = ((missing, 'class folders are missing'), (extra, 'are none of its classes'))
    what = '; '.join(f'{len(some)} {how}, such as {", ".join(some[:3])}' for some, how in wrong if some)
    hint = (f'. These are the folders of --task {" or ".join(other)}' if other else
            '' if extra else '; --allow-missing takes what there is')
    raise ValueError(f'{base}: expected the {len(wanted)} class folders of {task.title}: {what}{hint}')
  return base


def _folders(folder) -> set[str]:
  # An archive may bring folders of its own (.cache, __MACOSX) beside the classes; those of classes have these names.
  return {p.name for p in folder.iterdir() if p.is_dir() and re.fullmatch(r'n\d{8}|\d{1,3}', p.name)}


def _labelled(root, task, path) -> imagefolder.ImageFolder:
  if task.name != 'imagenet':
    raise ValueError(f"--labels is of ImageNet's own validation set; {task.name} comes in class folders")
  paths = sorted(p for p in root.iterdir() if p.is_file())
  images = [p for p in paths if p.suffix.lower() in imagefolder.EXTENSIONS]
  if not images:
    raise ValueError(f'{root}: no image beside {len(paths)} other files; --labels is for a flat folder')
  labels = read_labels(path, files=[p.name for p in images])
  unlabelled = [p.name for p in images if p.name not in labels]
  if unlabelled:
    raise ValueError(f'{path}: no label for {len(unlabelled)} images of {root}, such as {unlabelled[0]}')
  return imagefolder.ImageFolder(paths=tuple(images), labels=np.array([labels[p.name] for p in images], np.int64),
                                 other_files=len(paths) - len(images))
