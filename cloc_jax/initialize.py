"""Starting from a model that exists: `config.model.init`, `cloc import`, and foreign encoders in our evaluations.

An init is one of ours (a checkpoint) or one of theirs (interop/source.py). Its architecture fills and checks the
config, its weights replace fresh ones, its tokenizer and pixel scaling come along.
"""
import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from cloc_jax import checkpoint, config as config_lib, inference, train_step, trees
from cloc_jax.batch import abstract_batch
from cloc_jax.data import tokenizer as tokenizer_lib
from cloc_jax.interop import name_map, source as source_lib
from cloc_jax.models import posemb, text as text_lib, vit

# Of a tower, what changes how it is computed and not what: the config's own choice.
_FREE = {'attention', 'remat', 'unroll'}
_SIZES = {'variant', 'width', 'depth', 'heads', 'mlp_dim'}
_OF_PART = {'image': ('img',), 'text': ('txt',), 'both': ('img', 'txt', 't', 'b')}


@dataclasses.dataclass(frozen=True)
class Init:
  """A model to start from. Made by `open_init`.

  name: as the user wrote it. model: its section `config.model`. image_size, text_length, region_text_length: its own.
  full_texts: texts are always padded to text_length (SigLIP). convert(expected=…, parts=…) reads the weights.
  """
  name: str
  model: dict[str, Any]
  image_size: int
  text_length: int
  region_text_length: int
  full_texts: bool
  tokenizer: tokenizer_lib.Tokenizer | None
  convert: Callable[..., name_map.Converted]
  notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Report:
  """What became of the weights. loaded: {name: dtype}. skipped: {name: why}. resized: {path: what}. fresh: paths."""
  name: str
  loaded: dict[str, str]
  skipped: dict[str, str]
  resized: dict[str, str]
  fresh: tuple[str, ...]
  notes: tuple[str, ...]

  def summary(self) -> str:
    """A few lines."""
    kinds = sorted(set(self.loaded.values()))
    cast = [kind for kind in kinds if kind != 'float32']
    lines = [f'{self.name}: {len(self.loaded)} arrays loaded' + (f' ({", ".join(cast)} → float32)' if cast else '')]
    lines += [f'  resized: {path}: {what}' for path, what in self.resized.items()]
    for why in dict.fromkeys(self.skipped.values()):
      names = [name for name, reason in self.skipped.items() if reason == why]
      lines.append(f'  skipped: {", ".join(names[:4])}{f" … ({len(names)})" if len(names) > 4 else ""}: {why}')
    if self.fresh:
      parts = sorted({path.split('/')[0] for path in self.fresh})
      lines.append(f'  not in it, initialised afresh: {len(self.fresh)} arrays of {", ".join(parts)}')
    return '\n'.join([*lines, *(f'  {note}' for note in self.notes)])

  def full(self) -> str:
    """Every name, a line each."""
    return '\n'.join([
        self.summary(), '', *(f'loaded   {name} ({kind})' for name, kind in self.loaded.items()),
        *(f'skipped  {name}: {why}' for name, why in self.skipped.items()),
        *(f'resized  {path}: {what}' for path, what in self.resized.items()),
        *(f'fresh    {path}' for path in self.fresh)]) + '\n'


def open_init(name: str, *, tokenizer: str | None = None) -> Init:
  """Opens a model to start from.

  Args:
    name: 'hf:DIR', 'open_clip:FILE', 'openai:FILE', 'big_vision:FILE', or a checkpoint of ours.
    tokenizer: KIND:PATH (data/tokenizer.py), where it has none of its own or another is wanted.

  Raises:
    FileNotFoundError, ModuleNotFoundError, ValueError: naming the file and what is wrong.
  """
  own = None if tokenizer is None else tokenizer_lib.load(tokenizer)
  if not source_lib.is_foreign(name):
    return _of_checkpoint(name, own)
  source = source_lib.open_source(name)
  spec, own = source.spec, own or source.tokenizer
  if own is not None:
    _check_tokenizer(own, spec, name)
  # SigLIP saw its texts padded to full length and reads the last place; CLIP does not see behind the end.
  region_length = spec.text_length if spec.siglip else min(16, spec.text_length)
  return Init(name=name, model=spec.model_section(), image_size=spec.image_size, text_length=spec.text_length,
              region_text_length=region_length, full_texts=spec.siglip, tokenizer=own, convert=source.convert,
              notes=spec.notes)


def _check_tokenizer(tokenizer, spec, name):
  if tokenizer.vocab_size > spec.text['vocab_size']:
    raise ValueError(f'{name}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, the text tower only '
                     f'{spec.text["vocab_size"]} embeddings: it belongs to another model')
  if spec.eos_id is not None and tokenizer.eos_id != spec.eos_id:
    raise ValueError(f"{name}: the text tower reads at token {spec.eos_id}, but the tokenizer's end token is "
                     f'{tokenizer.eos_id}: it belongs to another model')


def _of_checkpoint(name, tokenizer):
  folder, step = checkpoint.find(name)
  keeper = checkpoint.Checkpointer(folder, read_only=True)
  try:
    step = keeper.steps[-1] if step is None else step
    info = keeper.info(step)
  finally:
    keeper.close()
  tokenizer = tokenizer or tokenizer_lib.Tokenizer.from_dict(info['tokenizer'])
  section = {k: v for k, v in info['config']['model'].items() if k not in inference.INIT_KEYS}
  text = {'vocab_size': tokenizer.vocab_size, 'max_length': info['preprocessing']['text_length'],
          'eos_id': tokenizer.eos_id, **section['text']}
  section = {**section, 'text': text}
  p = inference.Preprocessing(**info['preprocessing'])

  def convert(*, expected, parts):
    found = checkpoint.Checkpointer(folder, read_only=True)
    try:
      params = found.restore_params(step)
    finally:
      found.close()
    regions = ('prompter', 'box_head', 'roi_head', 'region_t', 'region_b')
    wanted = (*_OF_PART[parts], *(regions if parts == 'both' else ()))
    flat = trees.flatten(jax.tree.map(np.asarray, params))
    take = {k: v for k, v in flat.items() if k.split('/')[0] in wanted}
    skipped = {k: f'init_parts is {parts!r}' for k in flat if k not in take}
    known = {path.split('/')[0] for path in expected}
    skipped |= {k: 'the config has no such part' for k in take if k.split('/')[0] not in known}
    take = {k: v for k, v in take.items() if k not in skipped}
    return name_map.Converted(trees.unflatten(take), {k: v.dtype.name for k, v in take.items()}, skipped)

  return Init(name=os.fspath(name), model=section, image_size=p.image_size, text_length=p.text_length,
              region_text_length=p.region_text_length, full_texts=text.get('pool') == 'last', tokenizer=tokenizer,
              convert=convert)


# --- The config ---


def of_config(config: Mapping[str, Any], *, run: str | os.PathLike | None = None) -> Init | None:
  """The init that a config asks for; None where it asks for none.

  run: a run's folder; one that has checkpoints goes on without what it started from, which may be gone by then.
  """
  name = config['model'].get('init')
  if not name:
    return None
  if run is not None:
    try:
      return _of_checkpoint(run, None)
    except (FileNotFoundError, checkpoint.CheckpointError):
      pass  # it has none yet; or the newest is damaged, which restoring will say
  spec = config['data'].get('tokenizer')
  own = spec in (None, 'init') or spec.startswith('train:') or config['model'].get('init_parts') == 'image'
  return open_init(name, tokenizer=None if own else spec)


def resolve(config, init: Init | None) -> dict[str, Any]:
  """The config in plain values, with what it leaves open taken from its init.

  A tower's sizes and form come from the init; `attention`, `remat` and `unroll` stay the config's. Of `data`, None
  stands for the init's own image_size, text_length and region_text_length.

  Raises:
    ValueError: with a line for each value that disagrees, or cannot go together.
  """
  config = config_lib.plain(config)
  parts = config['model'].get('init_parts') or 'both'
  if parts not in name_map.PARTS:
    raise ValueError(f'config.model.init_parts: expected one of {name_map.PARTS}, got {parts!r}')
  if init is None:
    return config
  model, data, lines = dict(config['model']), dict(config['data']), []
  for part, module in (('image', vit.ViT), ('text', text_lib.TextTower)):
    if parts in (part, 'both'):
      model[part] = _filled(dict(model.get(part) or {}), init.model[part], module, f'model.{part}', lines)
  # The towers meet in one width; another would need a projection that nobody trained.
  if model.setdefault('embed_dim', init.model['embed_dim']) != init.model['embed_dim']:
    lines.append(f'! model.embed_dim: the config says {model["embed_dim"]}, {init.name} has {init.model["embed_dim"]}')
  if parts != 'text':
    for key in ('image_mean', 'image_std'):
      if key in init.model:
        model.setdefault(key, init.model[key])
    data['image_size'] = data.get('image_size') or init.image_size
  if parts != 'image':
    data['text_length'] = data.get('text_length') or init.text_length
    data['region_text_length'] = data.get('region_text_length') or min(init.region_text_length, data['text_length'])
    longest = init.model['text'].get('max_length', init.text_length)
    for key in ('text_length', 'region_text_length'):
      if data[key] > longest or (init.full_texts and data[key] != init.text_length):
        lines.append(f'! data.{key}: the config says {data[key]}, {init.name} has {longest} positions'
                     + (' and was trained on texts padded to all of them' if init.full_texts else ''))
    if str(data.get('tokenizer')).startswith('train:'):
      lines.append(f"! data.tokenizer: {data['tokenizer']!r}: the text tower of {init.name} knows its own ids: 'init'")
    if data.get('tokenizer') == 'init' and init.tokenizer is None:
      lines.append(f"! data.tokenizer: 'init', but {init.name} has no tokenizer beside it: give one, such as "
                   "clip:PATH/bpe_simple_vocab_16e6.txt.gz, siglip:PATH/spiece.model or hf:PATH/tokenizer.json")
  if lines:
    raise ValueError('the config and its init do not go together:\n' + '\n'.join(lines))
  return {**config, 'model': model, 'data': data}


def _filled(section, own, module, where, lines):
  """A tower's section, with the init's architecture."""
  for key, value in section.items():
    if key in _FREE | _SIZES or key not in own:
      continue
    if value != own[key]:
      lines.append(f'! {where}.{key}: the config says {value!r}, the init has {own[key]!r}')
  if _SIZES & section.keys():
    want, have = _sizes(module, section), _sizes(module, own)
    asked = {k: v for k, v in want.items() if k in section or 'variant' in section}
    lines += [f'! {where}.{key}: the config says {value}, the init has {have[key]}' for key, value in asked.items()
              if value != have[key]]
  return {**section, **{k: v for k, v in own.items() if k not in _FREE}}


def _sizes(module, section):
  names = ('width', 'depth', 'mlp_dim', 'heads', 'patch')
  needed = {} if module is vit.ViT else {'vocab_size': 1}
  tower = module(**{k: v for k, v in section.items() if k in _SIZES}, **needed)
  if module is vit.ViT:
    return {name: getattr(tower.sizes(), name) for name in names}
  width, depth, heads = tower.sizes()
  return {'width': width, 'depth': depth, 'heads': heads, 'mlp_dim': tower.mlp_dim or 4 * width}


# --- The weights ---


def load_params(init: Init, shapes, *, parts: str = 'both') -> tuple[dict[str, np.ndarray], Report]:
  """({our path: host array}, report) of what an init gives a model whose parameters are `shapes`; the rest is fresh.

  Position tables of another grid are resampled.

  Raises:
    ValueError: with ± lines, on weights that are missing, unexplained, or do not fit.
  """
  want = {k: tuple(x.shape) for k, x in trees.flatten(shapes).items()}
  loop = trees.scan_to_loop(trees.unflatten({k: np.broadcast_to(np.float32(0), v) for k, v in want.items()}))
  expected = {k: v.shape for k, v in trees.flatten(loop).items()}
  table = 'img/pos_embedding'
  if table in expected:  # in the files it has the init's own size
    grid = init.image_size // vit.ViT(**{k: v for k, v in init.model['image'].items() if k in _SIZES}).sizes().patch
    extra = init.model['image'].get('pool', 'tok') == 'tok'
    expected[table] = (1, grid**2 + extra, want[table][-1])
  converted = init.convert(expected=expected, parts=parts)
  flat, resized = trees.flatten(converted.params), {}
  if table in flat and flat[table].shape != want[table]:
    old, new = (math.isqrt(shape[1]) for shape in (flat[table].shape, want[table]))
    flat[table] = np.asarray(posemb.resample(flat[table], patches=want[table][1]))
    resized[table] = f'{old}×{old} → {new}×{new} patches'
  wanted = {k: v for k, v in want.items() if k in flat or k.split('/')[0] in _OF_PART[parts]}
  as_tree = lambda shapes: trees.unflatten({k: np.broadcast_to(np.float32(0), v) for k, v in shapes.items()})
  trees.merge(as_tree(wanted), trees.unflatten(flat), where=init.name)
  fresh = tuple(sorted(set(want) - set(flat)))
  return flat, Report(init.name, converted.loaded, converted.skipped, resized, fresh, init.notes)


def into_state(state: train_step.TrainState, shardings: train_step.TrainState, flat: Mapping[str, np.ndarray]):
  """The state with these parameters (and their averages) in place, where the mesh wants them."""
  replace = lambda tree, where: None if tree is None else trees.map_with_path(
      lambda path, old, place: jax.device_put(flat[path], place) if path in flat else old, tree, where)
  return dataclasses.replace(state, params=replace(state.params, shardings.params),
                             ema=replace(state.ema, shardings.ema))


# --- Imported as one of ours ---


def import_model(name: str, *, tokenizer: str | None = None, image_size: int | None = None,
                 region_encoder: str = 'none', seed: int = 0) -> tuple[inference.Cloc, Report]:
  """A foreign model as one of ours, ready to use.

  Args:
    name, tokenizer: see open_init.
    image_size: pixels, another than its own; its position table is then resampled.
    region_encoder: 'none', or 'prompter' and 'roi_align' with fresh parameters.
    seed: of these.

  Raises:
    FileNotFoundError, ModuleNotFoundError, ValueError: naming the file and what is wrong.
  """
  init = open_init(name, tokenizer=tokenizer)
  if init.tokenizer is None:
    raise FileNotFoundError(f'{name}: no tokenizer beside it; give one with --tokenizer, such as '
                            'clip:PATH/bpe_simple_vocab_16e6.txt.gz, siglip:PATH/spiece.model, hf:PATH/tokenizer.json')
  data = dict(path='', split='train', batch_size=1, image_size=image_size, text_length=None, region_text_length=None,
              regions_per_image=4, tokenizer='init', pad='center')
  config = resolve({'data': data, 'model': {'init': name, 'region_encoder': region_encoder}}, init)
  data = config['data']
  patch = vit.ViT(**{k: v for k, v in config['model']['image'].items() if k in _SIZES}).sizes().patch
  if data['image_size'] % patch:
    raise ValueError(f'image size: expected a multiple of the patch, {patch} pixels, got {data["image_size"]}')
  model = inference.build_model(config, tokenizer=init.tokenizer)
  batch = abstract_batch(batch_size=2, image_size=data['image_size'], text_length=data['text_length'], regions=1,
                         region_text_length=data['region_text_length'])
  shapes = jax.eval_shape(model.init, jax.random.key(0), batch)['params']
  flat, report = load_params(init, shapes)
  params = trees.unflatten({k: flat.get(k) for k in trees.flatten(shapes)})
  if report.fresh:
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), batch)
    def fresh(key):
      made = trees.flatten(model.init(key, zeros)['params'])
      return {k: made[k] for k in report.fresh}
    params = trees.unflatten({**flat, **{k: np.asarray(v) for k, v in jax.jit(fresh)(jax.random.key(seed)).items()}})
  preprocessing = inference.Preprocessing(image_size=data['image_size'], pad='center', text_length=data['text_length'],
                                          region_text_length=data['region_text_length'])
  info = {'config': {**config, **{k: {} for k in config_lib.SECTIONS if k not in config}},
          'tokenizer': init.tokenizer.to_dict(), 'preprocessing': dataclasses.asdict(preprocessing), 'metrics': {},
          'examples_seen': 0, 'imported': {'from': name, 'notes': list(init.notes)}}
  return inference.Cloc(model, params, tokenizer=init.tokenizer, preprocessing=preprocessing, info=info), report


def save(cloc: inference.Cloc, folder: str | os.PathLike) -> None:
  """Writes an imported model as a checkpoint (step 0, parameters alone) that everything of ours reads.

  Raises:
    FileExistsError: when the folder holds checkpoints already. CheckpointError: when it cannot be written.
  """
  try:
    where, _ = checkpoint.find(folder)
  except FileNotFoundError:
    pass
  else:
    raise FileExistsError(f'{where} holds checkpoints already; choose another folder')
  keeper = checkpoint.Checkpointer(os.path.join(folder, 'checkpoints'))
  try:
    keeper.save(0, {'params': cloc.params}, info=cloc.info)
    keeper.wait()
  finally:
    keeper.close()
