"""Images with captions and named boxes: COCO's files, JSONL rows, or scenes drawn on the spot."""
import collections
import dataclasses
import json
import pathlib
import random

import PIL.Image
import PIL.ImageDraw
import PIL.ImageOps

COLOURS = {'red': (220, 40, 40), 'green': (40, 170, 60), 'blue': (50, 80, 220), 'yellow': (235, 205, 50)}
SHAPES = ('circle', 'square', 'triangle')


@dataclasses.dataclass
class Picture:
  """image: a path or a PIL image. regions: (xyxy as fractions of the image, name)."""
  image: pathlib.Path | PIL.Image.Image
  captions: list[str] = dataclasses.field(default_factory=list)
  regions: list[tuple[list[float], str]] = dataclasses.field(default_factory=list)

  def load(self):
    """The image, upright.

    Raises:
      ValueError: naming a file that is no image.
    """
    if isinstance(self.image, PIL.Image.Image):
      return self.image
    try:
      with PIL.Image.open(self.image) as image:
        image.load()
        return PIL.ImageOps.exif_transpose(image)  # as CLOC's image processor sees it
    except OSError as error:
      raise ValueError(f'{self.image}: not an image that can be read ({error})') from None


def read(images, annotations, *, say=print):
  """Reads annotation files.

  Args:
    images: the folder of the images.
    annotations: COCO's captions_*.json and instances_*.json, or .jsonl with rows {"image", "captions", "regions":
      [{"box": xyxy as fractions, "caption"}]}; files of the same images are merged.
    say: called with a line on what was read and what was left out.

  Returns:
    Pictures with a caption or a region, in the files' order.

  Raises:
    ValueError, FileNotFoundError: naming the file and line, or the image, that is wrong.
  """
  folder, found, left_out = pathlib.Path(images), {}, collections.Counter()
  for path in map(pathlib.Path, annotations):
    (_read_rows if path.suffix == '.jsonl' else _read_coco)(path, found, left_out)
  pictures = []
  for name, picture in found.items():
    if not picture.captions and not picture.regions:
      left_out['images without annotations'] += 1
      continue
    if not (folder / name).is_file():
      raise FileNotFoundError(f'{folder / name}: no such image, but {annotations} name it')
    pictures.append(dataclasses.replace(picture, image=folder / name))
  if not pictures:
    raise ValueError(f'{annotations}: no image with a caption or a box')
  lost = ''.join(f', {count} {what} left out' for what, count in left_out.items())
  say(f'{len(pictures)} images, {sum(len(p.captions) for p in pictures)} captions, '
      f'{sum(len(p.regions) for p in pictures)} boxes{lost}')
  return pictures


def _read_coco(path, found, left_out):
  data = json.loads(path.read_text(encoding='utf-8'))
  if not isinstance(data, dict) or not {'images', 'annotations'} <= data.keys():
    raise ValueError(f'{path}: expected COCO\'s layout, an object with "images" and "annotations"')
  by_id = {image['id']: image for image in data['images']}
  names = {category['id']: category['name'] for category in data.get('categories', [])}
  for image in data['images']:
    found.setdefault(image['file_name'], Picture(image['file_name']))
  for one in data['annotations']:
    image = by_id.get(one['image_id'])
    if image is None:
      raise ValueError(f'{path}: annotation {one.get("id")} is of image {one["image_id"]}, which is not in "images"')
    picture = found[image['file_name']]
    if 'caption' in one:
      picture.captions.append(one['caption'].strip())
    elif one.get('iscrowd'):
      left_out['crowds'] += 1
    elif min(one['bbox'][2:]) <= 0:
      left_out['boxes without area'] += 1
    else:
      x, y, w, h = one['bbox']
      box = [x / image['width'], y / image['height'], (x + w) / image['width'], (y + h) / image['height']]
      picture.regions.append((box, names[one['category_id']]))


def _read_rows(path, found, left_out):
  with open(path, encoding='utf-8') as lines:
    for number, line in enumerate(lines, 1):
      try:
        row = json.loads(line)
        picture = found.setdefault(row['image'], Picture(row['image']))
        picture.captions += [*row.get('captions', []), *([row['caption']] if 'caption' in row else [])]
        for region in row.get('regions', []):
          box = [float(v) for v in region['box']]
          if len(box) != 4 or not (0 <= box[0] <= box[2] <= 1 and 0 <= box[1] <= box[3] <= 1):
            raise ValueError(f'box {box} is not xyxy in 0 … 1')
          if box[0] == box[2] or box[1] == box[3]:
            left_out['boxes without area'] += 1
          else:
            picture.regions.append((box, region.get('caption') or region['category']))
      except (ValueError, KeyError, TypeError) as error:
        expected = '{"image": …, "captions": […], "regions": [{"box": …, "caption": …}]}'
        raise ValueError(f'{path}:{number}: expected {expected}; {type(error).__name__}: {error}') from None


def draw(count, *, size=64, seed=0):
  """Scenes of two things of different colours, left and right: what a box holds cannot be told from the image alone."""
  rng = random.Random(seed)
  pictures = []
  for _ in range(count):
    image = PIL.Image.new('RGB', (size, size), (200, 200, 200))
    pen, regions = PIL.ImageDraw.Draw(image), []
    for left, colour in zip((0, size // 2), rng.sample(list(COLOURS), 2)):
      side, shape = rng.randint(size // 4, size * 7 // 16), rng.choice(SHAPES)
      x, y = left + rng.randint(0, size // 2 - side), rng.randint(0, size - side)
      corners = [x, y, x + side, y + side]
      if shape == 'circle':
        pen.ellipse(corners, COLOURS[colour])
      elif shape == 'square':
        pen.rectangle(corners, COLOURS[colour])
      else:
        pen.polygon([(x, y + side), (x + side, y + side), (x + side / 2, y)], COLOURS[colour])
      regions.append(([v / size for v in corners], f'{colour} {shape}'))
    rng.shuffle(regions)
    pictures.append(Picture(image, [f'a {regions[0][1]} and a {regions[1][1]}'], regions))
  return pictures
