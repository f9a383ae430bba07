"""Captioners: a server that fails by script, a LLaVA of width 32, and fusion."""
import base64
import email.utils
import http.server
import io
import json
import pickle
import threading
import time

import numpy as np
import PIL.Image
import pytest

from cloc_jax.label import captioners, chat_server, prompts, stages


def pictures(*alt_texts, size=(40, 60)):
  rng = np.random.default_rng(0)
  return [stages.Picture(f'p{i}', rng.integers(0, 256, (*size, 3)).astype(np.uint8), texts)
          for i, texts in enumerate(alt_texts)]


class Server(http.server.ThreadingHTTPServer):
  """Answers by `script`: a function of the request's number and JSON → (status, headers, body bytes)."""

  def __init__(self, script):
    super().__init__(('127.0.0.1', 0), Handler)
    self.script, self.lock = script, threading.Lock()
    self.seen, self.busy, self.busiest = [], 0, 0
    threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

  @property
  def address(self):
    return f'http://127.0.0.1:{self.server_port}/v1'

  def handle_error(self, request, client_address):
    pass  # clients that gave up


class Handler(http.server.BaseHTTPRequestHandler):

  def do_POST(self):
    server = self.server
    body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
    with server.lock:
      number = len(server.seen)
      server.seen.append((self.path, dict(self.headers), body))
      server.busy += 1
      server.busiest = max(server.busiest, server.busy)
    try:
      status, headers, data = server.script(number, body)
    finally:
      with server.lock:
        server.busy -= 1
    self.send_response(status)
    for key, value in {'Content-Length': str(len(data)), **headers}.items():
      self.send_header(key, value)
    self.end_headers()
    self.wfile.write(data)

  def log_message(self, *args):
    pass


def says(text):
  return 200, {}, json.dumps({'choices': [{'message': {'role': 'assistant', 'content': text}}]}).encode()


def text_of(body):
  content = body['messages'][0]['content']
  return content if isinstance(content, str) else content[-1]['text']


@pytest.fixture(name='serve')
def serve_fixture(monkeypatch):
  monkeypatch.setenv('no_proxy', '*')
  servers = []

  def serve(script):
    servers.append(Server(script))
    return servers[-1]
  yield serve
  for server in servers:
    server.shutdown()
    server.server_close()


def made(server, *, prompt='say {alt_text}', **config):
  """A captioner, and the list of the seconds that it would have waited."""
  captioner = captioners.make(f'openai:{server.address}#tiny', prompt=prompt, **{'timeout': 5.0, **config})
  waits = []
  captioner._speaker._sleep = waits.append
  return captioner, waits


def test_the_request_is_openai_s_and_the_image_is_small(serve, monkeypatch):
  monkeypatch.setenv('MY_KEY', 'secret')
  server = serve(lambda number, body: says(' A dog. \n'))
  captioner, _ = made(server, max_side=30, api_key_env='MY_KEY', max_new_tokens=7, extra={'top_k': 1})
  image, = pictures(('a dog', 'Fido', 'a dog'))
  image.image[:, :30], image.image[:, 30:] = (250, 0, 0), (0, 0, 250)
  assert captioner.caption([image]) == ['A dog.']
  (path, headers, body), = server.seen
  assert path == '/v1/chat/completions' and headers['Authorization'] == 'Bearer secret'
  assert (body['model'], body['max_tokens'], body['temperature'], body['top_k']) == ('tiny', 7, 0.0, 1)
  picture, text = body['messages'][0]['content']
  assert text == {'type': 'text', 'text': 'say a dog Fido'}
  start, _, data = picture['image_url']['url'].partition(',')
  assert start == 'data:image/jpeg;base64'
  sent = PIL.Image.open(io.BytesIO(base64.b64decode(data)))
  assert sent.size == (30, 20)
  np.testing.assert_allclose(np.asarray(sent)[10, [3, 26]], [[250, 0, 0], [0, 0, 250]], atol=12)
  assert 'secret' not in captioner.version and b'secret' not in pickle.dumps(captioners.make(
      f'openai:{server.address}#tiny', api_key_env='MY_KEY'))


def test_too_many_requests_then_an_answer(serve):
  in_a_minute = email.utils.formatdate(time.time() + 40, usegmt=True)
  replies = [(429, {'Retry-After': '3'}, b'slow down'), (503, {'Retry-After': in_a_minute}, b''),
             (429, {'Retry-After': 'soon'}, b''), (500, {}, b''), (429, {'Retry-After': '900'}, b''), says('late')]
  server = serve(lambda number, body: replies[number])
  captioner, waits = made(server, backoff=2.0, max_wait=60.0)
  assert captioner.caption(pictures(())) == ['late']
  assert waits[0] == 3 and 30 < waits[1] <= 40
  assert 4 <= waits[2] <= 8 and 8 <= waits[3] <= 16, 'doubling, a random half of it'
  assert waits[4] == 60


def test_garbage_is_tried_again_and_then_an_error_for_that_image_alone(serve):
  bodies = [b'<html>bad gateway', b'{"choices": []}', b'', b'[1]', b'\xff\xfe', b'{"choices": [{"message": null}]}']

  def script(number, body):
    return says('fine') if 'good' in text_of(body) else (200, {}, bodies[number % len(bodies)])
  server = serve(script)
  captioner, waits = made(server, attempts=3, concurrency=1)
  got = captioner.caption(pictures(('good',), ('bad',), ('good',)))
  assert got[0] == got[2] == 'fine' and isinstance(got[1], chat_server.ServerError)
  assert 'no answer in 3 attempts' in str(got[1]) and 'choices[0].message.content' in str(got[1])
  assert len(waits) == 2 and len(server.seen) == 5


def test_a_server_that_hangs_is_given_up(serve):
  release = threading.Event()

  def script(number, body):
    if number == 0:
      release.wait(10)
    return says('awake')
  server = serve(script)
  captioner, waits = made(server, timeout=0.3)
  start = time.monotonic()
  assert captioner.caption(pictures(())) == ['awake']
  release.set()
  assert len(waits) == 1 and time.monotonic() - start < 5


def test_nobody_there(serve):
  server = serve(lambda *_: says(''))
  address = server.address
  server.shutdown()
  server.server_close()
  captioner = captioners.make(f'openai:{address}#tiny', attempts=2)
  captioner._speaker._sleep = lambda seconds: None
  error, = captioner.caption(pictures(()))
  assert isinstance(error, chat_server.ServerError) and address in str(error) and 'refused' in str(error)


@pytest.mark.parametrize('status, said', [(400, 'image too large'), (401, 'OPENAI_API_KEY'), (404, 'no model tiny')])
def test_a_refusal_is_not_repeated(serve, status, said):
  server = serve(lambda *_: (status, {}, b'{"error": "image too large, no model tiny"}'))
  captioner, waits = made(server)
  error, = captioner.caption(pictures(()))
  assert f'HTTP {status}' in str(error) and said in str(error)
  assert not waits and len(server.seen) == 1


def test_order_is_kept_and_concurrency_bounded(serve):
  rng = np.random.default_rng(0)
  pauses = rng.random(24) * 0.05

  def script(number, body):
    time.sleep(pauses[number])
    return says(text_of(body).split()[-1])
  server = serve(script)
  captioner, _ = made(server, concurrency=4)
  assert captioner.caption(pictures(*[(f'n{i}',) for i in range(24)])) == [f'n{i}' for i in range(24)]
  assert 1 < server.busiest <= 4


@pytest.mark.parametrize('spec, match', [
    ('openai:host:8000', 'http://HOST:PORT'), ('openai:ftp://x/v1', 'http://HOST:PORT'),
    ('openai:http://me:key@host/v1#m', 'environment'), ('gpt', "got 'gpt'"), ('fuse:alt-text', 'CAPTIONER|LLM'),
    ('hf:', "'hf:NAME'"), ('fuse:alt-text|spacy:x', "'hf:NAME' or 'openai"), ('alt-text:x', 'alt-text:x')])
def test_specs_that_are_none(spec, match):
  with pytest.raises(ValueError, match=match):
    captioners.make(spec)


def test_settings_are_checked():
  with pytest.raises(ValueError, match='attempts: expected at least 1, got 0'):
    captioners.make('openai:http://x/v1#m', attempts=0)
  with pytest.raises(TypeError, match='tokens'):
    captioners.make('openai:http://x/v1#m', tokens=0)
  with pytest.raises(ValueError, match=r'needs \{alt_text\}'):
    captioners.make('fuse:alt-text|openai:http://x/v1#m', prompt='{caption}')


def test_alt_texts_stay_as_they_are():
  captioner = captioners.make('alt-text')
  assert captioner.caption(pictures(('a dog ', '', 'a dog', 'Fido'), ())) == ['a dog Fido', '']


def test_prompts_are_filled_once():
  got = prompts.fill('{caption}|{alt_text}|{x}', alt_texts=('say {caption}', 'b'), caption='is {alt_text}')
  assert got == 'is {alt_text}|say {caption} b|{x}'


def test_versions_tell_what_changes_captions():
  make = captioners.make
  plain = make('openai:http://a/v1#m').version
  assert plain == make('openai:http://b:80/v1#m', attempts=2, concurrency=3).version
  others = [make('openai:http://a/v1#n'), make('openai:http://a/v1#m', prompt='a b'),
            make('openai:http://a/v1#m', prompt='a c'), make('openai:http://a/v1#m', max_new_tokens=9),
            make('openai:http://a/v1#m', temperature=1.0), make('openai:http://a/v1#m', extra={'k': 1}),
            make('fuse:alt-text|openai:http://a/v1#m'), make('fuse:openai:http://a/v1#m|openai:http://a/v1#m'),
            make('fuse:alt-text|openai:http://a/v1#m', prompt='{caption} {alt_text}'), make('alt-text')]
  assert len({plain, *(c.version for c in others)}) == 11


def test_fusion_asks_only_where_there_is_something_to_merge(serve):
  seeing = serve(lambda number, body: (400, {}, b'no') if 'broken' in text_of(body) else says('a red car'))
  writing = serve(lambda number, body: says('<' + text_of(body) + '>'))
  captioner = captioners.make(
      f'fuse:openai:{seeing.address}#eyes|openai:{writing.address}#pen', captioner=dict(prompt='see {alt_text}'),
      llm=dict(concurrency=1), prompt='{caption} + {alt_text}')
  got = captioner.caption(pictures(('Ferrari',), (), ('broken',), ('Fiat',)))
  assert got[:2] == ['<a red car + Ferrari>', 'a red car'] and got[3] == '<a red car + Fiat>'
  assert isinstance(got[2], chat_server.ServerError)
  assert [text_of(body) for *_, body in writing.seen] == ['a red car + Ferrari', 'a red car + Fiat']


@pytest.fixture(name='llava', scope='module')
def llava_fixture(tmp_path_factory):
  pytest.importorskip('torch')
  pytest.importorskip('transformers')
  import tiny_models
  return tiny_models.llava(tmp_path_factory.mktemp('tiny') / 'llava')


def test_llava_says_what_it_says_alone_by_transformers(llava):
  """Batched, left-padded and through our code, against one image at a time through transformers' own."""
  import tiny_models
  import torch
  import transformers
  images = pictures(('a dog',), ('a red bus near the large tree',), ())
  captioner = captioners.make(f'hf:{llava}', prompt='a cat on {alt_text}', max_new_tokens=12, batch_size=2)
  got = captioner.caption(images)
  processor = transformers.AutoProcessor.from_pretrained(llava)
  model = transformers.AutoModelForImageTextToText.from_pretrained(llava).eval()
  for picture, caption in zip(images, got):
    content = [{'type': 'image', 'image': PIL.Image.fromarray(picture.image)},
               {'type': 'text', 'text': f'a cat on {" ".join(picture.alt_texts)}'}]
    inputs = processor.apply_chat_template([{'role': 'user', 'content': content}], tokenize=True, return_dict=True,
                                           return_tensors='pt', add_generation_prompt=True)
    assert inputs['input_ids'][0, 0] == processor.tokenizer.bos_token_id, 'this template leaves it to the tokenizer'
    with torch.no_grad():
      ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs['input_ids'].shape[1]:]
    assert caption == processor.tokenizer.decode(ids, skip_special_tokens=True)
    assert len(caption.split()) == 12 and set(caption.split()) <= set(tiny_models.WORDS)
  assert len(set(got)) > 1, 'image and prompt matter'
  assert captioner.caption(images) == got


def test_one_image_that_the_model_refuses_fails_alone(llava):
  images = pictures((), ())
  captioner = captioners.make(f'hf:{llava}', max_new_tokens=3)
  want = captioner.caption(images)
  bad = stages.Picture('bad', np.zeros((4, 4, 7), np.uint8))
  got = captioner.caption([images[0], bad, images[1]])
  assert [got[0], got[2]] == want and isinstance(got[1], Exception)


def test_sampling_repeats_from_its_seed(llava):
  images = pictures((), ())
  say = lambda seed: captioners.make(f'hf:{llava}', max_new_tokens=8, temperature=5.0, seed=seed).caption(images)
  assert say(1) == say(1) != say(2)


def test_models_travel_unloaded_and_need_a_template(llava, tmp_path):
  import shutil
  captioner = captioners.make(f'hf:{llava}', max_new_tokens=3)
  want = captioner.caption(pictures(()))
  assert len(pickle.dumps(captioner)) < 3_000 and pickle.loads(pickle.dumps(captioner)).caption(pictures(())) == want
  folder = tmp_path / 'plain'
  shutil.copytree(llava, folder)
  (folder / 'chat_template.jinja').unlink()
  with pytest.raises(ValueError, match='no chat template; give template='):
    captioners.make(f'hf:{folder}').caption(pictures(()))
  got, = captioners.make(f'hf:{folder}', max_new_tokens=3, prompt='a dog', template='<image> {prompt}').caption(
      pictures(()))
  assert len(got.split()) == 3


def test_fusion_by_a_language_model_in_this_process(llava, tmp_path):
  import tiny_models
  writer = tiny_models.language_model(tmp_path / 'pen')
  captioner = captioners.make(f'fuse:hf:{llava}|hf:{writer}', captioner=dict(max_new_tokens=4),
                              llm=dict(max_new_tokens=5), prompt='{caption} {alt_text}')
  plain = captioners.make(f'hf:{llava}', max_new_tokens=4).caption(pictures((), ()))
  got = captioner.caption(pictures(('a red dog',), ()))
  assert got[1] == plain[1] and len(got[0].split()) == 5
