"""What the low-rank codecs share: a product of two thin matrices for each group, found, fitted and multiplied out."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compactdist import kernels as fused
from compactdist.codecs.base import Codec, Session, Terms, check_payload, residual_of, undisturbed
from compactdist.codecs.lowrank.factors import Fitted
from compactdist.codecs.lowrank.products import Products, check_weights, of_matrices, of_residual
from compactdist.codecs.lowrank.subspace import Starts, evened, left_directions
from compactdist.codecs.options import check_integer
from compactdist.codecs.scalar.quantized import check_dtype
from compactdist.codecs.shapes import matrix_shape, padded_nbytes
from compactdist.kernels import cpu_runs
from compactdist.kernels import reference as kernels
from compactdist.kernels.spec import FactorSpec, MatrixView

if TYPE_CHECKING:
    from compactdist.kernels.gpu.lowrank_steps import LowRankSteps

_SMALLEST_GAIN = 2.0**-87
_SMALLEST_SUM = 2.0**-30


class LowRankCodec(Codec):
    """Subspace iteration, factors on the wire, and a gain that keeps the error below the input.

    For a group A, scaled to elements near 1: U, an orthonormal basis of its strongest left directions
    (``subspace.py``), rounded as it will be sent; ``V = (U^T U)^-1 U^T A``, the least-squares V for the rounded U,
    rounded as well; and the gain ``<A, U V> / <U V, U V>``, whose error energy ``|A|^2 - <A, U V>^2 / |U V|^2`` is
    never above ``|A|^2``, wherever the search began. Where products are of bfloat16-rounded matrices, the gain is that
    of the smallest ``<A, U V>`` the rounding allows. Random directions come from a generator of the codec's own: equal
    inputs (for a stream, equal sequences of inputs) give equal payloads on one machine with one number of threads, and
    nobody else's random numbers change. The encoder uses matrix products; the decoder, which has to agree with every
    other one to the bit, does not.
    """

    takes_row_weights = True
    _default_rank: int

    @property
    def velocity_share(self) -> float:
        """Half: few components hold a change, and many the noise of the frames that a velocity is made of."""
        return 0.5

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

    @undisturbed
    def encode(self, x: Tensor, *, row_weights: Tensor | None = None) -> Tensor:
        """As ``Codec.encode``.

        Args:
            x: The tensor to encode.
            row_weights: How much errors in a row matter, ``(R,)`` or ``(G, R)``, positive; only their ratios count.
                Factors then minimise the sum of squared errors times squared weights (CompactFusion, arXiv 2507.17511,
                weights the rows of K by how strongly they are attended to). The gain remains that of least unweighted
                error, so the error energy stays below that of the input. The decoder needs no weights.

        Raises:
            CodecConfigError: The codec does not take the dtype of ``x``, or weights of another shape, or not all
                positive, finite and within a factor of 2**20.
            NonFiniteError: ``x`` holds NaN or infinity.
        """
        check_dtype(self.codec_id, x.dtype)
        return self._encode(_matrices(x), x.numel(), None, row_weights)

    def open(self, view: MatrixView, dtype: torch.dtype, device: torch.device) -> Session:
        return LowRankSession(self, view, dtype, device)

    def encode_difference(
        self, x: Tensor, terms: Terms, view: MatrixView, memory: dict[str, Any], row_weights: Tensor | None
    ) -> Tensor:
        """The payload of ``x`` less the sum of ``terms``; replaces entries of ``memory``, the stream's."""
        check_dtype(self.codec_id, x.dtype)
        taken = of_residual(x, terms, view)
        if taken is not None:
            return self._encode_products(*taken, view.shape, memory, row_weights)
        residual = residual_of(x.detach(), terms)
        return self._encode(view.to_matrix(residual), view.numel, memory, row_weights)

    def _encode(
        self, values: Tensor, elements: int, memory: dict[str, Any] | None, row_weights: Tensor | None
    ) -> Tensor:
        """Encode float32 ``(G, R, C)``."""
        if values.numel() == 0:
            return torch.zeros(0, dtype=torch.uint8, device=values.device)
        groups, rows, channels = values.shape
        return self._encode_products(*of_matrices(values, elements), (groups, rows, channels), memory, row_weights)

    def _encode_products(
        self,
        products: list[Products],
        factor: Tensor,
        shape: tuple[int, int, int],
        memory: dict[str, Any] | None,
        row_weights: Tensor | None,
    ) -> Tensor:
        weights = check_weights(self.codec_id, row_weights, shape, factor.device)
        return self._encode_weighted(products, factor, shape, memory, weights)

    def _encode_weighted(
        self,
        products: list[Products],
        factor: Tensor,
        shape: tuple[int, int, int],
        memory: dict[str, Any] | None,
        weights: Tensor | None,
    ) -> Tensor:
        groups, rows, channels = shape
        payload = torch.zeros(self.payload_nbytes(shape, torch.float32), dtype=torch.uint8, device=factor.device)
        rank = min(self.rank, rows, channels)
        starts = Starts(memory, shape, rank, factor.device)
        u_parts, v_parts, gains = [], [], []
        # Group by group: a batched product may round otherwise than a single one.
        for g, one in enumerate(products):
            w = None if weights is None else weights[g]
            seen = replace(one, weights=w)
            start, rounds = starts.of_group(g), starts.rounds
            while True:
                found = left_directions(seen, start, rounds)
                u_part = self._round(found[:rank] if w is None else found[:rank] / w)
                u = u_part.value
                fitted = u if w is None else u * w
                along = seen.with_columns(torch.cat([fitted, found[rank:]]) if starts.wide else fitted)
                if not starts.disappoint(g, along, one.norm):
                    break
                start, rounds = evened(along), 1
            v_part = self._round(_right(fitted @ fitted.T, along[:rank]))
            plain = along[:rank] if w is None else one.with_columns(u)
            u_parts.append(u_part)
            v_parts.append(v_part)
            gains.append(_gain(one, u, v_part.value, plain) / factor[g])
        gain = torch.stack(gains)
        gain = torch.where(gain < _SMALLEST_GAIN, torch.zeros_like(gain), gain)
        gain_bytes = kernels.encode_bf16(gain)
        payload[: gain_bytes.numel()] = gain_bytes
        at = padded_nbytes(2 * groups)
        for parts, length in ((u_parts, rows), (v_parts, channels)):
            data = self._pack(parts, length)
            payload[at:][: data.numel()] = data
            at += self._factor_nbytes(groups * rank, length)
        starts.remember()
        return payload

    @undisturbed
    def decode(self, payload: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        payload = check_payload(payload, self.payload_nbytes(shape, dtype), self.codec_id)
        if payload.numel() == 0:
            return torch.empty(tuple(shape), dtype=dtype, device=payload.device)
        y = multiply(*self._factors(payload, matrix_shape(shape)))
        limit = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
        return y.reshape(-1)[: math.prod(shape)].reshape(tuple(shape)).clamp_(-limit, limit).to(dtype)

    def add_decoded(self, payload: Tensor, terms: Terms, view: MatrixView, out: Tensor) -> bool:
        """Write the sum of ``terms`` plus the decoded payload to ``out`` in one pass; ``False`` if no kernel can."""
        if not view.numel or not cpu_runs(view.numel):
            return False
        from compactdist.kernels.cpu import products as cpu_lowrank

        if not cpu_lowrank.supports(out, *terms):
            return False
        payload = check_payload(payload, self.payload_nbytes(view.shape, torch.float32), self.codec_id)
        u, v, gain = self._factors(payload, view.shape)
        cpu_lowrank.add_product(u, v, _SMALLEST_SUM, gain, terms, view, out)
        return True

    def _factors(self, payload: Tensor, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """U^T ``(G, r, R)``, V ``(G, r, C)`` and gains ``(G, 1, 1)`` of a payload."""
        groups, rows, channels = shape
        rank = min(self.rank, rows, channels)
        at = padded_nbytes(2 * groups)
        v_at = at + self._factor_nbytes(groups * rank, rows)
        gain = kernels.decode_bf16(payload[: 2 * groups]).view(groups, 1, 1)
        u = self._decode_factor(payload[at:v_at], groups * rank, rows).view(groups, rank, rows)
        v = self._decode_factor(payload[v_at:], groups * rank, channels).view(groups, rank, channels)
        return u, v, gain

    @property
    def factor_spec(self) -> FactorSpec | None:
        """What the kernels of a device are told; ``None``: there are none for these options."""
        return None

    @abstractmethod
    def _factor_nbytes(self, components: int, length: int) -> int: ...

    @abstractmethod
    def _round(self, factor: Tensor) -> Fitted:
        """Round ``(r, length)`` to what will be sent."""

    @abstractmethod
    def _pack(self, parts: list[Fitted], length: int) -> Tensor:
        """The section of a factor, 1-D uint8: all groups, one after the other."""

    @abstractmethod
    def _decode_factor(self, data: Tensor, components: int, length: int) -> Tensor: ...


class LowRankSession(Session):
    """A stream whose encoder begins its search where the last frame's ended.

    The memory lies on the sending side only: it may change which payload is chosen, never how one is decoded. Kernels
    of a device have a memory of their own.
    """

    __slots__ = ("_chosen_under", "_device_steps", "_memory", "_staged")

    remembers = takes_velocity = True

    codec: LowRankCodec

    def __init__(self, codec: LowRankCodec, view: MatrixView, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(codec, view, dtype, device)
        self._memory: dict[str, Any] = {}
        self._staged: dict[str, Any] | None = None
        self._device_steps: LowRankSteps | None
        self._choose()

    def _choose(self) -> None:
        self._chosen_under, spec = fused.choice.forced, self.codec.factor_spec
        self._device_steps = (
            None if spec is None else fused.device_lowrank_steps_for(spec, self.view, self.dtype, self.device)
        )

    @property
    def device_steps(self) -> LowRankSteps | None:
        if self._chosen_under is not fused.choice.forced:
            self._choose()
        return self._device_steps

    @property
    def takes_rounded(self) -> bool:
        return self.device_steps is not None

    @undisturbed
    def encode(
        self, x: Tensor, terms: Terms, out: Tensor | None, payload: Tensor, *, row_weights: Tensor | None = None
    ) -> None:
        steps = self.device_steps
        if steps is not None and row_weights is None and steps.encode(x.detach(), terms, out, payload):
            return
        terms, memory = tuple(map(fused.restored, terms)), dict(self._memory)  # entries are replaced, never written to
        payload.copy_(self.codec.encode_difference(x, terms, self.view, memory, row_weights))
        if out is not None:
            self.decode(payload, terms, out)
        self._staged = memory

    @undisturbed
    def decode(self, payload: Tensor, terms: Terms, out: Tensor) -> None:
        steps = self.device_steps
        if steps is not None:
            payload = check_payload(payload, self.payload_nbytes, self.codec.codec_id)
            if out.is_contiguous() and steps.decode(payload, terms, out):
                return
            terms = tuple(map(fused.restored, terms))
        if not self.codec.add_decoded(payload, terms, self.view, out):
            super().decode(payload, terms, out)

    def commit(self) -> None:
        if self._staged is not None:
            self._memory, self._staged = self._staged, None
        if self._device_steps is not None:
            self._device_steps.commit()

    def rollback(self) -> None:
        self._staged = None
        if self._device_steps is not None:
            self._device_steps.rollback()

    def move(self, to: Callable[[Tensor], Tensor]) -> None:
        self._memory = _each_tensor(to, self._memory)
        if self._device_steps is not None:
            self._device_steps.memory = tuple(map(to, self._device_steps.memory))

    def copy_memory(self) -> tuple[dict[str, Any], tuple[Tensor, ...]]:
        there = () if self._device_steps is None else self._device_steps.memory
        return _each_tensor(torch.clone, self._memory), tuple(map(torch.clone, there))

    def take_memory(self, memory: tuple[dict[str, Any], tuple[Tensor, ...]]) -> None:
        here, there = memory
        self._memory = _each_tensor(torch.clone, here)
        if self._device_steps is not None:
            self._device_steps.memory = tuple(map(torch.clone, there))

    @property
    def held_bytes(self) -> int:
        held = [entry for entry in self._memory.values() if isinstance(entry, Tensor)]
        if self._device_steps is not None:
            held += self._device_steps.memory
        return sum(entry.nbytes for entry in held)


def _each_tensor(to: Callable[[Tensor], Tensor], memory: dict[str, Any]) -> dict[str, Any]:
    """A memory with what ``to`` makes of each tensor."""
    return {name: to(entry) if isinstance(entry, Tensor) else entry for name, entry in memory.items()}


def multiply(u: Tensor, v: Tensor, gain: Tensor) -> Tensor:
    """``(G, r, R)`` and ``(G, r, C)`` to ``(G, R, C)``, the sum over r in ascending order times ``gain (G, 1, 1)``."""
    groups, rank, rows = u.shape
    if u.device.type == "cpu" and cpu_runs(groups * rows * v.shape[2]):
        from compactdist.kernels.cpu import products as cpu_lowrank

        product: Tensor = cpu_lowrank.multiply(u, v, _SMALLEST_SUM, gain)
        return product
    y = u[:, 0, :, None] * v[:, 0, None, :]
    for k in range(1, rank):
        y += u[:, k, :, None] * v[:, k, None, :]
    # The gain could make what cancellation left over subnormal, and machines differ in subnormal numbers.
    return torch.where(y.abs() < _SMALLEST_SUM, torch.zeros_like(y), y).mul_(gain)


def _matrices(x: Tensor) -> Tensor:
    """Any tensor as float32 ``(G, R, C)``; the tail of a flat tensor is filled up with zeros."""
    shape = matrix_shape(x.shape)
    flat = x.detach().to(torch.float32).reshape(-1)
    missing = math.prod(shape) - flat.numel()
    if missing:
        flat = torch.cat([flat, flat.new_zeros(missing)])
    return flat.contiguous().view(shape)


def _right(gram: Tensor, along: Tensor) -> Tensor:
    """The least-squares V ``(rank, C)`` for the rounded U^T, from U^T U and U^T A; exactly zero where U^T A is."""
    # A component that was rounded to nothing takes no part; the ridge keeps the rest solvable.
    ridge = torch.eye(gram.shape[0], dtype=torch.float32, device=gram.device) * (gram.diagonal().amax() * 1e-6 + 1e-30)
    inverse: Tensor = torch.linalg.inv(gram + ridge)
    return inverse @ along


def _gain(products: Products, u: Tensor, v: Tensor, along: Tensor) -> Tensor:
    """The bfloat16 gain of least error for the rounded factors, given U^T A; zero if there is none."""
    v_gram = v @ v.T
    energy = ((u @ u.T) * v_gram).sum().clamp(min=0)
    agreement = ((v * along).sum() - products.doubt(u, v, v_gram, energy, along)).clamp(min=0)
    gain: Tensor = kernels.round_bf16(kernels.divide_or_zero(agreement, energy).view(1)).view(())
    return gain
