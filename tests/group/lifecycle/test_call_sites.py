"""Which call belongs to which site: ordinals, keys, branches, several groups and requests."""

from __future__ import annotations

import pytest
import torch
import torch.distributed

from compactdist.errors import ConfigError
from tests.group.lifecycle import kit
from tests.launch import run_ranks
from tests.lockstep import compare

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")


def test_calls_are_told_apart_by_their_ordinal():
    def body(rank, world_size):
        with kit.wrap() as dist:
            for t in range(3):
                with dist.step():
                    for call in range(2):
                        kit.gather(dist, kit.tensor(rank + 10 * call, t))
                    dist.broadcast(kit.tensor(5, t), src=1)
            assert kit.keys_of(dist) == ["all_gather#0", "all_gather#1", "broadcast/1#0"]
            assert kit.keyframes(dist) == dict.fromkeys(kit.keys_of(dist), (3, 1))
            return kit.finish(dist)

    assert compare.check(run_ranks(body)) == 5


def test_after_a_left_out_nameless_call_nothing_pairs_other_sites():
    def body(rank, world_size):
        warnings = kit.warnings_from_now_on()
        with kit.wrap() as dist:

            def step(t, *calls):
                dist.step()
                for call in calls:
                    x = kit.tensor(rank + 10 * call, t)
                    assert kit.nmse(kit.gather(dist, x), kit.gather_exact(x)) < 0.1
                    with dist.key(f"named {call}"):
                        kit.gather(dist, x)

            step(0, 0, 1, 2)
            step(1, 0, 1, 2)
            step(2, 1, 2)  # the first call is left out: its site gets the second's tensor
            assert warnings == []
            step(3, 0, 1)
            (told,) = warnings
            assert f"rank {rank}: step 2 made fewer calls 'all_gather' than the step before (3 before, 2 now)" in told
            counts = dict(dist._keys.clock.counts)
            with pytest.raises(ConfigError, match=rf"rank {rank}: step 3 makes call 3 of 'all_gather'.*reset\(\)"):
                kit.gather(dist, kit.tensor(rank))
            assert counts == dist._keys.clock.counts
            dist.check()
            assert kit.keyframes(dist)["named 2/all_gather#0"] == (3, 1), "names keep their histories"
            dist.reset()
            for t in range(3):
                step(t, 0, 1, 2)
            step(3, 0)
            dist.step()
            assert len(warnings) == 1
            return kit.finish(dist)

    compare.check(run_ranks(body))


def test_a_key_is_not_moved_by_calls_outside():
    def body(rank, world_size):
        with kit.wrap() as dist:
            for t in range(3):
                dist.step()
                for _ in range(t):
                    kit.gather(dist, torch.randn(kit.N))
                with dist.key("l3"), dist.key("kv"), dist.branch("cond"):
                    kit.gather(dist, kit.tensor(rank, t))
            assert kit.keyframes(dist)["cond/l3/kv/all_gather#0"] == (3, 1)
            return kit.finish(dist)

    compare.check(run_ranks(body))


def test_a_key_alone_is_enough():
    def body(rank, world_size):
        with kit.wrap() as dist:
            for t in range(4):
                with dist.key("a"):
                    kit.gather(dist, kit.tensor(rank, t))
                    kit.gather(dist, kit.tensor(rank + 10, t))
            assert kit.keyframes(dist) == {"a/all_gather#0": (4, 1), "a/all_gather#1": (4, 1)}
            return kit.finish(dist)

    compare.check(run_ranks(body))


def test_branches_one_after_the_other():
    """Classifier-free guidance: each branch predicts from itself."""

    def body(rank, world_size):
        with kit.wrap(codec="binary") as dist:
            for t in range(5):
                with dist.step():
                    for i, branch in enumerate(("cond", "uncond")):
                        with dist.branch(branch):
                            out = kit.gather(dist, kit.tensor(rank + 10 * i, t))
                            assert kit.nmse(out, kit.gather_exact(kit.tensor(rank + 10 * i, t))) < 1e-2
            assert set(kit.keyframes(dist).values()) == {(5, 1)}
            return kit.finish(dist)

    compare.check(run_ranks(body))


def test_two_groups_never_meet():
    def body(rank, world_size):
        second = torch.distributed.new_group([0, 1])
        with kit.wrap() as a, kit.wrap(codec="binary", group=second) as b:
            a.step()
            kit.gather(a, kit.tensor(rank))
            kit.gather(b, kit.tensor(rank))
            assert b.stats().passed_reasons == {"no-step": 1}, "a step of one is no step of the other"
            b.step()
            kit.gather(b, kit.tensor(rank))
            a.reset()
            assert kit.keys_of(a) == []
            assert kit.keys_of(b) == ["all_gather#0"]
            assert (a.current_step, b.current_step) == (-1, 0)
            return kit.finish(a), kit.finish(b)

    for held in zip(*run_ranks(body), strict=True):
        compare.check(list(held))


def test_two_requests_side_by_side():
    """One is reset while the other goes on."""

    def body(rank, world_size):
        with kit.wrap() as dist:
            for t in range(6):
                dist.step()
                for request in ("r1", "r2"):
                    with dist.key(request):
                        kit.gather(dist, kit.tensor(rank, t))
                if t == 2:
                    dist.reset("r1")
                    assert kit.keys_of(dist) == ["r2/all_gather#0"]
                    assert dist.current_step == 2
            shown = kit.keyframes(dist)
            assert shown["r2/all_gather#0"] == (6, 1)
            # a reset prefix's counters may be kept under a common name, so that stats do not grow with every request
            assert [sum(column) for column in zip(*shown.values(), strict=True)] == [12, 3]
            return kit.finish(dist)

    compare.check(run_ranks(body))


def test_point_to_point_keys_are_per_pair_and_tag():
    def body(rank, world_size):
        with kit.wrap() as dist:
            for t in range(3):
                dist.step()
                for tag in (0, 5):
                    x, y = kit.tensor(rank + tag, t), torch.empty(kit.N)
                    works = [
                        dist.irecv(y, (rank - 1) % world_size, tag=tag),
                        dist.isend(x, (rank + 1) % world_size, tag=tag),
                    ]
                    for work in works:
                        work.wait()
                    assert kit.nmse(y, kit.tensor((rank - 1) % world_size + tag, t)) < 1e-3
            before, after = (rank - 1) % world_size, (rank + 1) % world_size
            expected = {f"send/{a}>{b}/t{tag}#0" for a, b in ((before, rank), (rank, after)) for tag in (0, 5)}
            assert set(kit.keys_of(dist)) == expected
            return kit.finish(dist)

    assert compare.check(run_ranks(body, world_size=3)) == 6
