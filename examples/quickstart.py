"""Two ranks exchange slowly changing activations, compressed.

torchrun --nproc-per-node 2 examples/quickstart.py
"""

import sys

import torch
import torch.distributed

import compactdist

torch.distributed.init_process_group("gloo")
torch.manual_seed(torch.distributed.get_rank())

with compactdist.wrap(codec="int2", sample_errors_every=1) as dist:
    kv = torch.randn(512, 256)
    gathered = torch.empty(dist.get_world_size() * 512, 256)
    for _ in range(20):
        kv += 0.05 * torch.randn_like(kv)  # one denoising step changes the activations a little
        with dist.step():
            dist.all_gather_into_tensor(gathered, kv)
            dist.all_reduce(kv.mean())  # not compressed, and counted
    if dist.get_rank() == 0:
        sys.stdout.write(dist.explain() + "\n")

torch.distributed.destroy_process_group()
