"""Which plans of collectives all ranks have agreed on, and what has to be agreed on before a call.

A plan is agreed on when its site is first met, and when anything about it changes that the last frame has not
announced. After a reset and at the end of the warm-up, one agreement covers all sites that were agreed on before: what
their frames are then follows from epoch and step, which it compares.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any, NamedTuple

from compactdist.exchange.plan import Call, CallPlan, Incoming, Part
from compactdist.group.agreement import PASSES, Subject
from compactdist.observe.stats import PassReason
from compactdist.state.site_key import without_request
from compactdist.wire import MASK64, hash64

__all__ = ["AgreedPlans", "publishes"]

MOST_CHANGES = 8
"""A site whose tensors change more often than that between two resets passes through until the next one."""


class _Token(NamedTuple):
    """What stays the same about a site's plan between two agreements.

    Attributes:
        tensor, coding: equal on all ranks.
        own: the policy's answers for the chunks of this rank, where a change of them is seen by all ranks; and what was
            evicted for the site's history, and how often the site itself.
    """

    tensor: str
    coding: str
    own: str = ""


class AgreedPlans:
    """The plans that ranks have agreed on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[str, _Token] = {}
        self._digest = 0
        self._epoch = 0
        self._stages: set[tuple[str, bool]] = set()
        self._tensors_epoch = 0
        self._tensors: dict[str, str] = {}
        self._changes: Counter[str] = Counter()

    def varies(self, call: Call, plan: CallPlan) -> bool:
        """Note the tensor of a call with a new plan; whether the site's have changed too often since the last reset.

        This goes by the order of calls, which is the same on all ranks, not by when ranks agree on them.
        """
        if plan.by_pair:
            return False
        site, tensor = without_request(call.site)[1], _token(plan, "").tensor
        with self._lock:
            if call.epoch != self._tensors_epoch:
                self._tensors_epoch = call.epoch
                self._tensors.clear()
                self._changes.clear()
            self._changes[site] += self._tensors.get(site, tensor) != tensor
            self._tensors[site] = tensor
            return self._changes[site] > MOST_CHANGES

    def changes(self) -> tuple[dict[str, str], Counter[str]]:
        """Copies of the last tensor of each site, and of how often that has changed since the last reset."""
        with self._lock:
            return dict(self._tensors), self._changes.copy()

    def go_on_from(self, changes: tuple[dict[str, str], Counter[str]], epoch: int) -> None:
        """Count on from what :meth:`changes` gave, in another epoch."""
        tensors, counts = changes
        with self._lock:
            self._tensors_epoch, self._tensors, self._changes = epoch, dict(tensors), counts.copy()

    def passes(self, call: Call) -> bool:
        """Whether the site is unknown, or known to pass through."""
        known = self._known.get(without_request(call.site)[1])
        return known is None or known.tensor == PASSES

    def subject(self, call: Call, plan: CallPlan | None, reason: str = "") -> Subject | None:
        """What must be agreed on before a call; ``None``: nothing.

        Args:
            call: the call.
            plan: its plan; ``None`` for a call that passes through for ``reason``.
            reason: why it passes through.
        """
        request, site = without_request(call.site)
        token = _token(plan, reason)
        with self._lock:
            self._begin(call.epoch)
            new_stage = (request, call.warm) not in self._stages
            if not new_stage and self._known.get(site) == token:
                return None
            facts = {"epoch": call.epoch, "step": call.step, "site": call.site, "op": call.op}
            facts |= {"tensor": token.tensor, "codec": token.coding}
            if plan is not None and (plan.evicts or plan.evictions):
                facts["evictions"] = _evictions(plan)
            if new_stage:
                facts["known sites"] = f"{len(self._known)} ({self._digest:016x})"
        return Subject(call.epoch, facts, [] if plan is None else _pairs(plan))

    def agreed(self, call: Call, plan: CallPlan | None, reason: str = "") -> None:
        """All ranks have agreed on the subject of this call."""
        request, site = without_request(call.site)
        token = _token(plan, reason)
        with self._lock:
            self._begin(call.epoch)
            self._stages.add((request, call.warm))
            before = self._known.get(site)
            if before == token:
                return
            if before is not None:
                self._digest = self._digest - _hash(site, before) & MASK64
            self._known[site] = token
            self._digest = self._digest + _hash(site, token) & MASK64

    def end_request(self, prefix: str) -> None:
        """A request has ended."""
        with self._lock:
            self._stages = {stage for stage in self._stages if stage[0] != prefix}

    def _begin(self, epoch: int) -> None:
        if epoch != self._epoch:
            self._epoch = epoch
            self._stages.clear()


def _token(plan: CallPlan | None, reason: str) -> _Token:
    if plan is not None and plan.by_pair:
        # a rank sees its own chunks only: others would not come to agree on a change of their sizes
        answers = {repr(answer) for answer in plan.answers} if plan.alike else set()
        own = ", ".join(sorted(answers)) + _evictions(plan)
        return _Token(f"chunks of {plan.dtype}", "by pair", own)
    if plan is None or plan.reason is not None:
        return _Token(PASSES, reason or str(plan.reason if plan is not None else ""))
    numel = plan.signature[0]
    part = plan.parts[0]
    parts = f" in parts of {', '.join(map(str, plan.cuts))}" if plan.cuts else ""
    mode = ", answered with its prediction" if plan.predicts else ""
    return _Token(f"{numel} x {plan.dtype}{parts}", _coding(part) + mode, _evictions(plan))


def _evictions(plan: CallPlan) -> str:
    """What was evicted for a plan's history, and how often its site was; empty for neither."""
    return f"{plan.evictions} of it, and of {', '.join(plan.evicts) or 'no other'}" * bool(
        plan.evicts or plan.evictions
    )


def _coding(part: Part[Any]) -> str:
    hint = "" if part.hint is None else f", as {part.hint.shape} (hint {part.hint.hint:08x})"
    return f"{part.codec!r}{hint}"


def _pairs(plan: CallPlan) -> list[tuple[str, str]]:
    """By rank, what this rank sends to it and expects of it, where pairs of ranks know what others do not."""
    if not plan.by_pair:
        return []
    pairs = [["", ""] for _ in range(len(plan.outgoing) + 1)]
    for part in plan.parts:
        pairs[part.peer][isinstance(part, Incoming)] = f"{part.numel} x {plan.dtype} ({_coding(part)})"
    return [(sent, expected) for sent, expected in pairs]


def _hash(site: str, token: _Token) -> int:
    return hash64(site, token.tensor, token.coding)


def publishes(reason: PassReason) -> bool:
    """Whether ranks must agree that a call passes through for this reason: not where each of them can see it."""
    return reason not in _SEEN_BY_ALL


_SEEN_BY_ALL: frozenset[PassReason] = frozenset(
    (
        PassReason.OP,
        PassReason.UNASKED,
        PassReason.DTYPE,
        PassReason.NO_STEP,
        PassReason.SMALL,
        PassReason.WORLD_SIZE,
        PassReason.UNEVEN,
    )
)
