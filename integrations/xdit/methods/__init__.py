"""Parallel methods that xfuser 0.7 does not have: patch parallelism and DistriFusion, on its ring group.

xfuser's sequence-parallel attention (`xfuser.model_executor.layers.usp.USP`) passes queries, keys and values to
`ring_attn`. A method, while it is installed, replaces `ring_attn`: it gathers the keys and values of all ranks and
attends to all of them at once. Every model that uses USP runs it, with `ring_degree` as the number of ranks, and with
Ulysses around it where `ulysses_degree` is set as well.

| method         | gather                        | keys and values of the other ranks          |
|----------------|-------------------------------|---------------------------------------------|
| `patch`        | waited for                    | those of this step                          |
| `distrifusion` | waited for one step later     | those of the step before (but for warm-up)  |

The group may be plain, or wrapped by compactdist, which then compresses these gathers.
"""

from __future__ import annotations

from compactdist_xdit.methods.base import GatheringMethod
from compactdist_xdit.methods.distrifusion import DistriFusion
from compactdist_xdit.methods.patch import PatchParallel

__all__ = ["METHODS", "DistriFusion", "GatheringMethod", "PatchParallel", "create"]

METHODS = ("patch", "distrifusion")


def create(
    name: str, *, warmup_steps: int = 1, sync_from_step: int | None = None, exact_own: bool = True
) -> GatheringMethod:
    """The method of that name, not yet installed.

    Args:
        name: `"patch"` or `"distrifusion"`.
        warmup_steps, sync_from_step: see `DistriFusion`; patch parallelism ignores them.
        exact_own: see `GatheringMethod`.

    Raises:
        ValueError: an unknown name, or an option out of range.
    """
    if name == "patch":
        return PatchParallel(exact_own=exact_own)
    if name == "distrifusion":
        return DistriFusion(warmup_steps=warmup_steps, sync_from_step=sync_from_step, exact_own=exact_own)
    raise ValueError(f"parallel_method is one of {', '.join(METHODS)}, not {name!r}")
