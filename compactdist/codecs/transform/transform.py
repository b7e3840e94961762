"""Blocks of channels on a basis that both ends learn, with more bits for stronger components."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from compactdist.codecs.base import About, Codec, Session, Terms, add_up, check_payload, residual_of, sum_of
from compactdist.codecs.options import check_integer
from compactdist.codecs.registry import register
from compactdist.codecs.scalar.quantized import check_dtype, finite_amax
from compactdist.codecs.shapes import matrix_shape, whole_view
from compactdist.codecs.transform.basis import Basis, first_basis, followed, plain_basis
from compactdist.codecs.transform.coding import Decoded, Layout, decode, encode
from compactdist.errors import CodecConfigError
from compactdist.kernels.spec import MatrixView


@register
class Transform(Codec):
    """Turns each row of a block of channels onto an orthonormal basis and quantizes the components.

    A tensor is seen as ``(G, R, C)`` (``shapes.matrix_shape``), its channels as blocks of equal width. The basis of a
    block begins with that of the decoded keyframe and follows the decoded residuals (``basis.py``); a tensor that
    stands alone is coded on its channels as they are. Components get 0 to 8 bits by their energy (``depths.py``).

    The payload of a group is four sections, each filled up with zeros to a multiple of 16 bytes; groups follow one
    another:

    1. **scales**: the largest amplitude, float32; a gain for each block, bfloat16;
    2. **energies**, a byte for each component: an amplitude of ``2**((code - 255) / 8)`` times the largest; 0 is none;
    3. **rows**, half a byte for each row, the first in the lower half: a scale of ``2**((code - 8) / 4)``; 0 is none;
    4. **planes**: the bits of all rows for each component, the deepest components first, then in ascending order, and
       of each the lowest bit first; row r is bit ``r % 8`` of a byte.

    How many bits each component has follows from section 2 (``depths.allocate``). A code selects a whole number from
    -127 to 127 (``depths.levels``), the basis times the amplitudes is rounded to whole numbers of 7 bits, or of 14
    where some component has more than 3 bits, and their product is exact (``products.py``). It is multiplied by unit,
    gain and largest amplitude, then by the row's scale.

    Args:
        bits: for each element, on average, 0.05 to 8; the other sections come on top.
        block: Channels to a block, at most; 2 to 512.

    Raises:
        CodecConfigError: An option is out of range.
    """

    codec_id = "transform"
    needs_shared_history = True
    about = About(
        sends="0 to 8 bits for each component of a learnt basis",
        use="the least error for the bytes, 0.3 bits and more, where channels change together; costs more time",
        source="reverse water-filling (Cover and Thomas); rotations: Brent and Luk, SIAM J. Sci. Stat. Comput., 1985",
    )

    def __init__(self, bits: float = 1.0, block: int = 128) -> None:
        number = isinstance(bits, int | float) and not isinstance(bits, bool)
        if not number or not 0.05 <= bits <= 8:
            raise CodecConfigError(f"codec 'transform': bits must be a number from 0.05 to 8, got {bits!r}")
        self.bits = float(bits)
        self.block = check_integer("transform", "block", block, 2, 512)

    def get_config(self) -> dict[str, Any]:
        """Return the bits, and the block if it is not the default."""
        return {"bits": self.bits} | ({"block": self.block} if self.block != 128 else {})

    def layout_of(self, shape: tuple[int, int, int]) -> Layout:
        """Return how each matrix ``(R, C)`` of ``(G, R, C)`` is cut into blocks, and the sections of its payload."""
        return Layout.of(shape[1], shape[2], self.bits, self.block)

    def payload_nbytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        check_dtype(self.codec_id, dtype)
        matrices = matrix_shape(shape)
        return matrices[0] * self.layout_of(matrices).nbytes if math.prod(shape) else 0

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        check_dtype(self.codec_id, x.dtype)
        payload = torch.empty(self.payload_nbytes(x.shape, x.dtype), dtype=torch.uint8, device=x.device)
        if payload.numel():
            view = whole_view(x.shape, in_blocks=False)
            self.open(view, x.dtype, x.device).encode(x.detach().reshape(-1), (), None, payload)
        return payload

    @torch.no_grad()
    def decode(self, payload: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        payload = check_payload(payload, self.payload_nbytes(shape, dtype), self.codec_id)
        out = torch.empty(tuple(shape), dtype=dtype, device=payload.device)
        if payload.numel():
            view = whole_view(shape, in_blocks=False)
            self.open(view, dtype, payload.device).decode(payload, (), out.view(-1))
        return out

    def open(self, view: MatrixView, dtype: torch.dtype, device: torch.device) -> Session:
        return TransformSession(self, view, dtype, device)


class TransformSession(Session):
    """One end of a stream and the basis of each block. Both ends change it alike, by what was decoded."""

    __slots__ = ("_basis", "_layout", "_staged")

    remembers = True

    codec: Transform

    def __init__(self, codec: Transform, view: MatrixView, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(codec, view, dtype, device)
        self._layout = codec.layout_of(view.shape)
        self._basis: Basis | None = None
        self._staged: tuple[Basis, Decoded] | None = None

    def recode(self, codec: Transform) -> None:
        """Go on with other bits and the same basis; the block is the same. No frame may be staged."""
        self.codec, self._layout = codec, codec.layout_of(self.view.shape)
        self.payload_nbytes = codec.payload_nbytes(self.view.shape, torch.float32)

    @torch.no_grad()
    def encode(
        self, x: Tensor, terms: Terms, out: Tensor | None, payload: Tensor, *, row_weights: Tensor | None = None
    ) -> None:
        if row_weights is not None:
            raise CodecConfigError(f"codec {self.codec.codec_id!r} has no use for row_weights")
        residual = self.view.to_matrix(residual_of(x, terms))
        amax = finite_amax(residual.abs(), self.view.numel)
        basis = self._basis_for(terms)
        matrices = self._layout.padded(residual.contiguous())
        groups = zip(matrices, amax, basis.rows, strict=True)
        coded = [encode(one, largest, self._layout, rows) for one, largest, rows in groups]
        payload.copy_(torch.cat([one for one, _ in coded]))
        self._stage(basis, [decoded for _, decoded in coded])
        if out is not None:
            self._write(terms, out)

    @torch.no_grad()
    def decode(self, payload: Tensor, terms: Terms, out: Tensor) -> None:
        payload = check_payload(payload, self.payload_nbytes, self.codec.codec_id)
        self._read(payload, self._basis_for(terms))
        self._write(terms, out)

    def _basis_for(self, terms: Terms) -> Basis:
        """The basis of the next frame. The first one follows from the prediction, which both ends hold."""
        if self._basis is not None:
            return self._basis
        if terms:
            prediction = self._layout.padded(self.view.to_matrix(sum_of(terms)).contiguous())
            return first_basis(self._layout.blocks_of(prediction))
        return plain_basis((self.view.groups, self._layout.blocks), self._layout.width, self.device)

    def _read(self, payload: Tensor, basis: Basis) -> None:
        groups = payload.view(self.view.groups, -1)
        self._stage(basis, [decode(one, self._layout, rows) for one, rows in zip(groups, basis.rows, strict=True)])

    def _stage(self, basis: Basis, decoded: list[Decoded]) -> None:
        self._staged = basis, Decoded(*map(torch.stack, zip(*decoded, strict=True)))

    def _write(self, terms: Terms, out: Tensor) -> None:
        assert self._staged is not None
        add_up(terms, self.view.to_flat(self._staged[1].matrix[..., : self._layout.channels]), out)

    @torch.no_grad()
    def commit(self) -> None:
        if self._staged is not None:
            basis, decoded = self._staged
            levels = self._layout.components_of(decoded.levels)
            self._basis, self._staged = followed(basis, levels, decoded.amplitudes), None

    def rollback(self) -> None:
        self._staged = None

    @torch.no_grad()
    def learn(self, payload: Tensor, terms: Terms) -> None:
        self._read(payload, self._basis_for(terms))

    def forget(self) -> None:
        self._basis = self._staged = None

    @property
    def shared_memory(self) -> tuple[Tensor, ...]:
        return self._basis or ()

    @property
    def held_bytes(self) -> int:
        return 0 if self._basis is None else sum(one.nbytes for one in self._basis)
