"""What XLA is told when it compiles for these devices, and where its results are kept."""
import functools
import os
import pathlib

import jax

# Left to itself, XLA:CPU (jax 0.10) hands matrix products to YNNPACK. With Eigen's own a training step takes half to
# three quarters of the time (docs/results/cpu_step.md).
_CPU = {'xla_cpu_experimental_ynn_fusion_type': ''}
_CACHE = '~/.cache/cloc_jax/compiled'
# Programs that took less are compiled again: reading them back is hardly faster.
_CACHE_FROM_SECONDS = 2.0


def options(platform: str | None = None) -> dict[str, str]:
  """`compiler_options` for jax.jit on 'cpu', 'gpu' or 'tpu'; without a name, on the default devices."""
  return dict(_CPU) if (platform or jax.default_backend()) == 'cpu' and _knows_cpu_options() else {}


@functools.cache
def _knows_cpu_options() -> bool:
  """Whether this jaxlib has heard of them: names that start with `experimental` come and go."""
  device = jax.local_devices(backend='cpu')[0]
  try:
    with jax.default_device(device):
      jax.jit(lambda: 0, compiler_options=_CPU).lower().compile()
  except jax.errors.JaxRuntimeError:
    return False
  return True


def keep_compiled(folder: str | os.PathLike | None = None) -> str | None:
  """Keeps compiled programs on disk, so that a run that goes on starts at once. Returns the folder, None where it is off.

  folder: None takes JAX_COMPILATION_CACHE_DIR if that is set; else ~/.cache/cloc_jax/compiled on accelerators, and
  nothing on CPUs, whose programs are made for one machine's instructions while home folders are shared by several.
  """
  if folder is None and jax.config.jax_compilation_cache_dir:
    return jax.config.jax_compilation_cache_dir
  if folder is None:
    if jax.default_backend() == 'cpu':
      return None
    folder = pathlib.Path(_CACHE).expanduser()
  jax.config.update('jax_compilation_cache_dir', str(folder))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', _CACHE_FROM_SECONDS)
  return str(folder)
