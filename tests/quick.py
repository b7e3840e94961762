"""Parameters of a test, of which `make test` takes some and `make test-all` all."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import pytest


def quick_for(some: Container[Any], values: Iterable[Any]) -> list[Any]:
    """The values of one parameter; those that are not among ``some`` are marked slow."""
    return [value if value in some else pytest.param(value, marks=pytest.mark.slow) for value in values]


def quick_rows(some: Container[tuple[Any, ...]], rows: Iterable[tuple[Any, ...]]) -> list[Any]:
    """As :func:`quick_for`, for the values that several parameters take together."""
    return [row if row in some else pytest.param(*row, marks=pytest.mark.slow) for row in rows]
