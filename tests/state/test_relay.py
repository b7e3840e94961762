"""A frame passed on from one stream to another, without any process group."""

from __future__ import annotations

import pytest
import torch

from compactdist import codecs
from compactdist.state import StreamConfig, StreamDecoder, StreamEncoder, plain
from compactdist.state import relay as r
from compactdist.state.matrix_view import Layout, MatrixView
from compactdist.state.relay import Received
from compactdist.state.staged import Wanted
from compactdist.wire import HEADER_NBYTES

CODEC = codecs.get("int4")
N = 256


class Chain:
    """A -> B -> C: B's decoder ``inner``, B's encoder ``outer`` and C's decoder ``last``."""

    def __init__(self, **config):
        self.config = StreamConfig(**{"keyframe": None} | config)
        self.first = StreamEncoder(self.config, 1, "a")
        self.inner = StreamDecoder(self.config, 1, "b")
        self.outer = StreamEncoder(self.config, 2, "b")
        self.last = StreamDecoder(self.config, 2, "c")

    def arrive(self, x):
        staged = self.first.stage(x, CODEC, keyframe=self.first.is_fresh(x.numel(), x.dtype))
        self.first.commit(staged)
        y = self.inner.decode(staged.frame, CODEC, x.numel(), x.dtype).clone()
        header = self.inner.header
        payload = staged.frame[HEADER_NBYTES : HEADER_NBYTES + header.payload_nbytes]
        return y, Received(self.inner, self.inner.sequence, header, self.inner.checksum, payload)

    def deliver(self, staged):
        self.outer.commit(staged)
        header = staged.header
        return self.last.decode(staged.frame, CODEC, header.numel, header.dtype).clone()


def x_at(t):
    return torch.linspace(-1, 1, N).sin() + 0.1 * torch.randn(N, generator=torch.Generator().manual_seed(t))


CONFIGS = [{}, {"state": "int8"}, {"error_feedback": False}]


# with a velocity a keyframe on a live stream is no beginning, so such a stream keeps its own history
@pytest.mark.parametrize(
    ("share", "config"),
    [*((s, c) for s in (True, False) for c in CONFIGS), (False, {"order": 2}), (False, {"order": "auto"})],
)
def test_both_receivers_stay_equal(share, config):
    chain = Chain(**config)
    y, received = chain.arrive(x_at(0))
    chain.deliver(chain.outer.stage(y, CODEC, keyframe=True))
    assert r.same_state(chain.outer, chain.inner)
    relay = r.join(chain.outer, chain.inner, share=share)
    for t in range(1, 6):
        y, received = chain.arrive(x_at(t))
        assert relay.expects(received)
        z = chain.deliver(r.pass_on(chain.outer, received, y, CODEC, 0, 0))
        relay.passed = received.sequence
        assert torch.equal(y, z)
        assert all(map(torch.equal, chain.last.predictor.held, chain.inner.predictor.held))
        assert (chain.outer.state_bytes == 0) == share
    # what follows is one's own business again, after a keyframe if there is no history
    r.leave(chain.outer, relay)
    assert relay.owes_keyframe == share
    for t in range(6, 9):
        keyframe = relay.owes_keyframe
        z = chain.deliver(chain.outer.stage(x_at(t), CODEC, keyframe=keyframe))
        assert torch.equal(z, x_at(t)) == keyframe
        assert not relay.owes_keyframe
        assert all(map(torch.equal, chain.last.predictor.held, chain.outer.predictor.held))
        assert (z - x_at(t)).norm() < 0.2 * x_at(t).norm()


@pytest.mark.parametrize("config", [*CONFIGS, {"order": 2}, {"order": "auto"}, {"order": 0}])
def test_a_coded_keyframe_is_passed_on_without_a_second_error(config):
    chain = Chain(keyframe=codecs.get("int4"), **config)
    y, received = chain.arrive(torch.randn(4096, generator=torch.Generator().manual_seed(0)))
    again = chain.outer.stage(y, CODEC, Wanted(value=True), keyframe=True)
    assert not torch.equal(again.value, y), "coded once more it would be something else"
    z = chain.deliver(r.pass_on(chain.outer, received, y, CODEC, 0, 0))
    assert torch.equal(y, z)
    assert r.same_state(chain.outer, chain.inner)
    assert all(map(torch.equal, chain.last.predictor.held, chain.inner.predictor.held))


def test_the_next_frame_is_the_one_after_the_last_passed_on():
    chain = Chain()
    y, _ = chain.arrive(x_at(0))
    chain.deliver(chain.outer.stage(y, CODEC, keyframe=True))
    relay = r.join(chain.outer, chain.inner, share=False)
    _, missed = chain.arrive(x_at(1))
    _, received = chain.arrive(x_at(2))
    assert relay.expects(missed)
    assert not relay.expects(received)
    assert not r.Relay(Chain().inner, relay.passed).expects(missed)


def test_states_differ_by_a_bit_a_size_or_a_view():
    def pair(x, y, hint=None):
        chain = Chain()
        chain.arrive(x)
        chain.outer.commit(chain.outer.stage(y, CODEC, Wanted(hint=hint), keyframe=True))
        return r.same_state(chain.outer, chain.inner)

    x, zero = x_at(0), x_at(0)
    x[9], zero[9] = 0.0, -0.0
    assert pair(x, x.clone())
    assert not pair(x, zero)
    assert not pair(x, x.half())
    assert not pair(x, x[:-1])
    assert not pair(x, x, Layout("(s d) -> 1 s d", d=32).resolve(N))
    assert not r.same_state(StreamEncoder(StreamConfig(), 1, ""), StreamDecoder(StreamConfig(), 1, ""))


@pytest.mark.parametrize("config", [{}, {"order": 2}, {"order": "auto"}, {"order": 0}, {"state": "fp8"}])
def test_untouched_means_the_same_bytes(config):
    chain = Chain(**config)
    x = x_at(0)
    x[3] = 0.0
    y, received = chain.arrive(x)
    exact = chain.config.remembers_values
    assert r.is_untouched(received, y) == exact  # nothing to compare with, unless a digest was taken
    if not exact:
        received.digest = r.digest_of(y)
    assert r.is_untouched(received, y)
    assert r.is_untouched(received, y.view(16, 16).t().contiguous().t())
    for touched in (y.clone().index_fill_(0, torch.tensor(3), -0.0), y + 1e-6, y.view(16, 16).t()):
        assert not r.is_untouched(received, touched)


def test_digests_of_odd_tensors():
    one = torch.randn(3, 5)[:1, 2]
    assert r.digest_of(one) == r.digest_of(one.clone())
    assert r.digest_of(torch.arange(6.0).view(2, 3).t()) == r.digest_of(torch.tensor([0.0, 3, 1, 4, 2, 5]))
    with torch.inference_mode():
        assert len(r.digest_of(torch.ones(3, dtype=torch.bfloat16))) == 16


def test_only_plain_cuts_can_be_announced():
    assert r.can_announce(plain(N, 2, 32))
    assert not r.can_announce(None)
    assert not r.can_announce(MatrixView(N - 1, 1, 2, 128))
    assert not r.can_announce(Layout("(s d) -> 1 s d", d=32).resolve(N))
    assert not r.can_announce(MatrixView(N, 1, 32, 8, (8, 32), (1, 0)))


def test_an_announcement_travels_in_a_keyframe():
    chain = Chain(find_layout=False)
    x = x_at(0)
    chain.deliver(chain.outer.stage(x, CODEC, keyframe=True))
    staged = chain.outer.stage(x_at(1), CODEC, keyframe=True)
    r.announce(staged, plain(N, 2, 32))
    chain.deliver(staged)
    assert chain.outer.view == chain.last.view == plain(N, 2, 32)
    z = chain.deliver(chain.outer.stage(x_at(2), CODEC, keyframe=False))
    assert (z - x_at(2)).norm() < 0.1 * x_at(2).norm()
