"""Send, receive and batches of both, as ProcessGroup methods."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from compactdist import _torch
from compactdist.codecs import Codec
from compactdist.errors import ConfigError
from compactdist.exchange.context import Call
from compactdist.exchange.point_to_point import receive, send, stream_name
from compactdist.exchange.work import Job, WaitOnce
from compactdist.group.core import GroupCore, nbytes_of, override
from compactdist.group.torch_api import TorchDistributedAPI, shared_name
from compactdist.observe.stats import PassReason

__all__ = ["PointToPointMethods"]


class PointToPointMethods(GroupCore, TorchDistributedAPI):
    """ProcessGroup's point-to-point methods; ranks are group ranks."""

    def forwarding(self) -> AbstractContextManager[None]:
        """Promise that tensors received and sent again inside the block were not written to in between.

        On a CPU untouched tensors are recognised by their bytes, and this saves the comparison. Elsewhere nothing but
        this lets a tensor go on in the frame it arrived in. It counts for this thread and for tensors that are where
        they were received: same storage, offset, shape and strides. A broken promise sends what was received.

        Raises:
            ConfigError: the group was wrapped with ``forward=False``.
        """
        self._ready()
        if not self._ctx.forward:
            raise ConfigError(
                f"{self._ctx.label}: forwarding() in a group wrapped with forward=False; drop one of them"
            )
        return self._ctx.arrivals.trust()

    def _send_job(self, x: Tensor, peer: int, tag: int) -> Job | None:
        if not 0 <= peer < self._ctx.size:
            raise ValueError(f"{self._ctx.label}: send to group rank {peer} of a group of {self._ctx.size}")
        call = self._begin("send", stream_name(self._ctx.rank, peer, tag), x, nbytes_of([x]), "sender")
        if call is None:
            return None
        try:
            codec = self._codec(call, x.numel(), nbytes_of([x]))
            return None if codec is None else send(self._ctx, call, codec, x, peer, tag)
        except BaseException:
            self._undo(call)
            raise

    @override
    @shared_name
    def send(self, tensors: Any, dst: int, tag: int = 0) -> Any:
        """``tensors``: a list of one tensor; ``dst``: group rank."""
        job = self._send_job(tensors[0], dst, tag) if len(tensors) == 1 else None
        return self.inner.send(tensors, dst, tag) if job is None else self._work([job], list(tensors))

    def _recv_job(self, x: Tensor, peer: int, tag: int) -> Job | None:
        call = self._begin("recv", stream_name(peer, self._ctx.rank, tag), x, 0, "sender")
        if call is None:
            return None
        call.op = "send"  # the policy is asked about the message, the same on both ends
        try:
            chosen = self._ctx.choose(call, x.numel())
            if isinstance(chosen, str):
                self._ctx.stats.passed("recv", chosen, 0)
                return None
            return receive(self._ctx, call, lambda _: chosen, x, peer, tag)
        except BaseException:
            self._undo(call)
            raise

    @override
    @shared_name
    def recv(self, tensors: Any, src: int, tag: int = 0) -> Any:
        """``tensors``: a list of one tensor; ``src``: group rank."""
        job = self._recv_job(tensors[0], src, tag) if len(tensors) == 1 else None
        return self.inner.recv(tensors, src, tag) if job is None else self._work([job], list(tensors))

    @override
    def recv_anysource(self, tensors: Any, tag: int = 0) -> Any:
        """Receive from whoever sends first; the frame says whose stream it belongs to."""
        self._ready()
        ctx, x = self._ctx, tensors[0]
        reason = ctx.refusal(x, "sender")
        if reason is None and x.numel() < max(ctx.min_numel, 1):
            reason = PassReason.SMALL
        if reason is not None or x.device.type != "cpu":
            self._pass("recv", reason or PassReason.DEVICE, 0)
            return self.inner.recv_anysource(tensors, tag)

        def call_from(source: int) -> Call:
            return Call(ctx.keys.take(stream_name(source, ctx.rank, tag)), "send", x.dtype)

        def codec_of(call: Call) -> Codec:
            chosen = ctx.choose(call, x.numel())
            return chosen if isinstance(chosen, Codec) else ctx.codec

        return self._work([receive(ctx, call_from, codec_of, x, None, tag)], list(tensors))

    def _batch(self, p2p_op_list: list[Any]) -> list[Any]:
        """Receives first: gloo halves the rate of an exchange whose sends are posted first. A backend that groups calls
        (NCCL) gets the whole batch in one group, as ungrouped it can deadlock.
        """
        device = p2p_op_list[0].tensor.device
        is_send = [op.op.__name__ == "isend" for op in p2p_op_list]
        order = sorted(range(len(p2p_op_list)), key=lambda i: is_send[i])
        if not _torch.supports_coalescing(self.inner, device):
            works: list[Any] = [None] * len(order)
            for i in order:
                op = p2p_op_list[i]
                works[i] = (self.send if is_send[i] else self.recv)([op.tensor], op.group_peer, op.tag)
            return works
        jobs: list[Job] = []
        with _torch.coalescing_manager(self.inner, device) as grouped:
            for i in order:
                op = p2p_op_list[i]
                job = (self._send_job if is_send[i] else self._recv_job)(op.tensor, op.group_peer, op.tag)
                if job is None:
                    (self.inner.send if is_send[i] else self.inner.recv)([op.tensor], op.group_peer, op.tag)
                else:
                    jobs.append(job)
        together = WaitOnce(grouped.works)
        for job in jobs:
            job.replace_inner(together)
        return [self._work([*jobs, together], [op.tensor for op in p2p_op_list])]
