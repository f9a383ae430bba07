"""The default prompts, our own words, and how texts are put into one. Configs hold others."""
from collections.abc import Sequence

# Long, concrete, and only what can be seen: every noun phrase becomes a query for the detector.
CAPTION = ('Describe this image in one detailed paragraph. Name every visible object and person, with colour, '
           'material, number and where it is. Say only what can be seen; do not guess at what is not in the picture, '
           'and do not begin with "The image shows".')

# In the manner of VeCap (Lai et al. 2023, arXiv 2310.07699): what was seen, and the names that only the alt-text knows.
FUSE = ('Below are two texts about the same image: a description by someone who saw it, and the text that stood beside '
        'it on its web page. Write one fluent caption that keeps every visible detail of the first and adds the proper '
        'names and facts of the second that fit it. Leave out advertising, file names, sizes and web addresses. Answer '
        'with the caption alone.\n\nDescription: {caption}\nWeb text: {alt_text}')


def fill(prompt: str, *, alt_texts: Sequence[str] = (), caption: str = '') -> str:
  """`prompt` with {alt_text} (all of them, one after another) and {caption} filled in; other braces stay."""
  # The caption goes in last by splitting, so that nothing in the texts themselves is taken for a place.
  alt_text = join(alt_texts)
  return caption.join(part.replace('{alt_text}', alt_text) for part in prompt.split('{caption}'))


def join(alt_texts: Sequence[str]) -> str:
  """The alt-texts in a row, without empty ones and repetitions."""
  return ' '.join(dict.fromkeys(text.strip() for text in alt_texts if text.strip()))
