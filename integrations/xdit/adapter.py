"""Compressed communication for an xDiT pipeline: one call, no change to xfuser.

    pipe = xFuserFluxPipeline(...)                      # as before
    handle = compactdist_xdit.enable(pipe, codec="int2")
    pipe(...)                                           # activations now travel as compressed residuals
    print(handle.explain())
    handle.disable()                                    # or: with enable(pipe, ...): ...

`enable` replaces the groups that xfuser's activations travel on by wrapped ones (`compactdist_xdit.routes`), gives call
sites names and layouts (`sites`, `long_context`, `pipefusion`), and tells steps and requests by the calls of
transformer and scheduler (`clock`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import compactdist_common
from compactdist_common import AUTO, Patches, chosen_codec, chosen_option, unwrapped
from compactdist_xdit import methods, probe
from compactdist_xdit import routes as all_routes
from compactdist_xdit.session import Session

_MARK = "_compactdist_xdit"


class Handle(compactdist_common.Handle):
    """What `enable` returns: the wrapped groups, what they sent, and the way back. Also a context manager.

    `groups` has a wrapped group for each route (`"pipefusion[0]"` and `[1]` for two stages). It is empty without a
    codec, and until xfuser has made its groups.

    Attributes:
        pipe: the diffusers pipeline.
        method: the parallel method, `None` without one.
    """

    def __init__(self, session: Session, patches: Patches) -> None:
        super().__init__(lambda: session.groups, patches)
        self.pipe = unwrapped(session.pipe)
        self.method = session.method

    def explain(self, *, wait: bool = True) -> str:
        """A table of call sites for each route, and how often the parallel method did what."""
        method = "" if self.method is None else self.method.describe()
        return "\n\n".join(filter(None, (super().explain(wait=wait), method)))


def enable(
    pipe: Any,
    codec: Any = AUTO,
    *,
    routes: str | Sequence[str] | None = None,
    parallel_method: str | None = None,
    method_warmup_steps: int | None = None,
    method_sync_from_step: int | None = None,
    exact_own: bool = True,
    **wrap_options: Any,
) -> Handle:
    """Compress the messages between the ranks of `pipe` from now on. Collective: every rank must call it.

    Groups that xfuser makes later, or makes anew, are wrapped when the next request begins.

    Args:
        pipe: an xDiT pipeline wrapper, or a diffusers pipeline whose transformer xfuser has parallelised.
        codec: a codec or its name, for `compactdist.wrap`; `"auto"`: that of `preset=`, else of
            `COMPACTDIST_CODEC`, else `int2`; `None` compresses nothing (for a parallel method alone).
        routes: of `compactdist_xdit.routes.ROUTES`, as a list or a text with commas; by default `ring`, `ulysses` and
            `pipefusion`. Routes whose groups have one rank send nothing and are left out.
        parallel_method: `"patch"` or `"distrifusion"` in place of ring attention; see `compactdist_xdit.methods`.
        method_warmup_steps, method_sync_from_step: DistriFusion's synchronous first and last steps; by default the
            first alone.
        exact_own: a rank attends to its own keys and values as they are, not as the other ranks decode them.
        wrap_options: further arguments of `compactdist.wrap` (`preset`, `policy`, `order`, ...). `mode="predict-now"`
            goes with `parallel_method="patch"`; what travels on routes `cfg` and `sp` waits nevertheless.

    Raises:
        ValueError: there is nothing to compress, a route or method is unknown, the pipeline is enabled already, steps
            of DistriFusion are given without it, `mode="predict-now"` without `parallel_method="patch"`, or xfuser is
            configured in a way that excludes compression (8-bit communication, CPU offload).
    """
    inner, wanted, codec = unwrapped(pipe), all_routes.chosen(routes), chosen_codec(codec, wrap_options)
    method = _method(parallel_method, exact_own, warmup_steps=method_warmup_steps, sync_from_step=method_sync_from_step)
    _refuse(codec, method, wrap_options)
    if vars(inner).get(_MARK) is not None:
        raise ValueError("compression is already enabled for this pipeline; call disable() on its handle first")
    probe.check_version()
    session = Session(pipe, codec, wanted, method, exact_own, wrap_options)
    patches = Patches()
    patches.add(session.close)
    handle = Handle(session, patches)
    try:
        if all_routes.initialized():
            session.bind()
            session.activate()
        session.follow()
        patches.replace(inner, _MARK, handle)
    except BaseException:
        handle.disable()
        raise
    return handle


def _method(name: str | None, exact_own: bool, **steps: int | None) -> methods.GatheringMethod | None:
    """The parallel method of that name, with those of DistriFusion's `steps` that are given.

    Raises:
        ValueError: an unknown name, or steps for another method.
    """
    given = {step: value for step, value in steps.items() if value is not None}
    if given and name != "distrifusion":
        names = ", ".join(f"method_{step}={value}" for step, value in given.items())
        raise ValueError(
            f"{names}: no effect without parallel_method='distrifusion', got {name!r}; name that method, or leave this "
            "out"
        )
    return None if name is None else methods.create(name, exact_own=exact_own, **given)


def _refuse(codec: Any, method: methods.GatheringMethod | None, wrap_options: dict[str, Any]) -> None:
    """Refuse options that would have no effect, or another one than they say.

    Raises:
        ValueError: there are some.
    """
    if codec is None:
        if method is None:
            raise ValueError("codec=None compresses nothing; name a codec, or a parallel_method to run without one")
        if wrap_options:
            names = ", ".join(wrap_options)
            raise ValueError(f"{names}: no effect with codec=None, which wraps no group; name a codec, or leave it out")
    elif chosen_option("mode", wrap_options, "wait") == "predict-now" and not isinstance(method, methods.PatchParallel):
        raise ValueError(
            "mode='predict-now' answers all-gathers with their prediction: xDiT's own ring and Ulysses attention make "
            "none, and DistriFusion's are a step late already; use parallel_method='patch', "
            f"got {None if method is None else method.name!r}"
        )
