"""A gallery of what training sees: images, boxes and captions after the random transforms, as one HTML file."""
import base64
import html
import os
import pathlib

import cv2
import numpy as np

from cloc_jax import boxes as box_lib
from cloc_jax.data import pipeline
from cloc_jax.data import schema

# Eight hues that stay apart for the colour-blind and on both light and dark photographs (after Okabe and Ito, 2008).
_COLORS = ('#e69f00', '#56b4e9', '#009e73', '#f0e442', '#0072b2', '#d55e00', '#cc79a7', '#ffffff')
_SMALL = 160  # canvases up to this side are shown with hard pixels, and stored without loss

_STYLE = """
:root { color-scheme: light dark; --back: #f6f5f2; --card: #ffffff; --ink: #1d1d1b; --soft: #6f6c66; --line: #e2dfd8; }
@media (prefers-color-scheme: dark) {
  :root { --back: #171716; --card: #22211f; --ink: #ecebe7; --soft: #a19e97; --line: #37352f; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1400px; padding: 32px 24px 64px; background: var(--back); color: var(--ink);
       font: 15px/1.5 system-ui, sans-serif; }
h1 { margin: 0 0 4px; font-size: 26px; font-weight: 650; letter-spacing: -0.01em; }
p { margin: 0 0 8px; max-width: 80ch; }
.soft { color: var(--soft); }
dl { display: flex; flex-wrap: wrap; gap: 8px 28px; margin: 20px 0 28px; padding: 14px 0;
     border: solid var(--line); border-width: 1px 0; }
dl div { display: flex; flex-direction: column-reverse; }
dt { font-size: 12px; color: var(--soft); }
dd { margin: 0; font-size: 19px; font-variant-numeric: tabular-nums; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(280px, 1fr)); gap: 20px; }
figure { display: flex; flex-direction: column; margin: 0; overflow: hidden; background: var(--card);
         border: 1px solid var(--line); border-radius: 10px; }
svg { display: block; width: 100%; aspect-ratio: 1; }
svg.small image { image-rendering: pixelated; }
rect { fill: none; vector-effect: non-scaling-stroke; stroke-linejoin: round; }
rect.under { stroke: #000; stroke-opacity: 0.55; stroke-width: 5px; }
rect.over { stroke-width: 2.5px; }
figcaption { padding: 12px 14px 14px; }
figcaption p { margin: 0 0 8px; }
ol { margin: 0; padding: 0; list-style: none; }
li { display: flex; gap: 8px; align-items: baseline; }
b { flex: none; min-width: 20px; padding: 0 5px; border-radius: 5px; border: 1px solid #0006; color: #000;
    font-size: 12px; line-height: 18px; text-align: center; }
.id { margin-top: 10px; font: 12px/1.4 ui-monospace, monospace; color: var(--soft); overflow-wrap: anywhere; }
.bad { color: #c4361c; }
"""


def write_gallery(path: str | os.PathLike, *, split: str, out: str | os.PathLike, count: int = 24,
                  image_size: int = 224, regions_per_image: int = 8, seed: int = 0, flip: bool = False,
                  pad: str = 'center', shuffle: bool = True) -> dict[str, int]:
  """Writes a page with some examples as training sees them. It needs no other file and no network.

  Args:
    path, split: the data set and its split.
    out: the HTML file to write.
    count: examples to show; fewer if the split has fewer.
    image_size, regions_per_image, seed, flip, pad, shuffle: as in pipeline.train_dataset.

  Returns:
    Counts over the examples shown, by the names in pipeline.STATS.

  Raises:
    FileNotFoundError, ValueError: as pipeline.train_dataset.
  """
  examples = pipeline.prepared_dataset(
      path, split=split, image_size=image_size, regions_per_image=regions_per_image, seed=seed, flip=flip, pad=pad,
      shuffle=shuffle)
  shown = [examples[i] for i in range(min(count, len(examples)))]
  counts = {name: sum(int(e.counts.get(name, 0)) for e in shown) for name in pipeline.STATS}
  counts |= {'captions': sum(bool(e.caption) for e in shown), 'region_captions': counts['regions_kept']}
  meta = schema.read_meta(path)
  out = pathlib.Path(out)
  out.parent.mkdir(parents=True, exist_ok=True)
  out.write_text(_page(meta, split=split, examples=shown, counts=counts), encoding='utf-8')
  return counts


def _page(meta, *, split, examples, counts):
  title = html.escape(f'{meta.name} · {split}')
  sizes = ', '.join(f'{name} {size:,}' for name, size in meta.splits.items())
  facts = {'shown': len(examples), 'regions in their records': counts['regions_seen'],
           'regions shown': counts['regions_kept'], 'mirrored': counts['flipped'],
           'boxes dropped': counts['boxes_dropped'], 'boxes clipped': counts['boxes_clipped'],
           'unreadable images': counts['corrupt_images'], 'empty captions': counts['empty_captions'],
           'empty region captions': counts['empty_region_captions']}
  listed = ''.join(f'<div><dt>{name}</dt><dd>{value:,}</dd></div>' for name, value in facts.items())
  return (
      '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
      '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
      f'<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<header>\n<h1>{title}</h1>\n'
      f'<p>{html.escape(meta.description)}</p>\n'
      f'<p class="soft">Splits: {html.escape(sizes)}. Images, boxes and captions are shown as a training step gets '
      f'them: resized, padded, perhaps mirrored, with the regions and the caption drawn for this epoch.</p>\n'
      f'<dl>{listed}</dl>\n</header>\n<main>\n' + '\n'.join(map(_figure, examples)) + '\n</main>\n</body>\n</html>\n')


def _figure(example):
  side = example.image.shape[0]
  large_first = np.argsort(-box_lib.area(example.boxes), kind='stable')  # small boxes are not to be painted over
  boxes = ''.join(_box(example.boxes[i], index=int(i), side=side) for i in large_first)
  labels = ''.join(
      f'<li><b style="background:{_color(i)}">{i + 1}</b>'
      f'<span>{html.escape(region.caption)}{_aside(region)}</span></li>' for i, region in enumerate(example.regions))
  if not example.image_ok:
    caption = '<p class="bad">This image could not be decoded: training masks it.</p>'
  elif not example.caption:
    caption = '<p class="soft">No caption.</p>'
  else:
    caption = f'<p>{html.escape(example.caption)}</p>'
  mirrored = ' · mirrored' if example.counts.get('flipped') else ''
  return (
      f'<figure><svg viewBox="0 0 {side} {side}"{" class=small" if side <= _SMALL else ""} role="img">'
      f'<image width="{side}" height="{side}" href="{_data_uri(example.image)}"/>{boxes}</svg>'
      f'<figcaption>{caption}<ol>{labels}</ol>'
      f'<div class="id">{html.escape(example.image_id)}{mirrored}</div></figcaption></figure>')


def _box(box, *, index, side):
  """A box with its number, as SVG in canvas pixels; a dark stroke under the coloured one shows on any background."""
  x0, y0, x1, y1 = (float(v) * side for v in box)
  place = f'x="{x0:.2f}" y="{y0:.2f}" width="{x1 - x0:.2f}" height="{y1 - y0:.2f}"'
  unit = side / 20
  # The number stands on its box, so as not to hide what is in it; inside where there is no room above.
  left, top = min(max(x0, 0), side - unit), y0 - unit if y0 >= unit else max(y0, 0)
  return (
      f'<rect class="under" {place}/><rect class="over" {place} stroke="{_color(index)}"/>'
      f'<g transform="translate({left:.2f} {top:.2f}) scale({unit:.3f})">'
      f'<path d="M0 0h1v1h-1z" fill="{_color(index)}"/>'
      f'<text x="0.5" y="0.78" font-size="0.8" text-anchor="middle" fill="#000">{index + 1}</text></g>')


def _aside(region):
  """The category where the caption does not say it, and a score that is not a person's."""
  notes = [region.category] if region.category and region.category != region.caption else []
  notes += [f'{region.score:.2f}'] if region.score != 1 else []
  return f' <span class="soft">({html.escape(", ".join(notes))})</span>' if notes else ''


def _color(index):
  return _COLORS[index % len(_COLORS)]


def _data_uri(image):
  kind = 'png' if image.shape[0] <= _SMALL else 'jpeg'
  _, data = cv2.imencode('.png' if kind == 'png' else '.jpg', cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
  return f'data:image/{kind};base64,{base64.b64encode(data).decode()}'
