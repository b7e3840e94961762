from __future__ import annotations

import math

import pytest
import torch

from compactdist import codecs
from tests.codecs import kit

RAW = codecs.get("raw")


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.complex64,
        torch.complex128,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    ],
)
def test_any_dtype(dtype):
    x = torch.arange(-6, 9).to(torch.float32).to(dtype).reshape(3, 5)
    y = kit.round_trip(RAW, x)
    assert y.dtype == dtype
    assert y.shape == x.shape
    assert torch.equal(kit.as_bytes(y), kit.as_bytes(x))
    assert y.data_ptr() != x.data_ptr()


def test_nan_payloads_and_signed_zeros_survive():
    bits = torch.tensor([0x7FC00001, 0x7F800001, -0x400000, -0x80000000, 0, 0x7F800000], dtype=torch.int32)
    x = bits.view(torch.float32)
    assert torch.equal(kit.round_trip(RAW, x).view(torch.int32), bits)
    assert math.isnan(float(kit.round_trip(RAW, x)[0]))


def test_conjugate_and_negative_views():
    x = torch.tensor([1 + 2j, 3 - 4j])
    assert torch.equal(kit.round_trip(RAW, x.conj()), torch.tensor([1 - 2j, 3 + 4j]))
    assert torch.equal(kit.round_trip(RAW, x.conj().imag), torch.tensor([-2.0, 4.0]))


def test_result_owns_its_memory():
    payload = RAW.encode(torch.ones(4))
    y = RAW.decode(payload, (4,), torch.float32)
    payload.zero_()
    assert torch.equal(y, torch.ones(4))
