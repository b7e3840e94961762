"""What all methods of a wrapped group share: deciding, counting, and making works."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from compactdist.codecs import Codec
from compactdist.errors import ClosedGroupError
from compactdist.exchange.context import AutogradRule, Call, Context
from compactdist.exchange.work import PendingWork
from compactdist.observe.stats import PassReason

__all__ = ["GroupCore", "nbytes_of", "override"]

F = TypeVar("F", bound=Callable[..., Any])


def override(method: F) -> F:
    """A method torch calls. Dynamo must not trace into it: it crashes on the pybind object (torch 2.13)."""
    return torch.compiler.disable(method)  # type: ignore[no-any-return]


def nbytes_of(tensors: Sequence[Tensor]) -> int:
    """Bytes of some tensors."""
    return tensors[0].nbytes if len(tensors) == 1 else sum(t.nbytes for t in tensors)


class GroupCore:
    """State and helpers of :class:`~compactdist.group.CompressedProcessGroup`; its mixins build on this.

    Attributes:
        inner: the group that was wrapped.
    """

    inner: Any
    _ctx: Context
    _closed: bool

    def _warn_no_step(self, op: str) -> None:
        raise AssertionError("provided by the life cycle")

    def _ready(self) -> None:
        if self._closed:
            raise ClosedGroupError(
                f"{self._ctx.label}: the wrapped group was closed; wrap the inner group again, or use it as it is"
            )

    def _pass(self, op: str, reason: str, nbytes: float) -> None:
        """Count a call that goes to the inner group."""
        self._ready()
        stats = self._ctx.stats
        stats.passed(op, reason, nbytes)
        if reason == PassReason.NO_STEP and stats.first_time(reason):
            self._warn_no_step(op)

    def _begin(
        self, op: str, site: str, tensor: Tensor, nbytes: float, autograd: AutogradRule = "tensor"
    ) -> Call | None:
        """Fix the key of a call, or count it as passed through with ``nbytes`` on the link."""
        self._ready()
        reason = self._ctx.refusal(tensor, autograd)
        if reason is not None:
            self._pass(op, reason, nbytes)
            return None
        return Call(self._ctx.keys.take(site), op, tensor.dtype)

    def _codec(self, call: Call, numel: int, nbytes: float) -> Codec | None:
        """The codec for a call of one message, or count it as passed through."""
        chosen = self._ctx.choose(call, numel)
        if isinstance(chosen, str):
            self._ctx.stats.passed(call.op, chosen, nbytes, None if chosen == PassReason.SMALL else call.key.name)
            return None
        return chosen

    def _work(self, jobs: Sequence[Any], result: list[Tensor]) -> PendingWork:
        return PendingWork(jobs, result, self._ctx.future_pool)

    def _undo(self, call: Call) -> None:
        self._ctx.keys.give_back(call.key)
