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
  examples = pipeline.Examples(
      [pipeline.Origin(path, split=split, seed=seed)],
      prepare.Prepare(image_size=image_size, regions_per_image=regions_per_image, flip=flip, pad=pad, crop=crop))
  order = examples.order(0, shuffle=shuffle)
  shown = examples.prepare([order[i] for i in range(min(count, len(order)))])
  canvases = np.empty((len(shown), image_size, image_size, 3), np.uint8)
  shown.paint(canvases, on_error='mask')
  counts = {name: int(shown.count(name).sum()) for name in prepare.STATS}
  counts |= {'captions': sum(map(bool, shown.captions)), 'region_captions': counts['regions_kept']}
  meta = sources.read_meta(path)
  out = pathlib.Path(out)
  out.parent.mkdir(parents=True, exist_ok=True)
  out.write_text(_page(meta, split=split, shown=shown, canvases=canvases, counts=counts), encoding='utf-8')
  return counts


def _page(meta, *, split, shown, canvases, counts):
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
      f'{page.facts(facts)}\n</header>\n<main class="grid">\n' + '\n'.join(_figure(shown, i, canvas) for i, canvas in enumerate(canvases))
      + '\n</main>'))


def _figure(shown, i, canvas):
  regions, side = shown.regions(i), canvas.shape[0]
  corners = shown.boxes[i, :len(regions)]
  large_first = np.argsort(-box_lib.area(corners), kind='stable')  # small boxes are not to be painted over
  boxes = ''.join(page.box(corners[k], index=int(k), side=side) for k in large_first)
  labels = ''.join(f'<li>{page.chip(k)}<span>{page.words(region.caption)}{_aside(region)}</span></li>'
                   for k, region in enumerate(regions))
  if shown.images[i] is None:
    caption = '<p class="bad">This image could not be decoded: training masks it.</p>'
  elif not shown.captions[i]:
    caption = '<p class="soft">No caption.</p>'
  else:
    caption = page.paragraph(shown.captions[i])
  mirrored = ' · mirrored' if shown.count('flipped')[i] else ''
  return (
      f'<figure>{page.picture(canvas, boxes)}<figcaption>{caption}<ol>{labels}</ol>'
      f'<div class="id">{html.escape(shown.image_ids[i])}{mirrored}</div></figcaption></figure>')


def _aside(region):
  """The category where the caption does not say it, and a score that is not a person's."""
  notes = [region.category] if region.category and region.category != region.caption else []
  notes += [f'{region.score:.2f}'] if region.score != 1 else []
  said = f'({", ".join(notes)})'
  return f' <span class="soft">{page.words(said)}</span>' if notes else ''
