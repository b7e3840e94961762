"""Let yunchang's attention (0.6.4) run on a CPU with gloo, with `AttnType.TORCH_FLASH`."""

from __future__ import annotations

import torch


def install() -> None:
    """Give yunchang torch's flash attention for CPUs. Does nothing where CUDA is available."""
    if torch.cuda.is_available():
        return
    import yunchang.kernels.attention as kernels

    # AttnType.TORCH_FLASH calls the CUDA kernel of this name; the one for CPUs takes and returns the same.
    kernels._scaled_dot_product_flash_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
