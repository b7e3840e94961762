"""A product of two thin matrices for each group, in 16 or in 4 bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from compactdist.codecs.base import Codec, check_payload
from compactdist.codecs.kernels import reference as kernels
from compactdist.codecs.options import check_integer
from compactdist.codecs.quantized import check_dtype, finite_amax
from compactdist.codecs.registry import register
from compactdist.codecs.shapes import matrix_shape, padded_nbytes
from compactdist.codecs.with_zero import Int4WithZero

_ITERATIONS = 2
_SEED = 0x5EED
_SMALLEST_FACTOR = 2.0**-40
_SMALLEST_GAIN = 2.0**-87
_SMALLEST_SUM = 2.0**-30


class _LowRank(Codec):
    """Subspace iteration, factors on the wire, and a gain that keeps the error below the input.

    For a group A, with amax near 1: an orthonormal basis Q of random directions; twice ``Q = qr(A^T A Q)``; ``U =
    qr(A Q)``, rounded as it will be sent; ``V = (U^T U)^-1 U^T A``, the least-squares V for the rounded U, rounded as
    well; and the gain ``<A, U V> / <U V, U V>``, whose error energy ``|A|^2 - <A, U V>^2 / |U V|^2`` is never above
    ``|A|^2``. The directions come from a generator of the codec's own, seeded with a constant: equal inputs give
    equal payloads on one machine with one number of threads, and nobody else's random numbers change. The encoder
    uses matrix products; the decoder, which has to agree with every other one to the bit, does not.
    """

    _default_rank: int

    def __init__(self, rank: int) -> None:
        self.rank = check_integer(self.codec_id, "rank", rank, 1, 1024)

    def get_config(self) -> dict[str, Any]:
        """Return the options that differ from their defaults."""
        return {} if self.rank == self._default_rank else {"rank": self.rank}

    def payload_nbytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        check_dtype(self.codec_id, dtype)
        groups, rows, channels = matrix_shape(shape)
        if groups * rows * channels == 0:
            return 0
        rank = min(self.rank, rows, channels)
        factors = self._factor_nbytes(groups * rank, rows) + self._factor_nbytes(groups * rank, channels)
        return padded_nbytes(2 * groups) + factors

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        check_dtype(self.codec_id, x.dtype)
        groups, rows, channels = matrix_shape(x.shape)
        payload = torch.zeros(self.payload_nbytes(x.shape, x.dtype), dtype=torch.uint8, device=x.device)
        if payload.numel() == 0:
            return payload
        flat = x.detach().to(torch.float32).reshape(-1)
        missing = groups * rows * channels - flat.numel()
        if missing:
            flat = torch.cat([flat, flat.new_zeros(missing)])
        values = flat.contiguous().view(groups, rows, channels)
        factor = kernels.power_of_two_near_inverse(finite_amax(values.abs(), x.numel()))
        rank = min(self.rank, rows, channels)
        generator = torch.Generator().manual_seed(_SEED)
        start = torch.randn(channels, rank, generator=generator).to(x.device)
        # Group by group: a batched product may round otherwise than a single one.
        matrices = [values[g] * factor[g] for g in range(groups)]
        u_bytes = self._encode_factor(torch.cat([_left(a, start) for a in matrices]))
        u = self._decode_factor(u_bytes, groups * rank, rows).view(groups, rank, rows)
        v_bytes = self._encode_factor(torch.cat([_right(a, u[g]) for g, a in enumerate(matrices)]))
        v = self._decode_factor(v_bytes, groups * rank, channels).view(groups, rank, channels)
        gain = torch.stack([_gain(a, u[g], v[g]) for g, a in enumerate(matrices)]) / factor.view(-1)
        gain = torch.where(gain < _SMALLEST_GAIN, torch.zeros_like(gain), gain)
        gain_bytes = kernels.encode_bf16(gain)
        payload[: gain_bytes.numel()] = gain_bytes
        at = padded_nbytes(2 * groups)
        payload[at:][: u_bytes.numel()] = u_bytes
        payload[at + self._factor_nbytes(groups * rank, rows) :][: v_bytes.numel()] = v_bytes
        return payload

    @torch.no_grad()
    def decode(self, payload: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        payload = check_payload(payload, self.payload_nbytes(shape, dtype), self.codec_id)
        groups, rows, channels = matrix_shape(shape)
        if payload.numel() == 0:
            return torch.empty(tuple(shape), dtype=dtype, device=payload.device)
        rank = min(self.rank, rows, channels)
        at = padded_nbytes(2 * groups)
        v_at = at + self._factor_nbytes(groups * rank, rows)
        gain = kernels.decode_bf16(payload[: 2 * groups]).view(groups, 1, 1)
        u = self._decode_factor(payload[at:v_at], groups * rank, rows).view(groups, rank, rows, 1)
        v = self._decode_factor(payload[v_at:], groups * rank, channels).view(groups, rank, 1, channels)
        y = u[:, 0] * v[:, 0]
        for k in range(1, rank):
            y += u[:, k] * v[:, k]
        # What cancellation left over could become subnormal by the gain, and machines differ in those.
        y = torch.where(y.abs() < _SMALLEST_SUM, torch.zeros_like(y), y).mul_(gain)
        limit = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
        return y.reshape(-1)[: math.prod(shape)].reshape(tuple(shape)).clamp(-limit, limit).to(dtype)

    def _factor_nbytes(self, components: int, length: int) -> int:
        raise NotImplementedError

    def _encode_factor(self, factor: Tensor) -> Tensor:
        """Encode ``(components, length)``."""
        raise NotImplementedError

    def _decode_factor(self, data: Tensor, components: int, length: int) -> Tensor:
        raise NotImplementedError


def _left(a: Tensor, start: Tensor) -> Tensor:
    """Return an orthonormal U^T ``(rank, R)``, exactly zero where a row of ``a`` is."""
    q = torch.linalg.qr(start)[0]
    for _ in range(_ITERATIONS):
        q = torch.linalg.qr(a.T @ (a @ q))[0]
    u = torch.linalg.qr(a @ q)[0]
    return torch.where(a.any(1, keepdim=True), u, torch.zeros_like(u)).T.contiguous()


def _right(a: Tensor, u: Tensor) -> Tensor:
    """Return the least-squares V ``(rank, C)`` for the rounded U^T, exactly zero where a column of ``a`` is."""
    gram = u @ u.T
    # A component that was rounded to nothing takes no part; the ridge keeps the rest solvable.
    ridge = torch.eye(gram.shape[0], device=a.device) * (gram.diagonal().amax() * 1e-6 + 1e-30)
    v = torch.linalg.solve(gram + ridge, u @ a)
    return torch.where(a.any(0, keepdim=True), v, torch.zeros_like(v))


def _gain(a: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Return the bfloat16 gain of least error for the rounded factors; zero if nothing can be gained."""
    agreement = (v * (u @ a)).sum().clamp(min=0)
    energy = (v * ((u @ u.T) @ v)).sum().clamp(min=0)
    return kernels.round_bf16(kernels.divide_or_zero(agreement, energy).view(1)).view(())


@register
class LowRank(_LowRank):
    """Sends the best product of a ``(R, rank)`` and a ``(rank, C)`` matrix it finds, both in bfloat16.

    A tensor is seen as ``(G, R, C)`` (``shapes.matrix_shape``); r is ``min(rank, R, C)``. The payload is three
    sections, each filled up with zeros to a multiple of 16 bytes:

    1. **gains**, G bfloat16, low byte first, not negative;
    2. **U transposed**, ``(G, r, R)`` bfloat16;
    3. **V**, ``(G, r, C)`` bfloat16.

    The decoder computes ``((U[n,0] V[0,j] + U[n,1] V[1,j]) + ...) * gain`` in float32, components in ascending order,
    every product and every sum rounded; a sum below ``2**-30`` in magnitude counts as zero. The result is clamped to
    the largest finite value of the wanted dtype.

    ``16 r (R + C) / (R C)`` bits for each element: 0.16 for the default at ``[1088, 3072]``. White noise has no low
    rank and is barely reduced; structure is.

    Args:
        rank: Components, 1 to 1024.

    Raises:
        CodecConfigError: The rank is out of range.
    """

    codec_id = "lowrank"
    _default_rank = 8

    def __init__(self, rank: int = 8) -> None:
        super().__init__(rank)

    def _factor_nbytes(self, components: int, length: int) -> int:
        return padded_nbytes(2 * components * length)

    def _encode_factor(self, factor: Tensor) -> Tensor:
        size = factor.abs()
        size = torch.where(size < _SMALLEST_FACTOR, torch.zeros_like(size), kernels.round_bf16(size))
        return kernels.encode_signed_bf16(torch.where(factor < 0, -size, size))

    def _decode_factor(self, data: Tensor, components: int, length: int) -> Tensor:
        return kernels.decode_bf16(data[: 2 * components * length])


@register
class LowRankInt4(_LowRank):
    """As ``lowrank``, with the factors in four bits and a scale for each component of each factor.

    The first section is that of ``lowrank``. The second is the payload (``layout.py``) of U transposed, a tensor
    ``(G * r, 1, R)`` with one scale for each of its ``G * r`` rows, in codes ``sign << 3 | magnitude`` of fifteen
    levels: the Lloyd-Max levels of the unit Gaussian with zero among them, listed in ``with_zero.py``. The third is
    V in the same form, ``(G * r, 1, C)``. The decoder does with the factors what that of ``lowrank`` does.

    About ``4 r (R + C) / (R C)`` bits for each element: 0.16 for the default at ``[1088, 3072]``.

    Args:
        rank: Components, 1 to 1024.

    Raises:
        CodecConfigError: The rank is out of range.
    """

    codec_id = "lowrank_int4"
    _default_rank = 32

    def __init__(self, rank: int = 32) -> None:
        super().__init__(rank)

    @staticmethod
    def _quantizer(length: int) -> Int4WithZero:
        return Int4WithZero(length)

    def _factor_nbytes(self, components: int, length: int) -> int:
        return self._quantizer(length).payload_nbytes((components, 1, length), torch.float32)

    def _encode_factor(self, factor: Tensor) -> Tensor:
        small = factor.abs() < _SMALLEST_FACTOR
        return self._quantizer(factor.shape[1]).encode(
            torch.where(small, torch.zeros_like(factor), factor).unsqueeze(1)
        )

    def _decode_factor(self, data: Tensor, components: int, length: int) -> Tensor:
        return self._quantizer(length).decode(data, (components, 1, length), torch.float32)
