"""The pages and the verbs, on runs with known figures."""
import json
import pathlib
import re
import runpy

import pytest

import html_tree
import label_jobs
import tiny_experiment
from cloc_jax import cli
from cloc_jax import cli_label
from cloc_jax import config as config_lib
from cloc_jax.label import engine
from cloc_jax.label import prompts
from cloc_jax.label import report
from cloc_jax.label import runners
from cloc_jax.label import writer

STAGES = [f'--{stage}={label_jobs.SCRIPTED}{name}' for stage, name in
          (('captioner', 'Captioner'), ('phrases', 'Phrases'), ('detector', 'Detector'))]


def test_the_page_shows_the_figures_of_the_records(tmp_path):
  photos = label_jobs.write_photos(tmp_path / 'in', 20, broken=(3, 4))
  engine.run(label_jobs.job(photos, tmp_path / 'out'), max_error_share=0.2)
  records = label_jobs.records(tmp_path / 'out')
  regions = [region for example in records for region in example.regions]
  run = report.load(tmp_path / 'out')
  assert report.mean(run.summary.histograms['regions_per_image']) == pytest.approx(len(regions) / 18)
  assert report.mean(run.summary.histograms['region_words']) == pytest.approx(
      sum(len(r.caption.split()) for r in regions) / len(regions))
  assert run.summary.tables['phrases']['dog'] == sum(r.caption == 'dog' for r in regions) > 0

  out = report.write(tmp_path / 'out', images=5)
  text = out.read_text()
  html_tree.parse(text)
  assert out == tmp_path / 'out.label.html' and text.count('<svg class="picture') == 5
  assert f'{len(regions) / 18:.1f}' in text and '35.9' in text and '0003.jpg' in text and 'cannot be decoded' in text
  assert re.search(r'image lost: decode</td><td>1</td><td>5.00 %', text)


def test_a_run_under_way_has_a_page_too(tmp_path):
  photos = label_jobs.write_photos(tmp_path / 'in', 20, broken=(10,))
  with pytest.raises(engine.TooManyErrors):
    engine.run(label_jobs.job(photos, tmp_path / 'out'))
  text = report.write(tmp_path / 'out').read_text()
  assert 'Not finished' in text and '0010.jpg' in text
  with pytest.raises(FileNotFoundError, match='no run of `cloc label`'):
    report.load(tmp_path / 'in')


@pytest.mark.parametrize('spans, expected', [([], 0), ([(0, 2), (1, 3), (5, 6)], 4), ([(0, 9), (1, 2)], 9)])
def test_busy_seconds(spans, expected):
  assert writer.busy_seconds(spans) == expected


def test_the_verbs(tmp_path, capsys):
  photos = label_jobs.write_photos(tmp_path / 'in', 6)
  out = tmp_path / 'out'
  assert cli.main(['label', '--input', str(photos), '--out', str(out), '--shard-size=4', *STAGES]) == 0
  assert '6 images' in capsys.readouterr().out and (tmp_path / 'captions.cache').is_dir()
  assert cli.main(['label', '--input', str(photos), '--out', str(out), '--shard-size=4', *STAGES]) == 0
  assert 'complete already' in capsys.readouterr().out
  assert cli.main(['label', '--input', str(photos), '--out', str(out), '--shard-size=3', *STAGES]) == 2
  assert 'shard_size: 4 → 3' in capsys.readouterr().err
  assert cli.main(['label', 'report', str(out), '--out', str(tmp_path / 'page.html')]) == 0
  assert (tmp_path / 'page.html').exists()

  page = tmp_path / 'try.html'
  assert cli.main(['label', 'try', str(photos / '0002.jpg'), '--out', str(page), *STAGES]) == 0
  said = capsys.readouterr().out
  record = label_jobs.records(out)[2]
  assert record.captions[0] in said and 'alt-text 2' in said
  for region in record.regions:
    assert f'{region.score:.3f}  {region.caption}' in said
  html_tree.parse(page.read_text())
  assert record.captions[0] in page.read_text()


def test_a_config_and_its_overrides(tmp_path, capsys):
  photos = label_jobs.write_photos(tmp_path / 'in', 6)
  config = tmp_path / 'vesl_small.py'
  config.write_text(f'''
import ml_collections
def get_config(arg=''):
  return ml_collections.ConfigDict(dict(
      captioner=dict(spec='{label_jobs.SCRIPTED}Captioner'), phrases=dict(spec='{label_jobs.SCRIPTED}Phrases'),
      detector=dict(spec='{label_jobs.SCRIPTED}Detector', threshold=0.2), engine=dict(shard_size=3), pools=dict()))
''')
  run = ['label', '--input', str(photos), '--out', str(tmp_path / 'out'), '--config', str(config)]
  assert cli.main([*run, '--config.detector.threshold=0.6']) == 0
  scores = [region.score for example in label_jobs.records(tmp_path / 'out') for region in example.regions]
  assert scores and min(scores) > 0.6
  capsys.readouterr()
  assert cli.main([*run, '--overwrite', '--config.detector.treshold=0.6']) == 2
  assert "Did you mean 'threshold'" in capsys.readouterr().err
  assert cli.main([*run, '--overwrite', '--config.engine.chnk=0']) == 2
  assert cli.main(['label', '--out', 'x', *STAGES]) == 2
  assert cli.main(['label', '--input', str(photos), '--out', 'x']) == 2
  assert 'no captioner' in capsys.readouterr().err


def test_shipped_configs_build():
  folder = pathlib.Path(__file__).resolve().parents[2] / 'configs'
  found = sorted(folder.glob('vesl_*.py'))
  assert found
  for path in found:
    config = config_lib.load(str(path), sections=cli_label.SECTIONS)
    for pool in config.pools:
      runners._pool(pool, config.pools)
    json.dumps(config_lib.plain(config))


@pytest.mark.parametrize('spec', ['openai:http://h:1/v1#m', 'fuse:openai:http://h:1/v1#m|openai:http://h:1/v1#l',
                                  'alt-text'])
def test_the_config_spells_out_the_defaults(spec):
  file = pathlib.Path(__file__).resolve().parents[2] / 'configs' / 'vesl_owlv2.py'
  config = config_lib.load(f'{file}:{spec}', sections=cli_label.SECTIONS)
  settings = config_lib.plain(config)['captioner']
  assert settings['spec'] == spec and ('prompt' in settings) == (spec != 'alt-text')
  assert engine.build_stage('captioner', settings).version == engine.build_stage('captioner', {'spec': spec}).version


@pytest.mark.slow
def test_training_on_the_labels(tmp_path, coco_mini):
  """Real photos through scripted stages, then a few steps of the trainer."""
  (tmp_path / 'in').mkdir()
  for path in sorted((coco_mini / 'train2017').glob('*.jpg'))[:20]:
    (tmp_path / 'in' / path.name).symlink_to(path)
  out = tmp_path / 'out'
  assert cli.main(['label', '--input', str(tmp_path / 'in'), '--out', str(out), *STAGES]) == 0
  assert len(label_jobs.records(out)) == 20
  assert cli.main(['train', '--config', f'{tiny_experiment.CONFIG}:{out}', '--workdir', str(tmp_path / 'run'),
                   '--config.train.total_steps=2', '--config.checkpoint.every_steps=2',
                   '--config.optim.warmup_steps=1']) == 0
  last = json.loads((tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()[-1])
  assert last['step'] == 2 and last['loss'] > 0 and last['regions_per_image'] > 1


def test_the_config_spells_out_the_default_prompts():
  """Configs import nothing of the package, so that the prompts stand in both."""
  path = pathlib.Path(__file__).resolve().parents[2] / 'configs' / 'vesl_owlv2.py'
  config = runpy.run_path(str(path))
  assert (config['CAPTION'], config['FUSE']) == (prompts.CAPTION, prompts.FUSE)
