"""The whole pipeline for real: LLaVA and OWLv2 of width 32 on photos, through Ray and in this process, then training."""
import json

import pytest

import label_jobs
import tiny_experiment
from cloc_jax import cli

pytest.importorskip('ray')
tiny_models = pytest.importorskip('tiny_models')  # needs torch and transformers
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings('ignore')]  # Ray's and transformers' own


@pytest.fixture(name='flags', scope='module')
def flags_fixture(tmp_path_factory):
  """The stages as flags: a captioner and a detector with random weights, and the paper's phrases."""
  folder = tmp_path_factory.mktemp('models')
  llava, owl = tiny_models.llava(folder / 'llava'), tiny_models.owlv2(folder / 'owlv2')
  config = folder / 'vesl_tiny.py'
  config.write_text(f'''
import ml_collections
def get_config(arg=''):
  return ml_collections.ConfigDict(dict(
      captioner=dict(spec='hf:{llava}', max_new_tokens=12, batch_size=4), phrases=dict(spec='nltk'),
      detector=dict(spec='owlv2:{owl}', image_size=64, threshold=0.1, batch_size=4),
      engine=dict(shard_size=5, chunk=5, max_error_share=0.5), pools=dict()))
''')
  return ['--config', str(config), '--no-cache']


@pytest.fixture(name='one_thread')
def one_thread_fixture():
  """As Ray gives its actors: the last bits of a sum depend on how many threads share it."""
  import torch
  before = torch.get_num_threads()
  torch.set_num_threads(1)
  yield
  torch.set_num_threads(before)


def test_photos_through_models_to_a_trained_step(tmp_path, coco_mini, flags, one_thread):
  (tmp_path / 'in').mkdir()
  for path in sorted((coco_mini / 'train2017').glob('*.jpg'))[:20]:
    (tmp_path / 'in' / path.name).symlink_to(path)
  for runner in ('local', 'ray'):
    assert cli.main(['label', '--input', str(tmp_path / 'in'), '--out', str(tmp_path / runner), '--runner', runner,
                     '--ray-cpus=2', '--ray-object-store=0.2', *flags]) == 0
  assert label_jobs.digests(tmp_path / 'ray') == label_jobs.digests(tmp_path / 'local')
  records = label_jobs.records(tmp_path / 'ray')
  assert len(records) == 20
  regions = [region for record in records for region in record.regions]
  assert regions and all(0.1 < region.score <= 1 for region in regions)
  for record in records:
    words = record.captions[0].lower().split()
    assert all(region.source == 'caption' and set(region.caption.split()) <= set(words) for region in record.regions)
  # The trainer reads it.
  assert cli.main(['train', '--config', f'{tiny_experiment.CONFIG}:{tmp_path / "ray"}', '--workdir',
                   str(tmp_path / 'run'), '--config.train.total_steps=2', '--config.checkpoint.every_steps=2',
                   '--config.optim.warmup_steps=1']) == 0
  last = json.loads((tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()[-1])
  assert last['step'] == 2 and last['loss'] > 0
