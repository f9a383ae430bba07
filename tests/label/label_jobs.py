"""Folders of small pictures, and jobs on scripted stages, that the tests of the labelling engine share."""
import hashlib
import pathlib

import numpy as np
from PIL import Image

from cloc_jax.data import sources
from cloc_jax.label import engine

SCRIPTED = 'python:cloc_jax.label.scripted:'


def write_photos(folder, count, *, broken=(), alt_texts=True):
  """NNNN.jpg of various sizes with NNNN.txt beside; of those in `broken` one is no image and the others are cut off."""
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  for i in range(count):
    pixels = np.random.default_rng(i).integers(0, 256, (20 + i % 7, 24 + i % 5, 3)).astype(np.uint8)
    path = folder / f'{i:04}.jpg'
    Image.fromarray(pixels).save(path)
    if alt_texts:
      path.with_suffix('.txt').write_text(f'alt-text {i}\n\nsecond line {i % 3}\n')
    if i in broken:
      path.write_bytes(b'no image' if i == broken[0] else path.read_bytes()[:-200])
  return folder


def job(source, out, **changes):
  """A job on the scripted stages; keywords change Job's fields."""
  fields = dict(inputs=(str(source),), out=str(out), captioner={'spec': SCRIPTED + 'Captioner'},
                phrases={'spec': SCRIPTED + 'Phrases'}, detector={'spec': SCRIPTED + 'Detector'}, shard_size=8, chunk=3)
  return engine.Job(**fields | changes)


def records(out, *, split='train'):
  """All records of a data set, in order."""
  source = sources.RecordSource(out, split=split)
  return [source[i] for i in range(len(source))]


def digests(out):
  """File name → hash of its bytes, of the record files."""
  found = pathlib.Path(out).glob('*.array_record*')
  return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in found}
