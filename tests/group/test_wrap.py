"""wrap: what it refuses, what the ranks must agree on, and how a group ends."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

import compactdist
from compactdist.errors import (
    ClosedGroupError,
    ConfigError,
    ConfigMismatchError,
    NotInitializedError,
    UnknownCodecError,
    WrapTimeoutError,
)
from tests.group.kit import NUMEL, close, data, gathered
from tests.launch import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def works(g, rank, size):
    g.step()
    out = torch.empty(size * NUMEL)
    dist.all_gather_into_tensor(out, data(rank), group=g)
    return close(out, gathered(size)) and g.stats().compressed_calls


def test_before_init():
    with pytest.raises(NotInitializedError, match="init_process_group"):
        compactdist.wrap()


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"codec": "int3.5"}, UnknownCodecError, "int3.5"),
        ({"codec": 7}, ValueError, "as 'int4'.* got 7"),
        ({"warmup_steps": -1}, ConfigError, "warmup_steps"),
        ({"warm_up": 1}, ConfigError, "warm_up"),
        ({"order": 9}, ConfigError, "order"),
        ({"local": "approximate"}, ConfigError, "local"),
        ({"min_numel": -5}, ConfigError, "min_numel"),
        ({"min_numel": 2.5}, ConfigError, "min_numel"),
        ({"state_budget_bytes": -1}, ConfigError, "state_budget_bytes"),
        ({"layouts": {"*": 3}}, ConfigError, "layouts"),
        ({"layouts": {"*": "(n c) -> 1 n c"}}, ConfigError, r"Layout\('\(n c\).* got \{'\*': '\(n c\)"),
        ({"layouts": 3}, ConfigError, "layouts .* got 3"),
        ({"codec": "small"}, ConfigError, "'small' is a preset, not a codec: give preset='small'"),
        ({"policy": [1]}, ConfigError, "policy"),
        ({"policy": compactdist.Rule("pass", op="gather")}, ConfigError, "a rule's op is one of"),
        ({"options": compactdist.Options(), "order": 2}, ConfigError, "not both"),
        ({"options": {"codec": "int4"}}, ConfigError, r"a compactdist.Options, .* got \{'codec': 'int4'\}"),
        ({"warmup": 1}, ConfigError, "did you mean warmup_steps"),
        ({"policy": {"*kv*": "int8"}}, ConfigError, r"Rule\('int8', key='\*attn\*'\).* got \{'\*kv\*': 'int8'\}"),
        ({"policy": 3}, ConfigError, "policy is .* got 3"),
        ({"keyframe": None}, ConfigError, "keyframe is .*'raw' .* got None"),
        ({"target": 1.5}, ConfigError, "target is .*bits= and a number above 0.* got 1.5$"),
        ({"target": "nmse_db=-32dB"}, ConfigError, "target is .* got 'nmse_db=-32dB'$"),
        ({"target": "bits=-1"}, ConfigError, "target is .* got 'bits=-1'$"),
        ({"agree_timeout": "60"}, ConfigError, "agree_timeout .* got '60'"),
        ({"timeout": "60"}, ConfigError, "timeout .* got '60'"),
        ({"timeout": -1}, ConfigError, "timeout .* got -1"),
        ({"find_layout": "no"}, ConfigError, "find_layout is True or False, got 'no'"),
        ({"forward": "no"}, ConfigError, "forward is True or False, got 'no'"),
        ({"error_feedback": "no"}, ConfigError, "error_feedback is True or False, got 'no'"),
        ({"codec": "transform", "error_feedback": False}, ConfigError, "Transform.* leave error_feedback out"),
        ({"preset": "tiny", "error_feedback": False}, ConfigError, "Transform.* leave error_feedback out"),
        (
            {"policy": compactdist.Rule("rates"), "error_feedback": False},
            ConfigError,
            "Rates.* leave error_feedback out",
        ),
    ],
)
def test_bad_options_are_refused_before_anything_else(settings, error, said):
    with pytest.raises(error, match=said):
        compactdist.wrap(**settings)  # even before init_process_group


def test_what_cannot_be_wrapped():
    def body(rank, size):
        g = compactdist.wrap()
        with pytest.raises(ConfigError, match="wrapped already"):
            compactdist.wrap(g)
        with pytest.raises(ConfigError, match="ProcessGroup"):
            compactdist.wrap(0)
        sub = dist.new_group([0])
        dist.destroy_process_group(sub)
        with pytest.raises(ConfigError, match="destroyed"):
            compactdist.wrap(sub)
        assert compactdist.wrap(dist.GroupMember.NON_GROUP_MEMBER) is dist.GroupMember.NON_GROUP_MEMBER

    run_ranks(body, 1)


def test_one_group_may_be_wrapped_twice_and_the_two_do_not_meet():
    def body(rank, size):
        first = compactdist.wrap(codec="int8", min_numel=64)
        dist.barrier()
        second = compactdist.wrap(codec="int4", min_numel=64)
        assert first.group_name != second.group_name
        assert works(first, rank, size) == 1
        assert (first.current_step, second.current_step) == (0, -1)
        assert second.stats().compressed_calls == 0
        first.close()
        assert works(second, rank, size) == 1
        return second.group_name

    assert len(set(run_ranks(body, pg_timeout=15))) == 1


def test_closing():
    def body(rank, size):
        with compactdist.wrap(codec="int8", min_numel=64) as g:
            assert works(g, rank, size) == 1
        g.close()  # again is fine
        x, out = data(rank), torch.empty(2 * NUMEL)
        for call in (
            lambda: g.all_gather_single(out, x, dist.distributed_c10d.AllgatherOptions()),
            lambda: g.allgather([[x, x]], [x]),
            lambda: g.alltoall([x, x], [x, x]),
            lambda: g.all_to_all_single(x, x, [], [], dist.distributed_c10d.AllToAllOptions()),
            lambda: g.send([x], 1 - rank),
            lambda: g.recv([x], 1 - rank),
            lambda: g.recv_anysource([x], 0),
            lambda: g.allreduce([x]),
            lambda: g.barrier(dist.distributed_c10d.BarrierOptions()),
            g.step,
            lambda: g.key("a"),
            lambda: g.branch("a"),
            g.reset,
            lambda: compactdist.unwrap(g),
        ):
            with pytest.raises(ClosedGroupError, match="closed"):
                call()
        assert "closed" in repr(g)
        assert g.stats().compressed_calls == 1  # what it did can still be asked
        dist.all_reduce(x)  # and the inner group lives

    run_ranks(body, pg_timeout=15)


def test_unwrap():
    def body(rank, size):
        inner = dist.group.WORLD
        g = compactdist.wrap()
        assert compactdist.unwrap(inner) is inner
        assert compactdist.unwrap(g) is inner
        assert dist.group.WORLD is inner
        with pytest.raises(ClosedGroupError):
            compactdist.unwrap(g)
        g = compactdist.wrap()
        g.close()
        with pytest.raises(ClosedGroupError):
            compactdist.unwrap(g)

    run_ranks(body, 1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ([{"codec": "int8"}, {"codec": "int4"}], "codec"),
        ([{"warmup_steps": 1}, {"warmup_steps": 2}], "streams"),
        ([{"min_numel": 10}, {"min_numel": 20}], "min_numel"),
        ([{"policy": compactdist.Rule("pass", key="a")}, {}], "policy"),
        ([{"local": "exact"}, {}], "local"),
    ],
)
def test_ranks_that_differ_are_told_on_every_rank(settings, said):
    def body(rank, size):
        with pytest.raises(ConfigMismatchError, match=said) as info:
            compactdist.wrap(**settings[rank], timeout=30)
        assert "ranks 0 and 1" in str(info.value) or "ranks 1 and 0" in str(info.value)
        dist.barrier()
        assert works(compactdist.wrap(codec="int8", min_numel=64), rank, size) == 1  # nothing is broken

    started = time.monotonic()
    run_ranks(body, pg_timeout=35)
    assert time.monotonic() - started < 20


def test_wrapping_in_different_orders_fails_at_once_on_both_ranks():
    def body(rank, size):
        groups = [dist.new_group(), dist.new_group()]
        started = time.monotonic()
        with pytest.raises(ConfigMismatchError, match="same order"):
            compactdist.wrap(groups[rank], timeout=6)
        return time.monotonic() - started

    assert max(run_ranks(body, pg_timeout=15)) < 5


@pytest.mark.parametrize("timeout", [1.0, timedelta(seconds=1)])
def test_a_rank_that_never_comes_is_named(timeout):
    def body(rank, size):
        if rank == 1:
            return
        with pytest.raises(WrapTimeoutError, match=r"rank 1 did not call wrap\(\) within 1 s"):
            compactdist.wrap(timeout=timeout)

    started = time.monotonic()
    run_ranks(body, 2, pg_timeout=15)
    assert time.monotonic() - started < 8


def test_a_late_rank_is_waited_for():
    def body(rank, size):
        time.sleep(0.3 * rank)
        return compactdist.wrap().group_name

    assert len(set(run_ranks(body, 3, pg_timeout=15))) == 1
