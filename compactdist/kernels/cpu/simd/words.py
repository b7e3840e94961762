"""Sixty-four words of 32 bits as one value, weighed and added up for a checksum; compiled by Numba.

Products of two words are added in 64 bits, in the lanes of two words: those of even words, then those of odd ones.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from compactdist.kernels.cpu.simd.jit import intrinsic, types
from compactdist.kernels.cpu.simd.vectors import INTS, Vector, full, one_of_all, part, spread
from compactdist.kernels.reference import LANES
from compactdist.kernels.spec import CHECKSUM_WEIGHT

_COUNT = 16
"""Words for whose weights and sums there are lanes: a value is gone through in parts of so many."""

_i32, _i64 = ir.IntType(32), ir.IntType(64)
_MASK32 = (1 << 32) - 1
WEIGHTS = Vector("weights", _i32, _COUNT)
SUMS = Vector("sums", _i64, _COUNT // 2)


@intrinsic
def no_sums(typing_context: Any) -> Any:
    """Sums of nothing."""
    return SUMS(), lambda context, builder, sig, arguments: full(0, SUMS)


@intrinsic
def weights_from(typing_context: Any, at: Any) -> Any:
    """The weights of the first words from position ``at`` on."""

    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        ahead = ir.Constant(WEIGHTS.of, [(2 * n + 1) * CHECKSUM_WEIGHT & _MASK32 for n in range(_COUNT)])
        start = builder.mul(builder.trunc(arguments[0], _i32), ir.Constant(_i32, 2 * CHECKSUM_WEIGHT & _MASK32))
        return builder.add(spread(builder, start, WEIGHTS), ahead)

    return WEIGHTS(types.int64), build


def _further(builder: Any, weights: Any, words: int) -> Any:
    return builder.add(weights, full(2 * words * CHECKSUM_WEIGHT & _MASK32, WEIGHTS))


@intrinsic
def next_weights(typing_context: Any, weights: Any) -> Any:
    """The weights of the first words after sixty-four."""
    return WEIGHTS(WEIGHTS), lambda context, builder, sig, arguments: _further(builder, arguments[0], LANES)


@intrinsic
def weighed(typing_context: Any, sums: Any, words: Any, weights: Any) -> Any:
    """Sums with sixty-four words added, each times its weight."""

    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        sums, words, weights = arguments
        low, half = full(_MASK32, SUMS), full(32, SUMS)
        for at in range(0, LANES, _COUNT):
            some = builder.bitcast(part(builder, words, range(at, at + _COUNT)), SUMS.of)
            by = builder.bitcast(_further(builder, weights, at), SUMS.of)
            # of lanes below 2**32 this is the one multiplication in 64 bits that vector units are quick at
            sums = builder.add(sums, builder.mul(builder.and_(some, low), builder.and_(by, low)))
            sums = builder.add(sums, builder.mul(builder.lshr(some, half), builder.lshr(by, half)))
        return sums

    return SUMS(SUMS, INTS, WEIGHTS), build


@intrinsic
def all_of(typing_context: Any, sums: Any) -> Any:
    """The sum of all lanes."""

    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        return one_of_all(builder, arguments[0], builder.add)

    return types.uint64(SUMS), build
