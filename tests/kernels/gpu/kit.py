"""What the tests of the Triton kernels share: the device, forms of codecs, cuts, inputs, and the comparison."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from compactdist import codecs
from compactdist.codecs import Codec
from compactdist.kernels import use
from compactdist.state.matrix_view import Layout, blocks, plain
from tests.codecs import kit as codec_kit
from tests.kernels.gpu.conftest import INTERPRETED

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CODECS = ("binary", "ternary", "int2", "int3", "int4", "int8", "fp8")
FORMS = (
    *({"id": codec_id} for codec_id in CODECS),
    {"id": "int2", "centroids": "uniform"},
    {"id": "fp8", "format": "e5m2"},
    *({"id": codec_id, "scales": "block"} for codec_id in CODECS),
    {"id": "int4", "scales": "block", "block": 1000, "centroids": "uniform"},
    {"id": "int8", "scales": "block", "block": 33},
)
# Many rows take longest to interpret, so where they matter there are few channels.
VIEWS = (
    plain(70 * 264, 1, 264),
    plain(2 * 66 * 72, 2, 72),
    plain(3 * 65 * 65, 3, 65),
    plain(3 * 5 * 136, 3, 136),
    plain(66 * 40, 1, 40),
    plain(40 * 9, 1, 9),
    plain(2 * 1000, 2, 1000),
    blocks(17),
    blocks(300),
    blocks(128 * 6 + 8),
    Layout("(kv b h s d) -> kv (b s) (h d)", kv=2, b=2, h=3, d=32).resolve(2 * 2 * 3 * 5 * 32),
    Layout("(b h s d) -> (b h) s d", b=2, h=3, d=9).resolve(2 * 3 * 20 * 9),
    Layout("(h s d) -> 1 s (d h)", h=3, d=24).resolve(3 * 7 * 24),
)
KINDS = ("zeros", "one hot", "denormal", "denormal and normal", "huge", "tiny", "wide", "zero rows", "L", "constant")


def name_of(form: Any) -> str:
    """What pytest calls a form."""
    return "-".join(str(value) for value in form.values())


def draw(kind: str, numel: int, channels: int, seed: int = 0) -> Tensor:
    """A change of a named kind, float64 ``(numel,)``."""
    noise = torch.randn(numel, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    row, column = torch.arange(numel) // channels, torch.arange(numel) % channels
    made = {
        "gaussian": lambda: noise,
        "zeros": lambda: 0 * noise,
        "one hot": lambda: noise * (torch.arange(numel) == numel // 3),
        "denormal": lambda: noise * 2.0**-130,
        "denormal and normal": lambda: torch.where(noise > 0, noise, noise * 2.0**-128),
        "huge": lambda: noise.clamp(-1, 1) * 1.6e38,
        "tiny": lambda: noise * 2.0**-70,
        "wide": lambda: noise * torch.exp2(40 * noise.flip(0)),
        "zero rows": lambda: noise * (row % 3 == 0),
        "L": lambda: torch.where((row == 0) | (column == 0), noise * 100, noise * 1e-3),
        "constant": lambda: 0 * noise + 0.75,
    }
    return made[kind]()


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """To a dtype, held within half of what it can hold."""
    limit = torch.finfo(dtype).max / 2
    return x.clamp(-limit, limit).to(dtype)


def raw(x: Tensor) -> Tensor:
    """A copy of the bytes of a tensor, on the CPU."""
    return x.detach().cpu().contiguous().view(torch.uint8).clone()


def check_same(codec: Codec, x: Tensor, terms: tuple[Tensor, ...], view: Any) -> None:
    """A step with the kernels, decoding in place if there is a base, gives the bytes of the reference on the CPU."""
    expected = torch.empty_like(x)
    with use("reference"):
        reference = codec_kit.encode_residual(codec, x, terms, view, expected)
    before = tuple(term.to(DEVICE, copy=True) for term in terms)
    out = torch.empty_like(x, device=DEVICE)
    held = before[0] if terms else torch.empty_like(x, device=DEVICE)
    payload = torch.full_like(reference, 255, device=DEVICE)  # what is not written shows
    with use("gpu"):
        copy = torch.full_like(out, torch.nan) if terms else None
        codec_kit.encode_residual(codec, x.to(DEVICE), before, view, out, payload, copy)
        codec_kit.decode_residual(codec, payload, before, view, held)
    assert torch.equal(payload.cpu(), reference)
    for one in (out, held) if copy is None else (out, held, copy):
        assert torch.equal(raw(one), raw(expected))


def rotated(form: Any, values: Iterable[Any], count: int) -> list[Any]:
    """Some of many values, others for each form: the interpreter is too slow for all of them."""
    values, start = list(values), FORMS.index(form) * count
    return [values[(start + i) % len(values)] for i in range(count)]


def get(form: Any) -> Codec:
    """The codec of a form."""
    return codecs.get(form)
