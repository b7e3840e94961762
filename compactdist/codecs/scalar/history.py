"""Streams whose channel scales come from the frame before (``scales="token_history"``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from compactdist import kernels
from compactdist.codecs.base import Session, Terms, add_up, check_payload, residual_of, undisturbed
from compactdist.codecs.scalar.quantized import ScalarQuantizer, finite_amax
from compactdist.kernels.reference import history
from compactdist.kernels.spec import MatrixView

__all__ = ["HistorySession"]


class HistorySession(Session):
    """One end of a stream, which remembers the channel scales of its next frame: a number for each channel of a group.

    The first frame, and the first after :meth:`forget`, is one of the codec without history at the beginning of the
    payload. What is remembered follows from the payloads since then, so it is equal on both ends.
    """

    __slots__ = (
        "_chosen_under",
        "_first",
        "_first_nbytes",
        "_is_staged",
        "_remembers_scales",
        "_scales",
        "_sections",
        "_staged",
        "_steps",
    )

    remembers: ClassVar[bool] = True
    takes_velocity = True

    codec: ScalarQuantizer

    def __init__(self, codec: ScalarQuantizer, view: MatrixView, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(codec, view, dtype, device)
        assert codec.without_history is not None
        self._first = codec.without_history.open(view, dtype, device)
        self._first_nbytes = self._first.payload_nbytes
        self._sections = codec.sections_of(view.shape)
        with torch.inference_mode(False):  # two buffers that take turns
            self._scales = torch.zeros(view.groups, 1, view.channels, dtype=torch.float32, device=device)
            self._staged = torch.zeros_like(self._scales)
        self._remembers_scales = self._is_staged = False
        self._choose()

    def _choose(self) -> None:
        assert self.codec.spec is not None
        self._chosen_under = kernels.choice.forced
        self._steps = kernels.history_steps_for(self.codec.spec, self.view, self.dtype, self.device)

    @property
    def takes_rounded(self) -> bool:
        return True

    def encode(
        self, x: Tensor, terms: Terms, out: Tensor | None, payload: Tensor, *, row_weights: Tensor | None = None
    ) -> None:
        if row_weights is not None:
            super().encode(x, terms, out, payload, row_weights=row_weights)  # which refuses them
        self._encode(x, terms, out, payload, None)

    def encode_twice(self, x: Tensor, terms: Terms, out: Tensor, copy: Tensor, payload: Tensor) -> None:
        if not self._encode(x, terms, out, payload, copy):
            copy.copy_(out.view(copy.shape))

    def _encode(self, x: Tensor, terms: Terms, out: Tensor | None, payload: Tensor, copy: Tensor | None) -> bool:
        """Encode; returns whether the kernels did, and so wrote ``copy``."""
        if self._chosen_under is not kernels.choice.forced:
            self._choose()
        steps, done, self.checksum, self._is_staged = self._steps, False, None, False
        if not self._remembers_scales:
            self._first.encode(x, terms, out, payload[: self._first_nbytes])
            payload[self._first_nbytes :].zero_()
            self.checksum = self._first.checksum  # zeros add nothing to it
            self.learn(payload, terms)
        elif steps is not None and steps.encode(x, terms, out, payload, (self._scales, self._staged), copy=copy):
            self.checksum, done = steps.checksum, True
        else:
            self._encode_by_reference(x, terms, out, payload)
        self._is_staged = True
        return done

    @undisturbed
    def _encode_by_reference(self, x: Tensor, terms: Terms, out: Tensor | None, payload: Tensor) -> None:
        spec, values = self.codec.spec, self.view.to_matrix(residual_of(x.detach(), terms))
        assert spec is not None
        magnitude = values.abs()
        amax = finite_amax(magnitude, self.view.numel)
        payload.copy_(history.encode(spec, values, magnitude, amax, self._scales, self._sections))
        if out is None:
            self.learn(payload, terms)
        else:
            self._decode_by_reference(payload, terms, out)

    def decode(self, payload: Tensor, terms: Terms, out: Tensor) -> None:
        self._decode(payload, terms, out, None)

    def decode_twice(self, payload: Tensor, terms: Terms, out: Tensor, copy: Tensor) -> None:
        if not self._decode(payload, terms, out, copy):
            copy.copy_(out.view(copy.shape))

    def _decode(self, payload: Tensor, terms: Terms, out: Tensor, copy: Tensor | None) -> bool:
        """Decode; returns whether the kernels did, and so wrote ``copy``."""
        if self._chosen_under is not kernels.choice.forced:
            self._choose()
        steps, done = self._steps, False
        if not self._remembers_scales:
            payload = check_payload(payload, self.payload_nbytes, self.codec.codec_id)
            self._first.decode(payload[: self._first_nbytes], terms, out)
            self.learn(payload, terms)
        elif steps is not None and steps.decode(payload, terms, out, (self._scales, self._staged), copy=copy):
            done = True
        else:
            self._decode_by_reference(payload, terms, out)
        self._is_staged = True
        return done

    @undisturbed
    def _decode_by_reference(self, payload: Tensor, terms: Terms, out: Tensor) -> None:
        payload = check_payload(payload, self.payload_nbytes, self.codec.codec_id)
        spec, limit = self.codec.spec, torch.finfo(torch.float32).max
        assert spec is not None
        decoded = history.decode(spec, payload, self._scales, self._sections).clamp(-limit, limit)
        add_up(terms, self.view.to_flat(decoded), out)
        self.learn(payload, terms)

    @undisturbed
    def learn(self, payload: Tensor, terms: Terms) -> None:
        if self._remembers_scales:
            self._staged.copy_(history.scales_after(payload, self._scales, self._sections))
        else:
            assert self.codec.without_history is not None
            narrow = self.codec.without_history.sections_of(self.view.shape)
            self._staged.copy_(history.scales_from(payload, narrow))
        self._is_staged = True

    def commit(self) -> None:
        if self._is_staged:
            self._scales, self._staged = self._staged, self._scales
            self._remembers_scales, self._is_staged = True, False

    def rollback(self) -> None:
        self._is_staged = False

    def forget(self) -> None:
        self._remembers_scales = self._is_staged = False

    @property
    def shared_memory(self) -> tuple[Tensor, ...]:
        return (self._scales,) if self._remembers_scales else ()

    def move(self, to: Callable[[Tensor], Tensor]) -> None:
        self._scales, self._staged = to(self._scales), to(self._staged)

    def copy_memory(self) -> Tensor | None:
        return self._scales.clone() if self._remembers_scales else None

    def take_memory(self, memory: Tensor | None) -> None:
        if memory is not None:
            self._scales.copy_(memory)
            self._remembers_scales = True

    @property
    def held_bytes(self) -> int:
        return self._scales.nbytes + self._staged.nbytes
