"""Tensor-parallel inference: two ranks hold half of every layer each, and add up what they computed after each.

torchrun --nproc-per-node 2 examples/tensor_parallel.py

A denoising loop calls the same layers with slowly changing tokens, so the partial sums change little from step to step.
An all-reduce is compressed only where the policy says so, because its error goes into a sum.
"""

import torch
import torch.distributed as dist

import compactdist

LAYERS, WIDTH, HIDDEN, TOKENS, STEPS = 4, 256, 1024, 128, 20

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
group = compactdist.wrap(policy=compactdist.Rule(op="all_reduce", codec="int8"))

torch.manual_seed(0)  # the same weights and tokens on all ranks; each keeps its half of the hidden units
share = slice(rank * HIDDEN // world, (rank + 1) * HIDDEN // world)
up = [torch.randn(WIDTH, HIDDEN)[:, share] / WIDTH**0.5 for _ in range(LAYERS)]
down = [torch.randn(HIDDEN, WIDTH)[share] / HIDDEN**0.5 for _ in range(LAYERS)]
tokens, drift = torch.randn(TOKENS, WIDTH), torch.randn(TOKENS, WIDTH)


def model(x, group):
    """Each layer: the first matrix by columns, the second by rows, and one all-reduce."""
    for first, second in zip(up, down, strict=True):
        part = torch.nn.functional.gelu(x @ first) @ second
        dist.all_reduce(part, group=group)
        x = x + part
    return x


for step in range(STEPS):
    x = tokens + step / STEPS * drift
    with group.step():
        y = model(x, group)
exact = model(x, group.inner)

if rank == 0:
    print(group.explain())
    print(f"relative error of the last step: {(y - exact).norm() / exact.norm():.1e}")
group.close()
dist.destroy_process_group()
