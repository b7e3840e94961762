"""Every compressed operation by its name in the policy's terms; a new pattern is found here by itself."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from compactdist.exchange import patterns
from compactdist.exchange.patterns import point_to_point, reductions
from compactdist.exchange.patterns.base import Pattern

__all__ = ["patterns_by_op"]


def patterns_by_op() -> dict[str, type[Pattern]]:
    """The pattern of each operation; of point-to-point messages the sender's, as policies are asked about sends."""
    for module in iter_modules(patterns.__path__, f"{patterns.__name__}."):
        import_module(module.name)
    found: dict[str, type[Pattern]] = {
        point_to_point.Send.op: point_to_point.Send,
        reductions.AllReduce.op: reductions.AllReduce,
    }
    pending: list[Any] = [Pattern]
    while pending:
        kind = pending.pop(0)
        pending += kind.__subclasses__()
        if "op" in kind.__dict__:
            found.setdefault(kind.op, kind)
    return found
