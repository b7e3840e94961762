"""How far reconstructions are from the tensors: measured on every n-th frame of a stream (``sample_errors_every``)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from compactdist.wire import KEY, NONFINITE

if TYPE_CHECKING:
    from compactdist.exchange.engine import Engine, Flight

__all__ = ["sample"]


def sample(engine: Engine, flight: Flight) -> None:
    """Measure the frames of a flight whose turn it is.

    Called before they are committed, while the predictions they were made against are still there. A frame that is
    passed on is not sampled: no encoder added an error to it.
    """
    call, messages = flight.call, iter(flight.messages)
    for part, x, staged in zip(flight.plan.outgoing, flight.inputs, flight.staged, strict=True):
        if staged is None or part.stream is None:
            continue
        message = next(messages, None)
        if staged.value is None or staged.header.flags & NONFINITE or (message is not None and message.forwards):
            continue
        if (part.stream.sequence + 1) % engine.sample_every == 0:
            flat = x.detach().reshape(-1).double()
            error = float((staged.value.double() - flat).square().sum())
            if staged.there and not math.isfinite(error):
                continue  # only the device knew that the tensor was not finite
            residual = math.nan if staged.header.flags & KEY else part.stream.residual_energy(x)
            engine.stats.error(call.site, call.op, error, float(flat.square().sum()), residual)
