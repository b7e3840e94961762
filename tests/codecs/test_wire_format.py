"""The wire format: a second decoder written from the format's description, and payloads stored for ever."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compactdist import codecs
from tests.codecs import kit, make_fixtures

QUANTIZERS = ("binary", "int2", "int3", "int4", "int8", "ternary")

INT2 = (0.45278003463649646, 1.510417608499104)
INT4 = (
    0.12839502985118137,
    0.38804829949039066,
    0.6567591185326226,
    0.9423404564871679,
    1.2562311973474165,
    1.6180463860221352,
    2.069017226531634,
    2.7325895709953834,
)
INT3 = (0.24509417894422308, 0.7560052812058808, 1.3439092785050053, 2.151945704536992)
LEVELS = {
    "binary": (1, (-1.0, 1.0)),
    "int2": (2, (*INT2, *(-a for a in INT2))),
    "int3": (3, (*INT3, *(-a for a in INT3))),
    "ternary": (1.6, (0.0, 1.0, -1.0)),
    "int4": (4, (*INT4, *(-a for a in INT4))),
    "int8": (8, tuple(float(q) for q in (*range(128), *range(-128, 0)))),
}


def unpack_with_numpy(payload: bytes, total: int, bits: float) -> np.ndarray:
    """The codes at the start of a payload."""
    data = np.frombuffer(payload, np.uint8, -(-total // 5) if bits == 1.6 else math.ceil(total * bits / 8))
    if bits == 1.6:
        return (data[:, None].astype(int) // 3 ** np.arange(5) % 3).reshape(-1)[:total]
    return np.unpackbits(data, bitorder="little")[: total * bits].reshape(total, bits) @ (1 << np.arange(bits))


def decode_blocks_with_numpy(spec: dict[str, Any], payload: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """As ``decode_with_numpy``, for ``scales="block"``."""
    bits, levels = LEVELS[spec["id"]]
    groups = shape[0] if len(shape) == 3 else 1
    per_group = math.prod(shape) // groups
    blocks = math.ceil(per_group / spec.get("block", 128))
    length = math.ceil(per_group / blocks)
    codes = unpack_with_numpy(payload, groups * blocks * length, bits).reshape(-1, length)
    at = math.ceil(codes.size * bits / 8 / 16) * 16
    scales = (np.frombuffer(payload, "<u2", groups * blocks, at).astype("<u4") << 16).view("<f4")[:, None]
    at += math.ceil(2 * len(scales) / 16) * 16
    if spec.get("centroids") == "minmax":
        offsets = (np.frombuffer(payload, "<u2", groups * blocks, at).astype("<u4") << 16).view("<f4")[:, None]
        at += math.ceil(2 * len(scales) / 16) * 16
        y = codes.astype(np.float32) * scales + offsets
    else:
        y = scales * np.array(levels, np.float32)[codes]
    assert len(payload) == at
    return y.reshape(groups, -1)[:, :per_group].reshape(shape)


@pytest.mark.parametrize(
    "name", ["binary-block", "ternary-block", "int3-block", "int2-minmax", "int3-minmax", "int4-minmax", "int8-minmax"]
)
@pytest.mark.parametrize("shape", [shape for shape in kit.SHAPES if math.prod(shape)])
def test_blocks_follow_the_description(name, shape):
    spec = make_fixtures.SPECS[name]
    codec = codecs.get(spec)
    for seed, distribution in enumerate(("gaussian", "wide_range", "zero")):
        x = kit.sample(distribution, shape, seed=seed)
        payload = codec.encode(x)
        expected = decode_blocks_with_numpy(spec, payload.numpy().tobytes(), shape)
        assert torch.equal(codec.decode(payload, shape, torch.float32), torch.from_numpy(expected))


def decode_with_numpy(codec_id: str, payload: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """Decode to float32 before the final rounding, one step of the description after the other."""
    bits, levels = LEVELS[codec_id]
    count = math.prod(shape)
    if len(shape) < 2:
        g, r, c = (1, 1, count) if count <= 128 else (1, math.ceil(count / 128), 128)
    elif len(shape) < 4:
        g, r, c = (1, 1, *shape)[-3:]
    else:
        g, r, c = 1, math.prod(shape[:-2]), shape[-2] * shape[-1]
    total = g * r * c
    codes = unpack_with_numpy(payload, total, bits)
    at = math.ceil(total * bits / 8 / 16) * 16
    t = np.ones((g, r, 1), np.float32)
    if c >= 64 and r > 1:
        k = np.frombuffer(payload, np.uint8, g * r, at).astype(np.float64)
        t = np.where(k > 0, (8 + k % 8) / 8 * 2.0 ** (k // 8 - 31), 0).astype(np.float32).reshape(g, r, 1)
        at += math.ceil(g * r / 16) * 16
    per_group = c if r >= 64 else 1
    scales = np.frombuffer(payload, "<u2", g * per_group, at).astype("<u4") << 16
    scales = scales.astype("<u4").view("<f4").reshape(g, 1, per_group)
    assert len(payload) == at + math.ceil(2 * g * per_group / 16) * 16
    value = np.array(levels, np.float32)[codes].reshape(g, r, c)
    product = (t * scales).astype(np.float32) * value
    return product.astype(np.float32).reshape(-1)[:count].reshape(shape)


@pytest.mark.parametrize("codec_id", QUANTIZERS)
@pytest.mark.parametrize("shape", [shape for shape in kit.SHAPES if math.prod(shape)])
def test_decoder_follows_the_description(codec_id, shape):
    codec = codecs.get(codec_id)
    for seed, name in enumerate(("gaussian", "wide_range", "zero")):
        x = kit.sample(name, shape, seed=seed)
        payload = codec.encode(x)
        expected = decode_with_numpy(codec_id, payload.numpy().tobytes(), shape)
        assert torch.equal(codec.decode(payload, shape, torch.float32), torch.from_numpy(expected))
        half = torch.from_numpy(expected).clamp(-65504, 65504).half()
        assert torch.equal(codec.decode(payload, shape, torch.float16), half)


@pytest.mark.parametrize("codec_id", QUANTIZERS)
def test_gaps_between_sections_are_zero(codec_id):
    x = kit.sample("gaussian", (33, 67))
    payload = codecs.get(codec_id).encode(x)
    bits = LEVELS[codec_id][0]
    codes = math.ceil(33 * 67 / 5) if bits == 1.6 else math.ceil(33 * 67 * bits / 8)
    rows_at = math.ceil(codes / 16) * 16
    assert not payload[codes:rows_at].any()
    assert not payload[rows_at + 33 : rows_at + 48].any()
    assert not payload[rows_at + 48 + 2 * 67 :].any()


def test_known_bytes():
    """Small enough to check by hand: one row, c is the mean magnitude for binary, 4 / 127 for int8."""
    x = torch.tensor([[1.0, -2.0, 3.0, -4.0]])
    assert codecs.get("binary").encode(x).tolist() == [0b0101, *[0] * 15, 0x20, 0x40, *[0] * 14]
    # 4 / 127 rounded up to bfloat16 is 0x3D02; the levels are 32, -63, 95, -126.
    assert codecs.get("int8").encode(x).tolist() == [
        32,
        256 - 63,
        95,
        256 - 126,
        *[0] * 12,
        0x02,
        0x3D,
        *[0] * 14,
    ]


@pytest.mark.parametrize("name", make_fixtures.SPECS)
class TestStoredPayloads:
    """Payloads written by the first release. If a decoder disagrees, the decoder is wrong."""

    @pytest.fixture
    def cases(self, name):
        return make_fixtures.load(name)

    def test_decode_to_the_stored_bytes(self, name, cases):
        codec = codecs.get(make_fixtures.SPECS[name])
        assert len(cases) == len(make_fixtures.CASES)
        for case in cases:
            decoded = codec.decode(case.payload, case.shape, case.dtype)
            # the first payloads were stored when zeros could still come back as -0
            expected = case.decoded if codec.lossless else case.decoded + 0
            assert torch.equal(kit.as_bytes(decoded + 0), kit.as_bytes(expected))

    def test_encoder_has_not_become_worse(self, name, cases):
        """Encoders may choose other bytes, as long as what comes out is about as good."""
        codec = codecs.get(make_fixtures.SPECS[name])
        errors = []
        for case in cases:
            assert codec.payload_nbytes(case.shape, case.dtype) == case.payload.numel()
            x = case.input.double()
            stored = (case.decoded.double() - x).square().sum()
            today = (kit.round_trip(codec, case.input).double() - x).square().sum()
            errors.append(torch.stack([stored, today]) / x.square().sum())
        if codec.codec_id.startswith("lowrank"):  # with few short factors, one case is the luck of how they round
            errors = [torch.stack(errors).sum(0)]
        # single draws: the limits on large samples are in test_rate_and_quality
        assert all(today <= stored * 1.25 for stored, today in errors)

    def test_a_changed_byte_is_noticed(self, name, cases):
        """The comparison above can fail."""
        case = cases[0]
        payload = case.payload.clone()
        payload[0] ^= 1
        decoded = codecs.get(make_fixtures.SPECS[name]).decode(payload, case.shape, case.dtype)
        assert not torch.equal(kit.as_bytes(decoded), kit.as_bytes(case.decoded))


def test_every_codec_has_stored_payloads():
    assert {spec["id"] for spec in make_fixtures.SPECS.values()} == set(codecs.list())


def test_fixtures_are_never_overwritten(tmp_path: Path):
    make_fixtures.write("binary", tmp_path)
    before = (tmp_path / "binary.npz").read_bytes()
    with pytest.raises(FileExistsError):
        make_fixtures.write("binary", tmp_path)
    assert (tmp_path / "binary.npz").read_bytes() == before
