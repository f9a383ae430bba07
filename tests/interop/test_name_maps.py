"""Name maps of open_clip, OpenAI and big_vision by their documented names and shapes, and each direction after the other."""
import jax
import numpy as np
import pytest

from cloc_jax import models, trees
from cloc_jax.batch import abstract_batch
from cloc_jax.interop import big_vision, open_clip, openai, spec as spec_lib

D, E, T, LAYERS, WORDS, LENGTH = 16, 6, 12, 2, 20, 5

# Names and shapes as open_clip/model.py, transformer.py (its CLIP class) and OpenAI's model.py give them.
CLIP_BLOCK = {
    'attn.in_proj_bias': ('3d',), 'attn.in_proj_weight': ('3d', 'd'), 'attn.out_proj.bias': ('d',),
    'attn.out_proj.weight': ('d', 'd'), 'ln_1.bias': ('d',), 'ln_1.weight': ('d',), 'ln_2.bias': ('d',),
    'ln_2.weight': ('d',), 'mlp.c_fc.bias': ('4d',), 'mlp.c_fc.weight': ('4d', 'd'), 'mlp.c_proj.bias': ('d',),
    'mlp.c_proj.weight': ('d', '4d')}
# timm's VisionTransformer under TimmModel ('visual.trunk').
TIMM_BLOCK = {
    'attn.proj.bias': ('d',), 'attn.proj.weight': ('d', 'd'), 'attn.qkv.bias': ('3d',), 'attn.qkv.weight': ('3d', 'd'),
    'mlp.fc1.bias': ('4d',), 'mlp.fc1.weight': ('4d', 'd'), 'mlp.fc2.bias': ('d',), 'mlp.fc2.weight': ('d', '4d'),
    'norm1.bias': ('d',), 'norm1.weight': ('d',), 'norm2.bias': ('d',), 'norm2.weight': ('d',)}


def shapes_of(table, prefix, width):
  sizes = {'d': width, '3d': 3 * width, '4d': 4 * width}
  return {prefix + name: tuple(sizes[s] for s in shape) for name, shape in table.items()}


def stack(table, prefix, width):
  return {k: v for layer in range(LAYERS) for k, v in shapes_of(table, f'{prefix}{layer}.', width).items()}


def text_shapes(prefix, width):
  return {**stack(CLIP_BLOCK, f'{prefix}transformer.resblocks.', width), f'{prefix}ln_final.bias': (width,),
          f'{prefix}ln_final.weight': (width,), f'{prefix}positional_embedding': (LENGTH, width),
          f'{prefix}token_embedding.weight': (WORDS, width)}


VISUAL = {**stack(CLIP_BLOCK, 'visual.transformer.resblocks.', D), 'visual.class_embedding': (D,),
          'visual.conv1.weight': (D, 3, 4, 4), 'visual.ln_post.bias': (D,), 'visual.ln_post.weight': (D,),
          'visual.ln_pre.bias': (D,), 'visual.ln_pre.weight': (D,), 'visual.positional_embedding': (10, D),
          'visual.proj': (D, E)}
POOL = 'visual.trunk.attn_pool.'
GOLDEN = {
    'open_clip': {**VISUAL, **text_shapes('', T), 'text_projection': (T, E), 'logit_scale': ()},
    'open_clip_custom': {**VISUAL, **text_shapes('text.', T), 'text.text_projection': (T, E), 'logit_scale': ()},
    'open_clip_siglip': {
        **stack(TIMM_BLOCK, 'visual.trunk.blocks.', D), 'visual.trunk.norm.bias': (D,), 'visual.trunk.norm.weight': (D,),
        'visual.trunk.patch_embed.proj.bias': (D,), 'visual.trunk.patch_embed.proj.weight': (D, 3, 4, 4),
        'visual.trunk.pos_embed': (1, 9, D), f'{POOL}latent': (1, 1, D), f'{POOL}q.weight': (D, D), f'{POOL}q.bias': (D,),
        f'{POOL}kv.weight': (2 * D, D), f'{POOL}kv.bias': (2 * D,), f'{POOL}proj.weight': (D, D), f'{POOL}proj.bias': (D,),
        f'{POOL}norm.weight': (D,), f'{POOL}norm.bias': (D,),
        **{f'{POOL}{k}': v for k, v in shapes_of(TIMM_BLOCK, '', D).items() if k.startswith('mlp.')},
        **text_shapes('text.', T), 'text.text_projection.weight': (D, T), 'text.text_projection.bias': (D,),
        'logit_scale': (), 'logit_bias': ()},
}


def _big_vision_block(prefix, d, heads):
  attention = f'{prefix}MultiHeadDotProductAttention_0/'
  out = {f'{prefix}LayerNorm_0/scale': (d,), f'{prefix}LayerNorm_0/bias': (d,), f'{prefix}LayerNorm_1/scale': (d,),
         f'{prefix}LayerNorm_1/bias': (d,), f'{prefix}MlpBlock_0/Dense_0/kernel': (d, 4 * d),
         f'{prefix}MlpBlock_0/Dense_0/bias': (4 * d,), f'{prefix}MlpBlock_0/Dense_1/kernel': (4 * d, d),
         f'{prefix}MlpBlock_0/Dense_1/bias': (d,), f'{attention}out/kernel': (heads, d // heads, d),
         f'{attention}out/bias': (d,)}
  for name in ('query', 'key', 'value'):
    out |= {f'{attention}{name}/kernel': (d, heads, d // heads), f'{attention}{name}/bias': (heads, d // heads)}
  return out


# As models/vit.py, proj/image_text/text_transformer.py and two_towers.py make them, out_dim=(None, D), bias_init set.
BIG_VISION = {
    'params/img/embedding/kernel': (4, 4, 3, D), 'params/img/embedding/bias': (D,), 'params/img/pos_embedding': (1, 9, D),
    'params/img/Transformer/encoder_norm/scale': (D,), 'params/img/Transformer/encoder_norm/bias': (D,),
    'params/img/MAPHead_0/probe': (1, 1, D),
    **{k: v for k, v in _big_vision_block('params/img/MAPHead_0/', D, 4).items() if 'LayerNorm_1' not in k},
    **{k: (LAYERS, *v) for k, v in _big_vision_block('params/img/Transformer/encoderblock/', D, 4).items()},
    'params/txt/Embed_0/embedding': (WORDS, T), 'params/txt/pos_embedding': (1, LENGTH, T),
    'params/txt/Encoder_0/encoder_norm/scale': (T,), 'params/txt/Encoder_0/encoder_norm/bias': (T,),
    **{k: (LAYERS, *v) for k, v in _big_vision_block('params/txt/Encoder_0/encoderblock/', T, 3).items()},
    'params/txt/head/kernel': (T, D), 'params/txt/head/bias': (D,), 'params/t': (1,), 'params/b': (1,)}


def our_spec(siglip):
  image = spec_lib.image_tower(width=D, depth=LAYERS, mlp_dim=4 * D, heads=4, patch=4, pool='map' if siglip else 'tok',
                               act='gelu', ln_eps=1e-5, **({'out_dim': 0} if siglip else {}))
  text = spec_lib.text_tower(width=T, depth=LAYERS, mlp_dim=4 * T, heads=3, vocab_size=WORDS, max_length=LENGTH,
                             pool='last' if siglip else 'eos', act='gelu', ln_eps=1e-5)
  return spec_lib.Spec(family='', image=image, text=text, embed_dim=D if siglip else E, image_size=12,
                       text_length=LENGTH, eos_id=None if siglip else WORDS - 1)


def parameters(spec, seed=0):
  """Random parameters of our model; b is 0 where theirs has none."""
  section = spec.model_section()
  section['text'].pop('eos_id', None)
  model = models.build(**section, vocab_size=WORDS, eos_id=1, text_length=LENGTH)
  batch = abstract_batch(batch_size=2, image_size=12, text_length=LENGTH, regions=1, region_text_length=LENGTH)
  shapes = jax.eval_shape(model.init, jax.random.key(0), batch)['params']
  rng = np.random.default_rng(seed)
  params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
  if not spec.siglip:
    params['b'] = np.zeros((), np.float32)
  return params


def back(state, family, spec):
  if family == 'openai':
    return openai.to_jax(state, spec).params
  return open_clip.to_jax(state, spec_lib.dataclasses.replace(spec, family=family)).params


@pytest.mark.parametrize('family', ['openai', *GOLDEN])
def test_names_and_shapes_are_golden_and_the_way_back_is_the_identity(family):
  spec = our_spec('siglip' in family)
  params = parameters(spec)
  state = openai.from_jax(params) if family == 'openai' else open_clip.from_jax(params, family=family)
  golden = GOLDEN['open_clip' if family == 'openai' else family]
  assert {k: v.shape for k, v in state.items()} == golden
  again = back(state, family, spec)
  assert not trees.difference(params, again)
  jax.tree.map(np.testing.assert_array_equal, again, params)
  assert all(x.flags['C_CONTIGUOUS'] for x in state.values())
  # torch's order within the packed matrix is query, key, value; (out, in).
  if family != 'open_clip_siglip':
    block = params['img']['Transformer']['encoderblock']['MultiHeadDotProductAttention_0']
    packed = state['visual.transformer.resblocks.1.attn.in_proj_weight']
    for i, name in enumerate(('query', 'key', 'value')):
      for head in range(4):
        np.testing.assert_array_equal(packed[i * D + head * 4:i * D + (head + 1) * 4], block[name]['kernel'][1][:, head].T)


@pytest.mark.parametrize('stacked', [True, False])
def test_big_visions_tree(stacked):
  spec = our_spec(True)
  params = parameters(spec)
  state = big_vision.from_jax(params)
  assert {k: v.shape for k, v in state.items()} == BIG_VISION
  if not stacked:
    state = {f'params/{k}': v for k, v in trees.flatten(trees.scan_to_loop(trees.unflatten(
        {k.removeprefix('params/'): v for k, v in state.items()}))).items()}
    assert 'params/img/Transformer/encoderblock_1/LayerNorm_0/bias' in state
  found = big_vision.spec(state)
  assert found.depths == spec.depths and found.heads == spec.heads and found.embed_dim == D
  assert (found.image_size, found.text_length, found.image['variant']) == (12, LENGTH, 'B/4')
  assert found.image['act'] == 'gelu_tanh' and found.text['ln_eps'] == 1e-6
  jax.tree.map(np.testing.assert_array_equal, big_vision.to_jax(state, found).params, params)
