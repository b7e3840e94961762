"""Split a loop over as many threads as torch may use.

The compiled loops hold no interpreter lock, so Python threads do. They are those of torch's own OpenMP team where torch
runs on one (Linux wheels do): its workers spin for some milliseconds after every torch operation, and threads of our
own would share the cores with them. Elsewhere, and in a forked child, which OpenMP does not survive, a pool of ours.
Numba's own pools are not used, for they abort in such a child or when two threads call at a time.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["PARALLEL_ELEMENTS", "spread"]

PARALLEL_ELEMENTS = 1 << 16
"""Below this a second thread takes longer to wake than it saves."""

PART_ELEMENTS = 1 << 18
"""Parts are about this large: a thread that starts late or has to wait leaves the rest to the others, and all end at
about the same time.
"""

_Body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_pool: tuple[int, int, ThreadPoolExecutor] | None = None
_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_after_fork)


def spread(work: Callable[[NDArray[np.int64]], None], count: int, elements: int, *, backwards: bool = False) -> None:
    """Run ``work(parts)`` on as many threads as there are; each takes parts of ``range(count)``, see ``next_part`` in
    ``cpu_elements.py``, until all are taken. Raise what one of them raised.

    ``backwards`` begins at the end: it is in a cache still after a loop that went forwards.
    """
    threads = min(torch.get_num_threads(), count) if elements >= PARALLEL_ELEMENTS else 1
    parts = np.array(_parts(count, max(threads, min(count, elements // PART_ELEMENTS)), backwards), np.int64)
    if threads <= 1:
        work(parts)
        return
    team = None if _forked else _openmp()
    if team is None:
        _in_our_pool(work, parts, threads)
    else:
        _in_team(team, work, parts, threads)


@lru_cache(maxsize=64)
def _parts(count: int, parts: int, backwards: bool) -> tuple[int, ...]:
    """How many are taken, none, and the bounds of all in the order they are taken."""
    bounds = [(count * i // parts, count * (i + 1) // parts) for i in range(parts)]
    return 0, *chain.from_iterable(reversed(bounds) if backwards else bounds)


@cache
def _openmp() -> Any:
    """The OpenMP runtime that torch brought along, or ``None``."""
    for path in sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*")):
        try:
            library = ctypes.CDLL(str(path))
            library.GOMP_parallel.argtypes = [_Body, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            library.GOMP_parallel.restype = None
        except (OSError, AttributeError):
            continue
        return library
    return None


def _in_team(team: Any, work: Callable[[NDArray[np.int64]], None], parts: NDArray[np.int64], threads: int) -> None:
    raised: list[BaseException] = []

    def take_parts(_: Any) -> None:
        try:
            work(parts)
        except BaseException as error:  # must not end in a foreign frame; raised below
            raised.append(error)

    team.GOMP_parallel(_Body(take_parts), None, threads, 0)
    if raised:
        raise raised[0]


def _in_our_pool(work: Callable[[NDArray[np.int64]], None], parts: NDArray[np.int64], threads: int) -> None:
    under_way = []
    for _ in range(threads - 1):
        try:
            under_way.append(_threads(threads).submit(work, parts))
        except RuntimeError:  # the interpreter is on its way down and starts no more threads
            break
    work(parts)
    for one in under_way:
        one.result()


def _threads(wanted: int) -> ThreadPoolExecutor:
    """A pool of this process (a forked child needs its own) with at least ``wanted - 1`` threads."""
    global _pool
    if _pool is None or _pool[0] != os.getpid() or _pool[1] < wanted:
        _pool = os.getpid(), wanted, ThreadPoolExecutor(wanted - 1, thread_name_prefix="compactdist-codec")
    return _pool[2]
