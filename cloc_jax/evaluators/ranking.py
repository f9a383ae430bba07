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


def distinct_boxes(image, boxes) -> tuple[np.ndarray, np.ndarray]:
  """Groups boxes of one image that are the same: RefCOCO has a region for each sentence, GRIT for each expression.

  Args:
    image: (n,) int. boxes: (n, 4).

  Returns:
    (first, group): as distinct_texts.
  """
  key = np.column_stack([np.asarray(image, np.float64), boxes])
  _, first, group = np.unique(key, axis=0, return_index=True, return_inverse=True)
  order = np.argsort(first)
  number = np.empty(len(first), np.int64)
  number[order] = np.arange(len(first))
  return first[order], number[group.reshape(-1)]


def ranks(z_query, *, z_pool, query, item) -> np.ndarray:
  """How many wrong items of the pool come before the best right one, for every query: right in the top k iff rank < k.

  Ties are pessimistic: a wrong item that is as similar as the best right one comes before it. So a model that gives
  every input the same embedding scores 0, not chance. A query without a right item has the size of the pool as its
  rank, and so has one whose similarities are NaN. Memory is bounded: the similarities are computed and counted in
  blocks of queries by items, of which one is held.

  Args:
    z_query: (q, E) float32, L2-normalised.
    z_pool: (p, E) float32, L2-normalised.
    query, item: (r,) int, the pairs that are right: query[j] is answered by item[j]. In any order.

  Returns:
    (q,) int64.
  """
  query, item = np.asarray(query, np.int64), np.asarray(item, np.int64)
  order = np.lexsort((item, query))
  query, item = query[order], item[order]
  best = _best_right(z_query, z_pool, query, item)
  size = len(z_pool)
  out = np.zeros(len(z_query), np.int64)
  rows, columns = _block_sides(size)
  for start in range(0, len(z_query), rows):
    threshold = (best[start:start + rows] - TIE)[:, None]
    lo, hi = np.searchsorted(query, [start, start + len(threshold)])
    q, p = query[lo:hi] - start, item[lo:hi]
    by_item = np.argsort(p, kind='stable')
    q, p = q[by_item], p[by_item]
    for left in range(0, size, columns):
      sim = z_query[start:start + rows] @ z_pool[left:left + columns].T
      # "Not less" instead of "greater or equal": a NaN then counts against the query.
      with np.errstate(invalid='ignore'):
        ahead = ~(sim < threshold)
      first, last = np.searchsorted(p, [left, left + sim.shape[1]])
      ahead[q[first:last], p[first:last] - left] = False
      out[start:start + rows] += np.count_nonzero(ahead, 1)
  return np.where(np.isfinite(best), out, size)


def _best_right(z_query, z_pool, query, item) -> np.ndarray:
  """(q,) float32: the similarity of each query and its best right item; -inf without one."""
  best = np.full(len(z_query), -np.inf, np.float32)
  step = max(1, _BLOCK // max(1, z_query.shape[-1]))
  for start in range(0, len(query), step):
    q, p = query[start:start + step], item[start:start + step]
    with np.errstate(invalid='ignore'):
      np.maximum.at(best, q, np.einsum('re,re->r', z_query[q], z_pool[p], dtype=np.float32))
  return best


def _block_sides(size: int) -> tuple[int, int]:
  """(queries, items) of a block: square where the pool is large, so that each vector is read but a few times."""
  columns = max(1, min(size, int(_BLOCK**0.5)))
  return max(1, _BLOCK // columns), columns


def recalls(rank, *, name: str):
  """Yields (f'{name}_r{k}', the share of queries with a right item in the top k) for k in RECALL_AT."""
  for k in RECALL_AT:
    yield f'{name}_r{k}', float((rank < k).mean())


def top(z_query, *, z_pool, k: int) -> tuple[np.ndarray, np.ndarray]:
  """The k most similar items, best first; of equals the first of the pool.

  Returns:
    (items, similarities): (q, min(k, p)) int64 and float32. Memory is bounded as long as a query's row fits.
  """
  k = min(k, len(z_pool))
  items, scores = np.empty((len(z_query), k), np.int64), np.empty((len(z_query), k), np.float32)
  step = max(1, _BLOCK // max(1, len(z_pool)))
  for start in range(0, len(z_query), step):
    sim = z_query[start:start + step] @ z_pool.T
    every = np.arange(len(sim))
    for place in range(k):
      found = sim.argmax(1)
      items[start:start + step, place], scores[start:start + step, place] = found, sim[every, found]
      sim[every, found] = -np.inf
  return items, scores


def average_precisions(z, *, z_class, label) -> np.ndarray:
  """Average precision of each class when everything is ranked by its similarity to the class.

  The mean, over what is of the class, of the precision among all that is at least as similar (so equals share one
  precision, as in scikit-learn). Memory is bounded: a few classes at a time.

  Args:
    z: (n, E) float32. z_class: (C, E) float32. label: (n,) int.

  Returns:
    (C,) float64; NaN for a class that does not occur.
  """
  label = np.asarray(label)
  out = np.full(len(z_class), np.nan)
  members = np.split(np.argsort(label, kind='stable'), np.searchsorted(np.sort(label), np.arange(1, len(z_class))))
  occurring = np.flatnonzero([len(m) for m in members])
  step = max(1, _BLOCK // max(1, len(z)))
  for start in range(0, len(occurring), step):
    some = occurring[start:start + step]
    for c, scores in zip(some, z_class[some] @ z.T):
      own = np.sort(scores[members[c]])
      scores.sort()
      at_least = len(scores) - np.searchsorted(scores, own - TIE)
      own_at_least = len(own) - np.searchsorted(own, own - TIE)
      out[c] = np.mean(own_at_least / at_least)
  return out
