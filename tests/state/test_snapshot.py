"""What a snapshot takes of a stream: everything but what follows from the rest, and is made again."""

from __future__ import annotations

import pytest

from compactdist.state import StreamDecoder, StreamEncoder, StreamState

TAKEN = {"digest", "part", "parts", "predictor", "_own_predictor", "relay", "_form"}
"""By ``save_streams``, besides what ``lasting`` lists; of ``_form`` codec and memory, from which it is made again."""

MADE_AGAIN = {
    "config", "fingerprint", "where", "_changes", "_board", "_unprepared", "_number", "_remembers", "_plain",
    "_keeps_copies",
    "_spares", "steers", "_forms", "_device_keyframes", "clock",
}  # fmt: skip
"""By the store, from the group's options and the stream's place, or when the next frame needs it."""

OF_THE_LAST_CALL = {"_announced", "holds_values", "wrote"}
"""Read before a snapshot is made, or by the call itself only."""


def slots_of(kind: type) -> set[str]:
    return {name for base in kind.__mro__ for name in getattr(base, "__slots__", ())}


@pytest.mark.parametrize("kind", [StreamState, StreamEncoder, StreamDecoder])
def test_every_attribute_is_taken_or_made_again(kind):
    """Who gives streams a new one has to say which."""
    said = set(kind.lasting)
    assert len(said) == len(kind.lasting)
    assert said <= slots_of(kind)
    assert not said & (TAKEN | MADE_AGAIN | OF_THE_LAST_CALL)
    assert slots_of(kind) <= said | TAKEN | MADE_AGAIN | OF_THE_LAST_CALL
