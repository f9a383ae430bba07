"""Figures of a labelling run: of a shard, and added up."""
import collections
from collections.abc import Mapping, Sequence
import dataclasses

from cloc_jax.data import schema

COUNTS = ('images', 'written', 'regions', 'queries', 'queries_found', 'captions_cached', 'without_alt_text',
          'without_queries', 'without_regions')
HISTOGRAMS = ('regions_per_image', 'queries_per_image', 'caption_words', 'alt_text_words', 'region_words',
              'score_percent')
TABLES = ('errors', 'sources', 'phrases')
_PHRASES = 2000  # kept in a sum: what is frequent everywhere is among a shard's most frequent


@dataclasses.dataclass
class Summary:
  """counts: by the names in COUNTS; `images` are all that were found, `written` those in the data set.

  histograms: by HISTOGRAMS, whole value → how often. tables: by TABLES, text → how often: stage of an error; source of
  a region; region text (the most frequent; counts of a long run's rarer ones are lower bounds).
  seconds: stage → time in it; models: stage → the part of it spent in the stage's model.
  """
  counts: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  histograms: dict[str, collections.Counter] = dataclasses.field(
      default_factory=lambda: {name: collections.Counter() for name in HISTOGRAMS})
  tables: dict[str, collections.Counter] = dataclasses.field(
      default_factory=lambda: {name: collections.Counter() for name in TABLES})
  seconds: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  models: collections.Counter = dataclasses.field(default_factory=collections.Counter)

  def add_example(self, example: schema.Example, *, alt_texts: Sequence[str], queries: int) -> None:
    """Counts an image that is written: its first caption is the new one."""
    regions = example.regions
    found = len({region.caption for region in regions})
    self.counts.update(written=1, regions=len(regions), queries=queries, queries_found=found,
                       without_alt_text=not alt_texts, without_queries=not queries, without_regions=not regions)
    add = lambda name, values: self.histograms[name].update(values)
    add('regions_per_image', [len(regions)])
    add('queries_per_image', [queries])
    add('caption_words', [len(example.captions[0].split())])
    add('alt_text_words', [len(text.split()) for text in alt_texts])
    add('region_words', [len(region.caption.split()) for region in regions])
    add('score_percent', [int(100 * region.score) for region in regions])
    self.tables['sources'].update(region.source for region in regions)
    self.tables['phrases'].update(region.caption for region in regions)

  def merge(self, other: 'Summary') -> None:
    """Adds another's figures."""
    self.counts.update(other.counts)
    self.seconds.update(other.seconds)
    self.models.update(other.models)
    for mine, theirs in ((self.histograms, other.histograms), (self.tables, other.tables)):
      for name, counter in theirs.items():
        mine[name].update(counter)
    if len(self.tables['phrases']) > 10 * _PHRASES:
      self.trim()

  def trim(self) -> None:
    """Forgets all but the most frequent phrases."""
    self.tables['phrases'] = collections.Counter(dict(self.tables['phrases'].most_common(_PHRASES)))

  def text(self) -> str:
    """A few lines for a terminal."""
    counts, lost = self.counts, self.counts['images'] - self.counts['written']
    regions = counts['regions'] / max(counts['written'], 1)
    found = 100 * counts['queries_found'] / max(counts['queries'], 1)
    lines = [f'{counts["written"]:,} images, {counts["regions"]:,} regions ({regions:.1f} an image), '
             f'{found:.0f} % of {counts["queries"]:,} queries found']
    if lost or self.tables['errors']:
      why = ', '.join(f'{stage} {count:,}' for stage, count in self.tables['errors'].most_common())
      lines.append(f'  {lost:,} images lost ({why}), named in errors.jsonl')
    return '\n'.join(lines)

  def to_json(self) -> dict:
    """As JSON can hold it."""
    table = lambda counter: {str(k): v for k, v in sorted(counter.items())}
    return {'counts': {name: self.counts[name] for name in COUNTS},
            'histograms': {name: table(counter) for name, counter in self.histograms.items()},
            'tables': {name: dict(counter.most_common()) for name, counter in self.tables.items()},
            'seconds': dict(self.seconds), 'models': dict(self.models)}

  @classmethod
  def from_json(cls, content: Mapping) -> 'Summary':
    """The reverse of to_json."""
    whole = {name: collections.Counter({int(k): v for k, v in table.items()})
             for name, table in content['histograms'].items()}
    return cls(counts=collections.Counter(content['counts']), histograms=whole,
               tables={name: collections.Counter(table) for name, table in content['tables'].items()},
               seconds=collections.Counter(content['seconds']), models=collections.Counter(content['models']))
