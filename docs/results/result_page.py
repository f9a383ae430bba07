"""What the scripts of this folder share: tables go between two marks of a page, so that what a person wrote around them
stays; and what took long to measure is kept, row by row, so that a run that was cut off goes on where it was.
"""
import json
import os
import pathlib

_BEGIN, _END = '<!-- table -->', '<!-- end of table -->'


def add_photos(parser) -> None:
  """--photos: JPEGs, by default the COCO photos beside the repository where they are, else None."""
  beside = pathlib.Path(__file__).resolve().parents[3] / 'shared' / 'coco_mini' / 'val2017'
  parser.add_argument('--photos', default=os.fspath(beside) if beside.is_dir() else None, metavar='DIR')


def write_table(page: pathlib.Path, text: str) -> None:
  """Replaces what stands between the marks of a page; without marks or page, appends them."""
  before, _, after = page.read_text().partition(_BEGIN) if page.exists() else ('', '', '')
  after = after.partition(_END)[2]
  page.write_text(f'{before}{_BEGIN}\n{text}\n{_END}{after or chr(10)}')


def begun(file: pathlib.Path, settings: dict, *, again: bool) -> dict:
  """The settings, and under other keys whatever was measured with them before; that is forgotten if `again`.

  Raises:
    SystemExit: the file is of other settings.
  """
  if again or not file.exists():
    return dict(settings)
  found = json.loads(file.read_text())
  other = {key: found.get(key) for key, value in settings.items() if found.get(key) != value}
  if other:
    raise SystemExit(f'{file}: measured with {other}, not {({key: settings[key] for key in other})}: give --again to '
                     'replace it, or another --out')
  return found


def keep(file: pathlib.Path, results: dict) -> None:
  """Writes them, in one step: a run that is cut off loses nothing that was there."""
  temporary = file.with_name(f'{file.name}.tmp')
  temporary.write_text(json.dumps(results, indent=1) + '\n')
  os.replace(temporary, file)
