"""Records of ArrayRecord and TFRecord files, in order, without TensorFlow."""
import bisect
from collections.abc import Iterator, Sequence
import contextlib
import itertools
import struct
import threading

from array_record.python import array_record_module

from cloc_jax.data import storage

FORMATS = ('array_record', 'tfrecord')  # by their files' suffixes, which TFDS's are named after
_BATCH = 64
_POLYNOMIAL = 0x82F63B78  # CRC-32C (Castagnoli), reflected


def read(path: str, *, skip: int, take: int) -> Iterator[bytes]:
  """Yields records `skip` to `skip + take` of a file, whose name says what it is.

  ArrayRecord's reader opens gs:// by itself, other stores it does not know; TFRecord files may lie anywhere.

  Raises:
    ValueError: naming the file and the record, if the file is cut off or damaged.
  """
  kind = array_records if '.array_record' in path.rpartition('/')[2] else tf_records
  yield from kind(path, skip=skip, take=take)


def array_records(path: str, *, skip: int = 0, take: int | None = None) -> Iterator[bytes]:
  """See `read`; without `take` all that follow."""
  if storage.is_url(path) and storage.path(path).scheme != 'gs':
    raise ValueError(f'{path}: ArrayRecord files are read from a disk or gs://; copy it')
  reader = None
  try:
    reader = array_record_module.ArrayRecordReader(path, 'readahead_buffer_size:0')
    there = reader.num_records()
    if take is None:
      take = max(0, there - skip)
    if there < skip + take:
      raise ValueError(f'{path} is cut off: {there} records are left, of which {skip + take} are asked for')
    for begin in range(skip, skip + take, _BATCH):
      wanted = list(range(begin, min(begin + _BATCH, skip + take)))
      try:
        found = reader.read(wanted)
      except (RuntimeError, OSError) as error:
        raise ValueError(f'{path}: records {wanted[0]} to {wanted[-1]} are damaged: {error}') from error
      yield from found
  except (RuntimeError, OSError) as error:
    raise ValueError(f'{path} is no ArrayRecord file, or cut off: {error}') from error
  finally:
    if reader is not None:
      with contextlib.suppress(RuntimeError, OSError):  # says of a damaged file again that it is damaged
        reader.close()


class ArrayRecords:
  """Random access to records of ArrayRecord files, one file behind the other: `records[i]` gives the bytes of one.

  TFDS's own source asks the reader for a list of one record, which costs it a third more than a range of one, and tells
  nothing of a file that is cut off. Threads may share it.
  """

  def __init__(self, parts: Sequence[tuple[str, int, int]]):
    """parts: (path, skip, take): of that file, records `skip` to `skip + take`. Files are opened when first read."""
    self._parts = list(parts)
    self._ends = list(itertools.accumulate(take for _, _, take in self._parts))
    self._readers = [None] * len(self._parts)
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return self._ends[-1] if self._ends else 0

  def __getitem__(self, index: int) -> bytes:
    """Raises IndexError beyond the end; ValueError, RuntimeError or OSError if the file or the record is damaged."""
    if not 0 <= index < len(self):
      raise IndexError(f'record {index} of {len(self)}')
    part = bisect.bisect_right(self._ends, index)
    _, skip, take = self._parts[part]
    at = skip + index - (self._ends[part] - take)
    reader = self._readers[part] or self._open(part)
    return reader.read(at, at + 1)[0]

  def _open(self, part):
    path, skip, take = self._parts[part]
    with self._lock:
      if self._readers[part] is None:
        # No more than one record is read at a time: a larger buffer would be filled in vain.
        reader = array_record_module.ArrayRecordReader(path, 'readahead_buffer_size:0', file_reader_buffer_size=1 << 15)
        if reader.num_records() < skip + take:
          raise ValueError(f'{path} is cut off or damaged: {reader.num_records()} records are left, of which '
                           f'{skip + take} are asked for')
        self._readers[part] = reader
      return self._readers[part]


def count(path: str) -> int:
  """Records of an ArrayRecord file on a disk, as its end says. Raises ValueError if it is none, or cut off."""
  try:
    reader = array_record_module.ArrayRecordReader(path, 'readahead_buffer_size:0')
    found = reader.num_records()
    reader.close()
    return found
  except (RuntimeError, OSError, IndexError) as error:
    raise ValueError(f'{path} is no ArrayRecord file, or cut off: {error}') from error


def tf_records(path: str, *, skip: int, take: int) -> Iterator[bytes]:
  """See `read`.

  A record is its length (8 bytes), a checksum of that, its bytes, and a checksum of those. The length's is checked, so
  that a damaged file is noticed before it is misread; what a record holds is up to its reader.
  """
  with storage.open_binary(path) as file:
    for number in range(skip + take):
      head = file.read(12)
      if len(head) < 12:
        raise ValueError(f'{path} is cut off: it ends after {number} records, of which {skip + take} are asked for')
      length, checksum = struct.unpack('<QI', head)
      if masked_crc32c(head[:8]) != checksum:
        raise ValueError(f'{path}: record {number} is damaged, or this is no TFRecord file: its length does not fit '
                         'its checksum')
      data = file.read(length + 4)
      if len(data) < length + 4:
        raise ValueError(f'{path} is cut off in record {number}: {len(data)} of {length + 4} bytes')
      if number >= skip:
        yield data[:-4]


def masked_crc32c(data: bytes) -> int:
  """TFRecord's checksum: CRC-32C, turned by 15 bits and shifted by a constant. For a few bytes: it is slow."""
  crc = 0xFFFFFFFF
  for byte in data:
    crc ^= byte
    for _ in range(8):
      crc = crc >> 1 ^ _POLYNOMIAL * (crc & 1)
  crc ^= 0xFFFFFFFF
  return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
