"""What the commands share: codecs by name, tables that fit the terminal, results as JSON, and failing well."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from compactdist import codecs
from compactdist.codecs import Codec
from compactdist.errors import CodecConfigError, CompactDistError, ConfigError, UnknownCodecError
from compactdist.observe.trace import TraceError
from compactdist.presets import refuse_as_codec
from compactdist.state import Order

__all__ = [
    "STDOUT",
    "Targets",
    "Column",
    "Imports",
    "JsonFile",
    "check_writable",
    "console",
    "failing_well",
    "fitting_table",
    "import_codecs",
    "now",
    "parse_codecs",
    "parse_order",
    "warn_if_busy",
    "write_json",
]

_USAGE_ERRORS = (CodecConfigError, ConfigError, UnknownCodecError, TraceError)
_ENDLESS = 10_000

STDOUT = Path("-")
"""In place of a file for results: standard output."""

JsonFile = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write the numbers there as JSON; - for standard output."),
]

Targets = Annotated[
    list[str] | None,
    typer.Option(
        help="nmse_db=-32, bits=1.5 or bytes_per_step=2e6: what the codec's rates (codec rates if none is given) are "
        "chosen for. May be repeated."
    ),
]

Imports = Annotated[
    list[str] | None,
    typer.Option(
        "--import",
        metavar="MODULE",
        help="Import this module or file first, which registers codecs of your own. May be repeated.",
    ),
]


def import_codecs(modules: Sequence[str] | None) -> None:
    """Import modules, found as ``python -m`` finds them, or files, so that the codecs they register have names.

    Raises:
        ConfigError: there is no such module or file, or it cannot be imported.
    """
    for name in modules or ():
        try:
            if name.endswith(".py"):
                spec = importlib.util.spec_from_file_location(Path(name).stem, name)
                assert spec is not None
                assert spec.loader is not None
                spec.loader.exec_module(importlib.util.module_from_spec(spec))
            else:
                sys.path.insert(0, os.getcwd())
                importlib.import_module(name)
        except Exception as error:
            raise ConfigError(
                f"--import {name}: {type(error).__name__}: {error}; give a module that Python finds, or a file "
                "NAME.py, whose import registers codecs (compactdist.codecs.register)"
            ) from error


def parse_codecs(texts: Sequence[str] | None) -> dict[str, Codec]:
    """Codecs by the text they were named with; all registered ones if none were.

    Raises:
        ConfigError: a preset is named.
        UnknownCodecError, CodecConfigError: this is no codec.
    """
    for text in texts or ():
        refuse_as_codec(text, "give --preset {}")
    return {text: codecs.get(text) for text in dict.fromkeys(texts or codecs.list())}


def parse_order(text: str) -> Order:
    """The order that a text names.

    Raises:
        ConfigError: it is neither a whole number nor ``auto``.
    """
    if text == "auto":
        return "auto"
    if not text.isdecimal():
        raise ConfigError(f"--order is a whole number or auto, got {text!r}")
    return int(text)


# --- tables -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        head: its name and unit, on two lines where that is narrower.
        cell: the text of a row.
        spare: 0: always shown; the columns with the largest number are the first to go where a table is too wide.
        left: text, not a number.
    """

    head: str
    cell: Callable[[Any], str]
    spare: int = 0
    left: bool = False


def console(json_file: Path | None) -> Console:
    """Where a command shows its table: nowhere if its JSON goes to standard output, which then holds nothing else."""
    return Console(quiet=json_file == STDOUT)


def fitting_table(
    columns: Sequence[Column],
    rows: Sequence[Any],
    shown_on: Console,
    section_of: Callable[[Any], str] = lambda row: "",
    **options: Any,
) -> Table:
    """A table without those of its spare columns for which ``shown_on`` has no room.

    Args:
        columns: all columns.
        rows: what the columns take their cells from.
        shown_on: the console.
        section_of: name of the section that a row belongs to, shown on a line before its first row; empty for none.
        **options: of :class:`rich.table.Table`.
    """
    table = Table(
        box=SIMPLE, title_justify="left", caption_justify="left", pad_edge=False, **{"padding": (0, 1), **options}
    )
    for column in columns:
        head = column.head
        if column.left:
            table.add_column(head, overflow="fold")
        else:
            table.add_column(head, justify="right", no_wrap=True)
    for before, row in zip([None, *rows], rows, strict=False):
        section = section_of(row)
        if before is None or section_of(before) != section:
            if before is not None:
                table.add_section()
            if section:
                table.add_row(section)
        table.add_row(*(column.cell(row) for column in columns))
    spare = max(column.spare for column in columns)
    if spare and shown_on.measure(table, options=shown_on.options.update(width=_ENDLESS)).maximum > shown_on.width:
        kept = [column for column in columns if column.spare < spare]
        return fitting_table(kept, rows, shown_on, section_of, **options)
    return table


# --- results and failures ---------------------------------------------------------------------------------------------


def check_writable(file: Path | None) -> None:
    """Find out before any work is done whether results can be written; changes nothing.

    Raises:
        ConfigError: they cannot; names the path and the reason.
    """
    if file is None or file == STDOUT:
        return
    nearest = next(path for path in (file, *file.parents) if path.exists())
    if file.is_dir():
        raise ConfigError(f"cannot write {file}: it is a folder")
    if nearest != file and not nearest.is_dir():
        raise ConfigError(f"cannot write {file}: {nearest} is no folder")
    if not os.access(nearest, os.W_OK):
        raise ConfigError(f"cannot write {file}: no permission to write {nearest}")


def write_json(file: Path | None, result: Any) -> None:
    """Write a result as JSON, to standard output where the file is ``-``; nothing without a file.

    Raises:
        ConfigError: the file cannot be written.
    """
    if file is None:
        return
    text = json.dumps(result, indent=1, allow_nan=False) + "\n"
    if file == STDOUT:
        sys.stdout.write(text)
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror or error}") from None


def now(device: torch.device) -> float:
    """Seconds, once a device is done with what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


_BUSY = 1.5


def warn_if_busy(load: float) -> None:
    """Say on stderr where other work was on this machine before something was timed."""
    if load > _BUSY:
        typer.secho(
            f"load average {load:.2f} before the run: other work shares this machine, do not trust the times",
            err=True,
            fg=typer.colors.YELLOW,
        )


@contextmanager
def failing_well() -> Iterator[None]:
    """Show the library's errors as one message on stderr; exit status 2 for wrong arguments, else 1."""
    try:
        yield
    except CompactDistError as error:
        typer.secho(f"Error: {error}", err=True, fg=typer.colors.RED)
        raise typer.Exit(2 if isinstance(error, _USAGE_ERRORS) else 1) from None
