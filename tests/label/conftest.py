"""What the tests of the labelling engine share."""
import os
import tempfile

import pytest


@pytest.fixture(name='ray_folder', autouse=True, scope='session')
def ray_folder_fixture():
  """Where Ray keeps its sessions and logs: gone after the tests. Its sockets need a short path, so not pytest's own."""
  with tempfile.TemporaryDirectory(prefix='ray', ignore_cleanup_errors=True) as folder:
    before = os.environ.get('RAY_TMPDIR')
    os.environ['RAY_TMPDIR'] = folder
    yield
    if before is None:
      del os.environ['RAY_TMPDIR']
    else:
      os.environ['RAY_TMPDIR'] = before
