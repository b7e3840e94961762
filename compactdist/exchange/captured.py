"""All-gathers that a CUDA graph captures ([0038](../../docs/decisions/0038-captured-all-gathers.md)).

A captured call is launched once, while nothing runs, and replayed as often as the caller likes. So the host moves
nothing for it: no sequence number, no history, no counter. The clocks of its streams move on the device, and the host
counts replays where it waits for the device anyway, and before the next uncaptured call of the site.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compactdist import _torch, kernels
from compactdist import state as streams
from compactdist.errors import CaptureError
from compactdist.exchange.plan import Call, CallPlan
from compactdist.exchange.work import Job
from compactdist.state import Captured, Sealed, Site
from compactdist.state.site_key import without_request

if TYPE_CHECKING:
    from compactdist.exchange.engine import Engine, Flight

__all__ = ["capture", "catch_up", "check_capture", "error_of"]

_FIRST = "make the call uncaptured first, in steps of their own, until its frames are residuals (two after a reset)"


def error_of(engine: Engine, call: Call, reason: str) -> CaptureError:
    """The error of a call that cannot be captured for this reason, which says the remedy too."""
    return CaptureError(
        f"{engine.label}, site '{call.site}', step {call.step}: a compressed call cannot be captured in a CUDA graph "
        f"here: {reason}. Nothing was sent. Otherwise capture what lies between the calls in graphs of its own, let "
        "the site pass through (policy), or use torch.compile with mode='default' in place of 'reduce-overhead'"
    )


def check_capture(engine: Engine, call: Call, plan: CallPlan) -> None:
    """Make sure that a compressed call can be captured. Nothing was agreed on, sent or changed before.

    Raises:
        CaptureError: it cannot; the error says why, and what to do.
    """
    for asked in (_of_call, _of_group, _of_state):
        reason = asked(engine, call, plan)
        if reason:
            raise error_of(engine, call, reason)


def _of_call(engine: Engine, call: Call, plan: CallPlan) -> str:
    if _torch.captured_by_inductor():
        return (
            "torch.compile's CUDA graphs take all memory of their first runs for their own, histories too; use "
            "mode='default', or capture with torch.cuda.graph"
        )
    request, _ = without_request(call.site)
    if request:
        return "histories of a request end with it; call it outside of request()"
    if not plan.pattern.captures:
        return f"of all compressed calls only all_gather is captured, not {call.op}"
    if plan.predicts:
        return "it is answered with its prediction; take mode='wait'"
    if plan.cuts:
        return "its tensors travel in parts; take parts=1"
    if engine.link.together is not None:
        return "it belongs to a group of calls (a coalescing manager); make it by itself"
    return ""


def _of_group(engine: Engine, call: Call, plan: CallPlan) -> str:
    if engine.store.budget_bytes is not None:
        return "under state_budget_bytes histories come and go; capture without a budget"
    if engine.samples.every:
        return "sample_errors_every measures on the host; take 0"
    if engine.tap is not None:
        return "the group is being recorded; end the recording first"
    return streams.unsuited(engine.config)


def _of_state(engine: Engine, call: Call, plan: CallPlan) -> str:
    if plan.fresh or call.warm:
        return f"its frames are keyframes; {_FIRST}"
    if plan.agreed_at != (call.epoch, call.warm):
        return f"ranks have not agreed on it since the last reset or change; {_FIRST}"
    for part in plan.parts:
        assert part.stream is not None
        assert part.codec is not None
        reason = streams.not_captured(part.stream, part.codec)
        if reason:
            return reason
    return ""


def capture(engine: Engine, flight: Flight) -> Job:
    """Launch a call, for which :func:`check_capture` raises nothing, into the graph. The engine's lock is held.

    Its job must be waited for while the graph is captured.

    Raises:
        Whatever the inner group raises.
    """
    plan, size = flight.plan, engine.size
    (leaving,), (x,) = plan.outgoing, flight.inputs
    codec = plan.codec
    assert leaving.stream is not None
    assert codec is not None
    queue, nbytes = kernels.queue_of(x.device), leaving.residual_nbytes
    with _torch.without_autograd():
        sealed = streams.capture_seal(leaving.stream, x, nbytes, queue, want_value=plan.want_value)
        gathered = torch.empty(size * nbytes, dtype=torch.uint8, device=x.device)
        own = x.detach() if engine.exact_local or sealed.value is None else sealed.value
        if own.data_ptr() == x.data_ptr() and getattr(flight.opts, "asyncOp", True):
            own = own.clone()  # safe from what the caller does to it before it waits
        work = engine.link.all_gather(gathered, sealed.frame, flight.opts)
    wire = (size - 1) * nbytes
    plan.site.captured = Captured(flight.call.op, codec.codec_id, plan.raw_nbytes, wire, plan.raw_numel)
    engine.store.ended.pop(plan.site.key, None)
    finish: Callable[[bool], None] = partial(_finish, engine, flight, sealed, own, gathered)
    return Job(work, finish, plan.site, (sealed.frame, gathered))


def _finish(engine: Engine, flight: Flight, sealed: Sealed, own: Tensor, gathered: Tensor, may_write: bool) -> None:
    """Launch what decodes the frames of a call, and write its outputs.

    Raises:
        CaptureError: the capture has ended, so these launches would not be part of the graph.
    """
    if not _torch.is_capturing():
        raise error_of(
            engine, flight.call, "its work must be waited for before the capture ends; this graph must not be replayed"
        )
    nbytes, queue = sealed.frame.numel(), kernels.queue_of(gathered.device)
    with _torch.without_autograd():
        if may_write and flight.own_output is not None:
            flight.own_output.copy_(sealed.or_nan(own).view(flight.own_output.shape))
        for part, output in zip(flight.plan.incoming, flight.outputs, strict=True):
            assert part.stream is not None
            frame = gathered.narrow(0, part.peer * nbytes, nbytes)
            streams.capture_check(part.stream, frame, output if may_write else None, queue)


def catch_up(engine: Engine, only: Site | None = None) -> None:
    """Count what graphs have replayed since, of one site or of all; waits for their devices.

    Nothing happens while a graph is captured, when a device cannot be waited for.
    """
    sites = [site for site in ([only] if only else engine.store.sites()) if site.captured is not None]
    for site in sites:
        clocks = [stream.clock for stream in site.streams]
        for device in {clock.words.device for clock in clocks if clock is not None and clock.captured}:
            if kernels.captures(device):
                return
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        sent = sum([streams.catch_up(stream) for stream in site.encoders.values()])
        for decoder in site.decoders.values():
            streams.catch_up(decoder)
        captured = site.captured
        assert captured is not None
        if sent:
            engine.stats.sent(
                site.key,
                captured.op,
                captured.codec_id,
                raw=captured.raw_nbytes,
                wire=captured.wire_nbytes,
                keyframe=False,
                numel=captured.numel,
                calls=sent,
            )
