"""No framework and no diffusion: two ranks train linear models on their own data and average them after every step.

torchrun --nproc-per-node 2 examples/any_framework.py

The models change a little from step to step, so their changes are cheap to send. The calls are torch.distributed's own.
"""

import torch
import torch.distributed as dist

import compactdist

dist.init_process_group("gloo")
group = compactdist.wrap(codec="int4")
truth = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
torch.manual_seed(dist.get_rank() + 1)  # every rank has data of its own
x = torch.randn(1024, 256)
y = x @ truth + 0.1 * torch.randn(1024, 64)

model = torch.zeros(256, 64)
models = [torch.empty_like(model) for _ in range(dist.get_world_size())]
for _ in range(100):
    model -= 0.5 * x.T @ (x @ model - y) / len(x)
    with group.step():
        dist.all_gather(models, model, group=group)  # every rank gets the same bytes, so all compute the same average
    model = torch.stack(models).mean(0)

if dist.get_rank() == 0:
    print(group.explain())
    print(f"relative error of the model: {(model - truth).norm() / truth.norm():.1e}")
group.close()
dist.destroy_process_group()
