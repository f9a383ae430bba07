"""Text tower against a NumPy transformer, and against what it may and may not see."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_transformer as twin
import pytest

from cloc_jax import trees
from cloc_jax.models import text

EOS = 1
TOKENS = np.array([[5, 7, 3, EOS, 0, 0], [4, EOS, 0, 0, 0, 0], [9, 8, 7, 6, 5, EOS], [2, 2, 8, 6, 4, 9]], np.int32)
ENDS = [3, 1, 5, 5]  # the last text was cut: it has no end token
TINY = dict(vocab_size=11, variant='mu', width=16, depth=2, heads=2, max_length=8, eos_id=EOS, out_dim=5)


@functools.cache
def build(**settings):
  model = text.TextTower(**{**TINY, **settings})
  shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)['params']
  rng = np.random.default_rng(1)
  params = trees.map_with_path(
      lambda path, x: (0.25 * rng.normal(size=x.shape) + path.endswith('scale')).astype(np.float32), shapes)
  return jax.jit(model.apply), params


def embed(tokens, **settings):
  apply, params = build(**settings)
  return np.asarray(apply({'params': params}, tokens))


@pytest.mark.parametrize('pool', text.POOLS)
@pytest.mark.parametrize('attention', ['einsum', 'dot_product_attention'])
def test_it_is_the_numpy_transformer(pool, attention):
  p = twin.as64(build(pool=pool)[1])
  got = embed(TOKENS, pool=pool, attention=attention)
  for i, tokens in enumerate(TOKENS):
    x = p['Embed_0']['embedding'][tokens] + p['pos_embedding'][0, :len(tokens)]
    x = twin.encoder(x, p['Encoder_0'], causal=pool == 'eos')
    want = twin.dense(x[ENDS[i] if pool == 'eos' else -1], p['head'])
    np.testing.assert_allclose(got[i], want, rtol=1e-4, atol=2e-5)
  assert ('bias' in p['head']) == (pool == 'last')  # SigLIP's projection has a bias, CLIP's has none


def test_nothing_behind_the_end_token_is_seen():
  changed = TOKENS.copy()
  rng = np.random.default_rng(0)
  for row, end in enumerate(ENDS):
    changed[row, end + 1:] = rng.integers(0, 11, TOKENS.shape[1] - end - 1)  # further end tokens among them
  assert (changed != TOKENS).any() and (changed[0, 4:] != 0).any()
  np.testing.assert_array_equal(embed(changed), embed(TOKENS))


def test_everything_up_to_the_end_token_is_seen():
  z = embed(TOKENS)
  for position in range(4):
    changed = TOKENS.copy()
    changed[0, position] = 10
    if position == 3:
      changed[0, 4] = EOS  # moves the end
    assert np.abs(embed(changed)[0] - z[0]).max() > 1e-3


def test_the_order_of_words_matters():
  swapped = TOKENS[:, [1, 0, 2, 3, 4, 5]]
  assert np.abs(embed(swapped)[0] - embed(TOKENS)[0]).max() > 1e-3


def test_less_padding_gives_the_same_embedding():
  np.testing.assert_allclose(embed(TOKENS[:2, :4]), embed(TOKENS)[:2], rtol=1e-5, atol=1e-5)
  longer = np.pad(TOKENS[:3], ((0, 0), (0, 2)))
  np.testing.assert_allclose(embed(longer), embed(TOKENS)[:3], rtol=1e-5, atol=1e-5)


def test_last_looks_both_ways_and_at_the_padding():
  z = embed(TOKENS, pool='last')
  for position in range(TOKENS.shape[1]):
    changed = TOKENS.copy()
    changed[1, position] = 10
    other = embed(changed, pool='last')
    assert np.abs(other[1] - z[1]).max() > 1e-4
    np.testing.assert_allclose(np.delete(other, 1, 0), np.delete(z, 1, 0), rtol=1e-5, atol=1e-6)
  # The first token's state depends on later ones: a causal tower of the same parameters disagrees.
  assert np.abs(embed(TOKENS[2:3], pool='last') - embed(TOKENS[2:3])).max() > 1e-3


def test_end_position_is_the_first_end_token_or_the_last_place():
  np.testing.assert_array_equal(text.end_position(TOKENS, eos_id=EOS), ENDS)
  twice = np.array([[3, EOS, 4, EOS], [EOS, EOS, EOS, EOS]], np.int32)
  np.testing.assert_array_equal(text.end_position(twice, eos_id=EOS), [1, 0])
  np.testing.assert_array_equal(text.end_position(twice, eos_id=4), [2, 3])


@pytest.mark.parametrize('name, sizes', [('B', (512, 12, 8)), ('L', (768, 12, 12)), ('H', (1024, 24, 16))])
def test_sizes_are_the_papers(name, sizes):
  assert text.decode_variant(name) == sizes


def test_the_base_tower_has_as_many_parameters_as_openais():
  model = text.TextTower(vocab_size=49408)
  shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 77), jnp.int32))
  # CLIP ViT-B/16 is published with 149 620 737 in all: 86 192 640 are the image tower's, one is the temperature.
  assert trees.count(shapes) == 149_620_737 - 86_192_640 - 1


def test_bfloat16_is_honoured_on_float32_parameters():
  model = text.TextTower(**TINY, dtype=jnp.bfloat16)
  out, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), TOKENS)
  assert out.dtype == jnp.bfloat16
  assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
  exact, rough = embed(TOKENS), embed(TOKENS, dtype=jnp.bfloat16).astype(np.float32)
  assert 0 < np.abs(exact - rough).max() < 0.05 * np.abs(exact).max()


def test_errors_name_what_is_wrong():
  with pytest.raises(ValueError, match='text: 9 tokens, but this tower has 8 positions'):
    embed(np.zeros((1, 9), np.int32))
  with pytest.raises(ValueError, match="text pool: expected one of .*'eos'.* got 'mean'"):
    build(pool='mean')
  with pytest.raises(ValueError, match="text variant: expected one of .* got 'XL'"):
    text.decode_variant('XL')
