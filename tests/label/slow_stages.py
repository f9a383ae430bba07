"""Scripted stages that take their time and say which process they are in: tests kill it."""
import os
import pathlib

from cloc_jax.label import scripted


class Captioner(scripted.Captioner):

  def __init__(self, *, pids: str, **settings):
    super().__init__(**settings)
    pathlib.Path(pids, str(os.getpid())).touch()
