"""Bytes and errors of a played trace."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

from compactdist.state import Met

__all__ = ["Score", "Tally"]

_UNCOMPRESSED_BITS = 16


@dataclass
class Tally:
    """Sums over frames.

    Attributes:
        elements, wire_bytes: of the frames; headers and scales included.
        error_energy, energy: sums of squares of ``x - x_hat`` and of ``x``.
        relative_error_sum, frames: sum of ``||x - x_hat|| / ||x||`` over frames, and their number; frames with
            ``||x|| = 0`` are left out.
        worst: (relative error, site, step) of the frame with the largest relative error.
    """

    elements: int = 0
    wire_bytes: float = 0
    error_energy: float = 0.0
    energy: float = 0.0
    relative_error_sum: float = 0.0
    frames: int = 0
    worst: tuple[float, str, int] = (0.0, "", -1)

    @property
    def bits_per_element(self) -> float:
        """Wire bits per element."""
        return 8 * self.wire_bytes / self.elements

    @property
    def rel_error(self) -> float:
        """Mean relative error over steps and sites."""
        return self.relative_error_sum / max(1, self.frames)

    @property
    def nmse_db(self) -> float:
        """``10 log10`` of error energy over energy; minus infinity for an exact codec."""
        if self.error_energy == 0:
            return -math.inf
        return 10 * math.log10(self.error_energy / self.energy) if self.energy else math.inf

    def add(self, site: str, step: int, elements: int, wire_bytes: float, error: float, energy: float) -> None:
        """Count a frame with these sums of squares."""
        self.elements += elements
        self.wire_bytes += wire_bytes
        self.error_energy += error
        self.energy += energy
        if energy > 0:
            relative = math.sqrt(error / energy)
            self.relative_error_sum += relative
            self.frames += 1
            self.worst = max(self.worst, (relative, site, step), key=lambda worst: worst[0])


@dataclass
class Score:
    """How a codec did on a trace.

    Attributes:
        residuals: all frames but the keyframes of the warm-up.
        request: all frames.
        state_bytes: bytes that the sender holds after the last step, over all sites.
        met: what came of a target; ``None`` without one.
    """

    residuals: Tally = field(default_factory=Tally)
    request: Tally = field(default_factory=Tally)
    state_bytes: int = 0
    met: Met | None = None

    @property
    def ratio(self) -> float:
        """16 bits over the bits per element of the whole request."""
        return _UNCOMPRESSED_BITS / self.request.bits_per_element

    def count(self, site: str, step: int, x: Tensor, x_hat: Tensor, wire_bytes: float, *, keyframe: bool) -> None:
        """Count what was sent of a site at a step.

        Args:
            site: name of the site.
            step: number of the step.
            x: the tensor.
            x_hat: its reconstruction, of the same shape.
            wire_bytes: bytes on the wire; no whole number where a format is a formula only.
            keyframe: it belongs to the warm-up.
        """
        exact = x.double()
        error, energy = float((x_hat.double() - exact).square().sum()), float(exact.square().sum())
        for tally in (self.request,) if keyframe else (self.request, self.residuals):
            tally.add(site, step, x.numel(), wire_bytes, error, energy)
