"""The name and the layout of the message that a framework is about to send.

A process group sees flat one-dimensional tensors. The functions of a framework that call it see tensors with axes. So
an adapter wraps such a function: while it runs, `CallSites.site` names the call site and holds the layouts of the
messages that the function may send.

Tokens become rows and the features of all heads become channels: the features of one token differ much more in scale
from channel to channel than from token to token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import compactdist

Expected = Callable[[int], "compactdist.Layout | None"]
"""The layout of a message of so many elements, `None` where a message of this size was not expected."""


def expect(axes: str, *sizes: int) -> Expected:
    """A message whose axes are known.

    Args:
        axes: in the order of the flat message: `b` batch, `s` tokens, `h` heads, `d` head dimension, or `c` channels in
            place of heads; `n` counts tensors with scales of their own (keys and values). For instance `"n b h s d"`.
        sizes: of the axes; -1 for one that follows from the size of the message.
    """
    names = axes.split()
    known = math.prod(size for size in sizes if size >= 0)
    pattern = f"({axes}) -> {'n' if 'n' in names else 1} (b s) {'c' if 'c' in names else '(h d)'}"

    def layout_of(numel: int) -> compactdist.Layout | None:
        free = numel // known if known else 0
        resolved = [free if size < 0 else size for size in sizes]
        if math.prod(resolved) != numel:
            return None
        return compactdist.Layout(pattern, **dict(zip(names, resolved, strict=True)))

    return layout_of


def any_of(*expected: Expected) -> Expected:
    """One of several messages: the first whose size is that of the message sent."""

    def layout_of(numel: int) -> compactdist.Layout | None:
        layouts = (layout_of(numel) for layout_of in expected)
        return next((layout for layout in layouts if layout is not None), None)

    return layout_of


class CallSites:
    """Names call sites and answers for the layout of the message under way.

    Pass `layout_of` to `compactdist.wrap(layouts=...)`.
    """

    def __init__(self) -> None:
        self._expected: Expected = any_of()

    def layout_of(self, info: Any) -> compactdist.Layout | None:
        """The layout of the message that `info` describes, `None` where no open site expects it."""
        return self._expected(info.numel)

    @contextmanager
    def site(self, group: Any, name: str, expected: Expected) -> Iterator[None]:
        """Name the calls on a wrapped group, and expect its messages, until the end of the block."""
        before, self._expected = self._expected, expected
        try:
            with group.key(name):
                yield
        finally:
            self._expected = before
