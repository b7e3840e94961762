"""Attention layers that keep the groups they were built with.

`LongContextAttention` of yunchang, and what xfuser derives from it (Sana's linear attention; Step-Video builds one at
every call), read the ring and Ulysses group once, in their constructor. Swapping the groups where xfuser keeps them
does not reach a layer that stands, so the layers of a pipeline are found and given the wrapped groups as well.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import compactdist

_log = logging.getLogger("compactdist")

_KEPT = {"ring_pg": "ring", "ulysses_pg": "ulysses"}


def _attributes(thing: Any) -> dict[str, Any]:
    return getattr(thing, "__dict__", {})


def holders(modules: Iterable[Any]) -> list[Any]:
    """Objects with groups of their own among modules, their attributes (processors), and the attributes of those."""
    found: dict[int, Any] = {}
    for module in modules:
        near = list(_attributes(module).values())
        for thing in (module, *near, *(far for one in near for far in _attributes(one).values())):
            if _KEPT.keys() <= _attributes(thing).keys():
                found[id(thing)] = thing
    return list(found.values())


class Captured:
    """Gives layers the wrapped groups in place of the plain ones they keep, and takes them back."""

    def __init__(self) -> None:
        self._swapped: list[tuple[Any, str, Any]] = []
        self._warned = False

    def install(self, layers: Iterable[Any], groups: dict[str, Any]) -> None:
        """Swap.

        Args:
            layers: what `holders` found.
            groups: wrapped group by route; a route that is missing is left alone.
        """
        for layer in layers:
            for attribute, route in _KEPT.items():
                held, wrapped = getattr(layer, attribute), groups.get(route)
                if isinstance(held, compactdist.CompressedProcessGroup):
                    held = held.inner  # built while another session's groups were in place
                if wrapped is None or held is None or held.size() < 2:
                    continue
                if held is wrapped.inner:
                    self._swapped.append((layer, attribute, held))
                    setattr(layer, attribute, wrapped)
                elif not self._warned:
                    self._warned = True
                    _log.warning(
                        "%s keeps a %s group that xfuser has replaced since: what it sends is not compressed; build "
                        "the pipeline after its groups",
                        type(layer).__name__,
                        route,
                    )

    def remove(self) -> None:
        """Give the layers back what they kept. Calling it again does nothing."""
        while self._swapped:
            layer, attribute, held = self._swapped.pop()
            setattr(layer, attribute, held)
