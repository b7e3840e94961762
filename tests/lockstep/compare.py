"""What every rank's streams hold, in a form that can be sent to the parent, and whether it fits together."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from compactdist.exchange.work import drain


def digest(t: torch.Tensor | None) -> str | None:
    if t is None:
        return None
    raw = t.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
    return f"{t.dtype}{tuple(t.shape)}{hashlib.sha256(raw).hexdigest()}"


def of_stream(stream: Any) -> tuple[Any, ...]:
    view = stream.view
    return (
        stream.sequence,
        str(stream.live),
        STALE if is_stale(stream) else tuple(digest(t) for t in stream.predictor.held),
        None if view is None else (view.shape, view.hint),
    )


STALE = "given up"


def is_stale(stream: Any) -> bool:
    """A sender that shared another stream's history and cannot go on from it: its next frame is a keyframe."""
    relay = getattr(stream, "relay", None)
    return relay is not None and (relay.owes_keyframe or (relay.shared and relay.passed != relay.source.sequence))


EMPTY = (0, "None", (), None)


def of_group(group: Any) -> dict[str, Any]:
    """Per site: its streams. Whatever is under way is finished first."""
    sites = {}
    for site in group._engine.store.sites():
        drain(site)
        assert not site.pending
        sites[site.key] = {
            "encoders": {peer: of_stream(s) for peer, s in site.encoders.items()},
            "decoders": {peer: of_stream(s) for peer, s in site.decoders.items()},
            "further encoders": {where: of_stream(s) for where, s in site.further_encoders.items()},
            "further decoders": {where: of_stream(s) for where, s in site.further_decoders.items()},
            "refused": set(site.refused),
            "op": site.key.rpartition("/")[2],
        }
    return {"sites": sites, "step": group.current_step, "epoch": group._keys.epoch}


def is_one_to_all(key: str) -> bool:
    return "all_gather#" in key or "broadcast/" in key or "all_reduce/sums#" in key


def check(ranks: list[dict[str, Any]]) -> int:
    """Every decoder holds what its encoder holds; returns how many pairs were compared."""
    assert len({(r["step"], r["epoch"]) for r in ranks}) == 1
    compared = 0
    for key in {key for r in ranks for key in r["sites"]}:
        sites = [r["sites"].get(key, {"encoders": {}, "decoders": {}, "refused": set()}) for r in ranks]
        if is_one_to_all(key):
            assert len({frozenset(s["refused"]) for s in sites}) == 1, key
        for a, sending in enumerate(sites):
            for b, receiving in enumerate(sites):
                if a == b:
                    continue
                # an encoder for all is kept under its own rank
                encoder = sending["encoders"].get(a if is_one_to_all(key) else b)
                decoder = receiving["decoders"].get(a)
                if encoder is None and decoder is None:
                    continue
                encoder, decoder = encoder or EMPTY, decoder or EMPTY
                if encoder[2] == STALE:
                    decoder = (*decoder[:2], STALE, *decoder[3:])
                assert encoder == decoder, f"{key}: {a} to {b}"
                compared += 1
                further = [
                    {part: stream for (peer, part), stream in site.get(f"further {ends}", {}).items() if peer == a}
                    for site, ends in ((sending, "encoders"), (receiving, "decoders"))
                ]
                for part in {*further[0], *further[1]}:
                    assert further[0].get(part, EMPTY) == further[1].get(part, EMPTY), f"{key}: {a} to {b}, {part}"
    return compared
