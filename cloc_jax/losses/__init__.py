"""The training loss: L = L_CLIP + λ (L_CLOC + L_grounding), SPEC §3."""
import jax.numpy as jnp

from cloc_jax.batch import Batch, Outputs
from cloc_jax.losses.contrastive import CONTRASTS
from cloc_jax.losses.grounding import GROUNDINGS
from cloc_jax.losses.tiles import Tiling


def _choice(name, options, what):
  if name not in options:
    raise ValueError(f'{what}: expected one of {sorted(options)}, got {name!r}')
  return options[name]


def total(outputs: Outputs, batch: Batch, *, image_text: str = 'softmax', region_text: str = 'softmax',
          grounding: str = 'l2', region_weight: float = 1.0, grounding_weight: float = 1.0, lambda0: float = 1.0,
          filter_threshold: float | None = 0.9, filter_from_step: int = 0, transport: str = 'gather', tile: int = 1024,
          tile_dtype: str = 'float32', mesh=None, step=None):
  """The scalar to minimise, and every term of it.

  Args:
    outputs: of the model on `batch`; leading axes may be sharded, all sums are global.
    batch: its masks and boxes are read, nothing else.
    image_text, region_text: 'softmax' (the paper) or 'sigmoid' (SigLIP).
    grounding: 'l2' (the paper) or 'l1_giou'.
    region_weight, grounding_weight: factors of L_CLOC and L_grounding inside the bracket; 0 leaves a term out.
    lambda0: λ₀; λ = λ₀ · (images that have a region) / (images).
    filter_threshold: region texts with a cosine above it are not each other's negatives; None turns it off.
    filter_from_step: the filter waits for this step. A text tower that starts from random numbers finds all texts
      alike; filtered, they would not be told apart by anything. The paper's long schedule needs no such wait.
    transport, tile, tile_dtype: how the pairs of the contrastive losses are computed; see tiles.Tiling.make. They change
      the result by rounding alone.
    mesh: the devices that the leading axes are split over; None is a single one.
    step: the step this batch belongs to, scalar; None is "after the wait".

  Returns:
    (loss, metrics): metrics are float32 scalars, each a plain reading of its name.
  """
  b, m = batch.region_mask.shape
  tiling = Tiling.make(mesh=mesh, transport=transport, tile=tile, dtype=tile_dtype)
  contrast = _choice(image_text, CONTRASTS, 'loss.image_text')
  image = contrast(outputs.z_image, outputs.z_text, logit_scale=outputs.logit_scale, logit_bias=outputs.logit_bias,
                   mask_n=batch.image_mask, tiling=tiling)
  has_region_b = batch.region_mask.any(-1)
  # Padding examples hold neither a caption nor a region: they are not images.
  images = jnp.maximum((batch.image_mask | has_region_b).sum(), 1)
  lam = lambda0 * has_region_b.sum() / images
  metrics = {'loss_image_text': image.loss, 'logit_scale': outputs.logit_scale, 'lambda': lam,
             'regions_per_image': batch.region_mask.sum() / images}
  bracket = jnp.zeros(())
  if outputs.z_region is not None and region_weight:
    contrast = _choice(region_text, CONTRASTS, 'loss.region_text')
    if filter_threshold is not None and filter_from_step and step is not None:
      # No cosine is above 2: the filter is there, and passes everything.
      filter_threshold = jnp.where(step < filter_from_step, 2.0, filter_threshold)
    flat = lambda x: x.reshape(b * m, *x.shape[2:])
    region = contrast(flat(outputs.z_region), flat(outputs.z_region_text), logit_scale=outputs.region_logit_scale,
                      logit_bias=outputs.region_logit_bias, mask_n=flat(batch.region_mask),
                      filter_threshold=filter_threshold, tiling=tiling)
    bracket += region_weight * region.loss
    metrics |= {'loss_region_text': region.loss, 'filtered_pairs': region.filtered,
                'region_logit_scale': outputs.region_logit_scale}
  if outputs.pred_boxes is not None and grounding_weight:
    ground = _choice(grounding, GROUNDINGS, 'loss.grounding')(outputs.pred_boxes, batch.boxes, batch.region_mask)
    bracket += grounding_weight * ground
    metrics['loss_grounding'] = ground
  loss = image.loss + lam * bracket
  metrics = {'loss': loss, **metrics}
  return loss, {k: jnp.asarray(v, jnp.float32) for k, v in metrics.items()}
