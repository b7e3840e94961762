"""The latest epoch that a rank is in, for ranks that made different numbers of resets.

Nobody waits for it. A rank that meets such a difference writes its epoch to the store, and each ``reset()`` looks
there: what ranks write before they reset brings all of them to the same epoch.
"""

from __future__ import annotations

import contextlib
from typing import Any

__all__ = ["LatestEpoch"]

_NOBODY, _TRIES = "nobody", 100


class LatestEpoch:
    """The latest epoch that some rank has told of.

    Args:
        store: the group's store; ``None``: there is nobody to tell.
        name: of the group, equal on all ranks.
    """

    def __init__(self, store: Any, name: str) -> None:
        self._store = store
        self._key = f"compactdist/epoch/{name}"
        self._told = False

    def tell(self, epoch: int) -> None:
        """Let other ranks know that a rank is in this epoch. A store that is gone is left alone."""
        if self._store is None:
            return
        self._told = True
        with contextlib.suppress(RuntimeError):
            for _ in range(_TRIES):  # others tell, too, and a group that is closed removes what it told
                known = self.read()
                if known >= epoch:
                    return
                self._store.compare_set(self._key, str(known) if known else "", str(epoch))

    def read(self) -> int:
        """The latest epoch told of; 0: nobody told of any."""
        if self._store is None:
            return 0
        with contextlib.suppress(RuntimeError):
            # not get(), which would wait for a key that another rank has just removed
            found = self._store.compare_set(self._key, _NOBODY, _NOBODY).decode()
            return int(found) if found.isdecimal() else 0
        return 0

    def forget(self) -> None:
        """Remove what was told, if this rank told it."""
        if self._told:
            with contextlib.suppress(RuntimeError):
                self._store.delete_key(self._key)
