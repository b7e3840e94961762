"""Feature caches of diffusers (0.42): all ranks of a parallel model skip its blocks together.

First Block Cache skips the other blocks where the first block's output has changed little since the last step. Every
rank looks at its own tokens only, so near the threshold ranks part: one goes on to the next forward while another waits
in the next block's attention. So ranks vote, and skip where all of them would. SeaCache votes by itself; the other
caches decide by the step alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import compactdist
from compactdist.group.vote import vote
from compactdist_common import Patches

_FIRST_BLOCK = "fbc_leader_block_hook"  # diffusers' name of the hook in a model's first block
_DECIDES = "_should_compute_remaining_blocks"


def follow(model: Any, meshes: list[Any], patches: Patches) -> None:
    """Let ranks vote wherever a cache of `model` decides. A cache may be enabled, or another one, at any time.

    Args:
        model: a diffusers model, out of its wrappers.
        meshes: of its dimensions with more than one rank.
        patches: every change that is made.
    """
    if hasattr(model, "cache_context"):  # a cache decides only inside it
        patches.before(model, "cache_context", lambda: _find(model, meshes, patches))


def _find(model: torch.nn.Module, meshes: list[Any], patches: Patches) -> None:
    for blocks in model.children():
        first = next(iter(blocks), None) if isinstance(blocks, torch.nn.ModuleList) else None
        registry = getattr(getattr(first, "_orig_mod", first), "_diffusers_hook", None)
        hook = None if registry is None else registry.get_hook(_FIRST_BLOCK)
        if hook is not None and _DECIDES not in vars(hook):
            patches.wrap(hook, _DECIDES, lambda decides: _voting(decides, meshes))


def _voting(computes: Callable[..., bool], meshes: list[Any]) -> Callable[..., bool]:
    """The decision whether the blocks run, as a vote whether they are skipped."""

    @torch.compiler.disable
    def computes_somewhere(*args: Any) -> bool:
        skips = not computes(*args)
        for mesh in meshes:
            group = mesh.get_group()
            wrapped = isinstance(group, compactdist.CompressedProcessGroup)
            skips = group.agree(skips) if wrapped else vote(group, skips)
        return not skips

    return computes_somewhere
