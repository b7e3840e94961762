"""Names and layouts of the messages of yunchang: `LongContextAttention`, `UlyssesAttention`, and every ring built on
`RingComm`, among them xfuser's.

While `LongContextSites` is installed, the traffic of the wrapped groups runs inside named call sites. Letters: b batch,
s tokens of one rank, h heads, d head dimension, n = 3 for packed Q, K, V; heads and tokens as one message holds them.

| site | where                     | one message                              |
|------|---------------------------|------------------------------------------|
| ring | RingComm.commit           | K or V, b s h d; Sana's have no layout   |
| in   | all_to_all_4D, scatter 2  | s b h d                                  |
| out  | all_to_all_4D, scatter 1  | h s b d                                  |
| in   | all_to_all_5D, scatter 3  | s n b h d                                |
| out  | all_to_all_5D, scatter 1  | h s n b d                                |

`LongContextAttention` keeps the groups that it finds when it is built: wrap them before. The rank that K and V belong
to encodes them once; the other ranks of a ring forward the frames they receive.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from compactdist_common import CallSites, Expected, Patches, any_of, expect

# Sana's linear attention sends other tensors through RingComm than keys and values by token.
_SANA_MODULE = "xfuser.core.long_ctx_attention.ring.ring_flash_attn"
_SANA_FUNCTION = "xdit_sana_ring_flash_attn_forward"


def _turning(tensors: Iterable[Tensor]) -> Expected:
    """Keys and values that turn in a ring, each `(B, S, H, D)`."""
    shapes = {tuple(tensor.shape) for tensor in tensors if tensor.dim() == 4}
    return any_of(*(expect("b s h d", *shape) for shape in shapes))


def _exchanged(peers: int, x: Tensor, scatter_idx: int) -> Expected:
    """One chunk of all_to_all_4D or 5D: `x` is `(B, S, H, D)` or `(B, S, 3, H, D)` before the exchange."""
    b, s, *packed, h, d = x.shape
    n = packed[0] if packed else 1
    if scatter_idx == x.dim() - 2:  # every rank gives heads and gets tokens
        return expect("s n b h d", s, n, b, h // peers, d)
    return expect("h s n b d", h, s // peers, n, b, d)


class LongContextSites(CallSites):
    """Names yunchang's call sites between `install()` and `remove()`, and knows the layouts of their messages.

    Args:
        groups: the wrapped groups, by any names; may be set later, before `install`.
    """

    def __init__(self, groups: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.groups: dict[str, Any] = groups or {}
        self._in_sana = 0
        self._patches = Patches()

    def install(self) -> None:
        """Wrap yunchang's functions. Raises RuntimeError when called twice."""
        from yunchang.comm import all_to_all
        from yunchang.ring.utils import RingComm

        if self._patches:
            raise RuntimeError("LongContextSites is installed already; call remove() first")
        for name in ("all_to_all_4D", "all_to_all_5D"):
            if hasattr(all_to_all, name):
                self._patches.wrap(all_to_all, name, self._exchange)
        if hasattr(RingComm, "commit"):
            self._patches.wrap(RingComm, "commit", self._commit)
        sana = sys.modules.get(_SANA_MODULE)
        if hasattr(sana, _SANA_FUNCTION):
            self._patches.wrap(sana, _SANA_FUNCTION, self._without_layout)

    def remove(self) -> None:
        """Give yunchang its own functions back. Calling it again does nothing."""
        self._patches.undo()

    def _is_ours(self, group: Any) -> bool:
        return any(group is ours for ours in self.groups.values())

    def _exchange(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        default = 2 if original.__name__.endswith("4D") else 3

        def call(
            input: Tensor, scatter_idx: int = default, gather_idx: int = 1, group: Any = None, use_sync: bool = False
        ) -> Tensor:
            if not self._is_ours(group):
                return original(input, scatter_idx, gather_idx, group=group, use_sync=use_sync)
            with self.site(group, "out" if scatter_idx == 1 else "in", _exchanged(group.size(), input, scatter_idx)):
                return original(input, scatter_idx, gather_idx, group=group, use_sync=use_sync)

        return call

    def _commit(self, original: Callable[[Any], None]) -> Callable[[Any], None]:
        def commit(comm: Any) -> None:
            group = comm._process_group
            if not self._is_ours(group):
                return original(comm)
            tensors = () if self._in_sana else (op.tensor for op in comm._ops)
            with self.site(group, "ring", _turning(tensors)):
                return original(comm)

        return commit

    def _without_layout(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._in_sana += 1
            try:
                return original(*args, **kwargs)
            finally:
                self._in_sana -= 1

        return call
