"""Patch parallelism: every attention waits for the keys and values of all ranks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from compactdist_xdit.methods.base import GatheringMethod, Place, empty_for, gather, sequence


class PatchParallel(GatheringMethod):
    """Gathers synchronously. Without a codec its result is the ring's up to rounding. Keeps no state between steps."""

    name = "patch"

    def keys_and_values(self, group: Any, place: Place, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        gathered = empty_for(group, key)
        gather(group, gathered, key, value, async_op=False)
        self.counts["synchronous"] += 1
        return sequence(gathered, (group.rank(), key, value) if self.exact_own else None)
