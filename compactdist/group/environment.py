"""Options of ``wrap`` from environment variables: ``COMPACTDIST_`` and the option's name in capitals.

Each option has one, ``timeout`` included. What a program gives to ``wrap`` overrides the environment, and a log line
says so where the two differ.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from compactdist.codecs import get as codec_of
from compactdist.config import Parts
from compactdist.errors import CompactDistError, ConfigError
from compactdist.policy import Rule, rules_from_json
from compactdist.presets import expand
from compactdist.state import Layout, Order

__all__ = ["check_names", "settings_from_environment", "warn_overruled"]

_log = logging.getLogger("compactdist")
_PREFIX = "COMPACTDIST_"
_ALIKE, _BEGINS_ALIKE = 0.85, 0.6


def _switch(text: str) -> bool:
    return {"1": True, "true": True, "0": False, "false": False}[text.strip().lower()]


def _feedback(text: str) -> bool | None:
    return None if text.strip().lower() == "auto" else _switch(text)


def _order(text: str) -> Order:
    return "auto" if text.strip().lower() == "auto" else int(text)


def _parts(text: str) -> Parts:
    return "auto" if text.strip().lower() == "auto" else int(text)


def _content(text: str, opening: str) -> str:
    """The text itself where it is JSON, else the content of the file that it names."""
    return text if text.lstrip().startswith(opening) else Path(text).read_text()


def _preset(text: str) -> str:
    expand({"preset": text})
    return text


def _rules(text: str) -> list[Rule]:
    return rules_from_json(_content(text, "["))


def _layouts(text: str) -> dict[str, Layout]:
    hints = json.loads(_content(text, "{"))
    return {glob: Layout(hint) if isinstance(hint, str) else Layout(**hint) for glob, hint in hints.items()}


_FIELDS: dict[str, tuple[Callable[[str], Any], str]] = {
    "CODEC": (str, "a codec"),
    "PRESET": (_preset, "a preset"),
    "POLICY": (_rules, "a JSON list of rules, or the path of a file that holds one"),
    "WARMUP_STEPS": (int, "an integer"),
    "ORDER": (_order, "an integer or auto"),
    "DAMPING": (float, "a number"),
    "ERROR_FEEDBACK": (_feedback, "one of 1, 0, true, false, auto"),
    "LOCAL": (str, "a word"),
    "MODE": (str, "a word"),
    "MIN_NUMEL": (int, "an integer"),
    "LAYOUTS": (_layouts, "a JSON object from key globs to layouts, or the path of a file that holds one"),
    "FIND_LAYOUT": (_switch, "one of 1, 0, true, false"),
    "STATE": (str, "a word"),
    "KEYFRAME": (str, "a codec"),
    "TARGET": (str, "a target"),
    "PARTS": (_parts, "an integer or auto"),
    "FORWARD": (_switch, "one of 1, 0, true, false"),
    "STATE_BUDGET_BYTES": (int, "an integer"),
    "STATE_OFFLOAD": (str, "a word"),
    "SAMPLE_ERRORS_EVERY": (int, "an integer"),
    "AGREE": (str, "a word"),
    "AGREE_TIMEOUT": (float, "a number"),
    "TIMEOUT": (float, "a number"),
}
_OF_ADAPTERS = frozenset({"XDIT"})
"""Names behind the prefix that adapters read and check themselves."""


def check_names(names: Iterable[str]) -> None:
    """Refuse a variable of ours that does not exist, and one that looks like a misspelling of one of ours.

    Args:
        names: of all variables of the environment.

    Raises:
        ConfigError: there is one; names the nearest that exist.
    """
    known = [_PREFIX + field for field in (*_FIELDS, *sorted(_OF_ADAPTERS))]
    for name in names:
        ours = name.startswith(_PREFIX)
        if name in known or not (ours or _misspelt(name, known)):
            continue
        nearest = difflib.get_close_matches(name, known, n=2)
        hint = f"; did you mean {' or '.join(nearest)}?" if nearest else "."
        raise ConfigError(f"environment variable {name} is unknown{hint} There are: {', '.join(known)}")


def _misspelt(name: str, known: list[str]) -> bool:
    """Whether a name is nearly one of ours. Only what begins like those is compared with all."""
    begins = difflib.get_close_matches(name[: len(_PREFIX) + 1], [_PREFIX], cutoff=_BEGINS_ALIKE)
    return bool(begins and difflib.get_close_matches(name, known, n=1, cutoff=_ALIKE))


def settings_from_environment(environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Arguments of ``wrap`` from variables ``COMPACTDIST_<OPTION>``, e.g. ``COMPACTDIST_CODEC=int4:scales=block``.

    Switches (``FORWARD``, ``FIND_LAYOUT``, ``ERROR_FEEDBACK``) take ``1``, ``0``, ``true`` and ``false``, and
    ``COMPACTDIST_ERROR_FEEDBACK`` also ``auto``, which is ``None``. ``COMPACTDIST_POLICY`` takes rules as
    :func:`~compactdist.policy.rules_from_json` reads them, ``COMPACTDIST_LAYOUTS`` an object from globs to patterns, or
    to the arguments of :class:`Layout`: ``{"*kv*": {"pattern": "(n c) -> 1 n c", "c": 64}}``. Both also take the path
    of a file. Functions have no text form and cannot be given so.

    Args:
        environment: variables by name; ``None``: those of this process.

    Raises:
        ConfigError: an unknown variable of that prefix, or a value of the wrong kind.
    """
    env = os.environ if environment is None else environment
    check_names(env)
    settings: dict[str, Any] = {}
    for field, (parse, what) in _FIELDS.items():
        value = env.get(_PREFIX + field)
        if value is None:
            continue
        try:
            settings[field.lower()] = parse(value)
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            telling = isinstance(error, CompactDistError | json.JSONDecodeError | OSError | TypeError)
            reason = f" ({error})" if telling else ""
            raise ConfigError(f"{_PREFIX}{field}={value!r} is not {what}{reason}") from None
    return settings


def warn_overruled(environment: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Log a warning for each option of the environment without effect, as the program gives it another value.

    Args:
        environment: options from the environment.
        given: options that the program gave, or an adapter for it, those of its preset included.
    """
    of_variables = expand(environment)
    if "preset" in environment:
        of_variables["preset"] = environment["preset"]
    for name in of_variables.keys() & given.keys():
        told, chosen = of_variables[name], given[name]
        if told == chosen or (name in ("codec", "keyframe") and codec_of(told) == codec_of(chosen)):
            continue
        if name in environment:
            said = f"{_PREFIX}{name.upper()}={told!r}"
        elif "preset" in given:
            continue  # one preset in place of another: said once
        else:
            said = f"{name}={told!r} of {_PREFIX}PRESET={environment['preset']!r}"
        _log.warning(
            "%s has no effect on this group: the program (or its adapter) gives %s=%r to wrap(), which overrides "
            "the environment. Unset the variable, or leave %s out of the program",
            said,
            name,
            chosen,
            name,
        )
