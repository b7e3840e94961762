"""A call that raises before it sends leaves no trace; frames that do not belong are refused with a remedy."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.distributed

from compactdist import Layout
from compactdist.errors import (
    BadOutputError,
    CodecConfigError,
    CompactDistError,
    ConfigError,
    FrameError,
    LayoutError,
    PlanMismatchError,
    UnknownCodecError,
)
from compactdist.policy import Answer
from tests.group.lifecycle import kit
from tests.group.lifecycle.test_out_of_step import NEAR, exchange, tensor
from tests.launch import run_ranks
from tests.lockstep import compare
from tests.quick import quick_for

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")


def attempts(dist, rank):
    """Calls that must raise before anything is sent, each with the error."""
    x, n, world = kit.tensor(rank), kit.N, dist.size()
    bad_list = [torch.empty(n) for _ in range(world - 1)] + [torch.empty(n, dtype=torch.float16)]
    me, other = dist.rank(), (dist.rank() + 1) % world
    return {
        "small output": (BadOutputError, lambda: dist.all_gather_single(torch.empty(n), x, None)),
        "strided output": (
            BadOutputError,
            lambda: dist.allgather([[torch.empty(n + 1) for _ in range(world)]], [x]),
        ),
        "other dtype": (BadOutputError, lambda: dist.allgather([bad_list], [x])),
        "rows that do not divide": (
            BadOutputError,
            lambda: dist.all_to_all_single(torch.empty(world * n + 1), torch.randn(world * n + 1), [], []),
        ),
        "splits that do not add up": (
            BadOutputError,
            lambda: dist.all_to_all_single(torch.empty(2 * n), torch.randn(2 * n), [n, n], [n, n + 1]),
        ),
        "own chunk of another size": (
            BadOutputError,
            lambda: dist.alltoall(
                [torch.empty(n + (i == me)) for i in range(world)], [torch.randn(n) for _ in range(world)]
            ),
        ),
        "chunks of two dtypes": (
            BadOutputError,
            lambda: dist.alltoall(
                [torch.empty(n) for _ in range(world)],
                [torch.randn(n).to(torch.float16 if i == other else torch.float32) for i in range(world)],
            ),
        ),
        "bad layout": (
            LayoutError,
            lambda: _in_key(dist, lambda: dist.allgather([[torch.empty(n)] * 2], [x])),
        ),
        "bad layout, send": (LayoutError, lambda: _in_key(dist, lambda: dist.send([x], other))),
        "no such rank": (ValueError, lambda: dist.send([x], world)),
    }


def _in_key(dist, call):
    with dist.key("misfit"):
        call()


@pytest.mark.parametrize("where", ["all ranks", "one rank"])
def test_a_call_that_raises_before_sending_leaves_no_trace(where):
    layouts = {"misfit/*": Layout("(a b) -> 1 a b", a=7)}

    def body(rank, world_size):
        with kit.wrap(layouts=layouts) as dist:
            for t in range(3):
                dist.step()
                kit.gather(dist, kit.tensor(rank, t))
                before = compare.of_group(dist), dict(dist._keys.clock.counts)
                if where == "all ranks" or rank == 1:
                    for name, (error, call) in attempts(dist, rank).items():
                        with pytest.raises(error):
                            call()
                        counts = {k: n for k, n in dist._keys.clock.counts.items() if n}
                        assert counts == before[1], name
                    after = compare.of_group(dist)
                    assert all(after["sites"][key] == held for key, held in before[0]["sites"].items())
                    new = [s for key, s in after["sites"].items() if key not in before[0]["sites"]]
                    assert all(stream == compare.EMPTY for s in new for stream in s["encoders"].values())
                for _ in range(2):
                    kit.gather(dist, kit.tensor(rank, t))
                out = torch.empty(2 * kit.N)
                dist.all_to_all_single(out, kit.tensor(rank, t, 2 * kit.N))
            assert set(kit.keyframes(dist)) == {
                "all_gather#0",
                "all_gather#1",
                "all_gather#2",
                "all_to_all#0",
            }
            assert set(kit.keyframes(dist).values()) == {(3, 1)}
            return kit.finish(dist)

    compare.check(run_ranks(body))


def _sometimes(call):
    return Answer("int4", "sometimes")


@pytest.mark.parametrize(
    ("answers", "error", "told"),
    [
        ({"layouts": lambda call: 5}, LayoutError, "layouts returned 5; it must return a Layout or None"),
        ({"policy": lambda call: 7}, ConfigError, "the policy returned 7; it must return a codec"),
        ({"policy": lambda call: "int9"}, UnknownCodecError, "the policy returned 'int9': .*did you mean"),
        ({"policy": lambda call: "transform:bits=99"}, CodecConfigError, "returned 'transform:bits=99': .*from 0.05"),
        ({"policy": _sometimes}, ConfigError, "the policy raised: .*'sometimes'"),
    ],
)
def test_what_no_policy_and_no_layout_can_say(answers, error, told):
    """The error names rank and site, and what comes after is right."""
    wrong = [True]

    def body(rank, world_size):
        ((name, answer),) = answers.items()
        with kit.wrap(**{name: lambda call: answer(call) if wrong[0] else None}) as dist:
            dist.step()
            with pytest.raises(error, match=rf"rank {rank}, site 'all_gather#0'.*{told}"):
                kit.gather(dist, kit.tensor(rank))
            wrong[0] = False
            kit.gather(dist, kit.tensor(rank))
            return kit.finish(dist)

    compare.check(run_ranks(body))


def test_a_reset_of_what_is_no_prefix():
    def body(rank, world_size):
        with kit.wrap() as dist, pytest.raises(ConfigError, match="a non-empty string without '#', got 5"):
            dist.reset(5)

    run_ranks(body)


@pytest.mark.parametrize("op", ["gather", "send", "broadcast", "to all"])
def test_a_damaged_frame_names_site_rank_and_remedy(op):
    """Rank 1 sends one damaged frame: its receivers refuse it and keep what they hold."""

    def call(dist, rank, t):
        x = kit.tensor(rank, t)
        if op == "gather":
            kit.gather(dist, x)
        elif op == "send":
            if rank == 1:
                dist.send(x, 0)
            else:
                dist.recv(torch.empty(kit.N), 1)
        elif op == "broadcast":
            dist.broadcast(x, src=1)
        else:
            dist.all_to_all_single(torch.empty(2 * kit.N), kit.tensor(rank, t, 2 * kit.N))

    def body(rank, world_size):
        from compactdist.state import encoder

        def damaged(*args, **kwargs):
            frame = write_head(*args, **kwargs)
            frame[20] ^= 1
            return frame

        write_head = encoder.write_head
        with kit.wrap() as dist, pytest.MonkeyPatch.context() as patch:
            for t in range(2):
                dist.step()
                call(dist, rank, t)
            held = compare.of_group(dist)
            dist.step()
            if rank == 1:
                patch.setattr(encoder, "write_head", damaged)
                call(dist, rank, 2)
                patch.undo()
            else:
                with pytest.raises(FrameError) as caught:
                    call(dist, rank, 2)
                text = str(caught.value)
                for word in (
                    "damaged",
                    "rank 1",
                    "rank 0",
                    kit.keys_of(dist)[0],
                    "Nothing was applied",
                    "call reset()",
                ):
                    assert word in text, (word, text)
                now = compare.of_group(dist)
                for key, site in held["sites"].items():
                    assert now["sites"][key]["decoders"] == site["decoders"]
            dist.step()
            if rank == 0:
                with pytest.raises(FrameError, match=r"sequence.*reset\(\) on all ranks"):
                    call(dist, rank, 3)  # one frame of this stream is lost for good
            else:
                call(dist, rank, 3)
            dist.reset()
            for t in range(2):
                dist.step()
                call(dist, rank, t)
            return kit.finish(dist)

    compare.check(run_ranks(body))


def test_calls_in_different_order_are_noticed():
    def body(rank, world_size):
        with kit.wrap() as dist:
            dist.step()
            names = ("a", "b") if rank == 0 else ("b", "a")
            for name in names:
                dist.reset()
                dist.step()
                with dist.key(name), pytest.raises(PlanMismatchError, match=r"another key\(\).*reset\(\)"):
                    kit.gather(dist, kit.tensor(rank))

    run_ranks(body)


def test_an_epoch_of_ones_own_is_noticed():
    def body(rank, world_size):
        with kit.wrap() as dist:
            dist.step()
            kit.gather(dist, kit.tensor(rank))
            if rank == 0:
                dist.reset("elsewhere")
            with pytest.raises(PlanMismatchError, match=r"reset\(\) was not called on all ranks"):
                kit.gather(dist, kit.tensor(rank))

    run_ranks(body)


@pytest.mark.parametrize("agree", ["plans", "off"])
@pytest.mark.parametrize("op", quick_for(["gather", "ring"], ["gather", "all_to_all", "ring", "broadcast"]))
@pytest.mark.parametrize("resets", quick_for([(2, 1), (3, 1, 1)], [(2, 1), (1, 4), (3, 1, 1), (1, 2, 3)]), ids=str)
def test_after_resets_that_not_all_ranks_made_one_on_all_makes_every_call_right(op, agree, resets):
    """Epochs differ then, and one more reset on each rank leaves them apart by as many."""

    def body(rank, world_size):
        with kit.wrap(codec="int8", agree=agree, agree_timeout=5) as dist:
            for step in range(3):
                dist.step()
                exchange(dist, op, rank, step)
            for turn in range(2):
                for _ in range(resets[rank]):
                    dist.reset()
                dist.step()
                told = r"reset\(\) was not called on all ranks|missing: rank"
                sources = range(world_size)
                if agree == "off" or op == "ring":  # frames tell, of those that send to this rank
                    told, one = "wrong epoch", {"ring": (rank - 1) % world_size, "broadcast": 0}.get(op)
                    sources = sources if one is None else (one,)
                hears = any(resets[source] != resets[rank] for source in sources)
                with pytest.raises(CompactDistError, match=told) if hears else nullcontext():
                    exchange(dist, op, rank, 3)
                torch.distributed.barrier()
                dist.reset()
                for step in range(3):
                    dist.step()
                    for peer, y in exchange(dist, op, rank, step).items():
                        assert kit.nmse(y, tensor(peer, step)) < NEAR, (turn, step)
                dist.check()
            return kit.finish(dist)

    compare.check(run_ranks(body, len(resets), pg_timeout=20))
