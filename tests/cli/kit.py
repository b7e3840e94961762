"""Runs the command line in this process, and makes traces to play."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner, Result

from compactdist.cli import app


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run_json(*arguments: object) -> Any:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return json.loads(result.stdout)


def activations(steps: int = 6, rows: int = 96, channels: int = 80, dtype: torch.dtype = torch.float32) -> Tensor:
    """A slow random walk with unequal channels, ``[steps, rows, channels]``."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(channels, generator=generator) + 0.1
    first = torch.randn(1, rows, channels, generator=generator)
    moves = 0.1 * torch.randn(steps - 1, rows, channels, generator=generator)
    return (torch.cat([first, moves]).cumsum(0) * scale).to(dtype)


def trace(path: Path, tensors: dict[str, Tensor] | None = None, metadata: dict[str, str] | None = None) -> Path:
    save_file(tensors or {"a": activations(), "b": activations(4, 64, 64)}, str(path), metadata=metadata)
    return path
