"""What the buffers mean that yunchang sends: `LongContextAttention`, `UlyssesAttention` and every ring built on
`RingComm`, those of xfuser included.

While `LongContextSites` is installed, the traffic of the wrapped groups runs inside named call sites and its
layout is known. Letters: b batch, s tokens of one rank, h heads, d head dimension, n = 3 for packed Q, K, V; heads
and tokens as they are in one message.

| site | where                     | one message                      |
|------|---------------------------|----------------------------------|
| ring | RingComm.commit           | K, V (or whatever turns): b s h d |
| in   | all_to_all_4D, scatter 2  | s b h d                          |
| out  | all_to_all_4D, scatter 1  | h s b d                          |
| in   | all_to_all_5D, scatter 3  | s n b h d                        |
| out  | all_to_all_5D, scatter 1  | h s n b d                        |

`LongContextAttention` keeps the groups it finds when it is made: swap them before. The ring's K and V are encoded once,
by the rank they belong to; the others pass on the frames they receive.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

import compactdist

# Gives the linear attention of Sana other buffers to turn than keys and values by token.
_OTHER_RING = ("xfuser.core.long_ctx_attention.ring.ring_flash_attn", "xdit_sana_ring_flash_attn_forward")


def _turning(tensors: Iterable[Tensor]) -> list[compactdist.Layout]:
    """Layouts of keys and values, each `(B, S, H, D)`."""
    shapes = {tuple(tensor.shape) for tensor in tensors if tensor.dim() == 4}
    return [
        compactdist.Layout("(b s h d) -> 1 (b s) (h d)", **dict(zip("bshd", shape, strict=True))) for shape in shapes
    ]


def _exchanged(peers: int, x: Tensor, scatter_idx: int) -> compactdist.Layout:
    """Layout of one chunk of all_to_all_4D or 5D: `x` is `(B, S, H, D)` or `(B, S, 3, H, D)` before the exchange."""
    packed = x.dim() == 5
    b, s, *n, h, d = x.shape
    count = n[0] if packed else 1
    if scatter_idx == x.dim() - 2:  # heads go, tokens come
        pattern = "(s n b h d) -> n (b s) (h d)"
        return compactdist.Layout(pattern, s=s, n=count, b=b, h=h // peers, d=d)
    return compactdist.Layout("(h s n b d) -> n (b s) (h d)", h=h, s=s // peers, n=count, b=b, d=d)


class LongContextSites:
    """Names yunchang's call sites and knows the layouts of the messages under way.

    Args:
        groups: the wrapped groups, by any names; may be set later, before `install`.

    `layout_of` is meant to be passed to `compactdist.wrap(layouts=...)`; `install` and `remove` bracket the time in
    which it has answers.
    """

    def __init__(self, groups: dict[str, Any] | None = None) -> None:
        self.groups: dict[str, Any] = groups or {}
        self._current: list[compactdist.Layout] = []
        self._unknown = 0
        self._undo: list[Callable[[], None]] = []

    def layout_of(self, info: Any) -> compactdist.Layout | None:
        """The layout of the message described by `info`, or None where it is not one of the known ones."""
        fits = (layout for layout in self._current if math.prod(layout.sizes.values()) == info.numel)
        return next(fits, None)

    def install(self) -> None:
        """Wrap yunchang's functions. Raises RuntimeError when called twice."""
        from yunchang.comm import all_to_all
        from yunchang.ring.utils import RingComm

        if self._undo:
            raise RuntimeError("LongContextSites is installed already; call remove() first")
        for name in ("all_to_all_4D", "all_to_all_5D"):
            self._replace(all_to_all, name, self._exchange)
        self._replace(RingComm, "commit", self._commit)
        module, function = _OTHER_RING
        if hasattr(sys.modules.get(module), function):
            self._replace(sys.modules[module], function, self._without_layout)

    def remove(self) -> None:
        """Give yunchang its own functions back. Calling it again does nothing."""
        while self._undo:
            self._undo.pop()()

    def _replace(self, owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        original = getattr(owner, name, None)
        if original is not None:
            setattr(owner, name, functools.wraps(original)(wrap(original)))
            self._undo.append(functools.partial(setattr, owner, name, original))

    @contextmanager
    def _site(self, group: Any, name: str, layouts: list[compactdist.Layout]) -> Iterator[None]:
        before, self._current = self._current, layouts
        try:
            with group.key(name):
                yield
        finally:
            self._current = before

    def _is_ours(self, group: Any) -> bool:
        return any(group is ours for ours in self.groups.values())

    def _exchange(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        default = 2 if original.__name__.endswith("4D") else 3

        def call(
            input: Tensor, scatter_idx: int = default, gather_idx: int = 1, group: Any = None, use_sync: bool = False
        ) -> Tensor:
            if not self._is_ours(group):
                return original(input, scatter_idx, gather_idx, group=group, use_sync=use_sync)
            site = "out" if scatter_idx == 1 else "in"
            with self._site(group, site, [_exchanged(group.size(), input, scatter_idx)]):
                return original(input, scatter_idx, gather_idx, group=group, use_sync=use_sync)

        return call

    def _commit(self, original: Callable[[Any], None]) -> Callable[[Any], None]:
        def commit(comm: Any) -> None:
            if not self._is_ours(comm._process_group):
                return original(comm)
            layouts = [] if self._unknown else _turning(op.tensor for op in comm._ops)
            with self._site(comm._process_group, "ring", layouts):
                return original(comm)

        return commit

    def _without_layout(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._unknown += 1
            try:
                return original(*args, **kwargs)
            finally:
                self._unknown -= 1

        return call
