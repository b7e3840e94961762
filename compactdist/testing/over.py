"""What inner groups for tests share: a registered ProcessGroup over a real one, whose calls all come to one method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from compactdist import _torch
from compactdist.errors import ConfigError
from compactdist.group.identity import OwnName

__all__ = ["METHODS", "GroupOver", "forwarding", "remove"]

METHODS: dict[str, tuple[str, int | None]] = {
    "allgather": ("all_gather", 1),
    "all_gather_single": ("all_gather", 1),
    "_allgather_base": ("all_gather", 1),
    "allgather_coalesced": ("all_gather", 1),
    "all_gather_single_coalesced": ("all_gather", 1),
    "allgather_into_tensor_coalesced": ("all_gather", 1),
    "alltoall": ("all_to_all", 1),
    "all_to_all_single": ("all_to_all", 1),
    "alltoall_base": ("all_to_all", 1),
    "broadcast": ("broadcast", 0),
    "allreduce": ("all_reduce", None),
    "allreduce_coalesced": ("all_reduce", None),
    "reduce": ("reduce", None),
    "reduce_scatter": ("reduce_scatter", 1),
    "reduce_scatter_single": ("reduce_scatter", 1),
    "_reduce_scatter_base": ("reduce_scatter", 1),
    "reduce_scatter_single_coalesced": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", 1),
    "gather": ("gather", 1),
    "scatter": ("scatter", 1),
    "barrier": ("barrier", None),
    "send": ("send", 0),
    "recv": ("recv", None),
    "recv_anysource": ("recv", None),
}
"""Methods of ProcessGroup, with their operation and the index of the argument that is sent; None: no argument may be
replaced by a copy, since the call also writes to it. What is written to is argument 0, except in send and barrier."""

OverT = TypeVar("OverT", bound="GroupOver")


def forwarding(cls: type[OverT]) -> type[OverT]:
    """Give the class every method of this torch's ProcessGroup that METHODS names; names differ between versions."""

    def forwarded(name: str) -> Callable[..., Any]:
        def method(self: OverT, *args: Any, **kwargs: Any) -> Any:
            return self._call(name, list(args), kwargs)

        method.__name__ = name
        opaque: Callable[..., Any] = _torch.opaque(method)
        return opaque

    for name in METHODS:
        if hasattr(dist.ProcessGroup, name):
            setattr(cls, name, forwarded(name))
    return cls


class GroupOver(OwnName, dist.ProcessGroup):  # type: ignore[override]
    """A registered ProcessGroup over a real one.

    Args:
        inner: the real group, which torch.distributed knows.
        name: of this group, equal on all ranks.

    Attributes:
        inner: the real group.

    Raises:
        ConfigError: torch.distributed does not know ``inner``.
    """

    def __init__(self, inner: Any, name: str) -> None:
        if not _torch.is_registered(inner):
            raise ConfigError("an inner group for tests is made over a group that torch.distributed knows")
        super().__init__(inner.rank(), inner.size())  # type: ignore[call-arg]
        self.inner = inner
        self._name = name
        self._desc = "compactdist.testing"
        self._backend_name = str(inner.name())
        _torch.register(self, inner, name)

    def _call(self, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Every call: ``name`` is the method's."""
        raise NotImplementedError

    @property
    def exact_sizes(self) -> bool:
        """Whether messages must be received at the size they are sent with: as the inner group says."""
        return bool(getattr(self.inner, "exact_sizes", False))

    @property
    def supports_coalescing(self) -> bool:
        """Whether several calls can be grouped: as the inner group says."""
        return bool(getattr(self.inner, "supports_coalescing", False))

    def start_coalescing(self, device: torch.device) -> None:
        """Begin a group of calls, where the inner group can."""
        _torch.inner_call(self.inner, _torch.START_COALESCING, device)

    def end_coalescing(self, device: torch.device) -> Any:
        """End a group of calls; returns its work."""
        return _torch.inner_call(self.inner, _torch.END_COALESCING, device)

    def _start_coalescing(self, device: torch.device) -> None:
        self.start_coalescing(device)

    def _end_coalescing(self, device: torch.device) -> Any:
        return self.end_coalescing(device)

    def monitored_barrier(self, *args: Any, **kwargs: Any) -> None:
        """The inner group's, as it is."""
        self.inner.monitored_barrier(*args, **kwargs)

    def stop(self) -> None:
        """End what runs beside the caller; called by :func:`remove`."""


def remove(group: GroupOver) -> Any:
    """Take the group out of torch.distributed's registry; returns the inner group, which stays as it was."""
    _torch.unregister(group)
    group.stop()
    return group.inner
