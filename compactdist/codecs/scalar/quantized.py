"""What the scalar quantizers share: the view as matrices, the scales, the payload.

The wire format is in ``layout.py``. The encoder is free to choose scales and codes; it keeps three rules:

* the decoder's rounded ``t`` is used from the moment it exists, so later steps correct its rounding;
* nothing is divided by a scale that may be zero;
* a channel scale below 2**-87 becomes zero. Every product in the decoder then stays a normal float, and
  machines that flush subnormals agree with those that do not. Residuals that small (1e-26) are left for the
  receiver as they are.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from compactdist.codecs.base import Codec, Session, Terms, check_payload
from compactdist.codecs.options import check_choice, check_integer
from compactdist.codecs.scalar import affine
from compactdist.codecs.scalar.layout import Layout
from compactdist.codecs.scalar.scales import RowScales, gaussian_scale, scale_factor, storable_scale
from compactdist.codecs.shapes import BLOCK_ELEMENTS, matrix_shape, whole_view
from compactdist.errors import CodecConfigError, NonFiniteError
from compactdist.kernels import fused_kernels
from compactdist.kernels import reference as kernels
from compactdist.kernels.spec import MatrixView

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def finite_amax(magnitude: Tensor, elements: int | None = None) -> Tensor:
    """Return the largest magnitude of each group, ``(G, 1, 1)``, after making sure that all are finite.

    This is the only place where encoding waits for the device.

    Args:
        magnitude: float32 ``(G, R, C)``.
        elements: Elements of the original tensor, for the message; those of ``magnitude`` unless given.

    Raises:
        NonFiniteError: Some element is NaN or infinite.
    """
    amax = magnitude.amax(dim=(1, 2), keepdim=True)  # amax carries NaN through
    if not bool(torch.isfinite(amax).all()):
        bad = int((~torch.isfinite(magnitude)).sum())
        total = magnitude.numel() if elements is None else elements
        raise NonFiniteError(
            f"{bad} of {total} elements are NaN, infinite or beyond float32, and a lossy codec "
            "would spread them over their rows and channels; find what produced them, or send this tensor "
            "with codec 'raw'"
        )
    return amax


def check_dtype(codec_id: str, dtype: torch.dtype) -> None:
    """Make sure that a lossy codec can take this dtype.

    Raises:
        CodecConfigError: It cannot.
    """
    if dtype not in DTYPES:
        takes = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
        raise CodecConfigError(
            f"codec {codec_id!r} takes {takes}, got {str(dtype).removeprefix('torch.')}; codec 'raw' takes every dtype"
        )


class ScalarQuantizer(Codec):
    """A codec of one level for each element, scaled by row and by channel, or by block.

    Subclasses set ``bits`` and give ``_fit`` and ``_levels``, and may replace ``_row_statistic``.

    Args:
        scales: ``"token_channel"``: a scale for each row and each channel, as ``layout.py`` says. ``"block"``: one
            for each run of elements in row-major order.
        block: Elements to a block, at most; 2 to 65536.

    Raises:
        CodecConfigError: An option has a value it does not take.
    """

    bits: ClassVar[int]
    base3: ClassVar[bool] = False
    offsets: bool = False
    scale_choices: ClassVar[tuple[str, ...]] = ("token_channel", "block")
    fused: Literal["", "sign", "nearest", "trits", "linear", "e4m3", "e5m2"] = ""
    """What the compiled kernels compute in place of ``_row_statistic`` and ``_fit``: the sign; the sign and the nearest
    of ``magnitudes``; the same with zero among them, as trits; integers up to 127; float8. Empty: nothing of theirs,
    the steps go through ``encode`` and ``decode``. A subclass that changes any of this sets it to empty."""

    reach: float = 0.0
    """The level of the largest code, where scales are such that the largest value takes it."""

    magnitudes: tuple[float, ...] = ()
    """Levels of least error in units of sigma, ascending, where there is a table of them."""

    widening: ClassVar[int] = 1
    """How wide the scale is for tails heavier than those of a Gaussian; see ``scales.gaussian_scale``."""

    def __init__(self, scales: str = "token_channel", block: int = BLOCK_ELEMENTS) -> None:
        self.scales = check_choice(self.codec_id, "scales", scales, self.scale_choices)
        self.block = check_integer(self.codec_id, "block", block, 2, 65536)
        if scales != "block" and block != BLOCK_ELEMENTS:
            raise CodecConfigError(f"codec {self.codec_id!r}: block={block} needs scales='block'")

    def get_config(self) -> dict[str, Any]:
        """Return the options that differ from their defaults."""
        config: dict[str, Any] = {}
        if self.scales != "token_channel":
            config["scales"] = self.scales
            if self.block != BLOCK_ELEMENTS:
                config["block"] = self.block
        return config

    def layout_of(self, shape: Sequence[int]) -> Layout:
        """Return the layout of the payload for a tensor of this shape."""
        if self.scales == "block":
            return Layout.of_blocks(shape, self.bits, self.block, base3=self.base3, offsets=self.offsets)
        return Layout.of(shape, self.bits, base3=self.base3)

    def payload_nbytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        check_dtype(self.codec_id, dtype)
        return self.layout_of(shape).total_nbytes

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        check_dtype(self.codec_id, x.dtype)
        layout = self.layout_of(x.shape)
        if layout.elements == 0:
            return torch.empty(0, dtype=torch.uint8, device=x.device)
        kernels, view = self.fused_steps(x.device, x.numel()), self._whole(x.shape)
        if kernels is not None and kernels.supports(self, view, x):
            payload: Tensor | None = kernels.encode_residual(self, x.detach().reshape(-1), (), view, None)
            if payload is not None:
                return payload
        values = self._as_matrices(x, layout)
        magnitude = values.abs()
        return self.encode_checked(values, magnitude, finite_amax(magnitude, x.numel()), layout)

    def encode_checked(self, values: Tensor, magnitude: Tensor, amax: Tensor, layout: Layout) -> Tensor:
        """Encode without looking at any value from the host.

        Args:
            values: float32 ``(G, R, C)``, finite.
            magnitude: Their absolute values in memory of their own; overwritten.
            amax: float32 ``(G, 1, 1)``, the largest magnitude of each group.
            layout: The layout of the original shape.
        """
        if layout.offsets:
            return affine.encode(values, amax, layout)
        statistic = self._row_statistic(magnitude)
        factor = scale_factor(statistic, amax)
        if bool((factor != 1).any()):
            magnitude.mul_(factor)
            statistic = self._row_statistic(magnitude)
        payload = torch.zeros(layout.total_nbytes, dtype=torch.uint8, device=values.device)
        rows = RowScales.of(statistic, layout)
        if layout.row_scale_count:
            payload[layout.row_scales_at :][: rows.codes.numel()] = rows.codes.reshape(-1)
        packed, c = self._fit(values, magnitude, rows, layout)
        payload[: layout.codes_nbytes] = packed
        c_bytes = kernels.encode_bf16(storable_scale(c / factor))
        payload[layout.channel_scales_at :][: c_bytes.numel()] = c_bytes
        return payload

    @torch.no_grad()
    def decode(self, payload: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        payload = check_payload(payload, self.payload_nbytes(shape, dtype), self.codec_id)
        layout = self.layout_of(shape)
        if layout.elements == 0:
            return torch.empty(tuple(shape), dtype=dtype, device=payload.device)
        kernels, view = self.fused_steps(payload.device, math.prod(shape)), self._whole(shape)
        if kernels is not None:
            out = torch.empty(view.numel, dtype=dtype, device=payload.device)
            if kernels.supports(self, view, out) and kernels.decode_residual(self, payload, (), view, out):
                return out.view(tuple(shape))
        y = self._dequantized(payload, layout) + 0.0  # -0 becomes 0: no kernel tells them apart
        y = y.reshape(matrix_shape(shape)[0], -1)[:, : math.prod(shape) // matrix_shape(shape)[0]]
        limit = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
        return y.reshape(tuple(shape)).clamp(-limit, limit).to(dtype)

    def _dequantized(self, payload: Tensor, layout: Layout) -> Tensor:
        """Decode to float32 ``(G, R, C)`` of the layout."""
        if layout.offsets:
            return affine.decode(payload, layout)
        if layout.row_scale_count:
            t_codes = payload[layout.row_scales_at :][: layout.row_scale_count]
            t = kernels.decode_ue5m3(t_codes).view(layout.groups, layout.rows, 1)
        else:
            t = torch.ones((layout.groups, layout.rows, 1), dtype=torch.float32, device=payload.device)
        per_group = layout.channel_scales_per_group
        c_bytes = payload[layout.channel_scales_at :][: 2 * layout.groups * per_group]
        c = kernels.decode_bf16(c_bytes).view(layout.groups, 1, per_group)
        levels = self._levels(payload[: layout.codes_nbytes], layout.elements)
        return kernels.dequantize(levels, t, c)

    def open(self, view: MatrixView, dtype: torch.dtype, device: torch.device) -> Session:
        return ScalarSession(self, view, dtype, device)

    def fused_steps(self, device: torch.device, numel: int) -> Any:
        """The module with the fused steps, or ``None`` where the codec, device or size call for the reference."""
        kernels: Any = fused_kernels(device.type, numel)
        known = self.fused and not self.offsets and self.scales in ("token_channel", "block")
        return kernels if known or getattr(kernels, "CHECKS_OPTIONS", False) else None

    def _whole(self, shape: Sequence[int]) -> MatrixView:
        return whole_view(shape, in_blocks=self.scales == "block")

    def channel_scale(self, energy: Tensor, mean: Tensor, weight: Tensor) -> Tensor:
        """The channel scale for a table of magnitudes, from sums as ``scales.gaussian_scale`` takes them."""
        return gaussian_scale(energy, mean, weight, self.magnitudes[0], self.widening)

    def _row_statistic(self, magnitude: Tensor) -> Tensor:
        """What ``t`` is proportional to, ``(G, R, 1)``: the sum of magnitudes."""
        return kernels.row_sums(magnitude)

    @abstractmethod
    def _fit(self, values: Tensor, magnitude: Tensor, rows: RowScales, layout: Layout) -> tuple[Tensor, Tensor]:
        """Choose codes and channel scales.

        Args:
            values: float32 ``(G, R, C)``, for the signs only.
            magnitude: float32 ``(G, R, C)``, scaled to a largest value of about 1; may be overwritten.
            rows: Their scales.
            layout: Tells whether channels have scales of their own.

        Returns:
            Packed codes ``(layout.codes_nbytes,)`` and bfloat16-valued ``c``, ``(G, 1, C)`` or ``(G, 1, 1)``.
        """

    @abstractmethod
    def _levels(self, packed: Tensor, count: int) -> Tensor:
        """Return the float32 levels ``(count,)`` of packed codes."""

    @staticmethod
    def _as_matrices(x: Tensor, layout: Layout) -> Tensor:
        groups = matrix_shape(x.shape)[0]
        flat = x.detach().to(torch.float32).reshape(-1).view(groups, -1)
        missing = layout.elements // groups - flat.shape[1]
        if missing:
            flat = torch.cat([flat, flat.new_zeros(groups, missing)], 1)
        return flat.view(layout.groups, layout.rows, layout.channels)


class ScalarSession(Session):
    """A stream whose steps are fused kernels, where there are some for its device, dtype and size."""

    __slots__ = ()

    codec: ScalarQuantizer

    def encode(
        self, x: Tensor, terms: Terms, out: Tensor | None, payload: Tensor, *, row_weights: Tensor | None = None
    ) -> None:
        codec, view = self.codec, self.view
        kernels = codec.fused_steps(self.device, view.numel)
        if row_weights is None and kernels is not None and kernels.supports(codec, view, x, *terms, out):
            done: Tensor | None = kernels.encode_residual(codec, x, terms, view, out, payload)
            if done is not None:
                return
        # says what is wrong where something is not finite
        super().encode(x, terms, out, payload, row_weights=row_weights)

    def decode(self, payload: Tensor, terms: Terms, out: Tensor) -> None:
        codec, view = self.codec, self.view
        kernels = codec.fused_steps(self.device, view.numel)
        if kernels is not None and kernels.supports(codec, view, out, *terms):
            payload = check_payload(payload, self.payload_nbytes, codec.codec_id)
            if kernels.decode_residual(codec, payload, terms, view, out):
                return
        super().decode(payload, terms, out)
