"""A step of ``topk`` or ``topk_int4`` on a CPU's compiled kernels: some find and place what is kept, others code it."""

from __future__ import annotations

from torch import Tensor

from compactdist.codecs.base import Session, Terms
from compactdist.codecs.room import room
from compactdist.kernels import Picks

__all__ = ["TopKSteps"]


class TopKSteps:
    """The steps of one stream, see ``kernels.Steps``; the payload is that of the codecs.

    Args:
        picks: of the stream.
        values: of the kept elements, float32 ``[runs]``; ``None``: they are bfloat16.
        values_at: where in the payload they are.
        runs: of the stream.
    """

    __slots__ = ("_picks", "_runs", "_values", "_values_at", "checksum")

    def __init__(self, picks: Picks, values: Session | None, values_at: int, runs: int) -> None:
        self._picks, self._values = picks, values
        self._values_at, self._runs = values_at, runs
        self.checksum: int | None = None

    def encode(
        self, x: Tensor, terms: Terms, out: Tensor | None, payload: Tensor, *, copy: Tensor | None = None
    ) -> bool:
        places, kept = payload[: self._values_at], payload[self._values_at :]
        back = kept
        if self._values is None:
            finite = self._picks.pick(x, terms, places, kept)
        else:
            found = room("kept", (self._runs + self._runs % 2,), x.device)
            finite = self._picks.pick(x, terms, places, found)
            if finite:
                back = room("restored", (self._runs,), x.device)
                self._values.encode(found[: self._runs], (), None if out is None else back, kept)
        if finite and out is not None:
            self._picks.spread(places, back, terms, out)
            if copy is not None:
                copy.copy_(out.view(copy.shape))
        return finite

    def decode(self, payload: Tensor, terms: Terms, out: Tensor, *, copy: Tensor | None = None) -> bool:
        if copy is not None:
            return False
        kept = payload[self._values_at :]
        if self._values is not None:
            kept = room("restored", (self._runs,), payload.device)
            self._values.decode(payload[self._values_at :], (), kept)
        self._picks.spread(payload, kept, terms, out)
        return True
