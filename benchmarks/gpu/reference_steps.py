"""One step of a stream in CompactFusion's recipe, in plain torch, on any device: from x and base to payload and back.

Written from its description (``benchmarks/quality/reference_formulas.py``); no code of theirs is used. Tensors are
``(N, C)`` in one 16-bit dtype. A payload is flat uint8: codes, then scales of rows and of channels in float16. Their
bits lie as they describe: eight or four channels in a byte, the lowest first; in a low-rank factor two rows in a byte.
Where they have a fused Triton kernel behind a few torch operations, these are torch operations throughout:
``torch.compile`` fuses them again.

``encode`` returns the payload and the sender's new base, ``decode`` the receiver's. N must be even, C a multiple of 8.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.reference_formulas import factors, mean_scales, min_max_codes

RANK = 32


@dataclass(frozen=True)
class Recipe:
    """A codec of theirs: ``encode(x, base) -> (payload, new base)`` and ``decode(payload, base) -> new base``."""

    encode: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    decode: Callable[[Tensor, Tensor], Tensor]

    def compiled(self, backend: str) -> Recipe:
        """Both functions through ``torch.compile``."""
        options: dict[str, Any] = {"backend": backend, "dynamic": False, "fullgraph": True}
        return Recipe(torch.compile(self.encode, **options), torch.compile(self.decode, **options))


def _packed(codes: Tensor, bits: int) -> Tensor:
    """Codes ``(N, C)`` as bytes ``(N, C * bits / 8)``, the first code in the lowest bits."""
    per = 8 // bits
    shifts = bits * torch.arange(per, device=codes.device)
    return (codes.unflatten(1, (-1, per)).int() << shifts).sum(-1).to(torch.uint8)


def _unpacked(data: Tensor, bits: int) -> Tensor:
    """What :func:`_packed` was given, as int32."""
    shifts = bits * torch.arange(8 // bits, device=data.device)
    return ((data[..., None].int() >> shifts) & ((1 << bits) - 1)).flatten(1)


def _joined(*parts: Tensor) -> Tensor:
    """All bytes, one part after the other."""
    return torch.cat([part.contiguous().view(torch.uint8).flatten() for part in parts])


def _added(base: Tensor, change: Tensor) -> Tensor:
    return (base.float() + change).to(base.dtype)


def _by_sign(bits: Tensor, scale: Tensor) -> Tensor:
    return torch.where(bits.bool(), scale, -scale)


def _by_size(codes: Tensor, scale: Tensor) -> Tensor:
    size = torch.where((codes & 1).bool(), 2 * scale, 0.5 * scale)
    return torch.where((codes & 2).bool(), -size, size)


def _outer(row: Tensor, column: Tensor) -> Tensor:
    return row.float()[:, None] * column.float()


def _quantizer(bits: int, codes_of: Callable[[Tensor, Tensor], Tensor], value_of: Callable[..., Tensor]) -> Recipe:
    """Codes of a few bits beside mean scales of rows and channels."""

    def encode(x: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
        r = x.float() - base.float()
        row, column = mean_scales(r)
        scale = _outer(row, column)
        codes = codes_of(r, scale)
        return _joined(_packed(codes, bits), row, column), _added(base, value_of(codes, scale))

    def decode(payload: Tensor, base: Tensor) -> Tensor:
        n, c = base.shape
        data, row, column = payload.split([n * c * bits // 8, 2 * n, 2 * c])
        scale = _outer(row.view(torch.float16), column.view(torch.float16))
        return _added(base, value_of(_unpacked(data.view(n, -1), bits), scale))

    return Recipe(encode, decode)


def _nibbles(codes: Tensor) -> Tensor:
    """Codes ``(N, rank)`` as bytes ``(N / 2, rank)``: an even row low, the odd one after it high."""
    return codes[0::2] | (codes[1::2] << 4)


def _lowrank_encode(x: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    u, v = factors(x.float() - base.float(), RANK)
    parts = [(_nibbles(codes), scale, low) for codes, scale, low in (min_max_codes(u), min_max_codes(v.T))]
    payload = _joined(*(tensor for part in parts for tensor in part))
    return payload, _lowrank_decode(payload, base)  # theirs decodes again, too


def _lowrank_decode(payload: Tensor, base: Tensor) -> Tensor:
    scales = (2 * RANK, 2 * RANK)
    counts = [base.shape[0] // 2 * RANK, *scales, base.shape[1] // 2 * RANK, *scales]
    u_data, u_scale, u_low, v_data, v_scale, v_low = payload.split(counts)
    u, v = (
        torch.stack((data.view(-1, RANK) & 15, data.view(-1, RANK) >> 4), 1).flatten(0, 1).float()
        * scale.view(torch.float16).float()
        + low.view(torch.float16).float()
        for data, scale, low in ((u_data, u_scale, u_low), (v_data, v_scale, v_low))
    )
    return _added(base, u @ v.T)


RECIPES = {
    "binary": _quantizer(1, lambda r, scale: r >= 0, _by_sign),
    "int2": _quantizer(2, lambda r, scale: (r < 0).int() * 2 + (r.abs() > scale).int(), _by_size),
    "lowrank_int4": Recipe(_lowrank_encode, _lowrank_decode),
}
