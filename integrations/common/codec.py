"""The codec of an `enable` that was given none."""

from __future__ import annotations

from typing import Any

from compactdist.group.environment import settings_from_environment

AUTO = "auto"
USUAL = "int2"


def chosen_codec(codec: Any) -> Any:
    """The codec itself; for `"auto"` that of `COMPACTDIST_CODEC`, or `int2` where the variable is not set.

    Raises:
        compactdist.errors.ConfigError: a misspelt variable, or a bad value of one.
    """
    return settings_from_environment().get("codec", USUAL) if codec == AUTO else codec
