"""The codec and other options of an `enable` that was not given them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compactdist.group.environment import settings_from_environment
from compactdist.presets import settled

AUTO = "auto"
USUAL = "int2"


def chosen_codec(codec: Any, given: Mapping[str, Any] | None = None) -> Any:
    """The codec itself; for `"auto"` what `compactdist.wrap(**given)` would take, or `int2` where none is named.

    A preset, a target, `COMPACTDIST_CODEC`, `COMPACTDIST_PRESET` and `COMPACTDIST_TARGET` name one.

    Raises:
        compactdist.errors.ConfigError: a misspelt variable, a bad value of one, or an unknown preset.
    """
    return settled(settings_from_environment(), given or {}).get("codec", USUAL) if codec == AUTO else codec


def chosen_option(name: str, given: Mapping[str, Any], usual: Any) -> Any:
    """What `compactdist.wrap(**given)` takes for an option, by its presets and the environment too; else `usual`.

    Raises:
        compactdist.errors.ConfigError: a misspelt variable, a bad value of one, or an unknown preset.
    """
    return settled(settings_from_environment(), given).get(name, usual)
