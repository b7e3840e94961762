"""The codec of an `enable` that was given none."""

from __future__ import annotations

from typing import Any

from compactdist.group.environment import settings_from_environment
from compactdist.presets import expand

AUTO = "auto"
USUAL = "int2"


def chosen_codec(codec: Any, preset: str | None = None) -> Any:
    """The codec itself; for `"auto"` that of `preset`, of `COMPACTDIST_CODEC`, of `COMPACTDIST_PRESET`, or `int2`.

    Raises:
        compactdist.errors.ConfigError: a misspelt variable, a bad value of one, or an unknown preset.
    """
    if codec != AUTO:
        return codec
    environment = settings_from_environment()  # read in any case, to refuse what is misspelt
    return expand({"preset": preset} if preset is not None else environment).get("codec", USUAL)
