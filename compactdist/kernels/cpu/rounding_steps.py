"""What rounds tensors to eight bits and back: tensors to blocks for the loops of ``rounding.py``."""

from __future__ import annotations

from torch import Tensor

from compactdist.kernels.cpu import call
from compactdist.kernels.cpu.call import Work
from compactdist.kernels.cpu.native import address_of
from compactdist.kernels.cpu.products import expected_slots, run_alone
from compactdist.kernels.cpu.simd.sixteen import COUNT
from compactdist.kernels.cpu.steps import DTYPES, loops_for, second_term
from compactdist.kernels.cpu.terms import write_sum
from compactdist.kernels.spec import ROUNDED_BLOCK, Rounded, Term, Velocity

__all__ = ["dequantize", "quantize"]


def quantize(values: Tensor | Velocity, codes: Tensor, scales: Tensor, accepted: Tensor | None = None) -> None:
    """See ``kernels.Rounding``; ``values`` are of a dtype of ``DTYPES``."""
    if accepted is not None and not accepted[0]:
        return
    loop, given = "quantize", dict[int, int]()
    exact: Term | Velocity = values
    if isinstance(values, Velocity):
        kept, (_, _, factor) = values.previous, second_term(values)
        assert isinstance(kept, Rounded)
        loop, given, exact = "quantize_velocity", expected_slots((kept,)) | {call.FACTOR: factor}, values.base
    assert isinstance(exact, Tensor)
    exact = exact.contiguous()
    made = {call.X: exact.data_ptr(), call.CODES: codes.data_ptr(), call.SECOND_SCALES: scales.data_ptr()}
    _run(loop, exact, codes, made | given)


def dequantize(codes: Tensor, scales: Tensor, out: Tensor) -> None:
    """See ``kernels.Rounding``; ``out`` is of a dtype of ``DTYPES``."""
    write_sum((Rounded(codes, scales, out.dtype),), out)


def _run(loop: str, exact: Tensor, codes: Tensor, given: dict[int, int]) -> None:
    body = address_of(f"rounding.{loop}", DTYPES[exact.dtype], loops_for(codes))
    parts = -(-exact.numel() // (COUNT * ROUNDED_BLOCK))
    run_alone(Work(parts, exact.numel(), body), {call.NUMEL: exact.numel(), **given})
