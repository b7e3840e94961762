"""What one end of every stream holds, in 64 bits for each directed pair of ranks, so that ends can be compared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from compactdist import kernels
from compactdist.state.encoder import StreamEncoder
from compactdist.state.store import Site
from compactdist.state.stream import StreamState
from compactdist.wire import MASK64, hash64

__all__ = ["Held", "held_between", "pair_digests"]


class Held(NamedTuple):
    """What one end of a stream holds.

    Attributes:
        site: the site key, and which part of its tensors the stream carries, if it carries a part.
        frames: frames since the last reset.
        digest: of the frames, of the bytes of the history and of what the codec remembers; equal on both ends.
        of_frames: the part of it that is of the frames.
        elsewhere: only the other end has the history: this one passes on what arrives on another stream, shares that
            stream's history, and has not sent on what arrived last. Its next frame is that one, or a keyframe.
    """

    site: str
    frames: int
    digest: int
    of_frames: int
    elsewhere: bool


def _held(key: str, stream: StreamState) -> Held:
    view = None if stream.view is None else (stream.view.shape, stream.view.hint)
    named = key if stream.parts == 1 else f"{key} (part {stream.part + 1} of {stream.parts})"
    facts = [stream.fingerprint, stream.part, stream.parts, stream.sequence, stream.known_digest(), stream.live, view]
    facts.append(stream.keyframe_announced)
    of_frames = hash64(repr(facts))
    for tensor in (*stream.predictor.held, *stream.codec_memory):
        data = tensor.reshape(-1).view(torch.uint8)
        facts.append(kernels.checksum_for(data.numel(), data.device)(data))
    return Held(named, stream.sequence, hash64(repr(facts)), of_frames, _has_moved_on(stream))


def _has_moved_on(stream: StreamState) -> bool:
    """Whether the stream that an encoder shares a history with is ahead of what was passed on."""
    relay = stream.relay if isinstance(stream, StreamEncoder) else None
    if relay is None or not relay.shared or relay.source is None:
        return False
    return relay.source.sequence != relay.passed


def held_between(sites: Iterable[Site], rank: int, peer: int, *, sends: bool) -> Iterator[Held]:
    """The streams from this rank to a peer, or from it: those that have seen a frame since the last reset.

    A stream that all ranks receive is a stream to each of them.
    """
    for site in sites:
        if sends:
            streams: list[StreamState] = [*site.encoders_to(peer), *site.encoders_to(rank)]
        else:
            streams = [*site.decoders_from(peer)]
        yield from (_held(site.key, stream) for stream in streams if stream.sequence)


def pair_digests(sites: list[Site], rank: int, size: int, *, sends: bool) -> list[int]:
    """For each rank, 64 bits of all streams from this rank to it, or from it to this rank; 0 for this rank itself."""
    return [
        sum(held.digest for held in held_between(sites, rank, peer, sends=sends)) & MASK64 if peer != rank else 0
        for peer in range(size)
    ]
