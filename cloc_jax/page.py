"""HTML pages that stand alone: the document, its style, and pictures with boxes drawn on them as SVG.

No page needs another file, a script or the network, and every page is legible in light and in dark. Texts given to the
functions here are escaped by them; what is called `body`, `overlay` or `style` is markup and is not.
"""
import base64
from collections.abc import Mapping
import html
import io

import numpy as np
from PIL import Image

# Eight hues that stay apart for the colour-blind and on both light and dark photographs (after Okabe and Ito, 2008).
COLORS = ('#e69f00', '#56b4e9', '#009e73', '#f0e442', '#0072b2', '#d55e00', '#cc79a7', '#ffffff')
SMALL = 160  # images up to this side are shown with hard pixels, and stored without loss

STYLE = """
:root { color-scheme: light dark; --back: #f6f5f2; --card: #ffffff; --ink: #1d1d1b; --soft: #6f6c66; --line: #e2dfd8;
        --good: #157f4b; --bad: #c4361c; }
@media (prefers-color-scheme: dark) {
  :root { --back: #171716; --card: #22211f; --ink: #ecebe7; --soft: #a19e97; --line: #37352f;
          --good: #58c48b; --bad: #ff8468; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1400px; padding: 32px 24px 64px; background: var(--back); color: var(--ink);
       font: 15px/1.5 system-ui, sans-serif; }
h1 { margin: 0 0 4px; font-size: 26px; font-weight: 650; letter-spacing: -0.01em; }
h2 { margin: 40px 0 6px; font-size: 20px; font-weight: 650; }
h3 { margin: 24px 0 8px; font-size: 15px; font-weight: 650; }
p { margin: 0 0 8px; max-width: 80ch; }
h1, p { overflow-wrap: anywhere; }
.soft { color: var(--soft); }
.good { color: var(--good); }
.bad { color: var(--bad); }
dl.facts { display: flex; flex-wrap: wrap; gap: 8px 28px; margin: 20px 0 28px; padding: 14px 0;
           border: solid var(--line); border-width: 1px 0; }
dl.facts div { display: flex; flex-direction: column-reverse; }
dl.facts dt { font-size: 12px; color: var(--soft); }
dl.facts dd { margin: 0; font-size: 19px; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; margin: 10px 0 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 22px 4px 0; border-bottom: 1px solid var(--line); font-weight: 400; text-align: right;
         vertical-align: baseline; }
th:first-child, td:first-child, .text { text-align: left; }
thead th { font-weight: 600; }
.scroll { overflow-x: auto; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(280px, 1fr)); gap: 20px; }
figure { display: flex; flex-direction: column; margin: 0; overflow: hidden; background: var(--card);
         border: 1px solid var(--line); border-radius: 10px; }
figcaption { padding: 12px 14px 14px; }
figcaption p { margin: 0 0 8px; }
svg.picture { display: block; width: 100%; aspect-ratio: 1; }
svg.small image { image-rendering: pixelated; }
svg.picture rect { fill: none; vector-effect: non-scaling-stroke; stroke-linejoin: round; }
rect.under { stroke: #000; stroke-opacity: 0.55; stroke-width: 5px; }
rect.over { stroke-width: 2.5px; }
rect.under.dashed { stroke-opacity: 0.3; stroke-width: 2.5px; }
rect.over.dashed { stroke-width: 1.5px; stroke-dasharray: 6 5; }
ol { margin: 0; padding: 0; list-style: none; }
li { display: flex; gap: 8px; align-items: baseline; }
b.chip { flex: none; min-width: 20px; padding: 0 5px; border-radius: 5px; border: 1px solid #0006; color: #000;
         font-size: 12px; line-height: 18px; text-align: center; }
.id { margin-top: 10px; font: 12px/1.4 ui-monospace, monospace; color: var(--soft); overflow-wrap: anywhere; }
"""


def document(*, title: str, body: str, style: str = '') -> str:
  """A whole HTML document. `style` goes behind STYLE and so wins over it."""
  return ('<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
          '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
          f'<title>{html.escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n{body}\n'
          '</body>\n</html>\n')


def facts(values: Mapping[str, object]) -> str:
  """A row of large values with small names under them; integers get thousands separators."""
  cells = ''.join(f'<div><dt>{html.escape(name)}</dt><dd>{html.escape(_value(value))}</dd></div>'
                  for name, value in values.items())
  return f'<dl class="facts">{cells}</dl>'


def words(text: str) -> str:
  """A text from the data, in its own direction: Hebrew among English leaves signs and figures where they are."""
  return f'<bdi>{html.escape(text)}</bdi>'


def paragraph(text: str, *, cls: str = '') -> str:
  """A paragraph of such a text, which begins at the right where it is written so."""
  return f'<p dir="auto"{f" class={cls}" if cls else ""}>{html.escape(text)}</p>'


def color(index: int) -> str:
  """The colour of the box with this number; colours come again after the last."""
  return COLORS[index % len(COLORS)]


def chip(index: int) -> str:
  """The coloured number of a box, for a list beside the picture. Numbers are shown from 1."""
  return f'<b class="chip" style="background:{color(index)}">{index + 1}</b>'


def picture(image, overlay: str = '', *, label: str = 'image with boxes') -> str:
  """An SVG of a square image with `overlay` drawn on it, in units of the image's pixels.

  Args:
    image: (S, S, 3) uint8.
    overlay: SVG, as `box` makes it.
    label: what a screen reader says.
  """
  side = image.shape[0]
  small = ' small' if side <= SMALL else ''
  return (f'<svg class="picture{small}" viewBox="0 0 {side} {side}" role="img" aria-label="{html.escape(label)}">'
          f'<image width="{side}" height="{side}" href="{data_uri(image)}"/>{overlay}</svg>')


def box(corners, *, index: int, side: int, dashed: bool = False, number: bool = True) -> str:
  """A box as SVG; a dark stroke under the coloured one shows on any background.

  Args:
    corners: xyxy, fractions of the image.
    index: decides the colour, and is the number written on the box (from 1).
    side: of the image, pixels.
    dashed: thin and dashed instead of solid.
    number: write the number.
  """
  x0, y0, x1, y1 = (float(v) * side for v in corners)
  place = f'x="{x0:.2f}" y="{y0:.2f}" width="{max(x1 - x0, 0):.2f}" height="{max(y1 - y0, 0):.2f}"'
  kind = ' dashed' if dashed else ''
  out = f'<rect class="under{kind}" {place}/><rect class="over{kind}" {place} stroke="{color(index)}"/>'
  if not number:
    return out
  unit = side / 20
  # The number stands on its box, so as not to hide what is in it; inside where there is no room above.
  left, top = min(max(x0, 0), side - unit), y0 - unit if y0 >= unit else max(y0, 0)
  return out + (
      f'<g transform="translate({left:.2f} {top:.2f}) scale({unit:.3f})">'
      f'<path d="M0 0h1v1h-1z" fill="{color(index)}"/>'
      f'<text x="0.5" y="0.78" font-size="0.8" text-anchor="middle" fill="#000">{index + 1}</text></g>')


def data_uri(image: np.ndarray) -> str:
  """(H, W, 3) uint8 RGB as a data URI: PNG up to SMALL pixels a side, JPEG above."""
  data = io.BytesIO()
  if max(image.shape[:2]) <= SMALL:
    kind = 'png'
    Image.fromarray(image).save(data, 'PNG')
  else:
    kind = 'jpeg'
    Image.fromarray(image).save(data, 'JPEG', quality=92)
  return f'data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}'


def _value(value):
  return f'{value:,}' if isinstance(value, (int, np.integer)) and not isinstance(value, bool) else str(value)
