"""The point of an image that is most like a text, from its grid of patch embeddings."""
import jax
import jax.numpy as jnp
import numpy as np

from cloc_jax.geometry import Geometry


def on_image(geometry: Geometry, *, grid: tuple[int, int]) -> np.ndarray:
  """(h, w) bool: the patches whose centre lies on the image, and not on the padding around it."""
  h, w = grid
  x, y = (np.arange(w) + 0.5) / w, (np.arange(h) + 0.5) / h
  x0, y0, x1, y1 = geometry.boxes_to_canvas(np.array([0, 0, geometry.width, geometry.height]))
  inside = ((y >= y0) & (y <= y1))[:, None] & ((x >= x0) & (x <= x1))[None]
  # An image thinner than a patch may hold no centre; then every patch may answer.
  return inside if inside.any() else np.ones((h, w), bool)


@jax.jit
def most_similar(patches_bhwe, z_text_bme, on_image_bhw):
  """Centres of the patches of largest cosine: (B, h, w, E), (B, M, E), (B, h, w) bool → (B, M, 2) xy in 0 … 1.

  Patches where `on_image` is False do not answer. Of equals the first row, then the first column, does.
  """
  b, h, w, e = patches_bhwe.shape
  z = patches_bhwe.reshape(b, h * w, e).astype(jnp.float32)
  z = z * jax.lax.rsqrt(jnp.sum(z * z, -1, keepdims=True) + 1e-12)
  similarity = jnp.einsum('bne,bme->bmn', z, z_text_bme.astype(jnp.float32))
  best = jnp.where(on_image_bhw.reshape(b, 1, h * w), similarity, -jnp.inf).argmax(-1)
  return jnp.stack([(best % w + 0.5) / w, (best // w + 0.5) / h], -1)
