"""Codecs by name: the ones in this package, those registered at run time, and those of installed plug-ins.

A distribution offers codecs through the entry point group ``compactdist.codecs``; the entry point's name must
be the codec's id. A plug-in is imported only when its codec is asked for.

A codec with options is written as text, ``"int4:scales=block,block=64"``, wherever a codec is named: in ``wrap``, in
policies, in environment variables, on command lines. :func:`get` alone reads that text.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from compactdist.codecs.base import Codec
from compactdist.errors import CodecConfigError, UnknownCodecError

ENTRY_POINT_GROUP = "compactdist.codecs"

_CODECS: dict[str, type[Codec]] = {}

_C = TypeVar("_C", bound=Codec)


def register(cls: type[_C]) -> type[_C]:
    """Make a codec class available under its ``codec_id``; usable as a class decorator.

    Returns:
        ``cls``, unchanged.

    Raises:
        CodecConfigError: ``cls`` is no codec class, has no id, or the id belongs to another class. A silent
            replacement would leave two peers of the same configuration unable to read each other.
    """
    if not (isinstance(cls, type) and issubclass(cls, Codec)):
        raise CodecConfigError(f"register takes a subclass of Codec, got {cls!r}")
    codec_id = getattr(cls, "codec_id", None)
    if not isinstance(codec_id, str) or not codec_id or ":" in codec_id:
        raise CodecConfigError(f"{cls.__qualname__} needs a class attribute codec_id, a non-empty string without ':'")
    holder = _CODECS.setdefault(codec_id, cls)
    if holder is not cls:
        raise CodecConfigError(
            f"codec id {codec_id!r} already belongs to {holder.__module__}.{holder.__qualname__}; "
            f"{cls.__module__}.{cls.__qualname__} needs an id of its own"
        )
    return cls


def get(codec: str | Mapping[str, Any] | Codec, **config: Any) -> Codec:
    """Return a codec from text, from ``{"id": ..., **options}``, or from a codec (returned as it is).

    Text is an id, or an id and options: ``id:option=value,option=value``. A value is read as JSON where it is JSON
    (``block=64`` is an integer), else as text.

    Example:
        >>> from compactdist import codecs
        >>> codecs.get("int4:scales=block") == codecs.get({"id": "int4", "scales": "block"})
        True

    Raises:
        UnknownCodecError: No codec has this id.
        CodecConfigError: Malformed text, an unknown option, or options beside a codec or in two places.
    """
    if isinstance(codec, str):
        codec = _parse(codec)
    if isinstance(codec, Codec):
        if config:
            raise CodecConfigError(f"{codec!r} is configured already; it takes no {', '.join(sorted(config))}")
        return codec
    if isinstance(codec, Mapping):
        if "id" not in codec:
            raise CodecConfigError(f"a codec dict needs the key 'id', got keys {sorted(codec)}")
        options = {key: value for key, value in codec.items() if key != "id"}
        twice = sorted(set(options) & set(config))
        if twice:
            raise CodecConfigError(f"given both with the codec and as an argument: {', '.join(twice)}")
        return _find(codec["id"]).from_config({**options, **config})
    raise CodecConfigError(f"a codec is an id, a dict or a Codec, as 'int4' or 'int4:scales=block', got {codec!r}")


def _parse(text: str) -> dict[str, Any]:
    """``{"id": ..., **options}`` from ``id:option=value,option=value``."""
    codec_id, _, rest = text.partition(":")
    options: dict[str, Any] = {}
    for item in filter(str.strip, rest.split(",")):
        name, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not name or name == "id":
            raise CodecConfigError(f"codec {text!r}: {item.strip()!r} is not option=value; write 'id:option=value,...'")
        if name in options:
            raise CodecConfigError(f"codec {text!r}: option {name} is given twice")
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            options[name] = value
    return {"id": codec_id.strip(), **options}


def list_codecs() -> list[str]:
    """Return the ids of all codecs that ``get`` can find, sorted. Imports no plug-in."""
    return sorted({*_CODECS, *_plugins()})


def _plugins() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}


def _find(codec_id: Any) -> type[Codec]:
    if codec_id in _CODECS:
        return _CODECS[codec_id]
    plugin = _plugins().get(codec_id)
    if plugin is None:
        known = list_codecs()
        close = difflib.get_close_matches(str(codec_id), known)
        hint = f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""
        raise UnknownCodecError(
            f"no codec has the id {codec_id!r}; known: {', '.join(known)}{hint}. A codec of your own is known once its "
            "module was imported (--import MODULE on the command line), or from an entry point of the group "
            f"{ENTRY_POINT_GROUP!r}"
        )
    cls = plugin.load()
    if getattr(cls, "codec_id", None) != codec_id:
        raise CodecConfigError(
            f"entry point {codec_id!r} of {ENTRY_POINT_GROUP} leads to {plugin.value}, whose codec_id differs"
        )
    return register(cls)
