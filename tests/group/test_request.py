"""Requests that a server interleaves: sites, steps and history of their own, dropped when they end."""

from __future__ import annotations

import pytest
import torch

import compactdist
from compactdist.errors import ConfigError
from tests.group.kit import NUMEL, data
from tests.launch import run_ranks

OPTIONS = {"codec": "int2", "min_numel": 64, "warmup_steps": 2, "timeout": 20}


def _call(g, rank, seed):
    out = torch.empty(g.size() * NUMEL)
    g.all_gather_into_tensor(out, data(rank, seed=seed))
    return out


def _alone(rank, seeds):
    """What a request gets that has a group to itself."""
    with compactdist.wrap(**OPTIONS) as g:
        outs = []
        for seed in seeds:
            g.step()
            outs.append(_call(g, rank, seed))
        return outs


def test_interleaved_requests_get_what_each_gets_alone():
    def body(rank, size):
        seeds = {"a": range(0, 5), "b": range(20, 25)}
        alone = {name: _alone(rank, seeds[name]) for name in seeds}
        with compactdist.wrap(**OPTIONS) as g:
            requests = {name: g.request(name) for name in seeds}
            for t in range(5):
                for name in ("a", "b") if t < 3 else ("b", "a"):
                    with requests[name].resume():
                        g.step()
                        out = _call(g, rank, seeds[name][t])
                        assert g.current_step == t
                    assert torch.equal(out, alone[name][t]), (name, t)
            assert {key.split("/")[0] for key in g.stats().sites} == {"request:a", "request:b"}
            held = g.stats().state_bytes
            requests["a"].end()
            assert g.stats().state_bytes == held // 2
            assert g.stats().sites["(ended requests)/all_gather"].calls == 5
            with pytest.raises(ConfigError, match="has ended"):
                requests["a"].resume()
            again = g.request("a")  # a new one of this name starts from a keyframe
            with again.resume():
                g.step()
                assert torch.equal(_call(g, rank, 0), alone["a"][0])

    run_ranks(body, pg_timeout=15, timeout=60)


def test_a_with_block_is_a_whole_request():
    def body(rank, size):
        with compactdist.wrap(**OPTIONS) as g:
            g.step()
            _call(g, rank, 0)
            outside = g.stats().state_bytes
            for _ in range(3):
                with g.request("r") as request:
                    for seed in range(3):
                        with g.step():
                            _call(g, rank, seed)
                    with request.resume():
                        assert g.current_step == 2
                    assert g.stats().state_bytes == 2 * outside
                assert g.stats().state_bytes == outside
                assert g.current_step == 0
            with g.request("x"), pytest.raises(ConfigError, match="has not ended"):
                g.request("x")
            for bad in ("", "a#b", 7):
                with pytest.raises(ConfigError, match="non-empty string"):
                    g.request(bad)

    run_ranks(body, pg_timeout=15, timeout=60)


def test_a_reset_begins_all_requests_anew():
    def body(rank, size):
        alone = _alone(rank, range(3))
        with compactdist.wrap(**OPTIONS) as g:
            request = g.request("r")
            for _ in range(2):
                for seed in range(3):
                    with request.resume(), g.step():
                        assert torch.equal(_call(g, rank, seed), alone[seed])
                g.reset()

    run_ranks(body, pg_timeout=15, timeout=60)


def test_a_request_that_ends_inside_its_block_leaves_nothing():
    def body(rank, size):
        with compactdist.wrap(**OPTIONS) as g:
            for i in range(5):
                request = g.request(f"r{i}")
                with request.resume():
                    g.step()
                    _call(g, rank, 0)
                    request.end()
                    _call(g, rank, 1)
            assert g.stats().state_bytes == 0
            assert not g._engine.store.sites()

    run_ranks(body, pg_timeout=15, timeout=60)


def test_a_name_that_lies_under_another_one_is_refused():
    """The end of ``tenant`` would drop the history of ``tenant/1``."""

    def body(rank, size):
        with compactdist.wrap(**OPTIONS) as g, pytest.raises(ConfigError, match=r"'/' ends that part.*'tenant-1'"):
            g.request("tenant/1")

    run_ranks(body, 2)


def test_no_key_branch_or_module_is_taken_for_a_request():
    def body(rank, world_size):
        with compactdist.wrap(**OPTIONS) as g:
            for name in ("request:a", "request:a/layer"):
                for scope in (g.key, g.branch):
                    with pytest.raises(ConfigError, match=r"'request:a.*begins with 'request:'.*Name it 'request-a"):
                        scope(name).__enter__()
            model = torch.nn.Module()
            model.add_module("request:a", torch.nn.Identity())
            with pytest.raises(ConfigError, match="begins with 'request:'"):
                g.attach(model)
            with g.key("a request:a"), g.step():
                pass

    run_ranks(body, world_size=1)
