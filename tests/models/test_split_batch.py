"""split_batch: with it no device of an FSDP mesh ever holds the activations of more than its own share of a batch."""
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cloc_jax import sharding
from cloc_jax.models import layers, vit

# Few images and large kernels: it is cheaper to collect the former than the latter. No other length here is one of the
# batch's, which would be mistaken for it.
B, SIDE, PATCH, WIDTH, DEVICES = 40, 24, 8, 64, 8
TOKENS = (SIDE // PATCH)**2 + 1  # and the class token
RULES = [('.*', 'fsdp')]


@pytest.fixture(name='mesh', params=[(1, 8), (2, 4)], ids=str)
def mesh_fixture(request):
  return sharding.make_mesh(data=request.param[0], fsdp=request.param[1])


def collected(mesh) -> set[str]:
  """Arrays in the compiled gradient of an image tower that hold the whole batch, or all of it along 'fsdp'."""
  tower = vit.ViT(variant=f'mu/{PATCH}', width=WIDTH, depth=1, heads=2, out_dim=32)
  image = jax.ShapeDtypeStruct((B, SIDE, SIDE, 3), np.float32)
  params = jax.eval_shape(tower.init, jax.random.key(0), image)

  def objective(params, image):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      pooled, tokens = tower.apply(params, image)
    return jnp.square(pooled).sum() + jnp.square(tokens).sum()

  split = sharding.tree_sharding(params, mesh, RULES)
  gradient = jax.jit(jax.grad(objective), in_shardings=(split, sharding.batch_sharding(mesh)), out_shardings=split)
  text = gradient.lower(params, image).compile().as_text()
  lengths = {array: set(map(int, re.findall(r'\d+', array[4:]))) for array in re.findall(r'f32\[[\d,]*\]', text)}
  assert f'f32[{B // DEVICES},{TOKENS},{WIDTH}]' in lengths  # the text is read as it is meant
  larger = {images * tokens for images in (B, B // mesh.shape['data']) for tokens in (1, TOKENS)}
  return {array for array, found in lengths.items() if found & larger}


def test_activations_stay_split(mesh, monkeypatch):
  assert not collected(mesh)
  # The control: without it, the compiler does collect them here.
  monkeypatch.setattr(layers, 'split_batch', lambda x: x)
  assert collected(mesh)


def test_it_says_how_the_leading_axis_is_split(mesh):
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    y = jax.jit(layers.split_batch, in_shardings=sharding.replicated(mesh))(np.ones((16, 3), np.float32))
  assert y.sharding.is_equivalent_to(sharding.batch_sharding(mesh), 2)


@pytest.mark.parametrize('shape', [(12, 3), (4, 8), (1,), (8 * 3 - 1, 2)])
def test_it_leaves_alone_what_the_devices_do_not_divide(mesh, shape):
  x = np.ones(shape, np.float32)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    assert layers.split_batch(x) is x


def test_it_does_nothing_without_a_mesh_or_on_a_single_device():
  x = np.ones((8, 3), np.float32)
  assert layers.split_batch(x) is x
  single = sharding.make_mesh(devices=jax.devices()[:1])
  with jax.sharding.use_abstract_mesh(single.abstract_mesh):
    assert layers.split_batch(x) is x


def test_inside_shard_map_the_share_is_the_devices_own(mesh):
  """There, 16 rows of 128 are not to be split again."""
  def share(x):
    assert layers.split_batch(x) is x and x.shape == (16, 3)
    return x
  batch = sharding.batch_sharding(mesh)
  jax.jit(jax.shard_map(share, mesh=mesh, in_specs=batch.spec, out_specs=batch.spec))(np.ones((128, 3), np.float32))
