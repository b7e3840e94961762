"""All-to-all: an encoder and a decoder per peer; one's own chunk is exact.

Whether a directed chunk is compressed depends on its own number of elements and dtype, so uneven splits need no
agreement beyond what each pair of ranks knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compactdist import _torch
from compactdist.codecs import Codec
from compactdist.errors import NonFiniteError
from compactdist.exchange.arrivals import Arrival
from compactdist.exchange.context import Call, Context, waits_at_once, write
from compactdist.exchange.forward import Message
from compactdist.exchange.work import Job, drain
from compactdist.observe.stats import PassReason
from compactdist.state import MatrixView, Staged, state_nbytes
from compactdist.state.store import Site
from compactdist.wire import from_raw, raw_payload

__all__ = ["all_to_all"]


@dataclass(slots=True)
class _Outgoing:
    peer: int
    payload: Tensor
    message: Message | None = None
    staged: Staged | None = None
    hint: MatrixView | None = None
    codec: Codec | None = None


@dataclass(slots=True)
class _Incoming:
    peer: int
    nbytes: int
    codec: Codec | None
    hint: MatrixView | None = None


def all_to_all(ctx: Context, call: Call, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any) -> Job | None:
    """Exchange one chunk with every rank.

    Args:
        ctx: the group.
        call: key, op and dtype of the call.
        outputs: one chunk per rank, any shapes.
        inputs: likewise; ``inputs[me]`` goes to ``outputs[me]`` unchanged.
        opts: the caller's AllToAllOptions or ``None``.

    Returns:
        The job, or ``None`` if the policy lets all chunks through and the caller should pass the call on. With uneven
        chunks, or where a budget is used up, another rank may see it differently, so then chunks travel this way.
    """
    me = ctx.rank
    dtype = call.dtype
    site = ctx.store.site(call.key.name)
    drain(site)
    peers = [rank for rank in range(ctx.size) if rank != me]
    even = len({t.numel() for t in (*inputs, *outputs)}) == 1
    pick = {n: ctx.choose(call, n) for n in {t.numel() for t in (*inputs, *outputs)}}

    def codec_for(peer: int, numel: int) -> Codec | None:
        chosen = pick[numel]
        return None if isinstance(chosen, str) or peer in site.refused else chosen

    raw_total = sum(inputs[p].numel() for p in peers) * dtype.itemsize
    reason = pick[inputs[me].numel()]
    if even and isinstance(reason, str):
        ctx.stats.passed(call.op, reason, raw_total, None if reason == PassReason.SMALL else call.key.name)
        return None
    failure: NonFiniteError | None = None
    epoch = call.key.epoch
    sending: list[_Outgoing] = []
    receiving: list[_Incoming] = []
    refusing: set[int] = set()
    any_residual = compressed = False
    rotates = _rotates(me, inputs) and _rotates(me, outputs)
    arrivals = ctx.arrivals
    latest = arrivals.latest(max(inputs, key=Tensor.numel)) if rotates else None
    with ctx.lock, arrivals.held(latest, ctx.store) as arrival:
        for peer in peers:
            out_codec = codec_for(peer, inputs[peer].numel())
            in_codec = codec_for(peer, outputs[peer].numel())
            need = _pair_need(ctx, inputs[peer], out_codec) + _pair_need(ctx, outputs[peer], in_codec, sender=False)
            what = (inputs[peer].numel(), outputs[peer].numel(), dtype)
            # only a keyframe can say that no history will be kept
            can_refuse = out_codec is not None and site.encoder(peer).is_fresh(inputs[peer].numel(), dtype)
            if need and not ctx.store.reserve(site, peer, what, need, force=not can_refuse):
                refusing.add(peer)
            if out_codec is None:
                # unpadded: to a rank whose chunks all pass through these are the bytes of an uncompressed call
                exact = inputs[peer].numel() * dtype.itemsize
                sending.append(_Outgoing(peer, raw_payload(inputs[peer])[:exact]))
            else:
                refuse = peer in refusing
                outgoing, error = _encode(ctx, call, site, peer, inputs[peer], out_codec, arrival, refuse)
                failure = failure or error
                any_residual |= not (outgoing.staged and outgoing.staged.header.is_key)
                compressed = True
                sending.append(outgoing)
            receiving.append(_expect(ctx, call, site, peer, outputs[peer], in_codec))
        empty = torch.empty(0, dtype=torch.uint8, device=inputs[me].device)
        send_sizes, recv_sizes = [0] * ctx.size, [0] * ctx.size
        for o in sending:
            send_sizes[o.peer] = o.payload.numel()
        for i in receiving:
            recv_sizes[i.peer] = i.nbytes
        wire = torch.cat([empty, *(o.payload for o in sending)])
        arrived = torch.empty(sum(recv_sizes), dtype=torch.uint8, device=inputs[me].device)
        inner = _torch.all_to_all_single(ctx.inner, arrived, wire, recv_sizes, send_sizes, opts)
        for o in sending:
            if o.message is not None and o.staged is not None:
                o.message.commit(o.staged, o.hint)
    name = call.key.name
    if compressed:
        shown = next(o.codec for o in sending if o.codec is not None)
        numel = sum(inputs[p].numel() for p in peers)
        ctx.stats.sent(
            name,
            call.op,
            shown.codec_id,
            raw=raw_total,
            wire=wire.numel(),
            keyframe=not any_residual,
            numel=numel,
            forwarded=any(o.message is not None and o.message.forwarded for o in sending),
        )
        for o in sending:
            if o.staged is not None and o.message is not None and not o.message.passes:
                ctx.sample_error(call, site.encoder(o.peer).sequence, inputs[o.peer], o.staged)
    else:
        reasons = {c for c in pick.values() if isinstance(c, str)} or {PassReason.BUDGET}
        ctx.stats.passed(call.op, "+".join(sorted(reasons)), raw_total, name, wire=wire.numel())
    own: Tensor | None = None
    if waits_at_once(opts):
        write(outputs[me], inputs[me].detach().reshape(-1))
    else:
        own = inputs[me].detach().reshape(-1).clone()  # the input may be overwritten before the caller waits

    def finish(may_write: bool) -> None:
        if own is not None and may_write:
            write(outputs[me], own)
        error: Exception | None = failure
        refused = set(refusing)
        start = 0
        for part in receiving:
            data = arrived[start : start + part.nbytes]
            start += part.nbytes
            target = outputs[part.peer]
            if part.codec is None:
                if may_write and target.numel():
                    write(target, from_raw(data, target.numel(), dtype))
                continue
            decoder = site.decoder(part.peer)
            arrivals.forget(site, part.peer)
            try:
                value = decoder.decode(
                    data,
                    part.codec,
                    target.numel(),
                    dtype,
                    epoch=epoch,
                    hint=part.hint,
                    refuse_state=part.peer in refusing,
                )
            except Exception as e:
                error = error or e
                continue
            if decoder.refused:
                refused.add(part.peer)
            if may_write:
                write(target, value)
                if rotates:
                    arrivals.put(site, part.peer, target, data, by_size=True)
        for peer in refused:
            ctx.store.refuse(site, peer)
        if error is not None:
            raise error

    return Job(inner, finish, site, (wire, arrived))


def _pair_need(ctx: Context, chunk: Tensor, codec: Codec | None, *, sender: bool = True) -> int:
    return 0 if codec is None else state_nbytes(ctx.config, chunk.numel(), chunk.dtype, sender=sender)


def _rotates(me: int, chunks: Sequence[Tensor]) -> bool:
    """Whether there is one chunk only and it is another rank's: a rotation, which a ring is made of."""
    return [rank for rank, chunk in enumerate(chunks) if chunk.numel()][1:] == [] and not chunks[me].numel()


def _encode(
    ctx: Context,
    call: Call,
    site: Site,
    peer: int,
    chunk: Tensor,
    codec: Codec,
    arrival: Arrival | None,
    refuse: bool,
) -> tuple[_Outgoing, NonFiniteError | None]:
    encoder = site.encoder(peer)
    numel, dtype = chunk.numel(), chunk.dtype
    hint = ctx.hint(call, numel)
    keyframe = codec.lossless or ctx.in_warmup(call) or encoder.is_fresh(numel, dtype)
    message = Message(ctx, call, encoder, chunk, codec, due=keyframe, arrival=arrival)
    staged, failure = message.stage(peer, hint, refuse_state=refuse)
    return _Outgoing(peer, staged.frame, message, staged, hint, codec), failure


def _expect(ctx: Context, call: Call, site: Site, peer: int, chunk: Tensor, codec: Codec | None) -> _Incoming:
    numel, dtype = chunk.numel(), chunk.dtype
    if codec is None:
        return _Incoming(peer, numel * dtype.itemsize, None)
    decoder = site.decoder(peer)
    keyframe = codec.lossless or ctx.in_warmup(call) or decoder.is_fresh(numel, dtype)
    size = decoder.frame_nbytes(codec, numel, dtype, keyframe=keyframe)
    return _Incoming(peer, size, codec, ctx.hint(call, numel))
