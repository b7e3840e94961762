"""Blocks of channels on a basis that both ends learn, with more bits for stronger components."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from compactdist.codecs.base import About, Codec, Session, Terms, check_payload, sum_of, undisturbed
from compactdist.codecs.options import check_integer
from compactdist.codecs.registry import register
from compactdist.codecs.room import room
from compactdist.codecs.scalar.quantized import check_dtype
from compactdist.codecs.shapes import matrix_shape, whole_view
from compactdist.codecs.transform import on_device
from compactdist.codecs.transform.basis import (
    Basis,
    first_basis,
    followed,
    memory_nbytes,
    plain_basis,
    rows_of,
)
from compactdist.codecs.transform.coding import Frame, Layout, Spread, Weights, decode, encode
from compactdist.codecs.transform.ends import put_out, residuals
from compactdist.codecs.transform.levels import SCALAR, LevelSet
from compactdist.codecs.transform.on_device import Received, steps_for
from compactdist.codecs.transform.products import Products, by_blocks
from compactdist.codecs.transform.trellis import TRELLIS
from compactdist.errors import CodecConfigError
from compactdist.kernels import DeviceSteps
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
    -127 to 127 (``levels.py``), the basis times the amplitudes is rounded to whole numbers of up to 14 bits, so few
    that their product is exact in float32 (``products.py``). It is multiplied by unit, gain and largest amplitude, then
    by the row's scale.

    With ``trellis`` a component has twice as many levels for its bits (``trellis.py``), 1 to 7. The lowest of its
    planes moves through the trellis; the level follows from the other planes and from that plane's bits of the row and
    of two before it.

    Args:
        bits: for each element, on average, 0.05 to 8, with a trellis to 7; the other sections come on top.
        block: Channels to a block, at most; 2 to 512.
        trellis: Choose levels along a trellis.

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

    def __init__(self, bits: float = 1.0, block: int = 128, trellis: bool = False) -> None:
        if not isinstance(trellis, bool):
            raise CodecConfigError(f"codec 'transform': trellis must be true or false, got {trellis!r}")
        number, most = isinstance(bits, int | float) and not isinstance(bits, bool), _levels(trellis).deepest
        if not number or not 0.05 <= bits <= most:
            where = " with a trellis" if trellis else ""
            raise CodecConfigError(f"codec 'transform': bits must be a number from 0.05 to {most}{where}, got {bits!r}")
        self.bits = float(bits)
        self.block = check_integer("transform", "block", block, 2, 512)
        self.trellis = trellis

    def get_config(self) -> dict[str, Any]:
        """Return the bits, and the block and the trellis if they are not the default."""
        block, trellis = {"block": self.block} if self.block != 128 else {}, {"trellis": True} if self.trellis else {}
        return {"bits": self.bits} | block | trellis

    def memory_nbytes(self, view: MatrixView) -> int:
        """Return the bytes of the bases of all blocks."""
        layout = self.layout_of(view.shape)
        return memory_nbytes(view.groups, layout.blocks, layout.width)

    @property
    def velocity_share(self) -> float:
        """0.5 at one bit, 1 from three bits on: with few bits, a velocity is mostly noise that no basis finds."""
        return min(1.0, 0.25 + 0.25 * self.bits)

    def layout_of(self, shape: tuple[int, int, int]) -> Layout:
        """Return how each matrix ``(R, C)`` of ``(G, R, C)`` is cut into blocks, and the sections of its payload."""
        return Layout.of(shape[1], shape[2], self.bits, self.block, _levels(self.trellis))

    def payload_nbytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        check_dtype(self.codec_id, dtype)
        matrices = matrix_shape(shape)
        return matrices[0] * self.layout_of(matrices).nbytes if math.prod(shape) else 0

    @undisturbed
    def encode(self, x: Tensor) -> Tensor:
        check_dtype(self.codec_id, x.dtype)
        payload = torch.empty(self.payload_nbytes(x.shape, x.dtype), dtype=torch.uint8, device=x.device)
        if payload.numel():
            view = whole_view(x.shape, in_blocks=False)
            self.open(view, x.dtype, x.device).encode(x.detach().reshape(-1), (), None, payload)
        return payload

    @undisturbed
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
    """One end of a stream and the basis of each block. Both ends change it alike, by what was decoded.

    What a frame says of the basis is taken down with the frame; the basis itself changes in ``prepare``.
    """

    __slots__ = ("_basis", "_layout", "_lock", "_next", "_staged")

    remembers = prepares = takes_velocity = True

    codec: Transform

    def __init__(self, codec: Transform, view: MatrixView, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(codec, view, dtype, device)
        self._layout = codec.layout_of(view.shape)
        self._basis: Basis | None = None
        self._next: Callable[[], Basis] | None = None  # the basis once the last frame is heeded
        self._staged: Callable[[], Basis] | None = None
        self._lock = threading.Lock()

    @property
    def takes_rounded(self) -> bool:
        return self.device_steps is not None

    @property
    def device_steps(self) -> DeviceSteps | None:
        return None if steps_for(self._layout, self.view, self.dtype, self.device) is None else _DeviceSteps(self)

    def recode(self, codec: Transform) -> None:
        """Go on with other bits and the same basis; the block is the same. No frame may be staged."""
        self.codec, self._layout = codec, codec.layout_of(self.view.shape)
        self.payload_nbytes = codec.payload_nbytes(self.view.shape, torch.float32)

    @undisturbed
    def encode(
        self, x: Tensor, terms: Terms, out: Tensor | None, payload: Tensor, *, row_weights: Tensor | None = None
    ) -> None:
        if row_weights is not None:
            raise CodecConfigError(f"codec {self.codec.codec_id!r} has no use for row_weights")
        if self.encode_on_device(x, terms, out, payload, None):
            return
        matrices, squares, exponents = residuals(x, terms, self.view, self._layout)
        basis = self._basis_for(terms)
        coded = []
        turned = room("components", (self._layout.components, self._layout.rows), self.device, matrices.dtype)
        groups = zip(matrices, squares, exponents, basis.rows, self._space(), strict=True)
        for matrix, of_row, exponent, rows, space in groups:
            by_blocks(
                rows_of(rows).to(matrix.dtype), self._layout.blocks_of(matrix).mT, self._layout.components_of(turned)
            )
            coded.append(encode(turned, of_row, exponent, self._layout, space))
        payload.copy_(torch.cat([one for one, _ in coded]))
        frames = [frame for _, frame in coded]
        self._stage(basis, frames)
        if out is not None:
            self._write(basis, frames, terms, out)

    @undisturbed
    def encode_on_device(
        self,
        x: Tensor,
        terms: Terms,
        out: Tensor | None,
        payload: Tensor,
        flag: Tensor | None,
        copy: Tensor | None = None,
    ) -> bool:
        """Encode where the host does not wait, but for what it costs to refuse without a ``flag``; whether it can."""
        steps = steps_for(self._layout, self.view, self.dtype, self.device)
        if steps is None:
            return False
        basis = self._basis_for(terms)
        self._receive(on_device.encode(steps, basis, x, terms, self._layout, payload, flag), basis, terms, out, copy)
        return True

    @undisturbed
    def decode_on_device(
        self, payload: Tensor, terms: Terms, out: Tensor, copy: Tensor | None, accepted: Tensor | None
    ) -> bool:
        """Decode where the host does not wait; see ``kernels.DeviceSteps.decode``."""
        steps = steps_for(self._layout, self.view, self.dtype, self.device)
        if steps is None:
            return False
        self._receive(on_device.read(steps, payload), self._basis_for(terms), terms, out, copy, accepted)
        return True

    @undisturbed
    def decode(self, payload: Tensor, terms: Terms, out: Tensor) -> None:
        payload = check_payload(payload, self.payload_nbytes, self.codec.codec_id)
        if self.decode_on_device(payload, terms, out, None, None):
            return
        basis, frames = self._basis_for(terms), self._read(payload)
        self._stage(basis, frames)
        self._write(basis, frames, terms, out)

    def _receive(
        self,
        received: Received,
        basis: Basis,
        terms: Terms,
        out: Tensor | None,
        copy: Tensor | None = None,
        accepted: Tensor | None = None,
    ) -> None:
        """Stage what was received and, if ``out`` is given, write it, where the host does not wait."""
        self._staged = received.following(basis, accepted)
        if out is not None:
            received.write(basis, terms, out, copy, accepted)

    def _basis_for(self, terms: Terms) -> Basis:
        """The basis of the next frame. The first one follows from the prediction, which both ends hold."""
        self.prepare()
        if self._basis is not None:
            return self._basis
        if terms:
            prediction = self._layout.padded(self.view.to_matrix(sum_of(terms)))
            return first_basis(self._layout.blocks_of(prediction))
        return plain_basis((self.view.groups, self._layout.blocks), self._layout.width, self.device)

    def _read(self, payload: Tensor) -> list[Frame]:
        groups = zip(payload.view(self.view.groups, -1), self._space(), strict=True)
        return [decode(one, self._layout, space) for one, space in groups]

    def _space(self) -> Tensor:
        """Where the levels of all groups go, int8 ``(G, K, R)``."""
        shape = self.view.groups, self._layout.components, self._layout.rows
        return room("levels", shape, self.device, torch.int8)

    def _stage(self, basis: Basis, frames: list[Frame]) -> None:
        self._staged = partial(_after, basis, [(frame.spread, frame.evidence()) for frame in frames])

    def _write(self, basis: Basis, frames: list[Frame], terms: Terms, out: Tensor) -> None:
        """Write the sum of ``terms`` plus what frames say."""
        products, units = [], []
        for frame, held in zip(frames, basis.rows, strict=True):
            weights = Weights.of(rows_of(held), frame.spread)
            products.append(Products(frame.levels, weights.whole, frame.spread.counts))
            units.append(frame.units(weights))
        rows = torch.stack([frame.rows for frame in frames])
        put_out(products, torch.stack(units), rows, terms, self.view, out)

    def commit(self) -> None:
        if self._staged is not None:
            self._next, self._staged = self._staged, None

    @undisturbed
    def prepare(self) -> None:
        with self._lock:
            if self._next is not None:
                self._basis, self._next = self._next(), None

    def rollback(self) -> None:
        self._staged = None

    @undisturbed
    def learn(self, payload: Tensor, terms: Terms) -> None:
        basis = self._basis_for(terms)
        steps = steps_for(self._layout, self.view, self.dtype, self.device)
        if steps is None:
            self._stage(basis, self._read(payload))
        else:
            payload = check_payload(payload, self.payload_nbytes, self.codec.codec_id)
            self._receive(on_device.read(steps, payload), basis, terms, None)

    def forget(self) -> None:
        with self._lock:
            self._basis = self._next = self._staged = None

    @property
    def shared_memory(self) -> tuple[Tensor, ...]:
        self.prepare()
        return self._basis or ()

    def move(self, to: Callable[[Tensor], Tensor]) -> None:
        self.prepare()
        if self._basis is not None:
            self._basis = Basis(*map(to, self._basis))

    def copy_memory(self) -> Basis | None:
        self.prepare()
        return None if self._basis is None else Basis(*map(torch.clone, self._basis))

    def take_memory(self, memory: Basis | None) -> None:
        self._basis = None if memory is None else Basis(*map(torch.clone, memory))

    @property
    def held_bytes(self) -> int:
        if self._basis is None and self._next is None:
            return 0
        return self.codec.memory_nbytes(self.view)


class _DeviceSteps:
    """The steps of a session on a device, see ``kernels.DeviceSteps``."""

    __slots__ = ("_session", "checksum")

    def __init__(self, session: TransformSession) -> None:
        self._session = session
        self.checksum: int | None = None

    def encode(
        self,
        x: Tensor,
        terms: Terms,
        out: Tensor | None,
        payload: Tensor,
        *,
        copy: Tensor | None = None,
        flag: Tensor | None = None,
    ) -> bool:
        return self._session.encode_on_device(x, terms, out, payload, flag, copy)

    def decode(
        self,
        payload: Tensor,
        terms: Terms,
        out: Tensor,
        *,
        copy: Tensor | None = None,
        accepted: Tensor | None = None,
    ) -> bool:
        return self._session.decode_on_device(payload, terms, out, copy, accepted)


def _levels(trellis: bool) -> LevelSet:
    return TRELLIS if trellis else SCALAR


def _after(basis: Basis, learnt: list[tuple[Spread, Tensor]]) -> Basis:
    """The basis after a frame, of each group."""
    groups = zip(basis.rows, basis.energies, learnt, strict=True)
    after = [followed(rows, energies, *frame) for rows, energies, frame in groups]
    rows, energies = zip(*after, strict=True)
    return Basis(torch.stack(rows), torch.stack(energies))
