"""Inner groups with planned faults, to test a wrapped group over a link, a peer or a user that misbehaves.

    from compactdist.testing import Fault, inject, remove

    faulty = inject(plain_group, [Fault("flip", "all_gather", nth=2, byte=100)])
    wrapped = compactdist.wrap(faulty)      # every rank calls inject and wrap; each may have a plan of its own
    ...
    assert faulty.hits == [("all_gather", 2, "flip")]
    wrapped.close(); remove(faulty)

A :class:`FaultyGroup` is a registered ProcessGroup that hands every call to a real inner group, and makes the faults
that the plan lists for the n-th call of an operation on this rank.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from compactdist import _torch
from compactdist.errors import CompactDistError, ConfigError
from compactdist.testing.over import METHODS, GroupOver, forwarding

__all__ = ["KINDS", "Fault", "FaultyGroup", "PlannedFaultError", "inject"]

KINDS: dict[str, str] = {
    "raise": "the call raises PlannedFaultError before anything is sent",
    "raise-after": "the call is handed on, then raises PlannedFaultError",
    "flip": "one byte of what this rank sends is flipped; the caller's tensor stays as it is",
    "flip-received": "one byte of what arrives is flipped, before wait returns",
    "drop": "nothing is handed on; the caller gets a work that is done",
    "delay": "the call is handed on after `seconds`",
    "duplicate": "the call is handed on twice",
    "none": "a synchronous call is waited for and returns None, as NCCL's do",
    "fail-wait": "wait raises PlannedFaultError, every time, once the transport is through",
    "interrupt": "the first wait raises KeyboardInterrupt before it waits; later ones wait",
}
"""Kinds of faults, with what happens."""

OPERATIONS = frozenset(op for op, _ in METHODS.values())
_SENDS_A_COPY = frozenset(op for op, argument in METHODS.values() if argument is not None)


class PlannedFaultError(CompactDistError, RuntimeError):
    """Raised by planned faults only."""


@dataclass(frozen=True)
class Fault:
    """One planned fault.

    Attributes:
        kind: one of :data:`KINDS`.
        op: all_gather, all_to_all, broadcast, send, recv, all_reduce, reduce, reduce_scatter, gather, scatter, barrier.
        nth: which call of ``op`` on this rank, from 0; ``None``: every one.
        byte: for the flips: which byte of the first tensor of the call; negative: from its end.
        mask: for the flips: the bits that change.
        seconds: for ``delay``.

    Raises:
        ConfigError: an unknown kind or operation, or a flip of what cannot be flipped.
    """

    kind: str
    op: str
    nth: int | None = 0
    byte: int = 0
    mask: int = 0xFF
    seconds: float = 0.1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"no fault is called {self.kind!r}; there are: {', '.join(KINDS)}")
        if self.op not in OPERATIONS:
            raise ConfigError(f"no operation is called {self.op!r}; there are: {', '.join(sorted(OPERATIONS))}")
        if self.kind == "flip" and self.op not in _SENDS_A_COPY:
            raise ConfigError(f"{self.op} sends from a tensor it also writes to: plan 'flip-received', not 'flip'")
        if self.kind == "flip-received" and self.op in ("send", "barrier"):
            raise ConfigError(f"nothing arrives in a {self.op}: plan 'flip-received' for another operation")
        if not 0 < self.mask < 256:
            raise ConfigError(f"mask {self.mask} flips no bits of a byte; give 1 to 255")

    def meets(self, op: str, call: int) -> bool:
        """Whether the fault is planned for call number ``call`` of ``op``."""
        return self.op == op and self.nth in (None, call)

    def text(self, call: int) -> str:
        """Text of the planned error."""
        return f"planned fault {self.kind!r} in call {call} of {self.op}"


class FaultyWork(_torch.Work):
    """The works of one faulty call, and the faults that happen when they are waited for."""

    def __init__(self, works: Sequence[Any], arrived: Callable[[], None], keep: Any, faults: Sequence[tuple[str, str]]):
        super().__init__()
        self._works = list(works)
        self._arrived = arrived
        self._keep = keep
        self._fails = next((text for kind, text in faults if kind == "fail-wait"), None)
        self._interrupts = any(kind == "interrupt" for kind, _ in faults)
        self._waited = False
        self._lock = threading.RLock()

    @torch.compiler.disable
    def wait(self, timeout: timedelta = _torch.NO_TIMEOUT) -> bool:
        """Wait once for all works, then make the planned faults."""
        with self._lock:
            if self._interrupts:
                self._interrupts = False
                raise KeyboardInterrupt("planned")
            if not self._waited:
                self._waited = True
                for work in self._works:
                    if timeout:
                        work.wait(timeout)
                    else:
                        work.wait()
                self._arrived()
                self._keep = None
            if self._fails is not None:
                raise PlannedFaultError(self._fails)
        return True

    def is_completed(self) -> bool:
        """Whether waiting would not block."""
        return self._waited or all(work.is_completed() for work in self._works)

    def is_success(self) -> bool:
        """Whether the work is complete and will not fail."""
        return self.is_completed() and self._fails is None

    def exception(self) -> BaseException | None:
        """The planned error, once complete."""
        return PlannedFaultError(self._fails) if self._fails is not None and self.is_completed() else None

    def result(self) -> Any:
        """The first work's result."""
        return self._works[0].result() if self._works else []

    def synchronize(self) -> None:
        """Same as ``wait``."""
        self.wait()

    def source_rank(self) -> int:
        """The sender, for a receive from any source."""
        return int(self._works[0]._source_rank())

    _source_rank = source_rank

    def get_future(self) -> Any:
        """A resolved future; this call waits for the works."""
        future: Any = torch.futures.Future()
        try:
            self.wait()
            future.set_result([])
        except BaseException as error:
            future.set_exception(error)
        return future


@forwarding
class FaultyGroup(GroupOver):
    """A registered ProcessGroup over a real one, with planned faults; made by :func:`inject`.

    Attributes:
        inner: the real group.
        plan: the faults.
        calls: how often each operation was called on this rank.
        hits: ``(op, call, kind)`` of the faults that took place, in order.
    """

    def __init__(self, inner: Any, plan: Sequence[Fault], name: str) -> None:
        super().__init__(inner, name)
        self.plan = tuple(plan)
        self.calls: Counter[str] = Counter()
        self.hits: list[tuple[str, int, str]] = []
        self._lock = threading.Lock()
        self._orphans: list[Any] = []

    def __repr__(self) -> str:
        return f"<FaultyGroup '{self._name}' over {self.inner!r}, {len(self.plan)} planned faults>"

    def missed(self) -> list[Fault]:
        """Planned faults that have not taken place."""
        return [
            f
            for f in self.plan
            if not any((f.op, f.kind) == (op, kind) and f.nth in (None, n) for op, n, kind in self.hits)
        ]

    def _call(self, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        op, sent_at = METHODS[name]
        with self._lock:
            call = self.calls[op]
            self.calls[op] += 1
            faults = [f for f in self.plan if f.meets(op, call)]
            self.hits += [(op, call, f.kind) for f in faults]
        method = getattr(self.inner, name)
        if not faults:
            return method(*args, **kwargs)
        by_kind = {f.kind: f for f in faults}
        if "delay" in by_kind:
            time.sleep(by_kind["delay"].seconds)
        if "raise" in by_kind:
            raise PlannedFaultError(by_kind["raise"].text(call))
        if "flip" in by_kind and sent_at is not None:
            if op == "broadcast" and args[1].rootRank != self.rank():
                raise ConfigError(f"rank {self.rank()} receives in this broadcast: plan 'flip-received', not 'flip'")
            args[sent_at] = _flipped_copy(args[sent_at], by_kind["flip"])
        works = [] if "drop" in by_kind else [method(*args, **kwargs) for _ in range(1 + ("duplicate" in by_kind))]
        works = [work for work in works if work is not None]

        def arrived() -> None:
            if "flip-received" in by_kind:
                _flip(_first_tensor(args[0]), by_kind["flip-received"])

        work = FaultyWork(works, arrived, args, [(f.kind, f.text(call)) for f in faults])
        if "raise-after" in by_kind:
            self._orphans.append(work)  # gloo loses a send whose work is collected
            raise PlannedFaultError(by_kind["raise-after"].text(call))
        if "none" in by_kind and _is_synchronous([*args, *kwargs.values()]):
            work.wait()
            return None
        return work


def inject(group: Any, plan: Iterable[Fault | Mapping[str, Any]], name: str | None = None) -> FaultyGroup:
    """Make a group over ``group`` with planned faults.

    Every rank of the group calls this function at the same place; the plans may differ.

    Args:
        group: a registered process group.
        plan: faults, or mappings of their fields (a plan read from JSON).
        name: name of the new group, equal on all ranks. ``None``: a name derived from the group's, so that a second
            injection into one group needs a name.

    Raises:
        ConfigError: a fault that does not exist, or torch.distributed does not know ``group``.
    """
    faults = [fault if isinstance(fault, Fault) else Fault(**fault) for fault in plan]
    return FaultyGroup(group, faults, name or f"faulty:{group.group_name}")


# --- tensors among the arguments of a call


def _first_tensor(values: Any) -> Tensor:
    """The first tensor with elements in a tensor, a list of tensors, or a list of such lists."""
    pending = [values]
    while pending:
        value = pending.pop(0)
        if isinstance(value, Tensor):
            if value.numel():
                return value
        else:
            pending = [*value, *pending]
    raise ConfigError("a flip was planned for a call whose tensors hold no elements")


def _flip(x: Tensor, fault: Fault) -> None:
    """Change a byte in place, whatever the strides."""
    data = x.detach().contiguous().reshape(-1).view(torch.uint8)
    if not -data.numel() <= fault.byte < data.numel():
        raise ConfigError(f"{fault} flips byte {fault.byte} of a tensor of {data.numel()} bytes")
    data[fault.byte] ^= fault.mask
    if data.data_ptr() != x.data_ptr():
        x.detach().copy_(data.view(x.dtype).view(x.shape))


def _flipped_copy(values: Any, fault: Fault) -> Any:
    """The argument with its first tensor replaced by a copy that has a byte flipped."""
    first = _first_tensor(values)
    copy = first.detach().clone()
    _flip(copy, fault)

    def replaced(value: Any) -> Any:
        if isinstance(value, Tensor):
            return copy if value is first else value
        return [replaced(part) for part in value]

    return replaced(values)


def _is_synchronous(args: Sequence[Any]) -> bool:
    return any(getattr(arg, "asyncOp", True) is False for arg in args)
