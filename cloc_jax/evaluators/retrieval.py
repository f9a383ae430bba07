"""Image–text retrieval with whole-image captions."""
import numpy as np

from cloc_jax.evaluators import ranking
from cloc_jax.evaluators.collect import Predictions


class ImageTextRetrieval:
  """Protocol image_text_retrieval@1: recall among all images and all captions of the data set.

  The usual protocol on COCO and Flickr30k (Karpathy's split), several captions an image; yields, as fractions:
    i2t_r1, i2t_r5, i2t_r10   an image asks; right if any of its captions is among the k most similar captions
    t2i_r1, t2i_r5, t2i_r10   each caption asks; right if its own image is among the k most similar
  Synthetic captions repeat across images, and then nobody could tell which image is meant. So beside these:
    i2t_any_r1, …             right if a text equal to one of its captions is among the k most similar *distinct* texts
    t2i_any_r1, …             each caption asks; right if any image that has an equal caption is among the k
  Equal means in lower case with white space collapsed. Ties count as wrong, so a caption repeated by another image
  counts against the usual figures; published code leaves it to the order of a sort.

  Do not compare pools of different sizes (COCO's 1 000 and 5 000 test images), `any` figures with the usual ones, nor
  data sets with a different number of captions an image.

  Also yields images, captions, distinct_captions, images_without_caption (they ask nothing, but stay among the
  answers) and empty_captions (left out).

  Args:
    prefix: goes before each yielded name.
  """
  protocol = 'image_text_retrieval@1'

  def __init__(self, *, prefix: str = ''):
    self._prefix = prefix

  def run(self, predictions: Predictions):
    """Yields (name, value). Raises NothingToMeasure without captions."""
    filled = np.flatnonzero([bool(ranking.canonical(c)) for c in predictions.captions])
    if not len(filled):
      raise ranking.NothingToMeasure(f'none of {len(predictions.image_ids)} images has a caption')
    z_image, z_caption = predictions.z_image, predictions.z_caption[filled]
    image = predictions.caption_image[filled]
    first, text = ranking.distinct_texts([predictions.captions[i] for i in filled])
    z_text = z_caption[first]
    captions, asking = np.arange(len(filled)), np.unique(image)
    found = {
        'i2t': ranking.ranks(z_image, z_pool=z_caption, query=image, item=captions)[asking],
        't2i': ranking.ranks(z_caption, z_pool=z_image, query=captions, item=image),
        'i2t_any': ranking.ranks(z_image, z_pool=z_text, query=image, item=text)[asking],
        't2i_any': ranking.ranks(z_text, z_pool=z_image, query=text, item=image)[text],
    }
    for name, rank in found.items():
      for key, value in ranking.recalls(rank, name=name):
        yield self._prefix + key, value
    yield self._prefix + 'images', len(z_image)
    yield self._prefix + 'captions', len(filled)
    yield self._prefix + 'distinct_captions', len(first)
    yield self._prefix + 'images_without_caption', len(z_image) - len(asking)
    yield self._prefix + 'empty_captions', len(predictions.captions) - len(filled)
