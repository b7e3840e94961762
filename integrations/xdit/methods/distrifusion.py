"""DistriFusion (arXiv 2402.19481) on transformers: the other ranks' keys and values are one step old.

Attention uses the keys and values gathered in the step before, so that this step's gather has a whole step's time to
arrive. Works are waited for one step after they were issued; a group wrapped by compactdist allows that too.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from compactdist_xdit.methods.base import GatheringMethod, Place, empty_for, gather, sequence

_log = logging.getLogger("compactdist")


@dataclass
class _Site:
    """The state of one attention between steps.

    Attributes:
        gathered: `(P, 2, B, H, S, D)`, written by the gather under way. Attention reads a copy of it (see `sequence`).
        issued: the step of the gather that wrote or will write `gathered`.
        work, message: the gather under way, and the tensor it sends, which must stay alive until the gather is done.
    """

    gathered: Tensor
    issued: int = -1
    work: Any = None
    message: Tensor | None = None

    def settle(self) -> bool:
        """Wait for the gather under way, and return whether there was one."""
        work, self.work = self.work, None
        if work is not None:
            work.wait()
        self.message = None
        return work is not None


class DistriFusion(GatheringMethod):
    """Gathers asynchronously, one step stale, after a synchronous warm-up.

    Where the number of steps is known, the last step gathers nothing, because no later step would use it. A step beyond
    that number is synchronous. So is the first step of a place that is new, or whose tensors changed shape, dtype or
    device. `counts` has all of these.

    Args:
        warmup_steps: steps at the beginning of a request that wait for their own gathers, >= 1.
        sync_from_step: steps from this one on (counted from 0) wait for their own gathers too; for the last step
            alone, where keys and values change most, `num_inference_steps - 1`. `None`: no step at the end waits.
        exact_own: see `GatheringMethod`; with `False` a rank's own keys and values are a step old too.

    Raises:
        ValueError: `warmup_steps` below 1, for the first step has no gather before it, or a negative `sync_from_step`.
    """

    name = "distrifusion"

    def __init__(self, *, warmup_steps: int = 1, sync_from_step: int | None = None, exact_own: bool = True) -> None:
        super().__init__(exact_own=exact_own)
        if warmup_steps < 1:
            raise ValueError(f"distrifusion: warmup_steps must be at least 1, got {warmup_steps}")
        if sync_from_step is not None and sync_from_step < 0:
            raise ValueError(f"distrifusion: sync_from_step must not be negative, got {sync_from_step}")
        self.warmup_steps = warmup_steps
        self.sync_from_step = sync_from_step
        self._sites: dict[Place, _Site] = {}

    @property
    def state_bytes(self) -> int:
        """Bytes of all places' buffers and of the messages under way."""
        messages = [site.message for site in self._sites.values() if site.message is not None]
        return sum(t.nbytes for t in [*messages, *(site.gathered for site in self._sites.values())])

    def keys_and_values(self, group: Any, place: Place, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        site, why = self._site(group, place, key)
        own = (group.rank(), key, value) if self.exact_own else None
        # Wait even for data that this step does not use: collectives must be waited for in the order of issue, and the
        # next gather writes the same buffer.
        site.settle()
        if why is not None:
            gather(group, site.gathered, key, value, async_op=False)
            site.issued = self.step
            self.counts[f"synchronous ({why})"] += 1
            return sequence(site.gathered, own)
        age = self.step - site.issued
        self.counts["one step stale" if age == 1 else "more than one step stale"] += 1
        joined = sequence(site.gathered, own)
        if self.step + 1 == self.timesteps():
            self.counts["not gathered (last step)"] += 1
            return joined
        site.work, site.message = gather(group, site.gathered, key, value, async_op=True)
        site.issued = self.step
        return joined

    def _site(self, group: Any, place: Place, key: Tensor) -> tuple[_Site, str | None]:
        """The state of a place, and why this step must be synchronous there; `None` where it need not."""
        site = self._sites.get(place)
        shape = (group.size(), 2, *key.shape)
        why = self._synchronous()
        if site is not None:
            now = site.gathered
            if (tuple(now.shape), now.dtype, now.device) == (shape, key.dtype, key.device):
                return site, why
            self._drain(place, site)
            why = "changed shape"
        elif why is None:
            why = "new place"
        self._sites[place] = site = _Site(empty_for(group, key))
        return site, why

    def _synchronous(self) -> str | None:
        if self.step < self.warmup_steps:
            return "warm-up"
        if self.sync_from_step is not None and self.step >= self.sync_from_step:
            return "last steps"
        count = self.timesteps()
        if count is not None and self.step >= count:
            return "past the last step"
        return None

    def forget(self) -> None:
        """Wait for the gathers under way, whose data no step will use, and drop all buffers."""
        sites, self._sites = self._sites, {}
        for place, site in sites.items():
            self._drain(place, site)

    def _drain(self, place: Place, site: _Site) -> None:
        """Wait for a gather whose data no step will use. Its error spoils no result: log and count it."""
        try:
            if site.settle():
                self.counts["drained"] += 1
        except Exception as error:
            self.counts["drained"] += 1
            self.counts["failed while drained"] += 1
            _log.warning("distrifusion: %s: a gather nobody uses any more failed: %s", place, error)
