"""A team of threads for loops that are compiled: as many as torch may use.

A *team* is a function of the form of ``GOMP_parallel``: it calls a loop on several threads at a time, and returns when
all have. It is that of torch's own OpenMP runtime where torch brings one along (Linux wheels do): its workers spin for
some milliseconds after every torch operation, and threads of our own would share the cores with them. Elsewhere, and
in a forked child, which OpenMP does not survive, it is a pool of ours behind a function of the same form. Numba's own
pools are not used, for they abort in such a child or when two threads call at a time.
"""

from __future__ import annotations

import _thread
import ctypes
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

__all__ = ["team"]

_Loop = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)
_Team = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)


class Team:
    """The team of this process.

    Attributes:
        address: of the function; 0 before :meth:`prepare`.
    """

    __slots__ = ("_function", "_pool", "address")

    def __init__(self) -> None:
        self.address = 0
        self._function: Any = None
        self._pool: tuple[int, ThreadPoolExecutor] | None = None

    def prepare(self) -> None:
        """Find a team, if there is none yet."""
        if not self.address:
            library = _openmp()
            if library is None:
                self.use_pool()
            else:
                self._hold(library.GOMP_parallel)

    def use_pool(self) -> None:
        """From now on, a pool of this process."""
        self._pool = None
        self._hold(_Team(self._in_pool))

    def _hold(self, function: Any) -> None:
        self._function = function
        self.address = ctypes.cast(function, ctypes.c_void_p).value or 0

    def _in_pool(self, loop: int, block: int, threads: int, _: int) -> None:
        """Compiled code calls this, and what it raised would be lost: an interrupt has to wait until all is done."""
        work = _Loop(loop)
        under_way: list[Future[int]] = []
        interrupted = False
        try:
            for _ in range(threads - 1):
                under_way.append(self._threads(threads).submit(work, block))
        except RuntimeError:  # the interpreter is on its way down and starts no more threads
            pass
        except KeyboardInterrupt:
            interrupted = True
        # whoever calls a loop again finds no part left to take
        calls: list[Callable[[], Any]] = [partial(work, block), *(one.result for one in under_way)]
        for finish in calls:
            interrupted |= _to_the_end(finish)
        if interrupted:
            _thread.interrupt_main()

    def _threads(self, wanted: int) -> ThreadPoolExecutor:
        """A pool with at least ``wanted - 1`` threads."""
        if self._pool is None or self._pool[0] < wanted:
            self._pool = wanted, ThreadPoolExecutor(wanted - 1, thread_name_prefix="compactdist-codec")
        return self._pool[1]


def _to_the_end(call: Callable[[], Any]) -> bool:
    """Call until it has returned; whether there was an interrupt."""
    interrupted = False
    while True:
        try:
            call()
            return interrupted
        except KeyboardInterrupt:
            interrupted = True


@cache
def _openmp() -> Any:
    """The OpenMP runtime that torch brought along, or ``None``."""
    for path in sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*")):
        try:
            library = ctypes.CDLL(str(path))
            library.GOMP_parallel  # noqa: B018  an AttributeError if it is another library
        except (OSError, AttributeError):
            continue
        return library
    return None


team = Team()
os.register_at_fork(after_in_child=team.use_pool)
