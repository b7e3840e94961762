"""Ranks agree on a configuration through the store, before any byte travels on the group.

Each rank posts its fingerprint and reads those of the others. Two slots per group are written in turn: a rank that
comes to a slot again has read all posts in the other slot, so no rank reads the old posts of this one any more. A rank
that is wrapping another group which it shares with this rank will never come here: the order of wrapping is wrong, and
the error is raised at once, not after the timeout.
"""

from __future__ import annotations

import json
import time
from typing import Any

from compactdist.errors import ConfigMismatchError, WrapTimeoutError

__all__ = ["agree"]

_POLL_SECONDS = 0.01


def _get(store: Any, key: str) -> dict[str, Any] | None:
    if not store.check([key]):
        return None
    value: dict[str, Any] = json.loads(store.get(key).decode())
    return value


def _post(store: Any, key: str, turn: int) -> dict[str, Any] | None:
    """What a peer posted for this turn; ``None`` while the slot is empty or holds an earlier turn's post."""
    value = _get(store, key)
    return value if value is not None and value["turn"] == turn else None


def agree(
    store: Any,
    common_store: Any,
    group: str,
    rank: int,
    global_ranks: list[int],
    fingerprint: dict[str, str],
    timeout: float,
) -> int:
    """Compare ``fingerprint`` among the ranks of a group.

    Args:
        store: the group's own store.
        common_store: a store that all groups share; it says which group each rank is wrapping now.
        group: the group's name.
        rank: group rank of the caller.
        global_ranks: global ranks of the group, by group rank.
        fingerprint: names and values that must be equal on all ranks.
        timeout: seconds to wait for the other ranks.

    Returns:
        How many times this group has been wrapped, this time included: the same number on every rank.

    Raises:
        ConfigMismatchError: fingerprints differ, or ranks wrap groups in different orders.
        WrapTimeoutError: some ranks did not call in time.
    """
    me = global_ranks[rank]
    turn = int(store.add(f"compactdist/turns/{rank}", 1))
    here = f"compactdist/wrap/{turn % 2}"
    announcement = f"compactdist/wrapping/{me}"
    common_store.set(announcement, json.dumps({"group": group, "turn": turn, "ranks": global_ranks}))
    try:
        store.set(f"{here}/{rank}", json.dumps({"turn": turn, "fingerprint": fingerprint}))
        common_store.set(f"compactdist/posted/{me}/{group}", json.dumps({"turn": turn}))
        missing = set(range(len(global_ranks))) - {rank}
        deadline = time.monotonic() + timeout
        while True:
            for peer in sorted(missing):
                post = _post(store, f"{here}/{peer}", turn)
                if post is not None:
                    missing.discard(peer)
                    _compare(group, rank, peer, fingerprint, post["fingerprint"])
            if not missing:
                return turn
            word = _get(common_store, _misordered(group, turn))
            if word is not None:
                raise ConfigMismatchError(word["message"])
            for peer in sorted(missing):
                _check_order(store, common_store, here, turn, group, me, peer, global_ranks)
            if time.monotonic() > deadline:
                raise _too_late(group, rank, missing, timeout)
            time.sleep(_POLL_SECONDS)
    finally:
        common_store.set(announcement, json.dumps(None))


def _too_late(group: str, rank: int, missing: set[int], timeout: float) -> WrapTimeoutError:
    return WrapTimeoutError(
        f"group '{group}', rank {rank}: rank{'s' if len(missing) > 1 else ''} "
        f"{', '.join(map(str, sorted(missing)))} did not call wrap() within {timeout:g} s. wrap() is "
        "collective: call it on every rank of the group, in the same order for all groups"
    )


def _compare(group: str, rank: int, peer: int, mine: dict[str, str], theirs: dict[str, Any]) -> None:
    differing = [key for key in sorted({*mine, *theirs}) if mine.get(key) != theirs.get(key)]
    if differing:
        details = "; ".join(f"{key}: {mine.get(key)} here, {theirs.get(key)} on rank {peer}" for key in differing)
        remedy = ""
        if "state_budget_bytes" in differing:
            remedy = " (as state_budget_bytes, what the rank with the least memory can spare)"
            if "None" in (mine.get("state_budget_bytes"), theirs.get("state_budget_bytes")):
                remedy += (
                    ", and either all of them or none state_offload: a rank with it drops nothing, so None is said"
                )
        raise ConfigMismatchError(
            f"group '{group}': ranks {rank} and {peer} asked wrap() for different things ({details}). Give all ranks "
            f"the same options and versions{remedy}; nothing was sent and the group is as it was"
        )


def _check_order(
    store: Any,
    common_store: Any,
    here: str,
    turn: int,
    group: str,
    me: int,
    peer: int,
    global_ranks: list[int],
) -> None:
    busy = _get(common_store, f"compactdist/wrapping/{global_ranks[peer]}")
    if not busy or busy["group"] == group or me not in busy["ranks"]:
        return
    posted = _get(common_store, f"compactdist/posted/{me}/{busy['group']}")
    if posted and posted["turn"] >= busy["turn"]:
        return  # the peer is only still reading what we posted there
    if _post(store, f"{here}/{peer}", turn) is not None:
        return  # the peer posted here after it was last looked for
    message = (
        f"rank {me} wraps group '{group}' while rank {global_ranks[peer]} wraps group '{busy['group']}' "
        "(global ranks): wrap groups in the same order on every rank; nothing was sent"
    )
    # the peer waits for this rank there, and may look only after this rank has left: post the error for it
    common_store.set(_misordered(busy["group"], busy["turn"]), json.dumps({"message": message}))
    raise ConfigMismatchError(message)


def _misordered(group: str, turn: int) -> str:
    return f"compactdist/misordered/{group}/{turn}"
