"""Sixteen sums in float64, to which squares of sixty-four float32 are added; compiled by Numba.

Squares are exact, and no difference of two float32 leaves float64. In what order they are added up is no part of what
both ends compute, so a product and a sum may be one instruction.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from compactdist.kernels.cpu.simd.jit import intrinsic, types
from compactdist.kernels.cpu.simd.vectors import FLOATS, HOST, Vector, call, full, one_of_all, part
from compactdist.kernels.reference import LANES

_COUNT = 16

DOUBLES = Vector("doubles", ir.DoubleType(), _COUNT)


def _add_square(builder: Any, sums: Any, value: Any) -> Any:
    if HOST.get("fma", False):
        return call(builder, f"llvm.fma.v{_COUNT}f64", DOUBLES.of, value, value, sums)
    return builder.fadd(sums, builder.fmul(value, value))


def _widened(builder: Any, value: Any, at: int) -> Any:
    return builder.fpext(part(builder, value, range(at, at + _COUNT)), DOUBLES.of)


@intrinsic
def no_squares(typing_context: Any) -> Any:
    """Sums of nothing."""
    return DOUBLES(), lambda context, builder, sig, arguments: full(0.0, DOUBLES)


@intrinsic
def add_squares(typing_context: Any, sums: Any, value: Any) -> Any:
    """Sums with the squares of sixty-four values added."""

    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        sums, value = arguments
        for at in range(0, LANES, _COUNT):
            sums = _add_square(builder, sums, _widened(builder, value, at))
        return sums

    return DOUBLES(DOUBLES, FLOATS), build


@intrinsic
def add_differences(typing_context: Any, sums: Any, one: Any, other: Any) -> Any:
    """Sums with the squares of sixty-four differences added."""

    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        sums, one, other = arguments
        for at in range(0, LANES, _COUNT):
            apart = builder.fsub(_widened(builder, one, at), _widened(builder, other, at))
            sums = _add_square(builder, sums, apart)
        return sums

    return DOUBLES(DOUBLES, FLOATS, FLOATS), build


@intrinsic
def total_of(typing_context: Any, sums: Any) -> Any:
    """The sum of all lanes."""

    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        return one_of_all(builder, arguments[0], builder.fadd)

    return types.float64(DOUBLES), build
