"""The stages on one shard, against stages whose answers are written out by hand."""
import dataclasses

import numpy as np
import pytest

import label_jobs
from cloc_jax.data import schema
from cloc_jax.label import inputs
from cloc_jax.label import stages
from cloc_jax.label import work


def shard_of(tmp_path, count=5):
  """A shard of decoded-checked pictures with the alt-texts of label_jobs."""
  label_jobs.write_photos(tmp_path, count)
  unit, = inputs.plan([tmp_path], shard_size=100)
  shard, = work.read(unit, 0, shard_size=100, text_keys=())
  return work.Decode()(shard)


class Scripted:
  """Every stage at once: answers are looked up by image id; what it was asked is kept."""
  version = 'by hand'

  def __init__(self, captions=None, phrases=None, detections=None):
    self.answers, self.asked = (captions, phrases, detections), []

  def caption(self, pictures):
    self.asked.append([picture.image_id for picture in pictures])
    return [self.answers[0][picture.image_id] for picture in pictures]

  def phrases(self, caption, alt_texts):
    self.asked.append((caption, tuple(alt_texts)))
    return self.answers[1][caption]

  def detect(self, pictures, queries):
    self.asked.append({picture.image_id: list(asked) for picture, asked in zip(pictures, queries, strict=True)})
    return [self.answers[2][picture.image_id] for picture in pictures]


def found(phrase, score=0.5, box=(0.1, 0.2, 0.5, 0.75)):
  return stages.Detection(box=box, phrase=phrase, score=score)


def test_a_record_says_what_the_stages_said(tmp_path):
  shard = shard_of(tmp_path, 2)
  captions = {'0000.jpg': '  A Dog on the new photo of grass ', '0001.jpg': 'alt-text 1'}
  phrases = {'A Dog on the new photo of grass': ['a dog', 'the new grass', 'alt-text'], 'alt-text 1': ['alt-text']}
  detections = {'0000.jpg': [found(1, 0.9), found(0, 0.25, (0, 0, 1, 1)), found(2), found(1, 0.1)],
                '0001.jpg': [found(0)]}
  captioner, extractor, detector = (Scripted(captions, phrases, detections) for _ in range(3))
  work.Caption(lambda: captioner, chunk=2)(shard)
  work.Phrases(lambda: extractor)(shard)
  work.Detect(lambda: detector, chunk=2)(shard)
  first, second = work.examples(shard)

  assert extractor.asked[0] == ('A Dog on the new photo of grass', ('alt-text 0', 'second line 0'))
  assert detector.asked == [{'0000.jpg': ['a dog', 'the new grass', 'alt-text'], '0001.jpg': ['alt-text']}]
  assert first.captions == ('A Dog on the new photo of grass', 'alt-text 0', 'second line 0')
  assert [(r.caption, r.score, r.source) for r in first.regions] == [
      ('the new grass', 0.9, 'caption'), ('a dog', 0.25, 'caption'), ('alt-text', 0.5, 'alt-text'),
      ('the new grass', 0.1, 'caption')]
  assert first.regions[1].box == (0, 0, 1, 1) and first.regions[0].box == (0.1, 0.2, 0.5, 0.75)
  # A caption that is one of the alt-texts is not there twice, and its phrases are the alt-text's.
  assert second.captions == ('alt-text 1', 'second line 1')
  assert second.regions[0].source == 'alt-text'
  assert first.made_by == ('captioner by hand', 'phrases by hand', 'detector by hand')
  assert schema.decode(schema.encode(first), where='').made_by == first.made_by
  assert (first.height, first.width) == (20, 24)
  counts = shard.summary.counts
  assert (counts['written'], counts['regions'], counts['queries'], counts['queries_found']) == (2, 5, 4, 4)
  assert shard.summary.histograms['score_percent'] == {90: 1, 25: 1, 50: 2, 10: 1}


def test_pictures_are_upright_rgb_and_come_in_chunks(tmp_path):
  from PIL import Image
  pixels = np.zeros((16, 32, 3), np.uint8)
  pixels[:, :16] = (255, 0, 0)  # the left half is red as stored; turned by orientation 6 it is the upper half
  image = Image.fromarray(pixels)
  exif = image.getexif()
  exif[0x0112] = 6
  image.save(tmp_path / 'turned.png', exif=exif)
  unit, = inputs.plan([tmp_path], shard_size=9)
  shard, = work.read(unit, 0, shard_size=9, text_keys=())
  seen = []

  class Looks(Scripted):
    def caption(self, pictures):
      seen.extend(pictures)
      return ['x'] * len(pictures)
  work.Caption(Looks, chunk=4)(work.Decode()(shard))
  picture, = seen
  assert picture.image.shape == (32, 16, 3) and picture.image.dtype == np.uint8
  assert (picture.image[:16] == (255, 0, 0)).all() and not picture.image[16:].any()


def test_a_stage_is_asked_in_chunks_and_in_order(tmp_path):
  shard = shard_of(tmp_path, 5)
  captioner = Scripted({f'{i:04}.jpg': f'caption {i}' for i in range(5)})
  work.Caption(lambda: captioner, chunk=2)(shard)
  assert captioner.asked == [['0000.jpg', '0001.jpg'], ['0002.jpg', '0003.jpg'], ['0004.jpg']]
  assert [item.caption for item in shard.items] == [f'caption {i}' for i in range(5)]


def test_one_image_that_fails_does_not_take_others_with_it(tmp_path):
  shard = shard_of(tmp_path, 6)
  captions = {f'{i:04}.jpg': 'same' for i in range(6)}
  captions |= {'0001.jpg': RuntimeError('busy'), '0002.jpg': ' \n', '0003.jpg': 7}
  work.Caption(lambda: Scripted(captions), chunk=4)(shard)
  assert [(f.id, f.stage, f.message) for f in shard.failures] == [
      ('0001.jpg', 'caption', 'RuntimeError: busy'),
      ('0003.jpg', 'caption', 'TypeError: the captioner gave a int, not a text'),
      ('0002.jpg', 'caption', 'empty caption')]
  assert [item.example.image_id for item in shard.items] == ['0000.jpg', '0004.jpg', '0005.jpg']

  class Breaks(Scripted):
    def detect(self, pictures, queries):
      if any(picture.image_id == '0004.jpg' for picture in pictures):
        raise MemoryError('no room')
      return [[found(0)] for _ in pictures]
  work.Phrases(lambda: Scripted(None, {'same': ['dog']}))(shard)
  work.Detect(Breaks, chunk=8)(shard)
  assert shard.failures[-1] == work.Failure('0004.jpg', 'detect', 'MemoryError: no room')
  assert [len(item.detections) for item in shard.items] == [1, 1]


@pytest.mark.parametrize('error, asked', [(FileNotFoundError('no weights at X'), 1), (ValueError('no such layer'), 4)])
def test_a_stage_that_is_broken_stops_the_run(tmp_path, error, asked):
  shard, calls = shard_of(tmp_path, 6), []

  class Broken(Scripted):
    def caption(self, pictures):
      calls.append(len(pictures))
      raise error
  with pytest.raises(type(error), match=str(error)):
    work.Caption(Broken, chunk=6)(shard)
  assert calls == [6, 1, 1, 1][:asked]


@pytest.mark.parametrize('bad, message', [
    (found(0, box=(0.5, 0.1, 0.5, 0.9)), 'without area or out of the image'),
    (found(0, box=(0.5, 0.1, 1.01, 0.9)), 'without area or out of the image'),
    (found(0, box=(0.5, float('nan'), 0.9, 0.9)), 'without area or out of the image'),
    (found(2), 'gave query 2 of 2'), (found(-1), 'gave query -1 of 2'),
    (found(0, score=float('nan')), 'the score nan')])
def test_a_detector_that_breaks_its_promise_loses_the_image(tmp_path, bad, message):
  shard = shard_of(tmp_path, 1)
  shard.items[0].queries = ('a', 'b')
  work.Detect(lambda: Scripted(detections={'0000.jpg': [found(1), bad]}), chunk=1)(shard)
  assert not shard.items and shard.failures[0].stage == 'detect' and message in shard.failures[0].message


def test_an_image_without_queries_is_written_and_not_shown_to_the_detector(tmp_path):
  shard = shard_of(tmp_path, 2)
  shard.items[1].queries = ('dog',)
  detector = Scripted(detections={'0001.jpg': []})
  for item in shard.items:
    item.caption = 'c'
  work.Detect(lambda: detector, chunk=2)(shard)
  shard.versions = dict.fromkeys(('captioner', 'phrases', 'detector'), 'x')
  assert detector.asked == [{'0001.jpg': ['dog']}]
  assert [example.regions for example in work.examples(shard)] == [(), ()]
  assert shard.summary.counts['without_queries'] == 1 and shard.summary.counts['without_regions'] == 2


@pytest.mark.parametrize('phrase, caption, alt_texts, source', [
    ('red car', 'A red image car.', (), 'caption'),
    ('car red', 'A red car.', ('my car: red',), 'alt-text'),
    ('cat', 'A category.', ('the cat',), 'alt-text'),
    ('man \'s hat', "The man's hat.", (), 'caption'),
    ('dog', 'The dog.', ('The dog.',), 'alt-text'),
    ('dog', 'The dog.', ('a dog',), 'caption'),
    ('never seen', 'The dog.', (), 'caption')])
def test_phrase_source(phrase, caption, alt_texts, source):
  assert work.phrase_source(phrase, caption, alt_texts) == source


def test_summaries_add_up(tmp_path):
  shards = []
  for part in range(2):
    shard = shard_of(tmp_path / str(part), 2 + part)
    for item in shard.items:
      item.caption, item.queries, item.detections = 'a b c', ('x y', 'z'), (found(0),)
    shard.versions = dict.fromkeys(('captioner', 'phrases', 'detector'), 'x')
    list(work.examples(shard))
    shards.append(shard.summary)
  total = dataclasses.replace(shards[0])
  total.merge(type(total).from_json(shards[1].to_json()))
  assert total.counts['written'] == 5 and total.tables['phrases'] == {'x y': 5}
  assert total.histograms['region_words'] == {2: 5} and total.histograms['alt_text_words'] == {2: 5, 3: 5}
