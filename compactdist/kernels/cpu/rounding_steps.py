"""What rounds tensors to eight bits and back: tensors to blocks for the loops of ``rounding.py``."""

from __future__ import annotations

from torch import Tensor

from compactdist.kernels.cpu import call
from compactdist.kernels.cpu.call import Work
from compactdist.kernels.cpu.native import address_of
from compactdist.kernels.cpu.products import run_alone
from compactdist.kernels.cpu.simd.sixteen import COUNT
from compactdist.kernels.cpu.steps import CACHE_LINE, DTYPES, STREAMED_NBYTES, loops_for
from compactdist.kernels.spec import ROUNDED_BLOCK

__all__ = ["dequantize", "quantize"]


def quantize(values: Tensor, codes: Tensor, scales: Tensor, accepted: Tensor | None = None) -> None:
    """See ``kernels.Rounding``; ``values`` are of a dtype of ``DTYPES``."""
    if accepted is not None and not accepted[0]:
        return
    values = values.contiguous()
    _run("quantize", values, codes, scales, {call.X: values.data_ptr(), call.CODES: codes.data_ptr()})


def dequantize(codes: Tensor, scales: Tensor, out: Tensor) -> None:
    """See ``kernels.Rounding``; ``out`` is of a dtype of ``DTYPES``."""
    streams = out.nbytes >= STREAMED_NBYTES and out.data_ptr() % CACHE_LINE == 0
    given = {call.X: out.data_ptr(), call.OUT: out.data_ptr(), call.OUT_STREAMS: int(streams)}
    _run("dequantize", out, codes, scales, {**given, call.BASE: codes.data_ptr()})


def _run(loop: str, exact: Tensor, codes: Tensor, scales: Tensor, given: dict[int, int]) -> None:
    body = address_of(f"rounding.{loop}", DTYPES[exact.dtype], loops_for(codes))
    slots = {call.NUMEL: exact.numel(), call.VELOCITY: scales.data_ptr(), **given}
    run_alone(Work(-(-exact.numel() // (COUNT * ROUNDED_BLOCK)), exact.numel(), body), slots)
