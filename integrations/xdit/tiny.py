"""Tiny random pipelines under xDiT, for tests and examples; on a CPU call `compactdist_xdit.cpu.install()` first."""

from __future__ import annotations

from typing import Any

import torch

from compactdist_diffusers.tiny import build


def parallel(model: str, *, steps: int = 8, batch: int = 1, **degrees: Any) -> tuple[Any, dict[str, Any]]:
    """The tiny pipeline of `compactdist_diffusers.tiny` as xDiT runs it, and the arguments to call it with.

    Args:
        model: one of `compactdist_diffusers.tiny.MODELS`.
        steps: denoising steps.
        batch: prompts of a call.
        degrees: fields of `xFuserArgs`: `ring_degree`, `ulysses_degree`, `pipefusion_parallel_degree`,
            `num_pipeline_patch`, `use_cfg_parallel`, `warmup_steps`.
    """
    from xfuser import xFuserArgs

    # Ring attention needs a kernel that returns the log-sum-exp.
    backend = "SDPA_FLASH" if degrees.get("ring_degree", 1) > 1 else "SDPA"
    arguments = xFuserArgs(model="tiny", attention_backend=backend, num_inference_steps=steps, **degrees)
    engine_config, _ = arguments.create_config()
    engine_config.runtime_config.dtype = torch.float32
    return wrapped(model, engine_config, steps=steps, batch=batch)


def wrapped(model: str, engine_config: Any, *, steps: int = 8, batch: int = 1) -> tuple[Any, dict[str, Any]]:
    """As `parallel`, with xfuser's engine configuration at hand."""
    from xfuser.core.distributed import initialize_runtime_state
    from xfuser.model_executor.pipelines.register import xFuserPipelineWrapperRegister

    pipe, call_kwargs = build(model, steps=steps, batch=batch)
    if model == "wan":  # no pipeline wrapper: xfuser replaces the transformer of a diffusers pipeline
        from xfuser.model_executor.models.transformers.transformer_wan import xFuserWanTransformer3DWrapper

        transformer = xFuserWanTransformer3DWrapper.from_config(pipe.transformer.config)
        transformer.load_state_dict(pipe.transformer.state_dict())
        pipe.transformer = transformer.eval().requires_grad_(False)
        initialize_runtime_state(pipe, engine_config)
        return pipe, call_kwargs
    return xFuserPipelineWrapperRegister.get_class(pipe)(pipeline=pipe, engine_config=engine_config), call_kwargs
