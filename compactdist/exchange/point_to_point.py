"""Send and receive: one stream per directed pair, tag and ordinal.

The sender's frame says what it is, so a receiver follows it: on the CPU a receive is posted at the upper bound of the
frame's size (gloo takes a shorter message, and kills the process on a longer one).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from compactdist.codecs import Codec
from compactdist.errors import NonFiniteError
from compactdist.exchange.context import Call, Context, write
from compactdist.exchange.forward import Message
from compactdist.exchange.work import Job, as_work, drain
from compactdist.observe.stats import PassReason
from compactdist.state import MatrixView, blocks, state_nbytes
from compactdist.wire import HEADER_NBYTES, MAGIC, from_raw, raw_nbytes

__all__ = ["receive", "send", "stream_name"]


def stream_name(source: int, target: int, tag: int) -> str:
    """The part of a key that both ends of a directed pair share."""
    return f"send/{source}>{target}/t{tag}"


def send(ctx: Context, call: Call, codec: Codec, x: Tensor, peer: int, tag: int) -> Job:
    """Send ``x`` to group rank ``peer``; the frame is complete when this returns.

    What was received and is untouched goes on in the frame it arrived in (:mod:`compactdist.exchange.forward`).

    A differentiable tensor, or one for which there is no state budget, travels as it is in a frame that touches no
    history: the receiver cannot foresee either.
    """
    numel, dtype = x.numel(), x.dtype
    site = ctx.store.site(call.key.name)
    hint, epoch = ctx.hint(call, numel), call.key.epoch
    failure: NonFiniteError | None = None
    passed: str | None = None
    arrivals = ctx.arrivals
    with ctx.lock, arrivals.held(arrivals.found(x), ctx.store) as arrival:
        encoder = site.encoder(peer)
        message: Message | None = None
        if ctx.under_autograd(x):
            passed = PassReason.AUTOGRAD
        else:
            due = codec.lossless or ctx.in_warmup(call) or encoder.is_fresh(numel, dtype)
            follows = x.device.type == "cpu"
            message = Message(ctx, call, encoder, x, codec, due=due, arrival=arrival, follows=follows)
            need = state_nbytes(ctx.config, numel, dtype, sender=True)
            starts = message.keyframe and not message.passes
            if starts and not ctx.store.reserve(site, peer, (numel, dtype), need):
                passed, message = PassReason.BUDGET, None
        if message is None:
            staged = encoder.stage_stateless(x, codec, epoch=epoch)
        else:
            staged, failure = message.stage(peer, hint)
        inner = ctx.inner.send([staged.frame], peer, tag)
        if message is not None:
            message.commit(staged, hint)
            if encoder.relay is not None and encoder.relay.shared:
                ctx.store.reserve(site, peer, "shared", 0)
    raw, wire = numel * x.element_size(), staged.frame.numel()
    if passed is not None:
        ctx.stats.passed(call.op, passed, raw, call.key.name, wire=wire)
    elif message is not None:
        ctx.stats.sent(
            call.key.name,
            call.op,
            codec.codec_id,
            raw=raw,
            wire=wire,
            keyframe=staged.header.is_key,
            numel=numel,
            forwarded=message.forwarded,
        )
        if failure is None and not message.passes:
            ctx.sample_error(call, encoder.sequence, x, staged)

    def finish(may_write: bool) -> None:
        if failure is not None:
            raise failure

    job = Job(inner, finish, None, (staged.frame,))
    ctx.outbox.add(peer, job)
    return job


def frame_bound(codec: Codec, numel: int, dtype: torch.dtype, hint: MatrixView | None) -> int:
    """The most bytes a frame of this message can have: raw, or scales gone wild in an odd matrix view."""
    shapes = [blocks(numel).shape] + ([hint.shape] if hint is not None else [])
    coded = max(codec.payload_nbytes(shape, torch.float32) for shape in shapes)
    return HEADER_NBYTES + max(raw_nbytes(numel, dtype), coded + numel // 8 + 64)


def receive(
    ctx: Context,
    call: Call | Callable[[int], Call],
    codec_of: Callable[[Call], Codec],
    x: Tensor,
    peer: int | None,
    tag: int,
) -> Job:
    """Receive into ``x``.

    Args:
        ctx: the group.
        call: the call, or for any source a function from the sender's group rank to the call.
        codec_of: the codec the policy chooses for a call.
        x: output tensor.
        peer: group rank of the sender, ``None`` for any source.
        tag: of the message.
    """
    numel, dtype = x.numel(), x.dtype

    if isinstance(call, Call):
        assert peer is not None
        codec = codec_of(call)
        site = ctx.store.site(call.key.name)
        hint = ctx.hint(call, numel)
        if x.device.type == "cpu":
            size = frame_bound(codec, numel, dtype, hint)
        else:
            drain(site)
            decoder = site.decoder(peer)
            keyframe = codec.lossless or ctx.in_warmup(call) or decoder.is_fresh(numel, dtype)
            size = decoder.frame_nbytes(codec, numel, dtype, keyframe=keyframe)
        frame = torch.empty(size, dtype=torch.uint8, device=x.device)
        with ctx.lock:
            known_inner = ctx.inner.recv([frame], peer, tag)
        source, known_call = peer, call

        def finish(may_write: bool) -> None:
            decoder = site.decoder(source)
            ctx.arrivals.forget(site, source)
            value = decoder.decode(frame, codec, numel, dtype, epoch=known_call.key.epoch, hint=hint)
            ctx.store.reserve(site, source, (numel, dtype), decoder.state_bytes, force=True)
            if may_write:
                write(x, value)
                ctx.arrivals.put(site, source, x, frame)

        return Job(known_inner, finish, site, (frame,))

    call_from = call
    frame = torch.empty(HEADER_NBYTES + raw_nbytes(numel, dtype) + numel + 4096, dtype=torch.uint8, device=x.device)
    inner: Any = as_work(ctx.inner.recv_anysource([frame], tag))

    def finish_any(may_write: bool) -> None:
        source = int(inner._source_rank())
        if bytes(frame[:4].cpu().numpy()) != MAGIC:  # the sender let this one pass through
            ctx.stats.passed("recv", PassReason.PEER, 0)
            if may_write:
                write(x, from_raw(frame, numel, dtype))
            return
        actual = call_from(source)
        site = ctx.store.site(actual.key.name)
        drain(site)
        decoder = site.decoder(source)
        ctx.arrivals.forget(site, source)
        value = decoder.decode(
            frame,
            codec_of(actual),
            numel,
            dtype,
            epoch=actual.key.epoch,
            hint=ctx.hint(actual, numel),
        )
        ctx.store.reserve(site, source, (numel, dtype), decoder.state_bytes, force=True)
        if may_write:
            write(x, value)
            ctx.arrivals.put(site, source, x, frame)

    return Job(inner, finish_any, None, (frame,))
