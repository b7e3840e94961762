"""The frame's header: what is packed is what is read, and no damage goes unnoticed."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compactdist import wire
from compactdist.errors import ConfigError, FrameError
from compactdist.wire import Header

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)

headers = st.builds(
    Header,
    codec=u32,
    key=u64,
    epoch=u32,
    sequence=u32,
    payload_nbytes=st.integers(0, 40).map(lambda n: 16 * n),
    numel=u64,
    dtype=st.sampled_from(wire.DTYPES),
    flags=st.integers(0, 31).map(lambda bits: bits & ~wire.SHAPE),
    layout=u32,
    groups=u32,
    rows=u32,
    channels=u32,
    next_groups=u32,
    next_channels=u32,
    digest=u64,
    shape=st.none() | st.lists(st.integers(0, 2**63), max_size=wire.MAX_DIMS).map(tuple),
)


def payload_for(header: Header) -> torch.Tensor:
    return torch.randint(0, 256, (header.payload_nbytes,), dtype=torch.uint8)


def example(shape: tuple[int, ...] | None = (3, 5)) -> Header:
    return Header(codec=7, key=11, epoch=1, sequence=9, payload_nbytes=64, numel=15, dtype=torch.float32, shape=shape)


@given(header=headers, padding=st.integers(0, 50))
def test_what_is_packed_is_read_again(header, padding):
    payload = payload_for(header)
    natural = wire.pack(header, payload)
    assert natural.numel() == header.nbytes + header.payload_nbytes
    assert natural.dtype == torch.uint8
    padded = wire.pack(header, payload, natural.numel() + padding)
    assert padded.numel() == natural.numel() + padding
    assert torch.equal(padded[: natural.numel()], natural)
    assert not padded[natural.numel() :].any()
    for frame in (natural, padded):
        assert wire.unpack(frame, "here") == header
        assert torch.equal(wire.payload_of(frame, header), payload)


@given(header=headers)
def test_payloads_start_on_16_bytes(header):
    assert header.nbytes % 16 == 0
    assert header.nbytes == (80 if header.shape is None else 144)
    assert len(wire.header_bytes(header)) == header.nbytes


def test_no_payload_means_zeros():
    header = example(None)
    frame = wire.pack(header, None)
    assert frame.numel() == 80 + 64
    assert not wire.payload_of(frame, wire.unpack(frame, "here")).any()


@pytest.mark.parametrize("shape", [None, (3, 5), (), (1, 2, 3, 4, 5, 6, 7, 8)])
def test_every_damaged_byte_is_noticed(shape):
    header = example(shape)
    frame = wire.pack(header, payload_for(header))
    for position in range(header.nbytes):
        for flip in (1, 2, 4, 8, 16, 32, 64, 128, 255):
            damaged = frame.clone()
            damaged[position] ^= flip
            with pytest.raises(FrameError, match="here"):
                wire.unpack(damaged, "here")


@given(position=st.integers(0, 79), value=st.integers(1, 255), header=headers)
def test_any_byte_of_any_header(position, value, header):
    frame = wire.pack(header, payload_for(header))
    frame[position] ^= value
    with pytest.raises(FrameError):
        wire.unpack(frame, "here")


@pytest.mark.parametrize("shape", [None, (3, 5)])
def test_cut_short(shape):
    header = example(shape)
    frame = wire.pack(header, payload_for(header))
    for length in range(frame.numel()):
        with pytest.raises(FrameError):
            wire.unpack(frame[:length], "here")
    wire.unpack(frame, "here")


def test_what_is_no_frame():
    with pytest.raises(FrameError, match="not a compactdist frame"):
        wire.unpack(torch.zeros(200, dtype=torch.uint8), "here")
    with pytest.raises(FrameError, match="too few"):
        wire.unpack(torch.zeros(0, dtype=torch.uint8), "here")
    with pytest.raises(FrameError, match="1-D uint8"):
        wire.unpack(torch.zeros(200), "here")
    with pytest.raises(FrameError, match="1-D uint8"):
        wire.unpack(torch.zeros(20, 20, dtype=torch.uint8), "here")


def test_another_version_is_named():
    frame = wire.pack(example(), torch.zeros(64, dtype=torch.uint8))
    frame[4] = 2
    with pytest.raises(FrameError, match="version 2"):
        wire.unpack(frame, "here")


def test_what_cannot_travel():
    with pytest.raises(ConfigError, match="at most 8 dimensions"):
        wire.header_bytes(example((1,) * 9))
    with pytest.raises(ConfigError, match="float8"):
        wire.header_bytes(dataclasses.replace(example(), dtype=torch.float8_e4m3fn))


@pytest.mark.parametrize(
    ("flags", "word"),
    [(0, "residual"), (wire.KEY, "key"), (wire.NONFINITE, "nonfinite"), (wire.STATELESS, "stateless")],
)
def test_frames_explain_themselves(flags, word):
    header = dataclasses.replace(example(), flags=flags)
    text = wire.explain(wire.pack(header, torch.zeros(64, dtype=torch.uint8)))
    assert text.startswith(word)
    for fact in ("frame 9", "epoch 1", f"{11:016x}", f"{7:08x}", "15 elements of float32", "64 bytes"):
        assert fact in text


@given(
    numel=st.integers(0, 50),
    dtype=st.sampled_from(wire.DTYPES),
    lead=st.integers(0, 3).map(lambda n: 16 * n),
)
def test_raw_payload(numel, dtype, lead):
    x = torch.randint(0, 2, (numel,)).to(dtype)
    payload = wire.raw_payload(x)
    assert payload.numel() == wire.raw_nbytes(numel, dtype)
    assert payload.numel() % 16 == 0
    inside = torch.cat([torch.zeros(lead, dtype=torch.uint8), payload])[lead:]
    assert torch.equal(wire.from_raw(inside, numel, dtype), x)
