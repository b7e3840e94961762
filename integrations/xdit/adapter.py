"""Compressed communication for an xDiT pipeline: one call, no change to xfuser.

    pipe = xFuserFluxPipeline(...)                      # as before
    handle = compactdist_xdit.enable(pipe, codec="int2")
    pipe(...)                                           # activations now travel as compressed residuals
    print(handle.explain())
    handle.disable()                                    # or: with enable(pipe, ...): ...

The groups that xfuser's activations travel on are replaced by wrapped ones (`compactdist_xdit.routes`), call sites get
names and layouts (`sites`, `pipefusion`), steps and requests are found by themselves (`clock`).
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

from compactdist_xdit import methods, probe
from compactdist_xdit import routes as all_routes
from compactdist_xdit.session import Session

_MARK = "_compactdist_xdit"


class Handle:
    """What `enable` returns: the wrapped groups and the way back. Also a context manager."""

    def __init__(self, session: Session) -> None:
        self._session: Session | None = session
        self._groups: dict[str, Any] = {}
        self.pipe = session.pipe
        self.method = session.method

    @property
    def groups(self) -> dict[str, Any]:
        """Wrapped group by route (`"pipefusion[0]"` and `[1]` for two stages); empty without a codec, and until
        xfuser has made its groups.
        """
        return self._groups if self._session is None else self._session.groups

    def stats(self) -> dict[str, Any]:
        """The statistics of each wrapped group, by route, as `compactdist` reports them."""
        return {route: group.stats() for route, group in self.groups.items()}

    def explain(self) -> str:
        """What was sent at every call site, as a table for each route, and what the parallel method did."""
        parts = [f"{route}\n{group.explain()}" for route, group in self.groups.items()]
        if self.method is not None:
            parts.append(self.method.describe())
        return "\n\n".join(parts)

    def disable(self) -> None:
        """Give xfuser its own groups and functions back. Calling it again does nothing."""
        if self._session is not None:
            session, self._groups, self._session = self._session, self._session.groups, None
            vars(self.pipe).pop(_MARK, None)
            session.close()

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disable()


def enable(
    pipe: Any,
    codec: Any = "int2",
    *,
    routes: str | Sequence[str] | None = None,
    parallel_method: str | None = None,
    method_warmup_steps: int = 1,
    method_sync_from_step: int | None = None,
    exact_own: bool = True,
    **wrap_options: Any,
) -> Handle:
    """Compress what the ranks of `pipe` send each other from now on. Collective: every rank must call it.

    Groups that xfuser makes later, or makes anew, are found when a request begins.

    Args:
        pipe: an xDiT pipeline wrapper, or a diffusers pipeline whose transformer xfuser has parallelised.
        codec: a codec or its name, for `compactdist.wrap`; `None` compresses nothing (for a parallel method alone).
        routes: what to compress, of `compactdist_xdit.routes.ROUTES`, as a list or with commas; by default `ring`,
            `ulysses` and `pipefusion`, as far as they span more than one rank.
        parallel_method: `"patch"` or `"distrifusion"` in place of ring attention; see `compactdist_xdit.methods`.
        method_warmup_steps, method_sync_from_step: of DistriFusion, the synchronous first and last steps.
        exact_own: a rank attends to its own keys and values as they are, not as the others see them.
        wrap_options: further arguments of `compactdist.wrap` (`policy`, `order`, `warmup_steps`, ...).

    Raises:
        ValueError: there is nothing to compress, a route or method is unknown, the pipeline is enabled already, or
            something is on that compression cannot go with (8-bit communication, CPU offload).
    """
    inner, wanted = probe.unwrapped(pipe), all_routes.chosen(routes)
    method = None
    if parallel_method is not None:
        choices = {"warmup_steps": method_warmup_steps, "sync_from_step": method_sync_from_step, "exact_own": exact_own}
        method = methods.create(parallel_method, **choices)
    if codec is None:
        if method is None:
            raise ValueError("codec=None compresses nothing; name a codec, or a parallel_method to run without one")
        if wrap_options:
            raise ValueError(f"{', '.join(wrap_options)}: of no use with codec=None, where nothing is wrapped")
    if vars(inner).get(_MARK) is not None:
        raise ValueError("compression is already enabled for this pipeline; call disable() on its handle first")
    probe.check_version()
    session = Session(inner, codec, wanted, method, exact_own, wrap_options)
    handle = Handle(session)
    try:
        if all_routes.initialized():
            session.bind()
            session.activate()
        session.follow()
        vars(inner)[_MARK] = handle
    except BaseException:
        handle.disable()
        raise
    return handle
