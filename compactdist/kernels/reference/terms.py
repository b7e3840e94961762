"""Terms of a prediction as tensors, by torch's operations: a velocity, ``spec.Velocity``, and any other."""

from __future__ import annotations

import torch
from torch import Tensor

from compactdist.kernels.reference.rounding import dequantize
from compactdist.kernels.spec import MovingTerm, Velocity

__all__ = ["restored", "write_out"]

_CPU_PART = 1 << 17


def write_out(term: Velocity, out: Tensor) -> None:
    """Write a velocity to ``out``, ``[numel]`` of its dtype, which may be ``previous``."""
    base, previous = restored(term.base), restored(term.previous)
    limit, coefficient = torch.finfo(term.dtype).max, term.coefficient
    step = _CPU_PART if out.is_cpu else max(1, out.numel())  # what the caches hold between the steps
    with torch.inference_mode():  # an ``out`` made in this mode can be written to in this mode only
        for start in range(0, out.numel(), step):
            part = slice(start, start + step)
            # two roundings on every device: nothing is contracted
            change = (base[part].float() - previous[part].float()).clamp_(-limit, limit).mul_(coefficient)
            out[part] = torch.where(coefficient == 0, -0.0, change) if isinstance(coefficient, Tensor) else change


def restored(term: MovingTerm) -> Tensor:
    """The term as a tensor, flat ``[numel]`` of its dtype; a tensor as it is."""
    if isinstance(term, Tensor):
        return term
    out = torch.empty(term.numel(), dtype=term.dtype, device=term.device)
    if isinstance(term, Velocity):
        write_out(term, out)
    else:
        dequantize(term.codes, term.scales, out)
    return out
