"""Makes label_cost.md: GPU-hours and money for a million labelled images on one node, every assumption shown.

  python docs/results/label_cost.py [--chip h100 --gpus 8 --price 3.00 --cpus 96 --cpu-ms 30]
    [--detector-rate IMAGES/S] [--captioner-rate IMAGES/S] [--llm-rate IMAGES/S] [--write]

An estimate from FLOPs and bytes until rates are measured: give those of one GPU (`docs/results/detector.py` measures
the detector's; a serving engine says its own), and what follows is worked out again. --write updates the page.
"""
import argparse
import dataclasses
import pathlib

import result_page

from cloc_jax import hardware

HERE = pathlib.Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Transformer:
  """Shape of an encoder or decoder. gated: the MLP has three matrices instead of two (Llama)."""
  layers: int
  width: int
  mlp: int
  gated: bool = False

  @property
  def weights(self) -> float:
    """Of the matrices: four of attention, and the MLP's."""
    return self.layers * (4 * self.width**2 + (3 if self.gated else 2) * self.width * self.mlp)

  def flops(self, tokens: int) -> float:
    """Of one sequence: 2 a weight and token, and 4·n²·d a layer for attention (all pairs are computed)."""
    return 2 * self.weights * tokens + 4 * self.layers * tokens**2 * self.width


# OWLv2 L/14 (CLIP L/14 towers), LLaVA-1.5 7B (CLIP L/14 at 336 px without its last layer; Vicuna 7B).
VISION = Transformer(24, 1024, 4096)
OWL_TEXT = Transformer(12, 768, 3072)
LLAVA_VISION = Transformer(23, 1024, 4096)
LLAMA_7B = Transformer(32, 4096, 11008, gated=True)
VOCABULARY = 32_000


@dataclasses.dataclass(frozen=True)
class Assumptions:
  """What the estimate rests on; the page shows all.

  detector_utilisation, prefill_utilisation: share of the dense bf16 peak. decode_bandwidth: share of the memory's.
  caption_tokens, prompt_tokens, llm_prompt_tokens: of an answer; of the text before it; of what the fusing model reads.
  sequences: captions that are written at once. image_size, queries: of the detector; no query is shared by two images.
  cpus, cpu_ms: of the node; of one core for everything of ours an image. cpu_share: that is kept busy.
  """
  gpus: int = 8
  price: float = 3.0
  cpus: int = 96
  cpu_ms: float = 30.0
  cpu_share: float = 0.7
  image_size: int = 448
  queries: int = 12
  detector_utilisation: float = 0.4
  prefill_utilisation: float = 0.5
  decode_bandwidth: float = 0.6
  image_tokens: int = 576
  prompt_tokens: int = 80
  caption_tokens: int = 100
  llm_prompt_tokens: int = 250
  sequences: int = 64


def detector_flops(given: Assumptions) -> float:
  """Of an image: the tower on its patches and class token, the two heads on patches, the text tower on each query."""
  patches = (given.image_size // 14)**2
  embed = 2 * patches * 14 * 14 * 3 * VISION.width
  box_head = 2 * patches * (2 * VISION.width**2 + 4 * VISION.width)
  class_head = 2 * patches * (VISION.width * OWL_TEXT.width + 2 * VISION.width + given.queries * OWL_TEXT.width)
  texts = given.queries * (OWL_TEXT.flops(16) + 2 * OWL_TEXT.width**2)
  return VISION.flops(patches + 1) + embed + box_head + class_head + texts


def prefill_flops(given: Assumptions, *, image: bool) -> float:
  """Of what a 7B model reads before it answers: the image through LLaVA's tower and projector, or a text alone."""
  if not image:
    return LLAMA_7B.flops(given.llm_prompt_tokens)
  projector = 2 * given.image_tokens * (1024 * LLAMA_7B.width + LLAMA_7B.width**2)
  return (LLAVA_VISION.flops(given.image_tokens + 1) + projector
          + LLAMA_7B.flops(given.image_tokens + given.prompt_tokens))


def decode_seconds(given: Assumptions, chip: hardware.Chip, *, image: bool) -> float:
  """Of an answer, its share of a batch: each step reads all weights once, and keys and values of every sequence."""
  before = given.image_tokens + given.prompt_tokens if image else given.llm_prompt_tokens
  weights = 2 * (LLAMA_7B.weights + VOCABULARY * LLAMA_7B.width)
  keys_and_values = 2 * 2 * LLAMA_7B.layers * LLAMA_7B.width * (before + given.caption_tokens / 2)
  step = (weights + given.sequences * keys_and_values) / (chip.hbm_bandwidth * given.decode_bandwidth)
  return given.caption_tokens * step / given.sequences


def rates(given: Assumptions, chip: hardware.Chip) -> dict[str, float]:
  """Images a second of one GPU that does nothing else, by model."""
  answer = lambda image: (prefill_flops(given, image=image) / (chip.flops * given.prefill_utilisation)
                          + decode_seconds(given, chip, image=image))
  return {'detector': chip.flops * given.detector_utilisation / detector_flops(given), 'captioner': 1 / answer(True),
          'llm': 1 / answer(False)}


@dataclasses.dataclass(frozen=True)
class Cost:
  """Of a million images. images_per_second: of the node. gpus: model → how many it gets. bound: by what it is held."""
  images_per_second: float
  gpus: dict[str, float]
  node_hours: float
  gpu_hours: float
  money: float
  bound: str


def cost(given: Assumptions, one_gpu: dict[str, float], models: tuple[str, ...]) -> Cost:
  """GPUs are shared out so that all models keep step (in whole GPUs over several nodes), and the CPUs feed them."""
  seconds = sum(1 / one_gpu[model] for model in models)
  by_gpu, by_cpu = given.gpus / seconds, given.cpus * given.cpu_share / (given.cpu_ms / 1000)
  rate = min(by_gpu, by_cpu)
  hours = 1e6 / rate / 3600
  return Cost(rate, {model: given.gpus / one_gpu[model] / seconds for model in models}, hours, hours * given.gpus,
              hours * given.gpus * given.price, 'GPUs' if by_gpu <= by_cpu else 'CPUs')


CASES = {'new captions': ('captioner', 'detector'),
         'new captions, fused with alt-texts': ('captioner', 'llm', 'detector'),
         'captions from the cache, or alt-texts': ('detector',)}


def page(given: Assumptions, chip: hardware.Chip, one_gpu: dict[str, float], measured: set[str]) -> str:
  """The table, and under it what it rests on."""
  rows = ['| a million images | images/s | GPUs: ' + ', '.join(one_gpu) + ' | GPU-hours | cost | held by |',
          '| --- | ---: | --- | ---: | ---: | --- |']
  for name, models in CASES.items():
    found = cost(given, one_gpu, models)
    shares = ', '.join(f'{found.gpus.get(model, 0):.1f}' for model in one_gpu)
    rows.append(f'| {name} | {found.images_per_second:,.0f} | {shares} | {found.gpu_hours:.1f} | '
                f'${found.money:,.2f} | {found.bound} |')
  flops = {'detector': detector_flops(given), 'captioner': prefill_flops(given, image=True),
           'llm': prefill_flops(given, image=False)}
  models = [f'| {model} | {flops[model] / 1e12:.2f} TFLOP'
            + (f' | {1000 * decode_seconds(given, chip, image=model == "captioner"):.1f} ms' if model != 'detector'
               else ' | –') + f' | {one_gpu[model]:.1f} | {"measured" if model in measured else "estimate"} |'
            for model in one_gpu]
  said = '; '.join(f'{field.name} {getattr(given, field.name):g}' for field in dataclasses.fields(given))
  return '\n'.join([
      f'{given.gpus} × {chip.name.upper()} at ${given.price:.2f} a GPU-hour.', '', *rows, '',
      '| one GPU | FLOPs an image, once | writing an answer | images/s | |', '| --- | --- | --- | ---: | --- |',
      *models, '', f'Chip: {chip.flops / 1e12:g} TFLOP/s dense bf16, {chip.hbm_bandwidth / 1e12:g} TB/s. Assumed: {said}. '
      'Made by `python docs/results/label_cost.py --write`.'])


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  chips = {chip.name: chip for chip in hardware.CHIPS if chip.hbm_bandwidth}
  parser.add_argument('--chip', choices=sorted(chips), default='h100')
  for field in dataclasses.fields(Assumptions):
    parser.add_argument(f'--{field.name.replace("_", "-")}', type=type(field.default), default=field.default)
  for model in ('detector', 'captioner', 'llm'):
    parser.add_argument(f'--{model}-rate', type=float, metavar='IMAGES/S', help='measured, of one GPU')
  parser.add_argument('--write', action='store_true', help='put the table into label_cost.md')
  args = parser.parse_args()
  given = Assumptions(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Assumptions)})
  one_gpu = rates(given, chips[args.chip])
  measured = {model for model in one_gpu if getattr(args, f'{model}_rate')}
  one_gpu |= {model: getattr(args, f'{model}_rate') for model in measured}
  text = page(given, chips[args.chip], one_gpu, measured)
  print(text)
  if args.write:
    result_page.write_table(HERE / 'label_cost.md', text)


if __name__ == '__main__':
  main()
