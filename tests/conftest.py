"""Strict JAX on simulated devices, the tiny model that many tests share, and the folder of real photos.

Strict: an operation that would silently add axes to an operand is an error, and so (pytest.ini) is every warning.
"""
import gc
import os
import pathlib
import subprocess
import sys


def _compiler_flags() -> str:
  """XLA's cheapest compilation; the processes of a test session that are started later take it from the environment."""
  # Tests compile hundreds of tiny programs and run each a few times: LLVM's optimizer would cost more than all the rest.
  flags = '--xla_backend_optimization_level=0'
  # XLA's older code for fused operations compiles in two thirds of the time. It may go one day: XLA ends a process that
  # asks for what it does not know.
  more = f'{flags} --xla_cpu_use_fusion_emitters=false'
  known = subprocess.run([sys.executable, '-c', 'import jax; jax.devices()'], capture_output=True,
                         env={**os.environ, 'XLA_FLAGS': more})
  return flags if known.returncode else more


os.environ.setdefault('JAX_PLATFORMS', 'cpu')  # before jax is imported; set it to run these tests elsewhere
if 'XLA_FLAGS' not in os.environ:
  os.environ['XLA_FLAGS'] = _compiler_flags()
# Products of tiny matrices: torch's threads would wait for one another, and for those of the other workers.
os.environ.setdefault('OMP_NUM_THREADS', '1')

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

# Tracing makes and drops small objects by the million, among millions that stay: to look for cycles takes long here.
gc.set_threshold(50_000, 20, 100)
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')

VOCABULARY = 29
EOS = 1
IMAGE_SIZE = 16


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config):
  """--dist loadfile gives out files in the order below, not those with most tests first."""
  config.option.loadscopereorder = False


def pytest_collection_modifyitems(config, items):
  """For several workers, files with slow tests come first: none of them is left for a worker alone at the end."""
  if hasattr(config, 'workerinput'):
    slow = {item.path for item in items if item.get_closest_marker('slow')}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(name='coco_mini', scope='session')
def coco_mini_fixture():
  """The folder of a few hundred real COCO photos beside the repository; skips where there is none."""
  path = pathlib.Path(__file__).resolve().parents[2] / 'shared' / 'coco_mini'
  if not path.is_dir():
    pytest.skip(f'no photos at {path}')
  return path


def make_model(*, image=None, text=None, **overrides):
  """A Cloc of some thousand parameters; `image` and `text` are merged into the towers' settings."""
  from cloc_jax.models import cloc  # tests of the data side need no Flax
  defaults = dict(
      image=dict(variant='mu/8', width=16, depth=2, heads=2, act='gelu_tanh') | (image or {}),
      text=dict(vocab_size=VOCABULARY, variant='mu', width=12, depth=1, heads=2, max_length=9, eos_id=EOS)
      | (text or {}),
      embed_dim=8)
  return cloc.Cloc(**{**defaults, **overrides})


def _tokens(rng, *shape):
  """Random words, an end token at a random place but the first, and padding (0) behind it."""
  ids = rng.integers(2, VOCABULARY, shape)
  end = rng.integers(1, shape[-1], shape[:-1])[..., None]
  at = np.arange(shape[-1]).reshape((1,) * (len(shape) - 1) + (-1,))
  return np.where(at < end, ids, np.where(at == end, EOS, 0)).astype(np.int32)


def make_batch(seed=0, *, images=8, regions=3, length=7, region_length=4, image_size=IMAGE_SIZE):
  """A random host Batch: image 1 has no regions, image 2 some, one region text is there twice, all images captioned."""
  from cloc_jax.batch import Batch
  rng = np.random.default_rng(seed)
  corners = np.sort(rng.random((images, regions, 2, 2)), 2).astype(np.float32)
  region_text = _tokens(rng, images, regions, region_length)
  region_text[-1, 0] = region_text[0, 0]
  region_mask = np.ones((images, regions), bool)
  region_mask[1] = False
  if images > 2:
    region_mask[2, 1:] = False
  return Batch(
      image=rng.integers(0, 256, (images, image_size, image_size, 3)).astype(np.uint8),
      image_mask=np.ones((images,), bool),
      text=_tokens(rng, images, length),
      boxes=corners.reshape(images, regions, 4),
      region_text=region_text,
      region_mask=region_mask)


def randomize(tree, seed=0, *, scale=0.3):
  """Normal noise in the shapes of `tree`, float32 NumPy: no bias is 0 and no gain is 1, where a mistake could hide."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: (scale * rng.normal(size=x.shape)).astype(np.float32), tree)


@pytest.fixture(name='make_model', scope='session')
def make_model_fixture():
  return make_model


@pytest.fixture(name='make_batch', scope='session')
def make_batch_fixture():
  return make_batch


@pytest.fixture(name='randomize', scope='session')
def randomize_fixture():
  return randomize


@pytest.fixture(name='base', scope='session')
def base_fixture(tmp_path_factory):
  """Where tiny_experiment keeps what is made once a test session."""
  return tmp_path_factory.getbasetemp()


@pytest.fixture(name='reference', scope='session')
def reference_fixture(base):
  """One undisturbed run in a process of its own (tiny_experiment.Run)."""
  import tiny_experiment
  run = tiny_experiment.run(base)
  assert run.finished.status == 0, run.finished.err
  return run
