"""`cloc` as it is typed: help, verbs that make files, and errors that fit on a line."""
import dataclasses
import json
import re
import subprocess
import sys

import pytest
import tiny_experiment as tiny

from cloc_jax import cli
from cloc_jax.data import schema, sources


@pytest.fixture(autouse=True, scope='module')
def compiled_once(base):
  with tiny.compiled_once(base):
    yield


@pytest.fixture(name='data', scope='module')
def data_fixture(base):
  return tiny.data(base)


@pytest.fixture(name='run', scope='module')
def run_fixture(base):
  run = tiny.run(base)
  assert run.finished.status == 0, run.finished.err
  return run


def stopped(argv):
  """The exit status of a command that argparse ends."""
  with pytest.raises(SystemExit) as ended:
    cli.main(argv)
  return ended.value.code


# --- help


@pytest.mark.parametrize('verb, names', [
    ([], ['train', 'eval', 'report', 'data', '--debug']),
    (['train'], ['--config FILE.py[:ARGS]', '--workdir DIR', '--report', '--coordinator HOST:PORT', '--num-processes',
                 '--process-id', '--config.optim.learning_rate=1e-3', 'resume']),
    (['eval'], ['--checkpoint DIR', '--data PATH', '--imagefolder DIR', '--classes FILE.json', '--split NAME',
                '--step', '--batch-size', '--limit', '--pool-limit', '--encoder SPEC',
                '--region-embedding {model,prompter,roi,mask-pool,crop}', '--out DIR', '--dump FILE.parquet',
                 '--coordinator HOST:PORT', '--num-processes', '--process-id',
                 '--task {imagenet,imagenet-v2,imagenet-a,imagenet-r,imagenet-sketch}', '--labels FILE',
                 '--allow-missing', '--proposals FILE', '--report FILE']),
    (['eval-diff'], ['A.parquet', 'B.parquet', '--out FILE.html', '--images']),
    (['report'], ['--workdir DIR', '--out FILE', '--images']),
    (['data'], ['scenes', 'import', 'inspect', 'validate', 'stats']),
    (['data', 'import'], ['FORMAT', 'coco', 'lvis', 'objects365', 'open-images', 'rows',
                         'webdataset', 'grit', 'visual-genome', 'refcoco', 'flickr30k-entities']),
    (['data', 'scenes'], ['--out DIR', '--train', '--val', '--unseen', '--size', '--seed', '--sprites SPEC',
                          '--preset {full,local}', '--encoding {jpeg,png}', '--num-workers', '--overwrite']),
    (['data', 'import', 'coco'], ['--split NAME', '--images DIR', '--instances FILE.json', '--captions FILE.json',
                                  '--panoptic FILE.json', '--stuff', '--out DIR', '--name', '--workers',
                                  '--allow-missing', '--max-error-share SHARE', '--trust-boxes', '--overwrite']),
    (['data', 'inspect'], ['DATASET', '--split', '--out FILE', '--count', '--image-size', '--regions', '--seed',
                           '--flip']),
])
def test_help(capsys, verb, names):
  assert stopped([*verb, '--help']) == 0
  out, err = capsys.readouterr()
  text = re.sub(r'\s+', ' ', out)
  assert err == '' and text.startswith(f'usage: {" ".join(["cloc", *verb])} ')
  for name in names:
    assert name in text, name
  described = text.split('options:')[0]
  assert len(described.split(']')[-1].split()) >= 3, 'a verb says in a sentence what it does'


def test_help_is_quick():
  """Nothing heavy is imported to print a page of text."""
  code = ('import sys\nfrom cloc_jax import cli\ntry: cli.main(["train", "--help"])\nexcept SystemExit: pass\n'
          'print(sorted({m.split(".")[0] for m in sys.modules} & {"jax", "flax", "grain", "orbax", "cv2", "numpy"}))')
  out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=tiny.ROOT).stdout
  assert out.splitlines()[-1] in ('[]', "['numpy']")


@pytest.mark.parametrize('argv, message', [
    ([], 'required: VERB'),
    (['trian'], "invalid choice: 'trian'"),
    (['data', 'scene'], "invalid choice: 'scene'"),
    (['train', '--config', 'x.py'], 'required: --workdir'),
    (['train', '--config', 'x.py', '--workdir', 'w', '--reprot'], 'unrecognized arguments: --reprot'),
    (['eval', '--checkpoint', 'x', '--data', 'y', '--region-embedding', 'cut'], "invalid choice: 'cut'"),
    (['report', '--workdir', 'x', '--config.train.seed=1'], '--config.KEY=VALUE belongs to `cloc train`'),
])
def test_wrong_arguments(capsys, argv, message):
  assert stopped(argv) == 2
  err = capsys.readouterr().err
  assert message in err and err.startswith('usage: cloc')


# --- errors that a user can mend


@pytest.mark.parametrize('argv, message', [
    (['train', '--config', 'configs/scenes_locl.py', '--workdir', 'W'], "Did you mean 'scenes_local.py'?"),
    (['train', '--config', 'TINY:DATA', '--workdir', 'W', '--config.optim.lerning_rate=1'],
     "--config.optim.lerning_rate: no such key. Did you mean 'learning_rate'?"),
    (['train', '--config', 'TINY:DATA', '--workdir', 'W', '--config.data.batch_size', 'many'],
     "--config.data.batch_size: expected int (now 16), got str 'many'"),
    (['train', '--config', 'TINY:/nowhere/data', '--workdir', 'W'], 'no data set at /nowhere/data'),
    (['train', '--config', 'TINY:DATA', '--workdir', 'W', '--coordinator', 'host:1'], '--coordinator needs'),
    (['eval', '--checkpoint', '/nowhere/run', '--data', 'DATA'], '/nowhere/run does not exist'),
    (['report', '--workdir', '/nowhere/run'], '/nowhere/run'),
    (['data', 'scenes', '--out', 'DATA', '--train', '1', '--num-workers', '1'], 'holds a data set already'),
    (['data', 'scenes', '--out', 'W/s', '--sprites', 'folder:/nowhere'], '/nowhere'),
    (['data', 'inspect', 'DATA', '--split', 'vla'], "no split 'vla'"),
    (['data', 'inspect', '/nowhere/data'], 'no data set at /nowhere/data'),
    (['data', 'validate', 'DATA', '--split', 'vla'], "no split 'vla'"),
    (['data', 'import', 'coco', '--images', 'a', '--images', 'b', '--instances', 'c', '--out', 'W/c'],
     'expected as many --split (1) as --images (2)'),
    (['data', 'import-coco', '--images', '/nowhere', '--instances', '/nowhere/i.json', '--out', 'W/c'], '/nowhere'),
])
def test_errors_are_one_line(capsys, data, tmp_path, monkeypatch, argv, message):
  monkeypatch.chdir(tiny.ROOT)
  stand_for = {'TINY:DATA': f'{tiny.CONFIG}:{data}', 'TINY:/nowhere/data': f'{tiny.CONFIG}:/nowhere/data',
               'DATA': str(data), 'W': str(tmp_path / 'w'), 'W/s': str(tmp_path / 's'), 'W/c': str(tmp_path / 'c')}
  argv = [stand_for.get(arg, arg) for arg in argv]
  assert cli.main(argv) == 2
  out, err = capsys.readouterr()
  assert out == '' and err.count('\n') == 1 and err.startswith(f'cloc {argv[0]}: ') and message in err
  with pytest.raises(Exception, match=re.escape(message.split("'")[0])):
    cli.main(['--debug', *argv])


def test_eval_diff_may_be_written_as_two_words(capsys):
  for argv in (['eval', 'diff'], ['--debug', 'eval', 'diff']):
    with pytest.raises(SystemExit):
      cli.main([*argv, '--help'])
    assert 'usage: cloc eval-diff' in capsys.readouterr().out
  assert cli.main(['eval', 'diff', 'absent.parquet', 'b.parquet']) == 2
  assert 'absent.parquet: no such file' in capsys.readouterr().err


def test_evaluation_says_how_far_it_is_where_there_is_no_terminal(capsys, monkeypatch):
  from cloc_jax import cli_eval
  clock = iter([0., 10., 20., 45., 50., 110.])
  monkeypatch.setattr(cli_eval.time, 'monotonic', lambda: next(clock))
  show = cli_eval._counter('val', total=10_000)
  for done in (64, 164, 414, 464, 1064):
    show(done)
  assert capsys.readouterr().err.splitlines() == [
      'val: 414 of 10,000 images, 10/s, 16 min left', 'val: 1,064 of 10,000 images, 10/s, 15 min left']


def test_other_errors_keep_their_traceback(monkeypatch):
  def broken(*args, **kwargs):
    raise RuntimeError('a mistake of ours')
  monkeypatch.setattr('cloc_jax.report.write', broken)
  with pytest.raises(RuntimeError, match='a mistake of ours'):
    cli.main(['report', '--workdir', 'x'])


# --- data


def test_whoever_reads_may_have_enough():
  """As in `cloc … | head`: no traceback, and the status that a shell gives."""
  code = ("import sys; from cloc_jax import cli, cli_data; "
          "cli_data.add_verbs = lambda verbs: verbs.add_parser('talk').set_defaults("
          "run=lambda args: [print('x' * 1000) for _ in range(1000)] and 0); sys.exit(cli.main(['talk']))")
  talk = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tiny.ROOT)
  assert talk.stdout.readline() == b'x' * 1000 + b'\n'
  talk.stdout.close()
  assert talk.stderr.read() == b'' and talk.wait() == 141
  talk.stderr.close()


def test_scenes_are_drawn_as_asked(tmp_path, capsys):
  argv = ['data', 'scenes', '--out', str(tmp_path / 's'), '--train', '5', '--val', '3', '--unseen', '2', '--size', '32',
          '--seed', '4', '--preset', 'local', '--encoding', 'png', '--num-workers', '1']
  assert cli.main(argv) == 0
  out = capsys.readouterr().out
  assert str(tmp_path / 's') in out and json.loads(out.split(': ', 1)[1]) == {'train': 5, 'val': 3, 'unseen': 2}
  assert dict(schema.read_meta(tmp_path / 's').splits) == {'train': 5, 'val': 3, 'unseen': 2}
  assert cli.main([*argv, '--overwrite', '--val', '0']) == 0
  assert dict(schema.read_meta(tmp_path / 's').splits) == {'train': 5, 'unseen': 2}


def test_validate_says_by_its_status_whether_anything_is_broken(data, tmp_path, capsys):
  out = tmp_path / 'report.json'
  assert cli.main(['data', 'validate', str(data), '--split', 'val', '--num-workers', '0', '--json', str(out)]) == 0
  assert capsys.readouterr().out.endswith('nothing is broken\n') and json.loads(out.read_text())['ok'] is True
  example = next(iter(sources.RecordSource(data, split='val')))
  schema.write_dataset(tmp_path / 'bad', meta=schema.DatasetMeta(name='bad'), splits={
      'train': [dataclasses.replace(example, image=example.image[:len(example.image) // 2])]})
  assert cli.main(['data', 'validate', str(tmp_path / 'bad'), '--num-workers', '0']) == 1
  assert 'broken: 1 images that cannot be decoded' in capsys.readouterr().out


def test_stats_writes_a_page(data, tmp_path, capsys):
  out = tmp_path / 'stats.html'
  assert cli.main(['data', 'stats', str(data), '--num-workers', '0', '--out', str(out)]) == 0
  assert 'regions an image: mean' in capsys.readouterr().out and 'median' in out.read_text()


def test_inspect_draws_a_page(data, tmp_path, capsys):
  out = tmp_path / 'page.html'
  assert cli.main(['data', 'inspect', str(data), '--split', 'val', '--out', str(out), '--count', '3',
                   '--image-size', '48']) == 0
  counts, path = capsys.readouterr().out.splitlines()
  assert path == str(out) and json.loads(counts)['examples'] == 3
  assert out.read_text().count('data:image/') == 3


def test_coco_is_imported(coco_mini, tmp_path, capsys):
  annotations = coco_mini / 'annotations'
  argv = ['data', 'import', 'coco', '--out', str(tmp_path / 'coco'), '--split', 'val',
          '--images', str(coco_mini / 'val2017'), '--instances', str(next(annotations.glob('instances_val*.json'))),
          '--captions', str(next(annotations.glob('captions_val*.json')))]
  assert cli.main(argv) == 0
  out = capsys.readouterr().out
  count = len(list((coco_mini / 'val2017').glob('*.jpg')))
  assert schema.read_meta(tmp_path / 'coco').splits == {'val': count}
  assert out.splitlines()[-1] == str(tmp_path / 'coco') and str(count) in out


def test_an_interrupted_import_says_how_to_go_on(tmp_path, capsys, monkeypatch):
  def interrupted(*args, **kwargs):
    raise KeyboardInterrupt
  monkeypatch.setattr('cloc_jax.data.importers.engine.run', interrupted)
  argv = ['data', 'import', 'coco', '--out', str(tmp_path / 'coco'), '--images', str(tmp_path), '--instances', 'i.json']
  assert cli.main(argv) == 130
  assert f'the same command goes on with {tmp_path / "coco"}.incomplete' in capsys.readouterr().err


# --- a checkpoint's verbs


@pytest.mark.slow
def test_eval_agrees_with_the_evaluation_of_training(run, tmp_path, capsys):
  argv = ['eval', '--checkpoint', str(run.workdir), '--data', str(run.data), '--batch-size', '5']
  assert cli.main([*argv, '--out', str(tmp_path), '--split', 'val']) == 0
  out = capsys.readouterr().out
  assert '| metric, % ' in out and '| val ' in out and 'unseen' not in out
  got = json.loads((tmp_path / 'val.json').read_text())
  want = json.loads((run.workdir / 'evals' / 'val.json').read_text())
  assert got['step'] == tiny.TOTAL and got['split'] == 'val' and got['region_embedding'] == 'model'
  assert got['metrics'].keys() == want['metrics'].keys()
  assert got['metrics'] == pytest.approx(want['metrics'], abs=0.05)  # a near tie may fall otherwise

  assert cli.main([*argv, '--out', str(tmp_path / 'crop'), '--region-embedding', 'crop', '--limit', '6', '--step',
                   '40']) == 0  # all splits but train
  out = capsys.readouterr().out
  assert '| val ' in out and '| unseen ' in out and 'train' not in out
  cropped = json.loads((tmp_path / 'crop' / 'unseen.json').read_text())
  assert (cropped['region_embedding'], cropped['limit'], cropped['step']) == ('crop', 6, 40)
  assert cropped['metrics']['image_text_retrieval/images'] == 6


def test_eval_names_the_splits_and_steps_there_are(run, capsys):
  argv = ['eval', '--checkpoint', str(run.workdir), '--data', str(run.data)]
  assert cli.main([*argv, '--split', 'tset']) == 2
  assert "no split 'tset'; it has ['train', 'val', 'unseen']" in capsys.readouterr().err
  assert cli.main([*argv, '--step', '41']) == 2
  assert 'no step 41; it holds [10, 20, 30, 40, 50, 60]' in capsys.readouterr().err


@pytest.mark.slow
def test_report_is_one_page_with_pictures(run, tmp_path, capsys):
  out = tmp_path / 'report.html'
  assert cli.main(['report', '--workdir', str(run.workdir), '--out', str(out), '--images', '2']) == 0
  assert capsys.readouterr().out.strip() == str(out)
  text = out.read_text()
  assert text.startswith('<!doctype html>') and 'data:image/' in text and 'unseen' in text
