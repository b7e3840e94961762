"""Streams that are stored for ever: payloads that are decoded with what the ones before left behind."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from compactdist import codecs
from compactdist.kernels import use
from tests.codecs import kit, make_fixtures
from tests.codecs.make_fixtures import FRAMES, STREAM_DTYPE, STREAM_VIEW
from tests.codecs.test_wire_format import LEVELS, decode_with_numpy, unpack_with_numpy

CPU = torch.device("cpu")
ROWS, CHANNELS = STREAM_VIEW.rows, STREAM_VIEW.channels
every_name = pytest.mark.parametrize("name", make_fixtures.STREAMS)


def opened(name: str):
    return codecs.get(make_fixtures.STREAMS[name]).open(STREAM_VIEW, STREAM_DTYPE, CPU)


def decode(session, payload: torch.Tensor, terms: tuple[torch.Tensor, ...]) -> torch.Tensor:
    out = torch.empty(STREAM_VIEW.numel, dtype=STREAM_DTYPE)
    session.decode(payload, terms, out)
    session.commit()
    return out


@every_name
@pytest.mark.parametrize("kernels", ["reference", "cpu"])
def test_decode_to_the_stored_bytes(name, kernels):
    if kernels == "cpu":
        pytest.importorskip("numba")
    stored, session = make_fixtures.load_stream(name), opened(name)
    terms: tuple[torch.Tensor, ...] = ()
    with use(kernels):
        for payload in stored.payloads:
            terms = (decode(session, payload, terms),)
    assert torch.equal(kit.as_bytes(terms[0]), kit.as_bytes(stored.decoded))
    assert torch.equal(session.shared_memory[0], stored.scales)


@every_name
def test_encoder_has_not_become_worse(name):
    stored, session = make_fixtures.load_stream(name), opened(name)
    terms: tuple[torch.Tensor, ...] = ()
    for x, payload in zip(stored.inputs, stored.payloads, strict=True):
        assert session.payload_nbytes == payload.numel()
        out = torch.empty_like(x)
        session.encode(x, terms, out, torch.empty_like(payload))
        session.commit()
        terms = (out,)
    then, today = ((out.double() - stored.inputs[-1].double()).square().sum() for out in (stored.decoded, terms[0]))
    assert today <= 1.25 * then


@every_name
@pytest.mark.parametrize("section", ["codes", "row scales", "sums of squares"])
def test_a_changed_byte_is_noticed(name, section):
    """What the second frame says of squares is noticed in the third: the comparison above can fail."""
    stored, session = make_fixtures.load_stream(name), opened(name)
    roots = 2 * CHANNELS
    at = {"codes": 0, "row scales": -roots - 2 * ROWS, "sums of squares": -roots}[section]
    terms: tuple[torch.Tensor, ...] = ()
    for frame, payload in enumerate(stored.payloads):
        if frame == 1:
            payload = payload.clone()
            payload[at] ^= 1
        terms = (decode(session, payload, terms),)
    assert not torch.equal(kit.as_bytes(terms[0]), kit.as_bytes(stored.decoded))


def bf16(payload: bytes, count: int, at: int) -> np.ndarray:
    return (np.frombuffer(payload, "<u2", count, at).astype("<u4") << 16).view("<f4")


def scales_with_numpy(roots: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Channel scales of the next frame: the largest brought to [1/2, 1), and a floor of a 64th of the mean."""
    c = roots * np.float32(2.0 ** -(math.floor(math.log2(roots.max())) + 1))
    lanes = np.zeros(64, np.float32)
    for start in range(0, CHANNELS, 64):
        lanes += c[start : start + 64]
    while len(lanes) > 1:
        lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
    floor = lanes[0] * np.float32(2.0**-6 / CHANNELS)
    return np.where((c > 0) | (before > 0), np.maximum(c, floor), c)


@every_name
def test_frames_follow_the_description(name):
    """A second decoder, of the description: codes, row scales of two bytes, roots of sums of squares."""
    spec, stored = make_fixtures.STREAMS[name], make_fixtures.load_stream(name)
    if spec["id"] == "fp8":
        bits, levels = 8, torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy() * 2.0**9
    else:
        bits, levels = LEVELS[spec["id"]]
    session, total = opened(name), ROWS * CHANNELS
    rows_at = math.ceil(total * bits / 8 / 16) * 16
    first = stored.payloads[0].numpy().tobytes()[: rows_at + ROWS + 2 * CHANNELS]
    base = decode(session, stored.payloads[0], ())
    if spec["id"] != "fp8":
        expected = decode_with_numpy(spec["id"], first, (ROWS, CHANNELS))
        assert torch.equal(base, torch.from_numpy(expected).to(STREAM_DTYPE).view(-1))
    roots = bf16(first, CHANNELS, rows_at + ROWS)
    c = scales_with_numpy(roots, roots)
    for payload in stored.payloads[1:FRAMES]:
        data = payload.numpy().tobytes()
        assert len(data) == rows_at + 2 * ROWS + 2 * CHANNELS
        t, codes = bf16(data, ROWS, rows_at)[:, None], unpack_with_numpy(data, total, bits)
        change = (t * c[None]).astype(np.float32) * np.array(levels, np.float32)[codes].reshape(ROWS, CHANNELS)
        expected = (base.float() + torch.from_numpy(change).view(-1)).to(STREAM_DTYPE)
        base = decode(session, payload, (base,))
        assert torch.equal(base, expected)
        c = scales_with_numpy(bf16(data, CHANNELS, rows_at + 2 * ROWS), c)
        assert np.array_equal(session.shared_memory[0].view(-1).numpy(), c)


def test_streams_are_never_overwritten(tmp_path):
    make_fixtures.write("binary-history", tmp_path)
    before = (tmp_path / "binary-history.npz").read_bytes()
    with pytest.raises(FileExistsError):
        make_fixtures.write("binary-history", tmp_path)
    assert (tmp_path / "binary-history.npz").read_bytes() == before
