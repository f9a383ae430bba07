"""`cloc export`: a checkpoint for other people's programs, and the proof that it says the same there.

Every export ends with a parity gate: real images, boxes and texts go through our model and through what was written,
read back from disk; the differences are written beside the weights. A folder that fails is kept under another name.
"""
import dataclasses
import datetime
import difflib
import functools
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import freeze

from cloc_jax import export_probe, inference, model_card
from cloc_jax.interop import exported as exported_lib
from cloc_jax.interop import exported_files, hf_cloc, hf_dual, onnx_graphs
from cloc_jax.models import vit

TOLERANCE = 1e-4
_READ_BACK = 'our own model, with the weights that were read back from the written file'


def _file_target(name, refuse, write, read, use, needs=('safetensors',)):
  return exported_lib.Target(name=name, refuse=refuse, write=write, how=_READ_BACK, use=use, needs=needs,
                           outputs=lambda source, folder, probe: ours(source, probe, params=read(source, folder)))


def ours(source: exported_lib.Source, probe: exported_lib.Probe, *, params: Any = None) -> dict[str, np.ndarray]:
  """Everything our model says of a probe, in float32.

  params: those that were read back, instead of the model's own; towers alone give no outputs of regions. Their
    positions are those that were written, also where the model itself computes them.
  """
  model, given = source.model, source.params if params is None else params
  complete = 'prompter' in given or 'roi_head' in given
  regions = model.region_encoder if complete else 'none'
  keep = model.separate_temperature and 'region_t' in given
  image = dict(model.image) if params is None else {**model.image, 'posemb': 'learn'}
  # Frozen, and no lists: jit tells models apart by their hash.
  model = model.clone(image=freeze(image), text=freeze(dict(model.text)), prompter=freeze(dict(model.prompter)),
                      region_encoder=regions, separate_temperature=keep, dtype=jnp.float32,
                      image_mean=tuple(model.image_mean), image_std=tuple(model.image_std))
  tower = vit.ViT(**{'out_dim': model.embed_dim, **image}, dtype=jnp.float32)
  pixels = exported_lib.pixel_values(source, probe.canvases)
  with jax.default_matmul_precision('highest'):
    out = jax.device_get(_everything(model, tower, given, probe.canvases, pixels.transpose(0, 2, 3, 1), probe.text_ids,
                                     probe.phrase_ids, probe.canvas_boxes))
  out |= {'pixel_values': pixels, 'text_ids': probe.text_ids, 'phrase_ids': probe.phrase_ids,
          'boxes': probe.canvas_boxes}
  if regions != 'none':
    out['region_features of one box'] = out['region_features'][:1, :1]
  if regions == 'prompter':
    out['ground_pixels'] = np.stack([g.boxes_from_canvas(found) for g, found in
                                     zip(probe.geometry, out['ground_boxes'])])
  return out


@functools.partial(jax.jit, static_argnums=(0, 1))
def _everything(model, tower, params, canvases, pixels, text_ids, phrase_ids, boxes):
  # One program: each tower is compiled once, and once for all exports of a model in a process.
  apply = lambda method, *args: model.apply({'params': params}, *args, method=method)
  encoded, z_phrase = apply('encode_image', canvases), apply('encode_text', phrase_ids)
  out = {'image_tokens': encoded.tokens, 'image_features': encoded.z, 'phrase_features': z_phrase,
         'text_features': apply('encode_text', text_ids),
         'hidden_states': vit.hidden_states(tower, params['img'], pixels)}
  if model.region_encoder != 'none':
    out['region_features'] = apply('embed_regions', encoded, boxes)
  if model.region_encoder == 'prompter':
    z = jnp.broadcast_to(z_phrase[None], (len(canvases), *z_phrase.shape))
    found = apply('ground', encoded, z)
    scores = jnp.einsum('bme,bme->bm', apply('embed_regions', encoded, found), z)
    out |= {'ground_boxes': found, 'ground_scores': scores}
  return out


TARGETS = {target.name: target for target in (
    hf_cloc.TARGET, hf_dual.CLIP, hf_dual.SIGLIP,
    _file_target('open-clip', exported_files.refuse_open_clip, exported_files.write_open_clip, exported_files.read_open_clip,
                 exported_files.OPEN_CLIP_USE),
    _file_target('big-vision', exported_files.refuse_big_vision, exported_files.write_big_vision,
                 exported_files.read_big_vision, exported_files.BIG_VISION_USE, needs=()),
    _file_target('safetensors', lambda source: None, exported_files.write_safetensors, exported_files.read_safetensors,
                 exported_files.SAFETENSORS_USE),
    onnx_graphs.TARGET)}


@dataclasses.dataclass(frozen=True)
class Difference:
  """Of one output. shape: of it. largest: of the absolute values expected. absolute: the largest difference; relative:
  that, over `largest`. Ids must be equal: any that differs counts 1."""
  shape: tuple[int, ...]
  largest: float
  absolute: float
  relative: float

  def within(self, tolerance: float) -> bool:
    return self.relative <= tolerance  # False for NaN


@dataclasses.dataclass(frozen=True)
class Result:
  """folder: where everything lies now. differences: by output. passed: whether all are within the tolerance."""
  folder: pathlib.Path
  differences: dict[str, Difference]
  passed: bool


def run(checkpoint: str | os.PathLike, *, to: str, out: str | os.PathLike, step: int | None = None,
        images: str | os.PathLike | None = None, limit: int = 4, tolerance: float = TOLERANCE,
        progress: Callable[[str], None] = lambda text: None) -> Result:
  """Exports a checkpoint and compares.

  Args:
    checkpoint: a run's folder, or one step of it. step: which; the newest by default.
    to: one of TARGETS.
    out: the folder to make.
    images: a folder of images to compare on; drawn scenes by default. limit: how many of them.
    tolerance: largest difference of any output, relative to that output's largest value.
    progress: called with a line before each stage.

  Raises:
    ValueError: on an unknown target, or a model that the target cannot express, saying why.
    ModuleNotFoundError: naming what to install. FileExistsError: when `out` is in the way. FileNotFoundError,
      CheckpointError: on the checkpoint or the images.
  """
  if to not in TARGETS:
    near = difflib.get_close_matches(to, TARGETS, 1, 0.4)
    raise ValueError(f'--to {to}: expected one of {list(TARGETS)}' + (f'; did you mean {near[0]}?' if near else ''))
  target, out = TARGETS[to], pathlib.Path(out)
  lacking = [name for name in target.needs if importlib.util.find_spec(name) is None]
  if lacking:
    raise ModuleNotFoundError(f"--to {to} needs {', '.join(lacking)}: pip install 'cloc_jax[export]'")
  if out.exists():
    raise FileExistsError(f'{out} is there already; name another folder, or remove it')
  progress(f'reading {checkpoint}')
  cloc = inference.load(checkpoint, step=step)
  source = of_cloc(cloc)
  reason = target.refuse(source)
  if reason:
    raise ValueError(f'--to {to}: {reason}')
  probe = export_probe.make(source, images=images, limit=limit)
  out.parent.mkdir(parents=True, exist_ok=True)
  partial = out.with_name(f'{out.name}.partial-{os.getpid()}')
  partial.mkdir()
  try:
    progress(f'writing {out}')
    target.write(source, partial)
    progress(f'comparing on {probe.name}: {target.how}')
    differences = compare(ours(source, probe), target.outputs(source, partial, probe))
    passed = all(d.within(tolerance) for d in differences.values())
    _write_parity(partial / 'parity.json', target, probe, differences, tolerance, passed)
    card = model_card.render(cloc, source, target=target, parity=table(differences), probe=probe.name,
                             tolerance=tolerance, passed=passed)
    (partial / 'README.md').write_text(card, encoding='utf-8')
    for path in partial.iterdir():  # safetensors writes files that nobody else may read
      path.chmod((partial / 'parity.json').stat().st_mode)
    folder = out if passed else _free(out.with_name(f'{out.name}.failed'))
    partial.rename(folder)
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  return Result(folder, differences, passed)


def of_cloc(cloc: inference.Cloc) -> exported_lib.Source:
  """What is exported of a loaded checkpoint."""
  functions = cloc.functions
  return exported_lib.make(functions.model, cloc.params, tokenizer=functions.tokenizer,
                         **dataclasses.asdict(functions.preprocessing))


def compare(expected: dict[str, np.ndarray], got: dict[str, np.ndarray]) -> dict[str, Difference]:
  """The differences of all outputs of an artefact.

  Raises:
    ValueError: when it has an output that we have not, or one of another shape.
  """
  differences = {}
  for name, x in got.items():
    if name not in expected or expected[name].shape != x.shape:
      want = expected[name].shape if name in expected else 'no such output'
      raise ValueError(f'parity: {name}: expected {want}, got shape {x.shape}')
    want = expected[name]
    if np.issubdtype(want.dtype, np.integer):
      wrong = float((want != x).any())
      differences[name] = Difference(x.shape, float(want.max(initial=0)), float(np.abs(want - x).max(initial=0)), wrong)
      continue
    largest = float(np.abs(want).max(initial=0))
    absolute = float(np.abs(want.astype(np.float64) - x).max(initial=0))
    differences[name] = Difference(x.shape, largest, absolute, absolute / max(largest, 1e-30))
  return differences


def table(differences: dict[str, Difference]) -> str:
  """A Markdown table of the differences."""
  lines = ['| output | shape | largest value | largest difference | relative |', '| --- | --- | --- | --- | --- |']
  lines += [f'| {name} | {" × ".join(map(str, d.shape))} | {d.largest:.4g} | {d.absolute:.2g} | {d.relative:.2g} |'
            for name, d in differences.items()]
  return '\n'.join(lines)


def _write_parity(path, target, probe, differences, tolerance, passed):
  finite = lambda x: str(x) if isinstance(x, float) and not math.isfinite(x) else x  # JSON has no NaN
  record = {
      'target': target.name, 'passed': passed, 'tolerance': tolerance, 'compared_with': target.how,
      'inputs': dict(name=probe.name, images=len(probe.images), texts=len(probe.texts), phrases=len(probe.phrases)),
      'versions': _versions(), 'written': datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'),
      'outputs': {name: {key: finite(value) for key, value in dataclasses.asdict(d).items()}
                  for name, d in differences.items()}}
  path.write_text(json.dumps(record, indent=2) + '\n', encoding='utf-8')


def _versions():
  found = {}
  for name in ('cloc_jax', 'jax', 'flax', 'numpy', 'torch', 'transformers', 'safetensors', 'tokenizers', 'onnxruntime'):
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      pass
  return found


def _free(path):
  """The path, or the first of PATH-2, PATH-3, … that is free."""
  number, out = 1, path
  while out.exists():
    number += 1
    out = path.with_name(f'{path.name}-{number}')
  return out
