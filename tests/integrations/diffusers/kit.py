"""Tiny diffusers pipelines, context-parallel over gloo ranks. Ranks are forked, so diffusers is imported once, here."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor

from compactdist_harness import tiny
from compactdist_harness.cpu import diffusers as diffusers_on_cpu

# Named once so that the modules behind diffusers' lazy names are loaded before ranks are forked.
PIPELINES = (
    diffusers.FluxPipeline,
    diffusers.WanPipeline,
    diffusers.QwenImagePipeline,
    diffusers.Flux2Pipeline,
    diffusers.LTXPipeline,
)

STEPS = 8


def config(route: str, size: int, **options: Any) -> Any:
    if route == "both":
        return diffusers.ContextParallelConfig(ring_degree=2, ulysses_degree=size // 2, **options)
    return diffusers.ContextParallelConfig(**{f"{route}_degree": size}, **options)


def parallel(model: str, route: str, size: int, *, steps: int = STEPS, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A tiny pipeline whose transformer is parallel over `size` ranks, and the arguments to call it with."""
    diffusers_on_cpu.install()
    pipe, call_kwargs = tiny.build(model, steps=steps)
    pipe.transformer.enable_parallelism(config=config(route, size, **options))
    return pipe, call_kwargs


def relative_error(x: Tensor, reference: Tensor) -> float:
    return float((x - reference).norm() / reference.norm())


def hooks(module: torch.nn.Module) -> int:
    """Forward hooks of both kinds in a module and all its submodules."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def functions() -> dict[str, Any]:
    """What attention is made of in diffusers, by name."""
    from diffusers.models import attention_dispatch

    return {name: value for name, value in vars(attention_dispatch).items() if callable(value)}
