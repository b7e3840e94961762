"""Scripts that name CUDA, on a machine without: in processes of their own, for the pretence stays for good."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from compactdist_harness.cpu.__main__ import main

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="does nothing where CUDA is available")

SCRIPT = """
import time
import torch
from compactdist_harness.cpu import pretend_cuda

default = torch.default_generator
pretend_cuda.install()
pretend_cuda.install()
assert not torch.cuda.is_available()

# devices, however they are named
cpu = torch.device("cpu")
for device in ("cuda", "cuda:1", torch.device("cuda"), torch.device("cuda:1"), torch.device("cuda", 1),
               torch.device(type="cuda", index=1)):
    made = torch.zeros(2, 3, device=device)
    assert made.device == cpu == made.to(device).device == made.to(device, torch.float16).device
    assert torch.Generator(device=device).device == torch.Generator(device).device == cpu
    assert torch.nn.Linear(2, 2).to(device).weight.device == cpu
assert torch.zeros(1, device="meta").device.type == torch.device("meta").type == "meta"
assert torch.zeros(1).cuda().device == torch.nn.Linear(2, 2).cuda().weight.device == cpu
with torch.device("cuda"):
    assert torch.zeros(1).device == cpu

# generators
drawn = torch.randn(4, generator=torch.Generator("cuda").manual_seed(5), device="cuda")
assert torch.equal(drawn, torch.randn(4, generator=torch.Generator().manual_seed(5)))
assert isinstance(torch.Generator("cuda"), torch.Generator) and isinstance(default, torch.Generator)
assert not isinstance(5, torch.Generator)

# clocks
start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
start.record()
try:
    start.elapsed_time(end)
except RuntimeError as error:
    assert "must be recorded" in str(error)
else:
    raise AssertionError("an event that was never recorded has no time")
time.sleep(0.05)
end.record()
end.synchronize()
torch.cuda.synchronize("cuda:0")
assert end.query() and 45 < start.elapsed_time(end) < 5000

# counters
torch.cuda.set_device("cuda:1")
torch.cuda.reset_peak_memory_stats()
assert torch.cuda.max_memory_allocated("cuda:0") == torch.cuda.memory_allocated() == 0
torch.cuda.empty_cache()

# what it does not pretend
for absent in (torch.cuda.get_device_properties, torch.cuda.current_stream, torch.cuda.Stream):
    try:
        absent()
    except (AssertionError, RuntimeError):
        continue
    raise AssertionError(f"{absent} answered")
print("done")
"""


def run(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error::RuntimeWarning", *words]
    return subprocess.run(command, env=environment, timeout=100, capture_output=True, text=True, check=False)


def test_what_is_pretended() -> None:
    done = run("-c", SCRIPT)
    assert done.stdout == "done\n", done.stderr


def test_nothing_to_run() -> None:
    for words in ([], ["-m"]):
        with pytest.raises(SystemExit, match=r"usage: python -m compactdist_harness\.cpu"):
            main(words)
