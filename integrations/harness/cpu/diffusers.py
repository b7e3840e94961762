"""Let diffusers' context parallelism (0.42) run on a CPU with gloo.

diffusers expects an accelerator in two places: `enable_parallelism` counts devices, and ring attention needs a kernel
that returns the log-sum-exp. `install()` replaces both functions from outside. Where CUDA is available, it does
nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_MARK = "_compactdist_cpu"


def install() -> None:
    """Make `enable_parallelism` and ring attention work on CPU tensors. Calling it again does nothing."""
    if torch.cuda.is_available():
        return
    from diffusers.models import attention_dispatch

    # enable_parallelism() computes `rank % torch.accelerator.device_count()`, and a CPU counts as no device.
    if torch.accelerator.device_count() == 0:
        torch.accelerator.device_count = lambda: 1
    # The native backend, the only one for CPU tensors, returns no log-sum-exp.
    attention_dispatch._native_attention_forward_op = with_lse(attention_dispatch._native_attention_forward_op)


def with_lse(native: Callable[..., Any]) -> Callable[..., Any]:
    """Native attention as diffusers defines it, with the log-sum-exp where the caller asks for it."""
    if hasattr(native, _MARK):
        return native

    def attention(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        return_lse: bool = False,
        *rest: Any,
        **options: Any,
    ) -> Any:
        """Query, key, value `(B, S, H, D)` -> output `(B, S, H, D)`; with `return_lse` also log-sum-exp `(B, S, H)`."""
        if not return_lse:
            arguments = (query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, return_lse)
            return native(ctx, *arguments, *rest, **options)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            # This kernel adds its mask to the scores.
            attn_mask = torch.zeros(attn_mask.shape, dtype=query.dtype).masked_fill(~attn_mask, float("-inf"))
        heads_first = [x.permute(0, 2, 1, 3) for x in (query, key, value)]
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *heads_first, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )
        return out.permute(0, 2, 1, 3), lse.permute(0, 2, 1)

    setattr(attention, _MARK, True)
    return attention
