"""What the commands share: codecs named on the command line, a console that does not cut tables, and failing well."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import typer
from rich.console import Console

from compactdist import codecs
from compactdist.codecs import Codec
from compactdist.errors import CodecConfigError, CompactDistError, ConfigError, UnknownCodecError

__all__ = ["failing_well", "make_console", "parse_codecs"]

_USAGE_ERRORS = (CodecConfigError, ConfigError, UnknownCodecError)


def parse_codecs(texts: Sequence[str] | None) -> dict[str, Codec]:
    """Codecs by the text they were named with; all registered ones if none were."""
    return {text: codecs.get(text) for text in dict.fromkeys(texts or codecs.list())}


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
