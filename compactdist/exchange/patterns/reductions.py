"""Sums over ranks as exchanges of compressed parts: a reduce-scatter, and the two legs of an all-reduce.

First leg: every rank sends each other rank that rank's chunk of its tensor, one stream for each pair; the receiver adds
up the chunks of all ranks in float32, in rank order, its own chunk exact. Second leg, of an all-reduce only: every rank
sends its chunk of the sums to all others, one stream for each rank; all ranks, the sender too, take what was decoded,
so that all end with the same bytes.

Both are compressed only where the policy names a codec: their errors go into sums.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from compactdist.exchange.arrivals import Arrival
from compactdist.exchange.engine import Engine, Flight
from compactdist.exchange.patterns.all_gather import AllGather
from compactdist.exchange.patterns.all_to_all import AllToAll
from compactdist.exchange.plan import Call, CallPlan, Incoming
from compactdist.observe.stats import PassReason
from compactdist.policy import Answer
from compactdist.wire import flags_of

__all__ = ["ALL_REDUCE", "ALL_REDUCE_SUMS", "REDUCE_SCATTER", "add_in_rank_order"]


def add_in_rank_order(parts: Sequence[Tensor], *, mean: bool) -> Tensor:
    """The sum (or the mean) of one tensor from each rank, added up in float32 in the order of the list; float32."""
    total = parts[0].float().clone() if parts[0].dtype == torch.float32 else parts[0].float()
    for part in parts[1:]:
        total += part
    return total.div_(len(parts)) if mean else total


def _where_asked(answers: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(PassReason.UNASKED if _names_no_codec(answer) else answer for answer in answers)


def _names_no_codec(answer: Any) -> bool:
    return answer is None or (isinstance(answer, Answer) and answer.codec is None)


class ReduceScatter(AllToAll):
    """The first leg: one chunk to and from every other rank. Signature: that of :class:`AllToAll`."""

    op = "reduce_scatter"

    def arrival(self, engine: Engine, flight: Flight) -> Arrival | None:
        return None  # no rank sends on what it received

    def remember(self, engine: Engine, flight: Flight, part: Incoming, target: Tensor, frame: Tensor) -> None:
        pass

    def answers(self, engine: Engine, call: Call, signature: tuple[Any, ...]) -> tuple[Any, ...]:
        return _where_asked(super().answers(engine, call, signature))

    def plan(self, engine: Engine, call: Call, signature: tuple[Any, ...]) -> CallPlan:
        plan = super().plan(engine, call, signature)
        # a passed-through reduction is another collective than an exchange of chunks, so all ranks must decide alike:
        # by the policy's answers for all pairs, not for their own
        chooser, ranks, numel = engine.chooser, range(engine.size), signature[1][engine.rank]
        reasons: set[PassReason] = set()
        for pair in permutations(ranks, 2):
            info = chooser.info(call, plan.dtype, numel, *pair)
            chosen = chooser.choose(info, _where_asked((chooser.ask(info),))[0])
            if isinstance(chosen, PassReason):
                reasons.add(chosen)
            else:
                plan.reason = None
                return plan
        plan.reason = min(reasons)
        return plan


class AllReduce(ReduceScatter):
    """The first leg of an all-reduce."""

    op = "all_reduce"

    @staticmethod
    def histories(size: int) -> tuple[int, int, int]:
        return 2 * (size - 1), size, 2 * (size - 1)


class AllReduceSums(AllGather):
    """The second leg of an all-reduce: chunks of the sums."""

    op = "all_reduce"
    divides = False

    def answers(self, engine: Engine, call: Call, signature: tuple[Any, ...]) -> tuple[Any, ...]:
        return _where_asked(super().answers(engine, call, signature))

    def plan(self, engine: Engine, call: Call, signature: tuple[Any, ...]) -> CallPlan:
        plan = super().plan(engine, call, signature)
        plan.want_value = True
        plan.shares_own = False  # the output is the caller's input, which stays as it is until the sums are there
        return plan

    def keep_own(self, engine: Engine, flight: Flight) -> None:
        staged = flight.staged[0]
        if flight.failure is None and staged is not None:
            flight.own_value = staged.value  # every rank takes what the others decode, whatever ``local`` says
            if staged.on_device and staged.value is not None:
                # others get NaN where the device has found that the sums are not finite
                held = flags_of(staged.frame) == staged.header.flags
                flight.own_value = torch.where(held, staged.value, math.nan)


REDUCE_SCATTER, ALL_REDUCE, ALL_REDUCE_SUMS = ReduceScatter(), AllReduce(), AllReduceSums()
