"""What the commands share: codecs named on the command line, a console that does not cut tables, and failing well."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console

from compactdist import codecs
from compactdist.codecs import Codec
from compactdist.errors import CodecConfigError, CompactDistError, ConfigError, UnknownCodecError

__all__ = ["failing_well", "make_console", "parse_codec", "parse_codecs"]

_USAGE_ERRORS = (CodecConfigError, ConfigError, UnknownCodecError)


def parse_codec(text: str) -> Codec:
    """A codec from ``int4``, ``int4:option=value,other=value`` or ``{"id": "int4", "option": 1}``.

    Values are read as JSON where that is possible, else as text.

    Raises:
        CodecConfigError: the text is malformed, or an option does not exist.
        UnknownCodecError: no codec has this id.
    """
    if text.lstrip().startswith("{"):
        try:
            return codecs.get(json.loads(text))
        except json.JSONDecodeError as error:
            raise CodecConfigError(f"--codec {text!r} is not valid JSON: {error}") from None
    codec_id, _, rest = text.partition(":")
    options: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        name, equals, value = item.partition("=")
        if not equals or not name.strip():
            raise CodecConfigError(f"--codec {text!r}: {item!r} is not option=value; write 'id:option=value,...'")
        try:
            options[name.strip()] = json.loads(value)
        except json.JSONDecodeError:
            options[name.strip()] = value.strip()
    return codecs.get({**options, "id": codec_id.strip()})


def parse_codecs(texts: Sequence[str] | None) -> dict[str, Codec]:
    """Codecs by the text they were named with; all registered ones if none were."""
    return {text: parse_codec(text) for text in dict.fromkeys(texts or codecs.list())}


def make_console(width: int) -> Console:
    """A console at least ``width`` wide: in a pipe or a log file a cut table would be worse than long lines."""
    console = Console()
    return console if console.width >= width else Console(width=width)


@contextmanager
def failing_well() -> Iterator[None]:
    """Show the library's errors as one message on stderr; exit status 2 for wrong arguments, else 1."""
    try:
        yield
    except CompactDistError as error:
        typer.secho(f"Error: {error}", err=True, fg=typer.colors.RED)
        raise typer.Exit(2 if isinstance(error, _USAGE_ERRORS) else 1) from None
