"""The checksum of bytes, a sum of words on threads, and a copy of them on the way; compiled by Numba.

See ``reference/checksum.py``.
"""

from __future__ import annotations

from typing import Any

from compactdist.kernels.cpu import call
from compactdist.kernels.cpu.elements import AHEAD
from compactdist.kernels.cpu.simd.memory import load, load_first, prefetch, settle_streams, store, store_first, stream
from compactdist.kernels.cpu.simd.slots import add_to, next_part, run, words_at
from compactdist.kernels.cpu.simd.words import all_of, next_weights, no_sums, weighed, weights_from
from compactdist.kernels.reference import LANES

__all__ = ["sum_all", "sum_runs"]

_RUN = call.RUN
_PAYLOAD, _OUT, _WORDS, _SUM, _FIRST_PASS = call.PAYLOAD, call.OUT, call.WORDS, call.SUM, call.FIRST_PASS


def sum_runs(copies: bool, streams: bool) -> Any:
    """A work over runs of words: adds their weighted sum to the block's.

    ``copies``: and writes them to ``out``; ``streams``: past the caches, from the beginning of a cache line on.
    """

    def body(args: Any) -> int:
        words, out, count, sums = words_at(args, _PAYLOAD), words_at(args, _OUT), args[_WORDS], no_sums()
        lo, hi = next_part(args, _FIRST_PASS)
        while lo < hi:
            start, end = lo * _RUN, min(hi * _RUN, count)
            whole, weights = end // LANES * LANES, weights_from(start)
            for n in range(start, whole, LANES):
                prefetch(words, n + AHEAD)
                some = load(words, n)
                if streams:
                    stream(some, out, n)
                elif copies:
                    store(some, out, n)
                sums, weights = weighed(sums, some, weights), next_weights(weights)
            if whole < end:
                some = load_first(words, whole, end - whole)
                if copies:
                    store_first(some, out, whole, end - whole)
                sums = weighed(sums, some, weights)
            lo, hi = next_part(args, _FIRST_PASS)
        settle_streams()
        add_to(args, _SUM, all_of(sums))
        return 0

    return body


def sum_all() -> Any:
    """The weighted sum of the block's words."""

    def body(args: Any) -> Any:
        args[_SUM] = 0
        run(args, _FIRST_PASS)
        return args[_SUM]

    return body
