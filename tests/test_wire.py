"""The frame's header: what is packed is what is read, and no damage goes unnoticed."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compactdist import wire
from compactdist.errors import ConfigError, FrameError
from compactdist.wire import Header

u32 = st.integers(0, 2**32 - 1)
u8 = st.integers(0, 2**8 - 1)
u16 = st.integers(0, 2**16 - 1)
f32 = st.floats(width=32, allow_nan=False)
u64 = st.integers(0, 2**64 - 1)

headers = st.builds(
    Header,
    stream=u64,
    codec=u32,
    step=st.integers(-1, 2**31 - 1),
    epoch=u32,
    sequence=u32,
    part=u16,
    parts=u16,
    payload_nbytes=st.integers(0, 40).map(lambda n: 16 * n),
    numel=u64,
    dtype=st.sampled_from(wire.DTYPES),
    flags=st.integers(0, 63).map(lambda bits: bits & ~wire.SHAPE),
    layout=u32,
    groups=u32,
    rows=u32,
    channels=u32,
    next_groups=u32,
    next_channels=u32,
    rate=u8,
    next_rate=u8,
    next_kind=u8,
    predictor=u8,
    checksum_kind=u8,
    keyframe_codec=u32,
    coefficient=f32,
    coefficient_2=f32,
    checksum=u64,
    digest=u64,
    shape=st.none() | st.lists(st.integers(0, 2**63), max_size=wire.MAX_DIMS).map(tuple),
)


def payload_for(header: Header) -> torch.Tensor:
    return torch.randint(0, 256, (header.payload_nbytes,), dtype=torch.uint8)


def example(shape: tuple[int, ...] | None = (3, 5)) -> Header:
    return Header(
        stream=11, codec=7, step=3, epoch=1, sequence=9, payload_nbytes=64, numel=15, dtype=torch.float32, shape=shape
    )


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
    assert header.nbytes == (128 if header.shape is None else 192)
    assert len(wire.header_bytes(header)) == header.nbytes


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


@given(position=st.integers(0, wire.HEADER_NBYTES - 1), value=st.integers(1, 255), header=headers)
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
    frame[4] = 1
    with pytest.raises(FrameError, match="version 1"):
        wire.unpack(frame, "here")


def test_what_cannot_travel():
    with pytest.raises(ConfigError, match="at most 8 dimensions"):
        wire.header_bytes(example((1,) * 9))
    with pytest.raises(ConfigError, match="float8"):
        wire.header_bytes(dataclasses.replace(example(), dtype=torch.float8_e4m3fn))


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (0, "residual"),
        (wire.KEYFRAME, "key"),
        (wire.NONFINITE, "nonfinite"),
        (wire.STATELESS, "stateless"),
        (wire.RESTART, "restart"),
    ],
)
def test_frames_explain_themselves(flags, word):
    header = dataclasses.replace(example(), flags=flags)
    text = wire.explain(wire.pack(header, torch.zeros(64, dtype=torch.uint8)))
    assert text.startswith(word)
    for fact in ("frame 9", "epoch 1", "step 3", f"{11:016x}", f"{7:08x}", "15 elements of float32", "64 bytes"):
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


def test_a_template_writes_what_the_header_says():
    header = dataclasses.replace(example(None), coefficient=0.5, digest=2**64 - 5, checksum=2**63 + 7)
    template = wire.HeadTemplate(header)
    for step, epoch, sequence, checksum, digest in ((3, 1, 9, 2**63 + 7, 2**64 - 5), (-1, 2**32 - 1, 0, 0, 1)):
        said = dataclasses.replace(header, step=step, epoch=epoch, sequence=sequence, checksum=checksum, digest=digest)
        assert template.filled(step, epoch, sequence, checksum, digest) == wire.header_bytes(said)


@given(header=headers, position=st.integers(0, wire.HEADER_NBYTES - 1), value=st.integers(1, 255))
def test_frames_are_told_from_other_bytes(header, position, value):
    frame = wire.pack(dataclasses.replace(header, shape=None), payload_for(header))
    assert wire.frame_in(frame) == wire.frame_in(frame.view(torch.float32)) == dataclasses.replace(header, shape=None)
    damaged = frame.clone()
    damaged[position] ^= value
    assert wire.frame_in(damaged) is None
    assert wire.frame_in(frame[:127]) is None


def test_the_header_is_the_table():
    """Sizes of the fields add up, fields larger than a byte do not cross their own alignment, and words are unique."""
    assert wire.HEADER_NBYTES == 128
    at = 0
    for field in wire.FIELDS:
        if "s" not in field.code:
            assert at % field.nbytes == 0
        at += field.nbytes
    assert len({wire.weight(n) for n in range(1 << 16)}) == 1 << 16
    assert all(wire.weight(n) % 2 for n in range(1 << 16))


def test_the_docs_show_the_table():
    page = (pathlib.Path(__file__).parent.parent / "docs" / "wire_format.md").read_text()
    assert wire.table() in page


def test_streams_have_names():
    named = {
        wire.stream_fingerprint(*parts)
        for parts in (("g", "s", "c"), ("gs", "", "c"), ("", "gs", "c"), ("g", "s", "d"), ("g", "sc", ""))
    }
    assert len(named) == 5
    assert wire.stream_fingerprint("", "", "") == int.from_bytes(
        hashlib.blake2b(b"\0\0", digest_size=8).digest(), "little"
    )


@pytest.mark.parametrize("position", [5, 6, 7, 77, 79, 112, 119])
def test_well_formed_headers_that_say_what_nobody_knows(position):
    """Unknown flags, dtypes and dimensions, and reserved bytes that are not zero, behind a right checksum."""
    frame = wire.pack(example(None), payload_for(example(None)))
    frame[position] ^= 0x80
    raw = bytes(frame[:128].numpy())
    frame[120:128] = torch.frombuffer(bytearray(wire._header_sum(raw).to_bytes(8, "little")), dtype=torch.uint8)
    with pytest.raises(FrameError, match="does not know"):
        wire.unpack(frame, "here")
