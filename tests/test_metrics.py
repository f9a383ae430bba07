"""Scalars on their way to JSONL, TensorBoard and the terminal, and back."""
import json
import math
import os
import pathlib
import subprocess
import sys

import pytest
import tensorboardX.proto.event_pb2 as event_pb2

from cloc_jax import metrics

ROOT = pathlib.Path(metrics.__file__).resolve().parents[1]


@pytest.fixture(name='writer')
def writer_fixture(tmp_path):
  writer = metrics.Writer(tmp_path)
  yield writer
  writer.close()


def raw(folder):
  return (folder / 'metrics.jsonl').read_text()


def test_round_trip(writer, tmp_path):
  writer.write(1, {'loss': 2.5, 'data/corrupt_images': 0})
  writer.write(12, {'loss': 0.1 + 0.2})
  writer.write(3, {'late': 1e-30})
  found = metrics.read(tmp_path)
  assert list(found) == [1, 3, 12]
  assert found[1] | {'time': 0} == {'loss': 2.5, 'data/corrupt_images': 0.0, 'time': 0}
  assert found[12]['loss'] == 0.1 + 0.2  # to the last bit: restarts are compared by it
  assert found[3]['late'] == 1e-30
  assert all(1.7e9 < row['time'] < 1e11 for row in found.values())


def test_lines_are_on_disk_at_once(writer, tmp_path):
  for step in (1, 2):
    writer.write(step, {'loss': 1.0})
    assert raw(tmp_path).count('\n') == step and raw(tmp_path).endswith('}\n')


def test_what_json_cannot_hold_is_null(writer, tmp_path):
  writer.write(1, {'a': math.nan, 'b': math.inf, 'c': -math.inf, 'd': 1.0})
  line = json.loads(raw(tmp_path), parse_constant=lambda name: pytest.fail(f'{name} is not JSON'))
  assert (line['a'], line['b'], line['c'], line['d']) == (None, None, None, 1.0)
  assert metrics.read(tmp_path)[1]['a'] is None


def test_later_lines_win_and_lines_of_a_step_join(tmp_path):
  for loss, more in ((1.0, {'only_first': 5.0}), (2.0, {})):  # a run and its resumption
    writer = metrics.Writer(tmp_path)
    writer.write(4, {'loss': loss, **more})
    writer.write(4, {'eval/val/top1': loss / 10})
    writer.close()
  found = metrics.read(tmp_path)[4]
  assert (found['loss'], found['eval/val/top1'], found['only_first']) == (2.0, 0.2, 5.0)


@pytest.mark.parametrize('kept', [1, 9, -1])
def test_a_line_cut_off_by_a_kill_costs_that_line_alone(tmp_path, kept):
  first = metrics.Writer(tmp_path)
  first.write(1, {'loss': 1.0})
  whole = raw(tmp_path)
  first.write(2, {'loss': 2.0})
  first.close()
  (tmp_path / 'metrics.jsonl').write_text(whole + raw(tmp_path)[len(whole):][:kept].rstrip('\n'))
  assert metrics.read(tmp_path).keys() <= {1, 2} and 1 in metrics.read(tmp_path)
  second = metrics.Writer(tmp_path)
  second.write(3, {'loss': 3.0})
  second.write(4, {'loss': 4.0})
  second.close()
  found = metrics.read(tmp_path)
  assert {step: found[step]['loss'] for step in (1, 3, 4)} == {1: 1.0, 3: 3.0, 4: 4.0}
  assert (2 in found) == (kept == -1)  # all that was missing was the line's end


def test_a_run_that_wrote_nothing(tmp_path):
  with pytest.raises(FileNotFoundError, match='metrics.jsonl'):
    metrics.read(tmp_path)


def events(path):
  """The events of a TensorBoard file: length (8 bytes), its checksum (4), the message, the message's checksum (4)."""
  data, at = path.read_bytes(), 0
  while at < len(data):
    length = int.from_bytes(data[at:at + 8], 'little')
    yield event_pb2.Event.FromString(data[at + 12:at + 12 + length])
    at += 16 + length


def test_tensorboard_holds_the_same_numbers(tmp_path):
  writer = metrics.Writer(tmp_path)
  writer.write(7, {'loss': 1.5, 'eval/val/top1': 0.25})
  writer.write(8, {'loss': math.nan})
  writer.close()
  file, = (tmp_path / 'tensorboard').iterdir()
  found = {(v.tag, e.step): v.simple_value for e in events(file) for v in e.summary.value}
  assert found.pop(('loss', 7)) == 1.5 and found.pop(('eval/val/top1', 7)) == 0.25
  assert math.isnan(found.pop(('loss', 8))) and not found


def test_weights_and_biases_must_be_there_when_asked_for(tmp_path, monkeypatch):
  monkeypatch.setattr(metrics.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ValueError, match="wandb_project='mine'.*pip install wandb"):
    metrics.Writer(tmp_path, wandb_project='mine')


def make_progress(capsys, **settings):
  del capsys  # asked for so that the streams are no terminal
  return metrics.Progress(total=20, start=0, batch_size=4, **settings)


def test_progress_in_a_file_shows_the_last_step(capsys):
  progress = make_progress(capsys)
  progress.step()
  progress.show(5, {'loss': 1.0})  # too soon after the start for a line of its own
  progress.show(20, {'loss': 1.23456, 'loss_grounding': 0.5, 'images_per_second': 321.4, 'grad_norm': 9.0})
  progress.say('a remark')
  progress.close()
  out, err = capsys.readouterr()
  assert out.startswith('step 20/20  loss 1.235 grounding 0.500 images/s 321  ETA 0.0 min\n')
  assert out.endswith('a remark\n') and err == ''


def test_quiet_is_quiet(capsys):
  progress = make_progress(capsys, quiet=True)
  progress.step()
  progress.show(20, {'loss': 1.0})
  progress.say('a remark')
  progress.close()
  assert capsys.readouterr() == ('', '')


def test_the_workdir_may_be_a_text_path(tmp_path):
  writer = metrics.Writer(str(tmp_path))
  writer.write(1, {'loss': 1.0})
  writer.close()
  assert metrics.read(str(tmp_path)) == metrics.read(pathlib.Path(tmp_path))


def test_no_torch_is_imported(tmp_path):
  """TensorBoard's writer would: seconds of every training's start where torch is installed."""
  for name in ('torch', 'run'):
    (tmp_path / name).mkdir()
  (tmp_path / 'torch' / '__init__.py').write_text("print('imported')")
  script = ('import sys; from cloc_jax import metrics; w = metrics.Writer("run"); w.write(1, {"a": 2.0}); w.close(); '
            'assert "torch" not in sys.modules; print("written"); import torch')
  done = subprocess.run([sys.executable, '-c', script], cwd=tmp_path, capture_output=True, text=True, check=True,
                        env={**os.environ, 'PYTHONPATH': os.pathsep.join([str(tmp_path), str(ROOT)])})
  assert done.stdout.split() == ['written', 'imported'] and list((tmp_path / 'run' / 'tensorboard').iterdir())
