"""A table of images with boxes and captions in compact arrays, cut into tasks; and the reading of image files.

For formats whose annotations are one big file: a box takes 29 bytes while they are read, and about three times that
while they are cut into tasks, where a dictionary of it takes a kilobyte.
"""
import array
from collections.abc import Callable, Iterator, Sequence
import dataclasses
import io
import os
import pathlib
import struct
import warnings

import numpy as np
import PIL.Image

from cloc_jax import box_conventions
from cloc_jax import boxes as box_lib
from cloc_jax.data import schema
from cloc_jax.data import storage
from cloc_jax.data.importers import counts as counts_lib
from cloc_jax.data.importers import engine

_EXIF_ORIENTATION = 0x0112
_PNG_EXIF = {'exif', 'Raw profile type exif'}  # where Pillow keeps a PNG's EXIF data
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap height and width


class Texts:
  """Many strings in one block of bytes, to be read by index and cut into ranges."""

  def __init__(self, texts: Sequence[str] = ()):
    self._bytes, self._ends = bytearray(), array.array('q')
    for text in texts:
      self.append(text)

  def append(self, text: str) -> None:
    self._bytes += text.encode()
    self._ends.append(len(self._bytes))

  def __len__(self):
    return len(self._ends)

  def __getitem__(self, index: int) -> str:
    begin = self._ends[index - 1] if index else 0
    return self._bytes[begin:self._ends[index]].decode()

  def to_arrays(self) -> tuple[np.ndarray, np.ndarray]:
    """(the bytes of all, uint8; where each ends, int64)."""
    return np.frombuffer(bytes(self._bytes), np.uint8), np.array(self._ends, np.int64)

  @classmethod
  def from_arrays(cls, data: np.ndarray, ends: np.ndarray) -> 'Texts':
    """The reverse of to_arrays."""
    texts = cls()
    texts._bytes, texts._ends = bytearray(data.tobytes()), array.array('q', ends.tolist())
    return texts

  def take(self, indices) -> 'Texts':
    """Those of some indices, in their order."""
    return Texts([self[i] for i in indices])


@dataclasses.dataclass(frozen=True)
class Piece:
  """The images of one task. Boxes and captions refer to them by position and are in order of it.

  folder: where the image files are. search: a file may also lie at any end part of its name ('a/b/c.jpg', 'b/c.jpg',
  'c.jpg'), as archives are unpacked in different ways.
  ids, names: (n,) image ids and file names. sizes: (n, 2) height, width; 0 where the annotations do not say.
  box_image, box_place, category: (m,) image, index in the source's list, index into `categories`.
  boxes: (m, 4) xyxy; pixels, or fractions where `normalised`. skip: (m,) index into `reasons` of why a box is not
  imported; 0 for those that are.
  caption_image, captions: (c,).
  list_name: what the source calls its list of boxes: examples are named 'image 139, annotations[7]'.
  """
  folder: str
  ids: Texts
  names: Texts
  sizes: np.ndarray
  box_image: np.ndarray
  box_place: np.ndarray
  boxes: np.ndarray
  category: np.ndarray
  skip: np.ndarray
  caption_image: np.ndarray
  captions: Texts
  categories: tuple[str, ...]
  source: str
  reasons: tuple[str, ...] = ('', 'crowd')
  list_name: str = 'annotations'
  search: bool = False
  normalised: bool = False


class Table:
  """Gathers one split's images, boxes and captions, in any order, and cuts them into tasks.

  list_name: see Piece.
  """

  def __init__(self, *, list_name: str = 'annotations'):
    self.counts = counts_lib.Counts()
    self._list_name = list_name
    self._rows: dict = {}  # image id → row, also for images that only annotations speak of
    self._listed = array.array('q')  # row of each listed image, in order
    self._row_listed = array.array('q')  # its reverse; -1 for a row without an image
    self._ids, self._names, self._sizes = Texts(), Texts(), array.array('i')
    self._box_row, self._category, self._skip = array.array('q'), array.array('i'), array.array('b')
    self._boxes = array.array('f')
    self._caption_row, self._captions = array.array('q'), Texts()

  def __len__(self):
    return len(self._listed)

  def _row(self, key):
    row = self._rows.setdefault(key, len(self._rows))
    if row == len(self._row_listed):
      self._row_listed.append(-1)
    return row

  def add_image(self, key, *, name: str, height: int, width: int, where: str) -> bool:
    """An image's row; False if the same image is there already.

    Raises:
      ValueError: the id is there already with another file or size.
    """
    row = self._row(key)
    at = self._row_listed[row]
    if at >= 0:
      if (self._names[at], self._sizes[2 * at], self._sizes[2 * at + 1]) != (name, height, width):
        raise ValueError(f'{where}: image id {key!r} is there twice: as {self._names[at]!r} and as {name!r}')
      self.counts.dropped('images', 'listed twice', f'{where}, id {key!r}')
      return False
    self._row_listed[row] = len(self._listed)
    self._listed.append(row)
    self._ids.append(str(key))
    self._names.append(name)
    self._sizes.extend((height, width))
    return True

  def add_box(self, key, *, box: Sequence[float], category: int, skip: int = 0) -> None:
    """A box as the source writes it; the n-th call is the source's n-th box. See Piece for `skip`."""
    self._box_row.append(self._row(key))
    self._boxes.extend(box)
    self._category.append(category)
    self._skip.append(skip)

  def add_caption(self, key, text: str) -> None:
    """A caption of an image."""
    self._caption_row.append(self._row(key))
    self._captions.append(text)

  def tasks(self, *, folder: str | os.PathLike, category_names: dict[int, str], promised: str, where: str,
            images_per_shard: int, trust_boxes: bool = False, **piece) -> list[engine.Task]:
    """Counts what belongs to no image, checks the boxes' convention, and cuts the rest into tasks.

    Args:
      folder, piece: see Piece.
      category_names: by the source's category numbers; Piece.categories is in the order of these.
      promised: the boxes' convention, in pixels, see box_conventions.
      where: the boxes' file, for errors.
      images_per_shard: images a task.
      trust_boxes: do not check the convention.

    Raises:
      ValueError: naming the box of an unknown category, or a convention that the boxes do not keep.
    """
    listed = _view(self._row_listed)
    box_image, caption_image = listed[_view(self._box_row)], listed[_view(self._caption_row)]
    boxes, sizes = _view(self._boxes).reshape(-1, 4), _view(self._sizes).reshape(-1, 2)
    raw, skip = _view(self._category), _view(self._skip)
    keys = np.array(sorted(category_names), raw.dtype)
    category = np.searchsorted(keys, raw)
    unknown = np.flatnonzero(keys[np.minimum(category, len(keys) - 1)] != raw if len(keys) else np.ones(len(raw), bool))
    if unknown.size:
      raise ValueError(f'{where}: {self._list_name}[{unknown[0]}]: category_id {raw[unknown[0]]} is not among the '
                       f'categories {keys.tolist()}')
    for place in np.flatnonzero(box_image < 0):
      self.counts.dropped('boxes', 'of an image not listed', f'{self._list_name}[{place}]')
    for place in np.flatnonzero(caption_image < 0):
      self.counts.dropped('captions', 'of an image not listed', f'caption {place}')
    check = np.flatnonzero(box_image >= 0)
    if not trust_boxes:
      try:
        box_conventions.check(boxes[check], sizes=sizes[box_image[check]], promised=promised, where=where)
      except ValueError as error:
        raise ValueError(f'{error}. Mend the file, or read it as promised with --trust-boxes (trust_boxes=true)') from None
    if promised.startswith('xywh'):
      boxes = box_lib.from_xywh(boxes)
    place = np.argsort(box_image, kind='stable')
    box_image = box_image[place]
    of_caption = np.argsort(caption_image, kind='stable')
    caption_image = caption_image[of_caption]
    names = tuple(category_names[key] for key in keys.tolist())
    found = []
    for begin in range(0, len(self), images_per_shard):
      end = min(begin + images_per_shard, len(self))
      b0, b1 = np.searchsorted(box_image, [begin, end])
      c0, c1 = np.searchsorted(caption_image, [begin, end])
      rows, chosen = range(begin, end), place[b0:b1]
      found.append(engine.Task(f'images {begin} to {end - 1}', images=end - begin, payload=Piece(
          folder=os.fspath(folder), ids=self._ids.take(rows), names=self._names.take(rows), sizes=sizes[begin:end],
          box_image=box_image[b0:b1] - begin, box_place=chosen, boxes=boxes[chosen], category=category[chosen],
          skip=skip[chosen], caption_image=caption_image[c0:c1] - begin,
          captions=self._captions.take(of_caption[c0:c1].tolist()), categories=names,
          list_name=self._list_name, **piece)))
    return found


def _view(values):
  """An array.array's memory as a NumPy array."""
  return np.frombuffer(values, dtype=values.typecode) if values else np.zeros(0, values.typecode)


def read_piece(piece: Piece, report: counts_lib.Counts) -> Iterator[schema.Example]:
  """The examples of a piece: sound images, boxes cut to them, captions with words; all else counted."""
  for i in range(len(piece.ids)):
    example = read_one(piece, i, report)
    if example is not None:
      yield example


def read_one(piece: Piece, i: int, report: counts_lib.Counts) -> schema.Example | None:
  """The i-th example of a piece; None, and counted, if its image is missing or no image."""
  b0, b1 = np.searchsorted(piece.box_image, [i, i + 1])
  c0, c1 = np.searchsorted(piece.caption_image, [i, i + 1])
  image_id = piece.ids[i]
  path = find_file(piece.folder, piece.names[i], search=piece.search)
  annotated = tuple(piece.sizes[i].tolist())
  loaded = load_image(path, report, annotated=annotated if all(annotated) else None)
  if loaded is None:
    report.dropped('boxes', 'image lost', f'image {image_id}', int(b1 - b0))
    report.dropped('captions', 'image lost', f'image {image_id}', int(c1 - c0))
    return None
  data, (height, width) = loaded
  boxes = piece.boxes[b0:b1].astype(np.float64)
  if not piece.normalised:
    boxes = box_lib.normalize(boxes, height=height, width=width)
  boxes, keep = sound_boxes(
      boxes, report, label=lambda j: f'image {image_id}, {piece.list_name}[{piece.box_place[b0 + j]}]',
      skip=[piece.reasons[s] for s in piece.skip[b0:b1]])
  regions = []
  for j in np.flatnonzero(keep):
    name = piece.categories[piece.category[b0 + j]]
    regions.append(schema.Region(box=tuple(boxes[j].tolist()), caption=name, category=name, source=piece.source))
  captions = sound_captions([piece.captions[c] for c in range(c0, c1)], report, image_id=image_id)
  report.kept('images')
  if not regions:
    report.noted('images', 'without boxes', f'image {image_id}')
  if not captions:
    report.noted('images', 'without captions', f'image {image_id}')
  return schema.Example(image=data, image_id=image_id, height=height, width=width, captions=captions,
                        regions=tuple(regions))


def find_file(folder: str | os.PathLike, name: str, *, search: bool = False) -> storage.Path:
  """folder/name; with `search`, where that is not, the longest end part of the name that is a file in the folder."""
  folder = storage.path(folder)
  whole = folder / name
  if search:
    parts = pathlib.PurePosixPath(name).parts
    for begin in range(len(parts)):
      path = folder.joinpath(*parts[begin:])
      if path.is_file():
        return path
  return whole


def load_image(path: storage.Path, report: counts_lib.Counts, *,
               annotated: tuple[int, int] | None) -> tuple[bytes, tuple[int, int]] | None:
  """An image file's bytes and upright (height, width), read from its header alone.

  None, and the report takes its name, if it is missing, no image, or not of the annotated (height, width). An OSError
  of a store other than FileNotFoundError is raised.
  """
  try:
    data = path.read_bytes()
  except FileNotFoundError:
    report.lost_image(str(path), 'missing', path=path)
    return None
  except OSError as error:
    if isinstance(path, storage.Remote):
      raise  # a store that fails says nothing of its images: the import stops, and goes on from here
    report.lost_image(str(path), 'unreadable', path=path, detail=str(error))
    return None
  size = check_image(data, report, name=str(path), path=path, annotated=annotated)
  return None if size is None else (data, size)


def check_image(data: bytes, report: counts_lib.Counts, *, name: str, path: str | os.PathLike = '',
                annotated: tuple[int, int] | None = None) -> tuple[int, int] | None:
  """The upright (height, width) of an encoded image, or None and a line in the report; see load_image."""
  if not data:
    report.lost_image(name, 'unreadable', path=path, detail='0 bytes')
    return None
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # of huge images and odd EXIF: the size is all that is wanted
      with PIL.Image.open(io.BytesIO(data)) as opened:
        width, height = opened.size
        if opened.format == 'PNG' and not opened.info.keys() & _PNG_EXIF:
          opened.info['exif'] = _png_exif(data)  # else Pillow decodes all pixels to see what stands behind them
        if opened.getexif().get(_EXIF_ORIENTATION) in _TURNED:
          height, width = width, height
  except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
    detail = 'no image' if isinstance(error, PIL.UnidentifiedImageError) else str(error)
    report.lost_image(name, 'unreadable', path=path, detail=detail)
    return None
  if annotated is not None and (height, width) != tuple(annotated):
    report.lost_image(name, 'of another size', path=path,
                      detail=f'annotated as {annotated[0]}×{annotated[1]}, but is {height}×{width}')
    return None
  return height, width


def _png_exif(data):
  """A PNG's EXIF data, wherever it stands, as Pillow keeps it; b'' without."""
  begin = len(b'\x89PNG\r\n\x1a\n')
  while begin + 8 <= len(data):
    length, kind = struct.unpack('>I4s', data[begin:begin + 8])
    if kind == b'eXIf':
      return b'Exif\0\0' + data[begin + 8:begin + 8 + length]
    begin += 12 + length
  return b''


def sound_boxes(boxes: np.ndarray, report: counts_lib.Counts, *, label: Callable[[int], str],
                skip: Sequence[str] = ()) -> tuple[np.ndarray, np.ndarray]:
  """Cuts normalised xyxy boxes (n, 4) to their image and counts each once.

  Args:
    label: the n-th box's name for the report.
    skip: (n,) a reason for boxes that are not wanted anyhow, '' for the others.

  Returns:
    (boxes (n, 4) float32, keep (n,) bool).
  """
  wanted = np.array([not reason for reason in skip], bool) if len(skip) else np.ones(len(boxes), bool)
  for i in np.flatnonzero(~wanted):
    report.dropped('boxes', skip[i], label(i))
  clipped, keep, found = box_lib.sanitize(boxes)
  if any(found.values()):  # rare, so that the reason of each may be asked for one by one
    for i in np.flatnonzero(wanted):
      reason = next((name for name, count in box_lib.sanitize(boxes[i:i + 1])[2].items() if count), '')
      if reason == 'clipped':
        report.repaired('boxes', 'cut at the border', label(i))
      elif reason:
        report.dropped('boxes', reason, label(i))
      else:
        report.kept('boxes')
  else:
    report.kept('boxes', int(wanted.sum()))
  return clipped, keep & wanted


def sound_captions(captions: Sequence[str], report: counts_lib.Counts, *, image_id: str) -> tuple[str, ...]:
  """Captions without surrounding space; those without a word are left out. Counts each once."""
  kept = tuple(text for caption in captions if (text := caption.strip()))
  report.kept('captions', len(kept))
  report.dropped('captions', 'blank', f'image {image_id}', len(captions) - len(kept))
  return kept
