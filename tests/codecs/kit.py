"""Checks that every codec must pass; a codec outside this package can be put through them as well.

Each ``check_*`` takes a codec and raises AssertionError. ``check_codec`` runs all of them on one input.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from compactdist import codecs
from compactdist.codecs import Codec
from compactdist.errors import CodecConfigError, NonFiniteError, PayloadError
from compactdist.kernels.spec import MatrixView

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# Every way in which memory can be walked: empty, 0-d, odd, flat with a tail, tokens, groups, heads.
SHAPES = (
    (),
    (0,),
    (1,),
    (17,),
    (128,),
    (300,),
    (4099,),
    (0, 5),
    (5, 0),
    (1, 1),
    (1, 200),
    (7, 3),
    (31, 64),
    (33, 65),
    (70, 130),
    (3, 0, 4),
    (3, 2, 64),
    (2, 40, 9),
    (2, 3, 2, 40),
    (2, 2, 9, 2, 8),
)


def _hot_cross(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    x = torch.randn(shape, generator=g, dtype=torch.float64) * 1e-3
    if x.dim() >= 2 and x.numel():
        x[..., 0, :] += 100.0
        x[..., 0] -= 100.0
    return x


def _one_hot(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    x = torch.zeros(shape, dtype=torch.float64)
    if x.numel():
        x.view(-1)[int(torch.randint(x.numel(), (), generator=g))] = -3.0
    return x


def _laplace(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    u = torch.rand(shape, generator=g, dtype=torch.float64) - 0.5
    return -u.sign() * torch.log1p(-2 * u.abs().clamp(max=0.4999999))


def _student4(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    normal = torch.randn((5, *shape), generator=g, dtype=torch.float64)
    return normal[0] / normal[1:].square().mean(0).sqrt()


def _channel_scaled(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    if x.dim():
        x = x * torch.randn(shape[-1], generator=g, dtype=torch.float64).exp()
    return x


def _gaussian(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64)


DISTRIBUTIONS: dict[str, Callable[[tuple[int, ...], torch.Generator], Tensor]] = {
    "gaussian": _gaussian,
    "laplace": _laplace,
    "student4": _student4,
    "channel_scaled": _channel_scaled,
    "one_hot": _one_hot,
    "constant": lambda shape, g: torch.full(shape, -0.7, dtype=torch.float64),
    "zero": lambda shape, g: torch.zeros(shape, dtype=torch.float64),
    "hot_cross": _hot_cross,
    "wide_range": lambda shape, g: _gaussian(shape, g) * torch.exp(20 * _gaussian(shape, g)),
    "denormal": lambda shape, g: _gaussian(shape, g) * 1e-40,
    "huge": lambda shape, g: _gaussian(shape, g) * 1e39,
}


def sample(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Draw a finite tensor of a named distribution, clamped to what dtype (and float32) can hold."""
    x = DISTRIBUTIONS[name](shape, torch.Generator().manual_seed(seed))
    limit = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    return x.clamp(-limit, limit).to(dtype)


def encode_residual(
    codec: Codec,
    x: Tensor,
    terms: tuple[Tensor, ...],
    view: MatrixView,
    out: Tensor | None = None,
    payload: Tensor | None = None,
    **others: Any,
) -> Tensor:
    """Encode one tensor by a session of its own; the payload, in new memory unless given."""
    session = codec.open(view, x.dtype, x.device)
    if payload is None:
        payload = torch.empty(session.payload_nbytes, dtype=torch.uint8, device=x.device)
    session.encode(x, terms, out, payload, **others)
    return payload


def decode_residual(codec: Codec, payload: Tensor, terms: tuple[Tensor, ...], view: MatrixView, out: Tensor) -> None:
    """Decode one payload by a session of its own."""
    codec.open(view, out.dtype, out.device).decode(payload, terms, out)


def as_bytes(x: Tensor) -> Tensor:
    """Return the memory of x, so that NaN equals itself and -0 differs from 0."""
    return x.contiguous().reshape(-1).view(torch.uint8)


def round_trip(codec: Codec, x: Tensor) -> Tensor:
    return codec.decode(codec.encode(x), x.shape, x.dtype)


def nmse(codec: Codec, x: Tensor) -> float:
    error = round_trip(codec, x).double() - x.double()
    return float(error.square().sum() / x.double().square().sum())


def check_round_trip(codec: Codec, x: Tensor) -> None:
    before = as_bytes(x.detach()).clone()
    y = round_trip(codec, x)
    assert torch.equal(as_bytes(x.detach()), before), "encode changed its input"
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    assert y.is_contiguous()
    assert not y.requires_grad
    assert bool(torch.isfinite(y).all())
    if codec.lossless:
        assert torch.equal(as_bytes(y), before)
    if not x.any():
        assert not y.any(), "zeros must come back as zeros"


def check_exact_size(codec: Codec, x: Tensor) -> None:
    payload = codec.encode(x)
    assert payload.dtype == torch.uint8
    assert payload.dim() == 1
    assert payload.is_contiguous()
    assert payload.device == x.device
    assert payload.numel() == codec.payload_nbytes(x.shape, x.dtype)
    assert payload.numel() == codec.payload_nbytes(list(x.shape), x.dtype)
    assert payload.numel() % 16 == 0


def check_determinism(codec: Codec, x: Tensor) -> None:
    payload = codec.encode(x)
    assert torch.equal(payload, codec.encode(x.clone()))
    y = as_bytes(codec.decode(payload, x.shape, x.dtype))
    # A received payload lies anywhere in a larger buffer.
    buffer = torch.zeros(payload.numel() + 7, dtype=torch.uint8)
    buffer[5 : 5 + payload.numel()] = payload
    assert torch.equal(y, as_bytes(codec.decode(buffer[5 : 5 + payload.numel()], x.shape, x.dtype)))
    assert torch.equal(payload, buffer[5 : 5 + payload.numel()]), "decode changed its payload"
    if torch.set_flush_denormal(True):
        try:
            assert torch.equal(y, as_bytes(codec.decode(payload, x.shape, x.dtype)))
        finally:
            torch.set_flush_denormal(False)


def check_strides(codec: Codec, x: Tensor) -> None:
    """A view must encode as its contiguous copy does, with or without requires_grad."""
    expected = codec.encode(x)
    spread = torch.stack([x, x + 1], -1)[..., 0]
    assert torch.equal(codec.encode(spread), expected)
    assert torch.equal(codec.encode(x.clone().requires_grad_()), expected)
    if x.dim() >= 2:
        assert torch.equal(codec.encode(x.transpose(0, 1).contiguous().transpose(0, 1)), expected)


def check_contraction(codec: Codec, x: Tensor) -> None:
    energy = float(x.double().square().sum())
    error = float((round_trip(codec, x).double() - x.double()).square().sum())
    # The result is rounded to dtype: half a step of each element, also where the steps are absolute.
    eps, tiny = torch.finfo(x.dtype).eps, torch.finfo(x.dtype).tiny * torch.finfo(x.dtype).eps
    narrow = x.dtype in (torch.float16, torch.bfloat16)
    slack = 2 * eps * energy + x.numel() * tiny**2 if narrow else 0.0
    assert error <= energy + slack, f"error energy {error} exceeds input energy {energy}"
    if x.numel() and float(x.abs().max()) > 1e-4:
        assert error < energy + slack, "nothing was gained"


def check_scale_equivariance(codec: Codec, x: Tensor, exponent: int) -> None:
    """Scaling by a power of two scales the result by just that, while nothing leaves the normal range."""
    factor = 2.0**exponent
    assert torch.equal(round_trip(codec, x * factor), round_trip(codec, x) * factor)


def check_config_round_trip(codec: Codec) -> None:
    config = codec.get_config()
    assert "id" not in config
    twin = type(codec).from_config(json.loads(json.dumps(config)))
    assert twin == codec
    assert hash(twin) == hash(codec)
    assert repr(twin) == repr(codec)
    assert twin.fingerprint() == codec.fingerprint()
    assert 0 <= codec.fingerprint() < 2**32
    assert codec in {twin}
    assert codec != codec.codec_id
    assert codecs.get({"id": codec.codec_id, **config}) == codec
    assert eval(repr(codec), {type(codec).__name__: type(codec)}) == codec
    with pytest.raises(CodecConfigError, match="no_such_option"):
        type(codec).from_config({**config, "no_such_option": 1})


def check_bad_inputs(codec: Codec) -> None:
    shape, dtype = (40, 70), torch.float32
    x = sample("gaussian", shape)
    payload = codec.encode(x)
    n = payload.numel()
    for bad in (
        payload[:-1],
        torch.cat([payload, payload[:1]]),
        payload.view(1, -1),
        payload.view(torch.int8),
    ):
        with pytest.raises(PayloadError, match=rf"\({n},\).*got torch\.\w+ of shape"):
            codec.decode(bad, shape, dtype)
    with pytest.raises(PayloadError, match="got bytes"):
        codec.decode(bytes(n), shape, dtype)  # type: ignore[arg-type]
    if codec.lossless:
        return
    for value in (math.nan, math.inf, -math.inf):
        broken = x.clone()
        broken[3, 4] = broken[5, 6] = value
        with pytest.raises(NonFiniteError, match=r"^2 of 2800 elements.*'raw'"):
            codec.encode(broken)
    for wrong in (torch.int32, torch.bool, torch.complex64, torch.uint8):
        with pytest.raises(CodecConfigError, match="'raw'"):
            codec.encode(torch.zeros(4, dtype=wrong))
        with pytest.raises(CodecConfigError, match=str(wrong).removeprefix("torch.")):
            codec.payload_nbytes((4,), wrong)


def check_codec(codec: Codec, x: Tensor) -> None:
    """Run every check that works on any input."""
    check_round_trip(codec, x)
    check_exact_size(codec, x)
    check_determinism(codec, x)
    check_strides(codec, x)
    check_contraction(codec, x)
