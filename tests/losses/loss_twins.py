"""The losses of SPEC §3 written as sums over explicit indices in float64: slow, and independent of the project."""
import math

import numpy as np


def unit(rng, *shape):
  z = rng.normal(size=shape)
  return z / np.linalg.norm(z, axis=-1, keepdims=True)


def texts_with_twins(rng, count, width):
  """`count` unit vectors, some of them near copies of others (cosine about 0.97), none near a cosine of 0.9."""
  for _ in range(200):
    z = unit(rng, count, width)
    z[1] = z[0] + 0.12 * rng.normal(size=width)
    z[-1] = z[2] + 0.12 * rng.normal(size=width)
    z[3] = z[0]
    z /= np.linalg.norm(z, axis=-1, keepdims=True)
    cosines = (z @ z.T)[np.triu_indices(count, 1)]
    if np.abs(cosines - 0.9).min() > 0.005 and (cosines > 0.9).sum() >= 4:
      return z
  raise AssertionError('no fitting draw')


def is_similar(texts, k, other, threshold):
  return threshold is not None and k != other and float(np.dot(texts[k], texts[other])) > threshold


def softmax_twin(a, texts, scale, bias, mask, threshold, *, directions=('rows', 'columns')):
  """(L_a→text + L_text→a) / 2. `directions` says where the filter applies; the paper's is both."""
  del bias
  valid = [k for k in range(len(a)) if mask[k]]
  loss = 0.0
  for k in valid:
    own = math.exp(scale * np.dot(a[k], texts[k]))
    to_text = to_a = 0.0
    for other in valid:
      similar = is_similar(texts, k, other, threshold)
      if not (similar and 'rows' in directions):
        to_text += math.exp(scale * np.dot(a[k], texts[other]))
      if not (similar and 'columns' in directions):
        to_a += math.exp(scale * np.dot(a[other], texts[k]))
    loss += -math.log(own / to_text) - math.log(own / to_a)
  return loss / (2 * max(len(valid), 1))


def sigmoid_twin(a, texts, scale, bias, mask, threshold):
  """−1/N Σ_kk' log σ(±(scale · cos + bias))."""
  valid = [k for k in range(len(a)) if mask[k]]
  loss = 0.0
  for k in valid:
    for other in valid:
      if is_similar(texts, k, other, threshold):
        continue
      logit = scale * np.dot(a[k], texts[other]) + bias
      loss += math.log1p(math.exp(-logit if k == other else logit))
  return loss / max(len(valid), 1)


CONTRAST_TWINS = {'softmax': softmax_twin, 'sigmoid': sigmoid_twin}


def filtered_twin(texts, mask, threshold):
  pairs = [(k, o) for k in range(len(texts)) for o in range(len(texts)) if k != o and mask[k] and mask[o]]
  return sum(is_similar(texts, k, o, threshold) for k, o in pairs) / max(len(pairs), 1)


def l2_twin(pred, boxes, mask):
  total, count = 0.0, 0
  for i, j in np.argwhere(mask):
    count += 1
    for side in range(4):
      total += (boxes[i, j, side] - pred[i, j, side])**2
  return total / (4 * max(count, 1))


def _area(box):
  return max(box[2] - box[0], 0) * max(box[3] - box[1], 0)


def giou_twin(a, b):
  common = _area([max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])])
  hull = _area([min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])])
  union = _area(a) + _area(b) - common
  return common / union - (hull - union) / hull


def l1_giou_twin(pred, boxes, mask):
  total, count = 0.0, 0
  for i, j in np.argwhere(mask):
    count += 1
    distance = sum(abs(boxes[i, j, side] - pred[i, j, side]) for side in range(4)) / 4
    total += 5 * distance + 2 * (1 - giou_twin(pred[i, j], boxes[i, j]))
  return total / max(count, 1)


GROUNDING_TWINS = {'l2': l2_twin, 'l1_giou': l1_giou_twin}


def total_twin(values, *, boxes, image_mask, region_mask, image_text='softmax', region_text='softmax', grounding='l2',
               region_weight=1.0, grounding_weight=1.0, lambda0=1.0, filter_threshold=0.9):
  """L_CLIP + λ (L_CLOC + L_grounding) of a dictionary with the fields of Outputs. Returns (loss, terms)."""
  v = values
  image = CONTRAST_TWINS[image_text](v['z_image'], v['z_text'], v['logit_scale'], v['logit_bias'], image_mask, None)
  regions = [(i, j) for i in range(len(region_mask)) for j in range(len(region_mask[i])) if region_mask[i][j]]
  z_region = [v['z_region'][i, j] for i, j in regions]
  z_text = [v['z_region_text'][i, j] for i, j in regions]
  region = CONTRAST_TWINS[region_text](z_region, z_text, v['region_logit_scale'], v['region_logit_bias'],
                                       [True] * len(regions), filter_threshold)
  ground = GROUNDING_TWINS[grounding](v['pred_boxes'], boxes, region_mask)
  images = sum(bool(image_mask[i]) or any(region_mask[i]) for i in range(len(image_mask)))
  lam = lambda0 * len({i for i, _ in regions}) / max(images, 1)
  loss = image + lam * (region_weight * region + grounding_weight * ground)
  return loss, {'loss_image_text': image, 'loss_region_text': region, 'loss_grounding': ground, 'lambda': lam,
                'filtered_pairs': filtered_twin(z_text, [True] * len(regions), filter_threshold),
                'regions_per_image': len(regions) / max(images, 1)}


def numeric_gradient(f, x, *, step=1e-6):
  """Central differences of a scalar function of one float64 array (or number)."""
  x = np.array(x, np.float64)
  gradient = np.zeros(x.shape)
  for index in np.ndindex(*x.shape):
    values = []
    for sign in (1, -1):
      moved = x.copy()
      moved[index] += sign * step
      values.append(f(moved))
    gradient[index] = (values[0] - values[1]) / (2 * step)
  return gradient
