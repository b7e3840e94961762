"""The counters by themselves: reasons, receives, folding, plain values. No process group is needed."""

from __future__ import annotations

import json
import math
import pickle
from typing import Any

import pytest

from compactdist.observe.stats import GroupStats, PassReason, SiteStats, decibel
from tests.observe.kit import shown

TOTALS = (
    "raw_bytes",
    "wire_bytes",
    "compressed_calls",
    "forwarded",
    "passed_through",
    "passed_reasons",
    "received_calls",
    "received_raw_bytes",
    "received_wire_bytes",
)


def totals(stats: GroupStats) -> dict[str, Any]:
    taken = stats.snapshot({})
    return {name: getattr(taken, name) for name in TOTALS}


def send(stats: GroupStats, key: str, op: str = "all_gather") -> None:
    stats.sent(key, op, "int4", raw=4096, wire=600, keyframe=False, numel=1024)


def test_a_measured_error_that_is_not_a_number_is_no_perfect_one() -> None:
    for energies in ((math.nan, 1.0), (1.0, math.nan), (math.nan, 0.0)):
        assert math.isnan(decibel(*energies))
    assert decibel(0.0, 1.0) == -math.inf
    assert decibel(0.1, 1.0) == pytest.approx(-10)


# --- reasons


def test_a_reason_is_its_short_name_and_carries_its_sentence() -> None:
    small = PassReason.SMALL
    assert small == "small"
    assert small.value == "small"
    assert (str(small), f"{small}", f"{small:>7}", "+".join([small, "x"])) == ("small", "small", "  small", "small+x")
    assert {small: 1}["small"] == 1
    assert {"small": 1}[small] == 1
    assert small.text == "fewer elements than min_numel"
    assert PassReason("small") is small
    assert pickle.loads(pickle.dumps(small)) is small
    assert json.dumps({small: small}) == '{"small": "small"}'
    assert all(reason.text and "+" not in reason for reason in PassReason)


def test_several_reasons_are_one_name() -> None:
    both = [PassReason.SMALL, PassReason.POLICY, PassReason.SMALL]
    assert PassReason.joined(both) == "policy+small"
    assert type(PassReason.joined(PassReason.OP)) is str
    assert PassReason.joined("policy+small") == "policy+small"
    assert PassReason.explained("policy+small") == "the policy said so; fewer elements than min_numel"
    assert PassReason.explained("mine+op") == "mine; this operation is not compressed"


def test_passed_takes_one_reason_or_several() -> None:
    stats = GroupStats()
    stats.passed("all_to_all", {PassReason.SMALL, PassReason.POLICY}, 10, "a/all_to_all#0", wire=12)
    stats.passed("all_to_all", "policy+small", 10, "a/all_to_all#0", wire=12)
    stats.passed("all_reduce", PassReason.OP, 7)
    taken = stats.snapshot({})
    assert taken.passed_reasons == {"policy+small": 2, "op": 1}
    assert {type(name) for name in taken.passed_reasons} == {str}
    assert taken.sites["a/all_to_all#0"].passed == {"policy+small": 2}
    assert (taken.raw_bytes, taken.wire_bytes, taken.passed_through) == (27, 31, 3)
    assert stats.passed_table() == {("all_to_all", "policy+small"): (2, 0.0), ("all_reduce", "op"): (1, 7.0)}
    text = " ".join(shown(stats).split())
    assert "2 x all_to_all: policy+small (the policy said so; fewer elements than min_numel)" in text
    assert "1 x all_reduce: op (this operation is not compressed)" in text


@pytest.mark.parametrize("passes", [False, True])
def test_a_site_may_be_evicted_before_its_first_call_has_left(passes) -> None:
    """An asynchronous call waits for the agreement of ranks, and the next call may need its room meanwhile."""
    stats = GroupStats()
    stats.evicted("a/all_gather#0")
    if passes:
        stats.passed("all_gather", PassReason.SMALL, 10, "a/all_gather#0")
    else:
        send(stats, "a/all_gather#0")
    stats.evicted("a/all_gather#0")
    assert stats.snapshot({}).evictions == 2
    stats.evicted("b/all_gather#0")
    stats.clear()
    send(stats, "b/all_gather#0")
    assert stats.snapshot({}).evictions == 0


# --- receives


def test_received_messages_are_shown_and_kept_apart_from_what_was_sent() -> None:
    stats = GroupStats()
    for _ in range(3):
        stats.received("send/0>1/t0#0", "recv", "int4", raw=4096, wire=600)
    taken = stats.snapshot({})
    site = taken.sites["send/0>1/t0#0"]
    assert (site.codec, site.op, site.calls, site.received) == ("int4", "recv", 0, 3)
    assert (taken.received_calls, taken.received_raw_bytes, taken.received_wire_bytes) == (3, 3 * 4096, 3 * 600)
    assert (taken.compressed_calls, taken.raw_bytes, taken.wire_bytes) == (0, 0, 0)
    _, head, row, *total = shown(stats).splitlines()[1:]
    assert (head.split()[-1], row.split()[-1]) == ("recv", "3")
    assert row.split()[1] == "int4"
    assert total[0].startswith("total: 0 compressed")
    assert "3 calls only received, 12288 raw bytes as 1800 wire bytes" in " ".join(" ".join(total).split())


def test_a_rank_that_receives_nothing_reads_no_line_about_it() -> None:
    stats = GroupStats()
    send(stats, "all_gather#0")
    assert "only received" not in shown(stats)


# --- folding


def test_full_resets_do_not_pile_up_records() -> None:
    """A server that names its sites after the request: 8,000 names, and never more than two requests' records."""
    stats = GroupStats()
    for request in range(2000):
        for layer in range(2):
            send(stats, f"request{request}/l{layer}/all_gather#0")
            stats.received(f"request{request}/l{layer}/send/0>1/t0#0", "recv", "int2", raw=100, wire=10)
        stats.passed("all_to_all", PassReason.POLICY, 50, f"request{request}/all_to_all#0")
        stats.error(f"request{request}/l0/all_gather#0", "all_gather", 1.0, 100.0)
        before = totals(stats)
        stats.fold(None)
        assert totals(stats) == before
        taken = stats.snapshot({})
        assert len(taken.sites) <= 2 * 5 + 3
    assert taken.compressed_calls == taken.received_calls == 4000
    folded = taken.sites["(earlier requests)/all_gather"]
    assert (folded.calls, folded.sampled, folded.codec) == (3998, 1999, "int4")
    assert folded.nmse_db == pytest.approx(-20)
    assert taken.sites["(earlier requests)/all_to_all"].passed == {"policy": 1999}
    assert list(taken.sites)[-3:] == [f"(earlier requests)/{op}" for op in ("all_gather", "recv", "all_to_all")]


def test_sites_that_come_back_keep_their_records() -> None:
    stats = GroupStats()
    for request in range(5):
        send(stats, "l0/all_gather#0")
        if request == 0:
            send(stats, "once/all_gather#0")
        stats.fold(None)
    sites = stats.snapshot({}).sites
    assert {key: site.calls for key, site in sites.items()} == {
        "l0/all_gather#0": 5,
        "(earlier requests)/all_gather": 1,
    }
    send(stats, "once/all_gather#0")  # a folded site that comes back begins again; the total goes on
    assert stats.snapshot({}).sites["once/all_gather#0"].calls == 1
    assert stats.snapshot({}).compressed_calls == 7


def test_folding_a_prefix_leaves_other_sites_and_the_totals_alone() -> None:
    stats = GroupStats()
    for key in ("a/all_gather#0", "a/b/all_gather#0", "ab/all_gather#0"):
        send(stats, key)
    before = totals(stats)
    stats.fold("a")
    assert totals(stats) == before
    sites = stats.snapshot({}).sites
    assert {key: site.calls for key, site in sites.items()} == {
        "ab/all_gather#0": 1,
        "(reset prefixes)/all_gather": 2,
    }
    stats.fold(None)
    stats.fold(None)
    assert totals(stats) == before
    assert list(stats.snapshot({}).sites) == ["(reset prefixes)/all_gather", "(earlier requests)/all_gather"]
    send(stats, "request:7f3a/all_gather#0")
    stats.fold("request:7f3a", "(ended requests)")
    assert stats.snapshot({}).sites["(ended requests)/all_gather"].calls == 1
    stats.clear()
    assert stats.snapshot({}).sites == {}


def test_every_counter_of_a_site_is_folded() -> None:
    full = SiteStats("a/send#0", "send", "int4")
    for index, (name, value) in enumerate(vars(full).items()):
        if name not in ("last_wire_bits_per_element", "state_bytes") and isinstance(value, int | float):
            setattr(full, name, index)
    full.passed["op"] = 3
    total = SiteStats("all", "send")
    total.add(full)
    total.add(full)
    for name, value in vars(full).items():
        if isinstance(value, int | float) and name not in (
            "last_wire_bits_per_element",
            "state_bytes",
            "offloaded_bytes",
            "parts",
        ):
            assert getattr(total, name) == 2 * value, name
    assert total.passed == {"op": 6}


# --- plain values


def test_to_dict_is_json() -> None:
    stats = GroupStats()
    send(stats, "a/all_gather#0")
    stats.error("a/all_gather#0", "all_gather", 0.0, 4.0)
    stats.passed("recv", PassReason.PEER, 0, "b/recv#0")
    values = stats.snapshot({"a/all_gather#0": 8192}).to_dict()
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert values["ratio"] == 4096 / 600
    assert values["state_bytes"] == values["sites"]["a/all_gather#0"]["state_bytes"] == 8192
    assert values["sites"]["a/all_gather#0"]["nmse_db"] is None  # no error at all: minus infinity
    assert values["sites"]["b/recv#0"]["last_wire_bits_per_element"] is None
    assert values["passed_reasons"] == {"peer-passed": 1}
    assert math.isinf(stats.snapshot({}).sites["a/all_gather#0"].nmse_db)


def test_what_was_taken_does_not_change_any_more() -> None:
    stats = GroupStats()
    send(stats, "a/all_gather#0")
    taken = stats.snapshot({})
    before = taken.to_dict()
    send(stats, "a/all_gather#0")
    stats.passed("all_gather", PassReason.POLICY, 10, "a/all_gather#0")
    assert taken.to_dict() == before
    assert stats.snapshot({}).to_dict() != before
