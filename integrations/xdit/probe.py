"""What the adapter needs of the installed xfuser, and the configurations it refuses, with reasons."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

_log = logging.getLogger("compactdist")

TRIED = ("0.7.0",)

_NEEDED = {
    "ring": ("ring_attn",),
    "ulysses": ("_ft_c_input_all_to_all", "_ft_c_output_all_to_all"),
}
_PIPELINE = ("pipeline_send", "pipeline_isend", "pipeline_recv", "recv_next", "_pipeline_isend", "_pipeline_irecv")


def check_version() -> None:
    """Log a warning where this version of xfuser has never been tried."""
    installed = version("xfuser")
    if installed not in TRIED:
        _log.warning("xfuser %s is untested with compactdist_xdit (tried: %s)", installed, ", ".join(TRIED))


def missing(routes: Sequence[str]) -> dict[str, list[str]]:
    """The functions that these routes need and the installed xfuser lacks, by route."""
    from xfuser.core.distributed import group_coordinator
    from xfuser.model_executor.layers import usp

    lacking = {route: [n for n in _NEEDED.get(route, ()) if not hasattr(usp, n)] for route in routes}
    if "pipefusion" in routes:
        coordinator = getattr(group_coordinator, "PipelineGroupCoordinator", None)
        lacking["pipefusion"] = [name for name in _PIPELINE if not hasattr(coordinator, name)]
    return {route: names for route, names in lacking.items() if names}


def refuse(pipe: Any, routes: Sequence[str]) -> None:
    """Refuse a pipeline whose compression would fail or gain nothing.

    Raises:
        ValueError: xfuser lacks functions that a route needs, communicates with 8 bits, or keeps the transformer on the
            CPU between forwards.
    """
    for route, names in missing(routes).items():
        raise ValueError(
            f"xfuser {version('xfuser')} lacks {', '.join(names)}, which the {route} route needs; use "
            f"xfuser {TRIED[-1]} or leave the route out"
        )
    from xfuser.core.distributed import runtime_state

    state = getattr(runtime_state, "_RUNTIME", None)
    if getattr(state, "fp8_comms", None) is not None:
        raise ValueError(
            "xfuser's use_fp8_comms is on: its 8-bit buffers feed 8-bit attention kernels directly and cannot be "
            "compressed again; start without --use_fp8_comms"
        )
    for name in ("transformer", "transformer_2"):
        module = getattr(pipe, name, None)
        hook = getattr(module, "_hf_hook", None)
        offloads = hook is not None and (
            getattr(hook, "offload", False) or "Offload" in type(hook).__name__ or hasattr(module, "_hf_hook_offload")
        )
        registry = getattr(module, "_diffusers_hook", None)
        grouped = registry is not None and "group_offloading" in getattr(registry, "hooks", {})
        if offloads or grouped:
            raise ValueError(
                f"{name} is offloaded to the CPU between forwards: the history of every call site would stay on the "
                "GPU, where the memory is missing; switch offloading off, or compression"
            )
