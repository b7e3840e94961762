"""Compression for pipelines that somebody else builds: an unmodified script, a server, a Ray worker.

    COMPACTDIST_XDIT="--compact_codec int2"     and in the process     compactdist_xdit.auto.install_from_environment()

Every xDiT pipeline built from then on is enabled as soon as it stands. Groups are wrapped when its first request
begins, so it does not matter when xfuser makes them.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from compactdist_xdit.adapter import Handle, enable
from compactdist_xdit.flags import arguments_from, options_from


class Automatic:
    """Enables every pipeline that xfuser wraps, and those a script hands to `initialize_runtime_state`.

    Args:
        options: for `enable`.
        explain: print each handle's table when xfuser's groups are destroyed, or at `finish()`.

    Attributes:
        handles: of the pipelines seen so far.
        finished: how many handles `finish()` has disabled.
    """

    def __init__(self, options: dict[str, Any], *, explain: bool = False) -> None:
        self.handles: list[Handle] = []
        self._options = options
        self._explain = explain
        self._patched: list[tuple[Any, str, Any]] = []
        self.finished = 0

    def install(self) -> None:
        """Begin to listen; call it before the script imports names from xfuser."""
        import xfuser.core.distributed as distributed
        from xfuser.core.distributed.runtime_state import RuntimeState
        from xfuser.model_executor.models.runner_models.base_model import xFuserModel
        from xfuser.model_executor.pipelines.base_pipeline import xFuserPipelineBaseWrapper

        self._after(xFuserPipelineBaseWrapper, "__init__", lambda pipe, *_, **__: self._enable(pipe))
        self._after(xFuserModel, "initialize", lambda model, *_, **__: self._enable(model.pipe))
        # Scripts with a plain diffusers pipeline and a transformer of xfuser's call this by themselves. (What the two
        # above call is a name of their own module.)
        self._after(distributed, "initialize_runtime_state", lambda pipeline=None, *_, **__: self._enable(pipeline))
        self._before(RuntimeState, "destroy_distributed_env", self.finish)

    def _enable(self, pipe: Any) -> None:
        inner = getattr(pipe, "module", pipe)
        if hasattr(inner, "transformer") and not any(handle.pipe is inner for handle in self.handles):
            self.handles.append(enable(pipe, **self._options))

    def _after(self, owner: Any, name: str, then: Any) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            then(*args, **kwargs)
            return result

        self._replace(owner, name, call)

    def _before(self, owner: Any, name: str, first: Any) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            first()
            return original(*args, **kwargs)

        self._replace(owner, name, call)

    def _replace(self, owner: Any, name: str, call: Any) -> None:
        self._patched.append((owner, name, getattr(owner, name)))
        setattr(owner, name, call)

    def finish(self) -> None:
        """Say what was sent, if that was asked for, and give xfuser everything back. Calling it again does nothing."""
        while self.handles:
            handle = self.handles.pop()
            self.finished += 1
            if self._explain:
                print(handle.explain(), file=sys.stderr, flush=True)
            handle.disable()
        while self._patched:
            owner, name, original = self._patched.pop()
            setattr(owner, name, original)


def install_from_environment() -> Automatic | None:
    """What `COMPACTDIST_XDIT` asks for, installed; `None` where it asks for nothing.

    Raises:
        ValueError: a misspelt variable, flag or value.
    """
    args = arguments_from()
    options = None if args is None else options_from(args)
    if args is None or options is None:
        return None
    automatic = Automatic(options, explain=args.compact_explain)
    automatic.install()
    return automatic
