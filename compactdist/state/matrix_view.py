"""How a flat buffer becomes a (groups, rows, channels) matrix before a codec sees it.

Frameworks send flat buffers: K behind V, heads interleaved with tokens. Scales per token and per channel only help when
the codec sees tokens as rows and channels as columns. A :class:`Layout` is the hint that a user or an adapter gives; a
:class:`MatrixView` is the matrix that a hint or a search yields for a number of elements. Both ends of a stream must
use the same matrix view: a hint is part of the group's configuration, a found view is announced in the frame before
the first that uses it.
"""

from __future__ import annotations

import math
import re
import zlib

from compactdist.errors import LayoutError
from compactdist.kernels.spec import MatrixView

__all__ = ["MatrixView", "Layout", "blocks", "plain"]

_BLOCK = 128


def blocks(numel: int) -> MatrixView:
    """The matrix view used until a better one is known: rows of 128 consecutive elements, one group."""
    channels = min(numel, _BLOCK) or 1
    return MatrixView(numel, 1, max(1, math.ceil(numel / channels)), channels)


def plain(numel: int, groups: int, channels: int) -> MatrixView:
    """A found matrix view: consecutive groups of consecutive rows.

    Raises:
        LayoutError: ``numel`` does not divide by ``groups * channels``.
    """
    if groups < 1 or channels < 1 or numel % (groups * channels):
        raise LayoutError(f"{numel} elements are not {groups} groups of rows of {channels} channels")
    return MatrixView(numel, groups, numel // (groups * channels), channels)


def _axes_of(text: str, pattern: str) -> list[str]:
    names = re.findall(r"[A-Za-z_]\w*", text)
    if re.sub(r"[A-Za-z_]\w*|\s", "", text):
        raise LayoutError(f"layout pattern {pattern!r}: {text.strip()!r} may hold axis names only")
    return names


class Layout:
    """A layout hint in einops' notation: what the axes of a flat buffer are, and which are tokens and channels.

    >>> Layout("(kv b h s d) -> kv (b s) (h d)", kv=2, b=1, h=4, d=32).resolve(2 * 4 * 34 * 32).shape
    (2, 34, 128)

    Args:
        pattern: left side, the axes of the buffer in memory order, in parentheses; right side, three terms: groups,
            rows (tokens) and channels, each an axis, a parenthesised list of axes, or ``1`` for none. Every axis
            appears once on each side.
        sizes: axis sizes. At most one may be left out; it follows from the number of elements.

    Raises:
        LayoutError: the pattern is malformed, a size is missing, unknown or not positive.
    """

    def __init__(self, pattern: str, **sizes: int) -> None:
        left, arrow, right = pattern.partition("->")
        if not arrow:
            raise LayoutError(f"layout pattern {pattern!r} has no '->'")
        self.pattern = " ".join(pattern.split())
        self._left = _axes_of(left.strip().removeprefix("(").removesuffix(")"), pattern)
        terms = re.findall(r"\([^()]*\)|\S+", right)
        if len(terms) != 3:
            raise LayoutError(f"layout pattern {pattern!r}: the right side needs groups, rows and channels")
        self._terms = [[] if term == "1" else _axes_of(term.strip("()"), pattern) for term in terms]
        right_axes = [axis for term in self._terms for axis in term]
        if sorted(right_axes) != sorted(self._left) or len(set(self._left)) != len(self._left):
            raise LayoutError(f"layout pattern {pattern!r}: every axis must appear once on each side")
        unknown = sorted(set(sizes) - set(self._left))
        if unknown:
            raise LayoutError(f"layout pattern {pattern!r} has no axis {', '.join(unknown)}")
        bad = {name: size for name, size in sizes.items() if not isinstance(size, int) or size < 1}
        if bad:
            raise LayoutError(f"layout pattern {pattern!r}: sizes must be positive integers, got {bad}")
        self._free = [axis for axis in self._left if axis not in sizes]
        if len(self._free) > 1:
            raise LayoutError(f"layout pattern {pattern!r}: give a size for all of {self._free} but one")
        self.sizes = dict(sorted(sizes.items()))
        self.hint = zlib.crc32(repr(self).encode()) or 1

    def resolve(self, numel: int) -> MatrixView:
        """Make the hint concrete for a buffer of ``numel`` elements.

        Raises:
            LayoutError: the product of the sizes is not ``numel``, or does not divide it where a size is left out.
        """
        known = math.prod(self.sizes.values())
        sizes = dict(self.sizes)
        if self._free and known and numel % known == 0 and numel:
            sizes[self._free[0]] = numel // known
        elif self._free or known != numel:
            raise LayoutError(f"{self!r} does not describe a buffer of {numel} elements ({known} are accounted for)")
        axes = tuple(sizes[axis] for axis in self._left)
        order = tuple(self._left.index(axis) for term in self._terms for axis in term)
        groups, rows, channels = (math.prod(sizes[axis] for axis in term) for term in self._terms)
        if order == tuple(range(len(order))):
            return MatrixView(numel, groups, rows, channels, hint=self.hint)
        return MatrixView(numel, groups, rows, channels, axes, order, self.hint)

    def __repr__(self) -> str:
        sizes = "".join(f", {name}={size}" for name, size in self.sizes.items())
        return f"Layout({self.pattern!r}{sizes})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))
