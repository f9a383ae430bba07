"""JPEG headers against Pillow, and decoding at a reduced size against decoding in full."""
import io

import marked_pictures as pictures
import numpy as np
import PIL.Image
import PIL.ImageFilter
import PIL.ImageOps
import pytest

from cloc_jax import geometry as geometry_lib
from cloc_jax.data import jpeg
from cloc_jax.data import transforms


def photo(height, width, seed=0):
  """A blurred random picture: no two places look alike, and little is lost to compression."""
  noise = np.random.default_rng(seed).integers(0, 256, (-(-height // 16), -(-width // 16), 3), np.uint8)
  big = PIL.Image.fromarray(noise).resize((width, height), PIL.Image.BICUBIC)
  return np.asarray(big.filter(PIL.ImageFilter.GaussianBlur(4)))


def saved(image, **options):
  out = io.BytesIO()
  (image if isinstance(image, PIL.Image.Image) else PIL.Image.fromarray(image)).save(
      out, 'JPEG', **({'quality': 95, 'subsampling': 0} | options))
  return out.getvalue()


def psnr(a, b):
  return 10 * np.log10(255**2 / max(np.mean((a.astype(np.float64) - b)**2), 1e-9))


def shrunk(data, *, image_size, mode):
  opened = transforms.open_image(data, where='here', mode=mode)
  made = geometry_lib.resize_with_pad(height=opened.height, width=opened.width, canvas=image_size)
  return opened.on_canvas(made)


def exif(orientation, *, endian='little'):
  """An APP1 segment's payload with one IFD of three entries, by hand (TIFF 6.0, section 2)."""
  order = {'little': b'II', 'big': b'MM'}[endian]
  number = lambda value, size: value.to_bytes(size, endian)
  entry = lambda tag, value: number(tag, 2) + number(3, 2) + number(1, 4) + number(value, 2) + b'\0\0'
  entries = entry(0x0100, 7) + entry(0x0112, orientation) + entry(0x0213, 1)
  return b'Exif\0\0' + order + number(42, 2) + number(8, 4) + number(3, 2) + entries + number(0, 4)


@pytest.mark.parametrize('kind', [k for k in pictures.KINDS if 'jpeg' in k or k == 'progressive'])
def test_the_header_is_what_pillow_reads(kind):
  data = pictures.encode(pictures.marked(33, 70, (5, 5, 20, 20)), kind)
  header = jpeg.read_header(data)
  with PIL.Image.open(io.BytesIO(data)) as image:
    assert (header.width, header.height) == image.size and header.channels == len(image.getbands())
    assert header.orientation == image.getexif().get(0x0112, 1)
    assert header.upright == PIL.ImageOps.exif_transpose(image).size[::-1] == (33, 70)
  assert header.common == (kind != 'cmyk jpeg')


@pytest.mark.parametrize('endian', ['little', 'big'])
@pytest.mark.parametrize('orientation', [0, 1, 3, 8, 9])
def test_orientation_in_either_byte_order(endian, orientation):
  data = saved(photo(24, 40), exif=exif(orientation, endian=endian))
  assert jpeg.read_header(data).orientation == (orientation if 1 <= orientation <= 8 else 1)
  both = [shrunk(data, image_size=12, mode=mode) for mode in transforms.DECODE_MODES]
  assert psnr(*both) > 35


@pytest.mark.parametrize('damage', [
    lambda e: e[:20], lambda e: e[:6], lambda e: b'Exif\0\0XX' + e[8:],
    lambda e: e[:10] + b'\xff\xff\xff\x7f' + e[14:], lambda e: e[:14] + b'\xff\xff' + e[16:18]])
def test_damaged_exif_means_upright_in_both_modes(damage):
  data = saved(photo(40, 64), exif=damage(exif(6)))
  assert jpeg.read_header(data).orientation == 1
  both = [shrunk(data, image_size=20, mode=mode) for mode in transforms.DECODE_MODES]
  assert psnr(*both) > 35


@pytest.mark.parametrize('data', [
    b'', b'\xff\xd8', b'\xff\xd8\xff\xd9', b'\xff\xd8\xff\xc0\x00\x11\x08', b'\xff\xd8' + b'\xff' * 40,
    b'\xff\xd8\xff\xe0\x00\x00' * 4])
def test_no_header(data):
  assert jpeg.read_header(data) is None


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('reduction', [1, 2, 4, 8, 20])
def test_fast_is_close_to_exact(orientation, reduction):
  """Also at sizes that no block divides: the last row and column then stand for part of a block."""
  for seed in range(3):
    height, width = (int(v) for v in np.random.default_rng([seed, reduction]).integers(150, 300, 2))
    data = saved(photo(height, width, seed), exif=exif(orientation))
    side = int(max(height, width) / (reduction * 1.1))
    exact, fast = (shrunk(data, image_size=side, mode=mode) for mode in transforms.DECODE_MODES)
    assert psnr(exact, fast) > 33, (height, width, side)


def test_exact_is_decode_and_resize():
  for kind in pictures.KINDS:
    data = pictures.encode(photo(90, 131), kind)
    image = transforms.decode(data, where='')
    exact = shrunk(data, image_size=40, mode='exact')
    np.testing.assert_array_equal(exact, transforms.prepare_image(image, image_size=40)[0])
    if 'jpeg' not in kind and kind != 'progressive' or kind == 'cmyk jpeg':
      np.testing.assert_array_equal(shrunk(data, image_size=40, mode='fast'), exact)


def test_fast_on_photos(coco_mini):
  found = [psnr(*(shrunk(path.read_bytes(), image_size=224, mode=mode) for mode in transforms.DECODE_MODES))
           for path in sorted(coco_mini.glob('val2017/*.jpg'))[:30]]
  assert np.mean(found) > 35 and min(found) > 25


@pytest.mark.parametrize('part', [0.02, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_an_error_in_fast_mode_too(part):
  data = saved(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
  with pytest.raises(transforms.ImageError, match='^here: '):
    shrunk(data[:int(part * len(data))], image_size=16, mode='fast')


def test_what_opencv_does_not_take_is_left_to_pillow(monkeypatch):
  data = saved(photo(64, 64))
  want = shrunk(data, image_size=16, mode='exact')
  monkeypatch.setattr(jpeg, 'decode_reduced', lambda *args, **kwargs: None)
  np.testing.assert_array_equal(shrunk(data, image_size=16, mode='fast'), want)
  header = jpeg.Header(height=32, width=64, channels=3, common=True, orientation=1)
  monkeypatch.setattr(jpeg, 'read_header', lambda data: header)
  with pytest.raises(transforms.ImageError, match='here: the header says 32×64.*64×64'):
    shrunk(data, image_size=16, mode='fast')


def test_refusals():
  with pytest.raises(ValueError, match="'exact', 'fast'.*'quick'"):
    transforms.open_image(saved(photo(8, 8)), where='', mode='quick')
  for mode in transforms.DECODE_MODES:
    opened = transforms.open_image(saved(photo(40, 60)), where='', mode=mode)
    with pytest.raises(ValueError, match='60×40.*40×60'):
      opened.on_canvas(geometry_lib.resize_with_pad(height=60, width=40, canvas=16))
