"""Every planned fault is seen by a wrapped group over the faulty one, and by nobody who is not meant to see it."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

import compactdist
from compactdist import _torch
from compactdist.errors import ConfigError, FrameError
from compactdist.testing import Fault, PlannedFaultError, inject, remove
from compactdist.testing.faults import KINDS
from tests.launch import run_ranks

N = 2048


def tensor(rank: int, t: int) -> torch.Tensor:
    base = torch.randn(N, generator=torch.Generator().manual_seed(rank))
    return base + 0.1 * t * torch.randn(N, generator=torch.Generator().manual_seed(100 + t))


def start(plan: list[Fault]) -> tuple[Any, Any]:
    """A faulty group and a wrapped group over it."""
    faulty = inject(dist.group.WORLD, plan)
    return faulty, compactdist.wrap(faulty, codec="int8")


def end(faulty: Any, wrapped: Any) -> Any:
    assert faulty.missed() == []
    wrapped.close()
    return remove(faulty)


def gather(group: Any, x: torch.Tensor) -> torch.Tensor:
    out = torch.full((group.size(), x.numel()), 5.0)
    group.all_gather_into_tensor(out.view(-1), x)
    return out


def right(out: torch.Tensor, t: int) -> bool:
    """Whether an all-gather of step t arrived, up to what int8 residuals leave."""
    return all(bool((out[rank] - tensor(rank, t)).abs().max() < 0.1) for rank in range(out.shape[0]))


def test_a_group_without_faults_hands_everything_on() -> None:
    def body(rank: int, size: int) -> None:
        faulty, wrapped = start([])
        for t in range(3):
            wrapped.step()
            assert right(gather(wrapped, tensor(rank, t)), t)
        x = torch.full((4,), float(rank))
        dist.all_reduce(x, group=wrapped)
        assert x.tolist() == [1.0] * 4
        assert wrapped.stats().compressed_calls == 3
        assert faulty.calls == {"all_gather": 3, "all_reduce": 1}
        assert faulty.hits == []
        name = faulty.group_name
        assert name != dist.group.WORLD.group_name
        assert end(faulty, wrapped) is dist.group.WORLD
        assert not _torch.is_registered(faulty)
        x = torch.ones(1)
        dist.all_reduce(x)
        assert x.item() == 2

    run_ranks(body, 2, timeout=60)


def test_an_error_before_anything_is_sent() -> None:
    """On one rank only: as nothing was sent, that rank can call again and meets its peer."""

    def body(rank: int, size: int) -> None:
        faulty, wrapped = start([Fault("raise", "all_gather", nth=1)] if rank == 0 else [])
        for t in range(3):
            wrapped.step()
            if rank == 0 and t == 1:
                with pytest.raises(PlannedFaultError, match="'raise' in call 1 of all_gather"):
                    gather(wrapped, tensor(rank, t))
            assert right(gather(wrapped, tensor(rank, t)), t)
        assert faulty.hits == ([("all_gather", 1, "raise")] if rank == 0 else [])
        end(faulty, wrapped)

    run_ranks(body, 2, timeout=60)


def test_an_error_after_the_frame_is_on_its_way() -> None:
    def body(rank: int, size: int) -> None:
        faulty, wrapped = start([Fault("raise-after", "all_gather", nth=1)] if rank == 0 else [])
        for t in range(2):
            wrapped.step()
            if rank == 0 and t == 1:
                with pytest.raises(PlannedFaultError):
                    gather(wrapped, tensor(rank, t))
            else:
                assert right(gather(wrapped, tensor(rank, t)), t)  # rank 1 gets the frame all the same
        wrapped.reset()
        wrapped.step()
        assert right(gather(wrapped, tensor(rank, 5)), 5)
        end(faulty, wrapped)

    run_ranks(body, 2, timeout=60)


@pytest.mark.parametrize("op", ["all_gather", "all_to_all", "broadcast", "send"])
def test_a_flipped_byte_of_a_header_is_a_frame_error_on_the_other_rank(op: str) -> None:
    def call(wrapped: Any, rank: int, t: int) -> None:
        if op == "all_gather":
            gather(wrapped, tensor(rank, t))
        elif op == "all_to_all":
            wrapped.all_to_all_single(torch.empty(2 * N), torch.cat([tensor(rank, t), tensor(rank, t)]))
        elif op == "broadcast":
            wrapped.broadcast(tensor(0, t), src=0)
        elif rank == 0:
            wrapped.send(tensor(0, t), 1)
        else:
            wrapped.recv(torch.empty(N), 0)

    def body(rank: int, size: int) -> bool:
        faulty, wrapped = start([Fault("flip", op, nth=1, byte=5)] if rank == 0 else [])
        seen = False
        for t in range(2):
            wrapped.step()
            x = tensor(rank, t)
            before = x.clone()
            try:
                call(wrapped, rank, t)
            except FrameError:
                seen = t == 1
            assert torch.equal(x, before)
        end(faulty, wrapped)
        return seen

    assert run_ranks(body, 2, timeout=60) == [False, True]


@pytest.mark.parametrize("kind", ["flip", "flip-received"])
def test_a_flipped_byte_of_a_payload_arrives(kind: str) -> None:
    """The rank that it reaches either refuses the frame or holds another tensor than without the fault."""

    def body(rank: int, size: int) -> bool:
        guilty = 0 if kind == "flip" else 1
        at = -N // 2 if kind == "flip" else N // 2  # of one frame, or of rank 0's in the gathered buffer
        faulty, wrapped = start([Fault(kind, "all_gather", nth=1, byte=at)] if rank == guilty else [])
        undisturbed = compactdist.wrap(codec="int8")
        seen = False
        for t in range(2):
            wrapped.step()
            undisturbed.step()
            expected = gather(undisturbed, tensor(rank, t))
            try:
                seen = not torch.equal(gather(wrapped, tensor(rank, t)), expected)
            except FrameError:
                seen = True
            assert not (seen and t == 0)
        end(faulty, wrapped)
        undisturbed.close()
        return seen

    assert run_ranks(body, 2, timeout=60) == [False, True]


@pytest.mark.parametrize("kind", ["drop", "duplicate"])
def test_a_lost_and_a_doubled_message_are_frame_errors(kind: str) -> None:
    def body(rank: int, size: int) -> int:
        faulty, wrapped = start([Fault(kind, "send", nth=1)] if rank == 0 else [])
        refused = []
        messages = 3 if kind == "drop" else 5
        for t in range(4 if rank == 0 else messages):
            wrapped.step()
            if rank == 0:
                wrapped.send(tensor(0, t), 1)
                continue
            got = torch.empty(N)
            try:
                wrapped.recv(got, 0)
            except FrameError:
                refused.append(t)
            else:
                assert refused or bool((got - tensor(0, t)).abs().max() < 0.1)
        end(faulty, wrapped)
        return min(refused, default=-1)

    # after a lost message the next one comes in its place; a doubled one comes once more in the place of the next
    assert run_ranks(body, 2, timeout=60)[1] == {"drop": 1, "duplicate": 2}[kind]


def test_a_late_call_is_late_for_the_peer() -> None:
    def body(rank: int, size: int) -> float:
        faulty, wrapped = start([Fault("delay", "all_gather", nth=1, seconds=0.5)] if rank == 0 else [])
        took = 0.0
        for t in range(2):
            wrapped.step()
            dist.barrier()
            began = time.monotonic()
            assert right(gather(wrapped, tensor(rank, t)), t)
            took = time.monotonic() - began
        end(faulty, wrapped)
        return took

    assert min(run_ranks(body, 2, timeout=60)) > 0.4


def test_a_wait_that_fails_and_one_that_is_interrupted() -> None:
    def body(rank: int, size: int) -> None:
        plan = [Fault("fail-wait", "all_gather", nth=1), Fault("interrupt", "all_gather", nth=3)]
        faulty, wrapped = start(plan)
        for t in range(4):
            wrapped.step()
            expected = {1: PlannedFaultError, 3: KeyboardInterrupt}.get(t)
            if expected is None:
                assert right(gather(wrapped, tensor(rank, t)), t)
            else:
                work = wrapped.all_gather_into_tensor(torch.empty(2 * N), tensor(rank, t), async_op=True)
                with pytest.raises(expected, match="planned"):
                    work.wait()
            if t == 1:
                wrapped.reset()
        end(faulty, wrapped)

    run_ranks(body, 2, timeout=60)


def test_a_wrapped_group_takes_none_from_synchronous_calls() -> None:
    def body(rank: int, size: int) -> None:
        faulty, wrapped = start([Fault("none", "all_gather", nth=None)])
        for t in range(3):
            wrapped.step()
            assert right(gather(wrapped, tensor(rank, t)), t)
        assert len(faulty.hits) == 3
        end(faulty, wrapped)

    run_ranks(body, 2, timeout=60)


def test_works_by_themselves() -> None:
    """What the wrapped group meets: None from synchronous calls, a wait that goes on after an interruption."""

    def body(rank: int, size: int) -> None:
        plan = [Fault("none", "all_gather", nth=None), Fault("interrupt", "send"), Fault("fail-wait", "broadcast")]
        faulty = inject(dist.group.WORLD, plan)
        x, out = tensor(rank, 0), torch.empty(2 * N)
        for asynchronous in (False, True):
            opts = _torch.options("AllgatherOptions")
            opts.asyncOp = asynchronous
            out.zero_()
            work = _torch.all_gather_single(faulty, out, x, opts)
            assert (work is None) != asynchronous
            if work is not None:
                work.wait()
            assert torch.equal(out, torch.cat([tensor(0, 0), tensor(1, 0)]))
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
        all_gather(out.zero_(), x, group=faulty)
        assert torch.equal(out[:N], tensor(0, 0))
        got = torch.empty(N)
        if rank == 0:
            work = faulty.send([x], 1, 0)
            with pytest.raises(KeyboardInterrupt):
                work.wait()
            work.wait()
        else:
            faulty.recv([got], 0, 0).wait()
            assert torch.equal(got, tensor(0, 0))
        opts = _torch.options("BroadcastOptions")
        work = faulty.broadcast([x], opts)
        for _ in range(2):
            with pytest.raises(PlannedFaultError, match="'fail-wait' in call 0 of broadcast"):
                work.wait()
        assert isinstance(work.exception(), PlannedFaultError)
        assert torch.equal(x, tensor(0, 0)), "the transport went through"
        with pytest.raises(PlannedFaultError):
            work.get_future().wait()
        assert len(faulty.missed()) == rank  # rank 1 sends nothing
        remove(faulty)

    run_ranks(body, 2, timeout=60)


def test_a_plan_is_data() -> None:
    def body(rank: int, size: int) -> None:
        plan = json.loads('[{"kind": "raise", "op": "barrier", "nth": 1}]')
        faulty = inject(dist.group.WORLD, plan, "by-name")
        assert faulty.group_name == "by-name"
        dist.barrier(group=faulty)
        assert faulty.missed() == [Fault("raise", "barrier", 1)]
        with pytest.raises(PlannedFaultError):
            dist.barrier(group=faulty)
        assert faulty.missed() == []
        remove(faulty)
        with pytest.raises(ConfigError, match="knows"):
            inject(faulty, [])

    run_ranks(body, 2, timeout=60)


@pytest.mark.parametrize(
    ("fault", "match"),
    [
        ({"kind": "explode", "op": "send"}, r"'explode'.*there are: raise, .*interrupt"),
        ({"kind": "drop", "op": "gossip"}, r"'gossip'.*all_gather, all_reduce"),
        ({"kind": "flip", "op": "recv"}, "'flip-received'"),
        ({"kind": "flip", "op": "all_reduce"}, "'flip-received'"),
        ({"kind": "flip-received", "op": "send"}, "nothing arrives"),
        ({"kind": "flip", "op": "send", "mask": 256}, "mask 256"),
    ],
)
def test_plans_that_cannot_be_carried_out(fault: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        Fault(**fault)


def test_every_kind_has_a_sentence() -> None:
    assert all(text and text[0].islower() for text in KINDS.values())
