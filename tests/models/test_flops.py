"""What remat computes again, by formula and counted in the traced gradient."""
import math

import jax
import jax.numpy as jnp
import pytest

from cloc_jax import jaxprs
from cloc_jax.models import flops, text, vit


def products(jaxpr):
  """FLOPs of all matrix products, loops as often as they run."""
  total = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'dot_general':
      (contracted, _), _ = eqn.params['dimension_numbers']
      total += 2 * math.prod(eqn.invars[0].aval.shape[i] for i in contracted) * eqn.outvars[0].aval.size
    times = eqn.params['length'] if eqn.primitive.name == 'scan' else 1
    total += times * sum(map(products, jaxprs._inner(eqn)))
  return total


def gradient_products(model, x):
  params = jax.eval_shape(model.init, jax.random.key(0), x)
  loss = lambda p, x: sum(jnp.sum(y) for y in jax.tree.leaves(model.apply(p, x)))
  return products(jax.make_jaxpr(jax.grad(loss))(params, x).jaxpr)


@pytest.mark.parametrize('remat', ['dots', 'full'])
@pytest.mark.parametrize('attention', ['einsum', 'dot_product_attention'])
def test_what_remat_computes_again(remat, attention):
  image = lambda r: gradient_products(
      vit.ViT(variant='mu/8', width=32, depth=3, heads=2, mlp_dim=96, pool='tok', posemb='learn', attention=attention,
              remat=r),
      jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))
  assert image(remat) - image('none') == flops.recomputed(tokens=17, width=32, depth=3, mlp_dim=96, remat=remat) > 0
  words = lambda r: gradient_products(
      text.TextTower(29, variant='mu', width=12, depth=2, heads=2, out_dim=8, attention=attention, remat=r),
      jax.ShapeDtypeStruct((1, 9), jnp.int32))
  assert words(remat) - words('none') == flops.recomputed(tokens=9, width=12, depth=2, mlp_dim=48, remat=remat) > 0


def test_all_sequences_of_an_image_count(make_model):
  model = make_model(image=dict(remat='dots'), text=dict(remat='full'))
  found = flops.step_recomputed(model, image_size=16, text_length=7, region_text_length=4, regions=3)
  blocks = lambda tokens: 8 * tokens * 12**2 + 4 * tokens**2 * 12 + 2 * tokens * 12 * 48
  assert found == 2 * 4 * 5**2 * 16 + blocks(7) + 3 * blocks(4)
