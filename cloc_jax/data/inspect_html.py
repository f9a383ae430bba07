"""A gallery of what training sees: images, boxes and captions after the random transforms, as one HTML file."""
import html
import os
import pathlib

import numpy as np

from cloc_jax import boxes as box_lib
from cloc_jax import page
from cloc_jax.data import pipeline
from cloc_jax.data import prepare
from cloc_jax.data import sources
from cloc_jax.data import spec as spec_lib
from cloc_jax.data import transforms


def write_gallery(path: spec_lib.Data, *, split: str, out: str | os.PathLike, count: int = 24,
                  image_size: int = 224, regions_per_image: int = 8, seed: int = 0, flip: bool = False,
                  pad: str = 'center', shuffle: bool = True,
                  crop: transforms.Crop | None = None) -> dict[str, int]:
  """Writes a page with some examples as training sees them. It needs no other file and no network.

  Args:
    path, split: the data set and its split.
    out: the HTML file to write.
    count: examples to show; fewer if the split has fewer.
    image_size, regions_per_image, seed, flip, pad, shuffle, crop: as in pipeline.train_dataset.

  Returns:
    Counts over the examples shown, by the names in prepare.STATS.

  Raises:
    FileNotFoundError, ValueError: as pipeline.train_dataset.
  """
  examples = pipeline.prepared_dataset(
      path, split=split, image_size=image_size, regions_per_image=regions_per_image, seed=seed, flip=flip, pad=pad,
      shuffle=shuffle, crop=crop)
  shown = [examples[i] for i in range(min(count, len(examples)))]
  canvases = np.empty((len(shown), image_size, image_size, 3), np.uint8)
  shown = [prepare.paint(e, canvas, on_error='mask') for e, canvas in zip(shown, canvases)]
  counts = {name: sum(int(e.counts.get(name, 0)) for e in shown) for name in prepare.STATS}
  counts |= {'captions': sum(bool(e.caption) for e in shown), 'region_captions': counts['regions_kept']}
  meta = sources.read_meta(path)
  out = pathlib.Path(out)
  out.parent.mkdir(parents=True, exist_ok=True)
  out.write_text(_page(meta, split=split, examples=zip(shown, canvases), counts=counts), encoding='utf-8')
  return counts


def _page(meta, *, split, examples, counts):
  title = f'{meta.name} · {split}'
  sizes = ', '.join(f'{name} {size:,}' for name, size in meta.splits.items())
  facts = {'shown': counts['examples'], 'regions in their records': counts['regions_seen'],
           'regions shown': counts['regions_kept'],
           **({'regions cropped out': counts['regions_cropped_out']} if counts['cropped'] else {}),
           'mirrored': counts['flipped'], 'boxes dropped': counts['boxes_dropped'],
           'boxes clipped': counts['boxes_clipped'], 'unreadable images': counts['corrupt_images'],
           'empty captions': counts['empty_captions'], 'empty region captions': counts['empty_region_captions']}
  return page.document(title=title, body=(
      f'<header>\n<h1>{html.escape(title)}</h1>\n<p>{html.escape(meta.description)}</p>\n'
      f'<p class="soft">Splits: {html.escape(sizes)}. Images, boxes and captions are shown as a training step gets '
      f'them: resized, padded, perhaps mirrored, with the regions and the caption drawn for this epoch.</p>\n'
      f'{page.facts(facts)}\n</header>\n<main class="grid">\n' + '\n'.join(_figure(*pair) for pair in examples)
      + '\n</main>'))


def _figure(example, canvas):
  side = canvas.shape[0]
  large_first = np.argsort(-box_lib.area(example.boxes), kind='stable')  # small boxes are not to be painted over
  boxes = ''.join(page.box(example.boxes[i], index=int(i), side=side) for i in large_first)
  labels = ''.join(f'<li>{page.chip(i)}<span>{html.escape(region.caption)}{_aside(region)}</span></li>'
                   for i, region in enumerate(example.regions))
  if example.image is None:
    caption = '<p class="bad">This image could not be decoded: training masks it.</p>'
  elif not example.caption:
    caption = '<p class="soft">No caption.</p>'
  else:
    caption = f'<p>{html.escape(example.caption)}</p>'
  mirrored = ' · mirrored' if example.counts.get('flipped') else ''
  return (
      f'<figure>{page.picture(canvas, boxes)}<figcaption>{caption}<ol>{labels}</ol>'
      f'<div class="id">{html.escape(example.image_id)}{mirrored}</div></figcaption></figure>')


def _aside(region):
  """The category where the caption does not say it, and a score that is not a person's."""
  notes = [region.category] if region.category and region.category != region.caption else []
  notes += [f'{region.score:.2f}'] if region.score != 1 else []
  return f' <span class="soft">({html.escape(", ".join(notes))})</span>' if notes else ''
