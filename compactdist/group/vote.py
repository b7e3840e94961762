"""All ranks answer one question the same: a vote of one byte for each rank, on a plain group.

Code that may skip calls decides by its own data, and ranks hold different data. A vote makes one decision of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from compactdist import _torch
from compactdist.errors import ConfigError
from compactdist.exchange.link import Link

__all__ = ["vote"]

_COUNTS: dict[str, Callable[[int, int], bool]] = {  # (ranks that say yes, ranks) -> decision
    "all": lambda yes, ranks: yes == ranks,
    "any": lambda yes, ranks: yes > 0,
    "majority": lambda yes, ranks: 2 * yes > ranks,
}


def vote(group: Any, flag: bool, how: str = "all") -> bool:
    """Whether ``"all"`` ranks say yes, ``"any"`` does, or a ``"majority"`` (more than half). Collective.

    The host waits for the answer.

    Args:
        group: a plain group; for a wrapped one call its ``agree``.
        flag: what this rank says.
        how: how votes are counted; the same on all ranks.

    Raises:
        ConfigError: another ``how``; nothing was sent.
        The inner group's error, where a rank does not vote within the group's timeout.
    """
    decide = _COUNTS.get(how)
    if decide is None:
        raise ConfigError(f"agree: how is one of {', '.join(map(repr, _COUNTS))}, got {how!r}")
    ranks, device = group.size(), _torch.device_for_small_messages(group)
    mine = torch.tensor([bool(flag)], dtype=torch.uint8, device=device)
    votes = torch.empty(ranks, dtype=torch.uint8, device=device)
    Link(group).all_gather(votes, mine, None).wait()
    return decide(int(votes.count_nonzero()), ranks)
