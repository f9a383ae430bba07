"""Scripted stages that take their time and say which process they are in: tests kill it."""
import os
import pathlib

from cloc_jax.label import scripted


class Missing(scripted.Captioner):
  """A model that is not where it should be."""

  def caption(self, pictures):
    raise FileNotFoundError('no weights at SOMEWHERE')


class Captioner(scripted.Captioner):

  def __init__(self, *, pids: str, **settings):
    super().__init__(**settings)
    self._pids = pathlib.Path(pids)

  def caption(self, pictures):
    (self._pids / str(os.getpid())).touch()  # not when it is built: the driver builds one too
    return super().caption(pictures)
