"""How a data set is named: a folder made by `cloc data`, or files in another format that are read as they are.

'runs/coco'                                                  a folder
'coco:images=DIR,instances=FILE.json,captions=FILE.json'     a text, for a command line
{'format': 'coco', 'images': 'DIR', …}                       the same, for a config file
'jsonl:FILE.jsonl', 'webdataset:DIR/*.tar'                   the main files need no key

With {split} in the paths there is a split for every name that fits; else there is one, called `split` ('train').
"""
from collections.abc import Mapping
import dataclasses
import difflib
import os
import re
from typing import Any

from cloc_jax.data import storage

# Format → its options, the main one first; those of _PATHS and _FILES are made absolute or are URLs, _FILES may be several.
_COCO = ('instances', 'images', 'panoptic', 'captions', 'stuff', 'trust_boxes', 'allow_missing', 'split')
OPTIONS = {
    'coco': _COCO,
    'lvis': tuple(name for name in _COCO if name not in ('panoptic', 'stuff')),
    'objects365': tuple(name for name in _COCO if name not in ('panoptic', 'stuff', 'captions')),
    'jsonl': ('rows', 'images', 'boxes', 'trust_boxes', 'allow_missing', 'split'),
    'webdataset': ('tars', 'caption_keys', 'split'),
    'grit': ('tars', 'caption_keys', 'phrases', 'trust_boxes', 'split'),
}
_FILES = {'rows', 'tars'}
_PATHS = {'images', 'instances', 'panoptic', 'captions'} | _FILES
_FLAGS = {'stuff', 'trust_boxes', 'allow_missing'}
_PLACEHOLDER = '{split}'


Data = str | os.PathLike | Mapping[str, Any]  # what names a data set


@dataclasses.dataclass(frozen=True)
class Spec:
  """Files read as they are. options: as given, checked, with absolute paths; several files joined by commas."""
  format: str
  options: Mapping[str, str | bool]

  def __str__(self):
    text = lambda value: str(value).lower() if isinstance(value, bool) else value
    return f'{self.format}:' + ','.join(f'{key}={text(value)}' for key, value in self.options.items())

  def __hash__(self):
    return hash(str(self))

  @property
  def main(self) -> str:
    """The option that names the files of annotations."""
    first = OPTIONS[self.format][0]
    return next((name for name in (first, 'panoptic', 'captions') if name in self.options), first)

  def splits(self) -> dict[str, dict[str, str | bool]]:
    """Split → the options with its name filled in, without 'split'.

    Raises:
      FileNotFoundError: nothing fits the paths' {split}.
    """
    options = {key: value for key, value in self.options.items() if key != 'split'}
    if not any(_PLACEHOLDER in value for value in options.values() if isinstance(value, str)):
      return {self.options.get('split', 'train'): options}
    if _PLACEHOLDER not in options[self.main]:
      raise ValueError(f'{self}: {_PLACEHOLDER} stands in some paths, but not in {self.main!r}')
    names = sorted({name for pattern in options[self.main].split(',') for name in _fitting(pattern)},
                   key=lambda name: (name != 'train', name))
    if not names:
      raise FileNotFoundError(f'no file fits {options[self.main]}')
    fill = lambda value, name: value.replace(_PLACEHOLDER, name) if isinstance(value, str) else value
    return {name: {key: fill(value, name) for key, value in options.items()} for name in names}


def parse(data: Data) -> Spec | None:
  """What names a data set → a Spec, or None for a folder.

  Raises:
    ValueError: on an unknown format, an unknown or missing option, naming the nearest.
  """
  if isinstance(data, Mapping):
    options = dict(data)
    if 'format' not in options:
      raise ValueError(f"data set {options!r:.120}: expected a folder, a text, or a dictionary with 'format', one of "
                       f'{list(OPTIONS)}')
    return _checked(options.pop('format'), options, where=f'data set of format {data["format"]!r}')
  text = os.fspath(data)
  kind, colon, rest = text.partition(':')
  if not colon or rest.startswith('//') or os.path.exists(text) or not re.fullmatch(r'[\w-]+', kind):
    if text.endswith(('.jsonl', '.tar')) and os.path.isfile(text):
      raise ValueError(f'{text} is a file: to read it as it is, write {"jsonl" if text.endswith("l") else "webdataset"}'
                       f':{text}')
    return None
  options = {}
  # A comma separates options where KEY= follows; others belong to lists of files.
  for part in re.split(r',(?=[a-z_0-9]+=)', rest):
    key, equals, value = part.partition('=')
    if not equals or not re.fullmatch(r'[a-z_0-9]+', key):
      key, value = OPTIONS.get(kind, ('',))[0], part
    if key in options:
      raise ValueError(f'{text}: {key!r} is there twice')
    options[key] = value
  return _checked(kind, options, where=text)


def text(data: Data) -> str:
  """What is written about a data set: a folder as given, else the text of the spec."""
  spec = parse(data)
  return os.fspath(data) if spec is None else str(spec)


def absolute(data: Data) -> str:
  """A text that names the same data set from anywhere on this machine."""
  spec = parse(data)
  if spec is not None or storage.is_url(data):
    return text(data)
  return os.path.realpath(os.path.expanduser(data))


def short_name(data: Data) -> str:
  """A name for files and folders about a data set: its folder's, or that of its first file of annotations."""
  spec = parse(data)
  path = os.fspath(data) if spec is None else spec.options[spec.main].split(',')[0]
  name = os.path.basename(os.path.abspath(path))
  return name if spec is None else f'{spec.format}-' + re.sub(r'[^\w.-]+', '_', name.rsplit('.', 1)[0]).strip('_')


def _checked(kind, options, *, where):
  if kind not in OPTIONS:
    near = difflib.get_close_matches(str(kind), OPTIONS, n=1)
    raise ValueError(f'{where}: no such folder, and no format {kind!r} that is read as it is'
                     + (f'; did you mean {near[0]!r}?' if near else '') + f'; formats: {list(OPTIONS)}')
  out = {}
  for key, value in options.items():
    if key not in OPTIONS[kind]:
      near = difflib.get_close_matches(key, OPTIONS[kind], n=1)
      raise ValueError(f'{where}: {kind} has no option {key!r}' + (f'; did you mean {near[0]!r}?' if near else '')
                       + f'; options: {list(OPTIONS[kind])}')
    if value is not None:
      out[key] = _value(key, value, where=where)
  needed = {'tars'} if 'tars' in OPTIONS[kind] else {'rows'} if kind == 'jsonl' else {'images'}
  if 'instances' in OPTIONS[kind] and not (kind == 'coco' and out.keys() & {'panoptic', 'captions'}):
    needed.add('instances')
  if needed - out.keys():
    raise ValueError(f'{where}: {kind} needs {sorted(needed - out.keys())}; got {sorted(out)}')
  # One order, so that equal data sets have equal texts.
  return Spec(kind, {key: out[key] for key in OPTIONS[kind] if key in out})


def _value(key, value, *, where):
  if key in _FLAGS:
    known = {'true': True, '1': True, 'false': False, '0': False}
    if str(value).lower() not in known:
      raise ValueError(f'{where}: {key}: expected true or false, got {value!r}')
    return known[str(value).lower()]
  several = isinstance(value, (list, tuple))
  values = [os.fspath(v) for v in value] if several else [os.fspath(value)]
  if several and key not in _FILES | {'caption_keys'}:
    raise ValueError(f'{where}: {key}: expected one, got {value!r}')
  if not all(values):
    raise ValueError(f'{where}: {key} is empty')
  if key in _PATHS:
    # Within a text, files are separated by commas.
    values = [part for v in values for part in (v.split(',') if key in _FILES else [v])]
    values = [v if storage.is_url(v) else os.path.abspath(os.path.expanduser(v)) for v in values]
  return ','.join(values)


def _fitting(pattern):
  """The split names for which a path with {split}, and perhaps * and ?, exists."""
  first, *others = pattern.split(_PLACEHOLDER)
  regex = {'*': '[^/]*', '?': '[^/]'}
  escaped = lambda text: ''.join(regex.get(c, re.escape(c)) for c in text)
  wanted = escaped(first) + r'([A-Za-z]\w*?)' + r'\1'.join(escaped(part) for part in others)
  try:
    paths = storage.expand(pattern.replace(_PLACEHOLDER, '*'))
  except FileNotFoundError:
    return
  for path in paths:
    found = re.fullmatch(wanted, path)
    if found:
      yield found[1]
