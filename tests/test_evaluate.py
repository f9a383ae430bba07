"""The evaluation as a whole: the same figures on any number of devices, and by every way to embed a region."""
import jax
import pytest
import tiny_experiment as tiny

from cloc_jax import encoders, evaluate, sharding


@pytest.fixture(autouse=True, scope='module')
def compiled_once(base):
  with tiny.compiled_once(base):
    yield


def figures(run, *, devices=None, how=None, batch_size=7):
  mesh = None if devices is None else sharding.make_mesh(devices=jax.devices()[:devices])
  encoder = encoders.with_regions(encoders.load(str(run.workdir), mesh=mesh), how)
  return evaluate.run_encoder(encoder, path=run.data, split='val', batch_size=batch_size)


@pytest.fixture(name='alone', scope='module')
def alone_fixture(reference):
  return figures(reference)


@pytest.mark.slow
def test_one_device_and_four_give_the_same_figures(reference, alone):
  want, predictions = alone
  # Seven images do not divide over four devices: batches are of eight, the last one half empty.
  got, split = figures(reference, devices=4)
  assert got.metrics == pytest.approx(want.metrics, abs=1e-6) and got.skipped == want.skipped
  for name in ('z_image', 'z_caption', 'z_region', 'z_region_text', 'pred_boxes', 'pred_scores', 'points'):
    assert getattr(split, name) == pytest.approx(getattr(predictions, name), abs=2e-5), name


@pytest.mark.slow
def test_a_batch_is_split_over_the_devices(reference):
  encoder = encoders.load(str(reference.workdir), mesh=sharding.make_mesh(devices=jax.devices()[:4]))
  assert encoder.devices == 4
  import numpy as np
  handle = encoder.fns.encode_image(np.zeros((8, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, 3), np.uint8))
  assert {s.data.shape[0] for s in handle.tokens.addressable_shards} == {2}


@pytest.mark.slow
def test_every_way_to_embed_a_region_leaves_the_image_figures_alone(reference, alone):
  want, _ = alone
  seen = []
  for how in ('prompter', 'roi', 'mask-pool'):
    got, _ = figures(reference, how=how)
    same = [k for k in want.metrics if k.split('/')[0] in ('image_text_retrieval', 'grounding', 'pointing_game')]
    assert {k: got.metrics[k] for k in same} == pytest.approx({k: want.metrics[k] for k in same})
    assert got.metrics.keys() == want.metrics.keys()
    seen.append(got.metrics['region_recognition/ap_gt'])
  assert seen[0] == pytest.approx(want.metrics['region_recognition/ap_gt']) and len(set(seen)) == 3
