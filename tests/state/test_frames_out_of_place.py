"""A frame that is not the one due changes nothing and is refused; the right one still decodes."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from compactdist.errors import CodecConfigError, ConfigError, FrameError, NonFiniteError, UnknownCodecError
from compactdist.state import Layout, ResidualDecoder, ResidualEncoder
from tests.state import kit


def state_of(decoder):
    stream = decoder._stream
    copied = [t.clone() for t in stream.predictor.held]
    return copied, stream.sequence, stream.live, stream.view, decoder._epoch


def check_refused(decoder, frame):
    before = state_of(decoder)
    with pytest.raises(FrameError):
        decoder.decode(frame)
    after = state_of(decoder)
    assert all(kit.same_bytes(a, b) for a, b in zip(before[0], after[0], strict=True))
    assert before[1:] == after[1:]


lossy_options = kit.stream_options().filter(lambda o: o["codec"] != "raw")


@given(
    options=kit.stream_options(),
    due=st.integers(0, 6),
    arriving=st.integers(0, 6),
    n=st.sampled_from([64, 300]),
)
def test_lost_repeated_and_reordered(options, due, arriving, n):
    """Seven frames of one tensor: any but the one due is refused, then the one due still decodes."""
    assume(due != arriving)
    encoder, decoder = kit.pair(**options)
    frames = [encoder.encode(torch.randn(n)) for _ in range(7)]
    for frame in frames[:due]:
        decoder.decode(frame)
    check_refused(decoder, frames[arriving])
    for frame in frames[due:]:
        decoder.decode(frame)
    kit.check_in_step(encoder, decoder)


@settings(max_examples=30)
@given(
    options=kit.stream_options(),
    sizes=st.lists(st.sampled_from([64, 300]), min_size=4, max_size=4),
    data=st.data(),
)
def test_lost_repeated_and_reordered_across_sizes(options, sizes, data):
    encoder, decoder = kit.pair(**options)
    frames = [encoder.encode(torch.randn(n)) for n in sizes]
    due = data.draw(st.integers(0, 3))
    arriving = data.draw(st.integers(0, 3))
    assume(due != arriving)
    for frame in frames[:due]:
        decoder.decode(frame)
    check_refused(decoder, frames[arriving])
    for frame in frames[due:]:
        decoder.decode(frame)
    kit.check_in_step(encoder, decoder)


def test_lost_and_repeated_nan_keyframes():
    encoder, decoder = kit.pair(codec="int4", keyframe="raw")
    frames = [encoder.encode(torch.full((64,), float("nan"))) for _ in range(3)]
    check_refused(decoder, frames[1])
    decoder.decode(frames[0])
    check_refused(decoder, frames[0])
    check_refused(decoder, frames[2])
    decoder.decode(frames[1])


@given(options=lossy_options, codec=st.sampled_from(kit.LOSSY), after=st.integers(1, 3))
def test_another_codec(options, codec, after):
    assume(codec != options["codec"])
    encoder, decoder = kit.pair(**options)
    other = ResidualEncoder(**{**options, "codec": codec})
    for _ in range(after):
        x = torch.randn(100)
        other.encode(x)
        decoder.decode(encoder.encode(x))
    check_refused(decoder, other.encode(x))
    decoder.decode(encoder.encode(x))
    kit.check_in_step(encoder, decoder)


@given(options=kit.stream_options())
def test_another_epoch(options):
    encoder, decoder = kit.pair(**options)
    decoder.decode(encoder.encode(torch.randn(100)))
    late = copy.deepcopy(encoder).encode(torch.randn(100))
    encoder.reset()
    first = encoder.encode(torch.randn(100))
    check_refused(decoder, first)
    decoder.reset()
    check_refused(decoder, late)
    decoder.decode(first)
    kit.check_in_step(encoder, decoder)


def test_a_hint_on_one_end_only():
    x = torch.randn(400)
    encoder, decoder = ResidualEncoder("int4", layout=Layout("(s d) -> 1 s d", d=20)), ResidualDecoder("int4")
    with pytest.raises(FrameError, match=r"wrong layout: the frame says \(1, 20, 20, .*, expected \(1, 4, 128, 0\)"):
        decoder.decode(encoder.encode(x))
    encoder, decoder = (
        ResidualEncoder("int4", keyframe="raw", layout=encoder.layout),
        ResidualDecoder("int4", keyframe="raw"),
    )
    decoder.decode(encoder.encode(x))
    with pytest.raises(FrameError, match="wrong layout"):
        decoder.decode(encoder.encode(x))


@pytest.mark.parametrize("position", [0, 4, 5, 40, 100, 143])
def test_a_damaged_frame_leaves_the_stream_as_it_was(position):
    encoder, decoder = kit.pair(codec="int4")
    decoder.decode(encoder.encode(torch.randn(100)))
    frame = encoder.encode(torch.randn(100))
    damaged = frame.clone()
    damaged[position] ^= 0x55
    check_refused(decoder, damaged)
    check_refused(decoder, frame[:-1])
    decoder.decode(frame)
    kit.check_in_step(encoder, decoder)


def test_a_frame_made_for_a_group():
    from compactdist import wire

    frame = ResidualEncoder("int4")._stream.stage(torch.randn(64), ResidualEncoder("int4").codec, keyframe=True).frame
    assert wire.unpack(frame, "here").shape is None
    with pytest.raises(FrameError, match="made for a process group"):
        ResidualDecoder("int4").decode(frame)


@pytest.mark.parametrize("offset", [1, 2, 7])
def test_frames_at_any_offset(offset):
    encoder, decoder = kit.pair(codec="int4")
    for _ in range(3):
        frame = encoder.encode(torch.randn(300))
        moved = torch.zeros(frame.numel() + offset, dtype=torch.uint8)
        moved[offset:] = frame
        decoder.decode(moved[offset:])
        kit.check_in_step(encoder, decoder)


def encoder_state(encoder):
    stream = encoder._stream
    return stream.sequence, stream.live, stream.view, encoder._frames


@pytest.mark.parametrize("codec", kit.LOSSY)
@pytest.mark.parametrize("order", [0, 1, 2, "auto"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nonfinite_residual_raises_and_loses_nothing(codec, order, bad):
    encoder, decoder = kit.pair(codec=codec, order=order)
    for _ in range(3):
        decoder.decode(encoder.encode(torch.randn(300)))
    state, facts = None if encoder.state is None else encoder.state.clone(), encoder_state(encoder)
    x = torch.randn(300)
    x[17] = bad
    with pytest.raises(NonFiniteError, match="NaN"):
        encoder.encode(x)
    assert kit.same_bytes(encoder.state, state)
    assert encoder_state(encoder) == facts
    decoder.decode(encoder.encode(torch.randn(300)))
    kit.check_in_step(encoder, decoder)


@given(options=kit.stream_options(), bad=st.sampled_from([float("nan"), float("inf"), float("-inf")]))
def test_nonfinite_raw_keyframe_is_delivered_and_restarts(options, bad):
    encoder, decoder = kit.pair(**{**options, "keyframe": "raw"})
    x = torch.randn(100)
    x[3] = bad
    assert kit.same_bytes(decoder.decode(encoder.encode(x)), x)
    kit.check_in_step(encoder, decoder)
    for _ in range(4):
        decoder.decode(encoder.encode(torch.randn(100)))
        kit.check_in_step(encoder, decoder)


@pytest.mark.parametrize(
    "arguments",
    [
        {"order": 3},
        {"order": -1},
        {"order": 2, "damping": -0.1},
        {"order": 2, "damping": 1.1},
        {"order": 2, "damping": float("nan")},
        {"order": 1, "damping": 0.5},
        {"warmup_steps": -1},
        {"warmup_steps": 1.0},
        {"warmup_steps": True},
        {"order": 0, "error_feedback": True},
        {"state": "int4"},
        {"state": None},
    ],
)
def test_impossible_options(arguments):
    for end in (ResidualEncoder, ResidualDecoder):
        with pytest.raises(ConfigError):
            end("int4", **arguments)
        with pytest.raises(UnknownCodecError):
            end("no-such-codec")


def test_what_cannot_be_encoded():
    encoder = ResidualEncoder("int4")
    with pytest.raises(CodecConfigError, match="float64"):
        encoder.encode(torch.zeros(4, dtype=torch.float64))
    with pytest.raises(ConfigError, match="at most 8 dimensions"):
        encoder.encode(torch.zeros((1,) * 9))
    assert encoder_state(encoder) == (0, None, None, 0)
