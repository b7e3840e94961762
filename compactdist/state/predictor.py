"""What both ends of a stream remember, and what they expect the next tensor to be.

Orders: 0 expects nothing; 1 expects the last value; 2 expects the last value plus a damped velocity (CompactFusion,
arXiv 2507.17511, residual level 2; damping g: v <- g * (x_hat - base)). The arithmetic is elementwise float32 in a
fixed order with one rounding to the tensor's dtype, so two ends that start equal stay equal to the bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compactdist.codecs.base import Codec, Cut

__all__ = ["History"]


class History:
    """Reconstruction (and velocity) of one stream.

    Attributes:
        order: 0, 1 or 2.
        damping: factor g of the velocity, 0 <= g <= 1; used by order 2 only.
        base: last reconstruction, flat ``[numel]`` in the stream's dtype; ``None`` when empty or for order 0.
        velocity: damped change of the last reconstruction, same shape and dtype; order 2 only.
    """

    __slots__ = ("base", "damping", "order", "velocity")

    def __init__(self, order: int, damping: float) -> None:
        self.order = order
        self.damping = damping
        self.base: Tensor | None = None
        self.velocity: Tensor | None = None

    @property
    def state_bytes(self) -> int:
        """Bytes of tensors held."""
        return sum(t.numel() * t.element_size() for t in (self.base, self.velocity) if t is not None)

    def predict(self) -> Tensor | None:
        """The expected next tensor, flat float32, or ``None`` for no expectation."""
        if self.base is None:
            return None
        if self.velocity is None:
            return self.base.float()
        return self.base.float() + self.velocity.float()

    def residual(self, flat: Tensor) -> Tensor:
        """``flat - prediction`` as float32; Inf where two huge finite values differ by more than float32 holds."""
        prediction = self.predict()
        return flat.float() if prediction is None else flat.float() - prediction

    def reconstruct(self, payload: Tensor, codec: Codec, cut: Cut, out: Tensor) -> None:
        """Write the prediction plus the decoded payload to ``out``, rounded to its dtype and kept finite.

        ``out`` may be ``base``; apart from that the history stays as it is.
        """
        if self.velocity is None:
            codec.decode_residual(payload, self.base, cut, out)
            return
        prediction = self.predict()
        assert prediction is not None
        total = prediction + cut.to_flat(codec.decode(payload, cut.shape, torch.float32))
        limit = torch.finfo(out.dtype).max
        with torch.inference_mode():  # a state made in this mode could not be written to outside of it
            out.copy_(total.clamp(-limit, limit))

    def next_velocity(self, value: Tensor) -> Tensor | None:
        """The velocity that goes with a new value (zero for the first one)."""
        if self.order < 2:
            return None
        if self.base is None:
            return torch.zeros_like(value)
        limit = torch.finfo(value.dtype).max
        change = (value.float() - self.base.float()).clamp_(-limit, limit)
        return (change * self.damping).to(value.dtype)

    def advance(self, value: Tensor) -> None:
        """Remember ``value`` (flat, owned by the history from now on)."""
        if self.order == 0:
            return
        self.velocity = self.next_velocity(value)
        self.base = value

    def clear(self) -> None:
        """Forget everything."""
        self.base = self.velocity = None
