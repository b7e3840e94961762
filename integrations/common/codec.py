"""The codec and other options of an `enable` that was not given them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compactdist.group.environment import settings_from_environment
from compactdist.presets import expand, with_steered_codec

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
    named = {"preset": preset} if preset is not None else environment
    target = {name: value for name, value in environment.items() if name == "target"}
    return with_steered_codec({**target, **expand(named)}, named).get("codec", USUAL)


def chosen_option(name: str, given: Mapping[str, Any], usual: Any) -> Any:
    """What `compactdist.wrap(**given)` will take for an option: what is given, that of the environment, or `usual`.

    Raises:
        compactdist.errors.ConfigError: a misspelt variable, or a bad value of one.
    """
    return given[name] if name in given else expand(settings_from_environment()).get(name, usual)
