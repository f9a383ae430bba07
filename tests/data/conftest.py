"""Data sets of painted pictures."""
from painted_pictures import COLORS
from painted_pictures import painted_example
import pytest

from cloc_jax.data import schema


@pytest.fixture(name='write')
def write_fixture(tmp_path):
  """write(examples, **meta) → the path of a data set with one split, 'train'."""
  def write(examples, *, name='toy', **meta):
    path = tmp_path / f'{name}_set'
    schema.write_dataset(path, meta=schema.DatasetMeta(name=name, **meta), splits={'train': examples})
    return path
  return write


@pytest.fixture(name='painted', scope='session')
def painted_fixture(tmp_path_factory):
  """A data set of 37 painted examples in 'train' and 5 in 'val'."""
  path = tmp_path_factory.mktemp('painted') / 'set'
  schema.write_dataset(
      path, meta=schema.DatasetMeta(name='painted', description='Squares.', categories=tuple(COLORS)),
      splits={'train': [painted_example(i) for i in range(37)], 'val': [painted_example(100 + i) for i in range(5)]})
  return path
