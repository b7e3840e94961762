"""A table of calls: what each reaches in a wrapped group of two ranks, and how it is counted there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from compactdist import _torch
from tests.group.kit import NUMEL, close, reached

SIZE = 2
NO_DIFFERENCE: dict[str, Any] = {}


@dataclass
class Row:
    """One line of the table: a call, the methods it reaches, how often it is compressed, and what passes why.

    ``on_nccl_like``: what is different on an inner group with NCCL's manners; ``None``: there is no such call.
    """

    call: Callable[[Any, int], Any]
    reaches: list[str]
    compressed: int = 0
    passed: dict[tuple[str, str], int] = field(default_factory=dict)
    error: str = ""
    on_nccl_like: dict[str, Any] | None = field(default_factory=dict)

    def on(self, inner: str) -> Row:
        """The line for an inner group of this kind."""
        return replace(self, **(self.on_nccl_like or {})) if inner == "nccl_like" else self


ROWS: dict[str, Row] = {}


def rows_on(inner: str) -> dict[str, Row]:
    """The table for an inner group of this kind."""
    return {name: line.on(inner) for name, line in ROWS.items() if inner == "gloo" or line.on_nccl_like is not None}


def row(
    *reaches: str,
    compressed: int = 0,
    error: str = "",
    on_nccl_like: dict[str, Any] | None = NO_DIFFERENCE,
    since: tuple[int, int] = _torch.CHECKED_VERSIONS[0],
    **passed: str | tuple[str, int],
) -> Any:
    """``reaches``: in torch 2.13; ``since``: the first version of torch that has the call; ``passed``: operation =
    reason, or (reason, calls).
    """
    expected = {(op, r if isinstance(r, str) else r[0]): 1 if isinstance(r, str) else r[1] for op, r in passed.items()}

    def add(call: Callable[[Any, int], Any]) -> Callable[[Any, int], Any]:
        if since <= _torch.VERSION:
            ROWS[call.__name__] = Row(call, list(reached(*reaches)), compressed, expected, error, on_nccl_like)
        return call

    return add


def blank(times: int = SIZE, numel: int = NUMEL) -> torch.Tensor:
    return torch.full((times * numel,), torch.nan)


def blanks(numel: int = NUMEL) -> list[torch.Tensor]:
    return [torch.full((numel,), torch.nan) for _ in range(SIZE)]


def right(a: torch.Tensor, b: torch.Tensor) -> bool:
    return close(a.detach(), b)
