"""The primitives under the codecs. ``reference`` is the definition; faster twins must give the same bytes.

``cpu`` holds fused steps for CPU tensors, compiled by Numba when first used; ``gpu`` those for CUDA tensors, compiled
by Triton. They are taken wherever they apply, and leave every byte as it is: which kernels ran is invisible but for the
time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Literal

import torch

__all__ = ["MIN_ELEMENTS", "cpu_kernels", "fused_kernels", "use"]

MIN_ELEMENTS = 1 << 14
"""Below this the calls into the CPU kernels, and loading them, cost more than they save."""

_log = logging.getLogger("compactdist")
_forced: str | None = None


@contextmanager
def use(kernels: Literal["reference", "cpu", "gpu"]) -> Iterator[None]:
    """Run codecs on these kernels inside the block, in all threads; for tests and for finding faults.

    Args:
        kernels: ``"reference"`` for torch operations only; ``"cpu"`` for the fused steps on CPU tensors at every size;
            ``"gpu"`` for those of Triton, where its interpreter is switched on also on CPU tensors.

    Raises:
        ValueError: There are no kernels of this name.
        RuntimeError: Triton's kernels cannot run here: neither on a GPU nor interpreted.
    """
    global _forced
    if kernels not in ("reference", "cpu", "gpu"):
        raise ValueError(f"kernels are 'reference', 'cpu' or 'gpu', got {kernels!r}")
    if kernels == "gpu":
        _check_gpu()
    before, _forced = _forced, kernels
    try:
        yield
    finally:
        _forced = before


def _check_gpu() -> None:
    kernels = _gpu_kernels()
    if kernels is None:
        raise RuntimeError("Triton cannot be imported, so there are no GPU kernels: pip install triton")
    if not kernels.INTERPRETED and not torch.cuda.is_available():
        raise RuntimeError(
            "there is no GPU here, and Triton's interpreter is off: to run the GPU kernels on CPU tensors, set "
            "TRITON_INTERPRET=1 before Triton is first imported"
        )


def fused_kernels(device: str, numel: int) -> ModuleType | None:
    """The module with fused steps for tensors of this device type and size, or ``None`` for the reference."""
    if _forced == "gpu":
        kernels = _gpu_kernels()
        return kernels if kernels is not None and (device == "cpu") == kernels.INTERPRETED else None
    if device == "cuda":
        return None if _forced is not None else _gpu_kernels()
    return cpu_kernels(numel) if device == "cpu" else None


@cache
def _gpu_kernels() -> ModuleType | None:
    try:
        from compactdist.kernels import gpu
    except ImportError as error:
        _log.info("codecs run on torch operations on the GPU, much slower: Triton cannot be imported (%s)", error)
        return None
    return gpu


def cpu_kernels(numel: int) -> ModuleType | None:
    """The fused CPU kernels, or ``None`` where the reference is to be used for tensors of this size."""
    if _forced == "reference" or (numel < MIN_ELEMENTS and _forced is None):
        return None
    return _cpu_kernels()


@cache
def _cpu_kernels() -> ModuleType | None:
    try:
        from compactdist.kernels import cpu
    except ImportError as error:
        _log.info("codecs run on torch operations, several times slower: Numba cannot be imported (%s)", error)
        return None
    return cpu
