"""The wording of scenes: what a region and what a whole image is called. Used by scenes.py alone."""
import functools

_SIZE_WORDS = {'small': ('small', 'little', 'tiny'), 'medium': ('medium', 'medium-sized'),
               'large': ('large', 'big', 'huge')}
_TEXTURE_WORDS = {'solid': ('solid', 'plain'), 'striped': ('striped',), 'dotted': ('dotted', 'spotted'),
                  'checkered': ('checkered',)}
_NUMBERS = ('no', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine', 'ten', 'eleven', 'twelve')
_SIDES = {(-1, 0): ('left of', 'to the left of'), (1, 0): ('right of', 'to the right of'),
          (0, -1): ('above', 'over'), (0, 1): ('below', 'under'), (0, 0): ('near', 'next to')}
_THIRDS = {(0, 0): 'at the top left', (1, 0): 'at the top', (2, 0): 'at the top right', (0, 1): 'on the left',
           (1, 1): 'in the middle', (2, 1): 'on the right', (0, 2): 'at the bottom left', (1, 2): 'at the bottom',
           (2, 2): 'at the bottom right'}


class Dice:
  """Random choices from one Generator, drawn in blocks: a scalar call of NumPy's costs ten times as much."""

  def __init__(self, rng):
    self._rng, self._next = rng, iter(()).__next__

  def unit(self) -> float:
    """Uniform in [0, 1)."""
    try:
      return self._next()
    except StopIteration:
      self._next = iter(self._rng.random(192).tolist()).__next__
      return self._next()

  def below(self, n: int) -> int:
    return int(self.unit() * n)

  def between(self, low: float, high: float) -> float:
    return low + (high - low) * self.unit()

  def pick(self, options):
    return options[int(self.unit() * len(options))]


@functools.lru_cache(maxsize=None)
def article(noun: str) -> str:
  """'an orange drop', 'a unicorn face': by letter, with the sounds that spelling hides."""
  vowel = noun.startswith('hour') or (
      noun.startswith(tuple('aeiou')) and not noun.startswith(('uni', 'use', 'eu', 'one', 'ufo', 'u-')))
  return f'an {noun}' if vowel else f'a {noun}'


def region_caption(dice: Dice, concept, *, size: str, texture: str, plain_share: float) -> str:
  """A phrase for one object; with probability `plain_share` its category alone, as class names appear in evaluation."""
  kind, color, colored = concept.name, concept.color, concept.category
  if dice.unit() < plain_share:
    return colored
  form = dice.below(12)
  size_word = dice.pick(_SIZE_WORDS[size])
  if color and form < 6:
    texture_word = dice.pick(_TEXTURE_WORDS[texture]) if texture else ''
    if form == 0:
      return f'{article(kind)} that is {color}'
    if form == 1:
      return f'{kind} in {color}'
    if form == 2 and texture:
      return f'{color} {texture_word} {kind}'
    if form == 3 and texture:
      return f'the {size_word} {texture_word} {colored}'
    if form == 4 and texture:
      return article(f'{texture_word} {colored}')
    return f'the {size_word} {kind} in {color}'
  if form < 8:
    return article(colored)
  if form == 8:
    return f'the {colored}'
  if form == 9:
    return article(f'{size_word} {colored}')
  return f'{size_word} {colored}' if form == 10 else f'the {size_word} {colored}'


def _listed(phrases) -> str:
  return phrases[0] if len(phrases) == 1 else f'{", ".join(phrases[:-1])} and {phrases[-1]}'


def _center(obj):
  x0, y0, x1, y1 = obj.box
  return (x0 + x1) / 2, (y0 + y1) / 2


def side_of(a, b) -> tuple[int, int]:
  """Where a stands as seen from b: (-1, 0) left, (1, 0) right, (0, -1) above, (0, 1) below, (0, 0) not clearly any."""
  (ax, ay), (bx, by) = _center(a), _center(b)
  dx, dy = ax - bx, ay - by
  if max(abs(dx), abs(dy)) < 0.15 or min(abs(dx), abs(dy)) > 0.7 * max(abs(dx), abs(dy)):
    return (0, 0)
  return ((1 if dx > 0 else -1), 0) if abs(dx) > abs(dy) else (0, (1 if dy > 0 else -1))


def _phrase(dice, obj):
  roll = dice.unit()
  if roll < 0.6:
    return article(obj.category)
  if roll < 0.8 or not obj.texture:
    return article(f'{dice.pick(_SIZE_WORDS[obj.size])} {obj.category}')
  return article(f'{dice.pick(_TEXTURE_WORDS[obj.texture])} {obj.category}')


def _relation(dice, objects):
  """'a red circle left of a blue star', and the objects not yet mentioned."""
  a, b, *rest = objects
  return f'{_phrase(dice, a)} {dice.pick(_SIDES[side_of(a, b)])} {_phrase(dice, b)}', rest


def _related_caption(dice, objects):
  if len(objects) < 2:
    return _placed_caption(dice, objects)
  text, rest = _relation(dice, objects)
  if len(rest) >= 2 and dice.unit() < 0.5:
    second, rest = _relation(dice, rest)
    text = f'{text}, {second}'
  if rest and dice.unit() < 0.7:
    text = f'{text} and {_phrase(dice, rest[0])}'
  return text


def _listing_caption(dice, objects):
  phrases = [_phrase(dice, o) for o in objects]
  form = dice.below(4)
  if form == 0:
    number = _NUMBERS[len(objects)] if len(objects) < len(_NUMBERS) else str(len(objects))
    return f'{number} object{"s" * (len(objects) > 1)}: {_listed(phrases)}'
  if form == 1:
    return f'a picture of {_listed(phrases)}'
  return _listed(phrases) if form == 2 else f'a scene with {_listed(phrases)}'


def _placed_caption(dice, objects):
  parts = []
  for obj in objects[:2 + dice.below(2)]:
    x, y = _center(obj)
    parts.append(f'{_phrase(dice, obj)} {_THIRDS[min(2, int(3 * x)), min(2, int(3 * y))]}')
  return _listed(parts)


_CAPTIONS = (_listing_caption, _related_caption, _placed_caption)


def image_captions(dice: Dice, objects, count: int) -> tuple[str, ...]:
  """`count` captions: in turn a listing of all objects, their relations, and their places; the order varies."""
  captions = []
  for i in range(count):
    start = dice.below(len(objects))
    order = [*objects[start:], *objects[:start]]
    if dice.unit() < 0.5:
      order.reverse()
    captions.append(_CAPTIONS[i % len(_CAPTIONS)](dice, order))
  return tuple(captions)
