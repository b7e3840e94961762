"""The checksum of bytes, a sum of words on threads; compiled by Numba. See ``reference/checksum.py``."""

from __future__ import annotations

from typing import Any

import numpy as np

from compactdist.kernels.cpu import call
from compactdist.kernels.cpu.simd.slots import add_to, next_part, run, words_at
from compactdist.kernels.spec import CHECKSUM_WEIGHT

__all__ = ["sum_all", "sum_runs"]

_RUN = call.RUN
_u64, _at = np.uint64, np.uintp
_PAYLOAD, _WORDS, _SUM, _FIRST_PASS = call.PAYLOAD, call.WORDS, call.SUM, call.FIRST_PASS
_FIRST, _STEP, _LOW = _u64(CHECKSUM_WEIGHT), _u64(2 * CHECKSUM_WEIGHT), _u64((1 << 32) - 1)


def sum_runs() -> Any:
    """A work over runs of words: adds their weighted sum to the block's."""

    def body(args: Any) -> int:
        words, count, total = words_at(args, _PAYLOAD), args[_WORDS], _u64(0)
        lo, hi = next_part(args, _FIRST_PASS)
        while lo < hi:
            for n in range(_u64(lo * _RUN), _u64(min(hi * _RUN, count))):
                # both factors are below 2**32, which is what vector units multiply
                total += _u64(words[_at(n)]) * (_u64(_FIRST + n * _STEP) & _LOW)
            lo, hi = next_part(args, _FIRST_PASS)
        add_to(args, _SUM, total)
        return 0

    return body


def sum_all() -> Any:
    """The weighted sum of the block's words."""

    def body(args: Any) -> Any:
        args[_SUM] = 0
        run(args, _FIRST_PASS)
        return args[_SUM]

    return body
