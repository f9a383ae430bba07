"""Weights of transformers' CLIP, SigLIP and SigLIP 2 in our models, against transformers itself; and back again."""
import jax
import numpy as np
import pytest

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

import foreign_models as foreign  # noqa: E402

from cloc_jax import trees  # noqa: E402
from cloc_jax.interop import hf_weights  # noqa: E402
from cloc_jax.models import vit  # noqa: E402

CASES = [('clip', dict(act='quick_gelu')), ('clip', dict(act='gelu')), ('clip', dict(eos=2)), ('siglip', {}),
         ('siglip2', {})]


def converted(family, **options):
  module = foreign.model(family, **options)
  spec = hf_weights.spec(module.config.to_dict())
  model, shapes = foreign.our_model(spec)
  found = hf_weights.to_jax(foreign.state(module), spec, expected=foreign.expected(shapes))
  return module, spec, model, shapes, found


def token_ids(family, rng):
  ids = rng.integers(3, foreign.VOCABULARY - 1, (4, foreign.LENGTH))
  if family == 'clip':
    for i, at in enumerate((2, 5, 8, 8)):
      ids[i, at:] = np.array([39] + [0] * 8)[:foreign.LENGTH - at]
  return ids


@pytest.mark.parametrize('family, options', CASES, ids=lambda x: str(x))
def test_embeddings_and_logits_are_torchs(family, options):
  module, spec, model, shapes, found = converted(family, **options)
  assert not trees.difference(shapes, found.params)
  rng = np.random.default_rng(0)
  images = rng.normal(size=(3, spec.image_size, spec.image_size, 3)).astype(np.float32)
  ids = token_ids(family, rng)
  with torch.no_grad():
    pixels = foreign.pixels(family, images if family != 'siglip' else np.pad(images, ((0, 0), (0, 3), (0, 3), (0, 0))))
    want_image = foreign.features(module.get_image_features(**pixels)).numpy()
    want_text = foreign.features(module.get_text_features(input_ids=torch.tensor(ids))).numpy()
    logits = module(input_ids=torch.tensor(ids), **pixels).logits_per_image.numpy()
    tokens = module.vision_model(*pixels.values()).last_hidden_state
    if family == 'clip':
      tokens = module.vision_model.post_layernorm(tokens[:, 1:])
  tower = {'out_dim': model.embed_dim} | model.image
  pooled, ours = jax.jit(vit.ViT(**tower).apply)({'params': found.params['img']}, images)
  np.testing.assert_allclose(pooled, want_image, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(ours, tokens, rtol=1e-5, atol=1e-5)
  encode = jax.jit(lambda params, ids: model.apply({'params': params}, ids, method=lambda m, x: m.txt(x)))
  text = encode(found.params, ids.astype(np.int32))
  np.testing.assert_allclose(text, want_text, rtol=1e-5, atol=1e-5)
  unit = lambda z: np.asarray(z) / np.linalg.norm(z, axis=-1, keepdims=True)
  scores = np.exp(found.params['t']) * unit(pooled) @ unit(text).T + found.params['b']
  np.testing.assert_allclose(scores, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('family, options', CASES, ids=lambda x: str(x))
def test_back_again_is_the_identity(family, options):
  module, spec, _, shapes, found = converted(family, **options)
  state = foreign.state(module)
  back = hf_weights.from_jax(found.params, family=family)
  assert set(back) == set(state)
  for name, x in state.items():
    assert back[name].flags['C_CONTIGUOUS']
    np.testing.assert_array_equal(back[name], x, err_msg=name, strict=True)
  rng = np.random.default_rng(1)
  params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
  if family == 'clip':
    params['b'] = np.zeros((), np.float32)
  again = hf_weights.to_jax(hf_weights.from_jax(params, family=family), spec).params
  jax.tree.map(np.testing.assert_array_equal, again, params)


def test_torch_loads_what_from_jax_writes():
  _, _, _, _, found = converted('clip')
  other = foreign.model('clip', seed=1)
  state = {k: torch.tensor(v) for k, v in hf_weights.from_jax(found.params, family='clip').items()}
  other.load_state_dict(state, strict=True)
  np.testing.assert_array_equal(other.visual_projection.weight.detach(), state['visual_projection.weight'])
