"""CLIP's BPE vocabulary, from OpenAI's merges file or a folder as Hugging Face lays it out. Used by tokenizer.py."""
import gzip
import json
import zlib

BOS, EOS = '<|startoftext|>', '<|endoftext|>'
_NUM_MERGES = 48_894  # of the 262 144 in OpenAI's file; with 512 byte entries and two marks they make its 49 408 ids


def read(path) -> tuple[dict[str, int], list[tuple[str, str]]]:
  """Reads token → id, and the merges in their order, from bpe_simple_vocab_16e6.txt.gz or vocab.json + merges.txt.

  Raises:
    ValueError, FileNotFoundError: naming the file, and the line where there is one.
  """
  vocab, merges = _read_folder(path) if path.is_dir() else _read_merges_file(path)
  letters = byte_letters()
  missing = [t for t in [*letters, *(c + '</w>' for c in letters), BOS, EOS] if t not in vocab]
  if missing:
    raise ValueError(f'{path}: not a CLIP vocabulary: {len(missing)} basic entries are missing, such as {missing[:3]}')
  return vocab, merges


def byte_letters() -> list[str]:
  """The letters that stand for the bytes in GPT-2's and CLIP's BPE (Radford et al. 2019), printable bytes first."""
  printable = [*range(ord('!'), ord('~') + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  return [chr(b) for b in printable] + [chr(0x100 + i) for i in range(256 - len(printable))]


def _read_folder(folder):
  for name in ('vocab.json', 'merges.txt'):
    if not (folder / name).is_file():
      raise FileNotFoundError(f'{folder / name}: a CLIP tokenizer folder needs vocab.json and merges.txt; '
                              f'this one holds {sorted(p.name for p in folder.iterdir())[:8]}')
  try:
    vocab = json.loads((folder / 'vocab.json').read_text(encoding='utf-8'))
  except ValueError as e:  # JSONDecodeError and UnicodeDecodeError
    raise ValueError(f'{folder / "vocab.json"}: expected JSON: {e}') from e
  if not isinstance(vocab, dict) or not all(type(i) is int and i >= 0 for i in vocab.values()):
    raise ValueError(f'{folder / "vocab.json"}: expected a JSON object of token → id')
  return vocab, _parse_merges(folder / 'merges.txt', (folder / 'merges.txt').read_bytes())


def _read_merges_file(path):
  data = path.read_bytes()
  if data[:2] == b'\x1f\x8b':
    try:
      data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as e:
      raise ValueError(f'{path}: the gzip data is damaged or cut short: {e}') from e
  # The released file goes on beyond what CLIP uses.
  merges = _parse_merges(path, data)[:_NUM_MERGES]
  letters = byte_letters()
  tokens = [*letters, *(c + '</w>' for c in letters), *(a + b for a, b in merges), BOS, EOS]
  return {token: i for i, token in enumerate(tokens)}, merges


def _parse_merges(path, data):
  try:
    lines = data.decode('utf-8').split('\n')
  except UnicodeDecodeError as e:
    raise ValueError(f'{path}: expected a text file of BPE merges: {e}') from e
  if '#version' not in lines[0]:
    raise ValueError(f"{path}: expected a first line with '#version', as BPE merges files have, got {lines[0][:60]!r}")
  merges = []
  for number, line in enumerate(lines[1:], 2):
    if not line.strip():
      continue
    pair = tuple(line.rstrip('\r').split(' '))
    if len(pair) != 2:
      raise ValueError(f'{path}, line {number}: expected two symbols and a space between them, got {line[:60]!r}')
    merges.append(pair)
  return merges
