"""A page as a tree, by the standard library's HTML parser; anything not well-formed fails."""
import html.parser
import re

_VOID = {'meta', 'br', 'img', 'link', 'input', 'hr'}


class Node:
  """tag, attributes, and children: Nodes and texts."""

  def __init__(self, tag, attributes):
    self.tag, self.attributes, self.children = tag, dict(attributes), []

  @property
  def text(self) -> str:
    return ''.join(c if isinstance(c, str) else c.text for c in self.children)

  def all(self, tag=None, *, cls=None) -> list:
    """Nodes below, in order, with this tag and this class among theirs."""
    out = []
    for child in self.children:
      if isinstance(child, Node):
        if tag in (None, child.tag) and (cls is None or cls in child.attributes.get('class', '').split()):
          out.append(child)
        out += child.all(tag, cls=cls)
    return out


class _Parser(html.parser.HTMLParser):

  def __init__(self):
    super().__init__()
    self.root = Node('', ())
    self.open = [self.root]

  def handle_starttag(self, tag, attrs):
    node = Node(tag, attrs)
    self.open[-1].children.append(node)
    if tag not in _VOID:
      self.open.append(node)

  def handle_startendtag(self, tag, attrs):
    self.open[-1].children.append(Node(tag, attrs))

  def handle_endtag(self, tag):
    assert self.open[-1].tag == tag, f'</{tag}> closes <{self.open[-1].tag}> at {self.getpos()}'
    self.open.pop()

  def handle_data(self, data):
    self.open[-1].children.append(data)


def parse(text: str) -> Node:
  parser = _Parser()
  parser.feed(text)
  parser.close()
  assert parser.open == [parser.root], f'never closed: {[n.tag for n in parser.open[1:]]}'
  return parser.root


def assert_stands_alone(text: str):
  """No script, and nothing that a browser would fetch."""
  root = parse(text)
  assert not root.all('script') and not root.all('link') and not root.all('iframe')
  for node in root.all():
    for name in ('src', 'href', 'srcset', 'data', 'action'):
      assert node.attributes.get(name, 'data:').startswith('data:'), (node.tag, node.attributes[name][:80])
  assert not re.search(r'url\(|@import', ''.join(style.text for style in root.all('style')))


def assert_own_direction(text: str):
  """Hebrew stands nowhere but where it is isolated from what surrounds it: bdi, dir=auto, or a picture's own text."""
  found = 0

  def visit(node, isolated):
    nonlocal found
    for child in node.children:
      if isinstance(child, Node):
        visit(child, isolated or child.tag in ('bdi', 'svg', 'title') or child.attributes.get('dir') == 'auto')
      elif re.search('[א-ת]', child):
        assert isolated, f'<{node.tag}> {child!r}'
        found += 1
  visit(parse(text), False)
  assert found
