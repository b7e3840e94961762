"""Broadcast: the root encodes once, every other rank decodes. The root's own tensor stays as it was."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compactdist.codecs import Codec
from compactdist.errors import NonFiniteError
from compactdist.exchange.context import Call, Context, write
from compactdist.exchange.work import Job, drain
from compactdist.observe.stats import PassReason
from compactdist.state import Staged, state_nbytes
from compactdist.state.store import Site

__all__ = ["broadcast"]


def broadcast(ctx: Context, call: Call, codec: Codec, x: Tensor, root: int, opts: Any) -> Job | None:
    """Send the root's tensor to all ranks.

    Args:
        ctx: the group.
        call: key, op and dtype of the call.
        codec: how residuals are coded.
        x: the tensor on the root, the output elsewhere.
        root: group rank of the sender.
        opts: the caller's BroadcastOptions.

    Returns:
        The job, or ``None`` if no history is kept for the site: the caller passes the call through.
    """
    numel, dtype = x.numel(), x.dtype
    site = ctx.store.site(call.key.name)
    drain(site)
    links = ctx.size - 1 if ctx.rank == root else 0
    if site.refused:
        ctx.stats.passed(call.op, PassReason.BUDGET, links * numel * x.element_size(), call.key.name)
        return None
    hint, epoch = ctx.hint(call, numel), call.key.epoch
    is_root = ctx.rank == root
    failure: NonFiniteError | None = None
    with ctx.lock:
        stream = site.encoder(root) if is_root else site.decoder(root)
        keyframe = codec.lossless or ctx.in_warmup(call) or stream.is_fresh(numel, dtype)
        need = state_nbytes(ctx.config, numel, dtype, sender=is_root)
        # only the root can say that no history will be kept; the others follow it
        fits = not keyframe or ctx.store.reserve(site, Site.ALL, (numel, dtype), need, force=not is_root)
        size = stream.frame_nbytes(codec, numel, dtype, keyframe=keyframe)
        staged: Staged | None = None
        if is_root:
            encoder = site.encoder(root)
            staged, failure = ctx.stage(
                encoder,
                call,
                root,
                x,
                codec,
                keyframe=keyframe,
                hint=hint,
                frame_nbytes=size,
                refuse_state=not fits,
            )
            frame = staged.frame
        else:
            frame = torch.empty(size, dtype=torch.uint8, device=x.device)
        inner = ctx.inner.broadcast([frame], opts)
        if staged is not None:
            site.encoder(root).commit(staged, hint)
    ctx.stats.sent(
        call.key.name,
        call.op,
        codec.codec_id,
        raw=links * numel * x.element_size(),
        wire=links * size,
        keyframe=keyframe,
        numel=links * numel,
    )
    if staged is not None and failure is None:
        ctx.sample_error(call, site.encoder(root).sequence, x, staged)

    def finish(may_write: bool) -> None:
        refused = is_root and not fits
        if not is_root:
            decoder = site.decoder(root)
            value = decoder.decode(frame, codec, numel, dtype, epoch=epoch, hint=hint)
            refused = decoder.refused
            if may_write:
                write(x, value)
        if refused:
            ctx.store.refuse(site, Site.ALL)
        if failure is not None:
            raise failure

    return Job(inner, finish, site, (frame,))
