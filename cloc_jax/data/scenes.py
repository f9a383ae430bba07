"""Scenes: drawn images with boxes and captions, the embedded data set. Fast, seeded, and a real test of localisation.

`draw_scene` makes one scene from a Generator; `write_scenes` makes a data set of three splits: `train` and `val` hold
seen categories alone, `unseen` only those held out of training (sprites.py says what is held out, and what that tests).
Scene i of a split depends on (seed, split, i) alone, not on how many processes draw.
"""
import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import textwrap

import cv2
import numpy as np

from cloc_jax.data import scene_canvas
from cloc_jax.data import scene_text
from cloc_jax.data import sprites as sprites_lib

_SPLITS = {'train': (0, 'seen'), 'val': (1, 'seen'), 'unseen': (2, 'unseen')}  # number for the seed, categories
_BLOCK = 256  # scenes a process draws at a time


@dataclasses.dataclass(frozen=True)
class SceneSpec:
  """What scenes look like. Lengths are fractions of the image's side.

  Attributes:
    sprites: 'shapes', 'emoji:FONT.ttf', 'folder:DIR', or a SpriteSource.
    split: which categories may appear: 'seen', 'unseen' or 'all'.
    min_objects, max_objects: how many objects; crowded scenes may end below what was drawn, never below the minimum.
    count_weights: one weight per count from the minimum to the maximum; None is uniform.
    sizes: (word, least, most) of the long side of an object's box. The gaps keep the words apart.
    size_weights: how often each size is drawn.
    textures: subset of the source's textures; None is all.
    solid_share: how often the texture is the source's first one; the others share the rest evenly.
    repeat_category: allow a category twice in an image. Then 'red circle' no longer names one box.
    min_visible: least share of an object's pixels that is inside the image and not covered by later objects.
    max_iou: most overlap of any two boxes.
    overhang: how far an object's box may stick out of the image, in parts of its side.
    backgrounds: subset of 'flat', 'gradient', 'blotches'.
    clutter: most faint strokes behind the objects; clutter_contrast: their most contrast, in grey levels.
    noise: most standard deviation of the pixel noise, in grey levels.
    brightness: the image is multiplied by 1 ± this at most.
    plain_caption_share: share of region captions that are the category alone.
    num_captions: whole-image captions.
  """
  sprites: str | sprites_lib.SpriteSource = 'shapes'
  split: str = 'seen'
  min_objects: int = 2
  max_objects: int = 8
  count_weights: tuple[float, ...] | None = (3, 4, 4, 3, 2, 1, 1)
  sizes: tuple[tuple[str, float, float], ...] = (('small', 0.19, 0.25), ('medium', 0.28, 0.35), ('large', 0.39, 0.47))
  size_weights: tuple[float, ...] = (3, 4, 3)
  textures: tuple[str, ...] | None = None
  solid_share: float = 0.4
  repeat_category: bool = False
  min_visible: float = 0.6
  max_iou: float = 0.2
  overhang: float = 0.15
  backgrounds: tuple[str, ...] = ('flat', 'gradient', 'blotches')
  clutter: int = 7
  clutter_contrast: float = 45.0
  noise: float = 9.0
  brightness: float = 0.15
  plain_caption_share: float = 0.35
  num_captions: int = 3

  def __post_init__(self):
    if not 1 <= self.min_objects <= self.max_objects:
      raise ValueError(f'expected 1 <= min_objects <= max_objects, got {self.min_objects} and {self.max_objects}')
    counts = self.max_objects - self.min_objects + 1
    if self.count_weights is not None and len(self.count_weights) != counts:
      if self.count_weights != SceneSpec.count_weights:
        raise ValueError(f'count_weights: expected {counts} weights, one per count from {self.min_objects} to '
                         f'{self.max_objects}, got {len(self.count_weights)}')
      object.__setattr__(self, 'count_weights', None)  # the default weights belong to the default counts
    if len(self.size_weights) != len(self.sizes):
      raise ValueError(f'size_weights: expected {len(self.sizes)} weights, got {len(self.size_weights)}')


# 'local' is what a model of a million parameters learns in minutes: fewer kinds, fewer and larger objects, less clutter.
# Textures, backgrounds, wording and the held-out pairs are as in 'full'.
PRESETS = {
    'full': SceneSpec(),
    'local': SceneSpec(sprites='shapes:10x8', min_objects=2, max_objects=4, count_weights=(3, 4, 4),
                       sizes=(('small', 0.31, 0.36), ('medium', 0.40, 0.45), ('large', 0.49, 0.55)),
                       solid_share=0.8, clutter=2, noise=4.0, min_visible=0.8, overhang=0.08),
}


@dataclasses.dataclass(frozen=True)
class SceneObject:
  """One object. `box` is xyxy, normalised: the object's full extent, hidden parts included, clipped to the image."""
  box: tuple[float, float, float, float]
  name: str
  color: str
  size: str
  texture: str
  category: str
  caption: str
  visible: float  # share of its pixels that is in the image and not covered


@dataclasses.dataclass(frozen=True)
class Scene:
  """`image` uint8 RGB (H, W, 3); `objects` in drawing order, later over earlier; `captions` of the whole image."""
  image: np.ndarray
  objects: list[SceneObject]
  captions: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Plan:
  """A SceneSpec, resolved once: what draw_scene would otherwise look up for every image."""
  source: sprites_lib.SpriteSource
  concepts: tuple[sprites_lib.Concept, ...]
  textures: tuple[str, ...]
  count_steps: tuple[float, ...]
  size_steps: tuple[float, ...]


def _steps(weights):
  return tuple((np.cumsum(weights) / np.sum(weights)).tolist())


@functools.lru_cache(maxsize=32)
def _plan(spec: SceneSpec) -> _Plan:
  source = sprites_lib.load_sprites(spec.sprites) if isinstance(spec.sprites, str) else spec.sprites
  concepts = source.select(spec.split)
  textures = source.textures if spec.textures is None else spec.textures
  wrong = sorted(set(textures) - set(source.textures))
  if wrong or not textures:
    raise ValueError(f'textures: expected some of {list(source.textures)}, got {list(textures)}')
  if len(concepts) < (1 if spec.repeat_category else spec.min_objects):
    raise ValueError(f'{spec.sprites!r} has {len(concepts)} {spec.split} categories; '
                     f'a scene needs {spec.min_objects} different ones')
  weights = spec.count_weights or (1,) * (spec.max_objects - spec.min_objects + 1)
  return _Plan(source, concepts, textures, _steps(weights), _steps(spec.size_weights))


def _roll(dice, steps):
  """An index, by cumulative weights."""
  value = dice.unit()
  return next((i for i, step in enumerate(steps) if value < step), len(steps) - 1)


def _add_object(dice, canvas, plan, spec, concept):
  """Places `concept` somewhere, in a smaller size if need be. Returns whether it found room."""
  if len(plan.textures) == 1 or dice.unit() < spec.solid_share:
    texture = plan.textures[0]
  else:
    texture = dice.pick(plan.textures[1:])
  variant = dice.below(plan.source.num_variants)
  for size_index in range(_roll(dice, plan.size_steps), -1, -1):
    word, least, most = spec.sizes[size_index]
    sprite = plan.source.sprite(concept, texture, round(dice.between(least, most) * canvas.size), variant)
    h, w = sprite.solid.shape
    for _ in range(10):
      x = round(dice.between(-spec.overhang * w, canvas.size - (1 - spec.overhang) * w))
      y = round(dice.between(-spec.overhang * h, canvas.size - (1 - spec.overhang) * h))
      found = canvas.try_place(sprite, x, y, spec)
      if found is not None:
        palette = plan.source.palette(concept, (dice.unit(), dice.unit(), dice.unit()))
        canvas.paste(sprite, found, palette, concept, texture, word)
        return True
  return False


def _lay_out(dice, rng, size, plan, spec):
  """A canvas with at least spec.min_objects objects."""
  for _ in range(100):
    canvas = scene_canvas.Canvas(scene_canvas.background(dice, rng, size, spec))
    count = spec.min_objects + _roll(dice, plan.count_steps)
    used = set()
    for _ in range(count):
      concept = dice.pick(plan.concepts)
      while not spec.repeat_category and concept.category in used and len(used) < len(plan.concepts):
        concept = dice.pick(plan.concepts)
      if len(used) == len(plan.concepts) and not spec.repeat_category:
        break
      if _add_object(dice, canvas, plan, spec, concept):
        used.add(concept.category)
    if len(canvas.placed) >= spec.min_objects:
      return canvas
  raise ValueError(f'could not fit {spec.min_objects} objects into an image of {size} pixels a side; '
                   'allow fewer, smaller or more overlapping ones')


def draw_scene(rng: np.random.Generator, *, size: int = 64, spec: SceneSpec = SceneSpec()) -> Scene:
  """Draws one scene of `size` × `size` pixels; all of it depends on the state of `rng` alone.

  Raises:
    ValueError: the spec asks for more categories or textures than its sprites have, or for more objects than fit.
  """
  plan = _plan(spec)
  dice = scene_text.Dice(rng)
  canvas = _lay_out(dice, rng, size, plan, spec)
  image = canvas.finish(dice, spec)
  objects = []
  for o in canvas.placed:
    box = tuple(min(1.0, max(0.0, n / size)) for n in o.box)
    caption = scene_text.region_caption(dice, o.concept, size=o.size_word, texture=o.texture,
                                        plain_share=spec.plain_caption_share)
    objects.append(SceneObject(box, o.concept.name, o.concept.color, o.size_word, o.texture, o.concept.category,
                               caption, o.visible / o.area))
  return Scene(image, objects, scene_text.image_captions(dice, objects, spec.num_captions))


def encode_image(image: np.ndarray, encoding: str = 'jpeg') -> bytes:
  """uint8 RGB (H, W, 3) → JPEG (quality 93, full colour resolution) or PNG bytes."""
  bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
  if encoding == 'jpeg':
    # Halved colour resolution would smear twelve-pixel objects.
    options = [cv2.IMWRITE_JPEG_QUALITY, 93, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    return cv2.imencode('.jpg', bgr, options)[1].tobytes()
  if encoding == 'png':
    # Noise does not compress: searching for repeats would cost half of the time and save nothing.
    options = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_HUFFMAN_ONLY]
    return cv2.imencode('.png', bgr, options)[1].tobytes()
  raise ValueError(f"encoding: expected 'jpeg' or 'png', got {encoding!r}")


def write_scenes(out_dir, *, num_train: int, num_val: int, num_unseen: int, size: int = 64, seed: int = 0,
                 sprites: str | None = None, spec: SceneSpec = SceneSpec(), encoding: str = 'jpeg',
                 num_workers: int = 1, progress=None, overwrite: bool = False) -> dict[str, int]:
  """Draws a data set and writes it in the project's format (schema.write_dataset). A split of 0 scenes is left out.

  Args:
    out_dir: the folder to make.
    num_train, num_val, num_unseen: scenes per split.
    size: side of the images, pixels.
    seed: with split and number, decides every byte of a scene.
    sprites: as SceneSpec.sprites; None takes the spec's own, drawn shapes by default.
    spec: what scenes look like; its `split` is set by this function.
    encoding: 'jpeg' or 'png'.
    num_workers: processes that draw. The bytes do not depend on it. Above 1 the caller's script needs the usual
      `if __name__ == '__main__'` guard, as workers are spawned.
    progress: called with (split, examples written).
    overwrite: replace a data set that lies there.

  Returns:
    Split name → scenes written.

  Raises:
    ValueError: bad counts, size or encoding, or a spec that its sprites cannot fill.
    FileExistsError: `out_dir` is in the way.
  """
  from cloc_jax.data import schema  # drawing processes need none of its heavy imports
  spec = dataclasses.replace(spec, sprites=spec.sprites if sprites is None else sprites)
  counts = {'train': num_train, 'val': num_val, 'unseen': num_unseen}
  if min(counts.values()) < 0 or not any(counts.values()):
    raise ValueError(f'expected counts of at least 0, not all of them 0, got {counts}')
  if size < 16 or num_workers < 1:
    raise ValueError(f'expected size >= 16 and num_workers >= 1, got {size} and {num_workers}')
  encode_image(np.zeros((1, 1, 3), np.uint8), encoding)  # a wrong encoding or spec should fail before the first scene
  for split, count in counts.items():
    if count:
      source = _plan(dataclasses.replace(spec, split=_SPLITS[split][1])).source
  fields = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec) if f.name != 'split'}
  fields['sprites'] = spec.sprites if isinstance(spec.sprites, str) else type(spec.sprites).__name__
  meta = schema.DatasetMeta(
      name='scenes', description='Drawn scenes of named objects, with boxes, region captions and image captions.',
      categories=source.categories, unseen_categories=source.unseen_categories,
      extra={'seed': seed, 'size': size, 'encoding': encoding, 'spec': fields,
             'provenance': 'Drawn by cloc_jax; pictures from a font or folder stay under the licence of that source.'})
  with _mapper(num_workers) as mapper:
    draw = functools.partial(_examples, schema, mapper, size=size, seed=seed, spec=spec, encoding=encoding)
    splits = {split: draw(split=split, count=count) for split, count in counts.items() if count}
    return schema.write_dataset(out_dir, meta=meta, splits=splits, progress=progress, overwrite=overwrite)


@contextlib.contextmanager
def _mapper(num_workers):
  """Yields an ordered, lazy map: the built-in one, or that of a pool."""
  if num_workers == 1:
    yield map
    return
  # Spawned, not forked: the caller may run threads of JAX.
  with multiprocessing.get_context('spawn').Pool(num_workers, initializer=cv2.setNumThreads, initargs=(1,)) as pool:
    yield pool.imap


def _examples(schema, mapper, *, split, count, size, seed, spec, encoding):
  """Yields the schema.Examples of a split, in order."""
  spec = dataclasses.replace(spec, split=_SPLITS[split][1])
  draw = functools.partial(_draw_block, split=split, size=size, seed=seed, spec=spec, encoding=encoding)
  blocks = mapper(draw, [range(i, min(i + _BLOCK, count)) for i in range(0, count, _BLOCK)])
  for i, (image, objects, captions) in enumerate(itertools.chain.from_iterable(blocks)):
    regions = tuple(schema.Region(o.box, o.caption, o.category, source='scenes') for o in objects)
    yield schema.Example(image, f'{split}-{i:08d}', size, size, captions, regions)


def _draw_block(indices, *, split, size, seed, spec, encoding):
  """(encoded image, objects, captions) of each scene."""
  block = []
  for i in indices:
    scene = draw_scene(np.random.default_rng([seed, _SPLITS[split][0], i]), size=size, spec=spec)
    block.append((encode_image(scene.image, encoding), scene.objects, scene.captions))
  return block


def contact_sheet(scenes, *, columns: int = 4, scale: int = 4):
  """A PIL image to look at: each scene enlarged, boxes drawn, region captions beside them, image captions below."""
  from PIL import Image, ImageDraw
  scenes = list(scenes)
  if not scenes:
    raise ValueError('contact_sheet: no scenes given')
  cell = max(scene.image.shape[0] for scene in scenes) * scale
  lines = max(len(scene.captions) for scene in scenes)
  wrapped = 2 * lines  # every caption may take two lines
  height = cell + 11 * wrapped + 10
  rows = -(-len(scenes) // columns)
  sheet = Image.new('RGB', (columns * (cell + 8), rows * height), 'white')
  draw = ImageDraw.Draw(sheet)
  for i, scene in enumerate(scenes):
    left, top = (i % columns) * (cell + 8), (i // columns) * height
    sheet.paste(Image.fromarray(scene.image).resize((cell, cell), Image.Resampling.NEAREST), (left, top))
    for obj in scene.objects:
      x0, y0, x1, y1 = (round(n * cell) for n in obj.box)
      draw.rectangle((left + x0, top + y0, left + x1 - 1, top + y1 - 1), outline='lime')
      place = draw.textbbox((left + x0, max(top, top + y0 - 11)), obj.caption)
      draw.rectangle(place, fill='white')
      draw.text(place[:2], obj.caption, fill='black')
    per_line = cell // 6
    text = [part for caption in scene.captions for part in textwrap.wrap(f'- {caption}', per_line)]
    for j, part in enumerate(text[:wrapped]):
      draw.text((left, top + cell + 11 * j), part, fill='black')
  return sheet
