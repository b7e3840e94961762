"""The primitives under the codecs. ``reference`` is the definition; faster twins must give the same bytes.

``cpu`` holds fused steps for CPU tensors, compiled by Numba when first used. They are taken wherever they apply, and
leave every byte as it is: which kernels ran is invisible but for the time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Literal

__all__ = ["MIN_ELEMENTS", "cpu_kernels", "use"]

MIN_ELEMENTS = 1 << 14
"""Below this the calls into the kernels, and loading them, cost more than they save."""

_log = logging.getLogger("compactdist")
_forced: str | None = None
_missing = False


@contextmanager
def use(kernels: Literal["reference", "cpu"]) -> Iterator[None]:
    """Run codecs on these kernels inside the block, in all threads; for tests and for finding faults.

    Args:
        kernels: ``"reference"`` for torch operations only; ``"cpu"`` for the fused steps at every size.

    Raises:
        ValueError: There are no kernels of this name.
    """
    global _forced
    if kernels not in ("reference", "cpu"):
        raise ValueError(f"kernels are 'reference' or 'cpu', got {kernels!r}")
    before, _forced = _forced, kernels
    try:
        yield
    finally:
        _forced = before


def cpu_kernels(numel: int) -> ModuleType | None:
    """The fused CPU kernels, or ``None`` where the reference is to be used for tensors of this size."""
    global _missing
    if _missing or _forced == "reference" or (numel < MIN_ELEMENTS and _forced is None):
        return None
    try:
        from compactdist.codecs.kernels import cpu
    except ImportError as error:
        _missing = True
        _log.info("codecs run on torch operations, several times slower: Numba cannot be imported (%s)", error)
        return None
    return cpu
