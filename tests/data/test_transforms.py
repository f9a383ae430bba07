"""Decoding against Pillow, resizing against plain arithmetic."""
import io

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest

from cloc_jax import geometry
from cloc_jax.data import transforms


def photo(height=60, width=91):
  """A smooth picture in which no two corners look alike."""
  y, x = np.mgrid[0:1:height * 1j, 0:1:width * 1j]
  return (np.stack([x, y, (1 - x) * y], -1) * 255).astype(np.uint8)


def encoded(image, kind, **options):
  out = io.BytesIO()
  (image if isinstance(image, PIL.Image.Image) else PIL.Image.fromarray(image)).save(out, kind, **options)
  return out.getvalue()


def by_pillow(data):
  return np.asarray(PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(data))).convert('RGB'))


@pytest.mark.parametrize('kind, tolerance', [
    ('PNG', 0), ('BMP', 0), ('TIFF', 0), ('GIF', 0), ('JPEG', 2), ('WEBP', 6)])
@pytest.mark.parametrize('mode', ['RGB', 'L', 'P', 'RGBA', 'CMYK'])
def test_formats_and_modes(kind, tolerance, mode):
  try:
    data = encoded(PIL.Image.fromarray(photo()).convert(mode), kind)
  except (OSError, ValueError):
    pytest.skip(f'no {mode} in {kind}')
  image = transforms.decode(data, where='here')
  assert image.dtype == np.uint8 and image.shape == (60, 91, 3)
  np.testing.assert_allclose(image.astype(int), by_pillow(data), atol=tolerance)


def test_sixteen_bits_are_scaled_not_clipped():
  grey = photo()[..., 0]
  data = encoded(PIL.Image.fromarray(grey.astype(np.uint16) * 257), 'PNG')
  want = np.repeat(grey[..., None], 3, -1)
  np.testing.assert_array_equal(transforms.decode(data, where='here'), want)
  np.testing.assert_array_equal(transforms.as_rgb(PIL.Image.open(io.BytesIO(data))), want)


@pytest.mark.parametrize('kind, mode', [(np.int32, 'I'), (np.float32, 'F')])
def test_what_pillow_alone_reads_is_read_without_a_word(kind, mode, capfd):
  image = PIL.Image.fromarray(photo()[..., 0].astype(kind))
  assert image.mode == mode and transforms.decode(encoded(image, 'TIFF'), where='here').shape == (60, 91, 3)
  assert capfd.readouterr() == ('', '')


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('kind', ['JPEG', 'PNG'])
def test_exif_orientation_is_applied(kind, orientation):
  exif = PIL.Image.Exif()
  exif[0x0112] = orientation
  data = encoded(photo(), kind, exif=exif)
  image = transforms.decode(data, where='here')
  assert image.shape == ((91, 60, 3) if orientation >= 5 else (60, 91, 3))
  np.testing.assert_allclose(image.astype(int), by_pillow(data), atol=2)
  np.testing.assert_array_equal(transforms.as_rgb(PIL.Image.open(io.BytesIO(data))), by_pillow(data))


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP', 'GIF'])
@pytest.mark.parametrize('part', [0.2, 0.5, 0.9, 0.99])
def test_a_truncated_file_is_an_error_that_names_the_record(kind, part):
  data = encoded(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8), kind)
  with pytest.raises(transforms.ImageError, match='^record 7: '):
    transforms.decode(data[:int(part * len(data))], where='record 7')


def test_a_truncated_jpeg_is_not_left_to_opencv(monkeypatch):
  # Some versions of OpenCV return the missing rows as grey, without a word.
  monkeypatch.setattr(transforms, '_decode_opencv', lambda data: np.full((60, 91, 3), 128, np.uint8))
  data = encoded(photo(), 'JPEG')
  transforms.decode(data, where='here')
  with pytest.raises(transforms.ImageError):
    transforms.decode(data[:-200], where='here')
  with pytest.raises(transforms.ImageError):
    transforms.decode(encoded(photo(), 'PNG')[:-200], where='here')


def test_bytes_after_the_end_do_no_harm():
  data = encoded(photo(), 'JPEG')
  np.testing.assert_allclose(
      transforms.decode(data + b'\0' * 10, where='').astype(int), transforms.decode(data, where=''), atol=2)


@pytest.mark.parametrize('data', [b'', b'<html>404</html>', b'\xff\xd8\xff\xd9', b'\x89PNG\r\n\x1a\nIEND\xaeB`\x82'])
def test_what_is_no_image_is_an_error(data):
  with pytest.raises(transforms.ImageError, match='^here: '):
    transforms.decode(data, where='here')


def test_shrinking_averages():
  image = np.random.default_rng(0).integers(0, 256, (48, 96, 3), np.uint8)
  made = geometry.resize_with_pad(height=48, width=96, canvas=24)
  canvas = transforms.resize_with_pad(image, made, pad_value=9)
  want = image.reshape(12, 4, 24, 4, 3).mean((1, 3))
  np.testing.assert_allclose(canvas[6:18].astype(float), want, atol=0.51)
  assert (canvas[:6] == 9).all() and (canvas[18:] == 9).all()


def test_enlarging_interpolates_between_pixel_centres():
  row = np.array([0, 100, 200], np.uint8)
  image = np.repeat(np.tile(row, (3, 1))[..., None], 3, -1)
  canvas, made = transforms.prepare_image(image, image_size=12)
  assert made.scale_xy.tolist() == [4, 4]
  # Pixel i of the canvas has its centre at (i + 0.5) / 4 of the original, whose centres are at 0.5, 1.5, 2.5.
  want = np.interp((np.arange(12) + 0.5) / 4, [0.5, 1.5, 2.5], row)
  np.testing.assert_allclose(canvas[5, :, 0], want, atol=0.51)


def test_an_image_of_the_right_size_is_not_touched():
  image = photo(64, 64)
  canvas, _ = transforms.prepare_image(image, image_size=64)
  np.testing.assert_array_equal(canvas, image)


@pytest.mark.parametrize('pad, rows', [('center', slice(8, 24)), ('corner', slice(0, 16))])
def test_padding_is_grey_and_where_it_should_be(pad, rows):
  canvas, _ = transforms.prepare_image(np.zeros((16, 32, 3), np.uint8), image_size=32, pad=pad)
  assert (canvas[rows] == 0).all()
  assert (np.delete(canvas, np.arange(32)[rows], 0) == 127).all()


def test_a_flipped_geometry_mirrors_the_canvas():
  image = photo()
  made = geometry.resize_with_pad(height=60, width=91, canvas=32, pad='corner')
  flipped = transforms.resize_with_pad(image, made.flip())
  np.testing.assert_array_equal(flipped, transforms.resize_with_pad(image, made)[:, ::-1])
  assert flipped.flags.c_contiguous


def test_a_geometry_of_another_image_is_refused():
  made = geometry.resize_with_pad(height=60, width=91, canvas=32)
  with pytest.raises(ValueError, match='60×91.*91×60'):
    transforms.resize_with_pad(photo(91, 60), made)


def test_prepare_image_takes_what_people_have():
  image = photo()
  want, made = transforms.prepare_image(image, image_size=32)
  assert want.shape == (32, 32, 3) and (made.height, made.width) == (60, 91)
  for same in (PIL.Image.fromarray(image), np.dstack([image, image[..., 0]])):
    np.testing.assert_array_equal(transforms.prepare_image(same, image_size=32)[0], want)
  grey = transforms.prepare_image(image[..., 0], image_size=32)[0]
  np.testing.assert_array_equal(grey, transforms.prepare_image(PIL.Image.fromarray(image[..., 0]), image_size=32)[0])
  with pytest.raises(TypeError, match='uint8.*scale'):
    transforms.prepare_image(image / 255, image_size=32)
  with pytest.raises(ValueError, match=r'\(2, 60, 91, 3\)'):
    transforms.prepare_image(np.stack([image, image]), image_size=32)


@pytest.mark.parametrize('text, sides', [
    ('a dog left of a cat', True), ('The RIGHT-hand drawer', True), ('the leftmost cup', True), ('Right.', True),
    ('turning rightwards', True), ('leftover pizza', False), ('a bright light', False), ('cleft', False), ('', False)])
def test_mentions_sides(text, sides):
  assert transforms.mentions_sides(text) == sides
