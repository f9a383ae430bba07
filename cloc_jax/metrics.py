"""Where numbers go: JSONL, TensorBoard, the terminal, Weights & Biases if installed."""
import importlib.util
import json
import math
import os
import pathlib
import sys
import time

import tqdm


class Writer:
  """Writes scalars of a step to every sink. Only the first process should hold one.

  metrics.jsonl: one object a write, {"step": 7, "time": seconds since 1970, "NAME": value, …}. A resumed run appends;
  where a step occurs twice, the later line counts (`read` does that).
  """

  def __init__(self, workdir: str | os.PathLike, *, wandb_project: str | None = None, config=None):
    if wandb_project and importlib.util.find_spec('wandb') is None:
      raise ValueError(f'train.wandb_project={wandb_project!r}, but wandb is not installed: pip install wandb')
    self.path = pathlib.Path(workdir) / 'metrics.jsonl'
    cut_off = _is_cut_off(self.path)
    self._file = open(self.path, 'a', encoding='utf-8')
    if cut_off:  # else the first line of this run would be lost with the half line of the killed one
      self._file.write('\n')
    self._board = _summary_writer()(str(pathlib.Path(workdir) / 'tensorboard'))
    self._wandb = None
    if wandb_project:
      import wandb
      self._wandb = wandb.init(project=wandb_project, dir=str(workdir), config=config, resume='allow')

  def write(self, step: int, scalars: dict[str, float]) -> None:
    scalars = {k: float(v) for k, v in scalars.items()}
    # JSON has no NaN; null keeps the line readable by anything.
    line = {k: v if math.isfinite(v) else None for k, v in scalars.items()}
    self._file.write(json.dumps({'step': step, 'time': round(time.time(), 3), **line}) + '\n')
    self._file.flush()
    for name, value in scalars.items():
      self._board.add_scalar(name, value, step)
    if self._wandb is not None:
      self._wandb.log(scalars, step=step)

  def close(self) -> None:
    self._file.close()
    self._board.close()
    if self._wandb is not None:
      self._wandb.finish()


def _summary_writer():
  """tensorboardX's writer, imported late, since evaluation needs none of it, and without torch.

  It imports torch wherever that is installed, for arguments that are tensors: three seconds at every start.
  """
  torch_is_out = 'torch' not in sys.modules
  if torch_is_out:
    sys.modules['torch'] = None  # an import of it fails, as where it is not installed
  try:
    from tensorboardX import SummaryWriter
  finally:
    if torch_is_out:
      del sys.modules['torch']
  return SummaryWriter


def _is_cut_off(path):
  """Whether the last line of a file lacks its end."""
  if not path.exists() or not path.stat().st_size:
    return False
  with open(path, 'rb') as file:
    file.seek(-1, os.SEEK_END)
    return file.read() != b'\n'


def read(workdir: str | os.PathLike) -> dict[int, dict[str, float]]:
  """metrics.jsonl as {step: {name: value}}, ascending; a line cut off by a kill is left out.

  Raises:
    FileNotFoundError: if the run wrote none.
  """
  steps: dict[int, dict[str, float]] = {}
  with open(pathlib.Path(workdir) / 'metrics.jsonl', encoding='utf-8') as lines:
    for line in lines:
      try:
        row = json.loads(line)
      except json.JSONDecodeError:
        continue
      steps.setdefault(row.pop('step'), {}).update(row)
  return dict(sorted(steps.items()))


class Progress:
  """A bar with rate and ETA on a terminal; a line now and then where the output is a file."""

  def __init__(self, *, total: int, start: int, batch_size: int, quiet: bool = False):
    self._tty = sys.stderr.isatty()
    self._quiet = quiet
    self._last = time.monotonic()
    self._start, self._began, self._total, self._batch = start, time.monotonic(), total, batch_size
    self._bar = tqdm.tqdm(total=total, initial=start, unit='step', dynamic_ncols=True, mininterval=0.5,
                          disable=quiet or not self._tty)

  def step(self) -> None:
    self._bar.update(1)

  def show(self, step: int, scalars: dict[str, float]) -> None:
    """Shows the latest numbers."""
    names = {'loss': 'loss', 'loss_image_text': 'image-text', 'loss_region_text': 'region-text',
             'loss_grounding': 'grounding'}
    parts = {short: f'{scalars[name]:.3f}' for name, short in names.items() if name in scalars}
    if 'images_per_second' in scalars:
      parts['images/s'] = f'{scalars["images_per_second"]:.0f}'
    if self._tty:
      self._bar.set_postfix(parts, refresh=False)
    elif not self._quiet and (time.monotonic() - self._last > 10 or step == self._total):
      self._last = time.monotonic()
      done = max(step - self._start, 1)
      eta = (self._total - step) * (time.monotonic() - self._began) / done
      values = ' '.join(f'{k} {v}' for k, v in parts.items())
      print(f'step {step}/{self._total}  {values}  ETA {eta / 60:.1f} min', flush=True)

  def say(self, text: str) -> None:
    """Prints a line without tearing the bar."""
    if not self._quiet:
      tqdm.tqdm.write(text, file=sys.stdout)
      sys.stdout.flush()

  def close(self) -> None:
    self._bar.close()
