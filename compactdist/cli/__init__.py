"""The command line: ``compactdist demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compactdist import __version__
from compactdist.cli.demo import DemoError, run_demo

__all__ = ["main"]

app = typer.Typer(
    help="Residual-compressed communication behind torch.distributed.", no_args_is_help=True, add_completion=False
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"compactdist {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Residual-compressed communication behind torch.distributed."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the picture and the runs' results.")] = Path("demo"),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the table to this file as JSON.")] = None,
    steps: Annotated[int, typer.Option(min=2, help="Denoising steps.")] = 28,
    route: Annotated[
        list[str] | None, typer.Option(help="ring or ulysses; both if not given. May be repeated.")
    ] = None,
) -> None:
    """Draw ten digits with xDiT's FLUX pipeline on two CPU ranks, once per codec, and compare.

    A small trained FLUX transformer runs in the unmodified xfuser pipeline over gloo, with ring and with Ulysses
    attention. Needs the xdit extra; about half a minute.
    """
    try:
        run_demo(out, json_file, steps, route or ["ring", "ulysses"])
    except DemoError as error:
        typer.secho(str(error), err=True, fg=typer.colors.RED)
        raise typer.Exit(1) from None


def main() -> None:
    """Entry point of the ``compactdist`` command."""
    app()
