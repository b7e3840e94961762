"""Encoder and decoder hold the same bytes after every frame, whatever is sent."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compactdist import codecs
from compactdist.state import blocks
from compactdist.wire import HEADER_NBYTES, SHAPE_NBYTES, raw_nbytes, unpack
from tests.state import kit

actions = st.lists(
    st.one_of(
        st.tuples(st.just("send"), kit.shapes, st.sampled_from(kit.DTYPES), kit.strides, st.booleans()),
        st.tuples(st.just("again"), kit.strides),
        st.tuples(st.just("reset")),
    ),
    min_size=1,
    max_size=12,
)


def run(options, sequence, seed):
    g = torch.Generator().manual_seed(seed)
    encoder, decoder = kit.pair(**options)
    shape, dtype, scale, sent = (300,), torch.float32, 1.0, 0
    live = None
    for action in sequence:
        if action[0] == "reset":
            encoder.reset()
            decoder.reset()
            live, sent = None, 0
            kit.check_in_step(encoder, decoder)
            assert encoder.state_bytes == decoder.state_bytes == 0
            continue
        if action[0] == "send":
            shape, dtype = action[1], action[2]
            scale = 1e4 if action[4] else 1.0
        values = (torch.randn(shape, generator=g) * scale).to(dtype)
        x = kit.strided(values, action[-1] if action[0] == "again" else action[3])
        before = encoder._stream.view
        frame = encoder.encode(x)
        y = decoder.decode(frame)
        kit.check_in_step(encoder, decoder)

        assert torch.equal(x, values), "the input was written to"
        assert y.shape == x.shape
        assert y.dtype == dtype
        assert y.is_contiguous()
        assert torch.isfinite(y).all()
        lossless = options["codec"] == "raw"
        header = unpack(frame, "here")
        fresh = live != (x.numel(), dtype)
        keyframe = lossless or fresh or sent < options["warmup_steps"]
        assert header.is_keyframe == keyframe
        assert header.shape == shape
        assert header.epoch == encoder._epoch
        view = blocks(x.numel()) if fresh else before
        raw, coded = raw_nbytes(x.numel(), dtype), codecs.get(options["keyframe"])
        codes = 0 if coded.lossless else coded.payload_nbytes(blocks(x.numel()).shape, torch.float32)
        own_bytes = lossless or coded.lossless or codes >= raw
        if keyframe:
            payload = raw if own_bytes else codes
        else:
            payload = codecs.get(options["codec"]).payload_nbytes(view.shape, torch.float32)
        assert header.payload_nbytes == payload
        assert frame.numel() == HEADER_NBYTES + SHAPE_NBYTES + payload
        if keyframe and own_bytes:
            assert kit.same_bytes(y, values)
        elif keyframe:
            assert (y.double() - values.double()).norm() <= 0.3 * values.double().norm()  # int4, few elements
        if options["order"]:
            exact = options["state"] == "exact"
            assert not exact or kit.same_bytes(encoder.state, y.reshape(-1))
            assert encoder.state.dtype == dtype
            copy = values.nbytes if exact else values.numel() + 2 * math.ceil(values.numel() / 128)
            copies = 2 if options["order"] == "auto" else options["order"]
            assert decoder.state_bytes == copies * copy
            open_loop = options["error_feedback"] is False
            assert encoder.state_bytes == decoder.state_bytes * (2 if open_loop else 1)
        else:
            assert encoder.state is None
            assert encoder.state_bytes == decoder.state_bytes == 0
        y.fill_(math.pi)  # what decode gives is the caller's
        kit.check_in_step(encoder, decoder)
        live, sent = (x.numel(), dtype), sent + 1


@given(options=kit.stream_options(), sequence=actions, seed=st.integers(0, 2**32 - 1))
def test_any_sequence(options, sequence, seed):
    run(options, sequence, seed)


@pytest.mark.slow
@settings(max_examples=500)
@given(options=kit.stream_options(), sequence=actions, seed=st.integers(0, 2**32 - 1))
def test_any_sequence_at_length(options, sequence, seed):
    run(options, sequence, seed)


@settings(max_examples=30)
@given(options=kit.stream_options(), dtype=st.sampled_from(kit.DTYPES), seed=st.integers(0, 2**32 - 1))
def test_ten_frames_of_a_searched_size(options, dtype, seed):
    """Long enough for a layout to be found, announced and used."""
    g = torch.Generator().manual_seed(seed)
    scale = torch.randn(48, generator=g).exp()
    run_encoder, run_decoder = kit.pair(**options)
    for _ in range(10):
        x = (torch.randn(64, 48, generator=g) * scale).to(dtype)
        run_decoder.decode(run_encoder.encode(x))
        kit.check_in_step(run_encoder, run_decoder)


@given(options=kit.stream_options(), seed=st.integers(0, 2**32 - 1))
def test_extreme_magnitudes(options, seed):
    """Differences that leave float32, sums that leave the dtype, denormals: still finite and equal on both ends."""
    g = torch.Generator().manual_seed(seed)
    for dtype in kit.DTYPES:
        encoder, decoder = kit.pair(**options)
        limit = torch.finfo(dtype).max
        for factor in (1.0, -1.0, 1e-3, 0.0, 1e-38):
            x = (torch.rand(200, generator=g) * 2 - 1).to(dtype) * limit * factor
            assert torch.isfinite(decoder.decode(encoder.encode(x))).all()
            kit.check_in_step(encoder, decoder)


def test_a_layout_hint_is_used_from_the_first_residual():
    from compactdist.state import Layout

    layout = Layout("(h s d) -> 1 s (h d)", h=4, d=8)
    encoder, decoder = kit.pair(codec="int2", layout=layout)
    for _ in range(4):
        frame = encoder.encode(torch.randn(4, 50, 8))
        decoder.decode(frame)
        kit.check_in_step(encoder, decoder)
    header = unpack(frame, "here")
    assert (header.groups, header.rows, header.channels) == (1, 50, 32)
    assert header.layout == layout.hint
    assert header.next_channels == 0, "a hint is not second-guessed"


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.bool, torch.complex64])
def test_raw_takes_every_dtype(dtype):
    encoder, decoder = kit.pair(codec="raw", order=0)
    x = torch.randint(0, 2, (5, 7)).to(dtype)
    for _ in range(3):
        assert kit.same_bytes(decoder.decode(encoder.encode(x)), x)


def test_raw_takes_conjugated_and_negated_views():
    encoder, decoder = kit.pair(codec="raw")
    z = torch.randn(10, dtype=torch.complex64)
    assert torch.equal(decoder.decode(encoder.encode(z.conj())), z.conj())
    negated = torch._neg_view(torch.randn(10))
    assert torch.equal(decoder.decode(encoder.encode(negated)), negated)
