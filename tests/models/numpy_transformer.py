"""Transformers in float64 NumPy, one head, one query and one image at a time, from big_vision's parameter names.

Nothing of the project is used but parameter values; the field's papers are the specification.
"""
import math

import jax
import numpy as np


def as64(tree):
  return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


_erf = np.vectorize(math.erf)
ACTS = {
    'gelu_tanh': lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    'gelu': lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2))),
    'quick_gelu': lambda x: x / (1 + np.exp(-1.702 * x)),
}


def layer_norm(x, p, eps=1e-5):
  mean = x.mean(-1, keepdims=True)
  variance = ((x - mean)**2).mean(-1, keepdims=True)
  return (x - mean) / np.sqrt(variance + eps) * p['scale'] + p['bias']


def softmax(x):
  e = np.exp(x - x.max())
  return e / e.sum()


def attention(queries, keys, p, *, causal=False):
  """(n, D), (m, D) → (n, D): heads and queries one by one."""
  _, heads, size = p['query']['kernel'].shape
  out = np.tile(p['out']['bias'], (len(queries), 1))
  for h in range(heads):
    q, k, v = (x @ p[name]['kernel'][:, h] + p[name]['bias'][h]
               for name, x in (('query', queries), ('key', keys), ('value', keys)))
    for i in range(len(queries)):
      seen = i + 1 if causal else len(keys)
      weights = softmax(np.array([q[i] @ k[j] for j in range(seen)]) / math.sqrt(size))
      out[i] += sum(weights[j] * v[j] for j in range(seen)) @ p['out']['kernel'][h]
  return out


def dense(x, p):
  return x @ p['kernel'] + p.get('bias', 0.0)


def mlp(x, p, act):
  return dense(ACTS[act](dense(x, p['Dense_0'])), p['Dense_1'])


def block(x, p, *, act='gelu_tanh', causal=False):
  """Pre-norm: attention, then MLP, both added to what came in."""
  y = layer_norm(x, p['LayerNorm_0'])
  x = x + attention(y, y, p['MultiHeadDotProductAttention_0'], causal=causal)
  return x + mlp(layer_norm(x, p['LayerNorm_1']), p['MlpBlock_0'], act)


def encoder(x, p, *, act='gelu_tanh', causal=False):
  depth = len(jax.tree.leaves(p['encoderblock'])[0])
  for layer in range(depth):
    x = block(x, jax.tree.map(lambda leaf, layer=layer: leaf[layer], p['encoderblock']), act=act, causal=causal)
  return layer_norm(x, p['encoder_norm'])


def patches(image, p):
  """(H, W, 3) → (N, D): every patch against the kernel, row by row."""
  kernel = p['kernel']
  size = len(kernel)
  rows = []
  for y in range(0, image.shape[0], size):
    for x in range(0, image.shape[1], size):
      rows.append(np.einsum('hwc,hwcd->d', image[y:y + size, x:x + size], kernel))
  return np.array(rows) + p.get('bias', 0.0)


def map_head(x, p, *, act='gelu_tanh'):
  y = attention(p['probe'][0], x, p['MultiHeadDotProductAttention_0'])
  return (y + mlp(layer_norm(y, p['LayerNorm_0']), p['MlpBlock_0'], act))[0]
