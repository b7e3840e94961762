"""Rates in a closed loop: targets are met, both ends follow what frames announce, and what is wrong is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from compactdist import codecs
from compactdist.config import Options
from compactdist.errors import ConfigError, FrameError
from compactdist.presets import with_steered_codec
from compactdist.state import RateControl, ResidualDecoder, ResidualEncoder, StreamConfig, StreamDecoder, StreamEncoder
from compactdist.state.rate import Measured, StreamRate
from compactdist.state.relay import same_state
from compactdist.state.staged import Wanted
from compactdist.state.target import Target
from compactdist.wire import KEYFRAME, STAND_IN, payload_of, seal, unpack
from tests.state import kit

ROWS, CHANNELS, STEPS = 48, 64, 24


def values(seed: int, steps: int = STEPS, change: float = 0.15) -> list[torch.Tensor]:
    """A slowly changing tensor; changes are large first and last, and their channels correlated."""
    g = torch.Generator().manual_seed(seed)
    mixed = torch.randn(12, CHANNELS, generator=g)
    x = torch.randn(ROWS, 12, generator=g) @ mixed
    made = []
    for step in range(steps):
        size = change * (1 + 2 * abs(2 * step / (steps - 1) - 1))
        x = x + size * (torch.randn(ROWS, 12, generator=g) @ mixed + 0.2 * torch.randn(ROWS, CHANNELS, generator=g))
        made.append(x.clone())
    return made


def play(encoder: ResidualEncoder, decoder: ResidualDecoder, xs: list[torch.Tensor]) -> list[int]:
    """Sends tensors; returns the rate of each frame, 0 for a keyframe."""
    rates = []
    for x in xs:
        frame = encoder.encode(x)
        decoder.decode(frame)
        kit.check_in_step(encoder, decoder)
        assert encoder._stream.rate == decoder._stream.rate
        rates.append(unpack(frame, "here").rate)
    return rates


@pytest.mark.parametrize("codec", ["rates", "rates:rungs=trellis", "rates:rungs=scalar"])
@pytest.mark.parametrize(("order", "state"), [(1, "exact"), (2, "int8")])
def test_an_error_is_met(codec, order, state):
    encoder, decoder = kit.pair(codec=codec, target="nmse_db=-26", order=order, state=state)
    rates = play(encoder, decoder, values(0))
    assert encoder.met is not None
    assert abs(encoder.met.met + 26) < 1
    assert len(set(rates)) > 2  # the keyframe's 0, and several rates


@pytest.mark.parametrize("target", ["nmse_db=-26", "bits=1.8"])
def test_differences_beyond_float32_are_measured(target):
    """Of signs that change the residual is up to 6e38, and it has an energy all the same."""
    encoder, decoder = kit.pair(target=target)
    g = torch.Generator().manual_seed(0)
    sign = torch.randn(ROWS, CHANNELS, generator=g).sign()
    play(encoder, decoder, [sign * 3e38 * (-1) ** step for step in range(4)])
    play(encoder, decoder, values(1))
    assert encoder.met is not None
    assert math.isfinite(encoder.met.nmse_db)
    assert len(encoder.encode(values(1)[-1])) < 3 * ROWS * CHANNELS / 8  # the highest rate has six bits


@pytest.mark.parametrize("target", ["nmse_db=4000", "nmse_db=-4000", "bits=-1", "bits=inf"])
def test_what_no_target_can_be(target):
    with pytest.raises(ConfigError, match="decibels from -300 to 300"):
        kit.pair(target=target)


@pytest.mark.parametrize("target", ["bits=1.8", "bits=4", "bytes_per_step=900"])
def test_a_size_is_met(target):
    encoder, decoder = kit.pair(target=target)
    play(encoder, decoder, values(1))
    met = encoder.met
    assert met is not None
    assert met.met == pytest.approx(met.asked.value, rel=0.05)
    assert met.request_bits > met.bits  # the keyframe has more
    assert met.bytes_per_step == pytest.approx(met.bits * ROWS * CHANNELS / 8)


@pytest.mark.parametrize("order", [1, 2, "auto"])
@pytest.mark.parametrize("keyframe", ["int8", "raw", "int4"])
def test_another_request_half_way(order, keyframe):
    """The tensors of another request: a keyframe that nobody was told of, and the target is met all the time."""
    encoder, decoder = kit.pair(target="nmse_db=-26", order=order, keyframe=keyframe)
    first, second = values(2), values(3)
    errors, kinds = [], []
    for x in (*first, *second):
        frame = encoder.encode(x)
        y = decoder.decode(frame)
        kit.check_in_step(encoder, decoder)
        kinds.append(unpack(frame, "here").is_keyframe)
        errors.append(float((y - x).square().sum() / x.square().sum()))
    assert [at for at, is_keyframe in enumerate(kinds) if is_keyframe] == [0, len(first)]
    if keyframe != "int4":  # whose error is near what is asked for
        assert errors[len(first)] < 10**-2.6
    settled = errors[len(first) + 1 :]
    assert 10 * math.log10(sum(settled) / len(settled)) < -25
    assert encoder.met.met < -25


def test_a_keyframe_with_more_error_is_not_sent():
    """A keyframe of one bit would lose more than a residual of its size, whether that misses the target or not."""
    encoder, decoder = kit.pair(target="nmse_db=-26", keyframe="binary")
    kinds = []
    for x in (*values(2), *values(3)):
        frame = encoder.encode(x)
        decoder.decode(frame)
        kit.check_in_step(encoder, decoder)
        kinds.append(unpack(frame, "here").is_keyframe)
    assert sum(kinds) == 1


def test_a_keyframe_that_is_not_sent_changes_no_rate(monkeypatch):
    """It was counted as sent at the rate after a keyframe, and what that loses was learnt from it."""
    encoder, decoder = kit.pair(target="nmse_db=-28", keyframe="int2")
    stage_key, sent, made, counted = StreamEncoder._stage_keyframe, StreamRate.sent, [], []

    def noted(stream, *given, **others):
        made.append(stage_key(stream, *given, **others))
        return made[-1]

    def counts(rate, *given):
        counted.append((rate.rate, encoder._stream.rate_of(encoder.codec)))
        sent(rate, *given)

    monkeypatch.setattr(StreamEncoder, "_stage_keyframe", noted)
    monkeypatch.setattr(StreamRate, "sent", counts)
    for step, (x, other) in enumerate(zip(values(2, 9), values(3, 9), strict=True)):
        frame = encoder.encode(x if step < 5 else other)
        decoder.decode(frame)
        kit.check_in_step(encoder, decoder)
        assert unpack(frame, "here").is_keyframe == (step == 0)
    assert len(made) == 2, "the one that was sent, and one that has more error than the residual"
    assert all(one == other for one, other in counted[1:]), counted


@pytest.mark.parametrize("order", [1, 2, "auto"])
def test_an_open_loop_goes_on_after_another_request(order):
    """A sender predicted with a velocity across the change, which its receiver had forgotten."""
    encoder, decoder = kit.pair(target="nmse_db=-26", codec="rates:rungs=scalar", order=order, error_feedback=False)
    g, errors = torch.Generator().manual_seed(0), []
    x = torch.randn(ROWS, CHANNELS, generator=g)
    for step in range(10):
        x = torch.randn(ROWS, CHANNELS, generator=g) if step == 5 else x
        x = x + 0.05 * torch.randn(ROWS, CHANNELS, generator=g)
        y = decoder.decode(encoder.encode(x))
        errors.append(10 * math.log10(float((y - x).square().sum() / x.square().sum())))
    assert max(errors[5:]) < -20


def test_a_size_that_is_asked_for_is_kept():
    encoder, decoder = kit.pair(target="bits=1.5")
    sizes = []
    for x in (*values(2), *values(3)):
        frame = encoder.encode(x)
        decoder.decode(frame)
        sizes.append(frame.numel())
    assert max(sizes[1:]) < sizes[0], "only the first frame is a keyframe"


def test_a_stand_alone_stream_knows_no_stand_ins():
    encoder, decoder = kit.pair(target="nmse_db=-26")
    frame = encoder.encode(values(2)[0])
    seal(frame, replace(unpack(frame, "here"), flags=KEYFRAME | STAND_IN))
    with pytest.raises(FrameError, match=r"wrong flags.*Nothing was applied"):
        decoder.decode(frame)


def test_a_keyframe_is_announced_where_a_residual_would_cost_more():
    """Tensors of noise, each another: no residual is worth coding, and 8 bits of a keyframe do better than 6."""
    encoder, decoder = kit.pair(codec="rates:rungs=int4+int8", target="nmse_db=-60")
    g = torch.Generator().manual_seed(0)
    kinds = []
    for _ in range(6):
        frame = encoder.encode(torch.randn(ROWS, CHANNELS, generator=g))
        decoder.decode(frame)
        kit.check_in_step(encoder, decoder)
        kinds.append(unpack(frame, "here").is_keyframe)
    assert kinds[0]
    assert any(kinds[2:])


def test_a_short_request_and_what_the_next_ones_know():
    """A request of four steps has no time to learn, and keeps below the error; later ones of its kind come near it."""
    encoder, decoder = kit.pair(target="nmse_db=-26")
    off = []
    for _ in range(3):
        play(encoder, decoder, values(4, 4, 0.1))
        off.append(encoder.met.met + 26)
        encoder.reset()
        decoder.reset()
        assert encoder._stream.rate == 0
        assert math.isnan(encoder.met.met)
    assert off[0] < 1
    assert abs(off[2]) < 1


def _steered(target: str, count: int) -> list[tuple[StreamEncoder, StreamDecoder]]:
    control, config = RateControl(Target.parse(target)), StreamConfig(find_layout=False)
    ends = []
    for number in range(count):
        encoder, decoder = StreamEncoder(config, number, "a"), StreamDecoder(config, number, "b")
        encoder.steers = control.stream((f"site {number}", 0))
        ends.append((encoder, decoder))
    return ends


def test_sites_share_a_size():
    """Bits go to the site that changes more, and the two have about one relative error."""
    ends, codec = _steered("bits=2", 2), codecs.get("rates")
    given = [values(5, change=0.02), values(6, change=0.4)]
    errors, sizes = [0.0, 0.0], [0, 0]
    for step in range(STEPS):
        for at, (encoder, decoder) in enumerate(ends):
            x = given[at][step].reshape(-1)
            staged = encoder.stage(x, codec, Wanted(step=step), keyframe=step == 0)
            encoder.commit(staged)
            y = decoder.decode(staged.frame, codec, x.numel(), x.dtype, step=step)
            if step > 3:
                errors[at] += float((y - x).square().sum() / x.square().sum())
                sizes[at] += staged.frame.numel()
    assert sizes[1] > 1.5 * sizes[0]
    assert 8 * sum(sizes) / (2 * (STEPS - 4) * ROWS * CHANNELS) == pytest.approx(2, rel=0.05)
    assert abs(10 * math.log10(errors[0] / errors[1])) < 4


def test_a_withdrawn_frame_leaves_no_trace():
    (encoder, decoder), codec = _steered("nmse_db=-30", 1)[0], codecs.get("rates")
    for step, value in enumerate(values(7, 6)):
        x = value.reshape(-1)
        for again in range(2):
            staged = encoder.stage(x, codec, Wanted(step=step), keyframe=step == 0)
            if not again:
                first = staged.frame.clone()
                encoder.withdraw(staged)
        assert torch.equal(first, staged.frame)
        encoder.commit(staged)
        decoder.decode(staged.frame, codec, x.numel(), x.dtype, step=step)


def test_a_wrong_rate_is_refused():
    (encoder, decoder), codec = _steered("nmse_db=-30", 1)[0], codecs.get("rates")
    xs = [x.reshape(-1) for x in values(8, 3)]
    for step, x in enumerate(xs):
        staged = encoder.stage(x, codec, Wanted(step=step), keyframe=step == 0)
        header = unpack(staged.frame, "here")
        wrong = [replace(header, rate=header.rate + 1), replace(header, next_rate=codec.rates + 1)]
        for bad in wrong:
            frame = staged.frame.clone()
            seal(frame, bad)
            with pytest.raises(FrameError, match=r"wrong (rate|announcement).*Nothing was applied"):
                decoder.decode(frame, codec, x.numel(), x.dtype, step=step)
        assert payload_of(staged.frame, header).numel() == header.payload_nbytes
        encoder.commit(staged)
        decoder.decode(staged.frame, codec, x.numel(), x.dtype, step=step)


def test_streams_at_other_rates_are_not_in_the_same_state():
    ends, codec = _steered("nmse_db=-30", 1), codecs.get("rates:rungs=scalar")
    encoder, decoder = ends[0]
    x = values(9, 2)[0].reshape(-1)
    staged = encoder.stage(x, codec, keyframe=True)
    encoder.commit(staged)
    decoder.decode(staged.frame, codec, x.numel(), x.dtype)
    assert encoder.rate
    assert same_state(encoder, decoder)
    decoder._change_rate(encoder.rate % codec.rates + 1)
    assert not same_state(encoder, decoder)


def test_targets_as_text():
    assert Target.parse("bits=1.50") == Target("bits", 1.5)
    assert str(Target.parse("bytes_per_step=2e6")) == "bytes_per_step=2e+06"
    for wrong in ("bits", "bits=0", "bits=x", "snr=3", "nmse_db=nan", "bytes_per_step=-1"):
        with pytest.raises(ConfigError, match="target"):
            Target.parse(wrong)


def test_a_codec_of_one_rate_follows_no_target():
    for make in (lambda: ResidualEncoder("int4", target="bits=2"), lambda: Options(codec="int4", target="bits=2")):
        with pytest.raises(ConfigError, match="just one: leave codec out, or give codec='rates'"):
            make()
    assert ResidualDecoder(target="bits=2").codec == codecs.get("rates")
    steered = with_steered_codec({"target": "bits=2", "codec": "int2"}, {"preset": "balanced", "target": "bits=2"})
    assert Options(**steered).default_codec == codecs.get("rates")
    assert with_steered_codec({"codec": "int2"}, {}) == {"codec": "int2"}


def test_what_is_measured():
    x, base, value = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 2.0]), torch.tensor([2.0, 4.0])
    assert Measured.of(x, (base,), value) == Measured(energy=25, residual=4, error=1)


def test_another_thread_may_ask_what_was_met(monkeypatch):
    """As one that exports metrics, while calls begin streams: here a stream begins whenever one is looked at."""
    control = RateControl(Target.parse("bits=2"))

    def look(stream: StreamRate) -> bool:
        control.stream((f"new{len(control._streams)}", 1))
        return False

    sums = control.stream(("first", 1)).sums
    control.stream(("second", 1))
    monkeypatch.setattr(StreamRate, "is_known", property(look))
    assert control.rates() == {}
    control.begin_step(1)
    monkeypatch.setattr(
        StreamRate, "sums", property(lambda stream: look(stream) or sums, lambda stream, _: None), raising=False
    )
    assert math.isnan(control.met().bits)
