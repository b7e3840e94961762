"""Do all ranks hold what they should? One small all-gather on the inner group; names only where something differs."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from compactdist import _torch
from compactdist.errors import StateMismatchError
from compactdist.exchange.engine import Engine
from compactdist.exchange.link import Link
from compactdist.exchange.work import drain
from compactdist.state.digest import held_between, pair_digests

__all__ = ["check", "differing_pairs"]

_SHOWN = 8
_TIMEOUT = timedelta(seconds=60)


def check(engine: Engine, inner: Any, store: Any, turn: int) -> bool:
    """Compare what both ends of every stream hold.

    Args:
        engine: engine of the group.
        inner: the inner group.
        store: where ranks look up each other's sites if something differs.
        turn: how many comparisons of this group have found a difference; the same on all ranks.

    Returns:
        Whether this one has, in streams of which only one end has the history.

    Raises:
        StateMismatchError: on every rank, if the ends of some stream differ.
    """
    sites = engine.store.sites()
    for site in sites:
        drain(site)
        site.changes.read()
    if engine.store.offload is not None:
        engine.store.offload.wait()  # what lies in host memory is read there
    me, size, device = engine.rank, engine.size, _torch.device_for_small_messages(inner)
    digests = [*pair_digests(sites, me, size, sends=True), *pair_digests(sites, me, size, sends=False)]
    mine = torch.tensor([_signed(digest) for digest in digests], device=device)
    everyones = torch.empty(size * mine.numel(), dtype=torch.int64, device=device)
    Link(inner).all_gather(everyones, mine, None).wait()
    pairs = differing_pairs(everyones.view(size, 2, size))
    lines = _differing(engine, store, turn, pairs)
    if lines:
        raise StateMismatchError(
            f"{engine.label}: both ends of a stream must hold the same, and some do not:\n  "
            + "\n  ".join(lines)
            + "\nEqual counts mean that frames or histories differ. Call reset() on all ranks to start again from "
            "keyframes; make the same calls on all ranks, and check() where no message is on its way"
        )
    return bool(pairs)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def differing_pairs(digests: Tensor) -> list[tuple[int, int]]:
    """Directed pairs of ranks whose ends differ; ``digests``: ``(rank, sends or receives, peer)``."""
    sent, received = digests[:, 0], digests[:, 1].t()
    return [(int(i), int(j)) for i, j in (sent != received).nonzero()]


def _differing(engine: Engine, store: Any, turn: int, pairs: list[tuple[int, int]]) -> list[str]:
    """Which sites differ between those ranks, in words."""
    me, sites, lines = engine.rank, engine.store.sites(), []
    # two slots in turn: whoever comes to a slot again has read everyone's posts in the other one
    here = f"compactdist/check/{turn % 2}"
    for source, target in pairs:
        if me in (source, target):
            peer = target if me == source else source
            held = {one.site: one[1:] for one in held_between(sites, me, peer, sends=me == source)}
            store.set(f"{here}/{source}>{target}/{me}", json.dumps([turn, held]))
    for source, target in pairs:
        ends = [_posted(store, f"{here}/{source}>{target}/{rank}", turn) for rank in (source, target)]
        differing = [key for key in sorted({*ends[0], *ends[1]}) if _differ(*(end.get(key) for end in ends))]
        for key in differing[:_SHOWN]:
            sent, got = (end.get(key, [0])[0] for end in ends)
            lines.append(f"site '{key}': rank {source} has sent {sent} frames, rank {target} has applied {got}")
        if len(differing) > _SHOWN:
            lines.append(f"and {len(differing) - _SHOWN} more sites between ranks {source} and {target}")
    return lines


def _differ(sends: list[Any] | None, receives: list[Any] | None) -> bool:
    """Whether two ends hold what they should not; as ``Held``, without the site."""
    if sends is None or receives is None:
        return True
    frames, digest, of_frames, elsewhere = sends
    return [frames, of_frames] != [receives[0], receives[2]] or (not elsewhere and digest != receives[1])


def _posted(store: Any, key: str, turn: int) -> dict[str, list[int]]:
    """What a rank posted in this turn; its post of an earlier turn may still be there."""
    while True:
        store.wait([key], _TIMEOUT)
        posted, held = json.loads(store.get(key).decode())
        if posted == turn:
            return dict(held)
