"""The Triton kernels under what every codec must pass, see ``tests/codecs/kit.py``."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from compactdist.codecs import Codec
from compactdist.errors import NonFiniteError
from compactdist.kernels import use
from compactdist.kernels.gpu.steps import TritonSteps
from tests.codecs import kit as codec_kit
from tests.kernels.gpu import kit

every_form = pytest.mark.parametrize("form", kit.FORMS, ids=kit.name_of)


class OnDevice:
    """A codec whose payloads and tensors live on the CPU and are coded by the kernels, wherever those run."""

    def __init__(self, form: Any) -> None:
        self.codec: Codec = kit.get(form)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.codec, name)

    def encode(self, x: Tensor) -> Tensor:
        with use("gpu"):
            return self.codec.encode(x.to(kit.DEVICE)).cpu()

    def decode(self, payload: Any, shape: Any, dtype: torch.dtype) -> Tensor:
        moved = payload.to(kit.DEVICE) if isinstance(payload, Tensor) else payload
        with use("gpu"):
            return self.codec.decode(moved, shape, dtype).cpu()


@pytest.fixture(autouse=True)
def _the_kernels_run(monkeypatch):
    calls = []
    real = TritonSteps.encode
    monkeypatch.setattr(TritonSteps, "encode", lambda *args, **kwargs: calls.append(0) or real(*args, **kwargs))
    yield
    assert calls


@every_form
def test_every_check(form):
    codec = OnDevice(form)
    shapes = kit.rotated(form, [shape for shape in codec_kit.SHAPES if 0 < math.prod(shape) < 4000], 2)
    for name, shape in zip(kit.rotated(form, codec_kit.DISTRIBUTIONS, 2), shapes, strict=True):
        codec_kit.check_codec(codec, codec_kit.sample(name, shape))


@pytest.mark.parametrize("form", kit.FORMS[1::5], ids=kit.name_of)
def test_every_check_on_more_rows(form):
    (name,) = kit.rotated(form, codec_kit.DISTRIBUTIONS, 1)
    codec_kit.check_codec(OnDevice(form), codec_kit.sample(name, (70, 130)))


@every_form
def test_scale_equivariance(form):
    (exponent,) = kit.rotated(form, (-30, 60), 1)
    codec_kit.check_scale_equivariance(OnDevice(form), codec_kit.sample("student4", (2, 3, 70)), exponent)


@pytest.mark.parametrize("form", kit.FORMS[::4], ids=kit.name_of)
def test_bad_inputs(form):
    """Refused before a kernel starts, by what all codecs share; not_finite has what the kernels find, of every form."""
    codec_kit.check_bad_inputs(OnDevice(form))


@every_form
def test_a_residual_loop_converges(form):
    x = codec_kit.sample("student4", (5, 72))
    base, errors = torch.zeros_like(x), []
    for _ in range(6):
        base = base + codec_kit.round_trip(OnDevice(form), x - base)
        errors.append(float((x - base).square().sum()))
    assert all(later <= earlier for earlier, later in pairwise(errors) if earlier > 1e-9)
    assert errors[-1] < 0.5 * float(x.square().sum())


@every_form
def test_a_difference_beyond_float32_is_not_finite(form):
    x = torch.full((5 * 72,), 3e38, device=kit.DEVICE)
    with use("gpu"), pytest.raises(NonFiniteError):
        codec_kit.encode_residual(kit.get(form), x, (-x,), kit.plain(5 * 72, 1, 72))
