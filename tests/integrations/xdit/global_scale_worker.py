"""Ulysses with int4 twice: with the adapter's layout, and with one scale for the whole stacked q/k/v buffer.

Started by test_global_scale.py; writes both errors to the file given.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import compactdist
from compactdist_harness.demo_worker import METHODS, UNCOMPRESSED, run
from compactdist_harness.digits import STEPS
from compactdist_harness.xdit import parallel_digits

torch.set_num_threads(1)
pipe, call_kwargs = parallel_digits("ulysses", STEPS)
reference, _ = run(pipe, call_kwargs, METHODS[UNCOMPRESSED])
one_scale = compactdist.Layout("(n) -> 1 1 n")  # one row, so one scale for all
errors = {}
for name, options in {
    "layout": {"codec": "int4"},
    "global": {"codec": "int4", "layouts": {"*": one_scale}},
}.items():
    latents, _ = run(pipe, call_kwargs, options)
    if latents is not None and reference is not None:
        errors[name] = float((latents - reference).norm() / reference.norm())
if errors:
    Path(sys.argv[1]).write_text(json.dumps(errors))
dist.barrier()
dist.destroy_process_group()
