"""Bytes on the wire and error on known data. The limits fail a regression of a few hundredths of a dB."""

from __future__ import annotations

import pytest
import torch

from compactdist import codecs
from compactdist.errors import CodecConfigError
from tests.codecs import kit


@pytest.mark.parametrize(
    ("codec_id", "name", "limit"),
    [
        ("binary", "gaussian", 0.3645),
        ("int2", "gaussian", 0.1185),
        ("ternary", "gaussian", 0.1905),
        ("fp8", "gaussian", 0.00071),
        ("topk", "gaussian", 0.569),
        ("topk_int4", "gaussian", 0.572),
        ("int3", "gaussian", 0.0347),
        ("int4", "gaussian", 0.0096),
        ("int8", "gaussian", 0.00007),
        ("binary", "laplace", 0.505),
        ("int2", "laplace", 0.188),
        ("ternary", "laplace", 0.265),
        ("int3", "laplace", 0.063),
        ("int4", "laplace", 0.0215),
        ("int8", "laplace", 0.00014),
        # Scales by channel must make unequal channels as good as equal ones.
        ("binary", "channel_scaled", 0.366),
        ("int2", "channel_scaled", 0.119),
        ("int4", "channel_scaled", 0.0097),
        ("int8", "channel_scaled", 0.00009),
    ],
)
def test_nmse(codec_id, name, limit):
    x = kit.sample(name, (1024, 512))
    error = kit.nmse(codecs.get(codec_id), x)
    assert error <= limit
    assert error >= limit / 1.4, "far better than the rate allows: is the test looking at the right tensor?"


@pytest.mark.parametrize("codec_id", ["binary", "int2", "int4", "int8"])
def test_blocks_cost_an_eighth_of_a_bit_and_no_quality(codec_id):
    codec = codecs.get(codec_id, scales="block")
    x = kit.sample("gaussian", (512, 256))
    assert kit.nmse(codec, x) <= kit.nmse(codecs.get(codec_id), x)
    plain = codecs.get(codec_id).payload_nbytes((1, 4096 * 128), torch.float32)
    assert codec.payload_nbytes((1, 4096 * 128), torch.float32) == plain - 16 + 2 * 4096


@pytest.mark.parametrize(
    ("codec_id", "options", "limit"),
    [
        ("int2", {"centroids": "uniform"}, 0.120),
        ("int3", {"centroids": "uniform"}, 0.0377),
        ("int4", {"centroids": "uniform"}, 0.0117),
        ("int2", {"scales": "block", "centroids": "minmax"}, 0.196),
        ("int3", {"scales": "block", "centroids": "minmax"}, 0.0434),
        ("int4", {"scales": "block", "centroids": "minmax"}, 0.0098),
        ("int8", {"scales": "block", "centroids": "minmax"}, 0.00006),
        ("int4", {"scales": "block", "block": 32}, 0.0085),
        ("fp8", {"format": "e5m2"}, 0.0028),
        ("topk", {"m": 2}, 0.183),
        ("topk", {"m": 16}, 0.717),
        ("topk_int4", {"m": 2}, 0.19),
    ],
)
def test_nmse_of_options(codec_id, options, limit):
    error = kit.nmse(codecs.get(codec_id, **options), kit.sample("gaussian", (1024, 512)))
    assert limit / 1.4 <= error <= limit


@pytest.mark.parametrize(
    ("codec_id", "options", "message"),
    [
        ("int2", {"scales": "row"}, "scales must be one of 'token_channel', 'token_history', 'block', got 'row'"),
        ("binary", {"scales": "block", "block": 1}, "block must be an integer from 2 to 65536, got 1"),
        ("binary", {"scales": "block", "block": 64.0}, "block must be an integer"),
        ("ternary", {"block": 64}, "block=64 needs scales='block'"),
        ("int3", {"centroids": "best"}, "centroids must be one of 'lloyd_max', 'uniform', 'minmax', got 'best'"),
        ("fp8", {"format": "e3m4"}, "format must be one of 'e4m3', 'e5m2', got 'e3m4'"),
        ("topk", {"m": 17}, "m must be an integer from 2 to 16, got 17"),
        ("lowrank", {"rank": 0}, "rank must be an integer from 1 to 1024, got 0"),
        ("lowrank_int4", {"rank": True}, "rank must be an integer from 1 to 1024, got True"),
        ("topk_int4", {"m": 1}, "m must be an integer from 2 to 16, got 1"),
        ("int8", {"centroids": "lloyd_max"}, "centroids must be one of 'uniform', 'minmax'"),
        ("int4", {"centroids": "minmax"}, "centroids='minmax' needs scales='block', got scales='token_channel'"),
    ],
)
def test_options_out_of_range(codec_id, options, message):
    with pytest.raises(CodecConfigError, match=f"'{codec_id}': {message}"):
        codecs.get(codec_id, **options)


def test_defaults_stay_out_of_the_config():
    assert codecs.get("int2", scales="token_channel", block=128, centroids="lloyd_max") == codecs.get("int2")
    assert codecs.get("int2").get_config() == {}
    assert codecs.get("int2", scales="block").get_config() == {"scales": "block"}


@pytest.mark.parametrize("codec_id", ["binary", "ternary", "int2", "int3", "int4", "int8"])
def test_rows_of_unequal_size_cost_nothing(codec_id):
    x = kit.sample("gaussian", (512, 256))
    rows = torch.randn(512, 1, generator=torch.Generator().manual_seed(1)).exp()
    codec = codecs.get(codec_id)
    assert kit.nmse(codec, x * rows) <= 1.25 * kit.nmse(codec, x)


@pytest.mark.parametrize("codec_id", ["binary", "int2", "int4", "int8"])
def test_short_tensors_keep_most_of_the_quality(codec_id):
    """With one scale for a group the error on white data stays close to that of the large matrix."""
    codec = codecs.get(codec_id)
    assert kit.nmse(codec, kit.sample("gaussian", (31, 60))) <= 1.3 * kit.nmse(
        codec, kit.sample("gaussian", (512, 256))
    )


@pytest.mark.parametrize(("codec_id", "bits"), [("binary", 1), ("int2", 2), ("int3", 3), ("int4", 4), ("int8", 8)])
def test_bits_per_element_of_a_large_matrix(codec_id, bits):
    shape = (1088, 3072)
    nbytes = codecs.get(codec_id).payload_nbytes(shape, torch.bfloat16)
    assert nbytes == 1088 * 3072 * bits // 8 + 1088 + 2 * 3072
    assert nbytes * 8 / (1088 * 3072) == pytest.approx(bits + 0.01731, abs=1e-5)


@pytest.mark.parametrize(
    ("shape", "codes", "row_scales", "channel_scales"),
    [
        ((64,), 16, 0, 16),  # one row: no row scales, one channel scale
        ((300,), 48, 16, 16),  # three rows of 128
        ((2, 63), 16, 0, 16),  # too few channels for row scales
        ((2, 64), 16, 16, 16),
        ((63, 64), 512, 64, 16),  # too few rows for channel scales
        ((64, 64), 512, 64, 128),
        ((3, 64, 64), 1536, 192, 384),  # scales for each group
        ((2, 4, 8, 2, 32), 512, 64, 128),  # B, S1, S2, H, D
    ],
)
def test_binary_sections(shape, codes, row_scales, channel_scales):
    assert codecs.get("binary").payload_nbytes(shape, torch.float32) == codes + row_scales + channel_scales


def test_raw_size():
    raw = codecs.get("raw")
    assert raw.payload_nbytes((8,), torch.bfloat16) == 16
    assert raw.payload_nbytes((9,), torch.bfloat16) == 32
    assert raw.payload_nbytes((), torch.complex128) == 16
    assert raw.payload_nbytes((0,), torch.float64) == 0
