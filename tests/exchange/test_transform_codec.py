"""The transform codec through collectives: ends that learn stay equal, whatever passes between them."""

from __future__ import annotations

from functools import partial
from types import MethodType
from typing import Any

import pytest
import torch

import compactdist
from compactdist.codecs.transform import transform
from compactdist.codecs.transform.transform import TransformSession
from compactdist.errors import ConfigError
from compactdist.testing import act_like_nccl
from tests.launch import run_ranks

STEPS, ROWS, CHANNELS = 6, 60, 96


def _values(rank: int, seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(10 * seed + rank)
    mixed = torch.randn(5, CHANNELS, generator=torch.Generator().manual_seed(99))
    x = torch.randn(ROWS, 5, generator=g) @ mixed
    values = []
    for _ in range(STEPS):
        x = x + 0.1 * torch.randn(ROWS, 5, generator=g) @ mixed
        values.append(x.clone())
    return values


def _gather_and_exchange(rank: int, world_size: int) -> list[float]:
    errors = []
    with compactdist.wrap(codec="transform:bits=2", min_numel=1) as dist:
        mine, others = _values(rank), [_values(peer) for peer in range(world_size)]
        for step in range(STEPS):
            with dist.step():
                gathered = torch.empty(world_size * ROWS, CHANNELS)
                dist.all_gather_into_tensor(gathered, mine[step])
                received = torch.empty(ROWS, CHANNELS)
                dist.all_to_all_single(received, mine[step])
            expected = torch.cat([other[step] for other in others])
            errors.append(float((gathered - expected).norm() / expected.norm()))
            part = ROWS // world_size
            expected = torch.cat([other[step][rank * part : (rank + 1) * part] for other in others])
            errors.append(float((received - expected).norm() / expected.norm()))
        dist.check()
        counts = dist.stats()
        assert counts.compressed_calls == 2 * STEPS
        assert counts.late_preparations == 0  # every call waited for its message
        # reconstructed on all ranks alike
        everyone = [torch.empty_like(gathered) for _ in range(world_size)]
        torch.distributed.all_gather(everyone, gathered)
        assert all(torch.equal(everyone[0], one) for one in everyone)
    return errors


@pytest.mark.parametrize("world_size", [2, 3])
def test_gather_and_exchange(world_size):
    for errors in run_ranks(_gather_and_exchange, world_size):
        assert max(errors) < 0.05


def _ring(rank: int, world_size: int) -> bool:
    """Chunks travel round the ring, passed on as the frames they came in."""
    with compactdist.wrap(codec="transform:bits=2", min_numel=1) as dist:
        mine, others = _values(rank), [_values(peer) for peer in range(world_size)]
        for step in range(STEPS):
            with dist.step():
                held = mine[step]
                for hop in range(1, world_size):
                    received = torch.empty_like(held)
                    ops = [
                        torch.distributed.P2POp(torch.distributed.isend, held, (rank + 1) % world_size, group=dist),
                        torch.distributed.P2POp(torch.distributed.irecv, received, (rank - 1) % world_size, group=dist),
                    ]
                    for work in torch.distributed.batch_isend_irecv(ops):
                        work.wait()
                    held = received
                    expected = others[(rank - hop) % world_size][step]
                    assert float((held - expected).norm() / expected.norm()) < 0.05
        assert dist.stats().forwarded > 0
        dist.check()
    return True


def test_frames_are_passed_on_round_a_ring():
    assert all(run_ranks(_ring, 3))


def _open_loop(rank: int, world_size: int) -> str:
    with compactdist.wrap(policy=lambda call: "transform", min_numel=1, error_feedback=False) as dist:
        x = _values(rank)[0]
        try:
            with dist.step():
                dist.all_gather_into_tensor(torch.empty(world_size * ROWS, CHANNELS), x)
        except ConfigError as error:
            return str(error)
    return ""


def test_without_error_feedback_it_is_refused_before_a_byte_moves():
    for text in run_ranks(_open_loop):
        assert "learns from the history, which the two ends do not share with error_feedback=False" in text


class _Noted:
    """The work of an inner call; notes that it was waited for."""

    def __init__(self, work: object, notes: list[str]) -> None:
        self._work, self._notes = work, notes

    def wait(self) -> bool:
        self._work.wait()
        self._notes.append("arrived")
        return True


def _note_learning(patch: pytest.MonkeyPatch, notes: list[str]) -> None:
    prepare = TransformSession.prepare

    def noted(session: TransformSession) -> None:
        if session._next is not None:
            notes.append("learnt")
        prepare(session)

    patch.setattr(TransformSession, "prepare", noted)


def _in_order(rank: int, world_size: int, *, sites: int, at_once: bool) -> list[str]:
    """What happens in the fourth step, in order."""
    notes: list[str] = []
    with compactdist.wrap(codec="transform:bits=2", min_numel=1) as dist, pytest.MonkeyPatch.context() as patch:
        link, values = dist._engine.link, _values(rank)
        gather = link.all_gather

        def all_gather(self: object, *args: object) -> _Noted:
            work = gather(*args)
            notes.append("sent")
            return _Noted(work, notes)

        _note_learning(patch, notes)
        link.all_gather = MethodType(all_gather, link)
        for step in range(4):
            notes.clear()
            with dist.step():
                works = []
                for site in range(sites):
                    out = torch.empty(world_size * ROWS, CHANNELS)
                    works.append(dist.all_gather_into_tensor(out, values[step] + site, async_op=at_once))
                for work in works if at_once else ():
                    work.wait()
    return notes


@pytest.mark.parametrize("world_size", [2, 3])
def test_both_ends_learn_while_a_message_is_waited_for(world_size):
    """A receiver's end while the next call's message is under way, whatever its site."""
    behind = ["learnt"] * (world_size - 1)
    for sites, at_once in ((1, False), (2, False), (1, True)):
        for notes in run_ranks(partial(_in_order, sites=sites, at_once=at_once), world_size):
            assert notes == sites * ["sent", *behind, "learnt", "arrived"]
    for notes in run_ranks(partial(_in_order, sites=2, at_once=True), world_size):
        assert notes == ["sent", "sent", *behind, "learnt", "learnt", "arrived", *behind, "arrived"]


def _one_way(rank: int, world_size: int) -> list[str]:
    """Of a sender that never waits for a message."""
    notes: list[str] = []
    with compactdist.wrap(codec="transform:bits=2", min_numel=1) as dist, pytest.MonkeyPatch.context() as patch:
        encode = TransformSession.encode

        def noted_encode(session: TransformSession, *args: Any, **kwargs: Any) -> None:
            notes.append("encoded")
            encode(session, *args, **kwargs)

        _note_learning(patch, notes)
        patch.setattr(TransformSession, "encode", noted_encode)
        for x in _values(0):
            with dist.step():
                dist.send(x, 1) if rank == 0 else dist.recv(torch.empty_like(x), 0)
    return notes


def test_a_sender_alone_learns_once_its_frame_has_left():
    sent, _ = run_ranks(_one_way, 2)
    assert sent == (STEPS - 1) * ["encoded", "learnt"]


def _without_memory(rank: int, world_size: int) -> tuple[int, str]:
    """The steps that were right, and what the step after them raised."""

    def fails(*args: Any) -> None:
        raise MemoryError("none left")

    out = torch.empty(world_size * ROWS, CHANNELS)
    with compactdist.wrap(codec="transform:bits=2", min_numel=1) as dist, pytest.MonkeyPatch.context() as patch:
        for step, x in enumerate(_values(rank)):
            if step == 2:
                patch.setattr(transform, "followed", fails)
            try:
                with dist.step():
                    dist.all_gather_into_tensor(out, x)
            except MemoryError as error:
                return step, str(error)
    return STEPS, ""


def test_what_cannot_be_learnt_fails_the_call_that_needs_it():
    """No call fails while it waits for its message; the next one, whose frame needs what was to be learnt, does."""
    assert run_ranks(_without_memory, 2) in ([(2, "none left")] * 2, [(3, "none left")] * 2)


def _synchronous_on_nccl(rank: int, world_size: int) -> list[int]:
    """How many sessions wait for a wait that never comes: after many steps, after a request, after a reset."""
    held = []
    with compactdist.wrap(act_like_nccl(torch.distributed.group.WORLD), "transform", min_numel=1) as dist:
        x, out = _values(rank)[0], torch.empty(world_size * ROWS, CHANNELS)
        unprepared = dist._engine.store.unprepared
        for _ in range(6):
            with dist.step():
                dist.all_gather_into_tensor(out, x)
        held.append(len(unprepared.sessions))
        # two ends, six frames: keyframes teach nothing here, and what the last frame taught is not needed yet
        assert 2 * 4 <= dist.stats().late_preparations <= 2 * 5
        assert "late preparations" in dist.explain()
        dist.reset_stats()
        assert dist.stats().late_preparations == 0
        with dist.request("a"):
            for _ in range(3):
                with dist.step():
                    dist.all_gather_into_tensor(out, x)
            held.append(len(unprepared.sessions))
        held.append(len(unprepared.sessions))
        dist.reset()
        held.append(len(unprepared.sessions))
    return held


def test_sessions_that_nobody_waits_for_are_held_once_and_not_beyond_their_history():
    assert run_ranks(_synchronous_on_nccl) == [[2, 4, 0, 0]] * 2
