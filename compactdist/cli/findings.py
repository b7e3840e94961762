"""What ``compactdist doctor`` finds: one line each, with what to do where it is no good."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

__all__ = ["Finding", "Status", "show_findings", "worst"]

Status = Literal["ok", "warning", "error"]
_BY_WEIGHT: tuple[Status, ...] = ("ok", "warning", "error")
_MARKS: dict[Status, str] = {"ok": "[green]ok[/]", "warning": "[yellow]warn[/]", "error": "[red]ERROR[/]"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        section: heading it stands under.
        name: what was looked at.
        value: what was found.
        status: ``"warning"``: it works, slower or untested; ``"error"``: it does not.
        remedy: what to do; empty where all is well.
    """

    section: str
    name: str
    value: str
    status: Status = "ok"
    remedy: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.name}: {self.value}" + (f"; {self.remedy}" if self.remedy else "")


def worst(findings: Iterable[Finding]) -> Status:
    """The gravest status; ``"ok"`` of none."""
    return max((one.status for one in findings), key=_BY_WEIGHT.index, default="ok")


def show_findings(findings: Sequence[Finding], shown_on: Console) -> None:
    """Print findings under their headings, each remedy below what it is for."""
    for section in dict.fromkeys(one.section for one in findings):
        table = Table(box=SIMPLE, show_header=False, title=section, title_justify="left", pad_edge=False)
        table.add_column(no_wrap=True, width=5)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for one in findings:
            if one.section == section:
                text = f"{one.value}\n{one.remedy}" if one.remedy else one.value
                table.add_row(_MARKS[one.status], escape(one.name), escape(text))
        shown_on.print(table)
