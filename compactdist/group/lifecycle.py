"""The life of a wrapped group: names, steps, resets, closing, and what it can tell about itself."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist

from compactdist import _torch
from compactdist.config import Options
from compactdist.errors import ConfigError
from compactdist.exchange.context import Context
from compactdist.exchange.work import Outbox, drain
from compactdist.group.attach import Attachment
from compactdist.group.core import GroupCore
from compactdist.group.keys import KeyBook
from compactdist.group.torch_api import TorchDistributedAPI
from compactdist.observe.estimate import Estimate, estimate
from compactdist.observe.explain import explain
from compactdist.observe.stats import GroupStats, Stats
from compactdist.state import StateStore

__all__ = ["GroupLifecycle"]

_log = logging.getLogger("compactdist")
_FLUSH_SECONDS = 5.0


class GroupLifecycle(GroupCore, TorchDistributedAPI):
    """Construction, identity and life cycle of :class:`~compactdist.group.CompressedProcessGroup`.

    Attributes:
        inner: the group that was wrapped; use it for traffic that must not be compressed.
        options: the configuration.
    """

    def __init__(self, inner: Any, options: Options, name: str, *, owns_inner: bool = False) -> None:
        # (rank, size): torch refuses the (store, rank, size) overload for Python subclasses
        dist.ProcessGroup.__init__(self, inner.rank(), inner.size())  # type: ignore[call-arg,arg-type]
        self.inner = inner
        self.options = options
        self._name = name
        self._desc = "compactdist"
        self._closed = False
        self._owns_inner = owns_inner
        self._pool: ThreadPoolExecutor | None = None
        self._pool_lock = threading.Lock()
        self._attachments: list[Attachment] = []
        self._restore_names: list[Callable[[], None]] = []
        label = f"group '{name}', rank {inner.rank()}"
        self._ctx = Context(
            inner=inner,
            rank=inner.rank(),
            size=inner.size(),
            label=label,
            config=options.stream,
            codec=options.default_codec,
            policy=options.policy_function,
            layouts=options.layout_function,
            min_numel=options.min_numel,
            exact_local=options.local == "exact",
            sample_every=options.sample_errors_every,
            store=StateStore(options.stream, label, options.state_budget_bytes),
            keys=KeyBook(),
            stats=GroupStats(),
            lock=threading.RLock(),
            outbox=Outbox(),
            future_pool=self._future_pool,
            forward=options.forward,
        )

    # --- identity: the C++ name lives in the first backend, which is shared with the inner group, so it is shadowed ---

    @property
    def group_name(self) -> str:
        """The name torch.distributed knows this group by; not the inner group's."""
        return self._name

    @property
    def group_desc(self) -> str:
        """Description."""
        return self._desc

    def getGroupName(self) -> str:
        """Same as ``group_name``."""
        return self._name

    def getGroupDesc(self) -> str:
        """Same as ``group_desc``."""
        return self._desc

    def setGroupName(self, name: str) -> None:
        """Rename this group, not the inner one."""
        self._name = name

    _set_group_name = setGroupName

    def setGroupDesc(self, desc: str) -> None:
        """Describe this group, not the inner one."""
        self._desc = desc

    _set_group_desc = setGroupDesc

    def getBackendName(self) -> str:
        """``compactdist`` for a group made by backend name, else the inner group's."""
        return "compactdist" if self._owns_inner else str(self.inner.name())

    def get_group_store(self) -> Any:
        """The inner group's store."""
        return self.inner.get_group_store()

    @property
    def bound_device_id(self) -> Any:
        """The inner group's device."""
        return self.inner.bound_device_id

    def set_timeout(self, timeout: Any) -> None:
        """Set the inner group's timeout."""
        self.inner.set_timeout(timeout)

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"codec {self._ctx.codec!r}"
        return f"<{type(self).__name__} '{self._name}' rank {self._ctx.rank} of {self._ctx.size}, {state}>"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(f"cannot pickle '{type(self).__name__}' object")

    # --- steps and keys -----------------------------------------------------------------------------------------------

    def step(self, index: int | None = None) -> AbstractContextManager[None]:
        """Begin the next step: calls are counted from the first again. Use it as ``with dist.step():`` or alone.

        Args:
            index: which step, for a pipeline whose ends run ahead of one another: both name the step that a message
                belongs to. ``None``: the one after the last.
        """
        self._ready()
        self._ctx.keys.tick(index)
        return nullcontext()

    def key(self, name: str) -> AbstractContextManager[None]:
        """Put this thread's calls under a prefix: ``with dist.key("layer3.kv"):``. Prefixes nest."""
        self._ready()
        return self._ctx.keys.prefixed(name)

    def branch(self, name: str) -> AbstractContextManager[None]:
        """Name one pass of a step that has several (classifier-free guidance): ``with dist.branch("cond"):``."""
        self._ready()
        return self._ctx.keys.prefixed(name, branch=True)

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
                ``None``: steps are yours to advance.
            forwards_per_step: forwards of that module per branch and step.
            step_value: called as ``step_value(module, args, kwargs)`` before each forward of ``step_module`` instead of
                counting; a step begins when what it returns changes (a timestep, say).

        Returns:
            A handle: ``detach()``, or use it as a context manager.

        Raises:
            ConfigError: no such submodule, or ``forwards_per_step`` below 1.
        """
        self._ready()
        attachment = Attachment(self._ctx.keys, module, step_module, forwards_per_step, step_value)
        self._attachments.append(attachment)
        return attachment

    @property
    def current_step(self) -> int:
        """Steps begun since the last reset, less one; -1 before the first."""
        return self._ctx.keys.step

    def reset(self, prefix: str | None = None) -> None:
        """Forget the history (a new request): all ranks must call it at the same place among their calls.

        Exchanges under way are finished against their old history. Point-to-point receives posted before the reset must
        be for messages sent before it.

        Args:
            prefix: only sites under this prefix, as given to ``key`` or ``branch``; the step clock goes on, and
                ``explain()`` shows the sites' counts in one line from now on.
        """
        self._ready()
        self._ctx.forget(prefix)
        if prefix is None:
            self._ctx.keys.restart()
            for attachment in self._attachments:
                attachment.restart()
        else:
            self._ctx.keys.new_epoch()
            self._ctx.stats.fold(prefix)

    # --- what it can tell ---------------------------------------------------------------------------------------------

    def stats(self) -> Stats:
        """Totals and per-site counters of this rank."""
        return self._ctx.stats.snapshot(self._ctx.state_bytes())

    def reset_stats(self) -> None:
        """Start counting again; the history is untouched."""
        self._ctx.stats.clear()

    def explain(self) -> str:
        """A table: per call site what was sent, with which codec, how wrong, and why calls passed through."""
        return explain(self)

    def estimate(
        self,
        numel: int,
        *,
        op: str = "all_gather",
        dtype: torch.dtype = torch.bfloat16,
        sites: int = 1,
        steps: int | None = None,
    ) -> Estimate:
        """State memory and traffic before running; see :func:`compactdist.estimate.estimate`."""
        return estimate(self.options, self._ctx.size, numel, op=op, dtype=dtype, sites=sites, steps=steps)

    def _warn_no_step(self, op: str) -> None:
        _log.warning(
            "%s: %s passed through uncompressed because no step has begun. Call step() once per denoising step (or use "
            "attach(model)): without steps every call would be a new site. Further calls are counted silently",
            self._ctx.label,
            op,
        )

    # --- ending -------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Finish what is under way, forget everything, unregister; the inner group lives on. Closing twice is fine.

        Later calls raise ClosedGroupError, torch.distributed's functions and functional or compiled collectives
        included, as long as somebody holds the closed group. A group that torch made by backend name stays registered
        until ``destroy_process_group``.
        """
        if self._closed:
            return
        for attachment in self._attachments:
            attachment.detach()
        for site in self._ctx.store.sites():
            if site.pending and all(job.is_ready() for job in site.pending):
                drain(site)
        flusher = threading.Thread(target=self._ctx.outbox.flush, daemon=True, name="compactdist-flush")
        flusher.start()
        flusher.join(_FLUSH_SECONDS)
        if flusher.is_alive():
            _log.warning("%s: closed while a send had not been received", self._ctx.label)
        self._retire()
        for restore in self._restore_names:
            restore()
        self._restore_names.clear()
        if not self._owns_inner and _torch.is_registered(self):
            _torch.unregister(self)
            self._become_tombstone()
            _torch.bury(self)

    def _become_tombstone(self) -> None:
        raise AssertionError("provided by the group")

    def _retire(self) -> None:
        self._closed = True
        self._ctx.forget()
        with self._pool_lock:
            if self._pool is not None:
                self._pool.shutdown(wait=False)
                self._pool = None

    def on_close(self, restore: Callable[[], None]) -> None:
        """Call ``restore`` when the group is closed (adapters put back what they swapped)."""
        self._restore_names.append(restore)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def shutdown(self) -> None:
        """Called by destroy_process_group. The inner group is borrowed and stays, unless this group made it."""
        if not self._closed:
            self._retire()
        if self._owns_inner:
            self.inner.shutdown()

    def abort(self) -> None:
        """As ``shutdown``, for a group in trouble."""
        if not self._closed:
            self._retire()
        if self._owns_inner:
            self.inner.abort()

    def _future_pool(self) -> ThreadPoolExecutor:
        with self._pool_lock:
            if self._pool is None:
                if self._closed:
                    raise ConfigError(f"{self._ctx.label}: no futures from a closed group")
                self._pool = ThreadPoolExecutor(1, thread_name_prefix="compactdist-future")
            return self._pool
