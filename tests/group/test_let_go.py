"""A closed group holds nothing of the group it wrapped: its threads end with it."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import contextlib, gc, os, time
import torch, torch.distributed as dist
import compactdist

def threads():
    names = []
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):  # it has ended since it was listed
            names.append(open(f"/proc/self/task/{task}/comm").read().strip())
    return sorted(name for name in names if "gloo" in name)

dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
until = time.monotonic() + 30
while not threads():  # a thread that has just begun has no name of its own yet
    assert time.monotonic() < until
    time.sleep(0.01)
wrapped = compactdist.wrap(codec="int4", min_numel=1)
x, out = torch.randn(4096), torch.empty(4096)
for _ in range(3):
    wrapped.step()
    wrapped.all_gather_into_tensor(out, x)
    wrapped.barrier()
    wrapped.all_reduce(x)
wrapped.close()
dist.destroy_process_group()
gc.collect()
print(threads())
"""


def test_no_thread_of_the_inner_group_is_left():
    """The closed wrapper is still held. After functional collectives, threads stay, on a plain group as well."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip().splitlines()[-1] == "[]", done.stdout + done.stderr
