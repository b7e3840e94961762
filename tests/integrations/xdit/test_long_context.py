"""yunchang's LongContextAttention over compressed groups, and the layouts of what it sends."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from compactdist_xdit import long_context
from compactdist_xdit.long_context import LongContextSites
from tests.integrations.xdit.ranks import run_worker

pytestmark = [pytest.mark.xdit, pytest.mark.slow, pytest.mark.timeout(240)]

STEPS, B, S, H, D = 8, 2, 64, 4, 16
ROUTES = ["1 x 4", "4 x 1", "2 x 2", "xfuser 2", "xfuser 4"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    out = tmp_path_factory.mktemp("long_context") / "out.json"
    run_worker("long_context_worker.py", out, ranks=4)
    return json.loads(out.read_text())


@pytest.mark.parametrize("route", ROUTES)
def test_raw_is_the_uncompressed_attention(ranks, route):
    assert max(max(rank[f"raw {route}"]["errors"]) for rank in ranks) < 1e-6


@pytest.mark.parametrize("route", ROUTES)
def test_int4_is_close(ranks, route):
    for rank in ranks:
        errors = rank[f"int4 {route}"]["errors"]
        assert 0 < errors[0] < 0.02  # of a keyframe coded in eight bits
        assert 0 < max(errors) < 0.05
        assert rank[f"int4 {route}"]["passed"] == {}


def test_each_rank_encodes_keys_and_values_once_and_passes_on_the_rest(ranks):
    for me, rank in enumerate(ranks):
        pair = f"RING_PG ring/send/{me}>{(me + 1) % 4}/t0"
        expected = {f"{pair}#{i}": [STEPS, 0 if i < 2 else STEPS] for i in range(6)}
        assert rank["int4 1 x 4"]["sites"] == expected


def test_passing_on_loses_nothing(ranks):
    def mean(route):
        return sum(sum(rank[route]["errors"]) for rank in ranks)

    assert mean("int4 1 x 4") < 0.95 * mean("int4 encoded at each hop")


def test_the_alltoall_rotater_passes_on_too(ranks):
    for rank in ranks:
        for size in (2, 4):
            expected = {f"kv/all_to_all#{h}": [STEPS, STEPS if h else 0] for h in range(size - 1)}
            assert rank[f"int4 xfuser {size}"]["sites"] == expected


def test_every_site_has_its_name_and_layout(ranks):
    tokens = S // 4
    for rank in ranks:
        ring = rank["int4 1 x 4"]["layouts"]
        assert len(ring) == 6
        assert all(layout == [1, B * tokens, H * D, True] for layout in ring.values())
        ulysses = rank["int4 4 x 1"]["layouts"]
        assert ulysses == {
            **{f"ULYSSES_PG in/all_to_all#{i}": [1, B * tokens, D, True] for i in range(3)},
            "ULYSSES_PG out/all_to_all#0": [1, B * tokens, D, True],
        }
        both = rank["int4 2 x 2"]["layouts"]
        assert len(both) == 6
        assert all(layout[3] for layout in both.values())


def tokens_by_channels(x, part):
    """`(B, S, H, D)` to `(B * S, H * D)`."""
    return part(x).reshape(-1, part(x).shape[2] * part(x).shape[3])


@pytest.mark.parametrize("packed", [False, True])
def test_layouts_fit_what_yunchang_packs(packed, monkeypatch):
    from yunchang.comm import all_to_all

    sent = []

    class Group(SimpleNamespace):
        def size(self):
            return 2

    def record(output, x, group=None):
        sent.append(x.clone())
        output.copy_(x)

    fake = SimpleNamespace(all_to_all_single=record, get_world_size=lambda group=None: 2)
    monkeypatch.setattr(all_to_all, "dist", fake)
    function, n = (all_to_all.all_to_all_5D, (3,)) if packed else (all_to_all.all_to_all_4D, ())
    heads = len(n) + 2
    x = torch.randn(B, S, *n, H, D)
    function(x, heads, 1, group=Group())
    function(x, 1, heads, group=Group())
    for scatter, wire in zip((heads, 1), sent, strict=True):
        layout = long_context._exchanged(2, x, scatter)(wire[1].numel())
        matrix = layout.resolve(wire[1].numel()).to_matrix(wire[1].reshape(-1))
        chunk = x.chunk(2, scatter)[1]
        parts = list(chunk.unbind(2)) if packed else [chunk]
        expected = torch.stack([part.reshape(-1, part.shape[2] * D) for part in parts])
        assert torch.equal(matrix, expected)


def test_nothing_is_left_behind_and_strangers_are_left_alone(monkeypatch):
    from yunchang.comm import all_to_all
    from yunchang.ring.utils import RingComm

    before = all_to_all.all_to_all_4D, all_to_all.all_to_all_5D, RingComm.commit
    calls = []
    monkeypatch.setattr(RingComm, "commit", lambda comm: calls.append(comm))
    sites = LongContextSites({"ring": SimpleNamespace()})
    sites.install()
    with pytest.raises(RuntimeError, match="already"):
        sites.install()
    stranger = SimpleNamespace(_process_group=SimpleNamespace(), _ops=[])
    RingComm.commit(stranger)
    assert calls == [stranger]
    assert sites.layout_of(SimpleNamespace(numel=4)) is None
    sites.remove()
    sites.remove()
    monkeypatch.undo()
    assert (all_to_all.all_to_all_4D, all_to_all.all_to_all_5D, RingComm.commit) == before


def test_only_known_sizes_have_a_layout():
    expected = long_context._turning([torch.empty(B, S, H, D), torch.empty(B, S, H, D), torch.empty(7)])
    assert expected(B * S * H * D).resolve(B * S * H * D).shape == (1, B * S, H * D)
    assert expected(7) is None
