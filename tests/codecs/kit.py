"""The public kit (``compactdist.testing``) under the names tests use, and what only this package's codecs promise."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from compactdist.codecs import Codec
from compactdist.errors import CodecConfigError, NonFiniteError, PayloadError
from compactdist.kernels.spec import MatrixView
from compactdist.testing import DISTRIBUTIONS, FLOAT_DTYPES, SHAPES, codec_checks, sample
from compactdist.testing.codec_checks import (
    as_bytes,
    check_config_round_trip,
    nmse,
    round_trip,
)

__all__ = [
    "DISTRIBUTIONS",
    "FLOAT_DTYPES",
    "SHAPES",
    "as_bytes",
    "check_bad_inputs",
    "check_codec",
    "check_config_round_trip",
    "check_contraction",
    "check_input",
    "check_scale_equivariance",
    "decode_residual",
    "encode_residual",
    "nmse",
    "round_trip",
    "sample",
]

check_input = partial(codec_checks.check_input, strictly=True)
check_contraction = partial(codec_checks.check_contraction, strictly=True)
check_codec = check_input  # tests/kernels/gpu knows it by this name


def check_scale_equivariance(codec: Codec, x: Tensor, exponent: int) -> None:
    """Scaling by a power of two scales the result by just that, while nothing leaves the normal range."""
    factor = 2.0**exponent
    assert torch.equal(round_trip(codec, x * factor), round_trip(codec, x) * factor)


def check_bad_inputs(codec: Codec) -> None:
    """The kit's check, and the texts: expected and given form of a payload, how many elements, and the remedy."""
    codec_checks.check_bad_inputs(codec)
    shape, dtype = (40, 70), torch.float32
    x = sample("gaussian", shape)
    payload = codec.encode(x)
    n = payload.numel()
    for bad, given in (
        (payload[:-1], f"torch.uint8 of shape ({n - 1},)"),
        (payload.view(1, -1), f"torch.uint8 of shape (1, {n})"),
        (payload.view(torch.int8), f"torch.int8 of shape ({n},)"),
        (bytes(n), "bytes"),
    ):
        with pytest.raises(PayloadError, match=rf"\({n},\).*got {re.escape(given)}"):
            codec.decode(bad, shape, dtype)  # type: ignore[arg-type]
    if codec.lossless:
        return
    x[3, 4] = x[5, 6] = torch.nan
    with pytest.raises(NonFiniteError, match=r"^2 of 2800 elements.*'raw'"):
        codec.encode(x)
    for wrong in (torch.int32, torch.bool, torch.complex64, torch.uint8):
        with pytest.raises(CodecConfigError, match="'raw'"):
            codec.encode(torch.zeros(4, dtype=wrong))
        with pytest.raises(CodecConfigError, match=str(wrong).removeprefix("torch.")):
            codec.payload_nbytes((4,), wrong)


def encode_residual(
    codec: Codec,
    x: Tensor,
    terms: tuple[Tensor, ...],
    view: MatrixView,
    out: Tensor | None = None,
    payload: Tensor | None = None,
    copy: Tensor | None = None,
    **others: Any,
) -> Tensor:
    """Encode one tensor by a session of its own, with ``copy`` twice; the payload, in new memory unless given."""
    session = codec.open(view, x.dtype, x.device)
    if payload is None:
        payload = torch.empty(session.payload_nbytes, dtype=torch.uint8, device=x.device)
    if copy is None:
        session.encode(x, terms, out, payload, **others)
    else:
        assert out is not None
        session.encode_twice(x, terms, out, copy, payload)
    return payload


def decode_residual(codec: Codec, payload: Tensor, terms: tuple[Tensor, ...], view: MatrixView, out: Tensor) -> None:
    """Decode one payload by a session of its own."""
    codec.open(view, out.dtype, out.device).decode(payload, terms, out)
