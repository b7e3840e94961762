"""Codecs that send one of every m elements: its place in the run of m, and its value in 16 or in 4 bits."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from compactdist import kernels as fused
from compactdist.codecs.base import About, Codec, Session, Terms, check_payload, undisturbed
from compactdist.codecs.options import check_integer
from compactdist.codecs.registry import register
from compactdist.codecs.scalar.quantized import ScalarQuantizer, check_dtype, finite_amax
from compactdist.codecs.scalar.with_zero import Int4WithZero
from compactdist.codecs.shapes import BLOCK_ELEMENTS, matrix_shape, padded_nbytes
from compactdist.codecs.topk_steps import TopKSteps
from compactdist.kernels import reference as kernels
from compactdist.kernels.reference import topk
from compactdist.kernels.spec import MatrixView

_SMALLEST_VALUE = 2.0**-118


class _OneOfM(Codec):
    """Keeps the element of largest magnitude, the first of equals, in each run of m; the others decode to zero."""

    def __init__(self, m: int = 8) -> None:
        self.m = check_integer(self.codec_id, "m", m, 2, 16)

    def get_config(self) -> dict[str, Any]:
        """Return the options that differ from their defaults."""
        return {} if self.m == 8 else {"m": self.m}

    def payload_nbytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        check_dtype(self.codec_id, dtype)
        groups, runs = self.runs_of(shape)
        return self.places_nbytes(groups * runs) + self._values_nbytes(groups, runs)

    @undisturbed
    def encode(self, x: Tensor) -> Tensor:
        check_dtype(self.codec_id, x.dtype)
        groups, runs = self.runs_of(x.shape)
        if groups * runs == 0:
            return torch.empty(0, dtype=torch.uint8, device=x.device)
        columns = topk.in_runs(x.detach().to(torch.float32).reshape(-1).view(groups, -1), self.m)
        finite_amax(columns.abs(), x.numel())
        index, kept = topk.pick(columns)
        payload = torch.zeros(self.payload_nbytes(x.shape, x.dtype), dtype=torch.uint8, device=x.device)
        payload[: index.numel()] = index
        values = self._encode_values(kept)
        payload[self.places_nbytes(groups * runs) :][: values.numel()] = values
        return payload

    @undisturbed
    def decode(self, payload: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        payload = check_payload(payload, self.payload_nbytes(shape, dtype), self.codec_id)
        groups, runs = self.runs_of(shape)
        if groups * runs == 0:
            return torch.empty(tuple(shape), dtype=dtype, device=payload.device)
        values_at = self.places_nbytes(groups * runs)
        kept = self._decode_values(payload[values_at:], groups, runs).view(groups, runs)
        y = topk.spread(payload[: -(-groups * runs // 2)], kept, self.m)
        y = y[:, : math.prod(shape) // groups].reshape(tuple(shape))
        limit = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
        return y.clamp(-limit, limit).to(dtype)

    def open(self, view: MatrixView, dtype: torch.dtype, device: torch.device) -> Session:
        return _TopKSession(self, view, dtype, device)

    def runs_of(self, shape: Sequence[int]) -> tuple[int, int]:
        """Groups, and runs of m in each."""
        groups = matrix_shape(shape)[0]
        return groups, -(-(math.prod(shape) // max(groups, 1)) // self.m)

    @staticmethod
    def places_nbytes(runs: int) -> int:
        """Bytes of the places of so many runs, before the values."""
        return padded_nbytes(-(-runs // 2))

    @property
    def quantizer(self) -> ScalarQuantizer | None:
        """Codes the kept elements, seen as ``(G, 1, K)``; ``None``: they are sent as bfloat16."""
        return None

    @abstractmethod
    def _values_nbytes(self, groups: int, runs: int) -> int: ...

    @abstractmethod
    def _encode_values(self, kept: Tensor) -> Tensor: ...

    @abstractmethod
    def _decode_values(self, data: Tensor, groups: int, runs: int) -> Tensor: ...


class _TopKSession(Session):
    """A session whose steps are compiled kernels, where there are any; the bytes are those of the codec."""

    __slots__ = ("_chosen_under", "_device_steps", "_steps")

    takes_velocity = True

    codec: _OneOfM

    def __init__(self, codec: _OneOfM, view: MatrixView, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(codec, view, dtype, device)
        self._steps: fused.Steps | None
        self._device_steps: fused.DeviceSteps | None
        self._choose()

    def _choose(self) -> None:
        self._chosen_under, self._steps, self._device_steps = fused.choice.forced, None, None
        codec, quantizer = self.codec, self.codec.quantizer
        spec = None if quantizer is None else quantizer.spec
        if quantizer is None or spec is not None:
            self._device_steps = fused.device_topk_steps_for(self.view, codec.m, spec, self.dtype, self.device)
        if self._device_steps is not None:
            self._steps = self._device_steps
            return
        picks = fused.picks_for(self.view, codec.m, self.dtype, self.device)
        if picks is None:
            return
        groups, runs = codec.runs_of(self.view.shape)
        count, values = groups * runs, None
        if quantizer is not None:
            values = quantizer.open(MatrixView(count, groups, 1, runs), torch.float32, self.device)
        self._steps = TopKSteps(picks, values, codec.places_nbytes(count), count)

    @property
    def device_steps(self) -> fused.DeviceSteps | None:
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
        if self._chosen_under is not fused.choice.forced:
            self._choose()
        steps = self._steps if row_weights is None and self._takes(x, *terms) else None
        if steps is None or not steps.encode(x.detach(), terms, out, payload):
            # raises the NonFiniteError where a kernel met a value that is not finite
            super().encode(x, terms, out, payload, row_weights=row_weights)

    @undisturbed
    def decode(self, payload: Tensor, terms: Terms, out: Tensor) -> None:
        if self._chosen_under is not fused.choice.forced:
            self._choose()
        payload = check_payload(payload, self.payload_nbytes, self.codec.codec_id)
        if self._steps is None or not self._takes(out, *terms) or not self._steps.decode(payload, terms, out):
            super().decode(payload, terms, out)

    def _takes(self, *tensors: Tensor) -> bool:
        return all(one.dtype == self.dtype and one.is_contiguous() for one in tensors)


@register
class TopK(_OneOfM):
    """Keeps one of every m elements, the largest, as a bfloat16; the others decode to zero.

    A tensor is seen as G groups (``shapes.matrix_shape``) of N elements in row-major order; each group is filled up
    with zeros to ``K = ceil(N / m)`` runs of m. The payload is two sections, each filled up with zeros to a multiple
    of 16 bytes:

    1. **places**, ``G * K`` of 4 bits, 0 to m - 1, the first of two in the low bits of its byte;
    2. **values**, ``G * K`` bfloat16, low byte first, rounded to nearest even, saturated, zero below ``2**-118``.

    ``20 / m`` bits for each element: 2.5 for the default, NMSE 0.57 on white Gaussian data.

    Args:
        m: One of how many elements is kept, 2 to 16.

    Raises:
        CodecConfigError: m is out of range.
    """

    codec_id = "topk"
    about = About(
        sends="the largest of every m elements, in bfloat16",
        use="residuals with few changes among many zeros",
        source="1:m block sparsity: CompactFusion, arXiv 2507.17511",
    )

    def _values_nbytes(self, groups: int, runs: int) -> int:
        return padded_nbytes(2 * groups * runs)

    def _encode_values(self, kept: Tensor) -> Tensor:
        return kernels.encode_signed_bf16(kernels.round_signed_bf16(kept, _SMALLEST_VALUE))

    def _decode_values(self, data: Tensor, groups: int, runs: int) -> Tensor:
        return kernels.decode_bf16(data[: 2 * groups * runs])


@register
class TopKInt4(_OneOfM):
    """Keeps one of every m elements, the largest, in four bits with a scale for each block of kept elements.

    The places are those of ``topk``. The second section is the payload (``sections.py``, ``scales="block"``) of the
    kept values, a tensor ``(G, 1, K)``, in codes ``sign << 3 | magnitude`` of fifteen levels: the Lloyd-Max levels of
    the unit Gaussian with zero among them, listed in ``with_zero.py``.

    About ``8.1 / m`` bits for each element: 1.02 for the default, NMSE 0.57 on white Gaussian data.

    Args:
        m: One of how many elements is kept, 2 to 16.
        block: Kept elements to a scale, at most; 2 to 65536.

    Raises:
        CodecConfigError: An option is out of range.
    """

    codec_id = "topk_int4"
    about = About(
        sends="the largest of every m elements, in four bits",
        use="the same, at two fifths of the bytes",
        source="1:m block sparsity: CompactFusion, arXiv 2507.17511; levels as `int4`, with a zero",
    )

    def __init__(self, m: int = 8, block: int = BLOCK_ELEMENTS) -> None:
        super().__init__(m)
        self.block = check_integer(self.codec_id, "block", block, 2, 65536)
        self._values = Int4WithZero(block)

    def get_config(self) -> dict[str, Any]:
        """Return the options that differ from their defaults."""
        config = super().get_config()
        if self.block != BLOCK_ELEMENTS:
            config["block"] = self.block
        return config

    @property
    def quantizer(self) -> ScalarQuantizer:
        return self._values

    def _values_nbytes(self, groups: int, runs: int) -> int:
        return self._values.payload_nbytes((groups, 1, runs), torch.float32)

    def _encode_values(self, kept: Tensor) -> Tensor:
        return self._values.encode(kept.unsqueeze(1))

    def _decode_values(self, data: Tensor, groups: int, runs: int) -> Tensor:
        return self._values.decode(data, (groups, 1, runs), torch.float32)
