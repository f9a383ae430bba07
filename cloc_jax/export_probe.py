"""The real inputs of the parity gate: drawn scenes or a folder of images, boxes in them, captions and phrases."""
import os
import pathlib

import numpy as np
import PIL.Image

from cloc_jax.data import scenes, transforms
from cloc_jax.interop.exported import Probe, Source

_SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.gif', '.tif', '.tiff')
# Accents, marks, numbers, another script, spaces to collapse, and more words than fit.
_TEXTS = ('A dog, and  a cat.', "it's 25 o'clock!", 'Crème brûlée', '日本の猫', 'UPPER lower',
          ' '.join(['a very long caption that does not fit'] * 12), '')
_BOXES = ((0.0, 0.0, 1.0, 1.0), (0.1, 0.2, 0.45, 0.9), (0.5, 0.5, 0.62, 0.58))


def make(source: Source, *, images: str | os.PathLike | None = None, limit: int = 4) -> Probe:
  """A probe for a model.

  Args:
    source: the model, for its canvas and tokenizer.
    images: a folder whose images (by name, at any depth) are taken; None draws scenes, of several sizes and shapes.
    limit: how many images.

  Raises:
    FileNotFoundError: when there is no such folder, or no image in it. ValueError: when one cannot be decoded.
  """
  if limit < 1:
    raise ValueError(f'--limit: expected at least 1, got {limit}')
  if images is None:
    pictures, boxes, phrases, captions = _drawn(source.image_size, limit)
    name = f'{len(pictures)} drawn scenes'
  else:
    pictures, boxes, phrases, captions = _from_folder(images, limit)
    name = f'{len(pictures)} images of {images}'
  texts = [*captions[:6], *_TEXTS]
  phrases = [*list(dict.fromkeys(phrases))[:8], *_TEXTS[:5]]
  prepared = [transforms.prepare_image(picture, image_size=source.image_size, pad=source.pad) for picture in pictures]
  geometry = tuple(g for _, g in prepared)
  canvas_boxes = np.tile(np.float32([0, 0, 1, 1]), (len(pictures), max(map(len, boxes)), 1))
  for i, (own, g) in enumerate(zip(boxes, geometry)):
    canvas_boxes[i, :len(own)] = g.boxes_to_canvas(own)
  return Probe(images=pictures, boxes=boxes, texts=texts, phrases=phrases, geometry=geometry, name=name,
               canvases=np.stack([canvas for canvas, _ in prepared]), canvas_boxes=canvas_boxes,
               text_ids=source.tokenizer(texts, length=source.text_length).ids,
               phrase_ids=source.tokenizer(phrases, length=source.region_text_length).ids)


def _drawn(canvas, limit):
  """Larger and smaller than the canvas, square, wide and high: every branch of the resampling."""
  pictures, boxes, phrases, captions = [], [], [], []
  for i in range(limit):
    side = max(64, round(canvas * (1.7, 0.6, 2.0, 1.0)[i % 4]))
    scene = scenes.draw_scene(np.random.default_rng([7, i]), size=side)
    width, height = ((side, side), (side, side * 3 // 4), (side * 2 // 3, side), (side, side // 2))[i % 4]
    pictures.append(PIL.Image.fromarray(np.ascontiguousarray(scene.image[:height, :width])))
    own = [np.clip(np.float32(o.box) * side, 0, [width, height] * 2) for o in scene.objects]
    own = [b for b in own if (b[2:] - b[:2]).min() >= 2]
    boxes.append(np.float32([[0, 0, width, height], *own]))
    phrases += [o.caption for o in scene.objects]
    captions += scene.captions
  return pictures, boxes, phrases, captions


def _from_folder(folder, limit):
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    raise FileNotFoundError(f'--images {folder}: no such folder')
  files = sorted(p for p in folder.rglob('*') if p.suffix.lower() in _SUFFIXES)[:limit]
  if not files:
    raise FileNotFoundError(f'--images {folder}: no image in it; looked for {", ".join(_SUFFIXES)}')
  pictures = []
  for path in files:
    transforms.decode(path.read_bytes(), where=str(path))  # says what is wrong with a damaged one
    pictures.append(PIL.Image.open(path))
  sizes = [transforms.as_rgb(picture).shape[1::-1] for picture in pictures]
  boxes = [np.float32(_BOXES) * np.float32([*size, *size]) for size in sizes]
  return pictures, boxes, ['a person', 'the dog on the left', 'red car', 'sky'], ['a photo of a street', 'two people']
