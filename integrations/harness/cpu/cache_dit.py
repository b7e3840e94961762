"""Let cache-dit's own context parallelism (1.5) run on a CPU with gloo.

Beside what diffusers needs (`cpu.diffusers`), two kernels of cache-dit exist on a GPU only: attention that returns the
log-sum-exp, and the fused merge of a ring's partial outputs, which cache-dit also has in plain torch. `install()`
replaces both from outside. Where CUDA is available, it does nothing.
"""

from __future__ import annotations

from typing import Any

import torch

from compactdist_harness.cpu import diffusers


def install() -> None:
    """Make cache-dit's ring and Ulysses attention work on CPU tensors. Calling it again does nothing."""
    if torch.cuda.is_available():
        return
    diffusers.install()
    from cache_dit.attention.backends import native
    from cache_dit.distributed.core import _templated_ring

    attention: Any = native
    attention._native_attention_forward_op = diffusers.with_lse(attention._native_attention_forward_op)
    _templated_ring.fused_merge_attn_states = None
