"""A diffusers pipeline over several devices by its own context parallelism, compressed.

torchrun --nproc-per-node 2 examples/diffusers_context_parallel.py --model black-forest-labs/FLUX.1-dev --ulysses 2
torchrun --nproc-per-node 2 examples/diffusers_context_parallel.py --tiny flux --ring 2          # on a CPU

Everything but the two lines with compactdist_diffusers is as in diffusers' documentation. The second command was run on
two CPU ranks; the first needs GPUs and has not been run.
"""

import argparse
import os

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, DiffusionPipeline

import compactdist_diffusers
from compactdist_harness import tiny
from compactdist_harness.cpu import diffusers as diffusers_on_cpu

parser = argparse.ArgumentParser(description="diffusers with compressed context parallelism")
parser.add_argument("--model", default="black-forest-labs/FLUX.1-dev", help="a checkpoint by name, on GPUs")
parser.add_argument("--tiny", choices=tiny.MODELS, help="a tiny random pipeline instead, on CPUs")
parser.add_argument("--prompt", default="A cat holding a sign that says hello world")
parser.add_argument("--steps", type=int, default=8)
parser.add_argument("--ring", type=int, default=1)
parser.add_argument("--ulysses", type=int, default=1)
parser.add_argument("--codec", default="int2")
parser.add_argument("--backend", help="attention backend; ring attention needs one that returns the log-sum-exp")
args = parser.parse_args()

rank = int(os.environ["RANK"])
if args.tiny:
    diffusers_on_cpu.install()
    dist.init_process_group("gloo")
    pipe, call_kwargs = tiny.build(args.tiny, steps=args.steps)
else:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    pipe = DiffusionPipeline.from_pretrained(args.model, torch_dtype=torch.bfloat16).to("cuda")
    call_kwargs = {"prompt": args.prompt, "num_inference_steps": args.steps, "return_dict": False}
    args.backend = args.backend or ("_native_cudnn" if args.ring > 1 else None)

if args.ring * args.ulysses == 1:
    args.ring = dist.get_world_size()
if args.backend:
    pipe.transformer.set_attention_backend(args.backend)
pipe.transformer.enable_parallelism(config=ContextParallelConfig(ring_degree=args.ring, ulysses_degree=args.ulysses))

if not args.tiny:
    call_kwargs["generator"] = torch.Generator().manual_seed(0)
reference = pipe(**call_kwargs)[0] if args.tiny else None

with compactdist_diffusers.enable(pipe, codec=args.codec) as handle:
    result = pipe(**call_kwargs)[0]
    if rank == 0:
        print(handle.explain())

if rank == 0:
    if reference is None:
        result[0].save("picture.png")
    else:
        error = (result - reference).norm() / reference.norm()
        print(f"latents {tuple(result.shape)}, relative error against the uncompressed request: {error:.1e}")
dist.destroy_process_group()
