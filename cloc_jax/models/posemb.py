"""Sinusoidal codes of 2-D positions, the same for the ViT's patches and the Prompter's box corners."""
import math

import jax
import jax.numpy as jnp
import numpy as np

# Positions are measured in patches. The shortest period must resolve a fraction of a patch (box corners fall between
# patch centres), the longest must not repeat within the canvas: at 2 × the grid a half-turn spans the image.
MIN_PERIOD_PATCHES = 2.0


def frequencies(dim: int, *, grid: int) -> np.ndarray:
  """(dim // 4,) radians a patch, geometric from one turn in 2 × grid patches to one turn in MIN_PERIOD_PATCHES.

  The paper leaves the frequencies open. A language model's 10 000-patch longest period would leave most of the code
  constant over a grid of 8 to 24 patches; here every component varies across the image.
  """
  if dim % 4:
    raise ValueError(f'sincos2d: the width must be a multiple of 4, got {dim}')
  longest = max(2.0 * grid, MIN_PERIOD_PATCHES * 2)
  periods = np.geomspace(longest, MIN_PERIOD_PATCHES, dim // 4)
  return (2 * np.pi / periods).astype(np.float32)


def sincos2d(points, *, dim: int, grid: int):
  """Codes of points: (..., 2) xy normalised to [0, 1] → (..., dim): sin x, cos x, sin y, cos y.

  Args:
    points: positions on the canvas.
    dim: width of the code, a multiple of 4.
    grid: patches along one side; patch i has its centre at (i + 0.5) / grid.
  """
  freqs = frequencies(dim, grid=grid).reshape((1,) * points.ndim + (-1,))
  angles = (points * grid)[..., None] * freqs                        # (..., 2, dim/4)
  code = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)     # (..., 2, dim/2)
  return code.reshape(*points.shape[:-1], dim)


def patch_codes(*, dim: int, grid: int):
  """(1, grid², dim): the code of every patch centre, row by row."""
  centres = (jnp.arange(grid, dtype=jnp.float32) + 0.5) / grid
  y, x = jnp.meshgrid(centres, centres, indexing='ij')
  return sincos2d(jnp.stack([x, y], -1).reshape(1, grid * grid, 2), dim=dim, grid=grid)


def resample(table, *, patches: int):
  """A learned table (1, N, D) of a square grid, at another resolution: (1, patches, D), float32.

  Cubic, averaging where it shrinks, as open_clip does. An entry before the grid (the class token's) is kept as it is.

  Raises:
    ValueError: when either count is no square (or a square and one more).
  """
  table = jnp.asarray(table, jnp.float32)
  _, n, d = table.shape
  first = n - math.isqrt(n)**2
  old, new = math.isqrt(n), math.isqrt(patches)
  if first not in (0, 1) or new**2 + first != patches:
    raise ValueError(f'pos_embedding: expected a square grid, with or without a class token, and the same for the new '
                     f'size; got {n} and {patches} positions')
  grid = table[:, first:].reshape(1, old, old, d)
  grid = jax.image.resize(grid, (1, new, new, d), 'cubic')
  return jnp.concatenate([table[:, :first], grid.reshape(1, new * new, d)], 1)
