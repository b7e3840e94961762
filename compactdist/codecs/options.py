"""Checks of codec options; every message names what the option takes."""

from __future__ import annotations

from collections.abc import Sequence

from compactdist.errors import CodecConfigError


def check_choice(codec_id: str, option: str, value: str, choices: Sequence[str]) -> str:
    """Return ``value`` if it is one of ``choices``.

    Raises:
        CodecConfigError: It is not.
    """
    if value not in choices:
        named = ", ".join(map(repr, choices))
        raise CodecConfigError(f"codec {codec_id!r}: {option} must be one of {named}, got {value!r}")
    return value


def check_integer(codec_id: str, option: str, value: int, low: int, high: int) -> int:
    """Return ``value`` if it is an integer from ``low`` to ``high``.

    Raises:
        CodecConfigError: It is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise CodecConfigError(f"codec {codec_id!r}: {option} must be an integer from {low} to {high}, got {value!r}")
    return value
