"""Policies may answer by the two ends of a message: raw inside a host, compressed between hosts."""

from __future__ import annotations

import pytest
import torch

import compactdist
from compactdist import CallInfo, Rule
from compactdist.errors import ConfigError
from tests.group.kit import NUMEL, data
from tests.launch import run_ranks

NEAR = ((0, 1),)


def _by_function(call: CallInfo) -> str | None:
    return "pass" if {call.source, call.target} == {0, 1} else None


@pytest.mark.parametrize("policy", [Rule("pass", between=NEAR), _by_function], ids=["rule", "function"])
def test_all_to_all_and_sends_are_exact_between_near_ranks_only(policy):
    def body(rank, size):
        with compactdist.wrap(codec="int2", min_numel=64, policy=policy, timeout=20, keyframe="raw") as g:
            for seed in range(3):
                g.step()
                out = torch.empty(size * NUMEL)
                g.all_to_all_single(out, data(rank, size * NUMEL, seed))
                for source, chunk in enumerate(out.view(size, -1)):
                    exact = torch.equal(chunk, data(source, size * NUMEL, seed).view(size, -1)[rank])
                    near = source == rank or {source, rank} == {0, 1}
                    assert exact == (near or seed == 0), (source, seed)
                for source, target in ((0, 1), (1, 2)):
                    x = data(source, seed=seed)
                    if rank == source:
                        g.send(x, target)
                    elif rank == target:
                        got = torch.empty(NUMEL)
                        g.recv(got, source)
                        assert torch.equal(got, x) == (source == 0 or seed == 0)
                gathered = torch.empty(size * NUMEL)
                g.all_gather_into_tensor(gathered, data(rank, seed=seed))  # all ranks' frames are alike
                assert torch.equal(gathered[:NUMEL], data(0, seed=seed)) == (seed == 0)

    run_ranks(body, world_size=3, pg_timeout=15, timeout=90)


@pytest.mark.parametrize("between", [((0, 1, 2),), (3,), (), ((0, 0),), ((0, -1),), {0: 1}, ("ab",)])
def test_a_rule_refuses_what_is_no_pair(between):
    with pytest.raises(ConfigError, match="between"):
        Rule("pass", between=between)


def test_a_rule_takes_pairs_in_any_form_and_is_a_value():
    rule = Rule("pass", between=([a, a + 1] for a in (0, 2)))
    assert rule.between == ((0, 1), (2, 3))
    assert hash(rule) == hash(Rule("pass", between=((0, 1), (2, 3))))
