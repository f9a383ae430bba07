"""Small pictures whose content is known, and a tokenizer of whole words: what the tests of the data share."""
import dataclasses
import zlib

import cv2
import numpy as np

from cloc_jax.data import schema

COLORS = {'red': (255, 0, 0), 'green': (0, 255, 0), 'blue': (0, 0, 255), 'white': (255, 255, 255),
          'cyan': (0, 255, 255), 'pink': (255, 0, 255)}


@dataclasses.dataclass
class Tokens:
  ids: np.ndarray
  truncated: np.ndarray


class WordTokenizer:
  """One token a word: a number is itself plus ten, another word its checksum; 1 ends a text, 0 pads it."""

  def __call__(self, texts, *, length):
    ids, truncated = np.zeros((len(texts), length), np.int32), np.zeros(len(texts), bool)
    for i, text in enumerate(texts):
      words = [self.token(word) for word in text.lower().split()]
      truncated[i] = len(words) > length - 1
      row = words[:length - 1] + [1]
      ids[i, :len(row)] = row
    return Tokens(ids=ids, truncated=truncated)

  @staticmethod
  def token(word):
    return int(word) + 10 if word.isdigit() else 1_000_000 + zlib.crc32(word.encode()) % 1_000_000


def encode_png(image):
  """(H, W, 3) uint8 RGB → bytes."""
  return cv2.imencode('.png', cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()


def painted_example(index, *, regions=None):
  """A black picture of a random size with squares of different colours in a row, each a region named by its colour."""
  rng = np.random.default_rng(index)
  height, width = (int(v) for v in rng.integers(40, 90, 2))
  names = list(rng.permutation(list(COLORS)))[:rng.integers(1, len(COLORS) + 1) if regions is None else regions]
  image = np.zeros((height, width, 3), np.uint8)
  found = []
  for i, name in enumerate(names):
    x0, x1 = i * width // len(names), (i + 1) * width // len(names)
    y0 = int(rng.integers(0, height - 12))
    y1 = int(rng.integers(y0 + 10, height))
    image[y0:y1, x0:x1] = COLORS[name]
    found.append(schema.Region(
        box=(x0 / width, y0 / height, x1 / width, y1 / height), caption=str(name), category=str(name)))
  return schema.Example(
      image=encode_png(image), image_id=f'picture-{index}', height=height, width=width,
      captions=(f'picture {index}', f'painting {index}'), regions=tuple(found))
