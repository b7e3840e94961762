"""Everything that the streams of a group remember, copied and put back.

Streams are made anew when it is put back, as after a reset: plans, CUDA graphs and frames kept to be passed on, which
were made for the old ones, do not go on with them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compactdist.codecs.base import Codec
from compactdist.state.decoder import StreamDecoder
from compactdist.state.encoder import StreamEncoder
from compactdist.state.history import Predictor
from compactdist.state.relay import Relay
from compactdist.state.store import Site, StateStore

__all__ = ["SavedStreams", "load_streams", "save_streams"]

_Memo = dict[int, Any]


class _Place(NamedTuple):
    """Where a stream is found: key of its site, group rank of the other end, whether it sends, number of its part."""

    site: str
    peer: int
    sends: bool
    part: int


@dataclass(frozen=True, slots=True)
class _Learnt:
    """What a codec's session remembers, and what opens a session like it."""

    codec: Codec
    device: torch.device
    memory: Any


@dataclass(frozen=True, slots=True)
class _Passing:
    """A stream's ``Relay``, whose source is named by its place."""

    relay: Relay
    source: _Place | None


@dataclass(frozen=True, slots=True)
class _Saved:
    """One end of a stream.

    Attributes:
        place: of the stream.
        parts: that its tensors travel in.
        said: by name, what ``lasting`` of its class lists.
        digest: of the payloads that made its history.
        predictors: what it predicts from; an open-loop sender's own prediction last.
        learnt: of its codec; ``None``: no residual was coded yet.
        passing: of an encoder that passes frames on, or did.
    """

    place: _Place
    parts: int
    said: dict[str, Any]
    digest: int
    predictors: tuple[Predictor, ...]
    learnt: _Learnt | None
    passing: _Passing | None


@dataclass(frozen=True, slots=True)
class SavedStreams:
    """All streams of a group at one moment.

    Attributes:
        saved: in the order in which they are made again.
        nbytes: bytes of the copied tensors of histories.
    """

    saved: tuple[_Saved, ...]
    nbytes: int


def _ends(site: Site) -> Iterable[tuple[_Place, StreamEncoder | StreamDecoder]]:
    """The streams of a site by place; those of first parts before the further ones."""
    for peer, encoder in site.encoders.items():
        yield _Place(site.key, peer, True, 0), encoder
    for (peer, part), encoder in site.further_encoders.items():
        yield _Place(site.key, peer, True, part), encoder
    for peer, decoder in site.decoders.items():
        yield _Place(site.key, peer, False, 0), decoder
    for (peer, part), decoder in site.further_decoders.items():
        yield _Place(site.key, peer, False, part), decoder


def _own(value: Any) -> Any:
    """A value of a stream that no other one writes to."""
    return value.clone() if isinstance(value, Tensor) else value


def _copied(predictor: Predictor, memo: _Memo) -> Predictor:
    """A predictor that holds copies of what this one holds; the same one for all that share it."""
    for tensor in predictor.held:
        if id(tensor) not in memo:
            memo[id(tensor)] = tensor.clone()
    return copy.deepcopy(predictor, memo)


def _wait_for(devices: Iterable[torch.device]) -> None:
    """Let work end that other CUDA streams may have left to do: histories belong to the one that used them last."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def _devices_of(store: StateStore) -> set[torch.device]:
    streams = [stream for site in store.sites() for stream in site.streams]
    return {tensor.device for stream in streams for tensor in stream.predictor.held}


@torch.inference_mode(False)
@torch.no_grad()
def save_streams(store: StateStore) -> SavedStreams:
    """Copy what all streams remember. None may have an exchange under way.

    Raises:
        CodecConfigError: a codec's session cannot say what it remembers.
    """
    for site in store.sites():
        site.changes.read()
    _wait_for(_devices_of(store))
    ends = [end for site in store.sites() for end in _ends(site)]
    places = {id(stream): place for place, stream in ends}
    memo: _Memo = {}
    saved = tuple(_save(place, stream, places, memo) for place, stream in ends)
    held = {id(tensor): tensor.nbytes for one in saved for kept in one.predictors for tensor in kept.held}
    return SavedStreams(saved, sum(held.values()))


def _save(place: _Place, stream: StreamEncoder | StreamDecoder, places: dict[int, _Place], memo: _Memo) -> _Saved:
    form, passing = stream.known_form, None
    digest = stream.known_digest()
    said = {name: _own(getattr(stream, name)) for name in stream.lasting}
    relay = stream.relay if isinstance(stream, StreamEncoder) else None
    if relay is not None:
        source = places.get(id(relay.source))
        passing = _Passing(copy.copy(relay), source)
        passing.relay.source = None
        if source is None:  # that stream was forgotten, or there is none: the next frame is coded here
            passing.relay.owes_keyframe, passing.relay.shared = relay.owes_keyframe or relay.shared, False
    learnt = None if form is None else _Learnt(form.codec, form.session.device, form.session.copy_memory())
    predictors = tuple(_copied(one, memo) for one in stream.predictors)
    return _Saved(place, stream.parts, said, digest, predictors, learnt, passing)


@torch.inference_mode(False)
@torch.no_grad()
def load_streams(store: StateStore, streams: SavedStreams) -> list[tuple[str, int]]:
    """Make all streams again as they were saved, in a store that holds none.

    Returns:
        Key of the site and group rank of the sender, of each incoming stream whose frames another one passes on.
    """
    memo: _Memo = {}
    made: dict[_Place, StreamEncoder | StreamDecoder] = {}
    for saved in streams.saved:
        site, (_, peer, sends, part) = store.site(saved.place.site), saved.place
        stream = site.encoder(peer, part, saved.parts) if sends else site.decoder(peer, part, saved.parts)
        made[saved.place] = stream
        for name, value in saved.said.items():
            setattr(stream, name, _own(value))
        stream.digest = saved.digest
        stream.predictors = tuple(_copied(one, memo) for one in saved.predictors)
        if saved.learnt is not None:
            stream.form(saved.learnt.codec, saved.learnt.device).session.take_memory(saved.learnt.memory)
    relayed = [_load_relay(made, saved) for saved in streams.saved if saved.passing is not None]
    _wait_for(_devices_of(store))
    return [(place.site, place.peer) for place in relayed if place is not None]


def _load_relay(made: dict[_Place, StreamEncoder | StreamDecoder], saved: _Saved) -> _Place | None:
    """Let an encoder pass frames on as it did; returns the place of the stream that they come from."""
    encoder, passing = made[saved.place], saved.passing
    assert isinstance(encoder, StreamEncoder)
    assert passing is not None
    encoder.relay = relay = copy.copy(passing.relay)
    if passing.source is None:
        return None
    source = made[passing.source]
    assert isinstance(source, StreamDecoder)
    relay.source = source
    return passing.source
