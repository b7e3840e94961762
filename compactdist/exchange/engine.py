"""The one engine of all collectives: encode, ship, commit, count; then wait, decode, write.

A call is a :class:`Flight` along its :class:`CallPlan`. ``prepare`` makes all its frames and changes nothing;
``launch`` hands them to the inner group and commits; ``withdraw`` undoes ``prepare``. Several calls that belong
together (a batch, a coalesced collective) are all prepared before the first is launched, so that a bad one leaves
nothing on the wire.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compactdist import _torch, kernels
from compactdist.errors import BadOutputError, FrameError, NonFiniteError
from compactdist.exchange import captured
from compactdist.exchange.arrivals import Arrival, Arrivals
from compactdist.exchange.behind import Behind
from compactdist.exchange.forward import Message
from compactdist.exchange.later import Later
from compactdist.exchange.link import Link
from compactdist.exchange.parts import InTurn, slices
from compactdist.exchange.plan import Call, CallPlan, Chooser, Incoming, Outgoing
from compactdist.exchange.predicted import Late, answer, may_answer
from compactdist.exchange.sampling import Samples
from compactdist.exchange.work import Job, Outbox, drain
from compactdist.kernels.spec import MatrixView
from compactdist.observe.stats import GroupStats, PassReason
from compactdist.state import FrameFollows, Ledger, Offload, Room, Site, Staged, StateStore, StreamConfig, Wanted
from compactdist.wire import frame_in, from_raw

if TYPE_CHECKING:
    from compactdist.exchange.patterns.base import Pattern

__all__ = ["Engine", "Flight", "Tap"]

_log = logging.getLogger("compactdist")

Tap = Callable[[Call, int, Tensor, "MatrixView | None"], None]

_NOBODY: frozenset[int] = frozenset()


@lru_cache(maxsize=64)
def _nan(dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.full((), math.nan, dtype=dtype, device=device)


@dataclass(slots=True, eq=False)  # two flights are never equal, and to compare them would compare tensors
class Flight:
    """One call on its way along a plan.

    Attributes:
        plan: the site's plan.
        call: the call's site key, step and epoch.
        inputs: tensors that leave, in the order of ``plan.outgoing``; released at the launch.
        outputs: tensors to be written, in the order of ``plan.incoming``.
        opts: the caller's options object or ``None``.
        own_input, own_output: this rank's own chunk, where the collective has one.
        tag: of a point-to-point message.
        staged: frames, in the order of ``plan.outgoing``; ``None`` for a tensor that travels as it is.
        entered: the site's state stays where it is until the launch (``state_offload``).
        messages: one decision to encode or to pass on for each frame, where the pattern ``forwards``.
        arrival: the arrival that may be passed on, held until the launch.
        failure: the error to raise once the frames are on their way.
        refusing: peers with which no history will be kept.
        passed: why the message travels in a frame that touches no history; ``None`` for every other message.
        keyframes: whether all frames are keyframes.
        link: where frames are fetched that follow stand-ins, also once the group is closed; ``None``: there are none.
        predicted: the call is answered with its prediction.
        work: work of the inner call.
        in_turn: the works of a tensor's parts, each to be waited for before it is decoded; ``None``: there is one work.
        arrived: buffers to be decoded, 1-D uint8, in the order of ``plan.incoming``; a frame may be shorter.
        keep: tensors that must live until the inner work is done.
        wire_nbytes: bytes put on the link.
        places: where encoders write ``own_output``, part by part; empty: it is written once the call is done.
        own_value: the value to be written to ``own_output``.
        own_parts: the same of a tensor that travels in parts: each a slice of ``own_output``, and its value.
        copies: outputs that are not contiguous, each with the contiguous one that is written in its place first.
        queue: CUDA stream that the buffers belong to, as ``kernels.queue_of`` gives it; ``None`` on a CPU.
        rooms: memory of ``arrived`` that another call may use once this one is done; none: it is this call's own.
    """

    plan: CallPlan
    call: Call
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    opts: Any
    own_input: Tensor | None = None
    own_output: Tensor | None = None
    tag: int = 0
    staged: list[Staged | None] = field(default_factory=list)
    entered: bool = False
    messages: list[Message] = field(default_factory=list)
    arrival: Arrival | None = None
    failure: NonFiniteError | None = None
    refusing: frozenset[int] | set[int] = _NOBODY
    passed: PassReason | None = None
    keyframes: bool = True
    link: Link | None = None
    predicted: bool = False
    work: Any = None
    in_turn: InTurn | None = None
    arrived: Sequence[Tensor] = ()
    keep: tuple[Tensor, ...] = ()
    wire_nbytes: int = 0
    places: Sequence[Tensor] = ()
    own_value: Tensor | None = None
    own_parts: Sequence[tuple[Tensor, Tensor]] = ()
    copies: Sequence[tuple[Tensor, Tensor]] = ()
    queue: int | None = None
    rooms: Sequence[Room] = ()


def _read_elsewhere(flight: Flight) -> None:
    """Another CUDA stream than the flight's reads what arrived: no later work of the flight's may reuse that memory."""
    buffers = flight.arrived or flight.keep
    now = torch.cuda.current_stream(buffers[0].device)
    for buffer in buffers:
        buffer.record_stream(now)


def _write_own_parts(flight: Flight, may_write: bool, ours: bool) -> None:
    """Write this rank's own chunk where it travels in parts. ``ours``: the current CUDA stream is the flight's.

    If it is not, the flight's stream waits for the current one: two frames later it overwrites the memory of
    ``own_parts`` and ``own_value``, which the current one reads.
    """
    for place, value in flight.own_parts if may_write else ():
        place.copy_(value)
    if not ours and flight.queue is not None and (flight.own_value is not None or flight.own_parts):
        device = (flight.arrived or flight.keep)[0].device
        kernels.stream_of(flight.queue, device).wait_stream(torch.cuda.current_stream(device))


@dataclass
class Engine:
    """One wrapped group as its calls see it.

    Attributes:
        link: the inner group's calls that carry frames.
        rank, size: in the group.
        label: names group and rank in error messages.
        config: configuration of the streams.
        chooser: policy and layout hints.
        exact_local: an all-gather leaves the rank's own chunk exact.
        samples: measures the reconstruction error of every n-th call of a site.
        store: streams by call site.
        stats: counters.
        forward: pass on the frame of a received tensor that is sent again untouched.
        varies: notes a call with a new plan; whether its site's tensors change so often that it passes through.
        heard_of: called with the epoch of a frame that was refused for it.
        ledger: finds room for the sites whose bytes all ranks know; ``None``: no rank has a budget.
        lock: held while a call is encoded and handed to the inner group.
        outbox: sends whose works were dropped.
        late_reads: how often a call waited until a device had read what the site's last frames announced.
        arrivals: frames that were received and may be passed on.
        late: exchanges whose calls were answered with a prediction.
        behind: frames that follow their stand-ins.
        may_surprise: senders of CPU tensors may send keyframes that nobody was told of: a target asks for an error, and
            the receivers' hosts read what arrives.
        tap: called as ``tap(call, peer, tensor, view)`` right before a tensor is encoded or passed on. ``peer`` is the
            receiver's group rank (the sender's own where all ranks receive the tensor), ``view`` the matrix view of the
            layout hint. The tap must neither raise nor change anything.
    """

    link: Link
    rank: int
    size: int
    label: str
    config: StreamConfig
    chooser: Chooser
    exact_local: bool
    samples: Samples
    store: StateStore
    stats: GroupStats
    forward: bool
    varies: Callable[[Call, CallPlan], bool]
    heard_of: Callable[[int], None]
    ledger: Ledger | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)
    outbox: Outbox = field(default_factory=Outbox)
    tap: Tap | None = None
    late_reads: int = 0
    arrivals: Arrivals = field(init=False)
    late: Late = field(init=False)
    behind: Behind = field(init=False)
    may_surprise: bool = field(init=False)

    def __post_init__(self) -> None:
        self.arrivals = Arrivals(self.forward)
        self.late = Late(self.label)
        self.behind = Behind()
        control = self.store.control
        self.may_surprise = control is not None and control.target.kind == "nmse_db" and not self.link.exact_sizes

    # --- planning -----------------------------------------------------------------------------------------------------

    def plan(self, pattern: Pattern, call: Call, signature: tuple[Any, ...]) -> CallPlan:
        """The site's plan, made anew where sizes, dtype, device or the policy's answers changed.

        Args:
            pattern: how the parts travel.
            call: the call.
            signature: sizes, dtype and device, in the pattern's form.

        Raises:
            ConfigError, LayoutError: the policy or a layout hint answers with something impossible.
            FrameError, NonFiniteError, LateExchangeError: the site's last call was answered with its prediction, and
                then what arrived was wrong.
        """
        site = self.store.known.get(call.site) or self.store.site(call.site)
        if site.pending and pattern.waits_for_earlier_calls:
            drain(site)  # kinds and sizes of the next frames depend on what the last frames announced
        if self.late.used:
            self.late.look_at(call.site)
        if site.changes.unread and not call.captured:  # it waits, and such codecs are not captured
            self.late_reads += site.changes.read()
        known: CallPlan | None = site.plan
        plan = known
        if (
            plan is None
            or plan.signature != signature
            or plan.pattern is not pattern
            or (self.chooser.policy is not None and plan.answers != pattern.answers(self, call, signature))
        ):
            plan = pattern.plan(self, call, signature)
            plan.was_compressed = plan.reason is not None and known is not None and known.reason is None
        if plan.changes != site.changes.count:
            if site.refused and plan.reason is None:
                plan.reason = pattern.reason_if_refused(plan)
            plan.refresh()
        if plan.fresh or plan is not known:
            self._ask_hints(pattern, call, plan)  # streams begin with what the hints say now, not when it was planned
        asks = plan.agreed_at is None and plan.reason is None and pattern.collective and not call.captured
        if asks and self.varies(call, plan):
            if plan.site.captured is not None:
                captured.catch_up(self, plan.site)
            self.forget(call.site)  # nothing of it is used before the next reset
            plan = pattern.plan(self, call, signature)
            plan.reason = PassReason.VARIES
        failed = None
        if self.ledger is not None and plan.reason in (None, PassReason.BUDGET):
            plan, failed = self._find_room(self.ledger, pattern, call, plan)
        plan.site.plan = plan
        if failed is not None:
            raise failed
        return plan

    def _ask_hints(self, pattern: Pattern, call: Call, plan: CallPlan) -> None:
        """Let a plan's streams begin with what the layout hints say; its keyframes are cut, and sized, by them.

        Raises:
            LayoutError: a hint does not fit its message.
        """
        if self.chooser.layouts is not None:
            pattern.ask_hints(self, call, plan)
            plan.refresh()

    def _find_room(
        self, ledger: Ledger, pattern: Pattern, call: Call, plan: CallPlan
    ) -> tuple[CallPlan, BaseException | None]:
        """Find room for the site's history, and evict other sites where that is needed.

        Ranks do this when a call is issued: all ranks issue calls in the same order, but may launch them in another.

        Returns:
            The plan to use, and the late error of an evicted site, if its last call was answered with a prediction and
            a wrong frame arrived; else ``None``.
        """
        if plan.fresh or plan.agreed_at is None:  # only then a hint may have changed
            plan.common_nbytes = pattern.common_nbytes(self, call, plan)
        if not plan.common_nbytes:
            return plan, None
        verdict = ledger.use(call, plan.common_nbytes)
        failed = None
        for key in verdict.evicted:
            late = self.late.settle(key) if self.late.used else None
            if failed is not None and late is not None:
                _log.error("%s", str(late))
            failed = failed or late
            self._drop(key)
            self.stats.evicted(key)
        if verdict.anew:  # what was refused, or held, is forgotten on all ranks
            self._drop(call.site)
            plan = replace(pattern.plan(self, call, plan.signature), common_nbytes=plan.common_nbytes)
            plan.refresh()
            self._ask_hints(pattern, call, plan)
        plan.roomless = not verdict.held
        if plan.agreed_at is None:
            plan.evictions = ledger.evictions(call.site)
        if verdict.evicted:
            plan.evicts, plan.agreed_at = verdict.evicted, None
        return plan, failed

    def take_back(self, call: Call) -> None:
        """A call has failed before it sent anything."""
        if self.ledger is not None:
            self.ledger.take_back(call)

    def _drop(self, prefix: str | None) -> None:
        self.store.reset(prefix)
        self.arrivals.clear(prefix)

    # --- shipping -----------------------------------------------------------------------------------------------------

    def prepare(self, flight: Flight) -> Flight:
        """Make all frames of a call; no state changes and nothing is sent. The lock is held.

        Raises:
            Whatever encoding raises, except for a tensor that is not finite: ``finish`` raises that, once the frames
            are on their way.
        """
        with _torch.without_autograd(), _torch.without_autocast():
            return self._prepare(flight)

    def _prepare(self, flight: Flight) -> Flight:
        plan = flight.plan
        pattern = plan.pattern
        warm = flight.call.warm
        for target in flight.outputs:
            if not target.is_contiguous():
                self._refuse_shared_elements(flight, target)
        own, first = flight.own_output, flight.inputs[0] if flight.inputs else flight.outputs[0]
        if own is not None and not own.is_contiguous():
            self._refuse_shared_elements(flight, own)
        elif own is not None and plan.shares_own and own.device == first.device:
            begin, start, last = first.data_ptr(), own.data_ptr(), flight.inputs[-1]
            # not over its input, which a call that fails must leave as it is
            apart = not start or begin >= start + own.nbytes or start >= last.data_ptr() + last.nbytes
            if apart and first.is_contiguous():
                flight.places = slices(own, plan.cuts) if plan.cuts else (own,)
        for target, _ in flight.copies:
            self._refuse_shared_elements(flight, target)
        if flight.call.captured:
            return captured.seal(self, flight)
        if plan.site.captured is not None:
            captured.catch_up(self, plan.site)
        if self.store.offload is not None:
            self._enter(self.store.offload, flight)
        if not first.is_cpu:
            flight.queue = kernels.queue_of(first.device)
        try:
            if pattern.forwards:
                flight.arrival = pattern.arrival(self, flight)
            if warm or plan.fresh:
                flight.refusing = pattern.refuse_all(plan) if plan.roomless else pattern.refuse(self, flight)
            stage = partial(pattern.stage, self) if pattern.forwards else self.stage
            for part, x in zip(plan.outgoing, flight.inputs, strict=True):
                stage(flight, part, x, warm or part.fresh)
        except BaseException:
            self.withdraw(flight)
            raise
        if plan.predicts:
            flight.predicted = may_answer(self, flight)
        return flight

    def fly(self, flight: Flight) -> Job:
        """Prepare a call and launch it. The lock is held.

        Raises:
            As ``prepare`` and ``launch``.
        """
        if _torch.autocasts():
            with _torch.without_autocast():
                return self.fly(flight)
        with _torch.without_autograd():
            job = self._launch(self._prepare(flight), None)
            if flight.plan.pattern.sends_only and self.store.unprepared.sessions:
                self.store.unprepared.prepare()  # nobody may ever wait here for a message
            return job

    def answer(self, flight: Flight, job: Job) -> Job:
        """The job that the caller waits for: the flight's or, with predictions written, one that awaits no frame."""
        return answer(self, flight, job) if flight.predicted else job

    def stage(self, flight: Flight, part: Outgoing, x: Tensor, keyframe: bool, *, own_bytes: bool = False) -> Staged:
        """Encode one tensor and append its frame to ``flight.staged``.

        ``own_bytes``: a keyframe carries the tensor's own bytes, whatever codes the stream's keyframes, and is as large
        as they are.
        """
        agreed: int | None = part.keyframe_nbytes if keyframe else part.residual_nbytes
        may_surprise = self.may_surprise and x.is_cpu
        if own_bytes or (may_surprise and not flight.plan.pattern.collective):
            agreed = None  # who receives takes a message of any size
        if self.tap is not None and not part.number:
            plan = flight.plan
            whole, hint = (flight.own_input, plan.hint) if plan.cuts else (x, part.hint)
            self.tap(flight.call, part.peer, x if whole is None else whole, hint)
        stream, codec = part.stream, part.codec
        assert stream is not None
        assert codec is not None
        wanted = Wanted(
            step=flight.call.step,
            epoch=flight.call.epoch,
            frame_nbytes=agreed,
            refuse_state=bool(flight.refusing) and self.refuses(flight, part.peer),
            value=flight.plan.want_value,
            own_bytes=own_bytes,
            hint=part.hint,
            may_surprise=may_surprise,
            foreseen=keyframe and self.devices_take_keyframes and self._is_foreseen(flight.plan.pattern, x),
            queue=flight.queue,
            copy=flight.places[part.number] if flight.places else None,
        )
        staged, failure = stream.stage_or_flag(x, codec, wanted, keyframe=keyframe)
        if failure is not None:
            flight.failure = flight.failure or failure
        if not keyframe and not staged.surprises:
            flight.keyframes = False
        flight.staged.append(staged)
        return staged

    @staticmethod
    def refuses(flight: Flight, peer: int) -> bool:
        """Whether this rank keeps no history of what it exchanges with a peer."""
        return peer in flight.refusing or Site.ALL in flight.refusing

    def withdraw(self, flight: Flight) -> None:
        """Undo ``prepare``: the frames will not be sent."""
        for part, staged in zip(flight.plan.outgoing, flight.staged, strict=False):
            if staged is not None and part.stream is not None:
                part.stream.withdraw(staged)
        flight.staged = []  # a frame is withdrawn once
        self._release(flight)
        offload = self.store.offload
        if offload is not None:
            self._leave(offload, flight)
            offload.settle(flight.plan.site)

    def _enter(self, offload: Offload, flight: Flight) -> None:
        """Bring the state of a flight's site back, until the flight was launched or withdrawn."""
        plan, tensors = flight.plan, (*flight.inputs, *flight.outputs)
        nbytes = plan.pattern.held_nbytes(self, plan) if plan.fresh else 0
        offload.enter(plan.site, flight.call.step, nbytes, tensors[0].device)
        flight.entered = True

    @staticmethod
    def _leave(offload: Offload, flight: Flight) -> None:
        if flight.entered:
            flight.entered = False
            offload.leave(flight.plan.site)

    def _settle(self, offload: Offload, site: Site) -> None:
        """Let a site whose frames were decoded make room, unless a call is being made: the next one makes room, too."""
        if self.lock.acquire(blocking=False):
            try:
                offload.settle(site)
            finally:
                self.lock.release()

    def _release(self, flight: Flight) -> None:
        if flight.arrival is not None:
            flight.arrival.release()
            flight.arrival = None

    def waiting(self, flight: Flight, work: Later) -> Job:
        """The job of a prepared flight that is launched later."""
        return Job(work, partial(self.finish, flight), flight.plan.site)

    def launch(self, flight: Flight, job: Job | None = None) -> Job:
        """Hand the frames to the inner group, commit and count. The lock is held.

        Args:
            flight: the call, prepared.
            job: its job, if it is waiting; ``None``: a new one.

        Raises:
            Whatever the inner group raises; then the frames are withdrawn.
        """
        with _torch.without_autograd(), _torch.without_autocast():
            return self._launch(flight, job)

    def _launch(self, flight: Flight, job: Job | None) -> Job:
        if flight.call.captured:
            return captured.launch(self, flight)
        call, plan = flight.call, flight.plan
        pattern = plan.pattern
        try:
            if self.link.opened is not None:
                self.link.refuse_others()
            pattern.transfer(self, flight)
        except BaseException:
            self.withdraw(flight)
            raise
        try:
            if self.may_surprise:
                flight.link = self.link
                self.behind.send(self, flight)
            if self.samples.every and flight.failure is None and flight.passed is None:
                self.samples.take(flight)
            if pattern.forwards:
                pattern.commit(self, flight)
            else:
                for part, staged in zip(plan.outgoing, flight.staged, strict=True):
                    part.stream.commit(staged, flight.queue)  # type: ignore[union-attr,arg-type]
            if pattern.receives_only:
                pass
            elif flight.passed is None and plan.codec is not None:
                self.stats.sent(
                    call.site,
                    call.op,
                    plan.codec.codec_id,
                    raw=plan.raw_nbytes,
                    wire=flight.wire_nbytes,
                    keyframe=flight.keyframes,
                    numel=plan.raw_numel,
                    predicted=flight.predicted,
                    forwarded=pattern.forwards and any(message.forwarded for message in flight.messages),
                    parts=len(plan.cuts) or 1,
                )
            else:
                reason = flight.passed or plan.detail
                self.stats.passed(call.op, reason, plan.raw_nbytes, call.site, wire=flight.wire_nbytes)
            if flight.own_output is not None:
                pattern.keep_own(self, flight)
        finally:  # after an error the frames are on their way, and this end does not hold them: the next are refused
            if flight.arrival is not None:
                self._release(flight)
            if self.store.offload is not None:
                self._leave(self.store.offload, flight)
        flight.inputs, flight.own_input = (), None  # the caller may free its tensors from here on
        if self.store.offload is not None and pattern.sends_only:
            self.store.offload.settle(plan.site)
        if job is not None:
            return job
        job = Job(flight.work, partial(self.finish, flight), None if pattern.sends_only else plan.site, flight.keep)
        if pattern.sends_only:
            self.outbox.add(plan.outgoing[0].peer, job)
        return job

    # --- finishing ----------------------------------------------------------------------------------------------------

    def finish(self, flight: Flight, may_write: bool) -> None:
        """Decode what arrived, in order, and write it if the outputs may still be written to.

        Raises:
            FrameError, NonFiniteError: the flight's ``failure``, else a decoder's first; all other parts were decoded.
        """
        if _torch.autocasts():
            with _torch.without_autocast():
                return self.finish(flight, may_write)
        plan, offload = flight.plan, self.store.offload
        if offload is not None and plan.incoming:
            offload.visit(plan.site, flight.arrived[0].device)
        error: Exception | None = flight.failure
        refused: set[int] = set(flight.refusing) if flight.refusing else set()
        queue = None if flight.queue is None else kernels.queue_of((flight.arrived or flight.keep)[0].device)
        ours = queue == flight.queue
        if not ours:
            _read_elsewhere(flight)
        with _torch.without_autograd():
            target = flight.own_output
            if may_write and flight.own_value is not None and target is not None:
                own = flight.own_value
                target.copy_(own if target.dim() == 1 else own.view(target.shape))
            if flight.own_parts or not ours:
                _write_own_parts(flight, may_write, ours)
            number = 0
            for i, (part, data) in enumerate(zip(plan.incoming, flight.arrived, strict=True)):
                if part.number != number:
                    number = part.number
                    if flight.in_turn is not None:
                        flight.in_turn.arrived(number)  # what fails here leaves the later parts as they are
                target = flight.outputs[i] if may_write else None
                try:
                    value = self._take(flight, part, data, refused, target, queue)
                    if target is not None and part.numel:
                        if part.stream is None or not part.stream.wrote:
                            self._write(part, value, target)
                        if plan.pattern.forwards and part.codec is not None:
                            self._remember(flight, part, target, flight.arrived[i])
                except Exception as e:
                    error = self._met(e, error)
            for target, contiguous in flight.copies if may_write else ():
                target.copy_(contiguous.view(target.shape))
        if ours:
            rooms = self.store.spares.rooms
            for room in flight.rooms:
                rooms[room.place] = room
            for staged in flight.staged:
                if staged is not None and staged.room is not None:
                    rooms[staged.room.place] = staged.room
                    if staged.spare is not None and (flight.own_parts or flight.own_value is staged.spare):
                        self.store.spares.give(staged.spare, queue, staged.header.part)
        for peer in refused:
            self.store.refuse(plan.site, peer)
        if offload is not None:
            self._settle(offload, plan.site)
        if error is not None:
            raise error

    def _remember(self, flight: Flight, part: Incoming, target: Tensor, frame: Tensor) -> None:
        """Remember the frame that an output was written from, which may be passed on.

        What graphs write to the same tensor later comes in a frame that the host never sees.
        """
        site = flight.plan.site
        if site.captured is None and self.store.knows(site):
            flight.plan.pattern.remember(self, flight, part, target, frame)

    def _met(self, error: Exception, first: Exception | None) -> Exception:
        """The first error of a call, once it has been noted which epoch another rank is in."""
        if isinstance(error, FrameError) and error.epoch is not None:
            self.heard_of(error.epoch)
        return first or error

    @staticmethod
    def _write(part: Incoming, value: Tensor, target: Tensor) -> None:
        """Copy a part's value to its output; NaN where a device alone knows that the frame held no values."""
        value = value if target.dim() == 1 else value.view(target.shape)
        there = None if part.stream is None else part.stream.holds_values
        if there is None:
            target.copy_(value)
        else:
            torch.where(there, value, _nan(value.dtype, value.device), out=target)

    def _take(
        self,
        flight: Flight,
        part: Incoming,
        data: Tensor,
        refused: set[int],
        target: Tensor | None,
        queue: int | None,
    ) -> Tensor:
        """The value of one arrived part, flat; it may share memory with the frame or the history.

        ``target``: where it is wanted, if anywhere; the part's stream says whether it ``wrote`` it there. ``queue``:
        the current CUDA stream.
        """
        plan, decoder = flight.plan, part.stream
        if part.codec is None or decoder is None:
            header = frame_in(data) if data.is_cpu else None
            if header is not None:
                raise FrameError(
                    f"{self.label}, site '{plan.site.key}': a chunk from rank {part.peer} that this rank lets pass "
                    f"through arrived as a frame ({header.describe()}). Nothing was written to its output; give all "
                    "ranks the same policy, then call reset() on all ranks"
                )
            return from_raw(data, part.numel, plan.dtype)
        pattern = plan.pattern
        if pattern.forwards:
            self.arrivals.forget(plan.site, part.peer)
        keyframe = pattern.waits_for_earlier_calls and (flight.call.warm or part.fresh)
        try:
            value = decoder.decode(
                data,
                part.codec,
                part.numel,
                plan.dtype,
                step=flight.call.step,
                epoch=flight.call.epoch,
                hint=part.hint,
                refuse_state=bool(flight.refusing) and self.refuses(flight, part.peer),
                foreseen=pattern.waits_for_earlier_calls,
                keyframe=keyframe,
                devices_take_keyframes=keyframe and self.devices_take_keyframes,
                into=target if target is not None and target.device == data.device and target.is_contiguous() else None,
                queue=queue,
            )
        except FrameFollows as follows:
            frame = self.behind.fetch(flight.link or self.link, follows.header, part.peer)
            flight.arrived = [frame if one is data else one for one in flight.arrived]
            return self._take(flight, part, frame, refused, target, queue)
        if decoder.refused:
            refused.add(Site.ALL if pattern.whole_site else part.peer)
        if pattern.receives_only:
            pattern.taken(self, flight, part)
        return value

    @property
    def devices_take_keyframes(self) -> bool:
        """Whether devices may check keyframes. Under a budget hosts do: a frame may say that its sender has no room."""
        return self.ledger is None

    def _is_foreseen(self, pattern: Pattern, x: Tensor) -> bool:
        """Whether the receivers of a tensor know the kind of its frame beforehand."""
        return pattern.collective or self.link.needs_exact_sizes(x)

    # --- the rest of a group's life -----------------------------------------------------------------------------------

    def check_outputs(self, op: str, outputs: Sequence[Tensor], numel: int, like: Tensor) -> None:
        """Refuse outputs that cannot hold one tensor of ``numel`` elements from every rank, in the dtype of ``like``.

        Raises:
            BadOutputError: wrong number, sizes or dtype; nothing was sent.
        """
        if len(outputs) != self.size:
            raise BadOutputError(f"{self.label}, {op}: {len(outputs)} outputs given for {self.size} ranks")
        dtype = like.dtype
        for rank, output in enumerate(outputs):
            if output.numel() != numel or output.dtype != dtype:
                raise BadOutputError(
                    f"{self.label}, {op}: the output for rank {rank} holds {output.numel()} x {output.dtype}, "
                    f"but {numel} x {dtype} will arrive; nothing was sent"
                )

    def _refuse_shared_elements(self, flight: Flight, output: Tensor) -> None:
        """Refuse an output that torch would not write to: the frame would be on its way, and could not be decoded.

        Raises:
            BadOutputError: an expanded output; nothing was sent.
        """
        if any(stride == 0 and size > 1 for stride, size in zip(output.stride(), output.shape, strict=True)):
            call = flight.call
            raise BadOutputError(
                f"{self.label}, site '{call.site}' ({call.op}): an output of shape {tuple(output.shape)} has strides "
                f"{output.stride()}, so several of its elements share one place in memory (an expanded tensor) and "
                f"cannot hold the {output.numel()} values that will arrive; nothing was sent. Pass a tensor of its "
                "own, as expanded.clone()"
            )

    def forget(self, prefix: str | None = None) -> None:
        """Drop all history, or that of the sites under a prefix."""
        self._drop(prefix)
        if self.ledger is not None:
            self.ledger.forget(prefix)
        if prefix is None:
            self.late.clear()

    def state_bytes(self) -> dict[str, int]:
        """Bytes held per site key: histories, the codecs' memory, and payloads kept to be passed on.

        What was offloaded is not among them.
        """
        held = self.store.state_bytes()
        for key, nbytes in self.arrivals.kept_bytes().items():
            held[key] = held.get(key, 0) + nbytes
        return held
