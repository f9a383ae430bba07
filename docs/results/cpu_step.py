"""Makes cpu_step.md: the training step on a CPU beside PyTorch's and beside what the machine can do.

  pip install torch transformers && GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python docs/results/cpu_step.py

CLIP of the same shapes, forward, backward and AdamW, float32, in one process and turn by turn: this project's step and that
of transformers' CLIPModel. Beside them the rate of a 4096³ float32 matrix product of XLA's, in the same turns. Read the ratios;
the images/s are one machine's.
"""
import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import result_page

from cloc_jax import compiler, optim, sharding, train_step
from cloc_jax.batch import Batch
from cloc_jax.models import cloc, flops

# On one core, the processor time of this process alone: other processes then disturb less.
clock = time.process_time if len(os.sched_getaffinity(0)) == 1 else time.perf_counter
HERE = pathlib.Path(__file__).parent
VOCABULARY, LENGTH, REGION_LENGTH = 49_408, 32, 16
# name: (image side, patch, width, depth, heads, batch), text tower (width, depth, heads)
SHAPES = {
    'B/32': ((224, 32, 768, 12, 12, 16), (512, 12, 8)),
    'S/16': ((224, 16, 384, 12, 6, 16), (384, 12, 6)),
    'width 192 × 6, 64 px': ((64, 8, 192, 6, 3, 128), (192, 6, 3)),
}


def inputs(side, batch, length):
  rng = np.random.default_rng(0)
  text = rng.integers(3, VOCABULARY - 3, (batch, length)).astype(np.int32)
  text[:, -1] = VOCABULARY - 1
  return rng.integers(0, 256, (batch, side, side, 3)).astype(np.uint8), text


def ours(image_shape, text_shape, *, region_encoder='none', regions=1, pool='prompt', length=LENGTH):
  """(a function that makes one step and waits for it, its model FLOPs)."""
  side, patch, width, depth, heads, batch = image_shape
  t_width, t_depth, t_heads = text_shape
  settings = dict(act='quick_gelu', unroll=12)
  model = cloc.Cloc(
      image=dict(variant=f'B/{patch}', width=width, depth=depth, heads=heads, **settings),
      text=dict(vocab_size=VOCABULARY, variant='B', width=t_width, depth=t_depth, heads=t_heads, max_length=length,
                eos_id=VOCABULARY - 1, **settings), embed_dim=512, region_encoder=region_encoder,
      prompter=dict(pool=pool) if region_encoder == 'prompter' else {})
  pixels, text = inputs(side, batch, length)
  _, region_text = inputs(8, batch * regions, REGION_LENGTH)
  boxes = np.tile(np.float32([0.1, 0.2, 0.6, 0.7]), (batch, regions, 1))
  example = Batch(image=pixels, image_mask=np.ones(batch, bool), text=text, boxes=boxes,
                  region_text=region_text.reshape(batch, regions, REGION_LENGTH), region_mask=np.ones((batch, regions), bool))
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  tx, rate = optim.make(total_steps=100_000, warmup_steps=10, learning_rate=1e-4)
  init = train_step.initializer(model, tx, example)
  shardings = train_step.state_sharding(train_step.abstract_state(init), mesh=mesh, rules=[('.*', 'replicate')])
  state = train_step.init_state(init, shardings=shardings, seed=0)
  step = train_step.jit_train_step(mesh=mesh, shardings=shardings, model=model, tx=tx, rate=rate,
                                   loss=dict(filter_threshold=0.9))
  held = [state]

  def run():
    held[0], metrics = step(held[0], sharding.to_global(example, mesh))
    jax.block_until_ready(metrics)

  work = flops.step_flops(model, image_size=side, text_length=length, region_text_length=REGION_LENGTH, regions=regions,
                          batch_size=batch)
  return run, work.train * batch


def pytorch(image_shape, text_shape, *, bf16):
  import torch
  import transformers
  side, patch, width, depth, heads, batch = image_shape
  t_width, t_depth, t_heads = text_shape
  common = dict(hidden_act='quick_gelu', projection_dim=512)
  config = transformers.CLIPConfig(
      text_config=dict(vocab_size=VOCABULARY, hidden_size=t_width, intermediate_size=4 * t_width, num_hidden_layers=t_depth,
                       num_attention_heads=t_heads, max_position_embeddings=LENGTH, eos_token_id=VOCABULARY - 1, **common),
      vision_config=dict(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=depth, num_attention_heads=heads,
                         image_size=side, patch_size=patch, **common), projection_dim=512)
  model = transformers.CLIPModel(config)
  model.train()
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.2, betas=(0.9, 0.98))
  pixels, text = inputs(side, batch, LENGTH)
  pixels = torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1)
  text = torch.from_numpy(text.astype(np.int64))

  def run():
    with torch.autocast('cpu', torch.bfloat16, enabled=bf16):
      loss = model(input_ids=text, pixel_values=pixels, return_loss=True).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

  return run


def product() -> None:
  """A large float32 matrix product, 4096³."""
  if not hasattr(product, 'run'):
    product.matrix = jnp.ones((4096, 4096))
    product.run = jax.jit(lambda x: x @ x, compiler_options=compiler.options())
  product.run(product.matrix).block_until_ready()


def peak_rate() -> float:
  """FLOP/s of that product."""
  product()
  began = clock()
  product()
  return 2 * 4096**3 / (clock() - began)


def turns(functions: dict, *, rounds: int) -> dict[str, float]:
  """Median seconds of each, all of them in every round."""
  seconds = {name: [] for name in functions}
  for function in functions.values():
    function()
  for _ in range(rounds):
    for name, function in functions.items():
      began = clock()
      function()
      seconds[name].append(clock() - began)
  return {name: statistics.median(values) for name, values in seconds.items()}


def measure(name: str, *, rounds: int) -> dict:
  image_shape, text_shape = SHAPES[name]
  step, work = ours(image_shape, text_shape)
  found = turns({'ours': step, 'torch float32': pytorch(image_shape, text_shape, bf16=False),
                 'torch bfloat16': pytorch(image_shape, text_shape, bf16=True), 'peak': product}, rounds=rounds)
  peak = 2 * 4096**3 / found.pop('peak')
  return dict(batch=image_shape[-1], seconds=found, of_peak=work / found['ours'] / peak, peak=peak)


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--case', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.case:
    print(json.dumps(measure(args.case, rounds=args.rounds)))
    return 0
  results = {}
  for name in SHAPES:  # each in a process of its own: what an earlier one leaves in memory slows the next
    done = subprocess.run([sys.executable, __file__, '--rounds', str(args.rounds), '--case', name],
                          stdout=subprocess.PIPE, text=True, check=True)
    results[name] = json.loads(done.stdout.splitlines()[-1])
    print(name, results[name], flush=True)
  write(results)
  return 0


def write(results) -> None:
  import torch
  import transformers
  lines = ['| | images/s | of peak sgemm | PyTorch float32 | ours / it | PyTorch bfloat16 | ours / it |',
           '| --- | --- | --- | --- | --- | --- | --- |']
  for name, r in results.items():
    rate = {k: r['batch'] / v for k, v in r['seconds'].items()}
    lines.append(f'| {name}, batch {r["batch"]} | {rate["ours"]:.1f} | {100 * r["of_peak"]:.0f} % | {rate["torch float32"]:.1f} | '
                 f'{rate["ours"] / rate["torch float32"]:.2f} × | {rate["torch bfloat16"]:.1f} | '
                 f'{rate["ours"] / rate["torch bfloat16"]:.2f} × |')
  cores = len(os.sched_getaffinity(0))
  note = (f'Forward, backward and AdamW, captions of {LENGTH} tokens; ours in float32. Medians, turn by turn in one process on '
          f'{cores} core{"s" * (cores > 1)} ({platform.machine()}); jax {jax.__version__}, torch {torch.__version__}, transformers '
          f'{transformers.__version__}. Made by `python docs/results/cpu_step.py`.')
  result_page.write_table(HERE / 'cpu_step.md', f'{note}\n\n' + '\n'.join(lines))
  (HERE / 'cpu_step.json').write_text(json.dumps(results, indent=1) + '\n')


if __name__ == '__main__':
  sys.exit(main())
