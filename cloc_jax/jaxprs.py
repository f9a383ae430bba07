"""Reads a traced program (a jaxpr): what it must move in memory and what its loops hold, before it is compiled."""
import math

import jax
from jax.extend import core

_PRODUCTS = ('dot_general', 'gather', 'scatter-add')


def _size(var) -> float:
  shape, dtype = getattr(var.aval, 'shape', ()), getattr(var.aval, 'dtype', None)
  return float(math.prod(shape) * getattr(dtype, 'itemsize', 0))


def _inner(eqn):
  for value in eqn.params.values():
    for x in value if isinstance(value, (tuple, list)) else (value,):
      if isinstance(x, core.ClosedJaxpr):
        yield x.jaxpr
      elif isinstance(x, core.Jaxpr):
        yield x


def _has_products(jaxpr) -> bool:
  return any(e.primitive.name in _PRODUCTS or any(map(_has_products, _inner(e))) for e in jaxpr.eqns)


def memory_bytes(jaxpr) -> float:
  """Bytes read and written if every matrix product and look-up moved its operands and results once, every loop what it
  hands from turn to turn (and, without products, what it reads in every turn, and its slices and results once), and
  all else were part of these."""
  total = 0.0
  for eqn in jaxpr.eqns:
    inside = sum(map(memory_bytes, _inner(eqn)))
    if eqn.primitive.name == 'scan':
      consts, carry = eqn.params['num_consts'], eqn.params['num_carry']
      inside += 2 * sum(map(_size, eqn.invars[consts:consts + carry]))
      if not any(map(_has_products, _inner(eqn))):
        inside += sum(map(_size, eqn.invars[:consts]))
        total += sum(map(_size, (*eqn.invars[consts + carry:], *eqn.outvars[carry:])))
      inside *= eqn.params['length']
    elif eqn.primitive.name in _PRODUCTS:
      inside += sum(map(_size, (*eqn.invars, *eqn.outvars)))
    total += inside
  return total


def loop_constants(jaxpr) -> float:
  """Bytes that are read in every turn of the loop that reads most so, floating-point alone: as much again is held for
  their gradients, summed turn by turn, while that loop runs backwards."""
  most = 0.0
  for eqn in jaxpr.eqns:
    most = max([most, *map(loop_constants, _inner(eqn))])
    if eqn.primitive.name == 'scan':
      read = eqn.invars[:eqn.params['num_consts']]
      most = max(most, sum(_size(v) for v in read if jax.numpy.issubdtype(v.aval.dtype, jax.numpy.floating)))
  return most
