"""What XLA is told, on this machine and on ones that are not here."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cloc_jax import compiler


@pytest.fixture(autouse=True)
def restored_settings():
  names = ('jax_compilation_cache_dir', 'jax_persistent_cache_min_compile_time_secs')
  before = {name: getattr(jax.config, name) for name in names}
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  compiler._knows_cpu_options.cache_clear()


def test_matrix_products_on_a_cpu_are_not_handed_over():
  x = jnp.arange(512.0 * 256).reshape(512, 256) / 1e4
  function = lambda x: jnp.tanh(x @ x.T) @ x
  told = jax.jit(function, compiler_options=compiler.options('cpu')).lower(x).compile()
  assert 'ynn' not in told.as_text()
  exact = np.asarray(x, np.float64)
  np.testing.assert_allclose(told(x), np.tanh(exact @ exact.T) @ exact, rtol=1e-4)


@pytest.mark.parametrize('platform', ['gpu', 'tpu'])
def test_accelerators_are_told_nothing(platform):
  assert compiler.options(platform) == {}


def test_a_jaxlib_that_does_not_know_an_option_is_not_asked_for_it(monkeypatch):
  monkeypatch.setattr(compiler, '_CPU', {'xla_cpu_experimental_of_another_year': ''})
  compiler._knows_cpu_options.cache_clear()
  assert compiler.options('cpu') == {}


def test_compiled_programs_are_kept(tmp_path, monkeypatch):
  monkeypatch.setattr(compiler, '_CACHE_FROM_SECONDS', 0.0)
  assert compiler.keep_compiled(tmp_path / 'programs') == str(tmp_path / 'programs')
  from jax.experimental.compilation_cache import compilation_cache
  compilation_cache.reset_cache()  # an earlier test may have started it without a folder
  jax.jit(lambda x: jnp.cos(x) + 0.123).lower(jnp.ones(7)).compile()
  assert list((tmp_path / 'programs').iterdir())
  compilation_cache.reset_cache()


def test_cpus_keep_nothing_by_themselves_and_a_folder_by_name_wins(tmp_path):
  jax.config.update('jax_compilation_cache_dir', None)
  assert compiler.keep_compiled() is None
  jax.config.update('jax_compilation_cache_dir', str(tmp_path))
  assert compiler.keep_compiled() == str(tmp_path)
