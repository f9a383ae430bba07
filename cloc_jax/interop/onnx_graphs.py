"""A Cloc as ONNX graphs: image tower, text tower, region head, grounding; made from the PyTorch model of hf_cloc.

  image.onnx    pixel_values (B, 3, S, S)               → image_features (B, E), image_tokens (B, N, D)
  text.onnx     input_ids (T, L) int64                  → text_features (T, E)
  regions.onnx  image_tokens, boxes (B, M, 4)           → region_features (B, M, E)
  ground.onnx   image_tokens, text_features (B, M, E)   → boxes (B, M, 4), scores (B, M)
B, T, L and M are free. regions.onnx only with a region branch, ground.onnx only with a Prompter.
"""
import logging
import pathlib
import tempfile
import warnings

import numpy as np

from cloc_jax.interop import exported as exported_lib
from cloc_jax.interop import hf_cloc
from cloc_jax.interop.exported import Probe, Source, Target

_OPSET = 20  # the first with GELU
USE = '''```python
import onnxruntime
image = onnxruntime.InferenceSession('FOLDER/image.onnx')
z, tokens = image.run(None, {'pixel_values': pixel_values})
regions = onnxruntime.InferenceSession('FOLDER/regions.onnx')
z_regions, = regions.run(None, {'image_tokens': tokens, 'boxes': boxes})      # boxes on the canvas, (B, M, 4)
```

`text.onnx` takes `input_ids` (T, L). `ground.onnx`, where there is one, takes `image_tokens` and `text_features`
(B, M, E) and gives boxes and scores. `AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)` makes the inputs
(it needs transformers); `processing_cloc.py` holds the resampling in NumPy for those who want to do without.'''


def write(source: Source, folder: pathlib.Path) -> None:
  """Writes the graphs, the processor and the tokenizer."""
  with tempfile.TemporaryDirectory() as temporary, hf_cloc.quiet():
    hf_cloc.write(source, pathlib.Path(temporary))
    model, _ = hf_cloc.load(temporary)
  _export_all(source, model, folder)
  hf_cloc.copy_code(folder, ('processing_cloc.py',))
  hf_cloc.write_processor(source, folder)


def _export_all(source, model, folder):
  import torch
  dim = torch.export.Dim
  b, m, t = dim('images', min=1, max=4096), dim('regions', min=1, max=4096), dim('texts', min=1, max=65536)
  length = dim('length', min=2, max=source.text.max_length)
  size, n, d = source.image_size, (source.image_size // source.image.sizes().patch)**2, source.image.sizes().width
  e = source.model.embed_dim
  tokens, boxes = torch.randn(2, n, d), torch.tensor([[[0.1, 0.2, 0.6, 0.7]] * 3] * 2)
  if hasattr(model, 'prompter'):
    model.prompter.chunk = None  # a loop over parts of M would fix their number
  export = lambda *args, **kwargs: _export(folder, *args, **kwargs)
  export('image.onnx', lambda x: _image(model, x), {'pixel_values': (torch.randn(2, 3, size, size), {0: b})},
         ['image_features', 'image_tokens'])
  ids = torch.ones(2, min(5, source.text.max_length), dtype=torch.int64)
  export('text.onnx', model.get_text_features, {'input_ids': (ids, {0: t, 1: length})}, ['text_features'])
  if source.model.region_encoder != 'none':
    export('regions.onnx', model.get_region_features,
           {'image_tokens': (tokens, {0: b}), 'boxes': (boxes, {0: b, 1: m})}, ['region_features'])
  if source.model.region_encoder == 'prompter':
    texts = torch.nn.functional.normalize(torch.randn(2, 3, e), dim=-1)
    export('ground.onnx', lambda x, z: tuple(model.ground(x, z).to_tuple()),
           {'image_tokens': (tokens, {0: b}), 'text_features': (texts, {0: b, 1: m})}, ['boxes', 'scores'])


def _image(model, pixel_values):
  found = model(pixel_values=pixel_values)
  return found.image_embeds, found.image_tokens


def _export(folder, name, function, inputs, output_names):
  """inputs: {name: (example, {axis: Dim})}, in the order of the function's arguments."""
  import torch

  class Graph(torch.nn.Module):

    def forward(self, *args):
      return function(*args)

  logging.getLogger('onnxscript').setLevel(logging.ERROR)
  with warnings.catch_warnings(), torch.no_grad():
    warnings.simplefilter('ignore')  # of the exporter, about its own future
    torch.onnx.export(
        Graph().eval(), tuple(example for example, _ in inputs.values()), folder / name, dynamo=True, verbose=False,
        opset_version=_OPSET, input_names=list(inputs), output_names=output_names, external_data=False,
        dynamic_shapes=(tuple(axes for _, axes in inputs.values()),))


def outputs(source: Source, folder: pathlib.Path, probe: Probe) -> dict[str, np.ndarray]:
  """What the graphs say of a probe, by onnxruntime on the CPU; the processor is tested with hf-cloc."""
  import onnxruntime

  def run(name, **inputs):
    session = onnxruntime.InferenceSession(folder / name, providers=['CPUExecutionProvider'])
    return session.run(None, inputs)

  z_image, tokens = run('image.onnx', pixel_values=exported_lib.pixel_values(source, probe.canvases))
  z_text, = run('text.onnx', input_ids=probe.text_ids.astype(np.int64))
  z_phrase, = run('text.onnx', input_ids=probe.phrase_ids.astype(np.int64))
  out = {'image_features': z_image, 'image_tokens': tokens, 'text_features': z_text, 'phrase_features': z_phrase}
  if source.model.region_encoder != 'none':
    out['region_features'], = run('regions.onnx', image_tokens=tokens, boxes=probe.canvas_boxes)
    # Another number of images and regions than the graph was made with.
    one, = run('regions.onnx', image_tokens=tokens[:1], boxes=probe.canvas_boxes[:1, :1])
    out['region_features of one box'] = one
  if source.model.region_encoder == 'prompter':
    z = np.repeat(z_phrase[None], len(tokens), 0)
    out['ground_boxes'], out['ground_scores'] = run('ground.onnx', image_tokens=tokens, text_features=z)
  return out


TARGET = Target(name='onnx', refuse=lambda source: None, write=write, outputs=outputs,
                how='onnxruntime on the CPU, from canvases and token ids', use=USE,
                needs=('torch', 'transformers', 'safetensors', 'onnx', 'onnxscript', 'onnxruntime'))
