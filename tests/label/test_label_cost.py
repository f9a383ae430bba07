"""docs/results/label_cost.py: its FLOPs against PyTorch's own count of the real shapes, its arithmetic by hand."""
import importlib.util
import pathlib
import sys

import pytest

from cloc_jax import hardware

FOLDER = pathlib.Path(__file__).resolve().parents[2] / 'docs' / 'results'


@pytest.fixture(name='label_cost', scope='module')
def label_cost_fixture():
  sys.path.insert(0, str(FOLDER))  # scripts there import each other
  try:
    spec = importlib.util.spec_from_file_location('label_cost', FOLDER / 'label_cost.py')
    module = sys.modules['label_cost'] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
  finally:
    sys.path.remove(str(FOLDER))
    sys.modules.pop('label_cost', None)


def counted(run):
  from torch.utils import flop_counter
  with flop_counter.FlopCounterMode(display=False) as mode:
    run()
  return mode.get_total_flops()


def test_the_detector_s_flops_are_those_that_torch_counts(label_cost):
  torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
  text = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
  vision = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=448,
                patch_size=14)
  with torch.device('meta'), torch.inference_mode():
    model = transformers.Owlv2ForObjectDetection(
        transformers.Owlv2Config(text_config=text, vision_config=vision, projection_dim=768)).eval()
    ids = torch.zeros(12, 16, dtype=torch.long)

    def run():
      features = model.image_embedder(pixel_values=torch.zeros(1, 3, 448, 448))[0]
      queries = model.owlv2.get_text_features(input_ids=ids)
      queries = getattr(queries, 'pooler_output', queries)[None]
      model.class_head(features.flatten(1, 2), queries, torch.ones(1, 12, dtype=torch.bool))
      model.box_head(features.flatten(1, 2))
    found = counted(run)
  assert label_cost.detector_flops(label_cost.Assumptions(queries=12)) == pytest.approx(found, rel=0.01)


def test_the_language_model_s_flops_are_those_that_torch_counts(label_cost):
  torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
  with torch.device('meta'), torch.inference_mode():
    model = transformers.LlamaModel(transformers.LlamaConfig()).eval()  # the 7B model's shape
    found = counted(lambda: model(inputs_embeds=torch.zeros(1, 250, 4096)))
  assert label_cost.LLAMA_7B.flops(250) == pytest.approx(found, rel=0.01)


def test_arithmetic(label_cost):
  given = label_cost.Assumptions(gpus=8, price=2.0, cpus=100, cpu_share=0.5, cpu_ms=10)
  # 1/40 + 1/10 s of a GPU an image: 8 GPUs make 64 images/s, a fifth of them detects.
  found = label_cost.cost(given, {'detector': 40, 'captioner': 10, 'llm': 1}, ('captioner', 'detector'))
  assert (found.images_per_second, found.bound) == (pytest.approx(64), 'GPUs')
  assert found.gpus == {'captioner': pytest.approx(6.4), 'detector': pytest.approx(1.6)}
  assert found.gpu_hours == pytest.approx(1e6 / 64 / 3600 * 8) and found.money == pytest.approx(2 * found.gpu_hours)
  # 100 cores, half of them busy, 10 ms an image: 5 000 images/s at most.
  found = label_cost.cost(given, {'detector': 1000}, ('detector',))
  assert (found.images_per_second, found.bound) == (pytest.approx(5000), 'CPUs')


def test_writing_is_held_by_the_memory(label_cost):
  h100, h200 = (next(chip for chip in hardware.CHIPS if chip.name == name) for name in ('h100', 'h200'))
  given = label_cost.Assumptions()
  slow, fast = (label_cost.decode_seconds(given, chip, image=True) for chip in (h100, h200))
  assert slow / fast == pytest.approx(4800 / 3350)
  # By hand: 6.61 G weights of two bytes, and 706 tokens × 512 KiB for each of 64 sequences, at 2.01 TB/s.
  assert slow == pytest.approx(100 / 64 * (13.21e9 + 64 * 706 * 2**19) / 2.01e12, rel=0.005)
