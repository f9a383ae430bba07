"""Streamed JSON against json.loads, its errors, and that memory stays flat."""
import json
import subprocess
import sys

import hypothesis
from hypothesis import strategies as st
import pytest

from cloc_jax.data.importers import json_stream
from cloc_jax.data.importers import progress

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2**60, 2**60) | st.floats(-1e9, 1e9) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=8)


@hypothesis.given(st.dictionaries(st.sampled_from(['images', 'info', 'other']), VALUES), st.lists(VALUES, max_size=5))
@hypothesis.settings(max_examples=60, deadline=None)
def test_the_same_as_json_loads(tmp_path_factory, others, wanted):
  path = tmp_path_factory.mktemp('json') / 'file.json'
  for content in ({**others, 'annotations': wanted}, {'annotations': wanted, **others}):
    path.write_text(json.dumps(content))
    assert list(json_stream.items(path, 'annotations')) == wanted
    assert json_stream.value(path, 'annotations') == wanted


def test_a_byte_order_mark_and_a_missing_key(tmp_path):
  path = tmp_path / 'a.json'
  path.write_bytes(b'\xef\xbb\xbf {"a": [1, 2], "b": []}')
  assert list(json_stream.items(path, 'a')) == [1, 2] and list(json_stream.items(path, 'b')) == []
  assert list(json_stream.items(path, 'c', optional=True)) == [] and json_stream.value(path, 'c', 5) == 5
  with pytest.raises(ValueError, match=r"a.json: no key 'c'; found \['a', 'b'\]"):
    list(json_stream.items(path, 'c'))


@pytest.mark.parametrize('content, message', [
    (b'', r'a.json is not a JSON file: it is empty \(0 bytes\)'),
    (b'<html>', "is not a JSON file: it begins with b'<html>'"),
    (b'[1]', 'expected an object at the top, got a list'),
    (b'{"a": {"b": 1}}', "'a' must be a list, got map"),
    (b'{"a": 3}', "'a' must be a list, got number"),
    (b'{"a": [{"x": 1}, {"x"', r'a.json is cut off: it ends after 21 bytes, in or after a\[1\]'),
    (b'{"a": [{"x": 1}, {"x": NaN}]}', r"near '.*NaN.*', in or after a\[1\], between bytes 0 and 29 of 29"),
    (b'{"a": [1], }', 'a.json is not a JSON file: parse error'),
    (b'{"a": ["\xff"]}', 'a.json is not a JSON file: lexical error: invalid bytes in UTF8')])
def test_what_is_wrong_is_named(tmp_path, content, message):
  path = tmp_path / 'a.json'
  path.write_bytes(content)
  with pytest.raises(ValueError, match=message):
    list(json_stream.items(path, 'a'))


def test_items_before_the_break_are_given(tmp_path):
  path = tmp_path / 'a.json'
  path.write_text('{"a": [' + ', '.join('{"x": %d}' % i for i in range(50_000)) + ', {"x"')
  found = []
  with pytest.raises(ValueError, match=r'in or after a\[50000\]'):
    found.extend(item['x'] for item in json_stream.items(path, 'a'))
  # list.extend keeps what a failing generator gave
  assert found == list(range(50_000))


def test_the_nearest_file_is_named(tmp_path):
  (tmp_path / 'instances_train2017.json').write_text('{}')
  with pytest.raises(FileNotFoundError, match='did you mean .*instances_train2017.json'):
    list(json_stream.items(tmp_path / 'instance_train2017.json', 'a'))


def test_memory_is_that_of_one_item(tmp_path):
  """60 MB of annotations; loading them all takes more than 200 MB."""
  path = tmp_path / 'big.json'
  line = json.dumps({'segmentation': [[1.25 + i for i in range(40)]], 'image_id': 1, 'bbox': [1, 2, 3, 4]})
  with open(path, 'w') as file:
    file.write('{"annotations": [')
    file.write(', '.join([line] * 180_000))
    file.write('], "images": []}')
  code = ('import resource, sys\n'
          'from cloc_jax.data.importers import json_stream\n'
          'peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n'
          'before = peak()\n'
          'count = sum(1 for _ in json_stream.items(sys.argv[1], "annotations"))\n'
          'print(count, peak() - before)')
  done = subprocess.run([sys.executable, '-c', code, str(path)], capture_output=True, text=True, check=True)
  count, grown = map(int, done.stdout.split())
  assert count == 180_000 and path.stat().st_size > 50e6 and grown < 8 * 1024  # KiB


@pytest.mark.parametrize('terminal', [True, False])
def test_reading_a_big_file_is_shown_when_asked(tmp_path, monkeypatch, capsys, terminal):
  path = tmp_path / 'a.json'
  path.write_text(json.dumps({'a': [1, 2, 3]}))
  monkeypatch.setattr('sys.stderr.isatty', lambda: terminal)
  assert list(json_stream.items(path, 'a')) == [1, 2, 3]
  with progress.shown(True):
    assert list(json_stream.items(path, 'a')) == [1, 2, 3]
    assert capsys.readouterr().err == ''
    monkeypatch.setattr(progress, '_BIG', 0)
    assert list(json_stream.items(path, 'a')) == [1, 2, 3]
  err = capsys.readouterr().err
  assert ('a.json: a: ' in err) if terminal else (err == 'a.json: reading a in 0.0 GB\n')
