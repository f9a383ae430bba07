"""Region retrieval: which text describes this region, and which region does this text describe."""
import numpy as np

from cloc_jax.evaluators import ranking
from cloc_jax.evaluators.collect import Predictions


class RegionRetrieval:
  """Protocol region_retrieval@2: recall over the pool of all boxes of the data set; repeated captions are one text.

  Two captions are the same text if they are equal in lower case with white space collapsed. Regions with the same box
  of the same image are one box with several texts: RefCOCO, Flickr30k Entities and GRIT have many, and of two that
  look exactly alike no model could tell which one is meant. Yields, as fractions:
    r2t_r1, r2t_r5, r2t_r10   a box asks; right if any of its texts is among the k most similar *distinct* texts
    t2r_r1, t2r_r5, t2r_r10   each region's text asks, so a text asks as often as it occurs; right if any box with
                              that text is among the k most similar boxes
    t2r_distinct_r1, …        the same, but each distinct text asks once: common texts do not dominate
    pool, distinct_texts      boxes and distinct texts in the pool, of so many `regions`; `no_caption` regions are left
                              out of it
  Ties count as wrong. Where spellings of a text differ in case or spacing, the first one is embedded.

  Do not compare pools of different sizes, nor with figures where a repeated caption of another region counts as wrong
  (the paper does not say which it used, and reports recall@10, which suffers least). In @1 every region was a box of
  its own: the same figures where no box is there twice.

  Args:
    limit: the pool is the first `limit` boxes that have a caption, in the order of the data; None takes all.
    prefix: goes before each yielded name.
  """
  protocol = 'region_retrieval@2'

  def __init__(self, *, limit: int | None = None, prefix: str = ''):
    if limit is not None and limit < 1:
      raise ValueError(f'limit: expected at least 1 box, or None for all, got {limit}')
    self._limit = limit
    self._prefix = prefix

  def run(self, predictions: Predictions):
    """Yields (name, value). Raises NothingToMeasure without region embeddings or region captions."""
    if predictions.z_region is None:
      raise ranking.NothingToMeasure('the model does not embed regions')
    named = np.array([bool(ranking.canonical(c)) for c in predictions.region_captions], bool)
    regions = np.flatnonzero(named)
    if not len(regions):
      raise ranking.NothingToMeasure(f'none of {len(named)} regions has a caption')
    first_box, box = ranking.distinct_boxes(predictions.region_image[regions], predictions.boxes[regions])
    pool = regions[first_box][:self._limit]
    kept = box < len(pool)
    regions, box = regions[kept], box[kept]
    first, text = ranking.distinct_texts([predictions.region_captions[i] for i in regions])
    # Of a million regions a copy would take gigabytes.
    z_box = predictions.z_region if len(pool) == len(named) else predictions.z_region[pool]
    z_text = (predictions.z_region_text if len(first) == len(named)
              else predictions.z_region_text[regions[first]])
    box_rank = ranking.ranks(z_box, z_pool=z_text, query=box, item=text)
    text_rank = ranking.ranks(z_text, z_pool=z_box, query=text, item=box)
    for name, rank in (('r2t', box_rank), ('t2r', text_rank[text]), ('t2r_distinct', text_rank)):
      for key, value in ranking.recalls(rank, name=name):
        yield self._prefix + key, value
    yield self._prefix + 'pool', len(pool)
    yield self._prefix + 'regions', len(regions)
    yield self._prefix + 'distinct_texts', len(first)
    yield self._prefix + 'no_caption', int((~named).sum())
