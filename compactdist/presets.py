"""Options of ``wrap`` by intent: ``wrap(preset="small")``.

Every preset sets the same options, so that one replaces another whole. What is given beside a preset overrides it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

from compactdist.errors import ConfigError
from compactdist.state import STEERED, Order

__all__ = ["PRESETS", "Preset", "expand", "refuse_as_codec", "settled", "with_steered_codec"]


@dataclass(frozen=True)
class Preset:
    """Options that belong together; their meaning is that of :class:`compactdist.Options`.

    Attributes:
        codec: codes residuals.
        keyframe: codes keyframes.
        order: prediction.
    """

    codec: str
    keyframe: str
    order: Order = 1


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        # the first step exact, and an error that no picture shows
        "safe": Preset("int4", "raw"),
        # eight bits of a keyframe cost no error that can be measured
        "balanced": Preset("int2", "int8"),
        # four bits of a keyframe pay for the time that the adaptive order takes (docs/decisions/0031-presets.md)
        "small": Preset("binary", "int4", order="auto"),
        # bytes count for more than time: a transform at less than half a bit
        "tiny": Preset("transform:bits=0.4", "int4", order="auto"),
        # of about 4 steps none may be worse than a step sent in four bits by itself: the keyframe is such a step, and
        # residuals with nearly as many bits stay far below it (docs/decisions/0033-keyframes-follow-hints.md)
        "few-step": Preset("transform:bits=3.75", "int4", order="auto"),
    }
)
"""Presets by name, the largest error last but for ``"few-step"``."""


def expand(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Options with the preset that they name, if any, put in its options' place.

    Args:
        settings: options by name, ``preset`` among them or not.

    Returns:
        Options without ``preset``; those of ``settings`` override those of the preset.

    Raises:
        ConfigError: no such preset.
    """
    others = dict(settings)
    name = others.pop("preset", None)
    if name is None:
        return others
    if name not in PRESETS:
        nearest = difflib.get_close_matches(str(name), PRESETS, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
        raise ConfigError(f"there is no preset {name!r}{hint} There are: {', '.join(PRESETS)}")
    return {**asdict(PRESETS[name]), **others}


def refuse_as_codec(codec: object, remedy: str = "give preset={!r}") -> None:
    """Refuse a preset's name where a codec is asked for.

    Args:
        codec: what was given.
        remedy: what to do, with a place for the name.

    Raises:
        ConfigError: it is the name of a preset.
    """
    if isinstance(codec, str) and codec in PRESETS:
        raise ConfigError(f"{codec!r} is a preset, not a codec: {remedy.format(codec)}")


def with_steered_codec(options: Mapping[str, Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """Options with a codec of several rates where there is a target, and nothing but a preset named a codec.

    Args:
        options: options, presets expanded.
        named: the settings that they were expanded from.
    """
    steered = options.get("target") is not None and "codec" not in named
    return {**options, "codec": STEERED} if steered else dict(options)


def settled(environment: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a group, presets expanded: an argument of ``wrap`` or of its preset overrides the environment.

    Raises:
        ConfigError: no such preset, or one in the codec's place.
    """
    settings = with_steered_codec({**expand(environment), **expand(given)}, {**environment, **given})
    refuse_as_codec(settings.get("codec"))
    return settings
