"""Sites, their streams, and the memory they may take."""

from __future__ import annotations

import pytest
import torch

from compactdist.state import Site, StateStore, StreamConfig, state_nbytes

INT4 = "int4"


def store(budget: int | None = None, **config) -> StateStore:
    return StateStore(StreamConfig(**config), "group 'g', rank 0", budget)


def feed(site: Site, peer: int, n: int = 100) -> None:
    from compactdist import codecs

    encoder = site.encoder(peer)
    encoder.commit(encoder.stage(torch.randn(n), codecs.get(INT4), keyframe=True))


def test_a_site_is_made_once():
    s = store()
    assert s.site("a") is s.site("a")
    assert s.site("a") is not s.site("b")
    assert [site.key for site in s.sites()] == ["a", "b"]
    site = s.site("a")
    assert site.encoder(1) is site.encoder(1)
    assert site.encoder(1) is not site.encoder(2)
    assert site.encoder(1) is not site.decoder(1)
    for stream in (site.encoder(1), site.decoder(1)):
        assert "group 'g', rank 0, site 'a'" in stream.where
        assert "rank 1" in stream.where


def test_budget_is_kept():
    s = store(100)
    a, b = s.site("a"), s.site("b")
    assert s.reserve(a, 0, "x", 60)
    assert s.reserve(a, 0, "x", 60), "the same again is free"
    assert not s.reserve(b, 0, "x", 41)
    assert s.reserve(b, 0, "x", 40)
    assert not s.reserve(b, 1, "x", 1)
    assert s.reserve(a, 0, "y", 10), "another amount replaces the old"
    assert s.reserve(b, 1, "x", 50)
    assert not s.reserve(b, 2, "x", 1)


def test_a_refused_stream_gives_back_and_is_forgotten():
    s = store(1000)
    a = s.site("a")
    assert s.reserve(a, 1, "x", 1000)
    feed(a, 1)
    feed(a, 2)
    s.refuse(a, 1)
    assert a.refused == {1}
    assert a.encoder(1).live is None
    assert a.encoder(2).live is not None
    assert s.reserve(s.site("b"), 0, "x", 1000)


def test_refusing_all_forgets_every_stream():
    s = store()
    a = s.site("a")
    feed(a, 1)
    feed(a, 2)
    s.refuse(a, Site.ALL)
    assert a.state_bytes == 0


def test_reset_gives_everything_back():
    s = store(100)
    a = s.site("a")
    assert s.reserve(a, 0, "x", 100)
    feed(a, 0)
    assert s.state_bytes() == {"a": 400}
    s.reset()
    assert s.sites() == []
    assert s.state_bytes() == {}
    assert s.site("a") is not a
    assert s.reserve(s.site("a"), 0, "x", 100)


def test_an_exchange_in_flight_across_a_reset_gives_nothing_back_twice():
    s = store(100)
    a = s.site("a")
    assert s.reserve(a, Site.ALL, "x", 80)
    s.reset()
    s.refuse(a, Site.ALL)
    assert not s.reserve(s.site("b"), Site.ALL, "x", 150)
    assert s.reserve(s.site("b"), Site.ALL, "x", 100)


def test_an_exchange_in_flight_across_a_reset_takes_nothing_either():
    """A receive posted before a reset reserves when its frame is decoded, which nothing would give back."""
    s = store(100)
    a = s.site("a")
    s.reset()
    assert s.reserve(a, 1, "x", 100, force=True)
    again = s.site("a")
    assert s.reserve(a, 2, "x", 100)
    assert s.reserve(again, 1, "x", 100)
    assert not s.reserve(again, 2, "x", 1)


def test_reset_of_a_prefix():
    s = store(100)
    keys = ["cond/a#0", "cond/deep/a#0", "condition/a#0", "uncond/a#0", "cond"]
    for key in keys:
        assert s.reserve(s.site(key), 0, "x", 20)
    s.reset("cond")
    assert [site.key for site in s.sites()] == ["condition/a#0", "uncond/a#0"]
    assert s.reserve(s.site("new"), 0, "x", 60)
    assert not s.reserve(s.site("new"), 1, "x", 1)


@pytest.mark.parametrize(
    ("config", "sender", "copies"),
    [
        ({"order": 0}, True, 0),
        ({"order": 0}, False, 0),
        ({"order": 1}, True, 1),
        ({"order": 1}, False, 1),
        ({"order": 2}, True, 2),
        ({"order": 2}, False, 2),
        ({"order": 1, "error_feedback": False}, True, 2),
        ({"order": 1, "error_feedback": False}, False, 1),
        ({"order": 2, "error_feedback": False}, True, 4),
    ],
)
def test_state_nbytes_is_what_a_stream_holds(config, sender, copies):
    nbytes = state_nbytes(StreamConfig(**config), 100, torch.bfloat16, sender=sender)
    assert nbytes == copies * 200
