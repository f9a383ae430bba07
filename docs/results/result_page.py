"""Where the scripts of this folder put their tables: between two marks, so that what a person wrote around them stays."""
import pathlib

_BEGIN, _END = '<!-- table -->', '<!-- end of table -->'


def write_table(page: pathlib.Path, text: str) -> None:
  """Replaces what stands between the marks of a page; without marks or page, appends them."""
  before, _, after = page.read_text().partition(_BEGIN) if page.exists() else ('', '', '')
  after = after.partition(_END)[2]
  page.write_text(f'{before}{_BEGIN}\n{text}\n{_END}{after or chr(10)}')
