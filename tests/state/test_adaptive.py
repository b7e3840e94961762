"""Order "auto": the sender chooses how much of the last change to add, and the header says it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from compactdist import codecs, wire
from compactdist.cli.evaluate import Setting, play_sites, recorded
from compactdist.cli.score import Score
from compactdist.errors import ConfigError, FrameError
from compactdist.observe.trace import Trace
from compactdist.state import StreamConfig
from compactdist.state.adaptive import _SAMPLES, _sample
from compactdist.state.quantized_history import make_predictor
from tests.state import kit

TRACES = Path(__file__).parents[2] / "benchmarks" / "traces"


def ramp(steps: int, n: int = 2000) -> list[torch.Tensor]:
    start, slope = torch.randn(2, n)
    return [start + t * slope for t in range(steps)]


def said(frame: torch.Tensor) -> float:
    return wire.unpack(frame, "test").coefficient


def test_it_follows_a_steady_change_and_rests_with_a_resting_tensor():
    encoder, decoder = kit.pair(codec="int8", order="auto")
    chosen = []
    for x in ramp(8):
        frame = encoder.encode(x)
        chosen.append(said(frame))
        y = decoder.decode(frame)
    assert chosen[:2] == [0, 0], "one history has no velocity"
    assert chosen[3:] == [1] * 5
    assert float((y - x).norm() / x.norm()) < 1e-3
    rest = [said(encoder.encode(x)) for _ in range(3)]
    assert rest[0] == 0


def test_noise_is_averaged():
    """Two reconstructions of one value that moves at random say more than the last one."""
    encoder, _ = kit.pair(codec="int8", order="auto")
    x = torch.randn(5000)
    chosen = [said(encoder.encode(x + torch.randn(5000))) for _ in range(6)]
    assert all(-0.7 < c < -0.3 for c in chosen[2:])


@pytest.mark.parametrize("state", ["exact", "int8"])
@pytest.mark.parametrize("codec", ["binary", "int4", "transform", "lowrank_int4"])
@pytest.mark.parametrize("dtype", kit.DTYPES)
def test_both_ends_hold_the_same_and_both_orders_of_terms_occur(codec, state, dtype):
    encoder, decoder = kit.pair(codec=codec, order="auto", state=state)
    chosen = set()
    for x in [*ramp(6, 64 * 48), torch.zeros(64 * 48), *ramp(4, 64 * 48)]:
        frame = encoder.encode(x.view(64, 48).to(dtype))
        chosen.add(said(frame))
        decoder.decode(frame)
        kit.check_in_step(encoder, decoder)
    assert 0 in chosen
    assert len(chosen) > 1
    assert all((16 * c).is_integer() and abs(c) <= 1 for c in chosen)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1.0625, -2.0, 0.03, 1e30])
def test_a_coefficient_that_no_sender_chooses_is_refused(value):
    encoder, decoder = kit.pair(codec="int4", order="auto")
    *first, last = ramp(5)
    for x in first:
        decoder.decode(encoder.encode(x))
    frame, before = encoder.encode(last), decoder.state.clone()
    header = wire.unpack(frame, "test")
    forged = wire.pack(replace(header, coefficient=value), wire.payload_of(frame, header))
    with pytest.raises(FrameError, match="wrong predictor"):
        decoder.decode(forged)
    assert kit.same_bytes(decoder.state, before)
    decoder.decode(frame)
    kit.check_in_step(encoder, decoder)


@pytest.mark.parametrize("which", [0, 1])
def test_keyframes_say_nothing_and_other_orders_no_other(which):
    order = ("auto", 1)[which]
    encoder, decoder = kit.pair(codec="int4", order=order)
    frames = [encoder.encode(x) for x in ramp(2)]
    for frame in frames[:which]:
        decoder.decode(frame)
    header = wire.unpack(frames[which], "test")
    forged = wire.pack(replace(header, coefficient=0.5), wire.payload_of(frames[which], header))
    with pytest.raises(FrameError, match="wrong predictor"):
        decoder.decode(forged)


def test_a_restart_forgets_the_velocity():
    encoder, decoder = kit.pair(codec="int4", order="auto")
    for x in ramp(5):
        decoder.decode(encoder.encode(x))
    small = torch.randn(2000) / 1000
    restart = encoder.encode(small)
    assert wire.unpack(restart, "test").flags & wire.RESTART
    assert said(restart) == 0
    decoder.decode(restart)
    following = encoder.encode(small)
    assert said(following) == 0
    decoder.decode(following)
    kit.check_in_step(encoder, decoder)


def test_huge_values_have_no_velocity_and_stay_finite():
    encoder, decoder = kit.pair(codec="int4", order="auto", keyframe="raw")
    for sign in (1, -1, 1, -1):
        frame = encoder.encode(torch.full((300,), sign * 3e38))
        assert said(frame) == 0
        assert decoder.decode(frame).isfinite().all()
        kit.check_in_step(encoder, decoder)


def test_large_tensors_are_sampled_everywhere():
    flat = torch.arange(10 * _SAMPLES + 77)
    sample = _sample(flat)
    assert sample.numel() == _SAMPLES
    assert int(sample.min()) < 1000
    assert int(sample.max()) > flat.numel() - 4000
    assert _sample(flat[:1000]).numel() == 1000


def test_what_it_costs_and_takes():
    assert StreamConfig("auto").predictor.copies == 2
    assert len(make_predictor("auto", 0.0, "exact").terms(0.5)) == 0
    with pytest.raises(ConfigError, match="takes none"):
        StreamConfig("auto", damping=0.5)
    with pytest.raises(ConfigError, match='or "auto"'):
        StreamConfig("always")  # type: ignore[arg-type]


def error_db(order, codec, entry) -> float:
    score = Score()
    play_sites(score, Setting(codecs.get(codec), StreamConfig(order, find_layout=False)), [entry])
    return 20 * math.log10(score.residuals.rel_error)


def worst_loss(trace: str, steps: int, codec: str) -> float:
    """Of all sites, the most dB that the error is above that of order 1."""
    entries = recorded(Trace(TRACES / f"{trace}.safetensors"), steps, 1)
    return max(error_db("auto", codec, entry) - error_db(1, codec, entry) for entry in entries)


@pytest.mark.parametrize("codec", ["binary", "int2", "int4"])
def test_no_site_is_worse_than_with_order_one(codec):
    assert worst_loss("digits_ring", 8, codec) < -1


@pytest.mark.slow
@pytest.mark.parametrize("trace", ["digits_ring", "photos_dit"])
@pytest.mark.parametrize("steps", [28, 8, 4])
@pytest.mark.parametrize("codec", ["binary", "int2", "int4", "transform:bits=1"])
def test_no_site_of_any_trace_is_worse_than_with_order_one(codec, steps, trace):
    assert worst_loss(trace, steps, codec) <= 0.1
