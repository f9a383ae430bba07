"""Memory traffic and loops of traced programs, against sums done here."""
import jax
import jax.numpy as jnp
from jax import lax

from cloc_jax import jaxprs

A, B, STACK = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((8, 4), (4, 4), (5, 4, 4)))


def trace(fn, *args):
  return jax.make_jaxpr(fn)(*args).jaxpr


def test_products_move_operands_and_results():
  assert jaxprs.memory_bytes(trace(lambda a, b: jnp.sin(a @ b) + 1, A, B)) == 4 * (32 + 16 + 32)


def test_loops_move_what_they_hand_on():
  layers = lambda a, w: lax.scan(lambda a, w: (jnp.tanh(a @ w), None), a, w)[0]
  assert jaxprs.memory_bytes(trace(layers, A, STACK)) == 5 * 4 * (32 + 16 + 32 + 2 * 32)
  # A loop without products reads its constants in every turn, and each of its slices once.
  sums = lambda a, w: lax.scan(lambda s, w: (s + (a * w.sum()).sum(), None), 0.0, w)[0]
  assert jaxprs.memory_bytes(trace(sums, A, STACK)) == 5 * 4 * (32 + 2) + 4 * 5 * 16
  assert jaxprs.memory_bytes(trace(jax.jit(layers), A, STACK)) == jaxprs.memory_bytes(trace(layers, A, STACK))


def test_the_loop_that_reads_most():
  def fn(a, w, i):
    small = lax.map(lambda x: x.sum() + a.sum() + i.sum(), w)
    return small + lax.map(lambda x: (x.sum() * w).sum(), w)
  count = jax.ShapeDtypeStruct((1000,), jnp.int32)
  assert jaxprs.loop_constants(trace(fn, A, STACK, count)) == 4 * 5 * 16
  assert jaxprs.loop_constants(trace(lambda a, b: a @ b, A, B)) == 0
