"""Checkpoints on disk: what comes back, what is kept, and what happens to damaged or foreign ones."""
import json
import logging
import pathlib
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
import pytest

from cloc_jax import checkpoint, sharding
from cloc_jax.train_step import TrainState

# When one of many reads fails, Orbax leaves the others to call back into an event loop that is closed by then.
pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')


@pytest.fixture(autouse=True, scope='module')
def late_callbacks():
  """Lets the last of them come before another module's tests begin."""
  yield
  time.sleep(0.3)


def make_state(step, *, ema=False, **more):
  """A state whose values tell its step."""
  params = {'a': {'kernel': np.arange(32, dtype=np.float32).reshape(8, 4) + step, 'bias': np.float32([step] * 4)}, **more}
  return TrainState(step=jnp.int32(step), params=jax.tree.map(jnp.asarray, params),
                    opt_state={'mu': jax.tree.map(lambda x: jnp.asarray(x * 2), params), 'count': jnp.int32(step)},
                    ema=jax.tree.map(lambda x: jnp.asarray(x + 100), params) if ema else None)


def abstract(state):
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), state)


@pytest.fixture(name='opened')
def opened_fixture(tmp_path):
  """opened(**options) → a Checkpointer of tmp_path / 'checkpoints'; all are closed at the end."""
  made = []

  def make(folder=tmp_path / 'checkpoints', **options):
    made.append(checkpoint.Checkpointer(folder, **options))
    return made[-1]

  yield make
  for keeper in made:
    keeper.close()


def save(keeper, *steps, metrics=None, ema=False):
  for step in steps:
    keeper.save(step, make_state(step, ema=ema), info={'step': step, 'nested': {'text': 'ü', 'none': None}},
                metrics=metrics)
  keeper.wait()


def assert_same(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize('ema', [False, True])
def test_round_trip(opened, ema):
  save(opened(), 3, ema=ema)
  step, state, info = opened().restore_latest(abstract(make_state(0, ema=ema)))
  assert step == 3 and info == {'step': 3, 'nested': {'text': 'ü', 'none': None}}
  assert_same(state, make_state(3, ema=ema))


def test_nothing_to_restore(opened):
  assert opened().restore_latest(abstract(make_state(0))) is None


def test_a_state_comes_back_in_the_sharding_that_is_asked_for(opened):
  save(opened(), 1)
  mesh = sharding.make_mesh(data=2, fsdp=4)
  want = jax.tree.map(lambda x: NamedSharding(mesh, PartitionSpec('fsdp') if x.ndim == 2 else PartitionSpec()),
                      make_state(0))
  shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), make_state(0), want)
  state = opened().restore(1, shapes)
  assert state.params['a']['kernel'].sharding.is_equivalent_to(want.params['a']['kernel'], 2)
  assert len(state.params['a']['kernel'].addressable_shards) == 8
  assert_same(state, make_state(1))


def test_a_state_is_saved_as_it_was_though_its_buffers_are_given_away(opened):
  """Training goes on while the files are written, and donates the arrays of the saved step to the next."""
  keeper = opened()
  state = make_state(1)
  step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
  for number in range(1, 4):
    keeper.save(number, state, info={})
    state = step(state)
  keeper.wait()
  for number in range(2, 4):  # the newest two are kept
    want = jax.tree.map(lambda x, n=number: x + (n - 1), make_state(1))
    assert_same(keeper.restore(number, abstract(want)), want)


def test_the_newest_are_kept(opened, tmp_path):
  keeper = opened(keep=2)
  save(keeper, 1, 2, 3, 10)
  assert keeper.steps == [3, 10]
  assert sorted(p.name for p in (tmp_path / 'checkpoints').iterdir()) == ['00000003', '00000010']
  assert opened(keep=2).steps == [3, 10]


def test_the_best_is_kept_beside_the_newest(opened):
  keeper = opened(keep=2, best_metric='val/top1')
  for step, score in ((1, 0.5), (2, 0.9), (3, None), (4, 0.7), (5, None), (6, None)):
    save(keeper, step, metrics=None if score is None else {'val/top1': score, 'other': -score})
  assert keeper.steps == [2, 5, 6]
  reopened = opened(keep=2, best_metric='val/top1')  # a restart knows the old scores
  save(reopened, 7, metrics={'val/top1': 0.8})
  assert reopened.steps == [2, 6, 7]
  save(reopened, 8, metrics={'val/top1': 0.95})
  assert reopened.steps == [7, 8]


def files(folder):
  return sorted(p for p in folder.rglob('*') if p.is_file())


def remove_state(step):
  shutil.rmtree(step / 'state')


def remove_info(step):
  shutil.rmtree(step / 'info')


def cut_info(step):
  path = step / 'info' / 'metadata'
  path.write_text(path.read_text()[:-5])


def remove_manifests(step):
  for path in step.rglob('manifest.ocdbt'):
    path.unlink()


def cut_arrays(step):
  for path in files(step / 'state'):
    if path.parent.name == 'd':
      path.write_bytes(path.read_bytes()[:-len(path.read_bytes()) // 2])


def empty_everything(step):
  for path in files(step / 'state'):
    path.write_bytes(b'')


def remove_arrays(step):
  for path in files(step / 'state'):
    if path.parent.name == 'd':
      path.unlink()


def remove_tree(step):
  (step / 'state' / '_METADATA').unlink()


DAMAGES = [remove_state, remove_info, cut_info, remove_manifests, cut_arrays, empty_everything, remove_arrays,
           remove_tree]


@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_newest_is_set_aside_and_the_one_before_it_taken(opened, tmp_path, caplog, damage):
  save(opened(), 4, 6)
  damage(tmp_path / 'checkpoints' / '00000006')
  keeper = opened()
  with caplog.at_level(logging.WARNING, logger='cloc_jax'):
    step, state, info = keeper.restore_latest(abstract(make_state(0)))
  assert step == 4 and info['step'] == 4
  assert_same(state, make_state(4))
  said, = [r.getMessage() for r in caplog.records if r.name.startswith('cloc_jax')]
  assert '00000006' in said and 'falling back to the checkpoint before it' in said
  assert (tmp_path / 'damaged-checkpoints' / '00000006').is_dir()  # nothing is deleted
  assert keeper.steps == [4]
  save(keeper, 6)  # the run comes by the same step again
  assert_same(opened().restore_latest(abstract(make_state(0)))[1], make_state(6))


def test_bytes_that_changed_are_not_taken_for_parameters(opened, tmp_path):
  save(opened(), 1, 2)
  for path in files(tmp_path / 'checkpoints' / '00000002' / 'state'):
    if path.parent.name == 'd':
      data = bytearray(path.read_bytes())
      data[len(data) // 2] ^= 0x55
      path.write_bytes(data)
  step, state, _ = opened().restore_latest(abstract(make_state(0)))
  assert_same(state, make_state(step))


def test_the_same_step_damaged_twice(opened, tmp_path):
  save(opened(), 1)
  for number in range(2):
    save(opened(), 2)
    remove_state(tmp_path / 'checkpoints' / '00000002')
    assert opened().restore_latest(abstract(make_state(0)))[0] == 1
    assert len(list((tmp_path / 'damaged-checkpoints').iterdir())) == number + 1


def test_when_all_are_damaged_the_run_does_not_silently_start_again(opened, tmp_path):
  save(opened(), 1, 2)
  for step in (tmp_path / 'checkpoints').iterdir():
    cut_arrays(step)
  with pytest.raises(checkpoint.CheckpointError, match=r'none of the checkpoints \[2, 1\] can be read'):
    opened().restore_latest(abstract(make_state(0)))


def test_another_architecture_shows_the_difference_and_stays_where_it_is(opened, tmp_path):
  save(opened(), 5)
  other = make_state(0, b=np.zeros(3, np.float32))
  other.params['a']['kernel'] = np.zeros((8, 5), np.float32)
  del other.params['a']['bias']
  with pytest.raises(checkpoint.ArchitectureError) as error:
    opened().restore_latest(abstract(other))
  lines = str(error.value).splitlines()
  assert '00000005' in lines[0]
  assert lines[1:] == ['+ a/bias (4,)', '! a/kernel: expected (8, 5), got (8, 4)', '- b (3,)']
  assert not (tmp_path / 'damaged-checkpoints').exists() and opened().steps == [5]


def test_a_save_that_was_killed_is_not_there_and_is_cleaned_up(opened, tmp_path):
  save(opened(), 1)
  half = tmp_path / 'checkpoints' / '00000002.orbax-checkpoint-tmp-17'
  shutil.copytree(tmp_path / 'checkpoints' / '00000001', half)
  (half / 'commit_success.txt').unlink()
  keeper = opened()
  assert keeper.steps == [1] and keeper.restore_latest(abstract(make_state(0)))[0] == 1
  save(keeper, 2)
  assert keeper.steps == [1, 2] and not half.exists()


@pytest.mark.parametrize('ema', [False, True])
def test_parameters_alone_are_the_averages_where_there_are_any(opened, ema):
  save(opened(), 2, ema=ema)
  found = opened(read_only=True).restore_params(2)
  want = make_state(2, ema=ema)
  assert_same(found, want.ema if ema else want.params)


def test_unreadable_parameters_and_info_name_the_step(opened, tmp_path):
  save(opened(), 2)
  remove_arrays(tmp_path / 'checkpoints' / '00000002')
  cut_info(tmp_path / 'checkpoints' / '00000002')
  keeper = opened(read_only=True)
  with pytest.raises(checkpoint.CheckpointError, match='00000002 cannot be read'):
    keeper.restore_params(2)
  with pytest.raises(checkpoint.CheckpointError, match='00000002: the info cannot be read'):
    keeper.info(2)


def test_reading_changes_nothing(opened, tmp_path):
  save(opened(), 1, 2)
  before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*')}
  keeper = opened(read_only=True, keep=1)
  keeper.restore_params(2)
  keeper.close()
  assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*')} == before


@pytest.mark.parametrize('inside', ['', 'run', 'run/deep'])
def test_an_unwritable_folder_is_an_error_at_once(tmp_path, inside):
  (tmp_path / 'file').write_text('in the way')
  with pytest.raises(checkpoint.CheckpointError, match=r'file.* cannot be written: (File exists|Not a directory)'):
    checkpoint.Checkpointer(tmp_path / 'file' / inside)
  assert (tmp_path / 'file').read_text() == 'in the way'


def test_a_full_disk_is_an_error_at_once(tmp_path, monkeypatch):
  def full(self, text):
    raise OSError(28, 'No space left on device')
  monkeypatch.setattr(pathlib.Path, 'write_text', full)
  with pytest.raises(checkpoint.CheckpointError, match='cannot be written: No space left on device'):
    checkpoint.check_writable(tmp_path / 'new')


def test_keeping_none_is_no_option(tmp_path):
  with pytest.raises(ValueError, match='checkpoint.keep: expected at least 1, got 0'):
    checkpoint.Checkpointer(tmp_path, keep=0)


def test_find(opened, tmp_path):
  save(opened(), 3, 12)
  folder = tmp_path / 'checkpoints'
  assert checkpoint.find(tmp_path) == (folder, None)
  assert checkpoint.find(str(folder)) == (folder, None)
  assert checkpoint.find(folder / '00000003') == (folder, 3)
  (tmp_path / 'empty' / 'checkpoints').mkdir(parents=True)
  with pytest.raises(FileNotFoundError, match='empty holds no checkpoint'):
    checkpoint.find(tmp_path / 'empty')
  with pytest.raises(FileNotFoundError, match='nowhere does not exist'):
    checkpoint.find(tmp_path / 'nowhere')


def test_info_is_plain_json(opened, tmp_path):
  """Other programs may read it without this library."""
  save(opened(), 1)
  assert json.loads((tmp_path / 'checkpoints' / '00000001' / 'info' / 'metadata').read_text())['step'] == 1
