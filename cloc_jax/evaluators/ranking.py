"""Ranks without the full similarity matrix, and what makes two texts the same text. Shared by the evaluators."""
import numpy as np

# Similarities closer than this are rounding noise of a float32 dot product of unit vectors: they count as equal, so
# that a tie does not depend on how a BLAS blocks its loops.
TIE = 1e-6
# Elements of the largest similarity block held at once: 64 MB of float32.
_BLOCK = 1 << 24

RECALL_AT = (1, 5, 10)


class NothingToMeasure(ValueError):
  """The predictions hold nothing that this evaluator could measure; the message says what is missing."""


def canonical(text: str) -> str:
  """The string by which two texts are the same text: lower-case, with white space collapsed."""
  return ' '.join(text.lower().split())


def distinct_texts(texts) -> tuple[np.ndarray, np.ndarray]:
  """Groups texts that are equal after `canonical`.

  Returns:
    (first, group): `first` (u,) int, where each distinct text occurs first, in order of appearance; `group` (n,) int,
    the distinct text that each text is.
  """
  number: dict[str, int] = {}
  first: list[int] = []
  group = np.empty(len(texts), np.int64)
  for i, text in enumerate(texts):
    key = canonical(text)
    if key not in number:
      number[key] = len(first)
      first.append(i)
    group[i] = number[key]
  return np.asarray(first, np.int64), group


def ranks(z_query, *, z_pool, query, item) -> np.ndarray:
  """How many wrong items of the pool come before the best right one, for every query: right in the top k iff rank < k.

  Ties are pessimistic: a wrong item that is as similar as the best right one comes before it. So a model that gives
  every input the same embedding scores 0, not chance. A query without a right item has the size of the pool as its
  rank, and so has one whose similarities are NaN. Memory is bounded: the similarities are computed in blocks.

  Args:
    z_query: (q, E) float32, L2-normalised.
    z_pool: (p, E) float32, L2-normalised.
    query, item: (r,) int, the pairs that are right: query[j] is answered by item[j]. In any order.

  Returns:
    (q,) int64.
  """
  query, item = np.asarray(query, np.int64), np.asarray(item, np.int64)
  order = np.argsort(query, kind='stable')
  query, item = query[order], item[order]
  size = len(z_pool)
  out = np.empty(len(z_query), np.int64)
  step = max(1, _BLOCK // max(1, size))
  for start in range(0, len(z_query), step):
    sim = z_query[start:start + step] @ z_pool.T
    lo, hi = np.searchsorted(query, [start, start + len(sim)])
    q, p = query[lo:hi] - start, item[lo:hi]
    best = np.full(len(sim), -np.inf, sim.dtype)
    with np.errstate(invalid='ignore'):
      np.maximum.at(best, q, sim[q, p])
    # "Not less" instead of "greater or equal": a NaN then counts against the query.
    ahead = ~(sim < (best - TIE)[:, None])
    ahead[q, p] = False
    rank = ahead.sum(1)
    out[start:start + step] = np.where(np.isfinite(best), rank, size)
  return out


def recalls(rank, *, name: str):
  """Yields (f'{name}_r{k}', the share of queries with a right item in the top k) for k in RECALL_AT."""
  for k in RECALL_AT:
    yield f'{name}_r{k}', float((rank < k).mean())


def nearest(z_query, *, z_pool) -> np.ndarray:
  """(q, E), (p, E) → (q,) int64: the most similar item of the pool; the first one where several are equal."""
  out = np.empty(len(z_query), np.int64)
  step = max(1, _BLOCK // max(1, len(z_pool)))
  for start in range(0, len(z_query), step):
    out[start:start + step] = (z_query[start:start + step] @ z_pool.T).argmax(1)
  return out
