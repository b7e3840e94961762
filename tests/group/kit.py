"""What the tests of the wrapped group share: spies on its methods, counts of what it did, and data every rank knows."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import compactdist
from compactdist import _torch
from compactdist.exchange.link import Link

NUMEL = 512

METHODS = (
    "allgather",
    "all_gather_single",
    "_allgather_base",
    "all_gather_single_coalesced",
    "allgather_into_tensor_coalesced",
    "allgather_coalesced",
    "alltoall",
    "all_to_all_single",
    "alltoall_base",
    "broadcast",
    "allreduce",
    "allreduce_coalesced",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_single",
    "_reduce_scatter_base",
    "reduce_scatter_single_coalesced",
    "reduce_scatter_tensor_coalesced",
    "gather",
    "scatter",
    "barrier",
    "monitored_barrier",
    "send",
    "recv",
    "recv_anysource",
    "recvAnysource",
    "gather_single",
    "_start_coalescing",
    "_end_coalescing",
)
"""ProcessGroup's methods, old names and new."""

BEFORE_2_12, BEFORE_2_13 = _torch.VERSION < (2, 12), _torch.VERSION < (2, 13)

OLDER_NAMES = {
    "all_gather_single": "_allgather_base",
    "all_gather_single_coalesced": "allgather_into_tensor_coalesced",
    "all_to_all_single": "alltoall_base",
    "reduce_scatter_single": "_reduce_scatter_base",
    "reduce_scatter_single_coalesced": "reduce_scatter_tensor_coalesced",
}
"""Which method torch 2.11 and 2.12 call where 2.13 calls another."""

# What torch itself, or plain gloo, does otherwise in older versions. Wrapped groups do the same in all of them.

GLOO_HAS_ALL_TO_ALL = not BEFORE_2_12
"""Whether plain gloo has all_to_all of lists."""

COALESCES_ASYNCHRONOUSLY = frozenset({"all_gather_single_coalesced"} if BEFORE_2_12 else ())
"""Calls of a coalescing manager that reach the group without options, hence as asynchronous ones."""

PIPELINES_OPEN_LINKS = BEFORE_2_13
"""Whether a pipeline sends a message of one element between neighbours before the first of its first step."""


def reached(*names: str) -> tuple[str, ...]:
    """Methods of ProcessGroup as this torch calls them, by their names in torch 2.13."""
    return tuple(OLDER_NAMES.get(name, name) for name in names) if BEFORE_2_13 else names


def since(major: int, minor: int, what: str) -> Any:
    """Mark a test of something that earlier versions of torch lack."""
    reason = f"torch {torch.__version__} has no {what}"
    return pytest.mark.skipif((major, minor) > _torch.VERSION, reason=reason)


@dataclass
class Seen:
    """What one piece of code did to a group.

    Attributes:
        reached: ProcessGroup methods, in order.
        compressed: calls that went through a codec.
        passed: (operation, reason) -> calls that did not.
        value: what the code returned.
        error: ``Type: first line`` of what it raised.
    """

    reached: list[str] = field(default_factory=list)
    compressed: int = 0
    passed: dict[tuple[str, str], int] = field(default_factory=dict)
    value: Any = None
    error: str = ""


class Watch:
    """Spies on a group; call it with a piece of code to see what that did."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self._reached: list[str] = []
        for name in METHODS:
            setattr(group, name, self._spy(name, getattr(group, name)))

    def _spy(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def spy(*args: Any, **kwargs: Any) -> Any:
            self._reached.append(name)
            return method(*args, **kwargs)

        return spy

    def __call__(self, code: Callable[[], Any]) -> Seen:
        seen = Seen()
        self._reached.clear()
        with Counted(self.group) as counted:
            try:
                seen.value = code()
            except Exception as error:
                seen.error = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        seen.reached = list(self._reached)
        seen.compressed, seen.passed = counted.compressed, counted.passed
        return seen


class Counted:
    """``with Counted(group) as counted: ...``: what the group's statistics say of the calls inside."""

    compressed: int
    passed: dict[tuple[str, str], int]

    def __init__(self, group: Any) -> None:
        self._group = group

    def _passed(self) -> dict[tuple[str, str], int]:
        return {what: calls for what, (calls, _) in self._group._engine.stats.passed_table().items()}

    def __enter__(self) -> Counted:
        self._before = self._group.stats().compressed_calls, self._passed()
        return self

    def __exit__(self, *exc: object) -> None:
        compressed, passed = self._before
        self.compressed = self._group.stats().compressed_calls - compressed
        now = self._passed()
        self.passed = {what: n - passed.get(what, 0) for what, n in now.items() if n != passed.get(what, 0)}


def data(rank: int, numel: int = NUMEL, seed: int = 0) -> Tensor:
    """The tensor a rank sends: another one for every rank and seed, known to all ranks."""
    return torch.randn(numel, generator=torch.Generator().manual_seed(1000 * seed + rank))


def gathered(size: int, numel: int = NUMEL, seed: int = 0) -> Tensor:
    """What an all-gather of ``data`` gives."""
    return torch.cat([data(rank, numel, seed) for rank in range(size)])


def exchanged(rank: int, size: int, numel: int = NUMEL, seed: int = 0) -> Tensor:
    """What an all-to-all of ``data`` gives to ``rank``."""
    return torch.cat([data(peer, numel, seed).chunk(size)[rank] for peer in range(size)])


def close(a: Tensor, b: Tensor) -> bool:
    """Equal up to what int8 residuals leave; NaN is never close."""
    return a.shape == b.shape and bool((a.float() - b.float()).abs().max() < 0.1)


def replace_inner(group: compactdist.CompressedProcessGroup, inner: Any) -> None:
    """Let a wrapped group send on another one."""
    group._inner = inner
    group._engine.link = Link(inner)


def told(level: int) -> list[str]:
    """A list to which this process adds what compactdist logs from now on, of this level and above."""
    lines: list[str] = []
    handler = logging.Handler(level)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("compactdist").addHandler(handler)
    return lines
