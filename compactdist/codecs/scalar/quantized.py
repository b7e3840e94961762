"""What the scalar quantizers share: the matrix view, the payload, and sessions.

``kernels/sections.py`` describes the wire format, ``kernels/reference/steps.py`` defines the arithmetic of each spec.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from compactdist import kernels
from compactdist.codecs.base import Codec, Session, Terms, check_payload, residual_of, sum_of, undisturbed
from compactdist.codecs.options import check_choice, check_integer
from compactdist.codecs.scalar import affine
from compactdist.codecs.shapes import BLOCK_ELEMENTS, matrix_shape, whole_view
from compactdist.errors import CodecConfigError, NonFiniteError
from compactdist.kernels.reference import steps as reference
from compactdist.kernels.sections import Sections
from compactdist.kernels.spec import Kind, MatrixView, QuantizerSpec, ScaleForm

if TYPE_CHECKING:
    from typing_extensions import Self

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def finite_amax(magnitude: Tensor, elements: int | None = None) -> Tensor:
    """Return the largest magnitude of each group, ``(G, 1, 1)``, after making sure that all are finite.

    This is the only place where a scalar quantizer's encoding by torch operations waits for the device.

    Args:
        magnitude: float32 ``(G, R, C)``.
        elements: Number of elements of the original tensor, for the error message; ``None``: those of ``magnitude``.

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
        CodecConfigError: ``dtype`` is none of :data:`DTYPES`.
    """
    if dtype not in DTYPES:
        takes = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
        raise CodecConfigError(
            f"codec {codec_id!r} takes {takes}, got {str(dtype).removeprefix('torch.')}; codec 'raw' takes every dtype"
        )


class ScalarQuantizer(Codec):
    """A codec of one level for each element, scaled by row and by channel, or by block.

    Subclasses set ``kind`` and ``bits`` and, as their kind needs, ``magnitudes``, ``widening`` or ``reach``. Kernels
    are told nothing else (:attr:`spec`).

    Args:
        scales: ``"token_channel"``: a scale for each row and each channel, as ``sections.py`` says.
            ``"token_history"``: the same, but a stream's channel scales come from the frame before, so that one pass
            over the tensor is enough (``reference/history.py``); single tensors and the first frame are coded as with
            ``"token_channel"``. ``"block"``: a scale for each run of elements in row-major order.
        block: Elements to a block, at most; 2 to 65536.

    Raises:
        CodecConfigError: An option has a value it does not take.
    """

    kind: Kind
    bits: ClassVar[int]
    magnitudes: tuple[float, ...] = ()
    reach: float = 0.0
    widening: ClassVar[int] = 1
    offsets: bool = False
    """Each block has an offset beside its scale (``affine.py``)."""

    scale_choices: ClassVar[tuple[str, ...]] = ("token_channel", "token_history", "block")

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

    @cached_property
    def spec(self) -> QuantizerSpec | None:
        """What kernels are told; ``None`` where the codec's own ``_encode_matrices`` and ``_decode_matrices`` compute
        what no kernel does.
        """
        if self.offsets:
            return None
        scales = cast(ScaleForm, self.scales)
        try:
            return QuantizerSpec(self.kind, self.bits, self.magnitudes, self.reach, self.widening, scales, self.block)
        except ValueError as error:
            raise CodecConfigError(f"codec {self.codec_id!r} ({type(self).__name__}): {error}") from None

    @cached_property
    def without_history(self) -> Self | None:
        """Codes what has no frame before it; ``None`` where that makes no difference."""
        if self.scales != "token_history":
            return None
        return self.from_config({name: value for name, value in self.get_config().items() if name != "scales"})

    def sections_of(self, shape: Sequence[int]) -> Sections:
        """Return the sections of the payload for a tensor of this shape."""
        if self.spec is not None:
            return self.spec.sections_of(shape)
        return Sections.of_blocks(shape, self.bits, self.block, offsets=True)

    def payload_nbytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        check_dtype(self.codec_id, dtype)
        return self.sections_of(shape).total_nbytes

    @undisturbed
    def encode(self, x: Tensor) -> Tensor:
        check_dtype(self.codec_id, x.dtype)
        if self.without_history is not None:
            alone = self.without_history.encode(x)
            return pad(alone, (0, self.payload_nbytes(x.shape, x.dtype) - alone.numel()))
        sections = self.sections_of(x.shape)
        if sections.elements == 0:
            return torch.empty(0, dtype=torch.uint8, device=x.device)
        steps = self._steps_of(x.shape, x.dtype, x.device)
        if steps is not None:
            payload = torch.empty(sections.total_nbytes, dtype=torch.uint8, device=x.device)
            if steps.encode(x.detach().reshape(-1), (), None, payload):
                return payload
        flat = x.detach().to(torch.float32).reshape(-1)
        return self.encode_by_reference(flat.view(matrix_shape(x.shape)[0], -1), sections, x.numel())

    def encode_by_reference(self, values: Tensor, sections: Sections, elements: int) -> Tensor:
        """Encode float32 ``(G, N)`` by torch operations alone; the tail of each group is filled up with zeros.

        Args:
            values: the elements of each group.
            sections: of the payload.
            elements: number of elements of the original tensor, for the error message.

        Raises:
            NonFiniteError: Some element is NaN or infinite.
        """
        groups = values.shape[0]
        missing = sections.elements // groups - values.shape[1]
        if missing:
            values = torch.cat([values, values.new_zeros(groups, missing)], 1)
        values = values.view(sections.groups, sections.rows, sections.channels)
        magnitude = values.abs()
        return self._encode_matrices(values, magnitude, finite_amax(magnitude, elements), sections)

    @undisturbed
    def decode(self, payload: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        payload = check_payload(payload, self.payload_nbytes(shape, dtype), self.codec_id)
        if payload.numel() == 0:
            return torch.empty(tuple(shape), dtype=dtype, device=payload.device)
        if self.without_history is not None:
            nbytes = self.without_history.payload_nbytes(shape, dtype)
            return self.without_history.decode(payload[:nbytes], shape, dtype)
        steps = self._steps_of(shape, dtype, payload.device)
        if steps is not None:
            out = torch.empty(tuple(shape), dtype=dtype, device=payload.device)
            if steps.decode(payload, (), out.view(-1)):
                return out
        y = self.decode_by_reference(payload, shape) + 0.0  # without a prediction -0 becomes 0
        limit = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
        return y.clamp(-limit, limit).to(dtype)

    def decode_by_reference(self, payload: Tensor, shape: Sequence[int]) -> Tensor:
        """Decode to float32 of this shape, finite, by torch operations alone; zeros keep their signs."""
        groups = matrix_shape(shape)[0]
        y = self._decode_matrices(payload, self.sections_of(shape)).reshape(groups, -1)
        limit = torch.finfo(torch.float32).max
        return y[:, : math.prod(shape) // groups].reshape(tuple(shape)).clamp(-limit, limit)

    def open(self, view: MatrixView, dtype: torch.dtype, device: torch.device) -> Session:
        if self.without_history is None:
            return ScalarSession(self, view, dtype, device)
        if not self.sections_of(view.shape).wide_rows:
            return self.without_history.open(view, dtype, device)
        from compactdist.codecs.scalar.history import HistorySession  # which builds on this file

        return HistorySession(self, view, dtype, device)

    def _steps_of(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> kernels.Steps | None:
        if self.spec is None:
            return None
        return kernels.steps_for(self.spec, whole_view(shape, in_blocks=self.scales == "block"), dtype, device)

    def _encode_matrices(self, values: Tensor, magnitude: Tensor, amax: Tensor, sections: Sections) -> Tensor:
        """As ``reference.encode``, without looking at any value from the host."""
        if self.spec is None:
            return affine.encode(values, amax, sections)
        return reference.encode(self.spec, values, magnitude, amax, sections)

    def _decode_matrices(self, payload: Tensor, sections: Sections) -> Tensor:
        """Decode to float32 ``(G, R, C)`` of the sections."""
        if self.spec is None:
            return affine.decode(payload, sections)
        return reference.decode(self.spec, payload, sections)


class ScalarSession(Session):
    """A session whose steps are fused kernels, where there are any for its device, dtype and size."""

    __slots__ = ("_chosen_under", "_device_steps", "_steps")

    takes_velocity = True
    codec: ScalarQuantizer

    def __init__(self, codec: ScalarQuantizer, view: MatrixView, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(codec, view, dtype, device)
        self._choose()

    def _choose(self) -> None:
        spec = self.codec.spec
        self._chosen_under = kernels.choice.forced
        self._steps = None if spec is None else kernels.steps_for(spec, self.view, self.dtype, self.device)
        there = kernels.frames_for(self.device) is not None
        self._device_steps = cast(kernels.DeviceSteps, self._steps) if self._steps is not None and there else None

    @property
    def takes_rounded(self) -> bool:
        return True

    @property
    def device_steps(self) -> kernels.DeviceSteps | None:
        if self._chosen_under is not kernels.choice.forced:
            self._choose()
        return self._device_steps

    def encode(
        self, x: Tensor, terms: Terms, out: Tensor | None, payload: Tensor, *, row_weights: Tensor | None = None
    ) -> None:
        if self._chosen_under is not kernels.choice.forced:
            self._choose()
        steps = self._steps
        if row_weights is None and steps is not None and steps.encode(x, terms, out, payload):
            self.checksum = steps.checksum
        else:
            self.checksum = None
            self._encode_by_reference(x, terms, out, payload, row_weights)

    def encode_twice(self, x: Tensor, terms: Terms, out: Tensor, copy: Tensor, payload: Tensor) -> None:
        if self._chosen_under is not kernels.choice.forced:
            self._choose()
        steps = self._steps
        if steps is not None and steps.encode(x, terms, out, payload, copy=copy):
            self.checksum = steps.checksum
        else:
            super().encode_twice(x, terms, out, copy, payload)

    @undisturbed
    def _encode_by_reference(
        self, x: Tensor, terms: Terms, out: Tensor | None, payload: Tensor, row_weights: Tensor | None
    ) -> None:
        """Encode by torch operations; raises the NonFiniteError where a kernel met a value that is not finite."""
        if row_weights is not None or not self.view.numel:
            super().encode(x, terms, out, payload, row_weights=row_weights)
            return
        matrix = self.view.to_matrix(residual_of(x.detach(), terms))
        sections = self.codec.sections_of(self.view.shape)
        values = matrix.reshape(self.view.groups, -1)
        payload.copy_(self.codec.encode_by_reference(values, sections, matrix.numel()))
        if out is not None:
            self.decode(payload, terms, out)

    def decode(self, payload: Tensor, terms: Terms, out: Tensor) -> None:
        if self._chosen_under is not kernels.choice.forced:
            self._choose()
        if self._steps is None or not self._steps.decode(payload, terms, out):
            self._decode_by_reference(payload, terms, out)

    def decode_twice(self, payload: Tensor, terms: Terms, out: Tensor, copy: Tensor) -> None:
        if self._chosen_under is not kernels.choice.forced:
            self._choose()
        steps = self._steps
        if steps is None or not steps.decode(payload, terms, out, copy=copy):
            super().decode_twice(payload, terms, out, copy)

    @undisturbed
    def _decode_by_reference(self, payload: Tensor, terms: Terms, out: Tensor) -> None:
        payload = check_payload(payload, self.payload_nbytes, self.codec.codec_id)
        if not self.view.numel:
            return
        change = self.view.to_flat(self.codec.decode_by_reference(payload, self.view.shape))
        # -0 plus a change of -0 is -0, as in the kernels; without terms -0 becomes 0
        total = sum_of(terms) + change if terms else change + 0.0
        limit = min(torch.finfo(out.dtype).max, torch.finfo(torch.float32).max)
        with torch.inference_mode():  # ``out`` may be an inference tensor, which can be written to in this mode only
            out.copy_(total.clamp(-limit, limit))
