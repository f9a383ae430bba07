"""Experiment files, overrides from the command line, and calls that turn a misspelt key into a clear error."""
import ast
import contextlib
import difflib
import importlib.util
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import ml_collections

# Keys that may be set although an experiment's file does not name them.
_UNNAMED = ('model.init', 'model.init_parts', 'optim.multipliers', 'evals.floors')
SECTIONS = ('data', 'model', 'loss', 'optim', 'mesh', 'evals', 'checkpoint', 'train')


def nearest(name: str, options) -> str:
  """' Did you mean X?' when something is close, else ''."""
  found = difflib.get_close_matches(name, list(options), 1, 0.5)
  return f' Did you mean {found[0]!r}?' if found else ''


def load(spec: str, *, sections: Sequence[str] = SECTIONS) -> ml_collections.ConfigDict:
  """Reads 'configs/NAME.py' or 'configs/NAME.py:ARG'; ARG is handed to the file's get_config.

  `sections` are those that it must have; an experiment's, unless another verb has configs of its own.

  Raises:
    FileNotFoundError: naming the nearest file of the folder.
    ValueError: when the file has no get_config, or its sections are not ours.
  """
  path, _, arg = spec.partition(':')
  if not os.path.isfile(path):
    folder = os.path.dirname(path) or '.'
    here = [f for f in os.listdir(folder) if f.endswith('.py')] if os.path.isdir(folder) else []
    raise FileNotFoundError(f'config {path!r} not found.{nearest(os.path.basename(path), here)}'
                            + (f' {folder} holds {sorted(here)}' if here else ''))
  module_spec = importlib.util.spec_from_file_location('cloc_experiment', path)
  module = importlib.util.module_from_spec(module_spec)
  with _importable(os.path.dirname(os.path.abspath(path))):
    module_spec.loader.exec_module(module)
    if not hasattr(module, 'get_config'):
      raise ValueError(f'{path}: expected a function get_config(arg), found none')
    config = module.get_config(arg) if arg else module.get_config()
  check_sections(config, where=path, sections=sections)
  return config


@contextlib.contextmanager
def _importable(folder):
  """Experiments may import the files beside them, and two folders may each have, say, a recipe.py."""
  before = set(sys.modules)
  sys.path.insert(0, folder)
  try:
    yield
  finally:
    sys.path.remove(folder)
    for name in set(sys.modules) - before:
      if os.path.dirname(getattr(sys.modules[name], '__file__', None) or '') == folder:
        del sys.modules[name]


def check_sections(config: Mapping[str, Any], *, where: str, sections: Sequence[str] = SECTIONS) -> None:
  """Raises ValueError when a section is missing or unknown."""
  for name in config:
    if name not in sections:
      raise ValueError(f'{where}: unknown section {name!r}.{nearest(name, sections)} Sections: {sections}')
  missing = [name for name in sections if name not in config]
  if missing:
    raise ValueError(f'{where}: missing sections {missing}')


def override(config: ml_collections.ConfigDict, assignments: Sequence[str]) -> ml_collections.ConfigDict:
  """Applies 'section.key=value' in order, in place. Values are Python literals; text that is none stays text.

  Raises:
    KeyError: on a key that the config lacks, naming the nearest.
    TypeError: when the value is of another type than the default it replaces.
  """
  for assignment in assignments:
    key, equals, text = assignment.partition('=')
    if not equals:
      raise ValueError(f'--config.{assignment}: expected --config.{assignment}=VALUE')
    *parents, last = key.split('.')
    node = config
    for depth, parent in enumerate(parents):
      node = _child(node, parent, '.'.join(parents[:depth]))
      if not isinstance(node, ml_collections.ConfigDict):
        raise KeyError(f'--config.{key}: {".".join(parents[:depth + 1])} is a value, not a section')
    if key in _UNNAMED and last not in node:
      node[last] = _parse(text, None, key)
      continue
    old = _child(node, last, '.'.join(parents))
    node[last] = _parse(text, old, key)
  return config


def _child(node, name, where):
  if name not in node:
    at = f'{where}.' if where else ''
    raise KeyError(f'--config.{at}{name}: no such key.{nearest(name, node.keys())} Keys: {sorted(node.keys())}')
  return node[name]


def _parse(text, old, key):
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError):
    words = {'true': True, 'false': False} | ({} if isinstance(old, str) else {'none': None})  # remat='none' is a word
    value = words.get(text.lower(), text)
  if isinstance(old, ml_collections.ConfigDict):
    raise TypeError(f'--config.{key}: is a section, set one of its keys {sorted(old.keys())}')
  if isinstance(old, str) and not isinstance(value, (str, type(None))):
    value = text  # --config.data.path=123 names a folder
  if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
    value = float(value)
  if isinstance(old, (tuple, list)) and isinstance(value, (tuple, list)):
    value = type(old)(value)
  if old is not None and value is not None and type(value) is not type(old):
    raise TypeError(f'--config.{key}: expected {type(old).__name__} (now {old!r}), '
                    f'got {type(value).__name__} {text!r}')
  return value


def call(fn: Callable[..., Any], section: Mapping[str, Any], *args, name: str, **extra):
  """fn(*args, **section, **extra), after checking the section's keys against fn's keyword parameters.

  Raises:
    TypeError: see check_keys.
  """
  check_keys(fn, section, name=name, positional=len(args), given=extra)
  return fn(*args, **plain(section), **extra)


def check_keys(fn: Callable[..., Any], section: Mapping[str, Any], *, name: str, positional: int = 0,
               given: Iterable[str] = ()) -> None:
  """Whether fn can be called with a section beside the first `positional` arguments and those `given` by name.

  Raises:
    TypeError: naming the unknown or missing key as the user wrote it, and the nearest valid one.
  """
  given = set(given)
  parameters = list(inspect.signature(fn).parameters.values())
  known = [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)][positional:]
  allowed = [k for k in known if k not in given]
  open_ended = any(p.kind == p.VAR_KEYWORD for p in parameters)
  for key in section:
    if key not in allowed and not open_ended:
      raise TypeError(f'config.{name}.{key}: no such key.{nearest(key, allowed)} Keys: {allowed}')
  missing = [p.name for p in parameters if p.name in known and p.default is p.empty
             and p.name not in section and p.name not in given]
  if missing:
    raise TypeError(f'config.{name}: missing {missing}')


def plain(value):
  """ConfigDict → dictionaries, recursively; tuples stay tuples."""
  if isinstance(value, (ml_collections.ConfigDict, dict)):
    return {k: plain(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return type(value)(plain(v) for v in value)
  return value


def to_json(config) -> str:
  """The config as JSON text, for a checkpoint or a log."""
  return json.dumps(plain(config), indent=2, sort_keys=True)


def duration(section: Mapping[str, Any], name: str, *, batch_size: int, dataset_size: int | None = None) -> int:
  """Steps from whichever of NAME_steps, NAME_examples, NAME_epochs is set.

  Raises:
    ValueError: when none or more than one is set, or the value is not positive, or epochs of an unknown size.
  """
  found = {unit: section.get(f'{name}_{unit}') for unit in ('steps', 'examples', 'epochs')}
  found = {unit: value for unit, value in found.items() if value is not None}
  if len(found) != 1:
    raise ValueError(f'expected one of {name}_steps, {name}_examples, {name}_epochs, got {found or "none"}')
  (unit, value), = found.items()
  if value <= 0:
    raise ValueError(f'{name}_{unit}: expected a positive number, got {value}')
  if unit == 'steps':
    return int(value)
  if unit == 'epochs':
    if not dataset_size:
      raise ValueError(f'{name}_epochs: the size of the data set is unknown; give {name}_steps')
    value *= dataset_size
  return max(1, round(value / batch_size))


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
  """Separates --config.KEY=VALUE (and --config.KEY VALUE) from other arguments: (assignments, the others)."""
  assignments, others = [], []
  rest = iter(argv)
  for arg in rest:
    found = re.fullmatch(r'--config\.([^=]+)(=.*)?', arg, re.S)
    if not found:
      others.append(arg)
    elif found[2] is not None:
      assignments.append(found[1] + found[2])
    else:
      value = next(rest, None)
      assignments.append(found[1] + ('' if value is None else f'={value}'))
  return assignments, others
