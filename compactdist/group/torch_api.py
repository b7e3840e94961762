"""torch.distributed's functions as methods of the wrapped group.

Code written against ``import torch.distributed as dist`` runs with ``dist = compactdist.wrap()`` in its place. Public
names of torch.distributed that the group does not define itself resolve to torch.distributed's, with ``group=None``
meaning this group. Where ProcessGroup has a method of the same name, a Tensor as first argument means
torch.distributed's function (global ranks, ``None`` unless ``async_op``), a list or an Options object ProcessGroup's.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from compactdist import _torch
from compactdist.errors import ConfigError

__all__ = ["TorchDistributedAPI", "shared_name"]


_PG_KEYWORDS = {"tensors", "output_tensors", "input_tensors", "outputTensor", "inputTensor", "opts", "device"}
# timedelta: monitored_barrier(timeout, ...); a list, too: split_group([ranks]); device: get_backend(device)
_PG_FIRST = (list, tuple, timedelta, torch.device)


def _means_process_group(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    for value in (*args, *kwargs.values()):
        if type(value).__name__.endswith("Options"):
            return True
    if not args:
        return bool(_PG_KEYWORDS & kwargs.keys())
    return isinstance(args[0], _PG_FIRST)


def shared_name(method: Callable[..., Any], name: str | None = None) -> Any:
    """Wrap a ProcessGroup method whose name torch.distributed has too: the arguments decide which of both is called.

    Dynamo does not trace into the result, nor into any other method that torch calls.

    Args:
        method: the ProcessGroup method.
        name: name of torch.distributed's function; ``None``: the method's name.
    """
    shared = name or method.__name__

    @functools.wraps(method)
    def choose(self: Any, *args: Any, **kwargs: Any) -> Any:
        callback = _torch.set_eval_frame(None)
        try:
            # torch's own calls end in an options object; the first test is for them
            if (args and type(args[-1]).__name__.endswith("Options")) or _means_process_group(args, kwargs):
                return method(self, *args, **kwargs)
            return self._torch_function(shared)(*args, **kwargs)
        finally:
            _torch.set_eval_frame(callback)

    return _torch.mark_opaque(choose)


class TorchDistributedAPI:
    """The part of a wrapped group that looks like the ``torch.distributed`` module."""

    inner: Any

    def _resolve_group(self, group: Any) -> Any:
        """``None`` and the group that was wrapped mean this group, which must not be closed."""
        if group is None or group is self.inner or group is self:
            self._ready()
            return self
        return group

    def _ready(self) -> None:
        raise AssertionError("provided by the group")

    def _torch_function(self, name: str) -> Callable[..., Any]:
        """torch.distributed's function with this group as the default for ``group``."""
        function = _torch.public_function(name)
        signature = inspect.signature(function)

        @functools.wraps(function)
        def bound(*args: Any, **kwargs: Any) -> Any:
            arguments = signature.bind(*args, **kwargs)
            arguments.arguments["group"] = self._resolve_group(arguments.arguments.get("group"))
            return function(*arguments.args, **arguments.kwargs)

        return bound

    def __getattr__(self, name: str) -> Any:
        hidden = name.startswith("_") or (name in _torch.PROBED_NAMES and _torch.asked_by_torch())
        if hidden or name not in _torch.PUBLIC_NAMES or not hasattr(dist, name):
            raise AttributeError(
                f"{type(self).__name__} has no attribute '{name}'; it carries ProcessGroup's methods, its own, and the "
                "public names of torch.distributed"
            )
        value = getattr(dist, name)
        if inspect.isfunction(value) and "group" in inspect.signature(value).parameters:
            return self._torch_function(name)
        return value

    def all_gather(self, tensor_list: list[Tensor], tensor: Tensor, group: Any = None, async_op: bool = False) -> Any:
        """torch.distributed.all_gather on this group."""
        return dist.all_gather(tensor_list, tensor, group=self._resolve_group(group), async_op=async_op)

    def all_gather_into_tensor(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any = None, async_op: bool = False
    ) -> Any:
        """torch.distributed.all_gather_into_tensor on this group: ``[N, ...]`` per rank to ``[world * N, ...]``."""
        group = self if group is None else self._resolve_group(group)
        if group is self and self._calls_method(output_tensor, input_tensor):
            opts = _torch.AllgatherOptions()
            opts.asyncOp = async_op
            work = self.all_gather_single(output_tensor, input_tensor, opts)
            if async_op:
                return work
            if work is not None:
                work.wait()
            return None
        # torch 2.13 renamed it and warns at the old name; not by public_function, which costs a Python call
        function = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        return function(output_tensor, input_tensor, group=group, async_op=async_op)

    def _calls_method(self, output: Any, x: Any) -> bool:
        """Whether torch.distributed's function would do nothing but call this group's method, after six Python calls.

        It does more for other things than real tensors, inside a coalescing manager, under a torch function mode such
        as export's, and while Dynamo traces.
        """
        return not (
            torch.compiler.is_dynamo_compiling()
            or not type(output) is type(x) is Tensor
            or output.is_complex()
            or x.is_complex()
            or _torch.has_torch_function(x)
            or self in _torch.coalescing
        )

    def all_to_all(
        self,
        output_tensor_list: list[Tensor],
        input_tensor_list: list[Tensor],
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        """torch.distributed.all_to_all on this group."""
        return dist.all_to_all(
            output_tensor_list, input_tensor_list, group=self._resolve_group(group), async_op=async_op
        )

    def all_reduce(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        """torch.distributed.all_reduce on this group (passes through)."""
        return self._torch_function("all_reduce")(tensor, *args, **kwargs)

    def isend(
        self, tensor: Tensor, dst: int | None = None, group: Any = None, tag: int = 0, group_dst: int | None = None
    ) -> Any:
        """torch.distributed.isend on this group; ``dst`` is a global rank."""
        return dist.isend(tensor, dst, group=self._resolve_group(group), tag=tag, group_dst=group_dst)

    def irecv(
        self, tensor: Tensor, src: int | None = None, group: Any = None, tag: int = 0, group_src: int | None = None
    ) -> Any:
        """torch.distributed.irecv on this group; ``src`` is a global rank, ``None`` any source."""
        return dist.irecv(tensor, src, group=self._resolve_group(group), tag=tag, group_src=group_src)

    @functools.cached_property
    def P2POp(self) -> Any:
        """torch.distributed.P2POp for this group: takes this group's ``isend`` and ``irecv`` as well as torch's."""
        own = self

        def plain(op: Any) -> Any:
            if getattr(op, "__self__", None) is own:
                return getattr(dist, op.__name__, op)
            return op

        class P2POp(dist.P2POp):
            def __new__(cls, op: Any, *args: Any, **kwargs: Any) -> Any:
                return super().__new__(cls, plain(op), *args, **kwargs)

            def __init__(
                self,
                op: Any,
                tensor: Tensor,
                peer: int | None = None,
                group: Any = None,
                tag: int = 0,
                group_peer: int | None = None,
            ) -> None:
                super().__init__(plain(op), tensor, peer, own._resolve_group(group), tag, group_peer)

        return P2POp

    def batch_isend_irecv(self, p2p_op_list: list[Any]) -> list[Any]:
        """torch.distributed.batch_isend_irecv: receives are posted first; a backend that groups calls gets one group.

        Returns:
            One work per operation, in the batch's order; a single work where the backend groups the batch.

        Raises:
            ConfigError: an operation belongs to another group.
        """
        _torch.check_p2p_op_list(p2p_op_list)
        if any(self._resolve_group(op.group) is not self for op in p2p_op_list):
            raise ConfigError("batch_isend_irecv: an operation of the batch belongs to another group than this one")
        return self._batch(p2p_op_list)

    def _batch(self, p2p_op_list: list[Any]) -> list[Any]:
        raise AssertionError("provided by the group")
