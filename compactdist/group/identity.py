"""Who a group over another group is: a name and a description of its own, everything else the inner group's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

__all__ = ["OwnName"]


class OwnName:
    """The identity methods of a registered ProcessGroup over an inner one; stands before ``ProcessGroup`` in the bases.

    The C++ base's own answers are of no use: it holds no backend, or a backend that the inner group names.

    Attributes:
        inner: the inner group.
    """

    if TYPE_CHECKING:
        inner: Any
    _name: str
    _desc: str
    _backend_name: str

    @property
    def group_name(self) -> Any:
        """The name torch.distributed knows this group by; not the inner group's."""
        return self._name

    @property
    def group_desc(self) -> str:
        """Description."""
        return self._desc

    def getGroupName(self) -> str:
        """Same as ``group_name``."""
        return self._name

    def getGroupDesc(self) -> str:
        """Same as ``group_desc``."""
        return self._desc

    def setGroupName(self, name: str) -> None:
        """Rename this group, not the inner one."""
        self._name = name

    _set_group_name = setGroupName

    def setGroupDesc(self, desc: str) -> None:
        """Describe this group, not the inner one."""
        self._desc = desc

    _set_group_desc = setGroupDesc

    def getBackendName(self) -> str:
        """Name of the backend: the inner group's, unless this group was made by a backend name."""
        return self._backend_name

    name = _get_backend_name = getBackendName

    @property
    def _device_types(self) -> Any:
        """The inner group's devices."""
        return self.inner._device_types

    def _get_backend(self, device: torch.device) -> Any:
        """The inner group's backend for a device."""
        return self.inner._get_backend(device)

    def _get_sequence_number_for_group(self) -> int:
        """The inner group's sequence number."""
        return int(self.inner._get_sequence_number_for_group())

    def _set_sequence_number_for_group(self) -> None:
        """Set the inner group's sequence number."""
        self.inner._set_sequence_number_for_group()

    def get_group_store(self) -> Any:
        """The inner group's store."""
        return self.inner.get_group_store()

    @property
    def bound_device_id(self) -> Any:
        """The inner group's device."""
        return self.inner.bound_device_id

    def set_timeout(self, timeout: Any, group: Any = None) -> None:
        """Set the timeout of the inner group, or of ``group``, as torch.distributed's function of this name does."""
        (self.inner if group is None else group).set_timeout(timeout)
