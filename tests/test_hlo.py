"""Messages read from compiled programs whose messages are known."""
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from cloc_jax import hlo

DEVICES, N, D, TURNS = 8, 64, 16, 5
SHARE = N // DEVICES * D * 4  # bytes of one device's part of an (N, D) float32 array


def compiled(fn, out_spec, *, axes=('x',), shape=(DEVICES,)):
  mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:DEVICES]).reshape(shape), axes)
  split = P(axes)
  mapped = jax.shard_map(fn, mesh=mesh, in_specs=split, out_specs=out_spec)
  x = jax.ShapeDtypeStruct((N, D), jnp.float32, sharding=jax.sharding.NamedSharding(mesh, split))
  return jax.jit(mapped).lower(x).compile().as_text()


def ring(x):
  return lax.ppermute(x, 'x', [(i, (i + 1) % DEVICES) for i in range(DEVICES)])


@pytest.mark.parametrize('kind, fn, out_spec, bytes_received', [
    ('all-gather', lambda x: x * lax.all_gather(x, 'x', tiled=True).sum(), P('x'), (DEVICES - 1) * SHARE),
    ('all-reduce', lambda x: lax.psum(x, 'x'), P(), 2 * SHARE * (DEVICES - 1) / DEVICES),
    ('reduce-scatter', lambda x: lax.psum_scatter(x, 'x', tiled=True), P('x'), SHARE * (DEVICES - 1) / DEVICES),
    ('collective-permute', ring, P('x'), SHARE),
])
def test_each_kind_of_message(kind, fn, out_spec, bytes_received):
  found = hlo.traffic(compiled(fn, out_spec), devices=DEVICES)
  assert set(found.received) == {kind} and found.messages[kind] == 1
  assert found.received[kind] == bytes_received == found.total


def test_a_loop_sends_as_often_as_it_runs():
  loop = lambda x: lax.scan(lambda carry, _: (jnp.sin(ring(carry)), None), x, None, length=TURNS)[0]
  nested = lambda x: lax.scan(lambda carry, _: (loop(carry), None), x, None, length=3)[0]
  for fn, times in ((loop, TURNS), (nested, 3 * TURNS)):
    found = hlo.traffic(compiled(fn, P('x')), devices=DEVICES)
    assert found.received == {'collective-permute': times * SHARE} and found.messages == {'collective-permute': times}


def test_groups_smaller_than_the_machine():
  text = compiled(lambda x: lax.psum(x, 'b'), P('a'), axes=('a', 'b'), shape=(4, 2))
  assert hlo.traffic(text, devices=DEVICES).received == {'all-reduce': 2 * SHARE / 2}


def test_a_program_that_sends_nothing():
  assert hlo.traffic(compiled(jnp.sin, P('x')), devices=DEVICES).total == 0


def test_types_with_layouts_and_tuples():
  line = '''HloModule m
ENTRY %main (a: bf16[4,8]) -> bf16[32,8] {
  %a = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  %start = (bf16[4,8]{1,0:T(8,128)(2,1)}, bf16[32,8]{1,0:T(8,128)(2,1)S(1)}) all-gather-start(%a), replica_groups=[2,8]<=[16], dimensions={0}, metadata={op_name="jit(f)/gather"}
  ROOT %done = bf16[32,8]{1,0} all-gather-done(%start)
}
'''
  found = hlo.traffic(line, devices=16)
  assert found.received == {'all-gather': 32 * 8 * 2 * 7 / 8} and found.by_scope == {'jit(f)/gather': 448}


START = '''HloModule m
ENTRY %main (a: f32[64], b: f32[128]) -> f32[64] {{
  %a = f32[64]{{0}} parameter(0)
  %b = f32[128]{{0}} parameter(1)
  %start = {type} {kind}-start(%a, %b), {group}
  ROOT %done = f32[64]{{0}} copy(%a)
}}
'''
OPERANDS, GATHERED, SCATTERED = (f'(f32[{64 * k // 8}]{{0}}, f32[{128 * k // 8}]{{0}})' for k in (8, 64, 1))


@pytest.mark.parametrize('kind, type_, bytes_received', [
    ('all-gather', f'({OPERANDS}, {GATHERED})', 7 * 192 * 4),
    ('reduce-scatter', f'({OPERANDS}, {SCATTERED})', 192 * 4 * 7 / 8),
    ('all-reduce', OPERANDS, 2 * 192 * 4 * 7 / 8),
    ('collective-permute', f'({OPERANDS}, {OPERANDS}, u32[], u32[])', 192 * 4),
    ('all-to-all', f'({OPERANDS}, {OPERANDS})', 192 * 4 * 7 / 8)])
def test_several_arrays_in_one_message(kind, type_, bytes_received):
  """As accelerators start them: operands beside results, except for an all-reduce."""
  group = 'source_target_pairs={{0,1},{1,0}}' if kind == 'collective-permute' else 'replica_groups=[1,8]<=[8]'
  found = hlo.traffic(START.format(type=type_, kind=kind, group=group), devices=8)
  assert found.received[kind] == pytest.approx(bytes_received) and not found.doubts


@pytest.mark.parametrize('group, size', [
    ('replica_groups={{0,1},{2,3},{4,5},{6,7}}', 2), ('replica_groups=[2,4]<=[8]', 4),
    ('replica_groups=[2,4]<=[4,2]T(1,0), more=1', 4),
    ("replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, more={1}", 8),
    ("replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}, dimensions={1}", 2),
    ("replica_groups=mesh['a'=2,'b'=2,'c'=2], device_ids=([2,4]T(1,0)) {'a', 'c'}, dimensions={1}", 4)])
def test_groups_in_every_notation(group, size):
  found = hlo.traffic(START.format(type='f32[64]', kind='all-reduce', group=group), devices=8)
  assert found.received == {'all-reduce': 2 * 256 * (size - 1) / size} and not found.doubts


TPU_LOOP = '''HloModule m
%all-reduce-scatter.1 (p: f32[64]) -> f32[8] {
  %p = f32[64]{0} parameter(0)
  %all-reduce.1 = f32[64]{0:T(128)} all-reduce(%p), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %slice = f32[8]{0} dynamic-slice(%all-reduce.1)
}
%body (p: (s32[], f32[64])) -> (s32[], f32[64]) {
  %p = (s32[]{:T(128)}, f32[64]{0}) parameter(0)
  %fusion = f32[8]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
}
%cond (p: (s32[], f32[64])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(12)
  %p = (s32[]{:T(128)}, f32[64]{0}) parameter(0)
  ROOT %lt = pred[]{:T(512)} compare(%p, %constant.1), direction=LT
}
ENTRY %main (a: (s32[], f32[64])) -> (s32[], f32[64]) {
  %a = (s32[]{:T(128)}, f32[64]{0}) parameter(0)
  ROOT %w = (s32[]{:T(128)}, f32[64]{0}) while(%a), condition=%cond, body=%body
}
'''


def test_the_tpu_compilers_loops_and_fusions():
  """It writes no trip counts, and a reduce-scatter as a fusion around an all-reduce."""
  found = hlo.traffic(TPU_LOOP, devices=8)
  assert found.received == {'reduce-scatter': 12 * 256 * 7 / 8} and not found.doubts
  assert hlo.traffic(TPU_LOOP.replace('direction=LT', 'direction=NE'), devices=8).doubts


def test_what_could_not_be_read_is_said():
  text = compiled(lambda x: jax.lax.while_loop(lambda c: c.sum() < 100, lambda c: ring(c) + 1, x), P('x'))
  assert any('unknown length' in d for d in hlo.traffic(text, devices=DEVICES).doubts)
  odd = START.format(type='f6e9[64]', kind='all-reduce', group='replica_groups=[1,8]<=[8]')
  assert hlo.traffic(odd, devices=8).doubts
  assert hlo.traffic(START.format(type='f32[64]', kind='all-reduce', group='groups=all'), devices=8).doubts


def test_what_is_no_hlo_is_an_error():
  with pytest.raises(ValueError, match='no ENTRY computation'):
    hlo.traffic('something else', devices=8)


# --- between slices, as the TPU compiler writes it

BETWEEN = """HloModule m
ENTRY %main (a: f32[{n}]) -> f32[{n}] {{
  %a = f32[{n}]{{0}} parameter(0)
  %after-all = token[] after-all()
  %send = (f32[64]{{0:T(256)}}, u32[], token[]) send(%a, %after-all), channel_id=2, is_host_transfer=true, {attributes}_xla_megascale_transfer_type="{kind}"}}
  %recv = (f32[{n}]{{0:T(256)}}, u32[], token[]) recv(%after-all), channel_id=1, is_host_transfer=true, {attributes}_xla_megascale_transfer_type="{kind}"}}
  %send-done = token[] send-done(%send), channel_id=2, is_host_transfer=true
  %recv-done = (f32[{n}]{{0:T(256)}}, token[]) recv-done(%recv), channel_id=1, is_host_transfer=true
  ROOT %all-reduce = f32[{n}]{{0}} all-reduce(%a), replica_groups={{{{0,1,2,3}}}}
}}
"""


ATTRIBUTES = ('frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
              '_xla_megascale_target="{1,2,3}x{0:3}",')


def between(kind, n):
  return BETWEEN.format(kind=kind, n=n, attributes=ATTRIBUTES)


@pytest.mark.parametrize('kind, n, name, bytes_received', [
    ('ALL_REDUCE', 96, 'all-reduce', 2 * 96 * 4 * 2 / 3), ('ALL_GATHER', 96, 'all-gather', 96 * 4 * 2 / 3),
    ('REDUCE_SCATTER', 32, 'reduce-scatter', 2 * 32 * 4), ('ONE_TO_ONE', 96, 'collective-permute', 96 * 4),
    ('ALL_TO_ALL', 96, 'all-to-all', 96 * 4 * 2 / 3)])
def test_messages_between_slices(kind, n, name, bytes_received):
  found = hlo.traffic(between(kind, n), devices=4, slices=3)
  assert found.network == {name: pytest.approx(bytes_received)} and not found.doubts
  assert found.received == {'all-reduce': 2 * n * 4 * 3 / 4}
  assert hlo.traffic(between('GOSSIP', n), devices=4, slices=3).doubts
  assert hlo.traffic(between(kind, n), devices=2, slices=6).doubts  # a group of four in a slice of two


def test_the_tpu_compiler_and_two_slices(monkeypatch):
  """Its own program: each chip's part of a sum over all crosses once in both directions."""
  pytest.importorskip('libtpu')
  from cloc_jax import sharding
  from jax.experimental import topologies
  monkeypatch.setenv('TPU_SKIP_MDS_QUERY', '1')
  monkeypatch.setenv('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  mesh = sharding.make_mesh(fsdp=4, devices=topologies.get_topology_desc(
      platform='tpu', topology_name='v5e:2x2', num_slices=2).devices)
  split = P(('data', 'fsdp'))
  x = jax.ShapeDtypeStruct((8192, 128), jnp.float32, sharding=jax.sharding.NamedSharding(mesh, split))
  total = jax.jit(jax.shard_map(lambda x: lax.psum(x, ('data', 'fsdp')), mesh=mesh, in_specs=split, out_specs=P()))
  found = hlo.traffic(total.lower(x).compile().as_text(), devices=4, slices=2)
  share = 1024 * 128 * 4
  assert found.network == {'all-reduce': share / 4} and found.total == 2 * share * 3 / 4 and not found.doubts


# --- memory


def one_device(fn, *shapes):
  return jax.jit(fn).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).compile().as_text()


def test_a_product_reads_its_operands_and_writes_its_result():
  text = one_device(lambda a, b: jnp.sin(a @ b), (64, 32), (32, 16))
  product, sine = 64 * 32 + 32 * 16 + 64 * 16, 2 * 64 * 16
  assert hlo.memory_bytes(text) in (4 * product, 4 * (product + sine))  # in one piece, or in two


def test_a_loop_moves_what_it_needs_of_a_stack_in_every_turn():
  """A layer's share of the weights, not all of them."""
  fn = lambda x, w: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]
  few, many = (hlo.memory_bytes(one_device(fn, (8, 128), (layers, 128, 128))) for layers in (10, 20))
  layer = 128 * 128 * 4
  assert 10 * layer < many - few < 4 * 10 * layer and 10 * layer < few < 4 * 10 * layer + 2**17


TPU_MEMORY = """HloModule m
%fused (p0: bf16[6,16,128], p1: s32[], p2: bf16[1,16,128]) -> bf16[6,16,128] {
  %p0 = bf16[6,16,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %p2 = bf16[1,16,128]{2,1,0:T(8,128)(2,1)} parameter(2)
  ROOT %update = bf16[6,16,128]{2,1,0:T(8,128)(2,1)} dynamic-update-slice(%p0, %p2, %p1, %p1, %p1)
}
%sliced (p0: bf16[6,16,128], p1: s32[]) -> bf16[16,128] {
  %p0 = bf16[6,16,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %b = bf16[6,16,128]{2,1,0:T(8,128)(2,1)} bitcast(%p0)
  %s = bf16[1,16,128]{2,1,0:T(8,128)(2,1)} dynamic-slice(%b, %p1, %p1, %p1), dynamic_slice_sizes={1,16,128}
  ROOT %r = bf16[16,128]{1,0:T(8,128)(2,1)S(1)} bitcast(%s)
}
ENTRY %main (a: bf16[6,16,128], i: s32[], f: f32[3,100]) -> bf16[6,16,128] {
  %a = bf16[6,16,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %i = s32[]{:T(128)S(6)} parameter(1)
  %f = f32[3,100]{1,0:T(8,128)} parameter(2)
  %near = bf16[16,128]{1,0:T(8,128)(2,1)S(1)} fusion(%a, %i), kind=kLoop, calls=%sliced
  %exp = f32[3,100]{1,0:T(8,128)S(1)} exponential(%f)
  %start = (f32[3,100]{1,0:T(8,128)}, f32[3,100]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) copy-start(%exp)
  %done = f32[3,100]{1,0:T(8,128)} copy-done(%start)
  %part = ((f32[3,100]{1,0:T(8,128)}), f32[1,100]{1,0:T(1,128)S(1)}, s32[]{:S(2)}) slice-start(%done), slice={[0:1], [0:100]}
  %space = bf16[99,99]{1,0:T(8,128)(2,1)} custom-call(), custom_call_target="AllocateBuffer"
  %one = bf16[1,16,128]{2,1,0:T(8,128)(2,1)S(1)} bitcast(%near)
  ROOT %fusion = bf16[6,16,128]{2,1,0:T(8,128)(2,1)} fusion(%a, %i, %one), kind=kLoop, calls=%fused
}
"""


def test_memory_as_the_tpu_compiler_uses_it():
  """Tiles of 8 × 128, slices and updates in place, and memory on the chip, S(1), which costs nothing."""
  tile, layer = 8 * 128 * 4, 16 * 128 * 2
  read_a_slice, read_f, write_exp, prefetch_a_row, update = layer, tile, tile, 100 * 4, layer
  assert hlo.memory_bytes(TPU_MEMORY) == read_a_slice + read_f + write_exp + prefetch_a_row + update
