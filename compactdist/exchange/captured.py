"""Compressed calls that a CUDA graph captures ([0040](../../docs/decisions/0040-captured-parts.md)).

A captured call is launched once, while nothing runs, and replayed as often as the caller likes. So the host moves
nothing for it: no sequence number, no history, no counter. The clocks of its streams move on the device, and the host
counts replays where it waits for the device anyway, and before the next uncaptured call of the site.
"""

from __future__ import annotations

import math
from functools import partial, reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compactdist import _torch, kernels
from compactdist import state as streams
from compactdist.errors import CaptureError
from compactdist.exchange.plan import Call, CallPlan
from compactdist.exchange.work import Job
from compactdist.state import Captured, Replays, Site, StreamEncoder, StreamState
from compactdist.state.site_key import without_request
from compactdist.wire import from_raw

if TYPE_CHECKING:
    from compactdist.exchange.engine import Engine, Flight
    from compactdist.observe.stats import GroupStats

__all__ = ["catch_up", "check_capture", "error_of", "launch", "seal"]

_ALIGNMENT = 16
"""Bytes of which the address of a frame is a multiple where a device checks it."""

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
    if plan.predicts:
        return "it is answered with its prediction; take mode='wait'"
    if plan.cuts:
        return "its tensors travel in parts; take parts=1"
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
    if plan.pattern.collective and plan.agreed_at != (call.epoch, call.warm):
        return f"ranks have not agreed on it since the last reset or change; {_FIRST}"
    reason = _of_places(plan)
    if reason:
        return reason
    for part in plan.parts:
        stream, codec = part.stream, part.codec
        if stream is None or codec is None:  # a chunk of an all-to-all that travels as it is
            continue
        relay = stream.relay if isinstance(stream, StreamEncoder) else None
        if relay is not None and (relay.source is not None or relay.owes_keyframe):
            return "it passes on frames of other calls; make it outside of forwarding(), or with forward=False"
        reason = streams.not_captured(stream, codec)
        if reason:
            return reason
    return ""


def _of_places(plan: CallPlan) -> str:
    """Why a frame of an all-to-all does not arrive where a device can check it; empty if all do."""
    at, exact = 0, None
    for part in plan.incoming:
        if part.stream is None:
            exact = part if part.numel * plan.dtype.itemsize % _ALIGNMENT else exact
        elif at % _ALIGNMENT and exact is not None:
            return (
                f"the chunk of {exact.numel} x {plan.dtype} from rank {exact.peer} arrives as it is, so the frame from "
                f"rank {part.peer} behind it lies off {_ALIGNMENT} bytes, where the host has to check it; let chunks "
                f"that are not compressed take a multiple of {_ALIGNMENT} bytes"
            )
        at += part.residual_nbytes
    return ""


def seal(engine: Engine, flight: Flight) -> Flight:
    """Let the graph make all frames of a call, for which :func:`check_capture` raises nothing. The lock is held.

    Raises:
        CaptureError: the call's tensor travels as it is, in a frame of its own.
    """
    if flight.passed is not None:
        raise error_of(engine, flight.call, f"this message cannot be compressed ({flight.passed.text})")
    want_value = flight.plan.want_value
    copy = flight.places[0] if flight.places else None
    for part, x in zip(flight.plan.outgoing, flight.inputs, strict=True):
        staged, queue = None, kernels.queue_of(x.device)
        if part.stream is not None:
            staged = streams.capture_seal(part.stream, x, part.residual_nbytes, queue, copy, want_value=want_value)
        flight.staged.append(staged)
    return flight


def launch(engine: Engine, flight: Flight) -> Job:
    """Hand the frames that :func:`seal` made to the inner group, as part of the graph. The lock is held.

    The job must be waited for while the graph is captured.

    Raises:
        Whatever the inner group raises.
    """
    plan, call = flight.plan, flight.call
    pattern, site, codec = plan.pattern, plan.site, plan.codec
    pattern.transfer(engine, flight)
    if flight.own_output is not None:
        pattern.keep_own(engine, flight)
    raw, wire, numel = plan.raw_nbytes, flight.wire_nbytes, plan.raw_numel
    if pattern.receives_only:
        (part,) = plan.incoming
        raw, wire, numel = part.numel * plan.dtype.itemsize, part.residual_nbytes, part.numel
    if all(part.stream is None for part in plan.parts):  # as for what passes through, only the capture is counted
        engine.stats.passed(call.op, plan.detail, raw, call.site, wire=wire)
    else:
        what = "" if codec is None else codec.codec_id, raw, wire, numel, plan.detail, pattern.receives_only
        _count_replays(engine, flight, Captured(call.op, *what))
        engine.store.ended.pop(site.key, None)
    for into in plan.incoming:  # what arrived there before is not what a replay writes to the same tensor
        engine.arrivals.forget(site, into.peer)
    return Job(flight.work, partial(_finish, engine, flight), None if pattern.sends_only else site, flight.keep)


def _count_replays(engine: Engine, flight: Flight, what: Captured) -> None:
    """Let each replay of a call count as ``what``.

    Raises:
        CaptureError: too many graphs of the site count otherwise.
    """
    site, moves = flight.plan.site, tuple([part.stream for part in flight.plan.parts if part.stream is not None])
    site.captured = site.captured or Replays()
    try:
        counter = site.captured.counter(what, moves)
    except OverflowError as error:
        raise error_of(engine, flight.call, f"{error}; call reset() on all ranks before further captures") from None
    goes_on = None if counter is None else _goes_on(flight)
    if counter is not None and goes_on is not None:
        counter.add_(goes_on)


def _finish(engine: Engine, flight: Flight, may_write: bool) -> None:
    """Launch what decodes the frames of a call, and write its outputs.

    What came without a frame of its own, a rank's own chunk too, is NaN once a stream of the call has ended.

    Raises:
        CaptureError: the capture has ended, so these launches would not be part of the graph.
    """
    if not _torch.is_capturing():
        raise error_of(
            engine, flight.call, "its work must be waited for before the capture ends; this graph must not be replayed"
        )
    plan, own = flight.plan, flight.own_output
    with _torch.without_autograd(), _torch.without_autocast():
        unframed = may_write and (own is not None or any(part.stream is None for part in plan.incoming))
        goes_on = _goes_on(flight) if unframed else None
        if may_write and own is not None:
            copied = any(staged is not None and staged.copied for staged in flight.staged)
            value = own if copied else flight.own_value
            if value is not None:
                _write(own, value, goes_on)
        for part, data, output in zip(plan.incoming, flight.arrived, flight.outputs, strict=True):
            if part.stream is not None:
                queue = kernels.queue_of(data.device)
                streams.capture_check(part.stream, data, output if may_write else None, queue)
            elif may_write:
                _write(output, from_raw(data, part.numel, plan.dtype), goes_on)


def _write(output: Tensor, value: Tensor, goes_on: Tensor | None) -> None:
    value = value.view(output.shape)
    output.copy_(value if goes_on is None else torch.where(goes_on, value, math.nan))


def _goes_on(flight: Flight) -> Tensor | None:
    """Whether no stream of the call has ended: of those that leave, or of those that arrive where none leaves.

    ``None``: the call has no stream, for all chunks of an all-to-all of this rank travel as they are.
    """
    known = [staged.goes_on for staged in flight.staged if staged is not None and staged.goes_on is not None]
    if not known:
        clocks = [part.stream.clock for part in flight.plan.incoming if part.stream is not None]
        known = [clock.goes_on() for clock in clocks if clock is not None]
    return reduce(torch.logical_and, known) if known else None


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
        assert site.captured is not None
        moved: dict[StreamState, int] = {stream: streams.catch_up(stream) for stream in site.streams}
        for what, replays in site.captured.counted(moved):
            if replays > 0:
                _count(engine.stats, site.key, what, replays)


def _count(stats: GroupStats, key: str, what: Captured, replays: int) -> None:
    """Count replays as the calls that they were."""
    op, codec_id, raw, wire, numel, reasons, receives = what
    if receives:
        stats.received(key, op, codec_id, raw=raw, wire=wire, calls=replays)
    elif codec_id:
        stats.sent(key, op, codec_id, raw=raw, wire=wire, keyframe=False, numel=numel, calls=replays)
    else:
        for _ in range(replays):
            stats.passed(op, reasons, raw, key, wire=wire)
