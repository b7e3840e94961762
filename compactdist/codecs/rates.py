"""A codec with several rates: rungs from few bits to many, of which a stream uses one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compactdist.codecs.base import About, Codec, Session, Terms
from compactdist.codecs.registry import get, register
from compactdist.codecs.scalar.quantized import ScalarQuantizer
from compactdist.codecs.transform.transform import Transform, TransformSession
from compactdist.errors import CodecConfigError
from compactdist.kernels import DeviceSteps
from compactdist.kernels.spec import MatrixView

__all__ = ["LADDERS", "Rates"]

_BITS = (0.1, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6)
LADDERS: dict[str, tuple[str, ...]] = {
    "transform": tuple(f"transform:bits={bits}" for bits in _BITS),
    "trellis": tuple(f"transform:bits={bits},trellis=true" for bits in _BITS),
    "scalar": ("binary", "int2", "int3", "int4", "int8"),
}
"""Ladders that have a name."""

_MOST = 255
"""A header's field of the rate has a byte, and 0 means that the codec has just one."""

RungLike = str | Mapping[str, Any] | Codec


@register
class Rates(Codec):
    """Codes every tensor of a stream at one of several rates; a frame announces the rate of the next one.

    Rates are numbered from 1, the rung with the fewest bits. A tensor that stands alone is coded at the start rate, and
    its payload is that of the rung. Rungs are scalar quantizers without a memory, or ``transform`` of one block width,
    whose basis then goes on when the rate changes.

    Args:
        rungs: the name of a ladder (``"transform"``, ``"scalar"``), codecs joined by ``+`` (``"binary+int2+int4"``),
            or a sequence of codecs; in ascending order of their bits.
        start: number of the rate before any is announced; 0: that of the middle rung, the lower of two.

    Raises:
        CodecConfigError: fewer than two rungs, or more than 255; a rung of another kind; rungs out of order; no such
            start.
    """

    codec_id = "rates"
    about = About(
        sends="what the rung in use sends",
        use="with target=: an error or a size is asked for, and rates follow from what was measured",
        source="reverse water-filling over the streams of a rank (docs/decisions/0025-rates.md)",
    )

    def __init__(self, rungs: str | Sequence[RungLike] = "transform", start: int = 0) -> None:
        self._given = rungs if isinstance(rungs, str) and rungs in LADDERS else None
        if isinstance(rungs, str):
            rungs = LADDERS.get(rungs) or rungs.split("+")
        self.rungs: tuple[Codec, ...] = tuple(get(rung) for rung in rungs)
        if not 2 <= len(self.rungs) <= _MOST:
            raise CodecConfigError(f"codec 'rates' takes 2 to {_MOST} rungs, got {len(self.rungs)}")
        _check_kinds(self.rungs)
        _check_order(self.rungs)
        if isinstance(start, bool) or not isinstance(start, int) or not 0 <= start <= len(self.rungs):
            raise CodecConfigError(
                f"codec 'rates': start must be an integer from 0 to {len(self.rungs)}, the rungs, got {start!r}"
            )
        self._start = start
        self.rates = len(self.rungs)
        self.start_rate = start or (len(self.rungs) + 1) // 2
        self._first = self.at(self.start_rate)

    @property
    def needs_shared_history(self) -> bool:  # type: ignore[override]
        """Whether the rungs learn from what both ends hold."""
        return self._first.needs_shared_history

    def get_config(self) -> dict[str, Any]:
        """Return the ladder's name, or the configurations of the rungs; and the start if one was given."""
        rungs = self._given or [{"id": rung.codec_id, **rung.get_config()} for rung in self.rungs]
        return {"rungs": rungs} | ({"start": self._start} if self._start else {})

    def __repr__(self) -> str:
        return f"Rates({self.get_config()['rungs']!r}{f', start={self._start}' if self._start else ''})"

    def at(self, rate: int) -> Codec:
        return self.rungs[rate - 1]

    def payload_nbytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Bytes at the start rate."""
        return self._first.payload_nbytes(shape, dtype)

    def memory_nbytes(self, view: MatrixView) -> int:
        """Bytes that a session keeps; a change of the rate changes nothing."""
        return self._first.memory_nbytes(view)

    def encode(self, x: Tensor) -> Tensor:
        return self._first.encode(x)

    def decode(self, payload: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return self._first.decode(payload, shape, dtype)

    def open(self, view: MatrixView, dtype: torch.dtype, device: torch.device) -> Session:
        learns = isinstance(self.at(self.start_rate), Transform)
        return (LearningRatesSession if learns else RatesSession)(self, view, dtype, device)


def _check_kinds(rungs: Sequence[Codec]) -> None:
    """Make sure that a stream can change from any rung to any other without losing what it has learnt.

    Raises:
        CodecConfigError: it cannot.
    """
    blocks = {rung.block for rung in rungs if isinstance(rung, Transform)}
    plain = [isinstance(rung, ScalarQuantizer) and rung.scales != "token_history" for rung in rungs]
    if not all(plain) and (len(blocks) != 1 or not all(isinstance(rung, Transform) for rung in rungs)):
        raise CodecConfigError(
            "codec 'rates' takes rungs that are all scalar quantizers without scales='token_history', or all "
            f"'transform' with one block, got {list(rungs)}"
        )


def _check_order(rungs: Sequence[Codec]) -> None:
    """Make sure that each rung has more bytes than the one before.

    Raises:
        CodecConfigError: it has not.
    """
    sizes = [rung.payload_nbytes((1, 1024, 1024), torch.float32) for rung in rungs]
    for (low, few), (high, many) in zip(
        zip(rungs, sizes, strict=True), zip(rungs[1:], sizes[1:], strict=True), strict=False
    ):
        if few >= many:
            raise CodecConfigError(
                f"codec 'rates' takes rungs in ascending order of their bytes: {high} does not have more than {low}"
            )


class RatesSession(Session):
    """One end of a stream at the rate in use."""

    __slots__ = ("_inner", "_opened")

    codec: Rates

    def __init__(self, codec: Rates, view: MatrixView, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(codec, view, dtype, device)
        self._opened: dict[int, Session] = {}
        self._inner = codec.at(codec.start_rate).open(view, dtype, device)

    def set_rate(self, rate: int) -> None:
        rung = self.codec.at(rate)
        if isinstance(self._inner, TransformSession):
            assert isinstance(rung, Transform)
            self._inner.recode(rung)
        else:
            self._inner = self._opened.get(rate) or rung.open(self.view, self.dtype, self.device)
            self._opened[rate] = self._inner
        self.payload_nbytes = self._inner.payload_nbytes

    @property
    def takes_rounded(self) -> bool:
        return self._inner.takes_rounded

    @property
    def takes_velocity(self) -> bool:  # type: ignore[override]
        return self._inner.takes_velocity

    @property
    def device_steps(self) -> DeviceSteps | None:
        return self._inner.device_steps

    def encode(
        self, x: Tensor, terms: Terms, out: Tensor | None, payload: Tensor, *, row_weights: Tensor | None = None
    ) -> None:
        self._inner.encode(x, terms, out, payload, row_weights=row_weights)
        self.checksum = self._inner.checksum

    def encode_twice(self, x: Tensor, terms: Terms, out: Tensor, copy: Tensor, payload: Tensor) -> None:
        self._inner.encode_twice(x, terms, out, copy, payload)
        self.checksum = self._inner.checksum

    def decode(self, payload: Tensor, terms: Terms, out: Tensor) -> None:
        self._inner.decode(payload, terms, out)

    def decode_twice(self, payload: Tensor, terms: Terms, out: Tensor, copy: Tensor) -> None:
        self._inner.decode_twice(payload, terms, out, copy)

    def commit(self) -> None:
        self._inner.commit()

    def rollback(self) -> None:
        self._inner.rollback()

    def learn(self, payload: Tensor, terms: Terms) -> None:
        self._inner.learn(payload, terms)

    def forget(self) -> None:
        self._inner.forget()

    @property
    def shared_memory(self) -> tuple[Tensor, ...]:
        return self._inner.shared_memory

    def move(self, to: Callable[[Tensor], Tensor]) -> None:
        self._inner.move(to)

    def copy_memory(self) -> Any:
        return self._inner.copy_memory()

    def take_memory(self, memory: Any) -> None:
        self._inner.take_memory(memory)

    def prepare(self) -> None:
        self._inner.prepare()

    @property
    def held_bytes(self) -> int:
        return self._inner.held_bytes


class LearningRatesSession(RatesSession):
    """One whose rungs are transforms; what they have learnt outlives a change of the rate."""

    __slots__ = ()

    remembers = prepares = True
