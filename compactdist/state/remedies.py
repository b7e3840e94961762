"""What to do about a frame that is not the expected one, by the field that differs."""

from __future__ import annotations

from compactdist import wire

__all__ = ["RESET", "SAME_CONFIG", "SAME_ORDER", "SAME_STEPS", "remedy_of"]

RESET = wire.RESET
SAME_CONFIG = "wrap the group with the same configuration on every rank; then " + RESET
SAME_ORDER = (
    "make the calls of a step in the same order on both ends, or name them with key(), and wrap groups in the same "
    "order on every rank; then " + RESET
)
SAME_STEPS = (
    "call step() at the same places on every rank, and make the same calls of this group in every step; then " + RESET
)

_OF_FIELDS = {
    "stream": SAME_ORDER,
    "step": SAME_STEPS,
    "codec": SAME_CONFIG,
    "keyframe_codec": SAME_CONFIG,
    "predictor": SAME_CONFIG,
    "coefficient": SAME_CONFIG,
    "layout": SAME_CONFIG,
}


def remedy_of(field: str) -> str:
    """What to do where a field of the header (``wire.FIELDS``) differs."""
    return _OF_FIELDS.get(field, RESET)
