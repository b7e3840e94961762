"""What `enable` returns, in every adapter."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

import compactdist
from compactdist_common.patches import Patches

if TYPE_CHECKING:
    from typing_extensions import Self


class Handle:
    """The wrapped groups of one pipeline, what they sent, and the way back. Also a context manager.

    Args:
        groups: returns the wrapped groups by name; called at every use, for an adapter may wrap groups later.
        patches: every change that the adapter made for this pipeline.
    """

    def __init__(self, groups: Callable[[], dict[str, Any]], patches: Patches) -> None:
        self._groups = groups
        self._patches = patches

    @property
    def groups(self) -> dict[str, Any]:
        """The wrapped groups by name; after `disable()` those of the time before."""
        return self._groups()

    def stats(self, *, wait: bool = True) -> dict[str, compactdist.Stats]:
        """The statistics of every wrapped group, by its name; ``wait`` as for a group's ``stats``."""
        return {name: group.stats(wait=wait) for name, group in self.groups.items()}

    def explain(self, *, wait: bool = True) -> str:
        """A table for every wrapped group: what it sent at each call site; ``wait`` as for a group's ``stats``."""
        return "\n\n".join(f"{name}\n{group.explain(wait=wait)}" for name, group in self.groups.items())

    def disable(self) -> None:
        """Give the framework its own groups and functions back. Calling it again does nothing.

        Raises:
            compactdist.CompactDistError: what closing a group raises, once all is given back.
        """
        self._patches.undo()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disable()
