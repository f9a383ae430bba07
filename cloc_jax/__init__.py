"""cloc_jax: contrastive localized language-image pre-training in JAX."""
__version__ = '0.1.0'


def __getattr__(name):
  # The library is light to import; what needs Flax and Orbax loads when it is asked for.
  if name in ('load', 'Cloc'):
    from cloc_jax import inference
    return getattr(inference, name)
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
