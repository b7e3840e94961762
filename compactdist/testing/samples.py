"""Tensors that find a codec's weak places: shapes and distributions; a seed draws the same tensor again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["DISTRIBUTIONS", "FLOAT_DTYPES", "SHAPES", "sample"]

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""The dtypes that every codec takes."""

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
"""Every way in which memory can be walked: empty, 0-d, odd, flat with a tail, tokens, groups, heads."""


def _gaussian(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64, device="cpu")


def _hot_cross(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    x = _gaussian(shape, g) * 1e-3
    if x.dim() >= 2 and x.numel():
        x[..., 0, :] += 100.0
        x[..., 0] -= 100.0
    return x


def _one_hot(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    x = torch.zeros(shape, dtype=torch.float64, device="cpu")
    if x.numel():
        x.view(-1)[int(torch.randint(x.numel(), (), generator=g, device="cpu"))] = -3.0
    return x


def _laplace(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    u = torch.rand(shape, generator=g, dtype=torch.float64, device="cpu") - 0.5
    return -u.sign() * torch.log1p(-2 * u.abs().clamp(max=0.4999999))


def _student4(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    normal = torch.randn((5, *shape), generator=g, dtype=torch.float64, device="cpu")
    return normal[0] / normal[1:].square().mean(0).sqrt()


def _channel_scaled(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    x = _gaussian(shape, g)
    return x * torch.randn(shape[-1], generator=g, dtype=torch.float64, device="cpu").exp() if x.dim() else x


DISTRIBUTIONS: dict[str, Callable[[tuple[int, ...], torch.Generator], Tensor]] = {
    "gaussian": _gaussian,
    "laplace": _laplace,
    "student4": _student4,
    "channel_scaled": _channel_scaled,
    "one_hot": _one_hot,
    "constant": lambda shape, g: torch.full(shape, -0.7, dtype=torch.float64, device="cpu"),
    "zero": lambda shape, g: torch.zeros(shape, dtype=torch.float64, device="cpu"),
    "hot_cross": _hot_cross,
    "wide_range": lambda shape, g: _gaussian(shape, g) * torch.exp(20 * _gaussian(shape, g)),
    "denormal": lambda shape, g: _gaussian(shape, g) * 1e-40,
    "huge": lambda shape, g: _gaussian(shape, g) * 1e39,
}
"""Name to a function of shape and generator; the function's float64 values may be beyond a narrower dtype's range."""


def sample(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Draw a finite tensor of a named distribution, clamped to what ``dtype`` (and float32) can hold."""
    x = DISTRIBUTIONS[name](shape, torch.Generator().manual_seed(seed))
    limit = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    return x.clamp(-limit, limit).to(dtype)
