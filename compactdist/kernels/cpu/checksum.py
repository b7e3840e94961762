"""The checksum of bytes, see ``reference/checksum.py``: a sum of words on threads, compiled by Numba.

Bytes may be copied on the way. Loops that write codes add up those of each row, or of a few blocks, while these are in
the nearest cache.
"""

from __future__ import annotations

from typing import Any

from compactdist.kernels.cpu import call
from compactdist.kernels.cpu.simd.elements import Pointer
from compactdist.kernels.cpu.simd.jit import inlined
from compactdist.kernels.cpu.simd.memory import load, load_first, prefetch, settle_streams, store, store_first, stream
from compactdist.kernels.cpu.simd.slots import add_to, next_part, run, words_at
from compactdist.kernels.cpu.simd.words import all_of, next_weights, no_sums, weighed, weights_from
from compactdist.kernels.reference import LANES

__all__ = ["add_rest", "sum_all", "sum_between", "sum_runs"]

_RUN = call.RUN
_PAYLOAD, _OUT, _WORDS, _SUM, _FIRST_PASS = call.PAYLOAD, call.OUT, call.WORDS, call.SUM, call.FIRST_PASS
_CODES_NBYTES, _TOTAL_NBYTES = call.CODES_NBYTES, call.TOTAL_NBYTES

_AHEAD = 2048
"""Words between those that are added and those that are asked for."""


@inlined
def sum_between(sums: Any, words: Pointer, start: int, end: int) -> Any:
    """Sums with the words from ``start`` to ``end`` added."""
    whole, weights = start + (end - start) // LANES * LANES, weights_from(start)
    for n in range(start, whole, LANES):
        sums, weights = weighed(sums, load(words, n), weights), next_weights(weights)
    return weighed(sums, load_first(words, whole, end - whole), weights) if whole < end else sums


@inlined
def add_rest(args: Any) -> None:
    """Add what follows the codes of a payload to the block's sum."""
    first, end = args[_CODES_NBYTES] >> 2, args[_TOTAL_NBYTES] >> 2
    add_to(args, _SUM, all_of(sum_between(no_sums(), words_at(args, _PAYLOAD), first, end)))


@inlined
def _sum_places(sums: Any, words: Pointer, start: int, end: int) -> Any:
    """Sums with words from ``start`` on added, from four places at a time, and where those begin that are left.

    A processor asks for what follows each place it reads from, and does not get all of memory's speed from one.
    """
    each = (end - start) // (4 * LANES) * LANES
    second, third, fourth = each, 2 * each, 3 * each
    a, b = weights_from(start), weights_from(start + second)
    c, d = weights_from(start + third), weights_from(start + fourth)
    for n in range(start, start + each, LANES):
        sums, a = weighed(sums, load(words, n), a), next_weights(a)
        sums, b = weighed(sums, load(words, n + second), b), next_weights(b)
        sums, c = weighed(sums, load(words, n + third), c), next_weights(c)
        sums, d = weighed(sums, load(words, n + fourth), d), next_weights(d)
    return sums, start + 4 * each


def sum_runs(copies: bool, streams: bool) -> Any:
    """A work over runs of words: adds their weighted sum to the block's.

    ``copies``: and writes them to ``out``; ``streams``: past the caches, from the beginning of a cache line on.
    """

    def body(args: Any) -> int:
        words, out, count, sums = words_at(args, _PAYLOAD), words_at(args, _OUT), args[_WORDS], no_sums()
        lo, hi = next_part(args, _FIRST_PASS)
        while lo < hi:
            start, end = lo * _RUN, min(hi * _RUN, count)
            whole = end // LANES * LANES
            if not copies:  # a copy keeps memory busy by itself
                sums, start = _sum_places(sums, words, start, whole)
            weights = weights_from(start)
            for n in range(start, whole, LANES):
                prefetch(words, n + _AHEAD)
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
