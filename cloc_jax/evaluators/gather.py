"""The shares of several hosts → what one pass over all the data gives."""
import dataclasses
from collections.abc import Sequence

import numpy as np

from cloc_jax import hosts
from cloc_jax.evaluators.collect import Predictions

_BY_IMAGE = ('z_image',)
_BY_CAPTION = ('z_caption',)
_BY_REGION = ('boxes', 'z_region', 'z_region_text', 'pred_boxes', 'pred_scores', 'points')


def gather(predictions: Predictions) -> Predictions | None:
  """This host's share → the whole, on the first host; None elsewhere. Every host must call it.

  Hosts take turns, image by image, as data.eval_pipeline.eval_batches deals them out.

  Raises:
    ValueError: on the first host, as `merge`; hosts.HostError on the others.
  """
  # Field by field: what is under way is never more than one of them.
  fields = {f.name: hosts.gather(getattr(predictions, f.name)) for f in dataclasses.fields(Predictions)}
  with hosts.together():
    if fields['image_ids'] is None:
      return None
    return merge([Predictions(**{name: values[host] for name, values in fields.items()})
                  for host in range(len(fields['image_ids']))])


def merge(shares: Sequence[Predictions]) -> Predictions:
  """The shares of hosts that took turns, image by image → the whole, in the order of the data.

  A text that several hosts encoded has the embedding of its first occurrence, as if it had been encoded once: equal
  texts stay exactly equal.

  Raises:
    ValueError: without any image, or if the shares cannot be those of hosts that read the same data.
  """
  if len(shares) == 1:
    return shares[0]
  sizes = [len(s.image_ids) + s.masked_images for s in shares]
  if sizes != [len(range(host, sum(sizes), len(shares))) for host in range(len(shares))]:
    raise ValueError(f'the hosts do not read the same data: they had {sizes} images, and took turns')
  place = np.concatenate([s.image_position * len(shares) + host for host, s in enumerate(shares)])
  if not len(place):
    raise ValueError(f'nothing to evaluate: the batches hold no valid image ({sum(sizes)} masked)')
  starts = np.cumsum([0, *(len(s.image_ids) for s in shares)])
  order = np.argsort(place)
  number = np.argsort(order)  # of each image as the shares have them, one after another: where it comes to stand
  owner = {name: np.concatenate([number[getattr(s, name) + start] for s, start in zip(shares, starts)])
           for name in ('caption_image', 'region_image')}
  by_caption, by_region = (np.argsort(images, kind='stable') for images in owner.values())
  texts = lambda name, rows: _take([x for s in shares for x in getattr(s, name)], rows)
  arrays = {name: _rows(shares, name, rows) for names, rows in
            ((_BY_IMAGE, order), (_BY_CAPTION, by_caption), (_BY_REGION, by_region)) for name in names}
  captions, region_captions = texts('captions', by_caption), texts('region_captions', by_region)
  arrays['z_caption'] = arrays['z_caption'][_first_equal(captions)]
  arrays['z_region_text'] = arrays['z_region_text'][_first_equal(region_captions)]
  return Predictions(
      image_ids=texts('image_ids', order), geometry=texts('geometry', order), image_position=place[order],
      captions=captions, caption_image=owner['caption_image'][by_caption], region_captions=region_captions,
      region_image=owner['region_image'][by_region], categories=texts('categories', by_region),
      masked_images=sum(s.masked_images for s in shares), **arrays)


def _take(values, rows) -> tuple:
  return tuple(values[i] for i in rows)


def _rows(shares, name, rows):
  values = [getattr(s, name) for s in shares]
  if values[0] is None:
    return None
  # A host without images knows no width.
  return np.concatenate([v for v, s in zip(values, shares) if len(s.image_ids)])[rows]


def _first_equal(texts) -> np.ndarray:
  first: dict[str, int] = {}
  return np.array([first.setdefault(text, i) for i, text in enumerate(texts)], np.int64)
