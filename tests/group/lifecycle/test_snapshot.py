"""Going back: what follows a restore is, to the bit, what followed the snapshot, and nothing is taken for another."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from compactdist.codecs.base import Session
from compactdist.errors import CodecConfigError, CompactDistError, ConfigError, FrameError
from tests.group.lifecycle import kit
from tests.group.lifecycle.test_attach import Model
from tests.group.lifecycle.test_out_of_step import exchange, seen
from tests.launch import run_ranks
from tests.lockstep import compare
from tests.quick import quick_for

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")

OPS = ("gather", "all_to_all", "ring", "broadcast")


def step(dist, t, ops=OPS):
    """One step of slowly changing tensors; what arrived."""
    dist.step()
    return [arrived for op in ops for arrived in call(dist, op, t)]


def call(dist, op, t):
    world, x = dist.size(), kit.tensor(dist.rank(), t)
    if op == "gather":
        return [kit.gather(dist, x)]
    if op == "all_to_all":
        out = torch.empty(world * kit.N)
        dist.all_to_all_single(out, x.repeat(world))
        return [out]
    if op == "broadcast":
        y = x.clone() if dist.rank() == 0 else torch.empty(kit.N)
        dist.broadcast(y, src=0)
        return [y]
    arrived = []
    for _ in range(world - 1):  # a ring: each rank passes on what it got
        x = kit.hop(dist, x)
        arrived.append(x)
    return arrived


def equal(some, others):
    return len(some) == len(others) and all(map(torch.equal, some, others))


def sent(dist, before):
    stats = dist.stats()
    return stats.wire_bytes - before.wire_bytes, stats.compressed_calls - before.compressed_calls


OPTIONS = [
    {"codec": "int4"},
    {"codec": "binary", "order": 2},
    {"codec": "int2", "order": "auto", "state": "int8"},
    {"codec": "int4", "error_feedback": False},
    {"codec": "int8:scales=block", "order": 0, "local": "exact"},
    {"codec": "int2:scales=token_history", "parts": 2},
    {"codec": "lowrank:rank=4"},
    {"codec": "transform:bits=1,block=64"},
    {"codec": "rates", "target": "nmse_db=-30"},
    {"codec": "int4", "keyframe": "raw", "warmup_steps": 3},
]


@pytest.mark.parametrize(
    "options",
    quick_for(OPTIONS[1:2] + OPTIONS[-2:-1], OPTIONS),
    ids=lambda options: ", ".join(map(str, options.values())),
)
def test_what_follows_a_restore_is_what_followed_the_snapshot(options):
    def body(rank, world):
        with kit.wrap(**options) as dist:
            for t in range(3):
                step(dist, t)
            saved = dist.snapshot()
            assert (saved.step, saved.nbytes > 0) == (2, options.get("order") != 0)
            before, expected = dist.stats(), [step(dist, t) for t in range(3, 6)]
            first = sent(dist, before)
            for _ in range(2):
                dist.restore(saved)
                assert dist.current_step == 2
                dist.check()
                before, got = dist.stats(), [step(dist, t) for t in range(3, 6)]
                if "target" not in options:  # which goes by what it has measured since
                    assert all(map(equal, got, expected))
                    assert sent(dist, before) == first
                dist.check()
            return kit.finish(dist)

    compare.check(run_ranks(body, world_size=2 if "parts" in options else 3))


def test_other_values_may_follow_and_a_reset_forgets_them():
    """A request that goes on in two ways from its middle, and then another request."""

    def body(rank, world):
        with kit.wrap(codec="int2") as dist, kit.wrap(codec="int2") as other:
            for t in range(4):
                step(dist, t), step(other, t)
            saved = dist.snapshot()
            first = [step(dist, t) for t in (4, 5)]
            dist.restore(saved)
            second = [step(dist, 40 + t) for t in (4, 5)]
            assert equal(second[-1], [step(other, 40 + t) for t in (4, 5)][-1])
            assert not equal(first[-1], second[-1])
            dist.reset()
            fresh = step(dist, 0)
            other.reset()
            assert equal(fresh, step(other, 0))
            dist.restore(saved)  # another request has come in between
            assert equal(step(dist, 4), first[0])
            return kit.finish(dist)

    compare.check(run_ranks(body))


def test_a_step_that_failed_is_tried_again():
    def body(rank, world):
        with kit.wrap(codec="int8") as dist:
            for t in range(3):
                step(dist, t, ["gather"])
            saved = dist.snapshot()
            dist.step()
            x = kit.tensor(rank, 3)
            if rank:
                x[7] = torch.nan
            with pytest.raises(CompactDistError, match=r"NaN"):
                kit.gather(dist, x)
            dist.restore(saved)
            (out,) = step(dist, 3, ["gather"])
            assert kit.nmse(out, kit.gather_exact(kit.tensor(rank, 3))) < 1e-3
            sites = dist.stats().sites.values()
            assert sum(site.keyframes for site in sites) == 1
            return kit.finish(dist)

    compare.check(run_ranks(body))


def test_sites_that_came_later_are_gone_and_names_and_steps_of_a_model_go_on():
    def body(rank, world):
        with kit.wrap() as dist:
            model = Model(dist)
            dist.attach(model)
            for t in range(3):
                model(kit.tensor(rank, t))
            saved = dist.snapshot()
            with dist.key("later"):
                step(dist, 3, ["gather"])
            assert len(kit.keys_of(dist)) == 3
            dist.restore(saved)
            assert kit.keys_of(dist) == [f"layers.{i}/all_gather#0" for i in range(2)]
            model(kit.tensor(rank, 3))
            assert dist.current_step == 3
            assert set(kit.keyframes(dist).values()) == {(4, 1), (1, 1)}
            return kit.finish(dist)

    compare.check(run_ranks(body))


def test_in_the_middle_of_a_step():
    def body(rank, world):
        with kit.wrap() as dist:
            for t in range(3):
                dist.step()
                for n in range(2):
                    kit.gather(dist, kit.tensor(rank, t) + n)
            dist.step()
            kit.gather(dist, kit.tensor(rank, 3))
            saved = dist.snapshot()
            expected = kit.gather(dist, kit.tensor(rank, 3) + 1)
            step(dist, 4, ["gather"])
            dist.restore(saved)
            assert torch.equal(kit.gather(dist, kit.tensor(rank, 3) + 1), expected)
            return kit.finish(dist)

    compare.check(run_ranks(body))


@pytest.mark.parametrize("order", [0, 1, 2])
def test_where_a_stream_is_forgotten_whose_frames_another_passes_on(order):
    def hop(dist, x, name):
        with dist.key(name):
            return kit.hop(dist, x)

    def steps(dist, first, last):
        out = []
        for t in range(first, last):
            dist.step()
            out.append(hop(dist, kit.tensor(dist.rank(), t), "a"))
            out.append(hop(dist, out[-1], "b"))
        return out

    def body(rank, world):
        with kit.wrap(order=order) as dist:
            steps(dist, 0, 4)
            assert dist.stats().forwarded
            dist.reset("a")
            saved = dist.snapshot()
            dist.check()
            before, expected = dist.stats(), steps(dist, 4, 8)
            first = sent(dist, before)
            dist.restore(saved)
            dist.check()
            before = dist.stats()
            assert equal(steps(dist, 4, 8), expected)
            assert sent(dist, before) == first
            return kit.finish(dist)

    compare.check(run_ranks(body, world_size=3))


def test_calls_that_pass_through_at_a_snapshot_do_so_after_a_restore():
    """Of a site whose tensors change too often, and before there are steps."""

    def body(rank, world):
        def varying(dist, first, last):
            out = []
            for t in range(first, last):
                dist.step()
                out.append(kit.gather(dist, kit.tensor(rank, t, kit.N + 16 * (t % 3))))
            return out

        with kit.wrap() as dist:
            saved = dist.snapshot()
            kit.gather(dist, kit.tensor(rank))
            varying(dist, 0, 1)
            dist.restore(saved)
            kit.gather(dist, kit.tensor(rank))
            assert dist.stats().passed_reasons == {"no-step": 2}
            varying(dist, 0, 12)
            saved, before = dist.snapshot(), dist.stats()
            expected = varying(dist, 12, 15)
            first = sent(dist, before)
            assert first[1] == 0
            dist.restore(saved)
            before = dist.stats()
            assert equal(varying(dist, 12, 15), expected)
            assert sent(dist, before) == first

    run_ranks(body)


@pytest.mark.parametrize("agree", ["plans", "off"])
@pytest.mark.parametrize("op", OPS)
def test_ranks_that_go_back_to_other_moments_are_told_and_a_reset_mends_it(op, agree):
    def body(rank, world):
        with kit.wrap(codec="int8", agree=agree, agree_timeout=5.0) as dist:
            saved = []
            for t in range(4):
                step(dist, t, [op])
                saved.append(dist.snapshot())
            dist.restore(saved[1 + rank])
            dist.step()
            if op == "broadcast" and agree == "off" and not rank:
                exchange(dist, op, rank, 9)  # a rank that only sends is told nothing
            else:
                with pytest.raises(CompactDistError, match=r"step.*reset\(\)"):
                    exchange(dist, op, rank, 9)
            dist.reset()
            for t in range(3):
                step(dist, t, [op])
            return kit.finish(dist)

    compare.check(run_ranks(body, pg_timeout=20))


@pytest.mark.parametrize("agree", quick_for(["plans"], ["plans", "off"]))
@pytest.mark.parametrize("op", quick_for(OPS[:2], OPS))
def test_a_rank_that_does_not_go_back_gets_no_wrong_value(op, agree):
    def body(rank, world):
        told = []
        with kit.wrap(codec="int8", agree=agree, agree_timeout=1.0) as dist:
            for t in range(4):
                step(dist, t, [op])
                if t == 1:
                    saved = dist.snapshot()
            if rank:
                dist.restore(saved)
            dist.step()
            told.append(seen(dist, op, rank, 9))
        return told

    outcomes = run_ranks(body, pg_timeout=3, expect_error=True)
    values = [value for outcome in outcomes for value in outcome.value]
    assert "wrong" not in values, values
    assert "refused" in values, values


def test_calls_whose_works_were_dropped_are_finished_first():
    """Nobody can wait for them, and the next call of their site, which would finish them, may never come."""

    def body(rank, world):
        with kit.wrap() as dist:
            step(dist, 0, ["gather", "all_to_all"])
            dist.step()
            out = torch.full((world * kit.N,), 7.0)
            dist.all_gather_into_tensor(out, kit.tensor(rank, 1), async_op=True)
            saved = dist.snapshot()
            others = out.view(world, kit.N)[1 - rank]  # a rank's own chunk is written with its frame
            assert bool((others == 7).all()), "an output that its caller may have given to somebody else was written"
            expected = [step(dist, t, ["gather", "all_to_all"]) for t in (2, 3)]
            dist.restore(saved)
            assert all(map(equal, [step(dist, t, ["gather", "all_to_all"]) for t in (2, 3)], expected))
            return not dist.check()

    assert all(run_ranks(body))


def test_what_is_refused():
    class Forgetful(Session):
        remembers = True

    def body(rank, world):
        with kit.wrap() as dist, kit.wrap() as other, kit.wrap(state_budget_bytes=1 << 20) as short:
            for t in range(2):
                step(dist, t, ["gather"]), step(short, t, ["gather"])
            saved = dist.snapshot()
            assert repr(saved) == f"<Snapshot of step 1, {saved.nbytes} bytes>"
            with pytest.raises(ConfigError, match=r"restore\(\) takes what snapshot\(\) returned, got dict"):
                dist.restore({})
            with pytest.raises(ConfigError, match="snapshot is of another group"):
                other.restore(saved)
            with pytest.raises(ConfigError, match=r"snapshot\(\) with state_budget_bytes=1048576"):
                short.snapshot()
            work = dist.all_gather_into_tensor(torch.empty(2 * kit.N), kit.tensor(rank), async_op=True)
            with pytest.raises(ConfigError, match=r"site 'all_gather#1'.*has not been waited for"):
                dist.snapshot()
            work.wait()
            with dist.request("7f3a"):
                for what in (dist.snapshot, lambda: dist.restore(saved)):
                    with pytest.raises(ConfigError, match="request '7f3a' has not ended"):
                        what()
            form = dist._engine.store.sites()[0].streams[0].known_form
            form.session = Forgetful(form.codec, form.session.view, torch.float32, torch.device("cpu"))
            with pytest.raises(CodecConfigError, match=r"Forgetful remembers something and has no copy_memory\(\)"):
                dist.snapshot()

    run_ranks(body)


def test_a_snapshot_holds_no_group():
    def body(rank, world):
        dist = kit.wrap()
        for t in range(2):
            step(dist, t, ["gather"])
        saved, closed = dist.snapshot(), weakref.ref(dist)
        dist.close()
        with pytest.raises(CompactDistError, match="closed"):
            dist.restore(saved)
        del dist
        gc.collect()
        assert closed() is None
        assert saved.step == 1

    run_ranks(body)


def test_a_frame_of_the_time_between_is_refused():
    """Rank 0 sends before it goes back, rank 1 receives after: the frame is of another epoch."""

    def body(rank, world):
        with kit.wrap(codec="int8", agree="off") as dist:
            for t in range(3):
                step(dist, t, ["ring"])
            saved = dist.snapshot()
            dist.step()
            if rank == 0:
                dist.send(kit.tensor(0, 3), 1)
                dist.restore(saved)
            else:
                dist.restore(saved)
                dist.step()
                with pytest.raises(FrameError, match="wrong epoch"):
                    dist.recv(torch.empty(kit.N), 0)

    run_ranks(body)
