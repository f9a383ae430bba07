"""The sections of a config that the trainer itself reads, as dataclasses."""
from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

from cloc_jax import config as config_lib
from cloc_jax.batch import Batch, abstract_batch
from cloc_jax.data import mixture as mixture_lib
from cloc_jax.data import location, spec, transforms
from cloc_jax.models import flops


@dataclasses.dataclass(frozen=True)
class TrainOptions:
  """The section `train`. One of total_steps, total_examples, total_epochs sets the length.

  seed: of parameters and data. micro_batches: parts a batch is computed in (the loss stays exact; train_step.py).
  ema_decay: of averaged parameters, which are then what is evaluated and exported; 0 for none.
  log_steps: how often metrics are fetched and written. wandb_project: also log to Weights & Biases.
  """
  total_steps: int | None = None
  total_examples: int | None = None
  total_epochs: float | None = None
  seed: int = 0
  micro_batches: int = 1
  ema_decay: float = 0.0
  log_steps: int = 50
  wandb_project: str | None = None


@dataclasses.dataclass(frozen=True)
class EvalOptions:
  """The section `evals`. splits: None is all but 'train'. every_steps: None is at the end only.

  floors: rows ('SPLIT/METRIC', value); a run whose evaluation falls below one saves a checkpoint and stops.
  """
  every_steps: int | None = None
  splits: tuple[str, ...] | None = None
  path: spec.Data | None = None
  batch_size: int = 64
  limit: int | None = None
  pool_limit: int | None = None
  floors: tuple[tuple[str, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class CheckpointOptions:
  """The section `checkpoint`. best_metric: 'SPLIT/METRIC', larger is better; kept beside the newest `keep`."""
  every_steps: int | None = None
  keep: int = 2
  best_metric: str | None = None
  keep_best: int = 1


@dataclasses.dataclass(frozen=True)
class DataOptions:
  """The section `data`; batch_size is global. tokenizer: see data/tokenizer.py, or 'train:VOCABULARY_SIZE', or 'init'
  (of config.model.init). Sizes of None are the init's.

  path: see data/sources.open_source; or mixture: {name: {path, split, weight, captions}}, see data/mixture.Part.
  crop: fields of transforms.Crop; None for whole images. cache: a folder for copies of data sets that lie in stores.
  """
  batch_size: int
  image_size: int
  path: spec.Data | None = None
  mixture: Mapping[str, Any] | None = None
  split: str = 'train'
  tokenizer: str = 'train:4096'
  text_length: int = 77
  region_text_length: int = 16
  regions_per_image: int = 4
  flip: bool = False
  pad: str = 'center'
  num_workers: int = 0
  on_error: str = 'mask'
  decode: str = 'exact'
  captions: str | Sequence[float] = 'random'
  crop: Mapping[str, Any] | None = None
  shuffle: bool = True
  cache: str | None = None

  def parts(self) -> tuple[mixture_lib.Part, ...]:
    """What is trained on: the mixture's parts, or the one data set.

    Raises:
      ValueError: both are given or neither, or a part is not what it should be.
    """
    if (self.path is None) == (self.mixture is None):
      raise ValueError('config.data: expected either path or mixture; a config with a path needs path = None for a '
                       'mixture' if self.path is not None else 'config.data: expected path or mixture')
    if self.mixture is None:
      return (mixture_lib.Part('', self.path, split=self.split, captions=self.captions),)
    return mixture_lib.parts(self.mixture)

  def use_cache(self) -> None:
    """Makes the section's `cache`, if it has one, that of this process (see data/location.py)."""
    if self.cache is not None:
      location.use_cache(self.cache)

  def random_crop(self) -> transforms.Crop | None:
    """The section's `crop`."""
    return None if self.crop is None else config_lib.call(transforms.Crop, self.crop, name='data.crop')

  def abstract_batch(self) -> Batch:
    """The shapes of a global batch."""
    return abstract_batch(batch_size=self.batch_size, image_size=self.image_size, text_length=self.text_length,
                          regions=self.regions_per_image, region_text_length=self.region_text_length)

  def step_flops(self, model) -> flops.StepFlops:
    """Model FLOPs an image, of a step on a global batch."""
    return flops.step_flops(model, image_size=self.image_size, text_length=self.text_length,
                            region_text_length=self.region_text_length, regions=self.regions_per_image,
                            batch_size=self.batch_size)
