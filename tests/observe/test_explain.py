"""What ``explain`` says to a newcomer, and that it fits the terminal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed

from compactdist import Layout, Rule
from compactdist.observe.stats import GroupStats, PassReason
from tests.group.lifecycle.kit import gather, tensor, wrap
from tests.launch import run_ranks
from tests.observe.kit import shown

HINT = "no collective reached this group; pass group="
LONG = "kv/single_transformer_blocks.37.attn"


def test_a_group_that_nothing_reached_says_so() -> None:
    def body(rank: int, size: int) -> None:
        with wrap() as dist:
            for t in range(2):
                with dist.step():
                    torch.distributed.all_reduce(tensor(rank, t))
            assert HINT in dist.explain()
            assert HINT in dist.stats().to_dict()["hint"]
            torch.distributed.barrier(group=dist)
            assert dist.stats().hint is None
            assert HINT not in dist.explain()

    run_ranks(body, 2, timeout=40)


def test_small_names_the_sizes_and_the_limit() -> None:
    def body(rank: int, size: int) -> str:
        with wrap(min_numel=2048) as dist, dist.step():
            for numel in (16, 512, 70):
                gather(dist, torch.ones(numel))
            works = [dist.isend(torch.ones(9), 1 - rank), dist.irecv(torch.empty(9), 1 - rank)]
            for work in works:
                work.wait()
            return dist.explain()

    for text in run_ranks(body, 2, timeout=40):
        assert "3 x all_gather: small (16 to 512 elements, and min_numel is 2048)" in text
        assert "1 x send: small (9 elements, and min_numel is 2048)" in text
        assert "1 x recv: small (9 elements, and min_numel is 2048)" in text


@pytest.mark.parametrize("error_feedback", [None, False])
def test_residuals_as_large_as_the_tensor_are_named_where_errors_are_sampled(error_feedback: bool | None) -> None:
    def body(rank: int, size: int) -> list[Any]:
        told = []
        for every in (0, 2):
            with wrap(sample_errors_every=every, error_feedback=error_feedback) as dist:
                for t in range(6):
                    with dist.step():
                        for name, x in {"slow": tensor(rank, t), "noise": tensor(10 * rank + 100 * t)}.items():
                            with dist.key(name):
                                gather(dist, x)
                sites = dist.stats().sites
                told.append((dist.explain(), sites["slow/all_gather#0"], sites["noise/all_gather#0"]))
        return told

    for without, sampled in run_ranks(body, 2, timeout=40):
        assert "residuals as large" not in without[0]
        text, slow, noise = sampled
        assert "residuals as large as the tensor" in text
        assert f"  noise/all_gather#0: {noise.residual_share:.2f} of its energy" in text
        assert "slow/all_gather#0:" not in text
        # differences of unrelated tensors have twice their energy; slow ones change by a hundredth of theirs, squared
        assert noise.residual_share == pytest.approx(2, rel=0.2)
        assert slow.residual_share < 1e-2
        assert noise.sampled == slow.sampled == 3


def busy_counters() -> GroupStats:
    """Every column in use, with numbers as large as they get."""
    stats = GroupStats()
    for layer in range(3):
        key = f"request:7f3a/cond/{LONG}/{layer}/all_gather#0"
        for _ in range(99_999):
            stats.sent(key, "all_gather", "lowrank_int4", raw=1 << 31, wire=1 << 29, keyframe=False, numel=1 << 30)
        stats.error(key, "all_gather", 1e-9, 1.0, 0.9)
        for _ in range(9999):
            stats.received(key, "all_gather", "lowrank_int4", raw=1 << 31, wire=1 << 29)
        stats._sites[key].forwarded = stats._sites[key].predicted = 99_999
        for reason in PassReason:
            stats.passed("all_gather", reason, 1e9, key)
    return stats


@pytest.mark.parametrize("width", [80, 120, 250])
def test_it_fits_the_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    lines = shown(busy_counters()).splitlines()
    assert max(map(len, lines)) <= width
    first = next(line for line in lines if LONG in line)
    assert ("lowrank_int4" in first) == (width == 250)
    heads = next(line for line in lines if "codec" in line).split()
    assert {"calls", "fr.", "TB", "ratio", "bits", "dB", "fwd", "pred", "recv"} <= {*heads}


def test_a_key_beyond_the_terminal_is_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    stats = GroupStats()
    key = "x" * 200 + "/all_gather#0"
    stats.sent(key, "all_gather", "int4", raw=4096, wire=600, keyframe=False, numel=1024)
    text = shown(stats)
    assert max(map(len, text.splitlines())) <= 80
    assert key in "".join(text.split())


def test_columns_that_would_be_empty_are_left_out() -> None:
    stats = GroupStats()
    stats.sent("all_gather#0", "all_gather", "int4", raw=4096, wire=600, keyframe=False, numel=1024)
    _, units, heads, row, *_ = shown(stats).splitlines()
    assert units.split() == ["key-", "raw", "wire", "state"]
    assert heads.split() == ["site", "codec", "calls", "fr.", "kB", "B", "ratio", "bits", "B"]
    assert row.split() == ["all_gather#0", "int4", "1", "0", "4.10", "600", "6.83", "4.69", "0"]


def test_rules_and_hints_for_keys_that_no_site_has_are_named() -> None:
    """A misspelt key would have no effect without a word."""

    def body(rank: int, size: int) -> list[str]:
        rules = [Rule("int8", key="*attn*"), Rule("pass", key="*norm*"), Rule("int2", key="*kvv*"), Rule("int4")]
        layouts = {"*kv*": Layout("(n c) -> 1 n c", c=64), "*vk*": Layout("(n c) -> 1 n c", c=64)}
        texts = []
        with wrap(policy=rules, layouts=layouts) as dist:
            texts.append(dist.explain())  # nothing has been called
            for name in ("layer3.attn.kv", "layer3.norm"):
                with dist.step(), dist.key(name):
                    gather(dist, tensor(rank))
            texts.append(dist.explain())
            dist.reset("layer3.attn.kv")  # its record is merged, and its key gone
            texts.append(dist.explain())
        return [" ".join(text.split()) for text in texts]

    for before, after, merged in run_ranks(body, 2, timeout=40):
        assert "is for key" not in before
        assert "a rule of the policy is for key='*kvv*', which no call site counted here has" in after
        assert "a layout hint is for key='*vk*', which no call site counted here has" in after
        assert after.count("is for key") == 2
        assert "is for key" not in merged


def test_a_rule_that_decides_nothing_is_named() -> None:
    """Its key fits, so it looks as if it had an effect."""

    def body(rank: int, size: int) -> list[str]:
        rules = [Rule("int8", dtype="float64"), Rule("int2", key="*attn*"), Rule("int4"), Rule("pass", first_step=9)]
        with wrap(policy=rules) as dist:
            with dist.step(), dist.key("layer3.attn"):
                gather(dist, tensor(rank))
            return [line for line in " ".join(dist.explain().split()).split("rule ") if "decided no call" in line]

    for said in run_ranks(body, 2, timeout=40):
        assert [line[:1] for line in said] == ["1", "3"]
