"""Captions that were paid for once: kept by image, alt-texts and captioner version, beside and across runs.

A captioner may read the alt-texts (a fusion does), so they are part of the key. Entries lie in one small file a shard
of input, under a folder of the captioner's version, so that a run with another detector over the same input finds them
with one look and many workers never write the same file.
"""
from collections.abc import Mapping
import hashlib
import json
import uuid

from cloc_jax.data import schema
from cloc_jax.label import folders


def key(example: schema.Example) -> str:
  """Names an image and its alt-texts by content."""
  digest = hashlib.sha256(example.image)
  for text in example.captions:
    digest.update(b'\0' + text.encode())
  return digest.hexdigest()


def short_hash(text: str) -> str:
  """16 hexadecimal digits for file names."""
  return hashlib.sha256(text.encode()).hexdigest()[:16]


class CaptionCache:
  """The captions of one captioner version.

  Every `add` writes a file of its own, which appears whole: a killed run loses none of those before. `merge` makes one
  file of a shard's.
  """

  def __init__(self, folder: str, *, version: str):
    self._root = folders.Folder(f'{folder.rstrip("/")}/{short_hash(version)}')
    self._version = version

  def load(self, shard: str) -> dict[str, str]:
    """Key → caption of all that is known for a shard of input."""
    folder, found = self._folder(shard), {}
    for name, _ in sorted(folder.names()):
      if name.endswith('.jsonl'):
        for line in (folder.read(name) or b'').splitlines():
          entry = json.loads(line)
          found[entry['key']] = entry['caption']
    return found

  def add(self, shard: str, captions: Mapping[str, str]) -> None:
    """Keeps captions by key."""
    if not captions:
      return
    if self._root.read('version.txt') is None:
      self._root.write('version.txt', self._version.encode())  # for people
    lines = (json.dumps({'key': k, 'caption': v}) for k, v in captions.items())
    self._folder(shard).write(f'{uuid.uuid4().hex[:12]}.jsonl', '\n'.join(lines).encode() + b'\n')

  def merge(self, shard: str) -> None:
    """Makes one file of a shard's, once the shard is done."""
    folder = self._folder(shard)
    names = [name for name, _ in folder.names()]
    if len(names) > 1:
      self.add(shard, self.load(shard))
      for name in names:
        folder.remove(name)

  def _folder(self, shard):
    name = short_hash(shard)
    return folders.Folder(f'{self._root.path}/{name[:2]}/{name}')  # no folder of millions
