"""Parameter trees: names, rules, differences, layouts."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cloc_jax import trees


def tree():
  return {'img': {'embedding': {'kernel': np.arange(6.0).reshape(2, 3)}, 'cls': np.ones(4)}, 't': np.float32(2)}


def test_flatten_names_leaves_and_unflatten_undoes_it():
  flat = trees.flatten(tree())
  assert set(flat) == {'img/embedding/kernel', 'img/cls', 't'}
  assert flat['img/cls'].shape == (4,)
  again = trees.unflatten(flat)
  assert jax.tree.structure(again) == jax.tree.structure(tree())
  jax.tree.map(np.testing.assert_array_equal, again, tree())


def test_flatten_names_list_items_and_fields():
  assert set(trees.flatten([{'a': 1}, (2, 3)])) == {'0/a', '1/0', '1/1'}


def test_map_with_path_gives_names_and_further_trees():
  got = trees.map_with_path(lambda path, x, y: (path, float(np.sum(x)), y), {'a': {'b': np.ones(3)}}, {'a': {'b': 7}})
  assert got == {'a': {'b': ('a/b', 3.0, 7)}}


def test_the_first_matching_rule_decides_and_matches_whole_paths():
  rules = [('img/.*/kernel', 'first'), ('img/.*', 'second'), ('.*', 'last')]
  assert trees.match_rules(tree(), rules, what='x') == {
      'img': {'embedding': {'kernel': 'first'}, 'cls': 'second'}, 't': 'last'}
  assert trees.match_rules({'at': 0, 't': 0}, [('t', 1), ('.*', 2)], what='x') == {'at': 2, 't': 1}


def test_paths_without_a_rule_are_named():
  message = r"mesh.rules: no rule matches \['img/cls', 't'\] \(2 parameters\); rules: \['.*kernel'\]"
  with pytest.raises(ValueError, match=message):
    trees.match_rules(tree(), [('.*kernel', 1)], what='mesh.rules')


def test_a_broken_rule_is_named():
  with pytest.raises(ValueError, match=r"mesh.rules: '\(img' is not a regular expression"):
    trees.match_rules(tree(), [('(img', 1)], what='mesh.rules')


def test_difference_says_missing_unexpected_and_reshaped():
  got = {'img': {'embeding': {'kernel': np.zeros((2, 3))}, 'cls': np.zeros(5)}, 't': np.float32(0), 'z': np.zeros(1)}
  assert trees.difference(tree(), got).splitlines() == [
      '! img/cls: expected (4,), got (5,)',
      '- img/embedding/kernel (2, 3)   (is it img/embeding/kernel?)',
      '+ img/embeding/kernel (2, 3)',
      '+ z (1,)']


def test_difference_of_equal_trees_is_empty_also_for_shapes():
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.float32), tree())
  assert trees.difference(shapes, tree()) == ''


def test_difference_is_cut_and_says_so():
  lines = trees.difference({}, {f'p{i:02}': np.zeros(1) for i in range(25)}, limit=20).splitlines()
  assert len(lines) == 21 and lines[-1] == '… and 5 more'


def test_merge_takes_values_into_the_expected_structure():
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.float32), tree())
  jax.tree.map(np.testing.assert_array_equal, trees.merge(shapes, tree(), where='file'), tree())


def test_merge_names_the_place_and_the_difference():
  with pytest.raises(ValueError, match=r'(?s)step 3: .*another architecture.*\n- img/cls \(4,\)'):
    trees.merge(tree(), {'img': {'embedding': tree()['img']['embedding']}, 't': np.float32(0)}, where='step 3')


def test_global_norm_and_count():
  pair = {'a': jnp.array([3.0, 0.0]), 'b': {'c': jnp.array([[4.0]], jnp.bfloat16)}}
  assert trees.global_norm(pair) == 5.0 and trees.global_norm(pair).dtype == jnp.float32
  assert trees.count(pair) == 3
  assert trees.count({'x': jax.ShapeDtypeStruct((2, 5), jnp.float32), 't': jax.ShapeDtypeStruct((), jnp.float32)}) == 11


LAYERS = 12  # two digits: sorting by name would misplace layer 10


def stacked():
  rng = np.random.default_rng(0)
  block = {'LayerNorm_0': {'scale': rng.normal(size=(LAYERS, 3))},
           'MlpBlock_0': {'Dense_0': {'kernel': rng.normal(size=(LAYERS, 3, 5))}}}
  return {'img': {'Transformer': {'encoderblock': block, 'encoder_norm': {'scale': np.ones(3)}}},
          'txt': {'Encoder_0': {'encoderblock': {'k': rng.normal(size=(2, 4))}}}, 't': np.float32(1)}


def test_scan_to_loop_names_every_layer():
  loop = trees.flatten(trees.scan_to_loop(stacked()))
  assert len(loop) == 2 * LAYERS + 2 + 2
  for layer in range(LAYERS):
    np.testing.assert_array_equal(
        loop[f'img/Transformer/encoderblock_{layer}/MlpBlock_0/Dense_0/kernel'],
        stacked()['img']['Transformer']['encoderblock']['MlpBlock_0']['Dense_0']['kernel'][layer])
  assert loop['txt/Encoder_0/encoderblock_1/k'].shape == (4,) and loop['t'] == 1


def test_loop_to_scan_is_its_inverse():
  again = trees.loop_to_scan(trees.scan_to_loop(stacked()))
  assert jax.tree.structure(again) == jax.tree.structure(stacked())
  jax.tree.map(np.testing.assert_array_equal, again, stacked())


def test_a_stack_without_one_of_its_layers_is_an_error():
  loop = trees.scan_to_loop(stacked())
  del loop['img']['Transformer']['encoderblock_3']
  with pytest.raises(ValueError, match=r'img/Transformer/encoderblock/.*: layers \[3\] are missing'):
    trees.loop_to_scan(loop)


@pytest.mark.parametrize('layer', [0, 5, LAYERS - 1])
def test_a_layer_that_lacks_one_parameter_is_an_error(layer):
  loop = trees.scan_to_loop(stacked())
  del loop['img']['Transformer'][f'encoderblock_{layer}']['LayerNorm_0']
  with pytest.raises(ValueError, match=rf'encoderblock/LayerNorm_0/scale: layers \[{layer}\] are missing'):
    trees.loop_to_scan(loop)
