"""The life of a wrapped group: names, steps, resets, closing, and what it can tell about itself."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from compactdist import _torch
from compactdist.config import Options
from compactdist.errors import ClosedGroupError, CompactDistError, ConfigError, StateMismatchError
from compactdist.exchange.captured import catch_up
from compactdist.exchange.engine import Engine
from compactdist.exchange.later import Departures
from compactdist.exchange.link import Link
from compactdist.exchange.ops import patterns_by_op
from compactdist.exchange.plan import Chooser
from compactdist.exchange.sampling import Samples
from compactdist.exchange.work import FinishedWork, drain
from compactdist.group.agreement import Agreement
from compactdist.group.attach import Attachment
from compactdist.group.beyond_calls import BeyondCalls
from compactdist.group.check import check
from compactdist.group.core import GroupCore
from compactdist.group.epochs import LatestEpoch
from compactdist.group.identity import OwnName
from compactdist.group.keys import KeyBook, check_name
from compactdist.group.plans import AgreedPlans
from compactdist.group.request import Request
from compactdist.group.snapshots import Snapshots
from compactdist.group.torch_api import TorchDistributedAPI
from compactdist.group.vote import vote
from compactdist.observe.estimate import Estimate, estimate
from compactdist.observe.explain import explain
from compactdist.observe.stats import GroupStats, Stats
from compactdist.policy import Rules
from compactdist.state import Ledger, Offload, RateControl, StateStore

__all__ = ["GroupLifecycle", "check_rules"]

_log = logging.getLogger("compactdist")
_FLUSH_SECONDS = 5.0
_LOST_PEER = (
    ". If the connection to a rank is lost, look for what ended it: an error of its own or, where ranks make different "
    "calls, a message larger than it expected"
)


def check_rules(options: Options) -> None:
    """Refuse a rule that can never match.

    Raises:
        ConfigError: a rule names an operation that is not compressed.
    """
    rules = options.policy_function.rules if isinstance(options.policy_function, Rules) else ()
    known = patterns_by_op()
    for rule in rules:
        if rule.op is not None and rule.op not in known:
            raise ConfigError(f"a rule's op is one of {', '.join(known)}, got {rule.op!r}")
        if rule.op is not None and rule.between is not None and known[rule.op].whole_site:
            raise ConfigError(f"a rule with between matches no {rule.op}, whose messages all ranks receive: {rule!r}")


def _raise(error: BaseException | None) -> None:
    """Raise an error that waited for the caller to be done, if there is one."""
    if error is not None:
        raise error


class GroupLifecycle(GroupCore, OwnName, BeyondCalls, Snapshots, TorchDistributedAPI):
    """Construction, identity and life cycle of :class:`~compactdist.group.process_group.CompressedProcessGroup`.

    Attributes:
        inner: the group that was wrapped; use it for traffic that must not be compressed.
        options: the configuration.
    """

    _desc = "compactdist"

    def __init__(
        self,
        inner: Any,
        options: Options,
        name: str,
        store: Any,
        *,
        owns_inner: bool = False,
    ) -> None:
        check_rules(options)
        # (rank, size): torch refuses the (store, rank, size) overload for Python subclasses
        dist.ProcessGroup.__init__(self, inner.rank(), inner.size())  # type: ignore[call-arg,arg-type]
        self._inner = inner
        self._store = store
        self.options = options
        self._name = name
        self._closed = False
        self._owns_inner = owns_inner
        self._alone = inner.size() == 1 or _torch.is_fake(inner)
        self._adopted = False
        self._backend_name = "compactdist" if owns_inner else str(inner.name())
        self._pool: ThreadPoolExecutor | None = None
        self._pool_lock = threading.Lock()
        self._attachments: list[Attachment] = []
        self._differences = 0
        self._requests: dict[str, Request] = {}
        self._restore_names: list[Callable[[], None]] = []
        label = f"group '{name}', rank {inner.rank()}"
        self._keys = KeyBook(options.stream.warmup_steps, label, self._poll)
        self._finished = FinishedWork()
        self._departures = Departures()
        self._plans = AgreedPlans()
        self._latest_epoch = LatestEpoch(None if self._alone else store, name)
        self._agreement = self._agrees(inner, options, label)
        stats = GroupStats()
        self._engine = Engine(
            link=Link(inner),
            rank=inner.rank(),
            size=inner.size(),
            label=label,
            config=options.stream,
            chooser=Chooser(
                label,
                options.default_codec,
                options.policy_function,
                options.layout_function,
                options.mode,
                options.min_numel,
                stats.small,
                options.parts,
            ),
            exact_local=options.local == "exact",
            samples=Samples(options.sample_errors_every, stats),
            store=self._new_store(options, label, stats),
            stats=stats,
            forward=options.forward,
            varies=self._plans.varies,
            heard_of=self._heard_of,
            ledger=None if options.drops_beyond is None else Ledger(options.drops_beyond),
        )

    def _heard_of(self, epoch: int) -> None:
        """A rank is in another epoch than others, and maybe ahead of this one."""
        self._keys.heard_of(epoch)
        self._latest_epoch.tell(max(epoch, self._keys.epoch))

    def _new_store(self, options: Options, label: str, stats: GroupStats) -> StateStore:
        control = None if options.asked is None else RateControl(options.asked)
        budget, offload = options.state_budget_bytes, None
        if options.state_offload is not None and budget is not None:
            offload = Offload(budget, stats.offloaded)
        return StateStore(options.stream, label, budget, self._name, self._inner.rank(), control, offload)

    def _poll(self) -> None:
        if self._engine.store.board.used:
            self._engine.store.board.poll()
        if self._engine.late.used:
            self._engine.late.poll()
        if self._engine.link.own is not None:
            self._engine.link.follow_timeout()

    def _agrees(self, inner: Any, options: Options, label: str) -> Agreement | None:
        """What ranks agree on plans with; ``None``: there is nobody to agree with, or they should not."""
        if options.agree == "off" or self._alone:
            return None
        timeout = options.agree_timeout or _torch.timeout_of(inner)
        prefix = f"compactdist/plans/{self._name}"
        return Agreement(self._store, prefix, inner.rank(), inner.size(), label, timeout, self._heard_of)

    # --- identity: the C++ name lives in the first backend, which is shared with the inner group, so it is shadowed ---

    @property
    def group_name(self) -> Any:
        """The name torch.distributed knows this group by; not the inner group's."""
        if not self._adopted and self._inner is not None:
            self._adopt_backends()
        return self._name

    @_torch.constant_to_dynamo
    def _adopt_backends(self) -> None:
        """Give the C++ base the inner group's backends, which it holds until this object is gone.

        Functional collectives and DistributedDataParallel reach the backends without Python. The former ask for the
        name first, the latter is recognised: a group used by neither never adopts, and holds no backend once closed.
        """
        self._adopted = True
        if self._owns_inner:
            _torch.adopt_own_backends(self, self._inner)
        elif _torch.is_registered(self._inner):
            _torch.adopt_backends(self, self._inner)

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"codec {self.options.default_codec!r}"
        return f"<CompressedProcessGroup '{self._name}' rank {self._engine.rank} of {self._engine.size}, {state}>"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(f"cannot pickle '{type(self).__name__}' object")

    # --- steps and keys -----------------------------------------------------------------------------------------------

    def step(self, index: int | None = None) -> AbstractContextManager[None]:
        """Begin the next step: calls are counted from the first again. Use it as ``with dist.step():`` or alone.

        Args:
            index: which step, for a pipeline whose ends run ahead of one another: both name the step that a message
                belongs to. ``None``: the one after the last.

        A call that raises has not begun the step: call it again to go on.

        Raises:
            ConfigError: a negative index, or a step inside the ``with`` block of another.
            FrameError, NonFiniteError: a GPU has met a frame that is not the expected one, or values that are not
                finite, in one of the last steps; or such a frame has come to a call that had been answered with its
                prediction.
            CaptureError: a CUDA graph was replayed that had ended (``reset``, another shape, a keyframe).
            LateExchangeError: the exchange of such a call failed.
        """
        self._ready()
        return self._keys.tick(index)

    def key(self, name: str) -> AbstractContextManager[None]:
        """Put this thread's calls under a prefix: ``with dist.key("layer3.kv"):``. Prefixes nest.

        Raises:
            ConfigError: on entering: an empty name, one with ``#``, or one that begins with ``request:``.
        """
        self._ready()
        return self._keys.prefixed(name)

    def branch(self, name: str) -> AbstractContextManager[None]:
        """Name one pass of a step that has several (classifier-free guidance): ``with dist.branch("cond"):``.

        Raises:
            ConfigError: on entering: an empty name, one with ``#``, or one that begins with ``request:``.
        """
        self._ready()
        return self._keys.prefixed(name, branch=True)

    def request(self, name: str) -> Request:
        """A scope for one of several requests that a server interleaves: it has call sites and a step count of its own,
        and its history is dropped when it ends.

        ``with dist.request("7f3a"):`` around a whole request; or, where steps of several requests alternate in one
        thread, ``request = dist.request("7f3a")``, ``with request.resume():`` around each step, and ``request.end()``.
        All ranks use the same names, and end a request at the same place among its calls.

        Raises:
            ConfigError: an empty name, one with ``#`` or ``/``, or one of a request that has not ended.
        """
        self._ready()
        check_name(name)
        if "/" in name:
            raise ConfigError(
                f"{self._engine.label}: a request's name is the first part of its site keys, and '/' ends that part: "
                f"the end of another request could drop the history of {name!r}; give a name without '/', as "
                f"{name.replace('/', '-')!r}"
            )
        if name in self._requests:
            raise ConfigError(
                f"{self._engine.label}: request '{name}' has not ended: resume() the object that request() returned, "
                "or end() it before another of this name begins"
            )
        request = self._requests[name] = Request(name, self._keys, self._forget_request)
        return request

    def _forget_request(self, request: Request) -> None:
        error = self._engine.late.settle(request.prefix)
        self._requests.pop(request.name, None)
        self._departures.join()  # a call of the request that leaves later would be agreed on after its end
        self._plans.end_request(request.prefix)
        if not self._closed:
            self._engine.forget(request.prefix)
            self._engine.stats.fold(request.prefix, "(ended requests)")
        _raise(error)

    def attach(
        self,
        module: torch.nn.Module,
        *,
        step_module: str | None = "",
        forwards_per_step: int = 1,
        step_value: Callable[..., Any] | None = None,
    ) -> Attachment:
        """Let a model's modules name the calls made inside them, and let its forwards advance the steps.

        Args:
            module: its submodules' qualified names become key prefixes (the innermost running module's).
            step_module: qualified name of the module whose forwards count steps, ``""`` for ``module`` itself;
                ``None``: forwards count no steps, call ``step()``.
            forwards_per_step: forwards of that module per branch and step.
            step_value: called as ``step_value(module, args, kwargs)`` before each forward of ``step_module`` instead of
                counting; a step begins when the returned value (a timestep, say) changes.

        Returns:
            A handle: ``detach()``, or use it as a context manager.

        Raises:
            ConfigError: no such submodule, ``forwards_per_step`` below 1, or a module's name begins with ``request:``.
        """
        self._ready()
        attachment = Attachment(self._keys, module, step_module, forwards_per_step, step_value)
        self._attachments.append(attachment)
        return attachment

    @property
    def current_step(self) -> int:
        """Steps begun since the last reset, less one; -1 before the first."""
        return self._keys.step

    def reset(self, prefix: str | None = None) -> None:
        """Forget the history (a new request): all ranks must call it at the same place among their calls.

        Exchanges under way are finished against their old history; those of calls that were answered with a prediction
        are waited for. Point-to-point receives posted before the reset must be for messages sent before it. CUDA graphs
        that have captured calls of these sites end.

        Args:
            prefix: only sites under this prefix, as given to ``key`` or ``branch``; the step clock goes on, and
                ``explain()`` shows the sites' counts in one line from now on.

        Raises:
            ConfigError: ``prefix`` is no name.
            FrameError, NonFiniteError, LateExchangeError: what a GPU, or a late frame, has met since the last step,
                once everything is forgotten.
        """
        self._ready()
        if prefix is not None:
            check_name(prefix)
        error = self._settle(prefix)
        self._engine.forget(prefix)
        self._keys.heard_of(self._latest_epoch.read())
        if prefix is None:
            self._keys.restart()
            for request in self._requests.values():
                request.restart()
            for attachment in self._attachments:
                attachment.restart()
        else:
            self._keys.new_epoch()
        self._engine.stats.fold(prefix)
        try:
            self._engine.store.board.poll(wait=True)
        except CompactDistError:
            if error is not None:
                _log.error("%s", str(error))
            raise
        _raise(error)

    def agree(self, flag: bool, how: str = "all") -> bool:
        """One decision for all ranks, for code that may skip calls: ``if dist.agree(similar): reuse the last output``.

        Collective: one byte for each rank on the inner group, and the host waits for it. Takes no key and no ordinal,
        and needs no step.

        Args:
            flag: what this rank would decide.
            how: ``"all"``: yes if every rank says yes; ``"any"``: if some rank does; ``"majority"``: if more than half
                of them do. The same on all ranks.

        Raises:
            ConfigError: another ``how``; nothing was sent.
            PlanMismatchError: ranks could not agree on a call since the last reset; nothing was sent.
            The inner group's error, where a rank does not vote within the group's timeout.
        """
        self._ready()
        self._refuse_unagreed()
        return vote(self._inner, flag, how)

    # --- what it can tell ---------------------------------------------------------------------------------------------

    def stats(self, *, wait: bool = True) -> Stats:
        """Totals and per-site counters of this rank.

        Args:
            wait: for GPUs and late frames, and raise what they met since the last step, once. ``False`` is for a thread
                that watches a server: it waits for nothing and leaves every error to the thread that makes calls; what
                GPUs have measured or replayed by CUDA graphs since, is not counted yet.

        Raises:
            FrameError, NonFiniteError, LateExchangeError: what a GPU, or a late frame, has met, with ``wait``.
        """
        if wait:
            self._meet_errors()
        store = self._engine.store
        with self._engine.lock:
            self._engine.samples.read(wait=wait)
        made = self._engine.stats.snapshot(self._engine.state_bytes(), store.rates(), store.offloaded_bytes())
        control, late = store.control, self._engine.late_reads
        target = None if control is None else control.met(wait=wait).to_dict()
        late += 0 if control is None else control.late
        return replace(made, target=target, late_reads=late, late_preparations=store.unprepared.late)

    def check(self) -> None:
        """Make sure that both ends of every stream hold the same history, to the bit. Collective.

        Exchanges under way are waited for first. Call it where no point-to-point message is on its way, on all ranks.
        One all-gather of two integers for each rank; the memory of all histories is read once.

        Raises:
            StateMismatchError: on every rank, naming sites and ranks.
            PlanMismatchError: ranks could not agree on a call since the last reset; nothing was sent.
            FrameError, NonFiniteError, LateExchangeError: what a GPU, or a late frame, has met since the last step, on
                the rank that met it; after all ranks have compared.
        """
        self._ready()
        if self._alone:
            return
        self._refuse_unagreed()
        self._departures.join()
        error = self._settle()
        try:
            self._differences += check(self._engine, self._inner, self._store, self._differences)
        except StateMismatchError as mismatch:
            self._differences += 1
            raise mismatch from error
        _raise(error)
        self._engine.store.board.poll(wait=True)

    def reset_stats(self) -> None:
        """Start counting again; the history is untouched."""
        catch_up(self._engine)
        with self._engine.lock:
            self._engine.samples.read()  # errors of calls before this one must not count after it
        self._engine.stats.clear()
        store = self._engine.store
        self._engine.late_reads = store.unprepared.late = 0
        if store.control is not None:
            store.control.late = 0

    def explain(self, *, wait: bool = True) -> str:
        """A table: per call site what was sent, with which codec, how wrong, and why calls passed through.

        ``wait`` and errors: as for :meth:`stats`.
        """
        return explain(self, wait=wait)

    def estimate(
        self,
        numel: int,
        *,
        op: str = "all_gather",
        dtype: torch.dtype = torch.bfloat16,
        sites: int = 1,
        steps: int | None = None,
        channels: int | None = None,
        groups: int = 1,
    ) -> Estimate:
        """State memory and traffic before running; see :func:`compactdist.observe.estimate.estimate`."""
        view: dict[str, Any] = {"channels": channels, "groups": groups}
        return estimate(self.options, self._engine.size, numel, op=op, dtype=dtype, sites=sites, steps=steps, **view)

    def _warn_no_step(self, op: str) -> None:
        _log.warning(
            "%s: %s passed through uncompressed because no step has begun. Call step() once per denoising step (or use "
            "attach(model)): without steps every call would be a new site. Further calls are counted silently",
            self._engine.label,
            op,
        )

    # --- ending -------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Forget the history and unregister the group; the inner group lives on. Closing twice is fine. CUDA graphs
        that have captured calls must be deleted first.

        Exchanges that have arrived are decoded first; those of calls that were answered with a prediction get 5 s to
        arrive, and sends 5 s to be received. A work that is still pending then finishes when it is waited for.

        Later calls raise ClosedGroupError, torch.distributed's functions and functional or compiled collectives
        included, as long as somebody holds the closed group. A group that torch made by backend name stays registered
        until ``destroy_process_group``.

        Raises:
            FrameError, NonFiniteError, LateExchangeError: what a GPU, or a late frame, has met since the last step,
                once the group is closed. Logged instead where another error is on its way.
            RuntimeError: a GPU has failed; the group is closed all the same.
        """
        if self._closed:
            return
        self._tell_why()
        reported = self._reported()
        for attachment in self._attachments:
            attachment.detach()
        for site in self._engine.store.sites():
            pending = tuple(site.pending)  # other threads may be waiting for some of them
            if pending and all(job.is_ready() for job in pending):
                drain(site)
        self._departures.close(_FLUSH_SECONDS)
        flusher = threading.Thread(target=self._flush, daemon=True, name="compactdist-flush")
        flusher.start()
        flusher.join(_FLUSH_SECONDS)
        if flusher.is_alive():
            _log.warning("%s: closed while a send had not been received", self._engine.label)
        self._retire()
        self._requests.clear()
        for restore in self._restore_names:
            restore()
        self._restore_names.clear()
        if not self._owns_inner and _torch.is_registered(self):
            _torch.unregister(self)
            self._become_tombstone()
            _torch.bury(self)
        if reported is not None and sys.exc_info()[1] is not None:
            _log.error("%s", str(reported))
            return
        _raise(reported)

    def _settle(self, prefix: str | None = None, seconds: float | None = None) -> BaseException | None:
        """As ``Late.settle``; then counts what CUDA graphs have replayed."""
        error = self._engine.late.settle(prefix, seconds)
        catch_up(self._engine)
        return error

    def _meet_errors(self) -> None:
        """Raise what a GPU, or a late frame, has met; both are waited for."""
        _raise(self._settle())
        self._engine.store.board.poll(wait=True)

    def _reported(self) -> BaseException | None:
        """What a device, or a late frame, has met since the last step; a device that fails itself says so, too."""
        late = None
        try:
            late = self._settle(seconds=_FLUSH_SECONDS)
            self._engine.store.board.poll(wait=True)
        except Exception as error:
            if late is not None:
                _log.error("%s", str(late))
            return error
        return late

    def _flush(self) -> None:
        try:
            self._engine.outbox.flush()
            self._engine.behind.join(_FLUSH_SECONDS)
        except Exception as error:
            _log.warning("%s: closed, and then a send failed: %s", self._engine.label, str(error))

    def _tell_why(self) -> None:
        """Log the error that the group is closed by, if there is one.

        Closing takes a moment, and once it begins other ranks fail too; a launcher then ends this process, which may be
        before Python shows the error.
        """
        error = sys.exc_info()[1]
        if isinstance(error, CompactDistError):
            _log.error("%s", str(error))  # as text: a log record must not keep the frames of the error alive
        elif isinstance(error, Exception):
            hint = _LOST_PEER if isinstance(error, RuntimeError) else ""
            _log.error("%s: closed at step %d by %s%s", self._engine.label, self._keys.step, repr(error), hint)

    def _become_tombstone(self) -> None:
        raise AssertionError("provided by the group")

    def _retire(self) -> None:
        self._closed = True
        self._departures.close(0)
        if self._agreement is not None:
            self._agreement.close()
            self._agreement = None
        self._latest_epoch.forget()
        self._engine.forget()
        self._engine.store.ended.clear()
        if not self._owns_inner:
            self._let_go()
        with self._pool_lock:
            if self._pool is not None:
                self._pool.shutdown(wait=False)
                self._pool = None

    def _let_go(self) -> None:
        """Hold nothing of the inner group: its threads end when its owner destroys it."""
        link, self._inner, self._engine.link = self._engine.link, None, Link(None)
        link.rejoin()

    def on_close(self, restore: Callable[[], None]) -> None:
        """Call ``restore`` when the group is closed (adapters put back what they swapped)."""
        self._restore_names.append(restore)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def shutdown(self) -> None:
        """Called by destroy_process_group. The inner group is borrowed and stays, unless this group made it."""
        self._end("shutdown")

    def abort(self) -> None:
        """As ``shutdown``, but abort the inner group if this group made it."""
        self._end("abort")

    def _end(self, how: str) -> None:
        if not self._closed:
            self._tell_why()
            reported = self._reported() if how == "shutdown" else None  # who aborts does not wait for a device
            if reported is not None:
                _log.error("%s", str(reported))
            self._retire()
        if self._owns_inner and self._inner is not None:
            getattr(self._inner, how)()
            self._let_go()

    def _future_pool(self) -> ThreadPoolExecutor:
        with self._pool_lock:
            if self._pool is None:
                if self._closed:
                    raise ClosedGroupError(
                        f"{self._engine.label}: a closed group gives no futures; wait for the work instead"
                    )
                self._pool = ThreadPoolExecutor(1, thread_name_prefix="compactdist-future")
            return self._pool
