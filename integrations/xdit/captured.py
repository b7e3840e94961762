"""Attention layers that keep the groups they were built with.

yunchang's `LongContextAttention` and the classes that xfuser derives from it (Sana's linear attention; Step-Video
builds one at every call) read the ring and the Ulysses group once, in their constructor. Wrapped groups in xfuser's own
places do not reach a layer that is already built. So the layers of a pipeline are found, and given the wrapped groups
as well.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import compactdist
from compactdist_common import Patches

_log = logging.getLogger("compactdist")

_KEPT = {"ring_pg": "ring", "ulysses_pg": "ulysses"}  # attribute of a layer: route


def _attributes(thing: Any) -> dict[str, Any]:
    return getattr(thing, "__dict__", {})


def holders(modules: Iterable[Any]) -> list[Any]:
    """The objects that keep both groups: modules, their attributes (processors), and the attributes of those."""
    found: dict[int, Any] = {}
    for module in modules:
        near = list(_attributes(module).values())
        for thing in (module, *near, *(far for one in near for far in _attributes(one).values())):
            if _KEPT.keys() <= _attributes(thing).keys():
                found[id(thing)] = thing
    return list(found.values())


class Captured:
    """Gives layers the wrapped groups in place of the plain ones they keep, between `install()` and `remove()`."""

    def __init__(self) -> None:
        self._patches = Patches()
        self._warned = False

    def install(self, layers: Iterable[Any], groups: dict[str, Any]) -> None:
        """Replace the groups of layers.

        Args:
            layers: found by `holders`.
            groups: wrapped group by route; layers keep their plain group of a route that is missing.
        """
        for layer in layers:
            for attribute, route in _KEPT.items():
                held, wrapped = getattr(layer, attribute), groups.get(route)
                if isinstance(held, compactdist.CompressedProcessGroup):
                    held = held.inner  # built while another session's groups were in place
                if wrapped is None or held is None or held.size() < 2:
                    continue
                if held is wrapped.inner:
                    setattr(layer, attribute, held)  # which `remove` gives back
                    self._patches.replace(layer, attribute, wrapped)
                elif not self._warned:
                    self._warned = True
                    _log.warning(
                        "%s keeps a %s group that xfuser has replaced since: its messages are not compressed; build "
                        "the pipeline after its groups",
                        type(layer).__name__,
                        route,
                    )

    def remove(self) -> None:
        """Give the layers their plain groups back. Calling it again does nothing."""
        self._patches.undo()
