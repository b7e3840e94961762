"""What both ends of a stream remember, and what they expect the next tensor to be.

Orders: 0 expects nothing; 1 expects the last value; 2 expects the last value plus a damped velocity (CompactFusion,
arXiv 2507.17511, residual level 2; damping g: v <- g * (x_hat - base)). The arithmetic is elementwise float32 in a
fixed order with one rounding to the tensor's dtype, so two ends that start equal stay equal to the bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compactdist.codecs.base import Codec
from compactdist.kernels.spec import MatrixView

__all__ = ["History"]


class History:
    """Reconstruction (and velocity) of one stream.

    Attributes:
        order: 0, 1 or 2.
        damping: factor g of the velocity, 0 <= g <= 1; used by order 2 only.
    """

    __slots__ = ("_base", "_velocity", "damping", "order")

    def __init__(self, order: int, damping: float) -> None:
        self.order = order
        self.damping = damping
        self._base: Tensor | None = None
        self._velocity: Tensor | None = None

    @property
    def base(self) -> Tensor | None:
        """Last reconstruction, flat ``[numel]`` in the stream's dtype; ``None`` when empty or for order 0."""
        return self._base

    @property
    def velocity(self) -> Tensor | None:
        """Damped change of the last reconstruction, same shape and dtype; order 2 only."""
        return self._velocity

    @property
    def needs_scratch(self) -> bool:
        """Whether :meth:`read` has something to write to its argument."""
        return False

    def read(self, scratch: Tensor | None) -> Tensor | None:
        """``base``; a history that does not hold it as a tensor writes it to ``scratch``, if that is given."""
        return self._base

    @property
    def held(self) -> tuple[Tensor, ...]:
        """The tensors that are kept. Both ends of a stream keep the same bytes."""
        return tuple(t for t in (self._base, self._velocity) if t is not None)

    @property
    def state_bytes(self) -> int:
        """Bytes of tensors held."""
        return sum(t.numel() * t.element_size() for t in self.held)

    def predict(self) -> Tensor | None:
        """The expected next tensor, flat float32, or ``None`` for no expectation."""
        base, velocity = self.base, self.velocity
        if base is None or velocity is None:
            return None if base is None else base.float()
        return base.float() + velocity.float()

    def residual(self, flat: Tensor) -> Tensor:
        """``flat - prediction`` as float32; Inf where two huge finite values differ by more than float32 holds."""
        prediction = self.predict()
        return flat.float() if prediction is None else flat.float() - prediction

    def reconstruct(
        self, payload: Tensor, codec: Codec, view: MatrixView, out: Tensor, base: Tensor | None = None
    ) -> None:
        """Write the prediction plus the decoded payload to ``out``, rounded to its dtype and kept finite.

        ``out`` may be ``base``; apart from that the history stays as it is.

        Args:
            payload: from ``codec``.
            codec: the stream's.
            view: how the payload was view.
            out: flat ``[numel]``, the stream's dtype.
            base: what :meth:`read` gave, if the caller has it at hand.
        """
        codec.decode_residual(payload, self.base if base is None else base, view, out, velocity=self.velocity)

    def next_velocity(self, value: Tensor) -> Tensor | None:
        """The velocity that goes with a new value (zero for the first one)."""
        if self.order < 2:
            return None
        base = self.base
        if base is None:
            return torch.zeros_like(value)
        limit = torch.finfo(value.dtype).max
        change = (value.float() - base.float()).clamp_(-limit, limit)
        return (change * self.damping).to(value.dtype)

    def advance(self, value: Tensor) -> Tensor | None:
        """Remember ``value`` (flat, owned by the history from now on) and let go of the last one.

        Returns:
            The last one, if its memory is of use.
        """
        if self.order == 0:
            return None
        self._velocity = self.next_velocity(value)
        last, self._base = self._base, value
        return last

    def clear(self) -> None:
        """Forget everything."""
        self._base = self._velocity = None
