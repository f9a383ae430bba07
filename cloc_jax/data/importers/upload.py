"""An import whose data set shall lie in a bucket: written to a disk, then copied, the file that makes it one last."""
import contextlib
import json
import os
import pathlib
import shutil

from cloc_jax.data import copies
from cloc_jax.data import location
from cloc_jax.data import schema
from cloc_jax.data import storage
from cloc_jax.data.importers import counts as counts_lib
from cloc_jax.data.importers import engine


def run(importer: engine.Importer, *, out: str | os.PathLike, work: str | os.PathLike | None, overwrite: bool = False,
        progress: bool = False, **settings) -> dict[str, counts_lib.Counts]:
  """engine.run with a URL for `out`; whatever is interrupted, the import or the copying, the same call goes on with it.

  Readers take a folder for a data set when it holds dataset_info.json, which is copied after all others.

  Args:
    importer, overwrite, progress, settings: see engine.run.
    out: gs://bucket/folder or the like.
    work: a folder on a disk with room for the whole data set, which is taken away from there at the end.

  Raises:
    ValueError: without `work`.
    FileExistsError: a data set is there already.
    What engine.run and copies.copy raise.
  """
  target = storage.path(out)
  if work is None:
    raise ValueError(f'{out}: shards are written to a disk and then copied: expected --work DIR with room for all')
  old = target / schema.INFO_FILE
  if old.exists() and not overwrite:
    raise FileExistsError(f'{target} holds a data set already; pass overwrite=True to replace it')
  local = pathlib.Path(work).expanduser().absolute() / target.name
  note = local.with_name(f'{local.name}.fingerprint.json')
  wanted = engine.fingerprint(importer)
  if _read(note) == wanted and (local / schema.INFO_FILE).exists():
    found = schema.read_meta(local).extra['counts']
    counts = {split: counts_lib.Counts.from_json(content) for split, content in found.items()}
  else:
    note.unlink(missing_ok=True)
    counts = engine.run(importer, out=local, overwrite=overwrite, progress=progress, **settings)
    note.write_text(json.dumps(wanted))
  if old.exists():
    storage.remove_files(target, first=schema.INFO_FILE)
  with location.shown(local, target) if progress else contextlib.nullcontext() as shown:
    copies.copy(local, target, progress=shown)
  shutil.rmtree(local)
  note.unlink()
  return counts


def _read(path):
  try:
    return json.loads(path.read_text())
  except (FileNotFoundError, ValueError):
    return None
