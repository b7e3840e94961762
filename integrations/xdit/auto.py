"""Compression for pipelines that somebody else builds: an unmodified script, a server, a Ray worker.

The environment holds `COMPACTDIST_XDIT="--compact_codec int2"`, and the process calls
`compactdist_xdit.auto.install_from_environment()`. Every xDiT pipeline that it builds from then on is enabled as soon
as it is built. Its groups are wrapped when its first request begins, so xfuser may make them later.
"""

from __future__ import annotations

import sys
from typing import Any

from compactdist_common import Patches, unwrapped
from compactdist_xdit.adapter import Handle, enable
from compactdist_xdit.flags import arguments_from, options_from


class Automatic:
    """Enables every pipeline that xfuser wraps, and every one that a script passes to `initialize_runtime_state`.

    Args:
        options: for `enable`.
        explain: print each handle's table to stderr when xfuser's groups are destroyed, or at `finish()`.

    Attributes:
        handles: of the pipelines seen so far.
        finished: how many handles `finish()` has disabled.
    """

    def __init__(self, options: dict[str, Any], *, explain: bool = False) -> None:
        self.handles: list[Handle] = []
        self._options = options
        self._explain = explain
        self._patches = Patches()
        self.finished = 0

    def install(self) -> None:
        """Begin to listen; call it before the script imports names from xfuser."""
        import xfuser.core.distributed as distributed
        from xfuser.core.distributed.runtime_state import RuntimeState
        from xfuser.model_executor.models.runner_models.base_model import xFuserModel
        from xfuser.model_executor.pipelines.base_pipeline import xFuserPipelineBaseWrapper

        self._patches.after(xFuserPipelineBaseWrapper, "__init__", lambda pipe, *_, **__: self._enable(pipe))
        self._patches.after(xFuserModel, "initialize", lambda model, *_, **__: self._enable(model.pipe))
        # A script that puts xfuser's transformer into a diffusers pipeline calls this itself. The two classes above
        # call it by a name of their own modules, which this does not replace.
        made = "initialize_runtime_state"
        self._patches.after(distributed, made, lambda pipeline=None, *_, **__: self._enable(pipeline))
        self._patches.before(RuntimeState, "destroy_distributed_env", self.finish)

    def _enable(self, pipe: Any) -> None:
        inner = unwrapped(pipe)
        if hasattr(inner, "transformer") and not any(handle.pipe is inner for handle in self.handles):
            self.handles.append(enable(pipe, **self._options))

    def finish(self) -> None:
        """Print the tables, if `explain`, and disable every handle. Calling it again does nothing."""
        while self.handles:
            handle = self.handles.pop()
            self.finished += 1
            if self._explain:
                print(handle.explain(), file=sys.stderr, flush=True)
            handle.disable()
        self._patches.undo()


def install_from_environment() -> Automatic | None:
    """Install an `Automatic` with the flags in `COMPACTDIST_XDIT`; `None` where the variable asks for nothing.

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
