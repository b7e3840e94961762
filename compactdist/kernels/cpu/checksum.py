"""The checksum of bytes, compiled by Numba; see ``reference/checksum.py``."""

from __future__ import annotations

import ctypes
import threading

import torch
from torch import Tensor

from compactdist.kernels.cpu import call
from compactdist.kernels.cpu.call import RUN, Work
from compactdist.kernels.cpu.native import address_of
from compactdist.kernels.threads import team

__all__ = ["weighted_sum"]

_PAYLOAD, _WORDS, _THREADS, _FIRST_PASS = call.PAYLOAD, call.WORDS, call.THREADS, call.FIRST_PASS
_RUNS, _ELEMENTS = _FIRST_PASS + call.COUNT, _FIRST_PASS + call.WORK_ELEMENTS
_Entry = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_void_p)


class _Block(threading.local):
    """A block for each thread."""

    def __init__(self) -> None:
        team.prepare()
        self._memory = torch.zeros(call.SIZE, dtype=torch.int64)
        self.slots = self._memory.numpy()
        self.address = self._memory.data_ptr()
        self.run = _Entry(address_of("words.sum_all"))
        self.slots[call.TEAM] = team.address
        self.slots[_FIRST_PASS : _FIRST_PASS + 8] = Work(0, 0, address_of("words.sum_runs")).slots()


_block = _Block()


def weighted_sum(data: Tensor) -> int:
    """As the reference; ``data`` is contiguous, on the CPU, a whole number of words, and begins with a whole word."""
    words, block = data.numel() >> 2, _block
    slots = block.slots
    slots[_PAYLOAD], slots[_WORDS], slots[_THREADS] = data.data_ptr(), words, torch.get_num_threads()
    slots[_RUNS], slots[_ELEMENTS] = -(-words // RUN), words
    return block.run(block.address)
