"""Calls that are answered with a prediction: ``mode="predict-now"``.

An all-gather of a site that has a history need not wait: what the receiver's history predicts is known before any byte
arrives. It is written to the outputs at once. The frame is sent as ever, and whatever arrives is decoded before the
site is next used, so histories move exactly as in mode ``"wait"`` and errors do not add up: the next prediction starts
from what really came. Nothing on the wire differs, so no rank can tell how another one answers.

A late frame has no caller whom its error could be raised to. :class:`Late` keeps it until the site, a step, or whatever
else looks at histories is next used.
"""

from __future__ import annotations

import logging
import threading
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

from compactdist import _torch
from compactdist.errors import LateExchangeError
from compactdist.exchange.plan import Call
from compactdist.exchange.work import Job
from compactdist.state.site_key import is_under

if TYPE_CHECKING:
    from compactdist.exchange.engine import Engine, Flight

__all__ = ["Late", "answer", "at_once", "may_answer"]

_log = logging.getLogger("compactdist")
_LOOK_SECONDS = 0.002


def may_answer(engine: Engine, flight: Flight) -> bool:
    """Whether a prepared flight is answered with its prediction. All ranks' frames are residuals then.

    Not inside a group of calls, which is issued at its end; and not where this rank's own tensor is not finite, which
    the call itself has to raise.
    """
    return not flight.keyframes and flight.failure is None and engine.link.together is None


def at_once(opts: Any) -> Any:
    """Options of an inner all-gather that returns at once, whatever the caller asked of its own; the same timeout."""
    if getattr(opts, "asyncOp", True):
        return opts
    made = _torch.options("AllgatherOptions")
    made.timeout, made.asyncOp = opts.timeout, True
    return made


def answer(engine: Engine, flight: Flight, job: Job) -> Job:
    """Write predictions, and this rank's own chunk, to the outputs of a flight; nothing is written there later.

    Args:
        engine: of the group.
        flight: prepared, and launched or about to be; its streams have not moved since it was prepared.
        job: of the flight; nobody waits for it before the site is next used.

    Returns:
        What the caller waits for instead.
    """
    own = flight.own_output
    with _torch.without_autograd(), _torch.without_autocast():
        if own is not None:
            if flight.own_value is None and not flight.own_parts:
                flight.plan.pattern.keep_own(engine, flight)
            if flight.own_value is not None:
                own.copy_(flight.own_value.view(own.shape))
            for place, value in flight.own_parts:
                place.copy_(value)
        for part, target in zip(flight.plan.incoming, flight.outputs, strict=True):
            assert part.stream is not None
            if part.numel:
                part.stream.predict(target)
        for target, contiguous in flight.copies:
            target.copy_(contiguous.view(target.shape))
    device = flight.outputs[0].device
    flight.outputs, flight.own_output, flight.own_value, flight.own_parts, flight.copies = (), None, None, (), ()
    engine.late.add(flight.call, job)
    return Job(Written(device) if device.type == "cuda" else None, None, None)


class Written(_torch.Work):
    """The work of outputs that were written on the CUDA stream which was current then."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(device))

    def wait(self, timeout: timedelta = _torch.NO_TIMEOUT) -> bool:
        """Let the current stream go on after the outputs were written."""
        torch.cuda.current_stream(self._device).wait_event(self._event)
        return True

    def is_completed(self) -> bool:
        """Whether they are written."""
        return bool(self._event.query())


class Late:
    """Exchanges of one group that were answered with a prediction and may not have arrived: the last of each site.

    Args:
        label: names group and rank in error messages.

    Attributes:
        used: there may be some.
    """

    def __init__(self, label: str) -> None:
        self._label = label
        self._jobs: dict[str, tuple[Call, Job]] = {}
        self._lock = threading.Lock()
        self.used = False

    def add(self, call: Call, job: Job) -> None:
        """Remember the exchange of a call; the site's earlier one is done."""
        job.late = True
        self._jobs[call.site] = call, job
        self.used = True

    def look_at(self, site: str) -> None:
        """Raise the error of the site's last exchange, once. The exchange is done."""
        with self._lock:
            found = self._jobs.pop(site, None)
        if found is not None and found[1].error is not None:
            raise self._told(found[0], found[1].error)

    def poll(self) -> None:
        """Decode what has arrived, without waiting, and raise the first error."""
        error = self._take([(call, job) for call, job in tuple(self._jobs.values()) if job.poll()])
        if error is not None:
            raise error

    def settle(self, prefix: str | None = None, seconds: float | None = None) -> BaseException | None:
        """Wait for exchanges, decode what arrives, and return the first error; further ones are logged.

        Args:
            prefix: only those of sites under this prefix.
            seconds: how long to wait; what has not arrived by then is left, and a warning says so. ``None``: no limit.
        """
        chosen = [(call, job) for call, job in tuple(self._jobs.values()) if is_under(call.site, prefix)]
        until = None if seconds is None else time.monotonic() + seconds
        done = []
        for call, job in chosen:
            while until is not None and not job.poll() and time.monotonic() < until:
                time.sleep(_LOOK_SECONDS)
            if until is None:
                job.finish_late()
            if job.done:
                done.append((call, job))
            else:
                _log.warning(
                    "%s, site '%s': the exchange of step %d has not arrived", self._label, call.site, call.step
                )
        return self._take(done)

    def clear(self) -> None:
        """Forget all."""
        self._jobs.clear()
        self.used = False

    def _take(self, done: list[tuple[Call, Job]]) -> BaseException | None:
        """Forget exchanges that are done; the first error among theirs, the others logged."""
        errors = []
        for call, job in done:
            with self._lock:  # threads that ask for statistics look here as well
                taken = self._jobs.get(call.site, (None, None))[1] is job
                if taken:
                    del self._jobs[call.site]
            if taken and job.error is not None:
                errors.append(self._told(call, job.error))
        for error in errors[1:]:
            _log.error("%s", str(error))
        return errors[0] if errors else None

    def _told(self, call: Call, error: BaseException) -> BaseException:
        """The error to raise: most of ours name group, rank and site themselves."""
        if self._label in str(error) or not isinstance(error, Exception):
            return error
        told = LateExchangeError(
            f"{self._label}, site '{call.site}': the exchange of step {call.step}, which was answered with its "
            f"prediction, failed: {error!r}. Histories may differ between ranks; call reset() on all ranks"
        )
        told.__cause__ = error
        return told
