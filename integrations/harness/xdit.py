"""The tiny pipelines and the digits model under xDiT. On a CPU call `compactdist_harness.cpu.xdit.install()` first."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import torch

from compactdist_harness import digits, tiny
from compactdist_harness.cpu import xdit as xdit_on_cpu

# Of these pipelines xfuser has no wrapper: it replaces the transformer of a diffusers pipeline.
_TRANSFORMERS = {
    "wan": ("transformer_wan", "xFuserWanTransformer3DWrapper"),
    "qwenimage": ("transformer_qwen", "xFuserQwenImageTransformerWrapper"),
    "hunyuanvideo": ("transformer_hunyuan_video", "xFuserHunyuanVideoTransformer3DWrapper"),
}


def parallel_tiny(model: str, *, steps: int = 8, batch: int = 1, **degrees: Any) -> tuple[Any, dict[str, Any]]:
    """A tiny pipeline as xDiT runs it, and the arguments to call it with.

    Args:
        model: one of `compactdist_harness.tiny.MODELS`.
        steps: denoising steps.
        batch: prompts of a call.
        degrees: fields of `xFuserArgs`: `ring_degree`, `ulysses_degree`, `pipefusion_parallel_degree`,
            `num_pipeline_patch`, `use_cfg_parallel`, `warmup_steps`.
    """
    return tiny_under(engine("tiny", steps, **degrees), model, steps=steps, batch=batch)


def tiny_under(engine_config: Any, model: str, *, steps: int = 8, batch: int = 1) -> tuple[Any, dict[str, Any]]:
    """A tiny pipeline as xDiT runs it under `engine_config`, and the arguments to call it with."""
    pipe, call_kwargs = tiny.build(model, steps=steps, batch=batch)
    if model not in _TRANSFORMERS:
        return wrapped(pipe, engine_config), call_kwargs
    from xfuser.core.distributed import initialize_runtime_state

    module, name = _TRANSFORMERS[model]
    wrapper = getattr(importlib.import_module(f"xfuser.model_executor.models.transformers.{module}"), name)
    transformer = wrapper.from_config(pipe.transformer.config)
    transformer.load_state_dict(pipe.transformer.state_dict())
    pipe.transformer = transformer.eval().requires_grad_(False)
    initialize_runtime_state(pipe, engine_config)
    return pipe, call_kwargs


def parallel_digits(route: str, steps: int, checkpoint: Path | None = None) -> tuple[Any, dict[str, Any]]:
    """The digits pipeline as xDiT runs it on all ranks of this process, on a CPU, and the arguments to call it with.

    Args:
        route: `"ring"`, `"ulysses"`, or `"pipefusion"` with as many patches as ranks and one synchronous step.
        steps: denoising steps.
        checkpoint: of the digits model; `None`: the one in this package.
    """
    os.environ.setdefault("LOG_LEVEL", "error")  # read by xfuser at import; it logs at debug level otherwise
    xdit_on_cpu.install()
    ranks = int(os.environ["WORLD_SIZE"])
    degrees: dict[str, Any] = {
        "ring": {"ring_degree": ranks},
        "ulysses": {"ulysses_degree": ranks},
        "pipefusion": {"pipefusion_parallel_degree": ranks, "num_pipeline_patch": ranks, "warmup_steps": 1},
    }[route]
    engine_config = engine("digits", steps, **degrees)
    pipe, call_kwargs = digits.load_digits_pipeline(checkpoint, steps=steps)
    return wrapped(pipe, engine_config), call_kwargs


def engine(name: str, steps: int, **degrees: Any) -> Any:
    """xfuser's engine configuration in float32, made along with its groups.

    Args:
        name: of the model, for xfuser's records.
        steps: denoising steps.
        degrees: fields of `xFuserArgs`, as for `parallel_tiny`.
    """
    from xfuser import xFuserArgs

    # Ring attention needs a kernel that returns the log-sum-exp.
    backend = "SDPA_FLASH" if degrees.get("ring_degree", 1) > 1 else "SDPA"
    arguments = xFuserArgs(model=name, attention_backend=backend, num_inference_steps=steps, **degrees)
    engine_config, _ = arguments.create_config()
    engine_config.runtime_config.dtype = torch.float32
    return engine_config


def wrapped(pipe: Any, engine_config: Any) -> Any:
    """xfuser's pipeline around a diffusers pipeline."""
    from xfuser.model_executor.pipelines.register import xFuserPipelineWrapperRegister

    return xFuserPipelineWrapperRegister.get_class(pipe)(pipeline=pipe, engine_config=engine_config)
