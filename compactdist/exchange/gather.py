"""All-gather: one encoder, every other rank decodes; all frames of a call have one size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compactdist import _torch
from compactdist.codecs import Codec
from compactdist.exchange.context import Call, Context, waits_at_once, write
from compactdist.exchange.work import Job, drain
from compactdist.observe.stats import PassReason
from compactdist.state import state_nbytes
from compactdist.state.store import Site

__all__ = ["all_gather"]


def all_gather(ctx: Context, call: Call, codec: Codec, outputs: list[Tensor], x: Tensor, opts: Any) -> Job | None:
    """Exchange ``x`` with all ranks.

    Args:
        ctx: the group.
        call: key, op and dtype of the call.
        codec: how residuals are coded.
        outputs: one tensor per rank, each with ``x.numel()`` elements of ``x.dtype``.
        x: this rank's tensor, any shape.
        opts: the caller's AllgatherOptions or ``None``.

    Returns:
        The job, or ``None`` if no history is kept for the site: the caller passes the call through.

    Raises:
        BadOutputError: an output does not fit; nothing was sent.
    """
    numel, dtype, me = x.numel(), x.dtype, ctx.rank
    ctx.check_outputs("all_gather", outputs, [numel] * ctx.size, dtype)
    site = ctx.store.site(call.key.name)
    drain(site)
    if site.refused:
        ctx.stats.passed(call.op, PassReason.BUDGET, (ctx.size - 1) * numel * x.element_size(), call.key.name)
        return None
    hint = ctx.hint(call, numel)
    epoch = call.key.epoch
    peers = [rank for rank in range(ctx.size) if rank != me]
    with ctx.lock:
        encoder = site.encoder(me)
        decoders = {rank: site.decoder(rank) for rank in peers}
        streams = [encoder, *decoders.values()]
        keyframe = codec.lossless or ctx.in_warmup(call) or any(s.is_fresh(numel, dtype) for s in streams)
        need = state_nbytes(ctx.config, numel, dtype, sender=True)
        need += len(peers) * state_nbytes(ctx.config, numel, dtype, sender=False)
        refuse = keyframe and not ctx.store.reserve(site, Site.ALL, (numel, dtype), need)
        size = max(s.frame_nbytes(codec, numel, dtype, keyframe=keyframe) for s in streams)
        staged, failure = ctx.stage(
            encoder,
            call,
            me,
            x,
            codec,
            keyframe=keyframe,
            hint=hint,
            frame_nbytes=size,
            refuse_state=refuse,
            want_value=not ctx.exact_local,
        )
        gathered = torch.empty(ctx.size * size, dtype=torch.uint8, device=x.device)
        inner = _torch.all_gather_single(ctx.inner, gathered, staged.frame, opts)
        encoder.commit(staged, hint)
    links = ctx.size - 1
    ctx.stats.sent(
        call.key.name,
        call.op,
        codec.codec_id,
        raw=links * numel * x.element_size(),
        wire=links * size,
        keyframe=keyframe,
        numel=links * numel,
    )
    own: Tensor | None = None
    if failure is None:
        ctx.sample_error(call, encoder.sequence, x, staged)
        exact = ctx.exact_local or staged.value is None
        own = x.detach().reshape(-1) if exact else staged.value
        if own is not None and waits_at_once(opts):
            write(outputs[me], own)
            own = None
        elif own is not None and exact:
            own = own.clone()  # the input may be overwritten before the caller waits

    def finish(may_write: bool) -> None:
        error: Exception | None = failure
        refused = refuse
        if own is not None and may_write:
            write(outputs[me], own)
        frames = gathered.view(ctx.size, size)
        for rank, decoder in decoders.items():
            try:
                value = decoder.decode(frames[rank], codec, numel, dtype, epoch=epoch, hint=hint, refuse_state=refuse)
            except Exception as e:
                error = error or e
                continue
            refused = refused or decoder.refused
            if may_write:
                write(outputs[rank], value)
        if refused:
            ctx.store.refuse(site, Site.ALL)
        if error is not None:
            raise error

    return Job(inner, finish, site, (staged.frame, gathered))
